use std::{sync::Arc, time::Duration};

use burn_fsep_planner::RoutingCounts;

/// One layer's last training forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStats {
    /// The layer.
    pub layer: usize,
    /// Routing counts. Shape `[N, E]`.
    pub counts: Arc<RoutingCounts>,
    /// Largest load of a rank over the mean load, as static expert parallelism would have it: before balancing.
    pub imbalance_static: f64,
    /// The same under the layout and dispatch in use: after balancing.
    pub imbalance: f64,
    /// Assignments computed on another node than their token's.
    pub cross_node_tokens: u64,
    /// Assignments computed on another rank than their token's.
    pub off_rank_tokens: u64,
    /// Bytes of tokens, outputs and their gradients that all ranks send to others, in this forward pass and its backward pass.
    pub token_bytes: u64,
    /// What they would be if each token travelled once for each of its experts; see [`TokenRows`](crate::TokenRows).
    pub token_bytes_by_assignment: u64,
    /// Slots whose expert changed since the forward pass before.
    pub moved_slots: usize,
    /// How long the dispatcher took.
    pub dispatch_time: Duration,
}

/// All layers' last training forward passes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepStats {
    /// By layer; a layer that did not run yet is left out.
    pub layers: Vec<LayerStats>,
}

impl StepStats {
    /// Mean over layers of the imbalance of static expert parallelism; 1.0 without layers.
    pub fn imbalance_static(&self) -> f64 {
        self.mean(|layer| layer.imbalance_static)
    }

    /// Mean over layers of the imbalance after balancing; 1.0 without layers.
    pub fn imbalance(&self) -> f64 {
        self.mean(|layer| layer.imbalance)
    }

    /// The `q`-th percentile (0 to 100) over layers of the imbalance after balancing.
    pub fn imbalance_percentile(&self, q: f64) -> f64 {
        percentile(self.layers.iter().map(|layer| layer.imbalance).collect(), q)
    }

    /// Share of assignments computed on another node than their token's.
    pub fn cross_node_share(&self) -> f64 {
        let total: u64 = self.layers.iter().map(|layer| layer.counts.total()).sum();
        let crossing: u64 = self.layers.iter().map(|layer| layer.cross_node_tokens).sum();
        if total == 0 { 0.0 } else { crossing as f64 / total as f64 }
    }

    /// Bytes of tokens, outputs and their gradients that all ranks send to others, over all layers.
    pub fn token_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.token_bytes).sum()
    }

    /// Their share of what they would be if each token travelled once for each of its experts; 1 where none travel.
    pub fn token_bytes_share(&self) -> f64 {
        let by_assignment: u64 = self.layers.iter().map(|layer| layer.token_bytes_by_assignment).sum();
        if by_assignment == 0 { 1.0 } else { self.token_bytes() as f64 / by_assignment as f64 }
    }

    /// Slots whose expert changed, over all layers.
    pub fn moved_slots(&self) -> usize {
        self.layers.iter().map(|layer| layer.moved_slots).sum()
    }

    fn mean(&self, value: impl Fn(&LayerStats) -> f64) -> f64 {
        if self.layers.is_empty() {
            return 1.0;
        }
        self.layers.iter().map(value).sum::<f64>() / self.layers.len() as f64
    }
}

/// The `q`-th percentile (0 to 100), interpolated linearly; 1.0 of no values.
fn percentile(mut values: Vec<f64>, q: f64) -> f64 {
    if values.is_empty() {
        return 1.0;
    }
    values.sort_by(f64::total_cmp);
    let place = q.clamp(0.0, 100.0) / 100.0 * (values.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    values[low] + (values[high] - values[low]) * (place - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        let values = vec![4.0, 1.0, 2.0, 3.0];
        assert_eq!(percentile(values.clone(), 0.0), 1.0);
        assert_eq!(percentile(values.clone(), 50.0), 2.5);
        assert_eq!(percentile(values, 100.0), 4.0);
    }
}
