use super::DispatchPlan;

/// Which of a source's assignments to an expert go to which of its replicas: a plan says only how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicaChoice {
    /// Tokens in their order: the first ones to the first replica.
    InOrder,
    /// Tokens to a replica on a rank that they go to anyway, where there is one: what a runtime does whose tokens travel once to a
    /// rank.
    SharedRanks,
}

impl ReplicaChoice {
    /// Rows that the tokens of `source` need to other ranks if each goes once to each rank that computes any of its experts: pairs of
    /// a token and a rank. `tokens` are the experts of each, in as many assignments to each expert as the plan has.
    pub fn rows_to_other_ranks(self, plan: &DispatchPlan, source: usize, tokens: &[Vec<u32>]) -> u64 {
        let mut assignments = vec![Vec::new(); plan.num_experts()];
        for (token, experts) in tokens.iter().enumerate() {
            let ranks = self.ranks_without_choice(plan, source, experts);
            for &expert in experts {
                assignments[expert as usize].push((self.key(plan, source, expert as usize, &ranks), token));
            }
        }
        let mut ranks_of = vec![Vec::new(); tokens.len()];
        for (expert, assignments) in assignments.iter_mut().enumerate() {
            // Stable: of equal keys in the order of tokens.
            assignments.sort_by_key(|(key, _)| *key);
            let shares = plan.shares(source, expert).iter();
            let ranks = shares.flat_map(|share| std::iter::repeat_n(share.rank as usize, share.tokens as usize));
            for ((_, token), rank) in assignments.iter().zip(ranks).filter(|(_, rank)| *rank != source) {
                ranks_of[*token].push(rank);
            }
        }
        ranks_of
            .iter_mut()
            .map(|ranks: &mut Vec<usize>| {
                ranks.sort_unstable();
                ranks.dedup();
                ranks.len() as u64
            })
            .sum()
    }

    /// Other ranks that a token goes to whatever is chosen: each alone computes one of its experts.
    fn ranks_without_choice(self, plan: &DispatchPlan, source: usize, experts: &[u32]) -> Vec<usize> {
        if self == Self::InOrder {
            return Vec::new();
        }
        let only = |&expert: &u32| match plan.shares(source, expert as usize) {
            [share] if share.rank as usize != source => Some(share.rank as usize),
            _ => None,
        };
        experts.iter().filter_map(only).collect()
    }

    /// Where a token stands among those of an expert: by the first replica on one of `ranks`; a token that goes to none of them
    /// with those of its own rank's replica, where it costs nothing, or between those of others.
    fn key(self, plan: &DispatchPlan, source: usize, expert: usize, ranks: &[usize]) -> usize {
        let shares = plan.shares(source, expert);
        if self == Self::InOrder || shares.len() < 2 {
            return 0;
        }
        let is_met = |rank: usize| rank != source && ranks.contains(&rank);
        let met = shares.iter().position(|share| is_met(share.rank as usize));
        let own = shares.iter().position(|share| share.rank as usize == source);
        // Between two replicas' keys is room for those that may go anywhere. As burn-fsep's `replica_order`.
        met.map_or(own.map_or((shares.len() - 1) | 1, |own| 2 * own), |met| 2 * met)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan of source 0 of three, whose experts have these shares.
    fn plan(shares: &[&[(usize, u32)]]) -> DispatchPlan {
        let mut plan = DispatchPlan::new();
        plan.clear(3, shares.len());
        for shares in shares {
            shares.iter().for_each(|&(rank, tokens)| plan.push(rank, tokens));
            plan.end_pair();
        }
        (0..2 * shares.len()).for_each(|_| plan.end_pair());
        plan
    }

    #[test]
    fn tokens_go_where_they_go_anyway() {
        // As in burn-fsep's `replica_order`: tokens 0 and 2 go to rank 2 for expert 1, tokens 1 and 3 to rank 1 for expert 0.
        let plan = plan(&[&[(1, 2)], &[(2, 2)], &[(1, 2), (2, 2)]]);
        let tokens = [[1, 2], [0, 2], [1, 2], [0, 2]].map(Vec::from);
        assert_eq!(ReplicaChoice::InOrder.rows_to_other_ranks(&plan, 0, &tokens), 6);
        assert_eq!(ReplicaChoice::SharedRanks.rows_to_other_ranks(&plan, 0, &tokens), 4);
    }

    #[test]
    fn what_stays_costs_nothing() {
        let plan = plan(&[&[(0, 1)], &[(2, 1)], &[(0, 1), (2, 1)]]);
        for tokens in [[[0, 2], [1, 2]], [[1, 2], [0, 2]]] {
            let tokens = tokens.map(Vec::from);
            assert_eq!(ReplicaChoice::SharedRanks.rows_to_other_ranks(&plan, 0, &tokens), 1, "{tokens:?}");
        }
    }
}
