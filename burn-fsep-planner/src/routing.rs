use serde::{Deserialize, Serialize};

use crate::PlannerError;

/// Routing counts `n[s, e]` of one layer in one step: how many assignments (token, expert) the tokens of source
/// rank `s` have to expert `e`. Shape `[N, E]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct RoutingCounts {
    num_ranks: usize,
    num_experts: usize,
    /// Row-major `[N, E]`.
    counts: Vec<u32>,
}

/// What is read may be anything.
#[derive(Deserialize)]
#[serde(rename = "RoutingCounts")]
struct Unchecked {
    num_ranks: usize,
    num_experts: usize,
    counts: Vec<u32>,
}

impl TryFrom<Unchecked> for RoutingCounts {
    type Error = PlannerError;

    fn try_from(Unchecked { num_ranks, num_experts, counts }: Unchecked) -> Result<Self, PlannerError> {
        Self::new(num_ranks, num_experts, counts)
    }
}

impl RoutingCounts {
    /// Counts from a row-major `[N, E]` table.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Zero`] for no rank or no expert, [`PlannerError::Shape`] if the length is not `N * E`,
    /// [`PlannerError::Overflow`] if the total does not fit 32 bits.
    pub fn new(num_ranks: usize, num_experts: usize, counts: Vec<u32>) -> Result<Self, PlannerError> {
        if num_ranks == 0 {
            return Err(PlannerError::Zero { what: "number of ranks" });
        }
        if num_experts == 0 {
            return Err(PlannerError::Zero { what: "number of experts" });
        }
        if num_ranks.checked_mul(num_experts) != Some(counts.len()) {
            return Err(PlannerError::Shape {
                what: format!("routing counts for {num_ranks} ranks x {num_experts} experts"),
                expected: num_ranks.saturating_mul(num_experts),
                actual: counts.len(),
            });
        }
        let total: u64 = counts.iter().map(|&n| u64::from(n)).sum();
        if total > u64::from(u32::MAX) {
            return Err(PlannerError::Overflow {
                what: "total of the routing counts",
                value: total,
                limit: u64::from(u32::MAX),
            });
        }
        Ok(Self { num_ranks, num_experts, counts })
    }

    /// Counts from one row a source rank.
    ///
    /// # Errors
    ///
    /// As [`RoutingCounts::new`]; [`PlannerError::Shape`] if rows differ in length.
    pub fn from_rows(rows: &[Vec<u32>]) -> Result<Self, PlannerError> {
        let num_experts = rows.first().map_or(0, Vec::len);
        for (rank, row) in rows.iter().enumerate() {
            if row.len() != num_experts {
                return Err(PlannerError::Shape {
                    what: format!("experts in the counts of rank {rank}"),
                    expected: num_experts,
                    actual: row.len(),
                });
            }
        }
        Self::new(rows.len(), num_experts, rows.concat())
    }

    /// Counts from real-valued loads (a prediction), rounded to the nearest integer.
    ///
    /// # Errors
    ///
    /// As [`RoutingCounts::new`]; [`PlannerError::NotFinite`] for NaN, infinite or negative loads.
    pub fn from_loads(num_ranks: usize, num_experts: usize, loads: &[f64]) -> Result<Self, PlannerError> {
        let mut counts = Vec::with_capacity(loads.len());
        for (i, &load) in loads.iter().enumerate() {
            if !load.is_finite() || load < 0.0 {
                let what = format!("load of rank {} expert {}", i / num_experts.max(1), i % num_experts.max(1));
                return Err(PlannerError::NotFinite { what, value: load });
            }
            let rounded = load.round();
            if rounded > f64::from(u32::MAX) {
                return Err(PlannerError::Overflow {
                    what: "a predicted load",
                    value: rounded as u64,
                    limit: u64::from(u32::MAX),
                });
            }
            counts.push(rounded as u32);
        }
        Self::new(num_ranks, num_experts, counts)
    }

    /// World size `N`.
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// Experts `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// `n[s, e]`.
    ///
    /// # Panics
    ///
    /// If an index is out of range.
    pub fn get(&self, source: usize, expert: usize) -> u32 {
        self.row(source)[expert]
    }

    /// `n[s, :]`. Shape `[E]`.
    ///
    /// # Panics
    ///
    /// If `source >= N`.
    pub fn row(&self, source: usize) -> &[u32] {
        &self.counts[source * self.num_experts..(source + 1) * self.num_experts]
    }

    /// The whole table, row-major. Shape `[N, E]`.
    pub fn as_slice(&self) -> &[u32] {
        &self.counts
    }

    /// Assignments of some ranks to each expert. Shape `[E]`.
    pub(crate) fn totals_of(&self, ranks: std::ops::Range<usize>) -> Vec<u64> {
        let mut totals = vec![0u64; self.num_experts];
        for rank in ranks {
            for (total, &n) in totals.iter_mut().zip(self.row(rank)) {
                *total += u64::from(n);
            }
        }
        totals
    }

    /// Assignments to each expert over all ranks. Shape `[E]`.
    pub fn expert_totals(&self) -> Vec<u64> {
        self.totals_of(0..self.num_ranks)
    }

    /// All assignments.
    pub fn total(&self) -> u64 {
        self.counts.iter().map(|&n| u64::from(n)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals() {
        let counts = RoutingCounts::from_rows(&[vec![1, 2, 3], vec![4, 5, 6]]).unwrap();
        assert_eq!(counts.get(1, 0), 4);
        assert_eq!(counts.expert_totals(), [5, 7, 9]);
        assert_eq!(counts.total(), 21);
    }

    #[test]
    fn bad_tables_are_typed_errors() {
        assert!(matches!(RoutingCounts::new(2, 2, vec![1; 3]), Err(PlannerError::Shape { .. })));
        assert!(matches!(RoutingCounts::from_rows(&[]), Err(PlannerError::Zero { .. })));
        assert!(matches!(RoutingCounts::from_rows(&[vec![1], vec![1, 2]]), Err(PlannerError::Shape { .. })));
        assert!(matches!(RoutingCounts::new(1, 2, vec![u32::MAX, 1]), Err(PlannerError::Overflow { .. })));
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(matches!(RoutingCounts::from_loads(1, 2, &[1.0, bad]), Err(PlannerError::NotFinite { .. })));
        }
    }
}
