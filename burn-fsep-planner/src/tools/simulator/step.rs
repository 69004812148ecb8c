use serde::Serialize;

use super::{
    ClusterSpec, LayerLoad, ModelSpec, SimulatorError, WeightPlacement,
    schedule::{Overlap, exposed},
};
use crate::memory::Recompute;

/// Bytes of a gradient element that [`WeightPlacement::Owned`] sums over copies: f32.
const GRADIENT_BYTES: f64 = 4.0;

/// Seconds of a training step by what they are spent on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct StepTime {
    /// Attention, forward and backward.
    pub attention: f64,
    /// Matrix products of the experts of the mean rank.
    pub experts: f64,
    /// Everything else that the mean rank does in memory for its assignments.
    pub elementwise: f64,
    /// Waiting for the most loaded rank.
    pub waiting: f64,
    /// Token All-to-Alls.
    pub all_to_all: f64,
    /// Restoring weights and resharding gradients, as far as compute does not hide it.
    pub exposed_restore: f64,
    /// Collectives of tensor parallelism.
    pub tensor_parallel: f64,
    /// The fixed part of each layer in each micro-batch.
    pub overhead: f64,
    /// Output layer.
    pub head: f64,
    /// Sums of gradients over copies, as far as compute does not hide them, and the optimizer.
    pub update: f64,
}

impl StepTime {
    /// Seconds of the whole step.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// Share of the step that a profiler sees in token All-to-Alls, in which ranks wait for the most loaded one.
    pub fn communication_share(&self) -> f64 {
        (self.waiting + self.all_to_all) / self.total()
    }

    /// The parts with their names.
    pub fn parts(&self) -> [(&'static str, f64); 10] {
        [
            ("attention", self.attention),
            ("experts", self.experts),
            ("elementw.", self.elementwise),
            ("waiting", self.waiting),
            ("all-to-all", self.all_to_all),
            ("restore", self.exposed_restore),
            ("tensor-par", self.tensor_parallel),
            ("overhead", self.overhead),
            ("head", self.head),
            ("update", self.update),
        ]
    }

    /// The mean of some steps, part by part; `None` if there are none.
    pub fn mean(steps: &[Self]) -> Option<Self> {
        let mean = |part: fn(&Self) -> f64| steps.iter().map(part).sum::<f64>() / steps.len() as f64;
        (!steps.is_empty()).then(|| Self {
            attention: mean(|s| s.attention),
            experts: mean(|s| s.experts),
            elementwise: mean(|s| s.elementwise),
            waiting: mean(|s| s.waiting),
            all_to_all: mean(|s| s.all_to_all),
            exposed_restore: mean(|s| s.exposed_restore),
            tensor_parallel: mean(|s| s.tensor_parallel),
            overhead: mean(|s| s.overhead),
            head: mean(|s| s.head),
            update: mean(|s| s.update),
        })
    }
}

/// Simulates steps of one model on one cluster.
#[derive(Debug, Clone)]
pub struct Simulator {
    pub(super) cluster: ClusterSpec,
    pub(super) model: ModelSpec,
}

impl Simulator {
    /// A simulator of a model on a cluster.
    ///
    /// # Errors
    ///
    /// As [`ClusterSpec::check`] and [`ModelSpec::check`].
    pub fn new(cluster: ClusterSpec, model: ModelSpec) -> Result<Self, SimulatorError> {
        cluster.check()?;
        model.check(&cluster)?;
        Ok(Self { cluster, model })
    }

    /// The cluster.
    pub fn cluster(&self) -> &ClusterSpec {
        &self.cluster
    }

    /// The model.
    pub fn model(&self) -> &ModelSpec {
        &self.model
    }

    /// A step in which every layer has the same imbalance, see [`LayerLoad::of_imbalance`].
    ///
    /// # Errors
    ///
    /// As [`LayerLoad::of_imbalance`].
    pub fn step_of_imbalance(&self, max_over_mean: f64) -> Result<StepTime, SimulatorError> {
        Ok(self.step(&[LayerLoad::of_imbalance(&self.cluster, &self.model, max_over_mean)?]))
    }

    /// A step with the given loads. If there are fewer loads than layers, they repeat; without any, experts are
    /// balanced and no token travels.
    pub fn step(&self, loads: &[LayerLoad]) -> StepTime {
        let (cluster, model) = (&self.cluster, &self.model);
        let flops_per_second = cluster.constants.matmul_flops_per_second();
        let recompute = if model.recompute == Recompute::Layers { 1.0 } else { 0.0 };
        let (forward, backward) = (1.0, 2.0 + recompute);
        let passes = forward + backward;

        let attention = model.attention_flops() / flops_per_second;
        let experts = model.assignments() * model.expert_flops() / flops_per_second;
        let elementwise = cluster.elementwise_passes * model.assignments() * model.intermediate_bytes()
            / cluster.memory_bytes_per_second;
        let head = model.head_flops() / flops_per_second;
        let (restore, reshard) = self.restore_seconds();

        let balanced = [LayerLoad { max_over_mean: 1.0, intra_node: 0.0, inter_node: 0.0 }];
        let loads = if loads.is_empty() { &balanced } else { loads };
        let mut time = StepTime::default();
        let mut overlaps = Vec::with_capacity(model.layers);
        for load in loads.iter().cycle().take(model.layers) {
            let waiting = cluster.straggler_factor * (load.max_over_mean - 1.0) * (experts + elementwise);
            let compute = attention + experts + elementwise + waiting;
            time.attention += passes * attention;
            time.experts += passes * experts;
            time.elementwise += passes * elementwise;
            time.waiting += passes * waiting;
            // There and back, forward and backward, and again when the forward pass is computed again.
            time.all_to_all += (4.0 + 2.0 * recompute) * self.all_to_all_seconds(load);
            overlaps.push(Overlap { forward: forward * compute, backward: backward * compute, restore, reshard });
        }
        time.exposed_restore = exposed(&overlaps, 3.0 * head);
        time.tensor_parallel = model.layers as f64 * (5.0 + 2.0 * recompute) * self.tensor_collective_seconds();
        time.overhead = model.layers as f64 * cluster.layer_overhead_seconds;
        time.head = 3.0 * head;

        let micro_batches = model.micro_batches as f64;
        for part in [
            &mut time.attention,
            &mut time.experts,
            &mut time.elementwise,
            &mut time.waiting,
            &mut time.all_to_all,
            &mut time.exposed_restore,
            &mut time.tensor_parallel,
            &mut time.overhead,
            &mut time.head,
        ] {
            *part *= micro_batches;
        }
        let compute = (time.attention + time.experts + time.elementwise + time.waiting) / micro_batches / passes;
        time.update = self.update_seconds(forward * compute, backward * compute);
        time
    }

    /// Seconds of one token All-to-All: it ends when the busiest port ends.
    fn all_to_all_seconds(&self, load: &LayerLoad) -> f64 {
        let bytes = self.model.assignments() * self.model.token_bytes();
        let within = load.intra_node * bytes / self.cluster.constants.intra_node_bytes_per_second;
        let between = load.inter_node * bytes / self.cluster.node_bytes_per_second();
        within.max(between)
    }

    /// Seconds of restoring a layer's weights and of resharding its gradients, both in elements of the model. Experts
    /// travel in All-to-Alls, attention in all-gathers and reduce-scatters, whose rings cross each node's ports once.
    fn restore_seconds(&self) -> (f64, f64) {
        if self.model.weights == WeightPlacement::Owned {
            return (0.0, 0.0);
        }
        let (cluster, model) = (&self.cluster, &self.model);
        let (ranks, node) = (cluster.world_size() as f64, cluster.ranks_per_node as f64);
        let bytes = model.element_bytes as f64;
        let experts = model.slots(cluster.world_size()) as f64 * model.expert_parameters() * bytes;
        let attention = model.attention_parameters() * bytes;
        let intra = cluster.constants.intra_node_bytes_per_second;
        let mut within = (experts * (node - 1.0) / ranks) / intra;
        let mut between = 0.0;
        if cluster.nodes > 1 {
            between = node * experts * (ranks - node) / ranks / cluster.node_bytes_per_second();
            between += attention * (ranks - 1.0) / ranks / cluster.node_bytes_per_second();
        } else {
            within += attention * (ranks - 1.0) / ranks / intra;
        }
        (within.max(between), within.max(between))
    }

    /// Seconds of one all-gather or reduce-scatter over the ranks that share a sequence.
    fn tensor_collective_seconds(&self) -> f64 {
        let others = self.model.tensor_parallel as f64 - 1.0;
        let bytes = self.model.tokens() * others * self.model.token_bytes();
        bytes / self.cluster.constants.intra_node_bytes_per_second
    }

    /// Seconds of the update. Owned experts: reduce-scatter of gradients behind the last micro-batch's backward pass
    /// and all-gather of weights behind the next forward pass; copies stand on different nodes where there are several.
    fn update_seconds(&self, forward: f64, backward: f64) -> f64 {
        let (cluster, model) = (&self.cluster, &self.model);
        let ranks = cluster.world_size() as f64;
        let optimizer = model.parameters() / ranks * model.optimizer_traffic_bytes() / cluster.memory_bytes_per_second;
        if model.weights == WeightPlacement::Sharded {
            return optimizer;
        }
        let copies = ranks * model.slots(cluster.world_size()) as f64 / model.experts as f64;
        let own = model.layers as f64 * model.slots(cluster.world_size()) as f64 * model.expert_parameters();
        let bytes_per_second = if cluster.nodes > 1 {
            cluster.node_bytes_per_second() / cluster.ranks_per_node as f64
        } else {
            cluster.constants.intra_node_bytes_per_second
        };
        let seconds = |bytes: f64| own * bytes * (copies - 1.0) / copies / bytes_per_second;
        let gradients = (seconds(GRADIENT_BYTES) - backward).max(0.0);
        let weights = (seconds(model.element_bytes as f64) - forward).max(0.0);
        optimizer + gradients + weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::model::tests::{small_cluster, small_model};

    fn step(model: ModelSpec, imbalance: f64) -> StepTime {
        Simulator::new(small_cluster(), model).unwrap().step_of_imbalance(imbalance).unwrap()
    }

    #[test]
    fn parts_by_hand() {
        let time = step(small_model(), 1.5);
        // 3 layers, 2 micro-batches, 3 passes, 2048 tokens of 2 experts, 1 us each.
        let experts = 3.0 * 2.0 * 3.0 * 4096e-6;
        assert!((time.experts - experts).abs() < 1e-12);
        assert!((time.waiting - 0.5 * experts).abs() < 1e-12);
        // Four a layer, 0.75 of the assignments times the imbalance, 2 KiB each at 100 GB/s.
        let port = 4096.0 * 0.75 * 1.5 * 2048.0 / 1e11;
        assert!((time.all_to_all - 3.0 * 2.0 * 4.0 * port).abs() < 1e-12);
        assert_eq!((time.tensor_parallel, time.overhead), (0.0, 0.0));
        assert!(time.exposed_restore > 0.0, "the first restore has nothing to hide behind");
    }

    #[test]
    fn elementwise_work_is_waited_for_too() {
        let cluster = ClusterSpec { elementwise_passes: 10.0, straggler_factor: 2.0, ..small_cluster() };
        let time = Simulator::new(cluster, small_model()).unwrap().step_of_imbalance(1.5).unwrap();
        // 3 layers, 2 micro-batches, 3 passes, 4096 assignments of 4 KiB at 1 TB/s.
        assert!((time.elementwise - 18.0 * 10.0 * 4096.0 * 4096.0 / 1e12).abs() < 1e-12);
        assert!((time.waiting - 2.0 * 0.5 * (time.experts + time.elementwise)).abs() < 1e-12);
    }

    #[test]
    fn micro_batches_cost_overhead_only() {
        let cluster = ClusterSpec { layer_overhead_seconds: 0.01, ..small_cluster() };
        let step = |micro_batches| {
            let model = ModelSpec { micro_batches, ..small_model() };
            Simulator::new(cluster.clone(), model).unwrap().step_of_imbalance(1.0).unwrap()
        };
        let (few, many) = (step(1), step(4));
        assert!((few.experts - many.experts).abs() < 1e-12);
        assert!((many.overhead - 0.12).abs() < 1e-12 && (few.overhead - 0.03).abs() < 1e-12);
        assert!(many.exposed_restore > few.exposed_restore, "each micro-batch restores anew");
    }

    #[test]
    fn recomputation_is_a_fourth_pass() {
        let with = step(ModelSpec { recompute: Recompute::Layers, ..small_model() }, 1.0);
        let without = step(small_model(), 1.0);
        assert!((with.experts / without.experts - 4.0 / 3.0).abs() < 1e-12);
        assert!((with.all_to_all / without.all_to_all - 1.5).abs() < 1e-12);
    }

    #[test]
    fn owned_experts_are_summed_once_a_step() {
        let owned = ModelSpec { weights: WeightPlacement::Owned, ..small_model() };
        let sharded = step(small_model(), 1.0);
        assert_eq!(step(owned.clone(), 1.0).exposed_restore, 0.0);
        assert_eq!(step(owned.clone(), 1.0).update, sharded.update, "backward hides the sums on fast links");
        let mut slow = small_cluster();
        slow.constants.inter_node_bytes_per_second = 1e8;
        let time = Simulator::new(slow, owned).unwrap().step_of_imbalance(1.0).unwrap();
        assert!(time.update > 1.0 && time.update < 1.2, "half of 6 experts' 4 + 2 bytes at 100 MB/s: {time:?}");
    }

    #[test]
    fn loads_repeat_and_may_be_missing() {
        let simulator = Simulator::new(small_cluster(), small_model()).unwrap();
        let load = LayerLoad::of_imbalance(&small_cluster(), &small_model(), 1.3).unwrap();
        assert_eq!(simulator.step(&[load]), simulator.step(&[load; 3]));
        assert_eq!(simulator.step(&[]).waiting, 0.0);
    }
}
