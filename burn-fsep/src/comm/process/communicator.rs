use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use burn::tensor::Bytes;

use super::{
    RendezvousError,
    connection::Connections,
    mailbox::Mailbox,
    message::{MAX_BLOCKS, MAX_PAYLOAD, MAX_SIGNATURE, Outgoing},
    pending::PendingFrames,
};
use crate::comm::{
    CommError, Communicator, ExchangePlan, Operation, PendingExchange,
    error::{check_buffer, invalid_argument},
    exchange_plan::by_peer,
};

/// A rank's handle on a group of processes. See [`ProcessConfig`](super::ProcessConfig).
pub struct ProcessCommunicator {
    member: Arc<Member>,
    /// Which of the group's communicators this is; equal on all ranks.
    channel: u64,
    sequence: AtomicU64,
}

/// One rank of a group, shared by all communicators of that rank.
struct Member {
    mailbox: Arc<Mailbox>,
    channels: AtomicU64,
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.mailbox.fail(CommError::aborted(self.mailbox.rank, "its program panicked"));
        }
        self.mailbox.leave();
    }
}

impl fmt::Debug for ProcessCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProcessCommunicator(rank {} of {}, channel {})", self.rank(), self.size(), self.channel)
    }
}

impl ProcessCommunicator {
    pub(super) fn connect(rank: usize, peers: Connections, timeout: Duration) -> Result<Self, RendezvousError> {
        let member = Member { mailbox: Mailbox::start(rank, peers, timeout)?, channels: AtomicU64::new(1) };
        Ok(Self { member: Arc::new(member), channel: 0, sequence: AtomicU64::new(0) })
    }

    /// Leaves the group: peers that wait for this rank, now or later, get an error. Waits, for at most 30 s, until they have
    /// received what was sent to them. Dropping a rank's last communicator does the same.
    pub fn leave(&self) {
        self.mailbox().leave();
    }

    fn mailbox(&self) -> &Arc<Mailbox> {
        &self.member.mailbox
    }
}

impl Communicator for ProcessCommunicator {
    fn rank(&self) -> usize {
        self.mailbox().rank
    }

    fn size(&self) -> usize {
        self.mailbox().size
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        check_buffer(operation, "send", send.len(), plan.send_len)?;
        let (signature, mut blocks) = (operation.signature(), by_peer(&plan.sends, self.size()));
        // Peers refuse what is beyond these limits, so it is refused here, where it can be explained.
        check_limit(operation, "bytes of description", signature.len(), MAX_SIGNATURE)?;
        for blocks in &blocks {
            check_limit(operation, "blocks", blocks.len(), MAX_BLOCKS)?;
            // Blocks may overlap: what is sent is not limited by the buffer's length.
            check_limit(operation, "bytes of data", blocks.iter().map(|block| block.len).sum(), MAX_PAYLOAD)?;
        }
        let key = (self.channel, self.sequence.fetch_add(1, Ordering::Relaxed));
        let own = std::mem::take(&mut blocks[self.rank()]);
        let frames = blocks.into_iter().map(|blocks| Outgoing::frame(key, &signature, send.clone(), blocks)).collect();
        self.mailbox().send(key, &operation.to_string(), signature.clone(), frames)?;
        let mailbox = self.mailbox().clone();
        Ok(Box::new(PendingFrames { mailbox, key, operation, data: send, own, plan, is_over: false }))
    }

    fn abort(&self, reason: &str) {
        self.mailbox().fail(CommError::aborted(self.rank(), reason));
    }

    fn failure(&self) -> Option<CommError> {
        self.mailbox().failure()
    }

    fn duplicate(&self, _name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        let channel = self.member.channels.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { member: self.member.clone(), channel, sequence: AtomicU64::new(0) }))
    }
}

fn check_limit(operation: Operation, what: &str, actual: usize, limit: usize) -> Result<(), CommError> {
    if actual <= limit {
        return Ok(());
    }
    Err(invalid_argument(operation, format!("{actual} {what}; at most {limit} fit one message")))
}
