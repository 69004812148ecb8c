//! Which of a rank's assignments to an expert go to which of its replicas: a dispatch says how many.

use burn::{
    backend::Dispatch as AnyBackend,
    tensor::{Int, Tensor},
};
use burn_fsep_planner::dispatch::DispatchPlan;

use super::{FsepDeviceOps, LayerSpec};

/// Sorts the assignments of each expert so that a token needs few ranks: those of an expert with several replicas by the first of
/// these replicas' ranks that the token goes to anyway, because it alone computes another of the token's experts here; a token
/// that goes to none of them may go to this rank itself, if it is among them, or anywhere. Stable, so equal from run to run.
///
/// `row_of`, `[T * K]`: the row of each assignment among those sorted by expert, before and after.
pub(super) fn order_by_replica(row_of: Tensor<1, Int>, plan: &DispatchPlan, spec: &LayerSpec) -> Tensor<1, Int> {
    let (rank, topk, experts) = (spec.rank, spec.topk, spec.num_experts);
    let shares = |expert: usize| plan.shares(rank, expert);
    let replicas = (0..experts).map(|expert| shares(expert).len()).max().unwrap_or(0);
    let len = row_of.dims()[0];
    if replicas < 2 || topk < 2 || len == 0 {
        return row_of;
    }
    let (tokens, dtype, device) = (len / topk, row_of.dtype(), row_of.device());
    let repeated = |numbers: Vec<i64>, times: Vec<usize>| {
        let like = row_of.clone().into_dispatch();
        Tensor::<1, Int>::from_dispatch(<AnyBackend as FsepDeviceOps>::fsep_repeated(numbers, times, like))
    };
    // Without a wait for what the device is doing.
    let upload = |values: Vec<i64>| {
        let once = vec![1; values.len()];
        repeated(values, once)
    };
    let loads = (0..experts).map(|expert| shares(expert).iter().map(|share| share.tokens as usize).sum()).collect();
    let expert_of = repeated((0..experts as i64).collect(), loads).select(0, row_of.clone());

    // Of each expert: its only rank, and its ranks if it has several but for this one, where no token needs a row.
    let only = |expert: usize| match shares(expert) {
        [share] if share.rank as usize != rank => i64::from(share.rank),
        _ => -1,
    };
    let several = |expert: usize| -> Vec<i64> {
        let ranks =
            shares(expert).iter().map(|share| if share.rank as usize == rank { -2 } else { i64::from(share.rank) });
        let ranks = ranks.chain(std::iter::repeat_n(-2, replicas)).take(replicas);
        if shares(expert).len() > 1 { ranks.collect() } else { vec![-2; replicas] }
    };
    // Where among those of several replicas an assignment stands that goes to none of them anyway: with those of this rank's, or
    // between two replicas', whose keys are even.
    let free = |expert: usize| {
        let here = shares(expert).iter().position(|share| share.rank as usize == rank);
        here.map_or((shares(expert).len() as i64 - 1) | 1, |here| 2 * here as i64)
    };
    let only = upload((0..experts).map(only).collect()).select(0, expert_of.clone());
    let several = upload((0..experts).flat_map(several).collect()).reshape([experts, replicas]);
    let free = upload((0..experts).map(free).collect()).select(0, expert_of.clone()).reshape([len, 1]);

    // `[T, K, replicas, K]`: whether a replica's rank is that of another assignment.
    let ranks = several.select(0, expert_of.clone()).reshape([tokens, topk, replicas, 1]);
    let anchors = only.reshape([tokens, 1, 1, topk]);
    let dims = [tokens, topk, replicas, topk];
    let is_met = ranks.expand(dims).equal(anchors.expand(dims)).int().cast(dtype);
    let is_met = is_met.max_dim(3).reshape([len, replicas]);
    let none = 2 * replicas as i64;
    let keys = Tensor::<1, Int>::arange(0..replicas as i64, (&device, dtype)).mul_scalar(2).reshape([1, replicas]);
    let keys = keys.expand([len, replicas]).mask_fill(is_met.equal_elem(0), none).min_dim(1);
    let keys = keys.clone().mask_where(keys.equal_elem(none), free).reshape([len]);

    let groups = experts * (none as usize + 1);
    let sorted_by = (expert_of.mul_scalar(none + 1) + keys).into_dispatch();
    let (row_of, ..) = <AnyBackend as FsepDeviceOps>::fsep_sort_assignments(sorted_by, groups, topk);
    Tensor::from_dispatch(row_of)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{FSEPMoEConfig, FsepRuntime, ops::assignment_order::AssignmentOrder};

    /// The rows of assignments `chosen`, `[T * K]` with K = 2, of rank 0 under the shares of its experts.
    fn ordered(chosen: &[i64], shares: &[&[(usize, u32)]]) -> Vec<i64> {
        let config = FSEPMoEConfig::new(2, 2, shares.len()).with_moe_router_topk(2);
        let (runtime, device) = (FsepRuntime::single(), Device::flex());
        let layer = config.init_experts(&runtime, &device).layer_index();
        let spec = runtime.layer_spec(layer).unwrap();
        let mut plan = DispatchPlan::new();
        plan.clear(3, shares.len());
        for shares in shares {
            shares.iter().for_each(|&(rank, tokens)| plan.push(rank, tokens));
            plan.end_pair();
        }
        (0..2 * shares.len()).for_each(|_| plan.end_pair());
        let row_of: Vec<i64> =
            AssignmentOrder::new(chosen, shares.len()).row_of.iter().map(|&row| row as i64).collect();
        let row_of = Tensor::<1, Int>::from_data(row_of.as_slice(), &device);
        order_by_replica(row_of, &plan, &spec).into_data().iter().collect()
    }

    #[test]
    fn tokens_go_to_replicas_where_they_go_anyway() {
        // Tokens 0 and 2 go to rank 2 for expert 1, tokens 1 and 3 to rank 1 for expert 0.
        let chosen = [1, 2, 0, 2, 1, 2, 0, 2];
        let shares: [&[(usize, u32)]; 3] = [&[(1, 2)], &[(2, 2)], &[(1, 2), (2, 2)]];
        assert_eq!(ordered(&chosen, &shares), [2, 6, 0, 4, 3, 7, 1, 5]);
    }

    #[test]
    fn tokens_that_go_nowhere_else_stay_on_their_rank() {
        // Token 1 goes to rank 2 for expert 1; token 0 needs no other rank.
        let chosen = [0, 2, 1, 2];
        let shares: [&[(usize, u32)]; 3] = [&[(0, 1)], &[(2, 1)], &[(0, 1), (2, 1)]];
        assert_eq!(ordered(&chosen, &shares), [0, 2, 1, 3]);
        let chosen = [1, 2, 0, 2];
        assert_eq!(ordered(&chosen, &shares), [1, 3, 0, 2]);
    }

    #[test]
    fn without_replicas_nothing_changes() {
        let chosen = [1, 0, 0, 1];
        assert_eq!(ordered(&chosen, &[&[(1, 2)], &[(2, 2)]]), [2, 0, 1, 3]);
    }
}
