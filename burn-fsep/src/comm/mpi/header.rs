//! What ranks tell each other of a collective before they take part, where they compare.

use crate::comm::Block;

/// Bytes of a header.
pub(super) const HEADER: usize = 256;
/// Bytes of it that say which collective it is.
const TEXT: usize = HEADER - 3 * 8;

/// What one rank is about to do with another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// The collective, cut off where it is too long.
    pub text: String,
    /// Blocks between the two ranks, in this direction.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Tells lists of block lengths apart whose number and sum are equal.
    fingerprint: u64,
}

impl Header {
    pub fn new<'a>(text: &str, blocks: impl Iterator<Item = &'a Block>) -> Self {
        let mut cut = TEXT.min(text.len());
        while !text.is_char_boundary(cut) {
            cut -= 1;
        }
        let mut header = Self { text: text[..cut].into(), blocks: 0, bytes: 0, fingerprint: 0xcbf2_9ce4_8422_2325 };
        for block in blocks {
            header.blocks += 1;
            header.bytes += block.len as u64;
            // FNV-1a, a word at a time.
            header.fingerprint = (header.fingerprint ^ block.len as u64).wrapping_mul(0x100_0000_01b3);
        }
        header
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.text.clone().into_bytes();
        bytes.resize(TEXT, 0);
        for number in [self.blocks, self.bytes, self.fingerprint] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Reads [`HEADER`] bytes.
    pub fn decode(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(&bytes[..TEXT]).trim_end_matches('\0').to_string();
        let number = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[TEXT + 8 * i..TEXT + 8 * (i + 1)]);
            u64::from_le_bytes(word)
        };
        Self { text, blocks: number(0), bytes: number(1), fingerprint: number(2) }
    }

    /// Says what differs: what this rank expects of another, and what that one does.
    pub fn difference(&self, theirs: &Self) -> Option<[String; 2]> {
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
        Header::new(text, blocks.iter())
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
}
