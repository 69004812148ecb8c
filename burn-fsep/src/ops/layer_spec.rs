use burn::tensor::{DType, FloatDType};
use serde::{Deserialize, Serialize};

use super::ExpertActivation;
use crate::{comm::Operation, shard::ExpertShape};

/// How a rank keeps its experts' parameters between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WeightStorage {
    /// One shard of every expert, `[E, S]`: fully sharded expert parallel.
    Sharded,
    /// Whole experts of fixed owners, `[E / N, P]`: static expert parallelism, and FSEP on one rank.
    Resident,
}

/// The facts of a layer on one rank, which never change: said once, and shared by all that run the layer.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// The layer's number in its runtime.
    pub layer: usize,
    /// This rank.
    pub rank: usize,
    /// World size `N`.
    pub world_size: usize,
    /// Experts `E`.
    pub num_experts: usize,
    /// Slots a rank `C`.
    pub slots_per_rank: usize,
    /// Experts per token `K`.
    pub topk: usize,
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// The experts' nonlinearity.
    pub activation: ExpertActivation,
    /// How this rank keeps its part of the experts.
    pub storage: WeightStorage,
    /// Experts have fixed owners: the layout cannot be changed.
    pub fixed_layout: bool,
    /// Type that experts travel and compute in; that of the parameters if `None`.
    pub compute_dtype: Option<FloatDType>,
    /// Recompute activations in backward instead of keeping them.
    pub recompute: bool,
}

impl LayerSpec {
    /// Whether experts have to be unsharded before they compute.
    pub fn is_sharded(&self) -> bool {
        self.storage == WeightStorage::Sharded
    }

    /// Shard length `S`.
    pub fn shard_len(&self) -> usize {
        self.shape.shard_len(self.world_size)
    }

    /// In which row of the resident parameters an expert lies.
    pub fn resident_row(&self, expert: usize) -> usize {
        expert - self.rank * (self.num_experts / self.world_size)
    }

    /// Element type of the layer's input and output, where that of its parameters is `parameters`.
    pub fn input_dtype(&self, parameters: DType) -> DType {
        self.compute_dtype.map_or(parameters, DType::from)
    }

    /// A collective of this layer.
    pub fn operation(&self, name: &'static str) -> Operation {
        Operation::of_layer(name, self.layer)
    }
}
