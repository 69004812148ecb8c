use std::{
    borrow::Cow,
    io::{self, Read, Write},
    sync::Arc,
};

use burn::tensor::Bytes;
use serde::{Deserialize, Serialize};

use super::wire;
use crate::comm::{
    Block, CommError, Operation,
    error::invalid_argument,
    rounds::{Part, RoundKey},
};

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

/// What a rank hears from a peer.
#[derive(Debug)]
pub(super) enum Message {
    /// Its part of a collective.
    Part(RoundKey, Part),
    /// The peer's group has ended, for this reason; it sends no more parts.
    End(CommError),
    /// The peer leaves in peace.
    Leave,
}

/// A message without the payload, which follows it as it is.
#[derive(Serialize, Deserialize)]
enum Head<'a> {
    Part { key: RoundKey, signature: Cow<'a, str>, blocks: Vec<u64> },
    End(CommError),
    Leave,
}

/// What a rank tells a peer.
pub(in crate::comm) struct Outgoing {
    head: Vec<u8>,
    /// The data that several peers' messages share, and this peer's blocks of it.
    payload: Option<(Arc<Bytes>, Vec<Block>)>,
}

/// Peers refuse what is beyond the limits, so it is refused here, where it can be explained.
pub(in crate::comm) fn check_limits(operation: Operation, part: &Part) -> Result<(), CommError> {
    let check = |what: &str, actual: usize, limit: usize| match actual {
        _ if actual <= limit => Ok(()),
        _ => Err(invalid_argument(operation, format!("{actual} {what}; at most {limit} fit one message"))),
    };
    check("bytes of description", part.signature.len(), MAX_SIGNATURE)?;
    part.blocks.iter().try_for_each(|blocks| {
        check("blocks", blocks.len(), MAX_BLOCKS)?;
        // Blocks may overlap: what is sent is not limited by the buffer's length.
        check("bytes of data", blocks.iter().map(|block| block.len).sum(), MAX_PAYLOAD)
    })
}

impl Outgoing {
    /// What each rank of the group gets of a part. Shape `[N]`.
    pub fn parts(key: RoundKey, part: &Part) -> Vec<Self> {
        let message = |blocks: &Vec<Block>| {
            let lens = blocks.iter().map(|block| block.len as u64).collect();
            let head = wire::encode(&Head::Part { key, signature: part.signature.as_str().into(), blocks: lens });
            Self { head, payload: Some((part.data.clone(), blocks.clone())) }
        };
        part.blocks.iter().map(message).collect()
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
        CommError::Timeout { operation, meanwhile, .. } => std::iter::once(operation).chain(meanwhile).collect(),
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
            Head::Part { key, signature, blocks: lens } => {
                if signature.len() > MAX_SIGNATURE || lens.len() > MAX_BLOCKS {
                    return Err(wire::garbled());
                }
                let mut payload = 0;
                let mut blocks = Vec::with_capacity(lens.len());
                for len in lens {
                    // Of this rank, which has no number here.
                    let block = Block { peer: 0, offset: payload, len: usize::try_from(len).unwrap_or(usize::MAX) };
                    payload = payload.saturating_add(block.len);
                    blocks.push(block);
                }
                if payload > MAX_PAYLOAD {
                    return Err(wire::garbled());
                }
                let data = Arc::new(Bytes::from_elems(wire::read_bytes(reader, payload)?));
                Message::Part(key, Part { signature: signature.into_owned(), data, blocks: vec![blocks] })
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

    fn part(signature: &str, blocks: &[(usize, usize)]) -> Vec<u8> {
        let data = Arc::new(Bytes::from_elems((0..100).collect::<Vec<u8>>()));
        let blocks = vec![blocks.iter().map(|&(offset, len)| Block { peer: 0, offset, len }).collect()];
        written(&Outgoing::parts((3, 9), &Part { signature: signature.into(), data, blocks })[0])
    }

    #[test]
    fn parts_are_read_as_written() {
        let bytes = part("sum", &[(90, 2), (5, 1)]);
        let mut bytes = bytes.as_slice();
        let Some(Message::Part((3, 9), part)) = Message::read(&mut bytes).unwrap() else { panic!("not a part") };
        assert_eq!(part.signature, "sum");
        assert_eq!(part.blocks_for(7).collect::<Vec<_>>(), [&[90, 91][..], &[5]]);
        assert!(Message::read(&mut bytes).unwrap().is_none());
        let leave = Message::read(&mut written(&Outgoing::leave()).as_slice()).unwrap();
        assert!(matches!(leave, Some(Message::Leave)));
    }

    #[test]
    fn errors_arrive_as_they_were() {
        let (operation, reason) = (String::from("sum of layer 3"), String::from("außer Atem"));
        for error in [
            CommError::PeerFailed { rank: 7, operation: operation.clone(), reason: reason.clone(), lost: false },
            CommError::PeerFailed { rank: 0, operation: operation.clone(), reason: reason.clone(), lost: true },
            CommError::Timeout {
                operation: operation.clone(),
                waited: Duration::MAX,
                missing: vec![1, 2],
                meanwhile: Some(reason.clone()),
            },
            CommError::mismatch(5, 0, 1, [operation.clone(), reason.clone()]),
            CommError::InvalidArgument { operation: operation.clone(), reason: reason.clone() },
            CommError::Engine { operation, reason },
            CommError::Rendezvous(RendezvousError::WrongToken),
        ] {
            let bytes = written(&Outgoing::end(&error));
            let read = Message::read(&mut bytes.as_slice()).unwrap();
            assert!(matches!(&read, Some(Message::End(read)) if *read == error), "{read:?}");
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
            wire::encode(&Head::Part { key: (0, 0), signature: signature.into(), blocks })
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
        let whole = part("sum", &[(0, 1), (1, 1)]);
        for len in 1..whole.len() {
            let error = Message::read(&mut &whole[..len]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{len}");
        }
        // A length alone is no reason to allocate it: this one would not fit any machine here.
        let promise = wire::encode(&Head::Part { key: (0, 0), signature: "".into(), blocks: vec![MAX_PAYLOAD as u64] });
        assert!(Message::read(&mut promise.as_slice()).is_err());
    }
}
