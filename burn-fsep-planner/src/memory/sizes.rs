use super::MemoryError;

/// No size of a model or a job is larger. Products of what `check` lets through stay below 2^120.
const LARGEST: u64 = 1 << 30;

/// The MoE layers of a model, all alike. Letters of `docs/design.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeSizes {
    /// MoE layers; 0 if there are none.
    pub layers: u64,
    /// Experts `E`.
    pub experts: u64,
    /// Parameters of one expert `P`; `3 D F` for SwiGLU without biases.
    pub expert_parameters: u64,
    /// Hidden size `D`.
    pub hidden_size: u64,
    /// Intermediate size `F` of an expert.
    pub intermediate_size: u64,
    /// The first projection has a gate and is `2 F` wide.
    pub gated: bool,
    /// Experts per token `K`.
    pub topk: u64,
    /// Slots a rank `C`.
    pub slots_per_rank: u64,
}

impl MoeSizes {
    /// Shard length `S = ceil(P / M)` of an expert, in elements: shards are equal, and the last is padded.
    pub fn shard_len(&self, group_ranks: u64) -> u64 {
        self.expert_parameters.div_ceil(group_ranks)
    }

    /// Width of the first projection: `2 F` with a gate, else `F`.
    pub fn first_width(&self) -> u64 {
        if self.gated { 2 * self.intermediate_size } else { self.intermediate_size }
    }
}

/// What is kept from forward to backward outside of the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActivationSizes {
    /// Transformer layers.
    pub layers: u64,
    /// Elements of the compute type a token and layer: attention, normalisation, residuals, dense and shared networks; the mean of
    /// all layers.
    pub elements_per_token: u64,
    /// Elements of single precision a token and layer, besides the router's: the logarithms of attention's sums, one a head.
    pub f32_elements_per_token: u64,
    /// Tokens of the vocabulary `V`; 0 if there is no output layer.
    pub vocabulary: u64,
}

/// A model, as far as memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryModel {
    /// Parameters that each rank has whole: all but experts.
    pub replicated_parameters: u64,
    /// The MoE layers.
    pub moe: MoeSizes,
    /// What is kept outside of the experts.
    pub activations: ActivationSizes,
}

/// What is computed again in backward, so that it need not be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// The experts' first projection (`FSEPMoEConfig`'s recomputation).
    Experts,
    /// Whole layers, of which the input is kept.
    Layers,
}

/// The state of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptimizerState {
    /// Tensors of the parameter's shape: two moments of AdamW, one momentum of SGD.
    pub tensors: u64,
    /// Bytes of their elements: Burn's moments have the parameter's type, in single precision with
    /// `FusedAdamWConfig::with_single_precision_moments`.
    pub element_bytes: u64,
    /// Bytes of a master weight beside the parameter; 0 if there is none. With burn-fsep the parameter in single precision is the
    /// master weight, and what computes are copies.
    pub master_bytes: u64,
}

/// How a model is trained, as far as memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingSizes {
    /// Tokens of a rank in a micro-batch `T`.
    pub tokens: u64,
    /// Micro-batches whose gradients make one step.
    pub micro_batches: u64,
    /// Rows of the most loaded rank over the mean: 1 with a planner that balances.
    pub max_over_mean: f64,
    /// Bytes of a parameter, and of its gradient.
    pub parameter_bytes: u64,
    /// Bytes of an element that computes and travels.
    pub compute_bytes: u64,
    /// The optimizer's state.
    pub optimizer: OptimizerState,
    /// What is computed again.
    pub recompute: Recompute,
    /// Last layers that keep their experts (`ScheduleConfig::kept_layers`).
    pub kept_layers: u64,
    /// The next layer's experts travel while this one computes, and its gradients while the one before does.
    pub prefetch: bool,
    /// Parameters outside of the experts are cut over all ranks, too (FSDP), and gathered layer by layer. burn-fsep replicates them.
    pub cut_dense_parameters: bool,
}

impl TrainingSizes {
    /// Parameters, gradients and both of AdamW's moments in bf16, one token: set [`TrainingSizes::tokens`].
    pub fn bf16() -> Self {
        Self {
            tokens: 1,
            micro_batches: 1,
            max_over_mean: 1.0,
            parameter_bytes: 2,
            compute_bytes: 2,
            optimizer: OptimizerState { tensors: 2, element_bytes: 2, master_bytes: 0 },
            recompute: Recompute::None,
            kept_layers: 1,
            prefetch: true,
            cut_dense_parameters: false,
        }
    }

    /// Parameters, gradients and moments in f32, which are the master weights, of a model that computes in bf16.
    pub fn mixed() -> Self {
        let optimizer = OptimizerState { tensors: 2, element_bytes: 4, master_bytes: 0 };
        Self { parameter_bytes: 4, optimizer, ..Self::bf16() }
    }

    /// All in f32.
    pub fn f32() -> Self {
        Self { compute_bytes: 4, ..Self::mixed() }
    }

    /// Parameters are of another type than what computes.
    pub fn is_mixed(&self) -> bool {
        self.parameter_bytes != self.compute_bytes
    }

    /// Rows of the most loaded rank's experts in a layer: assignments.
    pub fn rows(&self, moe: &MoeSizes) -> u64 {
        (self.tokens as f64 * moe.topk as f64 * self.max_over_mean).ceil() as u64
    }
}

/// How ranks share a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RankSplit {
    /// World size `W`.
    pub world_size: u64,
    /// Ranks `M` that share the experts: each has an `M`th of every expert. There are `W / M` replicas of such groups.
    pub group_ranks: u64,
    /// The optimizer's state is cut, too (ZeRO-1): that of replicated parameters over all ranks, that of expert shards over their
    /// replicas.
    pub zero: bool,
}

impl RankSplit {
    /// One rank.
    pub fn single() -> Self {
        Self { world_size: 1, group_ranks: 1, zero: false }
    }

    /// Replicas of each shard: `W / M`.
    pub fn replicas(&self) -> u64 {
        self.world_size / self.group_ranks
    }

    /// Checks that groups of this size make up the world.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Setting`] for no ranks, or groups that do not divide the world.
    pub fn check(&self) -> Result<(), MemoryError> {
        at_least_one("world_size", self.world_size)?;
        at_most("world_size", self.world_size, 1 << 20)?;
        at_least_one("groups", self.group_ranks)?;
        if !self.world_size.is_multiple_of(self.group_ranks) {
            let expected = format!("a divisor of the {} ranks there are", self.world_size);
            return Err(MemoryError::Setting { field: "groups", value: self.group_ranks, expected });
        }
        Ok(())
    }
}

impl MemoryModel {
    /// Checks that all sizes make sense for groups of these ranks.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Setting`] naming the first that does not.
    pub fn check(&self, split: RankSplit) -> Result<(), MemoryError> {
        split.check()?;
        let (moe, activations) = (&self.moe, &self.activations);
        at_most("replicated_parameters", self.replicated_parameters, 1 << 50)?;
        at_most("layers", activations.layers, 10_000)?;
        at_most("layers", moe.layers, activations.layers)?;
        at_most("elements_per_token", activations.elements_per_token, 1 << 36)?;
        at_most("f32_elements_per_token", activations.f32_elements_per_token, 1 << 36)?;
        at_most("vocabulary", activations.vocabulary, LARGEST)?;
        if moe.layers == 0 {
            return Ok(());
        }
        for (field, value) in [
            ("experts", moe.experts),
            ("hidden_size", moe.hidden_size),
            ("intermediate_size", moe.intermediate_size),
            ("topk", moe.topk),
            ("slots_per_rank", moe.slots_per_rank),
        ] {
            at_least_one(field, value)?;
        }
        at_most("topk", moe.topk, moe.experts)?;
        at_most("slots_per_rank", moe.slots_per_rank, moe.experts)?;
        at_most("expert_parameters", moe.expert_parameters, 1 << 50)?;
        if moe.slots_per_rank * split.group_ranks < moe.experts {
            let least = moe.experts.div_ceil(split.group_ranks);
            let expected =
                format!("{least} at least, so that {} ranks hold all {} experts", split.group_ranks, moe.experts);
            return Err(MemoryError::Setting { field: "slots_per_rank", value: moe.slots_per_rank, expected });
        }
        Ok(())
    }
}

impl TrainingSizes {
    /// Checks that all sizes make sense.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Setting`] naming the first that does not.
    pub fn check(&self) -> Result<(), MemoryError> {
        at_least_one("tokens", self.tokens)?;
        at_least_one("micro_batches", self.micro_batches)?;
        if !(1.0..=1e6).contains(&self.max_over_mean) {
            let (field, value, expected) = ("max_over_mean", self.max_over_mean as u64, "a number from 1".into());
            return Err(MemoryError::Setting { field, value, expected });
        }
        for (field, value) in [("parameter_bytes", self.parameter_bytes), ("compute_bytes", self.compute_bytes)] {
            at_least_one(field, value)?;
            at_most(field, value, 16)?;
        }
        at_most("optimizer_tensors", self.optimizer.tensors, 16)?;
        at_most("optimizer_bytes", self.optimizer.element_bytes, 16)?;
        at_most("master_bytes", self.optimizer.master_bytes, 16)
    }
}

fn at_least_one(field: &'static str, value: u64) -> Result<(), MemoryError> {
    if (1..=LARGEST).contains(&value) {
        return Ok(());
    }
    Err(MemoryError::Setting { field, value, expected: "a whole number from 1 to 2^30".into() })
}

fn at_most(field: &'static str, value: u64, most: u64) -> Result<(), MemoryError> {
    if value <= most {
        return Ok(());
    }
    Err(MemoryError::Setting { field, value, expected: format!("at most {most}") })
}
