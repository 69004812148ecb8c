use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor, TensorData},
};

use crate::{
    FsepRuntime,
    ops::WeightStorage,
    shard::{ExpertShape, expert_parameters, shard_of},
};

/// A rank's part of the experts' parameters.
///
/// A module of its own so that visitors can tell shards from replicated parameters by their container: shards differ
/// between ranks, their gradients are complete after backward and must not be averaged over ranks.
#[derive(Module, Debug)]
pub struct FsepExperts {
    /// Shards `[E, S]` of all experts, or whole resident experts `[E / N, P]`.
    pub weight: Param<Tensor<2>>,
}

impl FsepExperts {
    /// The name under which module visitors meet this module.
    pub const CONTAINER: &'static str = "Struct:FsepExperts";

    pub(super) fn new(
        shape: ExpertShape,
        num_experts: usize,
        storage: WeightStorage,
        runtime: &FsepRuntime,
        layer: usize,
        device: &Device,
    ) -> Self {
        let (rank, ranks) = (runtime.rank(), runtime.world_size());
        // One expert at a time: a rank never holds all experts whole.
        let part = |expert: usize| expert_parameters(shape, runtime.seed(), layer, expert);
        let (values, dims): (Vec<f32>, _) = match storage {
            WeightStorage::Sharded => {
                let shards = (0..num_experts).flat_map(|e| shard_of(&part(e), rank, ranks));
                (shards.collect(), [num_experts, shape.shard_len(ranks)])
            }
            WeightStorage::Resident => {
                let owned = num_experts / ranks;
                let experts = (rank * owned..(rank + 1) * owned).flat_map(part);
                (experts.collect(), [owned, shape.num_params()])
            }
        };
        Self { weight: Param::from_data(TensorData::new(values, dims), device) }
    }
}
