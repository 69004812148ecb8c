use super::DispatchPlan;

/// Rows that tokens need between ranks if each goes once to every rank that computes any of its experts, as far as a dispatch
/// plan tells: which assignments are of one token it does not know.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRowBounds {
    num_ranks: usize,
    /// Assignments, and rows at most, of each source and rank. Shape `[N, N]` each
    assignments: Vec<u64>,
    most: Vec<u64>,
    /// Rows on average, were experts chosen independently of each other. `[N, N]`
    expected: Vec<f64>,
}

impl TokenRowBounds {
    /// Of a plan in which each token has `topk` assignments.
    ///
    /// # Panics
    ///
    /// If `topk` is 0.
    pub fn new(plan: &DispatchPlan, topk: usize) -> Self {
        let ranks = plan.num_ranks();
        let mut assignments = vec![0u64; ranks * ranks];
        for (source, _, share) in plan.iter() {
            assignments[source * ranks + share.rank as usize] += u64::from(share.tokens);
        }
        let tokens: Vec<u64> = assignments.chunks(ranks).map(|row| row.iter().sum::<u64>() / topk as u64).collect();
        // The chance that a token has no assignment on the rank, expert by expert.
        let mut none = vec![1.0f64; ranks * ranks];
        for (source, _, share) in plan.iter() {
            let chance = f64::from(share.tokens) / tokens[source].max(1) as f64;
            none[source * ranks + share.rank as usize] *= (1.0 - chance).max(0.0);
        }
        let of_source = |i: usize| tokens[i / ranks];
        let most = assignments.iter().enumerate().map(|(i, &all)| all.min(of_source(i))).collect();
        let expected = none.iter().enumerate().map(|(i, none)| of_source(i) as f64 * (1.0 - none)).collect();
        Self { num_ranks: ranks, assignments, most, expected }
    }

    /// No more rows than these go from each source to each rank. Shape `[N, N]`
    pub fn most(&self) -> &[u64] {
        &self.most
    }

    /// Assignments that other ranks compute than their source: rows, if each assignment has its own.
    pub fn off_rank_assignments(&self) -> u64 {
        self.off_rank(&self.assignments).sum()
    }

    /// Rows to other ranks, at most.
    pub fn off_rank_most(&self) -> u64 {
        self.off_rank(&self.most).sum()
    }

    /// Rows to other ranks on average, were experts chosen independently of each other.
    pub fn off_rank_expected(&self) -> f64 {
        self.off_rank(&self.expected).sum()
    }

    fn off_rank<'a, T: Copy>(&'a self, table: &'a [T]) -> impl Iterator<Item = T> + 'a {
        table.iter().enumerate().filter(|(i, _)| i / self.num_ranks != i % self.num_ranks).map(|(_, &rows)| rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Layout, RoutingCounts, Topology,
        dispatch::{Dispatcher, EvenSplit},
    };

    fn bounds(ranks: usize, experts: usize, topk: usize, tokens: u32) -> TokenRowBounds {
        let layout = Layout::static_ep(ranks, experts / ranks, experts).unwrap();
        let each = tokens * topk as u32 / experts as u32;
        let counts = RoutingCounts::from_rows(&vec![vec![each; experts]; ranks]).unwrap();
        let mut plan = DispatchPlan::new();
        EvenSplit::new().dispatch(&Topology::single_node(ranks).unwrap(), &layout, &counts, &mut plan).unwrap();
        TokenRowBounds::new(&plan, topk)
    }

    #[test]
    fn few_ranks_get_every_token_and_many_ranks_some() {
        let two = bounds(2, 64, 8, 1024);
        assert_eq!((two.off_rank_assignments(), two.off_rank_most()), (2 * 4 * 1024, 2 * 1024));
        assert!(two.off_rank_expected() > 0.98 * 2048.0 && two.off_rank_expected() < 2048.0);
        let eight = bounds(8, 64, 8, 1024);
        assert_eq!(eight.off_rank_most(), eight.off_rank_assignments());
        let share = eight.off_rank_expected() / eight.off_rank_assignments() as f64;
        assert!((0.65..0.69).contains(&share), "{share}");
    }

    #[test]
    fn one_expert_a_token_has_nothing_to_share() {
        let bounds = bounds(4, 8, 1, 512);
        assert_eq!(bounds.off_rank_most(), bounds.off_rank_assignments());
    }

    #[test]
    fn no_tokens_need_no_rows() {
        let bounds = bounds(2, 4, 2, 0);
        assert_eq!((bounds.off_rank_most(), bounds.off_rank_expected()), (0, 0.0));
    }
}
