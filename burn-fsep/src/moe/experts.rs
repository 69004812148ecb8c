use burn::{
    module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param},
    tensor::{Device, Tensor, TensorData},
};
use serde::{Deserialize, Serialize};

use crate::{
    FsepRuntime,
    ops::WeightStorage,
    shard::{ExpertShape, expert_parameters, shard_id},
};

/// A rank's part of the experts' parameters.
///
/// A module of its own so that visitors can tell shards from replicated parameters by their container: shards differ
/// between ranks, their gradients are complete after backward and must not be averaged over ranks.
#[derive(Module, Debug)]
pub struct FsepExperts {
    // Before the parameters, so that visitors know what they meet.
    info: ExpertsInfo,
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
        let (experts, positions) = match storage {
            WeightStorage::Sharded => {
                let len = shape.shard_len(ranks);
                (0..num_experts, rank * len..(rank + 1) * len)
            }
            WeightStorage::Resident => {
                let owned = num_experts / ranks;
                (rank * owned..(rank + 1) * owned, 0..shape.num_params())
            }
        };
        let dims = [experts.len(), positions.len()];
        let mut values = Vec::with_capacity(dims[0] * dims[1]);
        experts.for_each(|e| values.extend(expert_parameters(shape, runtime.seed(), layer, e, positions.clone())));
        let info = ExpertsInfo { layer, num_experts, shape, storage };
        let mut weight = Param::<Tensor<2>>::from_data(TensorData::new(values, dims), device);
        weight.id = shard_id(rank, ranks);
        Self { info, weight }
    }
}

/// What a rank's parameters are a part of: a shard's length does not tell the expert's.
///
/// Visitors see nothing of a module but names and parameters. So this is a module without parameters whose name, as
/// visitors meet it, is its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExpertsInfo {
    /// The layer's number in its runtime.
    pub layer: usize,
    /// Experts `E`.
    pub num_experts: usize,
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// How this rank keeps its part.
    pub storage: WeightStorage,
}

impl ExpertsInfo {
    const CONTAINER: &'static str = "Struct:ExpertsInfo";

    /// The info that a visitor meets as a module of this name, if it is one.
    pub fn from_module(name: &str, container: &str) -> Option<Self> {
        (container == Self::CONTAINER).then(|| serde_json::from_str(name).ok()).flatten()
    }

    fn name(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers has a JSON form")
    }
}

impl Module for ExpertsInfo {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let name = self.name();
        visitor.enter_module(&name, Self::CONTAINER);
        visitor.exit_module(&name, Self::CONTAINER);
    }

    fn map<M: ModuleMapper>(self, _: &mut M) -> Self {
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        self
    }

    fn to_device(self, _: &Device) -> Self {
        self
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        *self
    }

    fn train(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for ExpertsInfo {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add_formatted(&format!("{} of D = {}, F = {}", self.num_experts, self.shape.hidden, self.shape.ffn))
            .optional()
    }
}

impl ModuleDisplay for ExpertsInfo {}
