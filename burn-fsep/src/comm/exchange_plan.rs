use std::ops::Range;

use super::{CommError, Operation, error::invalid_argument};

/// A run of elements exchanged with one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block {
    /// The other rank; may be the own one.
    pub peer: usize,
    /// Where the run starts in the send or receive buffer.
    pub offset: usize,
    /// Its length; never 0.
    pub len: usize,
}

/// Who sends what where in an All-to-All-v.
///
/// Between two ranks, the blocks that one sends and the other receives are matched in their order and have equal
/// lengths. Blocks may lie anywhere in the buffers, so that tokens sorted by expert and whole rows of a shard matrix
/// travel without packing first. Units are those of the caller (rows, elements); see [`ExchangePlan::scaled`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExchangePlan {
    /// What this rank sends.
    pub sends: Vec<Block>,
    /// What this rank receives.
    pub recvs: Vec<Block>,
    /// Length of the receive buffer.
    pub recv_len: usize,
    /// Length of the send buffer.
    pub send_len: usize,
}

impl Block {
    /// Its place in the send or receive buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

impl ExchangePlan {
    /// The same plan in units that are `factor` times smaller, for example from rows to bytes.
    pub fn scaled(&self, factor: usize) -> Self {
        let scale = |blocks: &[Block]| {
            blocks.iter().map(|b| Block { peer: b.peer, offset: b.offset * factor, len: b.len * factor }).collect()
        };
        Self {
            sends: scale(&self.sends),
            recvs: scale(&self.recvs),
            recv_len: self.recv_len * factor,
            send_len: self.send_len * factor,
        }
    }

    /// The plan that brings everything back: backward of an All-to-All-v.
    pub fn reversed(&self) -> Self {
        Self { sends: self.recvs.clone(), recvs: self.sends.clone(), recv_len: self.send_len, send_len: self.recv_len }
    }

    /// Whether the receive buffer equals the send buffer without any communication.
    pub fn is_identity(&self, rank: usize) -> bool {
        self.send_len == self.recv_len
            && self.sends == self.recvs
            && self.sends.iter().all(|block| block.peer == rank)
            && self.sends.iter().map(|block| block.len).sum::<usize>() == self.send_len
    }

    /// Checks that blocks name ranks of the group and lie inside the buffers.
    ///
    /// # Errors
    ///
    /// [`CommError::InvalidArgument`] naming the first block that does not.
    pub fn check(&self, operation: Operation, size: usize) -> Result<(), CommError> {
        for (what, blocks, len) in [("send", &self.sends, self.send_len), ("receive", &self.recvs, self.recv_len)] {
            for block in blocks {
                if block.peer >= size
                    || block.len == 0
                    || block.offset.checked_add(block.len).is_none_or(|end| end > len)
                {
                    let reason = format!("{what} {block:?} does not fit {size} ranks and a buffer of {len}");
                    return Err(invalid_argument(operation, reason));
                }
            }
        }
        Ok(())
    }
}

/// The blocks of each of `size` ranks, in their order. Shape `[N]`.
pub(super) fn by_peer(blocks: &[Block], size: usize) -> Vec<Vec<Block>> {
    let mut of_peer = vec![Vec::new(); size];
    blocks.iter().for_each(|block| of_peer[block.peer].push(*block));
    of_peer
}

/// Hands to `take` each block that a peer has `sent`, with the one that this rank `expects`.
///
/// # Errors
///
/// What this rank does and what its peer does, at the first blocks of unequal lengths.
pub(super) fn match_blocks<'a>(
    operation: Operation,
    expects: &[Block],
    sent: impl IntoIterator<Item = &'a [u8]>,
    take: &mut dyn FnMut(Block, &[u8]),
) -> Result<(), [String; 2]> {
    let (mut sent, mut expects) = (sent.into_iter().fuse(), expects.iter().fuse());
    loop {
        match (sent.next(), expects.next()) {
            (None, None) => return Ok(()),
            (Some(bytes), Some(block)) if bytes.len() == block.len => take(*block, bytes),
            (bytes, block) => {
                let signature = operation.signature();
                let describe = |what: &str, len: Option<usize>| match len {
                    Some(len) => format!("{signature}: {what} a block of {len} bytes"),
                    None => format!("{signature}: {what} no further block"),
                };
                return Err([
                    describe("expects", block.map(|block| block.len)),
                    describe("sends", bytes.map(<[u8]>::len)),
                ]);
            }
        }
    }
}

/// What a rank sends to itself, with the places where it goes.
///
/// # Errors
///
/// [`CommError::InvalidArgument`] if it is not what the rank receives from itself.
#[cfg(any(feature = "mpi", feature = "nccl"))]
pub(super) fn own_blocks(
    operation: Operation,
    plan: &ExchangePlan,
    rank: usize,
) -> Result<Vec<(Block, Block)>, CommError> {
    let own = |blocks: &[Block]| blocks.iter().filter(|block| block.peer == rank).copied().collect::<Vec<_>>();
    let (from, to) = (own(&plan.sends), own(&plan.recvs));
    if from.iter().map(|block| block.len).ne(to.iter().map(|block| block.len)) {
        return Err(invalid_argument(operation, "what this rank sends itself is not what it receives".into()));
    }
    Ok(from.into_iter().zip(to).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OP: Operation = Operation::new("test");

    #[test]
    fn reversing_twice_changes_nothing() {
        let plan = ExchangePlan {
            sends: vec![Block { peer: 1, offset: 0, len: 3 }],
            recvs: vec![Block { peer: 0, offset: 1, len: 2 }],
            recv_len: 3,
            send_len: 4,
        };
        assert_eq!(plan.reversed().reversed(), plan);
        assert_eq!(plan.scaled(4).sends[0].len, 12);
    }

    #[test]
    fn blocks_outside_the_buffers_are_refused() {
        let block = |peer, offset, len| ExchangePlan {
            sends: vec![Block { peer, offset, len }],
            send_len: 4,
            ..Default::default()
        };
        assert!(block(1, 0, 4).check(OP, 2).is_ok());
        for bad in [block(2, 0, 4), block(0, 1, 4), block(0, 0, 0)] {
            assert!(matches!(bad.check(OP, 2), Err(CommError::InvalidArgument { .. })));
        }
    }

    #[test]
    fn blocks_are_matched_in_their_order() {
        let blocks = [(0, 2), (5, 1)].map(|(offset, len)| Block { peer: 1, offset, len });
        let matched = |sent: &[&[u8]]| {
            let mut taken = Vec::new();
            let result = match_blocks(OP, &blocks, sent.iter().copied(), &mut |block, bytes| {
                taken.push((block.offset, bytes.to_vec()));
            });
            (taken, result)
        };
        assert_eq!(matched(&[&[1, 2], &[3]]), (vec![(0, vec![1, 2]), (5, vec![3])], Ok(())));
        for (sent, expects, sends) in [
            (&[&[1u8, 2][..]][..], "expects a block of 1 bytes", "sends no further block"),
            (&[&[1], &[3]], "expects a block of 2 bytes", "sends a block of 1 bytes"),
            (&[&[1, 2], &[3], &[4]], "expects no further block", "sends a block of 1 bytes"),
        ] {
            let [ours, theirs] = matched(sent).1.unwrap_err();
            assert!(ours.ends_with(expects) && theirs.ends_with(sends), "{ours}; {theirs}");
        }
    }
}
