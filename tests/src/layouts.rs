use burn_fsep_planner::Layout;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

/// A random valid layout; a function of its arguments alone.
///
/// # Panics
///
/// If the sizes cannot hold all experts.
pub fn random_layout(ranks: usize, slots: usize, experts: usize, seed: u64) -> Layout {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<u32> = (0..experts as u32).collect();
    order.shuffle(&mut rng);
    let mut rows: Vec<Vec<u32>> = vec![Vec::new(); ranks];
    for (i, &expert) in order.iter().enumerate() {
        rows[i % ranks].push(expert);
    }
    for row in &mut rows {
        let mut others: Vec<u32> = order.iter().copied().filter(|e| !row.contains(e)).collect();
        others.shuffle(&mut rng);
        row.extend(others.into_iter().take(slots - row.len()));
        row.shuffle(&mut rng);
    }
    rows.shuffle(&mut rng);
    Layout::from_rows(experts, &rows).expect("every expert has a slot")
}
