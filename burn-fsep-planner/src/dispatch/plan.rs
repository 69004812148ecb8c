use crate::{Layout, PlannerError, RoutingCounts, Topology};

/// Tokens of one source rank and expert that go to one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Share {
    /// The rank that computes them.
    pub rank: u32,
    /// How many assignments: `d[s, e, rank]`, never 0.
    pub tokens: u32,
}

/// A dispatch plan `d[s, e, r]`: how many of `n[s, e]` rank `r` computes, in sparse form.
///
/// The assignments of a source rank to an expert are numbered in token order; the first [`Share::tokens`] of them
/// go to the first share's rank, and so on. Shares are ascending by rank.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DispatchPlan {
    num_ranks: usize,
    num_experts: usize,
    shares: Vec<Share>,
    /// Where the shares of `(s, e)` start. Shape `[N * E + 1]`.
    starts: Vec<u32>,
}

/// The largest load over the mean load; 1.0 is perfect, and also what no load at all has.
pub fn max_over_mean(loads: &[u64]) -> f64 {
    let total: u64 = loads.iter().sum();
    let max = loads.iter().copied().max().unwrap_or(0);
    if total == 0 { 1.0 } else { max as f64 * loads.len() as f64 / total as f64 }
}

impl DispatchPlan {
    /// An empty plan; dispatchers fill it and reuse its memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the content, keeps the memory, and expects the shares of `num_ranks * num_experts` pairs, each
    /// ended by [`DispatchPlan::end_pair`], in the order `(0, 0), (0, 1), ..`.
    pub fn clear(&mut self, num_ranks: usize, num_experts: usize) {
        self.num_ranks = num_ranks;
        self.num_experts = num_experts;
        self.shares.clear();
        self.starts.clear();
        self.starts.push(0);
    }

    /// Adds a share to the current pair; shares of 0 tokens are skipped.
    pub fn push(&mut self, rank: usize, tokens: u32) {
        if tokens > 0 {
            self.shares.push(Share { rank: rank as u32, tokens });
        }
    }

    /// Ends the current pair `(s, e)`; its shares may have come in any order, but at most one a rank.
    pub fn end_pair(&mut self) {
        let first = self.starts.last().copied().unwrap_or_default() as usize;
        if self.shares.len() > first + 1 {
            self.shares[first..].sort_unstable_by_key(|share| share.rank);
        }
        self.starts.push(self.shares.len() as u32);
    }

    /// World size `N`.
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// Experts `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Where the assignments of source rank `source` to `expert` go.
    ///
    /// # Panics
    ///
    /// If an index is out of range.
    pub fn shares(&self, source: usize, expert: usize) -> &[Share] {
        let pair = source * self.num_experts + expert;
        &self.shares[self.starts[pair] as usize..self.starts[pair + 1] as usize]
    }

    /// Every share as `(source, expert, share)`, in order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, usize, Share)> + '_ {
        (0..self.num_ranks)
            .flat_map(move |s| (0..self.num_experts).map(move |e| (s, e)))
            .flat_map(move |(s, e)| self.shares(s, e).iter().map(move |&share| (s, e, share)))
    }

    /// Loads `L_r`: assignments that each rank computes. Shape `[N]`.
    pub fn loads(&self) -> Vec<u64> {
        let mut loads = vec![0u64; self.num_ranks];
        for share in &self.shares {
            loads[share.rank as usize] += u64::from(share.tokens);
        }
        loads
    }

    /// Imbalance: the largest load over the mean load; 1.0 is perfect, and also what a step without tokens has.
    pub fn max_over_mean(&self) -> f64 {
        max_over_mean(&self.loads())
    }

    /// Assignments computed on another node than that of their source rank.
    pub fn cross_node_tokens(&self, topology: &Topology) -> u64 {
        self.count_where(|source, rank| !topology.same_node(source, rank))
    }

    /// Assignments computed on another rank than their source.
    pub fn off_rank_tokens(&self) -> u64 {
        self.count_where(|source, rank| source != rank)
    }

    fn count_where(&self, counted: impl Fn(usize, usize) -> bool) -> u64 {
        self.iter()
            .filter(|(source, _, share)| counted(*source, share.rank as usize))
            .map(|(_, _, share)| u64::from(share.tokens))
            .sum()
    }

    /// Checks the plan's contract: every assignment dispatched exactly once, only to ranks that hold its expert,
    /// shares ascending by rank and not empty.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Shape`] or [`PlannerError::InvalidPlan`] naming the first pair that breaks it.
    pub fn check(&self, layout: &Layout, counts: &RoutingCounts) -> Result<(), PlannerError> {
        for (what, expected, actual) in [
            ("ranks of the plan", counts.num_ranks(), self.num_ranks),
            ("experts of the plan", counts.num_experts(), self.num_experts),
            ("ranks of the layout", counts.num_ranks(), layout.num_ranks()),
            ("experts of the layout", counts.num_experts(), layout.num_experts()),
            ("pairs of the plan", counts.num_ranks() * counts.num_experts() + 1, self.starts.len()),
        ] {
            if expected != actual {
                return Err(PlannerError::Shape { what: what.into(), expected, actual });
            }
        }
        for source in 0..self.num_ranks {
            for expert in 0..self.num_experts {
                let invalid = |why: String| {
                    Err(PlannerError::InvalidPlan(format!("source rank {source}, expert {expert}: {why}")))
                };
                let shares = self.shares(source, expert);
                let sum: u64 = shares.iter().map(|share| u64::from(share.tokens)).sum();
                let expected = counts.get(source, expert);
                if sum != u64::from(expected) {
                    return invalid(format!("{sum} tokens dispatched, {expected} routed"));
                }
                if shares.windows(2).any(|pair| pair[0].rank >= pair[1].rank) {
                    return invalid("shares are not ascending by rank".into());
                }
                if let Some(share) = shares.iter().find(|share| share.tokens == 0) {
                    return invalid(format!("an empty share for rank {}", share.rank));
                }
                if let Some(share) = shares.iter().find(|s| !layout.ranks_of(expert).contains(&s.rank)) {
                    return invalid(format!("rank {} does not hold the expert", share.rank));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(shares: &[&[(usize, u32)]]) -> DispatchPlan {
        let mut plan = DispatchPlan::new();
        plan.clear(2, 2);
        for pair in shares {
            for &(rank, tokens) in *pair {
                plan.push(rank, tokens);
            }
            plan.end_pair();
        }
        plan
    }

    #[test]
    fn check_catches_every_broken_promise() {
        let layout = Layout::from_rows(2, &[vec![0, 1], vec![1, 0]]).unwrap();
        let single = Layout::from_rows(2, &[vec![0], vec![1]]).unwrap();
        let counts = RoutingCounts::from_rows(&[vec![4, 0], vec![0, 2]]).unwrap();
        let good = plan(&[&[(0, 3), (1, 1)], &[], &[], &[(1, 2)]]);
        good.check(&layout, &counts).unwrap();
        assert_eq!(good.loads(), [3, 3]);
        assert_eq!(good.off_rank_tokens(), 1);
        assert_eq!(good.max_over_mean(), 1.0);
        assert!(good.check(&single, &counts).is_err(), "rank 1 does not hold expert 0");
        let lost = plan(&[&[(0, 3)], &[], &[], &[(1, 2)]]);
        assert!(lost.check(&layout, &counts).is_err(), "a token is lost");
        let twice = plan(&[&[(0, 1), (0, 3)], &[], &[], &[(1, 2)]]);
        assert!(twice.check(&layout, &counts).is_err(), "two shares for one rank");
        assert_eq!(plan(&[&[(1, 1), (0, 3)], &[], &[], &[(1, 2)]]), good, "shares are put in order");
    }
}
