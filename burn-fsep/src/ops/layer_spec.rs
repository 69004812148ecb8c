use std::collections::BTreeMap;

use burn::tensor::{DType, FloatDType};
use serde::{Deserialize, Serialize};

use super::ExpertActivation;
use crate::{FsepError, comm::Operation, shard::ExpertShape};

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
    /// This rank among those that share the experts.
    pub rank: usize,
    /// Ranks that share the experts, `N`.
    pub num_ranks: usize,
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
    /// All options of the layer's configuration; see [`options_of`].
    pub options: BTreeMap<String, String>,
}

/// The options of a configuration by name, as JSON: ranks compare these, so that none is forgotten, however many there are.
///
/// # Errors
///
/// [`FsepError::Config`] if it is no JSON.
pub fn options_of(config: &impl Serialize) -> Result<BTreeMap<String, String>, FsepError> {
    let json = |error: serde_json::Error| FsepError::Config(format!("the layer's configuration: {error}"));
    let options: BTreeMap<String, serde_json::Value> =
        serde_json::to_value(config).and_then(serde_json::from_value).map_err(json)?;
    Ok(options.into_iter().map(|(name, value)| (name, value.to_string())).collect())
}

impl LayerSpec {
    /// Whether experts have to be unsharded before they compute.
    pub fn is_sharded(&self) -> bool {
        self.storage == WeightStorage::Sharded
    }

    /// Shard length `S`.
    pub fn shard_len(&self) -> usize {
        self.shape.shard_len(self.num_ranks)
    }

    /// In which row of the resident parameters an expert lies.
    pub fn resident_row(&self, expert: usize) -> usize {
        expert - self.rank * (self.num_experts / self.num_ranks)
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
