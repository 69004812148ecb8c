use std::{
    io::{self, Read, Write},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use burn::tensor::Bytes;

use crate::comm::CommError;

/// Longest description of a collective, in bytes.
pub(super) const MAX_SIGNATURE: usize = 4 << 10;
/// Most blocks of one rank's part of an exchange.
pub(super) const MAX_BLOCKS: usize = 1 << 24;
/// Most data of one rank for another in one collective, in bytes.
pub(super) const MAX_PAYLOAD: usize = 64 << 30;
/// Longest error that a rank tells, in bytes.
const MAX_ERROR: usize = 64 << 10;
/// Longest text in such an error.
const MAX_TEXT: usize = 16 << 10;
/// So much memory is taken on a peer's word; more only as data come.
const TRUSTED: usize = 16 << 20;

/// Names a collective: communicator and number on it.
pub(super) type RoundKey = (u64, u64);

/// A rank's part of a collective, as a peer gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// What the sender is doing, compared across ranks.
    pub signature: String,
    /// Lengths of the blocks that `payload` consists of, in an exchange.
    pub blocks: Vec<u64>,
    pub payload: Vec<u8>,
}

/// What a rank hears from a peer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    Frame(RoundKey, Frame),
    /// The peer's group has ended, for this reason; it sends no more frames.
    End(CommError),
    /// The peer leaves in peace.
    Goodbye,
}

const FRAME: u32 = 1;
const END: u32 = 2;
const GOODBYE: u32 = 3;

/// What a rank tells a peer.
pub(super) struct Outgoing {
    head: Vec<u8>,
    data: Data,
    ranges: Vec<Range<usize>>,
}

/// Data that several peers' messages share.
#[derive(Clone)]
pub(super) enum Data {
    Copied(Arc<Vec<u8>>),
    Sent(Arc<Bytes>),
}

impl Data {
    pub fn none() -> Self {
        Data::Copied(Arc::default())
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Data::Copied(bytes) => bytes,
            Data::Sent(bytes) => bytes,
        }
    }
}

impl Outgoing {
    /// A part of a collective: the `ranges` of `data`, and their lengths if `lists_blocks`.
    pub fn frame(key: RoundKey, signature: &str, data: Data, ranges: Vec<Range<usize>>, lists_blocks: bool) -> Self {
        let payload = ranges.iter().map(|range| range.len()).sum();
        let blocks = if lists_blocks { ranges.as_slice() } else { &[] };
        let mut head = header(FRAME, signature.len(), blocks.len(), key, payload);
        head.extend_from_slice(signature.as_bytes());
        blocks.iter().for_each(|range| head.extend_from_slice(&(range.len() as u64).to_le_bytes()));
        Self { head, data, ranges }
    }

    pub fn end(error: &CommError) -> Self {
        let encoded = encode_error(error);
        let mut head = header(END, 0, 0, (0, 0), encoded.len());
        head.extend_from_slice(&encoded);
        Self { head, data: Data::none(), ranges: Vec::new() }
    }

    pub fn goodbye() -> Self {
        Self { head: header(GOODBYE, 0, 0, (0, 0), 0), data: Data::none(), ranges: Vec::new() }
    }

    pub fn write(&self, writer: &mut impl Write) -> io::Result<()> {
        writer.write_all(&self.head)?;
        self.ranges.iter().try_for_each(|range| writer.write_all(&self.data.bytes()[range.clone()]))
    }
}

const HEADER: usize = 4 + 4 + 4 + 8 + 8 + 8;

fn header(kind: u32, signature: usize, blocks: usize, key: RoundKey, payload: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEADER + signature + 8 * blocks);
    for number in [kind, signature as u32, blocks as u32] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    for number in [key.0, key.1, payload as u64] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    head
}

impl Message {
    /// Reads a message; `None` where the peer closed the connection between two messages.
    pub fn read(reader: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; HEADER];
        let read = loop {
            match reader.read(&mut head) {
                Ok(0) => return Ok(None),
                Ok(read) => break read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        reader.read_exact(&mut head[read..])?;
        let mut head = head.as_slice();
        let (kind, signature, blocks) =
            (take_u32(&mut head)?, take_u32(&mut head)? as usize, take_u32(&mut head)? as usize);
        let (key, payload) = ((take_u64(&mut head)?, take_u64(&mut head)?), take_u64(&mut head)?);
        let payload = usize::try_from(payload).map_err(|_| garbled())?;
        match kind {
            FRAME if signature <= MAX_SIGNATURE && blocks <= MAX_BLOCKS && payload <= MAX_PAYLOAD => {
                let signature = String::from_utf8(read_bytes(reader, signature)?).map_err(|_| garbled())?;
                let table = read_bytes(reader, blocks * 8)?;
                let blocks: Vec<u64> =
                    table.chunks_exact(8).map(|mut number| take_u64(&mut number)).collect::<Result<_, _>>()?;
                let total = blocks.iter().try_fold(0u64, |sum, &len| sum.checked_add(len)).ok_or_else(garbled)?;
                if !blocks.is_empty() && total != payload as u64 {
                    return Err(garbled());
                }
                let payload = read_bytes(reader, payload)?;
                Ok(Some(Message::Frame(key, Frame { signature, blocks, payload })))
            }
            END if payload <= MAX_ERROR => {
                let encoded = read_bytes(reader, payload)?;
                Ok(Some(Message::End(decode_error(&mut encoded.as_slice())?)))
            }
            GOODBYE => Ok(Some(Message::Goodbye)),
            _ => Err(garbled()),
        }
    }
}

fn read_bytes(reader: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len.min(TRUSTED));
    reader.take(len as u64).read_to_end(&mut bytes)?;
    if bytes.len() < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

fn garbled() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it sent something that is no message of this engine")
}

fn take_u32(bytes: &mut &[u8]) -> io::Result<u32> {
    let mut number = [0; 4];
    bytes.read_exact(&mut number).map(|()| u32::from_le_bytes(number))
}

fn take_u64(bytes: &mut &[u8]) -> io::Result<u64> {
    let mut number = [0; 8];
    bytes.read_exact(&mut number).map(|()| u64::from_le_bytes(number))
}

fn encode_error(error: &CommError) -> Vec<u8> {
    let mut out = Vec::new();
    let number = |out: &mut Vec<u8>, number: u64| out.extend_from_slice(&number.to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        let text = &text[..text.floor_char_boundary(MAX_TEXT)];
        number(out, text.len() as u64);
        out.extend_from_slice(text.as_bytes());
    };
    match error {
        CommError::PeerFailed { rank, operation, reason, lost } => {
            number(&mut out, 0);
            number(&mut out, *rank as u64);
            number(&mut out, u64::from(*lost));
            text(&mut out, operation);
            text(&mut out, reason);
        }
        CommError::Timeout { operation, waited, missing } => {
            number(&mut out, 1);
            text(&mut out, operation);
            number(&mut out, waited.as_secs());
            number(&mut out, u64::from(waited.subsec_nanos()));
            // The world size is limited, and with it this list.
            number(&mut out, missing.len() as u64);
            missing.iter().for_each(|&rank| number(&mut out, rank as u64));
        }
        CommError::Mismatch { sequence, rank, operation, peer, peer_operation } => {
            number(&mut out, 2);
            number(&mut out, *sequence);
            number(&mut out, *rank as u64);
            text(&mut out, operation);
            number(&mut out, *peer as u64);
            text(&mut out, peer_operation);
        }
        CommError::InvalidArgument { operation, reason } => {
            number(&mut out, 3);
            text(&mut out, operation);
            text(&mut out, reason);
        }
        CommError::Engine { operation, reason } => {
            number(&mut out, 4);
            text(&mut out, operation);
            text(&mut out, reason);
        }
        CommError::Rendezvous(error) => {
            number(&mut out, 4);
            text(&mut out, "rendezvous");
            text(&mut out, &error.to_string());
        }
    }
    out
}

fn decode_error(bytes: &mut &[u8]) -> io::Result<CommError> {
    let size = |bytes: &mut &[u8]| usize::try_from(take_u64(bytes)?).map_err(|_| garbled());
    let text = |bytes: &mut &[u8]| {
        let len = size(bytes)?;
        String::from_utf8(read_bytes(bytes, len.min(MAX_ERROR))?).map_err(|_| garbled())
    };
    Ok(match take_u64(bytes)? {
        0 => {
            let (rank, lost) = (size(bytes)?, take_u64(bytes)? != 0);
            CommError::PeerFailed { rank, operation: text(bytes)?, reason: text(bytes)?, lost }
        }
        1 => {
            let operation = text(bytes)?;
            let nanos = |nanos: u64| u32::try_from(nanos).ok().filter(|&n| n < 1_000_000_000).ok_or_else(garbled);
            let waited = Duration::new(take_u64(bytes)?, nanos(take_u64(bytes)?)?);
            let missing = (0..size(bytes)?).map(|_| size(bytes)).collect::<io::Result<_>>()?;
            CommError::Timeout { operation, waited, missing }
        }
        2 => CommError::Mismatch {
            sequence: take_u64(bytes)?,
            rank: size(bytes)?,
            operation: text(bytes)?,
            peer: size(bytes)?,
            peer_operation: text(bytes)?,
        },
        3 => CommError::InvalidArgument { operation: text(bytes)?, reason: text(bytes)? },
        4 => CommError::Engine { operation: text(bytes)?, reason: text(bytes)? },
        _ => return Err(garbled()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(outgoing: &Outgoing) -> Vec<u8> {
        let mut bytes = Vec::new();
        outgoing.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn frames_are_read_as_written() {
        let data = Data::Copied(Arc::new((0..100).collect()));
        for lists_blocks in [false, true] {
            let outgoing = Outgoing::frame((3, 9), "sum", data.clone(), vec![90..92, 5..6], lists_blocks);
            let blocks = if lists_blocks { vec![2, 1] } else { vec![] };
            let frame = Frame { signature: "sum".into(), blocks, payload: vec![90, 91, 5] };
            let bytes = written(&outgoing);
            let mut bytes = bytes.as_slice();
            assert_eq!(Message::read(&mut bytes).unwrap(), Some(Message::Frame((3, 9), frame)));
            assert_eq!(Message::read(&mut bytes).unwrap(), None);
        }
        assert_eq!(Message::read(&mut written(&Outgoing::goodbye()).as_slice()).unwrap(), Some(Message::Goodbye));
    }

    #[test]
    fn errors_arrive_as_they_were() {
        let (operation, reason) = (String::from("sum of layer 3"), String::from("außer Atem"));
        for error in [
            CommError::PeerFailed { rank: 7, operation: operation.clone(), reason: reason.clone(), lost: false },
            CommError::PeerFailed { rank: 0, operation: operation.clone(), reason: reason.clone(), lost: true },
            CommError::Timeout { operation: operation.clone(), waited: Duration::MAX, missing: vec![1, 2] },
            CommError::Mismatch {
                sequence: 5,
                rank: 0,
                operation: operation.clone(),
                peer: 1,
                peer_operation: reason.clone(),
            },
            CommError::InvalidArgument { operation: operation.clone(), reason: reason.clone() },
            CommError::Engine { operation, reason },
        ] {
            let bytes = written(&Outgoing::end(&error));
            assert_eq!(Message::read(&mut bytes.as_slice()).unwrap(), Some(Message::End(error)));
        }
    }

    #[test]
    fn long_reasons_are_cut_not_refused() {
        let error = CommError::Engine { operation: "x".into(), reason: "ä".repeat(MAX_ERROR) };
        let Some(Message::End(CommError::Engine { reason, .. })) =
            Message::read(&mut written(&Outgoing::end(&error)).as_slice()).unwrap()
        else {
            panic!("not the error that was sent")
        };
        assert_eq!(reason.len(), MAX_TEXT);
    }

    #[test]
    fn oversized_and_garbled_messages_are_refused() {
        let frame = |signature, blocks, payload| header(FRAME, signature, blocks, (0, 0), payload);
        let mut wrong_sum = frame(0, 1, 2);
        wrong_sum.extend_from_slice(&3u64.to_le_bytes());
        for bytes in [
            frame(MAX_SIGNATURE + 1, 0, 0),
            frame(0, MAX_BLOCKS + 1, 0),
            frame(0, 0, MAX_PAYLOAD + 1),
            header(END, 0, 0, (0, 0), MAX_ERROR + 1),
            header(9, 0, 0, (0, 0), 0),
            wrong_sum,
        ] {
            let error = Message::read(&mut bytes.as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
    }

    #[test]
    fn a_message_that_breaks_off_is_an_error_and_costs_no_memory() {
        let data = Data::Copied(Arc::new(vec![1, 2]));
        let whole = written(&Outgoing::frame((0, 0), "sum", data, vec![0..1, 1..2], true));
        for len in 1..whole.len() {
            let error = Message::read(&mut &whole[..len]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{len}");
        }
        // A length alone is no reason to allocate it: this one would not fit any machine here.
        let promise = header(FRAME, 0, 0, (0, 0), MAX_PAYLOAD);
        assert!(Message::read(&mut promise.as_slice()).is_err());
    }
}
