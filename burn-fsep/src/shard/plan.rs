use burn::tensor::{DType, TensorData, bf16, f16};
use burn_fsep_planner::Layout;

use crate::comm::{Block, ExchangePlan};

/// How the shards of a layer travel under one layout: the same plan on every rank. All lengths in elements.
///
/// Unshard: rank `s` sends row `A[r, c]` of its `[E, S]` shards to slot `c` of rank `r`, which puts it at
/// `[c, s * S ..]` of its `[C, N * S]` unsharded weights. Every rank receives `C * (N - 1) * S`, whatever the layout.
///
/// Reshard: piece `s` of the gradient of slot `c` goes from rank `r` to row `[r, c]` of rank `s`'s `[N, C, S]` buffer,
/// to be summed over replicas by [`sum_replicas`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnshardPlan {
    pub unshard: ExchangePlan,
    pub reshard: ExchangePlan,
}

impl UnshardPlan {
    pub fn new(layout: &Layout, shard_len: usize) -> Self {
        let (ranks, slots) = (layout.num_ranks(), layout.slots_per_rank());
        let whole = |slot: usize, source: usize| Block {
            peer: source,
            offset: (slot * ranks + source) * shard_len,
            len: shard_len,
        };
        let (mut sends, mut returned) = (Vec::new(), Vec::new());
        for peer in 0..ranks {
            for (slot, &expert) in layout.experts_of(peer).iter().enumerate() {
                sends.push(Block { peer, offset: expert as usize * shard_len, len: shard_len });
                returned.push(Block { peer, offset: (peer * slots + slot) * shard_len, len: shard_len });
            }
        }
        let held: Vec<Block> = (0..slots).flat_map(|slot| (0..ranks).map(move |s| whole(slot, s))).collect();
        let held_len = slots * ranks * shard_len;
        Self {
            unshard: ExchangePlan {
                sends,
                recvs: held.clone(),
                recv_len: held_len,
                send_len: layout.num_experts() * shard_len,
            },
            reshard: ExchangePlan {
                sends: held,
                recvs: returned,
                recv_len: ranks * slots * shard_len,
                send_len: held_len,
            },
        }
    }
}

/// Unshards single slots again, after a layout was changed under unsharded experts: `rank`'s part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RepairPlan {
    /// Into `[changed slots, N * S]`.
    pub exchange: ExchangePlan,
    /// The slots of this rank that hold another expert now.
    pub slots: Vec<usize>,
}

impl RepairPlan {
    /// `None` if no slot of any rank changed: then no rank communicates.
    pub fn new(before: &Layout, after: &Layout, rank: usize, shard_len: usize) -> Option<Self> {
        let ranks = after.num_ranks();
        let changed = |rank: usize| {
            let pairs = before.experts_of(rank).iter().zip(after.experts_of(rank)).enumerate();
            pairs.filter(|(_, (old, new))| old != new).map(|(slot, (_, new))| (slot, *new as usize))
        };
        let mut sends = Vec::new();
        for peer in 0..ranks {
            for (_, expert) in changed(peer) {
                sends.push(Block { peer, offset: expert * shard_len, len: shard_len });
            }
        }
        if sends.is_empty() {
            return None;
        }
        let slots: Vec<usize> = changed(rank).map(|(slot, _)| slot).collect();
        let place = |i: usize, s: usize| Block { peer: s, offset: (i * ranks + s) * shard_len, len: shard_len };
        let recvs = (0..slots.len()).flat_map(|i| (0..ranks).map(move |s| place(i, s))).collect();
        let recv_len = slots.len() * ranks * shard_len;
        let send_len = after.num_experts() * shard_len;
        Some(Self { exchange: ExchangePlan { sends, recvs, recv_len, send_len }, slots })
    }
}

/// Sums slot gradients over the replicas of each expert, in rank order, and multiplies by `scale`:
/// `[N, C, S] -> [E, S]`. Experts that stand nowhere in the gradient get zeros.
///
/// Half-precision gradients are summed in single precision; the result, of type `to`, is rounded once.
pub(crate) fn sum_replicas(
    received: &[u8],
    dtype: DType,
    layout: &Layout,
    shard_len: usize,
    scale: f64,
    to: DType,
) -> TensorData {
    let shape = [layout.num_experts(), shard_len];
    let sum = ReplicaSum { experts: layout.as_slice(), shape };
    let data = match dtype {
        DType::F64 => TensorData::new(sum.run::<f64, f64>(received, scale, |x| x), shape),
        DType::BF16 => TensorData::new(sum.run::<bf16, f32>(received, scale as f32, bf16::to_f32), shape),
        DType::F16 => TensorData::new(sum.run::<f16, f32>(received, scale as f32, f16::to_f32), shape),
        _ => TensorData::new(sum.run::<f32, f32>(received, scale as f32, |x| x), shape),
    };
    data.convert_dtype(to)
}

struct ReplicaSum<'a> {
    /// Expert of each `[N, C]` row of the received buffer.
    experts: &'a [u32],
    shape: [usize; 2],
}

impl ReplicaSum<'_> {
    fn run<T: bytemuck::Pod, A>(&self, received: &[u8], scale: A, widen: impl Fn(T) -> A) -> Vec<A>
    where
        A: Copy + Default + std::ops::AddAssign + std::ops::MulAssign,
    {
        let [experts, shard_len] = self.shape;
        let received: &[T] = bytemuck::cast_slice(received);
        let mut sums = vec![A::default(); experts * shard_len];
        for (&expert, part) in self.experts.iter().zip(received.chunks_exact(shard_len)) {
            let start = expert as usize * shard_len;
            for (sum, &value) in sums[start..start + shard_len].iter_mut().zip(part) {
                *sum += widen(value);
            }
        }
        sums.iter_mut().for_each(|sum| *sum *= scale);
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Operation;

    #[test]
    fn every_rank_receives_the_same_volume_whatever_the_layout() {
        for rows in [vec![vec![0, 1], vec![2, 0]], vec![vec![2, 1], vec![2, 0]]] {
            let layout = Layout::from_rows(3, &rows).unwrap();
            let plan = UnshardPlan::new(&layout, 5);
            plan.unshard.check(Operation::new("unshard"), 2).unwrap();
            plan.reshard.check(Operation::new("reshard"), 2).unwrap();
            for rank in 0..2 {
                let received: usize = plan.unshard.recvs.iter().filter(|b| b.peer != rank).map(|b| b.len).sum();
                assert_eq!(received, 2 * 5);
            }
            assert_eq!(plan.reshard.recv_len, 2 * 2 * 5);
        }
    }

    #[test]
    fn replicas_are_summed_in_rank_order_and_missing_tokens_give_zeros() {
        let layout = Layout::from_rows(3, &[vec![0, 1], vec![2, 0]]).unwrap();
        let received: [f32; 4] = [1.0, 2.0, 0.0, 4.0];
        let sums = sum_replicas(bytemuck::cast_slice(&received), DType::F32, &layout, 1, 0.5, DType::F32);
        assert_eq!(sums.as_slice::<f32>().unwrap(), [2.5, 1.0, 0.0]);
    }

    #[test]
    fn a_repair_brings_what_a_new_unshard_would() {
        let before = Layout::from_rows(3, &[vec![0, 1], vec![2, 1]]).unwrap();
        let after = Layout::from_rows(3, &[vec![0, 1], vec![2, 0]]).unwrap();
        let plans = [0, 1].map(|rank| RepairPlan::new(&before, &after, rank, 5).unwrap());
        assert!(plans[0].slots.is_empty() && plans[0].exchange.recv_len == 0);
        assert_eq!(plans[1].slots, [1]);
        for plan in &plans {
            plan.exchange.check(Operation::new("repair"), 2).unwrap();
            assert_eq!(plan.exchange.sends, [Block { peer: 1, offset: 0, len: 5 }]);
        }
        let at = |peer| Block { peer, offset: peer * 5, len: 5 };
        assert_eq!(plans[1].exchange.recvs, [at(0), at(1)]);
        assert_eq!(RepairPlan::new(&after, &after, 0, 5), None);
    }
}
