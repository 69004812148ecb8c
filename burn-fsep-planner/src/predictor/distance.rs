use crate::RoutingCounts;

/// Share of assignments that go to another expert in one than in the other: 0 for proportional totals, 1 for disjoint
/// ones. Which source they come from does not count.
pub(super) fn distance(a: &RoutingCounts, b: &RoutingCounts) -> f64 {
    let (of_a, of_b) = (a.total().max(1) as f64, b.total().max(1) as f64);
    let totals = a.expert_totals().into_iter().zip(b.expert_totals());
    totals.map(|(a, b)| (a as f64 / of_a - b as f64 / of_b).abs()).sum::<f64>() / 2.0
}
