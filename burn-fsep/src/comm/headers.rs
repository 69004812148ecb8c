//! What ranks tell each other of a collective before they take part in it, where the library's messages say nothing of it.

use std::sync::Arc;

use burn::tensor::Bytes;
use serde::{Deserialize, Serialize};

use super::{Block, ExchangePlan, Operation, exchange_plan::by_peer};

/// Bytes of a header.
const HEADER: usize = 256;
/// Bytes of it that say which collective it is; numbers take 9 bytes each.
const TEXT: usize = HEADER - 4 * 9;

/// What this rank does with each peer, and expects of it. Shape `[N]` each.
pub(super) struct Headers {
    sent: Vec<Header>,
    expected: Vec<Header>,
}

impl Headers {
    pub fn new(operation: Operation, plan: &ExchangePlan, size: usize) -> Self {
        let signature = operation.signature();
        let headers =
            |blocks: &[Block]| by_peer(blocks, size).iter().map(|blocks| Header::new(&signature, blocks)).collect();
        Self { sent: headers(&plan.sends), expected: headers(&plan.recvs) }
    }

    /// The exchange that brings each rank what its peers say: in rank order, equally many bytes each.
    pub fn exchange(&self) -> (Arc<Bytes>, ExchangePlan) {
        let size = self.sent.len();
        let data: Vec<u8> = self.sent.iter().flat_map(Header::encode).collect();
        let blocks: Vec<_> = (0..size).map(|peer| Block { peer, offset: peer * HEADER, len: HEADER }).collect();
        let plan =
            ExchangePlan { sends: blocks.clone(), recvs: blocks, recv_len: size * HEADER, send_len: size * HEADER };
        (Arc::new(Bytes::from_elems(data)), plan)
    }

    /// What this rank expects of `peer` and what that one says, if they differ.
    pub fn difference(&self, peer: usize, said: &[u8]) -> Option<[String; 2]> {
        self.expected[peer].difference(&Header::decode(said))
    }
}

/// What one rank is about to do with another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    /// The collective, cut off where it is too long.
    text: String,
    /// Blocks between the two ranks, in this direction.
    blocks: u64,
    /// Their bytes.
    bytes: u64,
    /// Tells lists of block lengths apart whose number and sum are equal.
    fingerprint: u64,
}

impl Header {
    fn new(text: &str, blocks: &[Block]) -> Self {
        let text = text[..text.floor_char_boundary(TEXT)].into();
        let mut header = Self { text, blocks: 0, bytes: 0, fingerprint: 0xcbf2_9ce4_8422_2325 };
        for block in blocks {
            header.blocks += 1;
            header.bytes += block.len as u64;
            // FNV-1a, a word at a time.
            header.fingerprint = (header.fingerprint ^ block.len as u64).wrapping_mul(0x100_0000_01b3);
        }
        header
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = rmp_serde::to_vec(self).expect("plain data, written to memory");
        bytes.resize(HEADER, 0);
        bytes
    }

    /// Reads [`HEADER`] bytes.
    fn decode(bytes: &[u8]) -> Self {
        rmp_serde::from_slice(bytes).unwrap_or_else(|_| Self::new("something unknown", &[]))
    }

    /// Says what differs: what this rank expects of another, and what that one does.
    fn difference(&self, theirs: &Self) -> Option<[String; 2]> {
        if self == theirs {
            return None;
        }
        if self.text != theirs.text {
            return Some([self.text.clone(), theirs.text.clone()]);
        }
        let say = |header: &Self, what: &str| match header.blocks {
            1 => format!("{}: {what} a block of {} bytes", header.text, header.bytes),
            blocks => format!("{}: {what} {blocks} blocks of {} bytes in all", header.text, header.bytes),
        };
        let [ours, mut other] = [say(self, "expects"), say(theirs, "sends")];
        if (self.blocks, self.bytes) == (theirs.blocks, theirs.bytes) {
            other += ", of other lengths";
        }
        Some([ours, other])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text: &str, lengths: &[usize]) -> Header {
        let blocks: Vec<_> = lengths.iter().map(|&len| Block { peer: 0, offset: 0, len }).collect();
        Header::new(text, &blocks)
    }

    #[test]
    fn headers_are_read_as_written() {
        for text in ["", "all-to-all `tokens`", &"ü".repeat(200)] {
            let header = header(text, &[3, 4]);
            assert_eq!(header.encode().len(), HEADER);
            assert_eq!(Header::decode(&header.encode()), header);
        }
    }

    #[test]
    fn differences_are_told() {
        let ours = header("a", &[3, 4]);
        assert_eq!(ours.difference(&ours.clone()), None);
        assert_eq!(ours.difference(&header("b", &[3, 4])), Some(["a".into(), "b".into()]));
        let [expects, sends] = ours.difference(&header("a", &[7])).unwrap();
        assert_eq!((&*expects, &*sends), ("a: expects 2 blocks of 7 bytes in all", "a: sends a block of 7 bytes"));
        let [_, sends] = ours.difference(&header("a", &[4, 3])).unwrap();
        assert!(sends.ends_with("of other lengths"), "{sends}");
    }

    #[test]
    fn an_exchange_brings_each_rank_what_is_meant_for_it() {
        let block = |peer, len| Block { peer, offset: 0, len };
        let plan = |sends, recvs| ExchangePlan { sends, recvs, recv_len: 9, send_len: 9 };
        let ours = Headers::new(Operation::new("a"), &plan(vec![block(1, 5)], vec![block(1, 7)]), 2);
        let said = |headers: &Headers| headers.exchange().0[..HEADER].to_vec();
        let theirs = |len| Headers::new(Operation::new("a"), &plan(vec![block(0, len)], vec![block(0, 5)]), 2);
        assert_eq!(ours.difference(1, &said(&theirs(7))), None);
        assert!(ours.difference(1, &said(&theirs(8))).unwrap()[1].ends_with("sends a block of 8 bytes"));
        let (data, plan) = ours.exchange();
        assert!(plan.check(Operation::new("headers"), 2).is_ok());
        assert_eq!((data.len(), plan.sends[1].range()), (2 * HEADER, HEADER..2 * HEADER));
    }
}
