use std::{
    borrow::Cow,
    io::{self, Read, Write},
    sync::Arc,
};

use burn::tensor::Bytes;
use serde::{Deserialize, Serialize};

use super::wire;
use crate::comm::{Block, CommError};

/// Longest description of a collective, in bytes.
pub(super) const MAX_SIGNATURE: usize = 4 << 10;
/// Most blocks of one rank for another in one collective.
pub(super) const MAX_BLOCKS: usize = 1 << 20;
/// Most data of one rank for another in one collective, in bytes.
pub(super) const MAX_PAYLOAD: usize = 64 << 30;
/// Longest text in an error that a rank tells.
const MAX_TEXT: usize = 16 << 10;
/// Longest head of a message: its blocks take up to 9 bytes each.
const MAX_HEAD: usize = 9 * MAX_BLOCKS + 2 * MAX_SIGNATURE;

/// Names a collective: communicator and number on it.
pub(super) type RoundKey = (u64, u64);

/// A rank's part of a collective, as a peer gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// What the sender is doing, compared across ranks.
    pub signature: String,
    /// Lengths of the blocks that `payload` consists of.
    pub blocks: Vec<u64>,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The blocks of the payload.
    pub fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.payload.as_slice();
        // Checked when it was read.
        self.blocks.iter().map(move |&len| rest.split_off(..len as usize).unwrap_or_default())
    }
}

/// What a rank hears from a peer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    Frame(RoundKey, Frame),
    /// The peer's group has ended, for this reason; it sends no more frames.
    End(CommError),
    /// The peer leaves in peace.
    Leave,
}

/// A message without the payload, which follows it as it is.
#[derive(Serialize, Deserialize)]
enum Head<'a> {
    Frame { key: RoundKey, signature: Cow<'a, str>, blocks: Vec<u64> },
    End(CommError),
    Leave,
}

/// What a rank tells a peer.
pub(super) struct Outgoing {
    head: Vec<u8>,
    /// The data that several peers' messages share, and this peer's blocks of it.
    payload: Option<(Arc<Bytes>, Vec<Block>)>,
}

impl Outgoing {
    pub fn frame(key: RoundKey, signature: &str, data: Arc<Bytes>, blocks: Vec<Block>) -> Self {
        let lens = blocks.iter().map(|block| block.len as u64).collect();
        let head = wire::encode(&Head::Frame { key, signature: signature.into(), blocks: lens });
        Self { head, payload: Some((data, blocks)) }
    }

    pub fn end(error: &CommError) -> Self {
        Self { head: wire::encode(&Head::End(shortened(error))), payload: None }
    }

    pub fn leave() -> Self {
        Self { head: wire::encode(&Head::Leave), payload: None }
    }

    pub fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        writer.write_all(&self.head)?;
        let Some((data, blocks)) = &self.payload else { return Ok(()) };
        blocks.iter().try_for_each(|block| writer.write_all(&data[block.range()]))
    }
}

/// The error with texts that fit a message.
fn shortened(error: &CommError) -> CommError {
    let mut error = error.clone();
    let texts = match &mut error {
        CommError::PeerFailed { operation, reason, .. }
        | CommError::InvalidArgument { operation, reason }
        | CommError::Engine { operation, reason } => vec![operation, reason],
        CommError::Mismatch { operation, peer_operation, .. } => vec![operation, peer_operation],
        CommError::Timeout { operation, .. } => vec![operation],
        CommError::Rendezvous(_) => vec![],
    };
    texts.into_iter().for_each(|text| text.truncate(text.floor_char_boundary(MAX_TEXT)));
    error
}

impl Message {
    /// Reads a message; `None` where the peer closed the connection between two messages.
    pub fn read(reader: &mut impl Read) -> io::Result<Option<Self>> {
        let Some(head) = wire::read(reader, MAX_HEAD)? else { return Ok(None) };
        Ok(Some(match head {
            Head::Frame { key, signature, blocks } => {
                let sum = |sum: usize, &len: &u64| sum.checked_add(usize::try_from(len).ok()?);
                let payload = blocks.iter().try_fold(0, sum).filter(|&len| len <= MAX_PAYLOAD);
                let payload = payload.ok_or_else(wire::garbled)?;
                if signature.len() > MAX_SIGNATURE || blocks.len() > MAX_BLOCKS {
                    return Err(wire::garbled());
                }
                let payload = wire::read_bytes(reader, payload)?;
                Message::Frame(key, Frame { signature: signature.into_owned(), blocks, payload })
            }
            Head::End(error) => Message::End(error),
            Head::Leave => Message::Leave,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::comm::process::RendezvousError;

    fn written(outgoing: &Outgoing) -> Vec<u8> {
        let mut bytes = Vec::new();
        outgoing.write(&mut bytes).unwrap();
        bytes
    }

    fn frame(signature: &str, blocks: &[(usize, usize)]) -> Outgoing {
        let data = Arc::new(Bytes::from_elems((0..100).collect::<Vec<u8>>()));
        let blocks = blocks.iter().map(|&(offset, len)| Block { peer: 0, offset, len }).collect();
        Outgoing::frame((3, 9), signature, data, blocks)
    }

    #[test]
    fn frames_are_read_as_written() {
        let bytes = written(&frame("sum", &[(90, 2), (5, 1)]));
        let mut bytes = bytes.as_slice();
        let frame = Frame { signature: "sum".into(), blocks: vec![2, 1], payload: vec![90, 91, 5] };
        assert_eq!(Message::read(&mut bytes).unwrap(), Some(Message::Frame((3, 9), frame)));
        assert_eq!(Message::read(&mut bytes).unwrap(), None);
        assert_eq!(Message::read(&mut written(&Outgoing::leave()).as_slice()).unwrap(), Some(Message::Leave));
    }

    #[test]
    fn errors_arrive_as_they_were() {
        let (operation, reason) = (String::from("sum of layer 3"), String::from("außer Atem"));
        for error in [
            CommError::PeerFailed { rank: 7, operation: operation.clone(), reason: reason.clone(), lost: false },
            CommError::PeerFailed { rank: 0, operation: operation.clone(), reason: reason.clone(), lost: true },
            CommError::Timeout { operation: operation.clone(), waited: Duration::MAX, missing: vec![1, 2] },
            CommError::mismatch(5, 0, 1, [operation.clone(), reason.clone()]),
            CommError::InvalidArgument { operation: operation.clone(), reason: reason.clone() },
            CommError::Engine { operation, reason },
            CommError::Rendezvous(RendezvousError::WrongToken),
        ] {
            let bytes = written(&Outgoing::end(&error));
            assert_eq!(Message::read(&mut bytes.as_slice()).unwrap(), Some(Message::End(error)));
        }
    }

    #[test]
    fn long_reasons_are_cut_not_refused() {
        let error = CommError::Engine { operation: "x".into(), reason: "ä".repeat(64 << 10) };
        let Some(Message::End(CommError::Engine { reason, .. })) =
            Message::read(&mut written(&Outgoing::end(&error)).as_slice()).unwrap()
        else {
            panic!("not the error that was sent")
        };
        assert_eq!(reason.len(), MAX_TEXT);
    }

    #[test]
    fn oversized_and_garbled_messages_are_refused() {
        let head = |signature: &str, blocks: Vec<u64>| {
            wire::encode(&Head::Frame { key: (0, 0), signature: signature.into(), blocks })
        };
        let mut too_long = head("", vec![]);
        too_long[wire::HEADER - 4..wire::HEADER].copy_from_slice(&(MAX_HEAD as u32 + 1).to_le_bytes());
        for (what, bytes) in [
            ("signature", head(&"x".repeat(MAX_SIGNATURE + 1), vec![])),
            ("blocks", head("", vec![0; MAX_BLOCKS + 1])),
            ("payload", head("", vec![MAX_PAYLOAD as u64 + 1])),
            ("sum", head("", vec![u64::MAX, 1])),
            ("head", too_long),
            ("another type", wire::encode(&"no message")),
            ("no type", [&head("", vec![])[..wire::HEADER], &[0xc1; 64]].concat()),
            ("garbage", vec![0x47; 64]),
        ] {
            let error = Message::read(&mut bytes.as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{what}");
        }
    }

    #[test]
    fn a_message_that_breaks_off_is_an_error_and_costs_no_memory() {
        let whole = written(&frame("sum", &[(0, 1), (1, 1)]));
        for len in 1..whole.len() {
            let error = Message::read(&mut &whole[..len]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{len}");
        }
        // A length alone is no reason to allocate it: this one would not fit any machine here.
        let promise =
            wire::encode(&Head::Frame { key: (0, 0), signature: "".into(), blocks: vec![MAX_PAYLOAD as u64] });
        assert!(Message::read(&mut promise.as_slice()).is_err());
    }
}
