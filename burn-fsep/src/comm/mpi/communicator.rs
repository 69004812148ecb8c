use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::Bytes;

use super::{
    group::{Group, Handle},
    pending::PendingMessages,
    transfer::tags,
};
use crate::comm::{
    CommError, Communicator, ExchangePlan, Operation, PendingExchange, error::check_buffer, exchange_plan::own_blocks,
    headers::Headers,
};

/// A rank's handle on MPI, with a communicator of MPI of its own. See [`MpiConfig`](super::MpiConfig).
pub struct MpiCommunicator {
    group: Arc<Group>,
    handle: Handle,
    /// What it carries.
    name: &'static str,
    sequence: AtomicU64,
}

impl fmt::Debug for MpiCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MpiCommunicator(rank {} of {}, {}, {:?})", self.rank(), self.size(), self.name, self.group)
    }
}

impl MpiCommunicator {
    pub(super) fn connect(group: Arc<Group>, name: &'static str) -> Result<Self, CommError> {
        let handle = group.connect()?;
        Ok(Self { group, handle, name, sequence: AtomicU64::new(0) })
    }

    pub(super) fn group(&self) -> &Group {
        &self.group
    }
}

impl Communicator for MpiCommunicator {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn world_rank(&self, rank: usize) -> usize {
        self.group.control.comm.world_rank(rank)
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        plan.check(operation, self.size())?;
        check_buffer(operation, "send", send.len(), plan.send_len)?;
        let group = self.group.clone();
        let own = own_blocks(operation, &plan, self.rank()).map_err(|error| group.control.fail(error))?;
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let [header_tag, payload_tag] = tags(sequence);
        let headers = group.check_signatures.then(|| Headers::new(operation, &plan, self.size()));
        let post = |headers: Headers| -> Result<_, CommError> {
            let (data, plan) = headers.exchange();
            Ok((headers, group.post(operation, self.handle.raw, header_tag, data, &plan)?))
        };
        let headers = headers.map(post).transpose()?;
        let payload = group.post(operation, self.handle.raw, payload_tag, send.clone(), &plan)?;
        Ok(Box::new(PendingMessages { group, operation, sequence, data: send, plan, own, headers, payload }))
    }

    fn abort(&self, reason: &str) {
        if self.group.control.failure().is_none() {
            self.group.control.comm.abort(reason);
        }
        self.group.control.fail(CommError::aborted(self.group.control.world_rank(), reason));
    }

    fn failure(&self) -> Option<CommError> {
        self.group.control.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::connect(self.group.clone(), name)?))
    }
    fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::connect(self.group.split(name, color, key)?, name)?))
    }
}
