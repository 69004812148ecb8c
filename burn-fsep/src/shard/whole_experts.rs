//! Whole experts on ranks that otherwise have a part of each: for what looks at matrices.

use std::ops::Range;

use burn::module::ParamId;

use super::{ExpertShape, mix};
use crate::comm::{Block, ExchangePlan};

/// Which rank has which experts whole: runs of `ceil(E / N)`. The last ranks may have fewer, or none; rank 0 has some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WholeExperts {
    /// Experts `E`.
    pub experts: usize,
    /// Ranks `N` that share them.
    pub ranks: usize,
}

impl WholeExperts {
    /// Experts of a rank that has as many as any.
    pub fn run(self) -> usize {
        self.experts.div_ceil(self.ranks)
    }

    /// The experts of a rank.
    pub fn of_rank(self, rank: usize) -> Range<usize> {
        let start = |rank: usize| (rank * self.run()).min(self.experts);
        start(rank)..start(rank + 1)
    }

    /// Brings a rank its experts from all ranks' shards: `[E, S] -> [experts of the rank, N * S]`, padded behind each expert.
    /// [Reversed](ExchangePlan::reversed), it returns them.
    pub fn gather(self, rank: usize, shard_len: usize) -> ExchangePlan {
        let Self { experts, ranks } = self;
        let block = |peer, place: usize| Block { peer, offset: place * shard_len, len: shard_len };
        let ours = self.of_rank(rank).len();
        ExchangePlan {
            sends: (0..experts).map(|expert| block(expert / self.run(), expert)).collect(),
            recvs: (0..ranks).flat_map(|peer| (0..ours).map(move |row| block(peer, row * ranks + peer))).collect(),
            recv_len: ours * ranks * shard_len,
            send_len: experts * shard_len,
        }
    }
}

/// A matrix or a bias of an expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpertPart {
    /// Where it lies in the expert's flat vector.
    pub range: Range<usize>,
    /// `[out, in]`, or `[out]` for a bias.
    pub dims: Vec<usize>,
}

impl ExpertShape {
    /// The matrices of an expert (gate, up `[F, D]`, down `[D, F]`), then its biases, as they follow each other in its flat vector.
    pub(crate) fn parts(&self) -> Vec<ExpertPart> {
        let Self { hidden, ffn, gated, bias } = *self;
        let outs =
            if gated { vec![(ffn, hidden), (ffn, hidden), (hidden, ffn)] } else { vec![(ffn, hidden), (hidden, ffn)] };
        let matrices = outs.iter().map(|&(rows, columns)| vec![rows, columns]);
        let biases = outs.iter().filter(|_| bias).map(|&(rows, _)| vec![rows]);
        let mut start = 0;
        let part = |dims: Vec<usize>| {
            let range = start..start + dims.iter().product::<usize>();
            start = range.end;
            ExpertPart { range, dims }
        };
        matrices.chain(biases).map(part).collect()
    }
}

/// The id under which an optimizer has the state of an expert's part, by its place in [`ExpertShape::parts`]: a function of the id of
/// the rank's parameter, so that it stays as long as that one's.
pub(crate) fn part_id(weight: ParamId, expert: usize, place: usize) -> ParamId {
    ParamId::from(mix(mix(weight.val(), expert as u64), place as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Operation;

    #[test]
    fn each_expert_is_on_one_rank_and_plans_match() {
        for (experts, ranks) in [(1, 4), (3, 4), (5, 4), (8, 3), (8, 8), (7, 1)] {
            let whole = WholeExperts { experts, ranks };
            let all: Vec<_> = (0..ranks).flat_map(|rank| whole.of_rank(rank)).collect();
            assert_eq!(all, (0..experts).collect::<Vec<_>>(), "{whole:?}");
            assert!(!whole.of_rank(0).is_empty());
            // Every rank's shards, numbered, as the plans bring them.
            let plans: Vec<_> = (0..ranks).map(|rank| whole.gather(rank, 5)).collect();
            for (rank, plan) in plans.iter().enumerate() {
                plan.check(Operation::new("whole experts"), ranks).unwrap();
                let mut received = vec![None; plan.recv_len];
                for (peer, theirs) in plans.iter().enumerate() {
                    let sends = theirs.sends.iter().filter(|block| block.peer == rank);
                    let recvs = plan.recvs.iter().filter(|block| block.peer == peer);
                    for (send, recv) in sends.zip(recvs) {
                        for (to, from) in recv.range().zip(send.range()) {
                            received[to] = Some((from / 5, peer * 5 + from % 5));
                        }
                    }
                }
                let expected = whole.of_rank(rank).flat_map(|expert| (0..ranks * 5).map(move |i| Some((expert, i))));
                assert_eq!(received, expected.collect::<Vec<_>>(), "{whole:?}");
            }
        }
    }

    #[test]
    fn parts_are_the_whole_expert() {
        for (gated, bias) in [(true, false), (false, false), (true, true), (false, true)] {
            let shape = ExpertShape { gated, bias, ..ExpertShape::new(3, 5) };
            let parts = shape.parts();
            assert_eq!(parts[0].range.start, 0);
            assert!(parts.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
            assert_eq!(parts.last().unwrap().range.end, shape.num_params());
            let matrices: Vec<_> = parts.iter().filter(|part| part.dims.len() == 2).collect();
            assert_eq!(matrices.last().unwrap().range.end, shape.bias_start());
            assert_eq!(matrices.last().unwrap().dims, [3, 5]);
            assert_eq!(matrices[matrices.len() - 2].range.end, shape.gate_up_len());
        }
    }
}
