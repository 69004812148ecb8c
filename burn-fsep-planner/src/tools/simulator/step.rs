use super::{
    ClusterSpec, DenseParameters, GroupSpec, LayerLoad, ModelSpec, SimulatorError, StepTime,
    schedule::{Overlap, exposed},
};
use crate::memory::{MemoryError, RankMemory, RankSplit, Recompute};

/// Share of a SwiGLU expert's products that its first projection is.
const FIRST_PROJECTION: f64 = 2.0 / 3.0;

/// Bytes that a logit's loss, forward and backward, reads and writes: the logit and its gradient in the type of the computation, and
/// eight times a number in single precision (`examples/moe-hf`, `next_token_loss`).
const LOGIT_F32_BYTES: f64 = 8.0 * 4.0;

/// Simulates steps of one model on one cluster.
#[derive(Debug, Clone)]
pub struct Simulator {
    pub(super) cluster: ClusterSpec,
    pub(super) model: ModelSpec,
    pub(super) groups: GroupSpec,
}

impl Simulator {
    /// A simulator of a model on a cluster, all of whose ranks share the experts.
    ///
    /// # Errors
    ///
    /// As [`ClusterSpec::check`] and [`ModelSpec::check`].
    pub fn new(cluster: ClusterSpec, model: ModelSpec) -> Result<Self, SimulatorError> {
        cluster.check()?;
        model.check(&cluster)?;
        let groups = GroupSpec { ranks: cluster.world_size(), zero: false };
        Ok(Self { cluster, model, groups })
    }

    /// The same with groups of ranks that share the experts.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] if groups do not fit the cluster's nodes, or do not hold the model's experts.
    pub fn with_groups(self, groups: GroupSpec) -> Result<Self, SimulatorError> {
        groups.check(&self.cluster, &self.model)?;
        Ok(Self { groups, ..self })
    }

    /// The cluster.
    pub fn cluster(&self) -> &ClusterSpec {
        &self.cluster
    }

    /// The model.
    pub fn model(&self) -> &ModelSpec {
        &self.model
    }

    /// Who shares the experts.
    pub fn groups(&self) -> GroupSpec {
        self.groups
    }

    /// The memory of the most loaded rank.
    ///
    /// # Errors
    ///
    /// As [`RankMemory::of`].
    pub fn memory(&self, max_over_mean: f64) -> Result<RankMemory, MemoryError> {
        let split = RankSplit {
            world_size: self.cluster.world_size() as u64,
            group_ranks: self.groups.ranks as u64,
            zero: self.groups.zero,
        };
        let model = self.model.memory_model(self.groups.ranks);
        RankMemory::of(&model, &self.model.training_sizes(max_over_mean), split)
    }

    /// A step in which every layer has the same imbalance, see [`LayerLoad::of_imbalance`].
    ///
    /// # Errors
    ///
    /// As [`LayerLoad::of_imbalance`].
    pub fn step_of_imbalance(&self, max_over_mean: f64) -> Result<StepTime, SimulatorError> {
        let group = self.groups.cluster(&self.cluster);
        Ok(self.step(&[LayerLoad::of_imbalance(&group, &self.model, max_over_mean)?]))
    }

    /// A step of one group with the given loads. If there are fewer loads than layers, they repeat; without any, experts are
    /// balanced and no token travels.
    pub fn step(&self, loads: &[LayerLoad]) -> StepTime {
        let (cluster, model) = (&self.cluster, &self.model);
        let layers = model.moe_layers();
        let recompute = if model.recompute == Recompute::Layers { 1.0 } else { 0.0 };
        let (forward, backward) = (1.0, 2.0 + recompute);
        let passes = forward + backward;
        let first_again = if model.recompute == Recompute::Experts { FIRST_PROJECTION } else { 0.0 };

        let [attention, experts, elementwise, head] = self.compute_seconds();
        let experts_again = first_again * experts;
        let (restore, reshard) = self.restore_seconds();
        let average = self.average_seconds();

        let balanced = [LayerLoad { max_over_mean: 1.0, intra_node: 0.0, inter_node: 0.0 }];
        let loads = if loads.is_empty() { &balanced } else { loads };
        let mut time = StepTime::default();
        // Experts that are kept stay for later micro-batches; all else that is cut is gathered anew in each.
        let stays = model.training.dense_parameters == DenseParameters::Replicated;
        let (mut first, mut later) = (Vec::with_capacity(layers), Vec::with_capacity(layers));
        for (layer, load) in loads.iter().cycle().take(layers).enumerate() {
            let excess = cluster.straggler_factor * (load.max_over_mean - 1.0);
            let waiting = excess * (experts + elementwise);
            let compute = attention + experts + elementwise + waiting;
            time.attention += passes * attention;
            time.experts += passes * experts + experts_again;
            time.elementwise += passes * elementwise;
            time.waiting += passes * waiting + excess * experts_again;
            // There and back, forward and backward, and again when the forward pass is computed again.
            time.all_to_all += (4.0 + 2.0 * recompute) * self.all_to_all_seconds(load);
            let is_kept = model.training.kept_layers >= layers - layer;
            let overlap = Overlap {
                forward: forward * compute,
                backward: backward * compute + experts_again * (1.0 + excess),
                restore,
                restore_again: if is_kept { 0.0 } else { restore },
                reshard,
            };
            first.push(overlap);
            later.push(Overlap { restore: if is_kept && stays { 0.0 } else { restore }, ..overlap });
        }
        // Layers without experts hide nothing that is counted here.
        time.attention += passes * attention * model.architecture.dense_layers as f64;
        let micro_batches = model.micro_batches as f64;
        // Gradients are averaged behind backward, as resharded ones travel: shards' in each micro-batch, all others' in the last.
        let exposed_with = |overlaps: &[Overlap], average: f64| {
            let averaged = |&layer: &Overlap| Overlap { reshard: layer.reshard + average, ..layer };
            exposed(&overlaps.iter().map(averaged).collect::<Vec<_>>(), 3.0 * head)
        };
        let travelling = |overlaps: &[Overlap]| -> f64 {
            overlaps.iter().map(|layer| layer.restore + layer.restore_again + layer.reshard).sum()
        };
        let of_all = |of: &dyn Fn(&[Overlap]) -> f64| of(&first) + (micro_batches - 1.0) * of(&later);
        let last = if model.micro_batches > 1 { &later } else { &first };
        let plain = of_all(&|overlaps| exposed_with(overlaps, 0.0));
        let averaged = of_all(&|overlaps| exposed_with(overlaps, average.shards))
            + exposed_with(last, average.shards + average.dense)
            - exposed_with(last, average.shards);
        time.tensor_parallel = model.layers as f64 * (5.0 + 2.0 * recompute) * self.tensor_collective_seconds();
        time.overhead = layers as f64 * (cluster.layer_overhead_seconds + self.exchange_overhead_seconds());
        time.head = 3.0 * head;
        for part in [
            &mut time.attention,
            &mut time.experts,
            &mut time.elementwise,
            &mut time.waiting,
            &mut time.all_to_all,
            &mut time.tensor_parallel,
            &mut time.overhead,
            &mut time.head,
        ] {
            *part *= micro_batches;
        }
        time.exposed_restore = plain;
        let averaging = (micro_batches * average.shards + average.dense) * layers as f64;
        let exposed_averages = averaged - plain;
        let hidden = of_all(&travelling) - plain + averaging - exposed_averages;
        time.slowed = cluster.background_slowdown * hidden.max(0.0);
        let compute = (time.attention + time.experts + time.elementwise + time.waiting) / micro_batches / passes;
        time.update = exposed_averages + average.after + self.update_seconds(forward * compute, backward * compute);
        time
    }

    /// Forward seconds of a MoE layer in all micro-batches: what the groups of ranks do between two layers' expert loads.
    pub(super) fn forward_seconds(&self, load: &LayerLoad) -> f64 {
        let [attention, experts, elementwise, _] = self.compute_seconds();
        let excess = self.cluster.straggler_factor * (load.max_over_mean - 1.0);
        let compute = attention + (1.0 + excess) * (experts + elementwise);
        self.model.micro_batches as f64 * (compute + 2.0 * self.all_to_all_seconds(load))
    }

    /// Forward seconds of a layer and micro-batch: attention, experts' products, elementwise work; and of the output layer.
    fn compute_seconds(&self) -> [f64; 4] {
        let (cluster, model) = (&self.cluster, &self.model);
        let rate = cluster.constants.matmul_flops_per_second();
        let memory = cluster.memory_bytes_per_second;
        let row_bytes = model.tokens() * model.token_bytes();
        let scores = model.attention_score_flops();
        let score_rate =
            if cluster.attention_flops_per_second > 0.0 { cluster.attention_flops_per_second } else { rate };
        let attention = (model.attention_flops() - scores) / rate
            + scores / score_rate
            + (cluster.attention_passes + model.architecture.extra_attention_passes) * row_bytes / memory;
        let experts = model.assignments() * model.expert_flops() / rate;
        // Both passes together read and write weights `weight_passes` times: a third of it for each of three passes.
        let slots = model.slots(self.groups.ranks) as f64 * model.expert_parameters() * model.element_bytes as f64;
        let elementwise = cluster.elementwise_passes * model.assignments() * model.intermediate_bytes()
            + cluster.row_passes * model.assignments() * model.token_bytes()
            + cluster.weight_passes / 3.0 * slots;
        let logits = model.tokens() * model.vocabulary as f64 * (2.0 * model.element_bytes as f64 + LOGIT_F32_BYTES);
        // Counted for a forward pass, as the output layer's products are.
        let head = model.head_flops() / rate + logits / 3.0 / memory;
        [attention, experts, elementwise / memory, head]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::simulator::{
        TrainingSpec, WeightPlacement,
        model::tests::{small_cluster, small_model},
    };

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

    /// Links so slow that all that travels shows.
    fn on_slow_links(ranks: usize, training: TrainingSpec, micro_batches: usize) -> (StepTime, Simulator) {
        let mut cluster = small_cluster();
        cluster.constants.inter_node_bytes_per_second = 1e3;
        cluster.constants.intra_node_bytes_per_second = 1e6;
        let model = ModelSpec { micro_batches, slots_per_rank: 0, training, ..small_model() };
        let groups = GroupSpec { ranks, zero: false };
        let simulator = Simulator::new(cluster, model).unwrap().with_groups(groups).unwrap();
        (simulator.step(&[]), simulator)
    }

    #[test]
    fn experts_that_stay_are_restored_once() {
        let training = |kept_layers| TrainingSpec {
            kept_layers,
            dense_parameters: DenseParameters::Replicated,
            ..TrainingSpec::default()
        };
        let restores = |kept_layers| {
            let (time, simulator) = on_slow_links(8, training(kept_layers), 4);
            let (restore, reshard) = simulator.restore_seconds();
            (time.exposed_restore - 4.0 * 3.0 * reshard) / restore
        };
        assert!((restores(0) - 24.0).abs() < 0.01, "forward and backward of 3 layers in 4: {}", restores(0));
        assert!((restores(1) - 17.0).abs() < 0.01, "the last layer's once: {}", restores(1));
        assert!((restores(3) - 3.0).abs() < 0.01, "all once: {}", restores(3));
    }

    #[test]
    fn gradients_of_shards_are_averaged_in_each_micro_batch_and_others_once() {
        let training =
            TrainingSpec { dense_parameters: DenseParameters::Replicated, kept_layers: 0, ..TrainingSpec::default() };
        let of = |micro_batches| {
            let (time, simulator) = on_slow_links(4, training.clone(), micro_batches);
            (time.update - simulator.update_seconds(0.0, 0.0), simulator.average_seconds())
        };
        let ((one, averages), (four, _)) = (of(1), of(4));
        assert!((one / (3.0 * (averages.shards + averages.dense) + averages.after) - 1.0).abs() < 0.001, "{one}");
        assert!(((four - one) / (9.0 * averages.shards) - 1.0).abs() < 0.001, "{four}");
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
