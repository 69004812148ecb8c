use std::collections::BTreeMap;

use super::{ClusterSpec, ModelSpec, Simulator, SimulatorError};
use crate::{RoutingCounts, SplitMix64, tools::trace::Trace};

/// Correlation of an expert's log-share from one step to the next, as measured in training runs (0.84 to 0.93).
const STEP_CORRELATION: f64 = 0.9;
/// Coefficient of variation of an expert's share from node to node (7 to 11 %).
const NODE_VARIATION: f64 = 0.09;

/// Routing counts in a drawn trace at most: 1 GiB.
const MAX_COUNTS: u128 = 1 << 28;

/// Routing drawn from log-normal expert loads that drift: log-shares are AR(1) over steps and vary from node to node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SyntheticRouting {
    /// Standard deviation of an expert's log-load. 0.4 to 0.5 is typical, 0.8 gives the static imbalance of the paper's
    /// run of 8 experts.
    pub sigma: f64,
    /// Steps to draw.
    pub steps: usize,
    /// Seed; the same seed draws the same routing.
    pub seed: u64,
}

impl SyntheticRouting {
    /// Draws a trace for every layer of the model.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] for a negative or infinite `sigma` or no steps, or if the settings of cluster or model
    /// make no sense; [`SimulatorError::Planner`] if a step has more assignments than the counters hold.
    pub fn trace(&self, cluster: &ClusterSpec, model: &ModelSpec) -> Result<Trace, SimulatorError> {
        self.check()?;
        cluster.check()?;
        model.check(cluster)?;
        let counts_of_step = model.layers as u128 * cluster.world_size() as u128 * model.experts as u128;
        if counts_of_step * self.steps as u128 > MAX_COUNTS {
            let expected = format!("at most {}, so that the drawn counts fit memory", MAX_COUNTS / counts_of_step);
            return Err(SimulatorError::setting("steps", self.steps, expected));
        }
        let topology = cluster.topology()?;
        let mut rng = SplitMix64::new(self.seed);
        let mut counts = BTreeMap::new();
        for layer in 0..model.layers {
            let mut logs: Vec<f64> = (0..model.experts).map(|_| rng.normal()).collect();
            for step in 0..self.steps {
                if step > 0 {
                    drift(&mut logs, &mut rng);
                }
                let mut loads = Vec::with_capacity(cluster.world_size() * model.experts);
                for node in 0..topology.num_nodes() {
                    let weights: Vec<f64> =
                        logs.iter().map(|log| (self.sigma * log + NODE_VARIATION * rng.normal()).exp()).collect();
                    let shares = capped_shares(&weights, model.topk);
                    for _ in topology.ranks_of(node) {
                        loads.extend(shares.iter().map(|share| share * model.assignments()));
                    }
                }
                let table = RoutingCounts::from_loads(cluster.world_size(), model.experts, &loads)?;
                counts.insert((layer, step), table);
            }
        }
        Ok(Trace::new(counts)?)
    }
}

impl SyntheticRouting {
    /// Draws the trace of one group of ranks, of so many layers: experts are as popular in all groups, up to what differs from node to
    /// node and what is chance among as many tokens as a rank has. For worlds whose whole trace would not fit memory.
    ///
    /// # Errors
    ///
    /// As [`SyntheticRouting::trace`].
    pub fn group_trace(&self, simulator: &Simulator, group: usize, layers: usize) -> Result<Trace, SimulatorError> {
        self.check()?;
        let (model, ranks) = (simulator.model(), simulator.groups().ranks);
        let counts_of_step = (layers * ranks * model.experts) as u128;
        if counts_of_step * self.steps as u128 > MAX_COUNTS {
            return Err(SimulatorError::setting("steps", self.steps, "fewer, so that the drawn counts fit memory"));
        }
        let node_ranks = simulator.cluster().ranks_per_node;
        let mut counts = BTreeMap::new();
        for layer in 0..layers {
            let mut shared = SplitMix64::new(SplitMix64::at(self.seed, layer as u64));
            let mut chance = SplitMix64::new(SplitMix64::at(!self.seed, (group * layers + layer) as u64));
            let mut logs: Vec<f64> = (0..model.experts).map(|_| shared.normal()).collect();
            for step in 0..self.steps {
                if step > 0 {
                    drift(&mut logs, &mut shared);
                }
                let mut loads = Vec::with_capacity(ranks * model.experts);
                let mut node = None;
                let mut shares = Vec::new();
                for rank in group * ranks..(group + 1) * ranks {
                    if node != Some(rank / node_ranks) {
                        node = Some(rank / node_ranks);
                        // Equal for all groups of a node.
                        let at = (rank / node_ranks * self.steps + step) as u64;
                        let mut rng = SplitMix64::new(SplitMix64::at(self.seed ^ (1 << 63), at * 4096 + layer as u64));
                        let weight = |log: &f64| (self.sigma * log + NODE_VARIATION * rng.normal()).exp();
                        shares = capped_shares(&logs.iter().map(weight).collect::<Vec<_>>(), model.topk);
                    }
                    let drawn: Vec<f64> = shares
                        .iter()
                        .map(|share| {
                            let mean = share * model.assignments();
                            (mean + mean.sqrt() * chance.normal()).max(0.0)
                        })
                        .collect();
                    let scale = model.assignments() / drawn.iter().sum::<f64>().max(1.0);
                    loads.extend(drawn.into_iter().map(|load| load * scale));
                }
                counts.insert((layer, step), RoutingCounts::from_loads(ranks, model.experts, &loads)?);
            }
        }
        Ok(Trace::new(counts)?)
    }

    fn check(&self) -> Result<(), SimulatorError> {
        if !(0.0..=10.0).contains(&self.sigma) {
            return Err(SimulatorError::setting("sigma", self.sigma, "a number from 0 to 10"));
        }
        if self.steps == 0 {
            return Err(SimulatorError::setting("steps", self.steps, "at least 1"));
        }
        Ok(())
    }
}

/// The next step's log-loads.
fn drift(logs: &mut [f64], rng: &mut SplitMix64) {
    for log in logs {
        let fresh = (1.0 - STEP_CORRELATION * STEP_CORRELATION).sqrt() * rng.normal();
        *log = STEP_CORRELATION * *log + fresh;
    }
}

/// Shares in proportion to weights, none above `1 / topk`: a token chooses an expert at most once, so an expert has at
/// most one assignment of each token.
fn capped_shares(weights: &[f64], topk: usize) -> Vec<f64> {
    let cap = 1.0 / topk as f64;
    let mut shares = vec![0.0; weights.len()];
    let mut open: Vec<usize> = (0..weights.len()).collect();
    let mut left = 1.0;
    loop {
        let sum: f64 = open.iter().map(|&e| weights[e]).sum();
        let over: Vec<usize> = open.iter().copied().filter(|&e| left * weights[e] / sum > cap).collect();
        if over.is_empty() {
            open.iter().for_each(|&e| shares[e] = left * weights[e] / sum);
            return shares;
        }
        over.iter().for_each(|&e| shares[e] = cap);
        left -= cap * over.len() as f64;
        open.retain(|e| !over.contains(e));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::model::tests::{small_cluster, small_model};

    #[test]
    fn the_same_seed_draws_the_same_routing() {
        let draw =
            |seed| SyntheticRouting { sigma: 0.5, steps: 3, seed }.trace(&small_cluster(), &small_model()).unwrap();
        let trace = draw(1);
        assert_eq!(trace, draw(1));
        assert_ne!(trace, draw(2));
        assert_eq!((trace.layers().len(), trace.num_ranks(), trace.num_experts()), (3, 8, 8));
        let total = trace.steps(0).next().unwrap().1.total() as f64;
        assert!((total / (8.0 * small_model().assignments()) - 1.0).abs() < 0.001);
    }

    #[test]
    fn no_expert_gets_a_token_twice() {
        let shares = capped_shares(&[1000.0, 10.0, 1.0, 1.0], 2);
        assert_eq!(shares[0], 0.5);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!(shares[1] < 0.5 && shares[1] > 0.4);
        assert_eq!(capped_shares(&[5.0, 1.0], 2), [0.5, 0.5]);
    }

    #[test]
    fn bad_settings_are_named() {
        for (sigma, steps, field) in
            [(-1.0, 1, "sigma"), (f64::NAN, 1, "sigma"), (0.5, 0, "steps"), (0.5, usize::MAX, "steps")]
        {
            let routing = SyntheticRouting { sigma, steps, seed: 0 };
            let error = routing.trace(&small_cluster(), &small_model()).unwrap_err();
            assert_eq!(error.field(), Some(field));
        }
    }
}
