use burn::{
    config::Config,
    tensor::{Device, FloatDType},
};

use super::{
    DenseMoE, FSEPMoE, FsepExperts, RouterForcing, SharedExpert, SharedExpertConfig, TopKRouter, TopKRouterConfig,
    forced_router::ForcedRouter,
    losses::{AuxiliaryLosses, LoadBalancing},
    replicated::Replicated,
};
use crate::{
    FsepError, FsepRuntime,
    ops::{self, ExpertActivation, LayerSpec, WeightStorage},
    shard::ExpertShape,
};

/// How experts are spread over ranks.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum ExpertParallelism {
    /// Fully sharded: any layout in any step.
    Fsep,
    /// Static expert parallelism with resident experts: rank `r` owns experts `r * E / N ..`, nothing is unsharded,
    /// nothing is balanced. The baseline.
    Static,
}

/// Configuration of an [`FSEPMoE`] layer. Options that Megatron-Core has carry its names.
#[derive(Config, Debug)]
pub struct FSEPMoEConfig {
    /// Hidden size `D`.
    pub hidden_size: usize,
    /// Intermediate size `F` of an expert.
    pub moe_ffn_hidden_size: usize,
    /// Experts `E`.
    pub num_moe_experts: usize,
    /// Experts per token `K`.
    #[config(default = 2)]
    pub moe_router_topk: usize,
    /// Slots a rank `C`: whole experts that a rank unshards. `None` is the fewest that hold all experts, plus one so
    /// that some can stand twice.
    #[config(default = "None")]
    pub slots_per_rank: Option<usize>,
    /// How the router chooses and weighs experts.
    #[config(default = "TopKRouterConfig::new()")]
    pub router: TopKRouterConfig,
    /// The experts' nonlinearity, and with it whether they have a gate.
    #[config(default = "ExpertActivation::SwiGlu")]
    pub activation: ExpertActivation,
    /// Whether both projections of an expert have biases.
    #[config(default = false)]
    pub add_bias_linear: bool,
    /// An expert that computes all tokens, replicated on all ranks.
    #[config(default = "None")]
    pub shared_expert: Option<SharedExpertConfig>,
    /// How experts are spread over ranks.
    #[config(default = "ExpertParallelism::Fsep")]
    pub expert_parallelism: ExpertParallelism,
    /// Weight of the load-balancing auxiliary loss (Switch Transformer, eq. 4); 0 is off.
    #[config(default = 0.0)]
    pub moe_aux_loss_coeff: f64,
    /// What the load-balancing loss balances.
    #[config(default = "LoadBalancing::GlobalBatch")]
    pub moe_router_load_balancing: LoadBalancing,
    /// Weight of the router z-loss (ST-MoE, eq. 5); 0 is off.
    #[config(default = 0.0)]
    pub moe_z_loss_coeff: f64,
    /// For throughput tests: routing that does not come from the router (Megatron-Core's `moe_router_force_load_balancing` and
    /// `moe_router_force_biased`).
    #[config(default = "None")]
    pub moe_router_force: Option<RouterForcing>,
    /// Recompute the experts' activations in backward instead of keeping them.
    #[config(default = false)]
    pub moe_layer_recompute: bool,
    /// Mixed precision: the type that experts travel and compute in, while parameters, their gradients and the optimizer's
    /// state keep the parameters' own (`f32` master weights). The layer's input and output are of this type. `None` is the
    /// type of the parameters.
    #[config(default = "None")]
    pub compute_dtype: Option<FloatDType>,
}

/// Parameters of a layer's experts in `f64` still have an address each.
const MAX_PARAMS: usize = isize::MAX as usize / size_of::<f64>();

impl FSEPMoEConfig {
    /// A layer on `device` with its experts sharded over the ranks of `runtime`.
    ///
    /// Initial values depend on the runtime's seed and on how many FSEP layers were initialised before, not on the
    /// world size.
    ///
    /// # Panics
    ///
    /// If the configuration is impossible; see [`FSEPMoEConfig::try_init`].
    pub fn init(&self, runtime: &FsepRuntime, device: &Device) -> FSEPMoE {
        self.try_init(runtime, device).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`FSEPMoEConfig::init`].
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] or [`FsepError::Planner`] saying which option is impossible;
    /// [`FsepError::UnsupportedDevice`] if this build has no operations for the device.
    pub fn try_init(&self, runtime: &FsepRuntime, device: &Device) -> Result<FSEPMoE, FsepError> {
        let experts = self.try_init_experts(runtime, device)?;
        let replicated = self.replicated(runtime.seed(), experts.layer_index(), device);
        Ok(FSEPMoE::new(experts, replicated))
    }

    /// The experts alone, for a router of your own; see [`FsepExperts::forward`]. They are a layer of the runtime as one of
    /// [`FSEPMoEConfig::init`] is.
    ///
    /// # Panics
    ///
    /// If the configuration is impossible; see [`FSEPMoEConfig::try_init_experts`].
    pub fn init_experts(&self, runtime: &FsepRuntime, device: &Device) -> FsepExperts {
        self.try_init_experts(runtime, device).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`FSEPMoEConfig::init_experts`].
    ///
    /// # Errors
    ///
    /// As [`FSEPMoEConfig::try_init`].
    pub fn try_init_experts(&self, runtime: &FsepRuntime, device: &Device) -> Result<FsepExperts, FsepError> {
        ops::check_device(device)?;
        let (group, experts) = (runtime.groups().experts(), self.num_moe_experts);
        let (rank, ranks) = (group.rank(), group.size());
        self.check()?;
        let is_static = self.expert_parallelism == ExpertParallelism::Static;
        if is_static && !experts.is_multiple_of(ranks) {
            return Err(FsepError::Config(format!(
                "static expert parallelism needs equally many experts on every rank: num_moe_experts = {experts} is \
                 no multiple of {ranks} ranks"
            )));
        }
        let fewest = experts.div_ceil(ranks);
        let slots_per_rank = match (is_static, self.slots_per_rank) {
            (true, Some(slots)) if slots != fewest => {
                return Err(FsepError::Config(format!(
                    "static expert parallelism of {experts} experts on {ranks} ranks has {fewest} slots a rank, but \
                     slots_per_rank = {slots}"
                )));
            }
            (true, _) => fewest,
            (false, slots) => slots.unwrap_or((fewest + 1).min(experts)),
        };
        let shape = self.shape();
        let storage = if is_static || ranks == 1 { WeightStorage::Resident } else { WeightStorage::Sharded };
        let options = ops::options_of(self)?;
        let spec = runtime.register_layer(|layer| LayerSpec {
            options,
            layer,
            rank,
            num_ranks: ranks,
            num_experts: experts,
            slots_per_rank,
            topk: self.moe_router_topk,
            shape,
            activation: self.activation,
            storage,
            fixed_layout: is_static,
            compute_dtype: self.compute_dtype,
            recompute: self.moe_layer_recompute,
        })?;
        Ok(FsepExperts::new(spec, runtime, device))
    }

    /// The same layer without any parallelism, written with Burn's own operations: the reference that FSEP equals.
    /// `layer` counts from 0 as the FSEP layers do.
    ///
    /// # Errors
    ///
    /// As [`FSEPMoEConfig::try_init`].
    pub fn init_dense(&self, seed: u64, layer: usize, device: &Device) -> Result<DenseMoE, FsepError> {
        ops::check_device(device)?;
        self.check()?;
        let replicated = self.replicated(seed, layer, device);
        Ok(DenseMoE::new(replicated, self.shape(), self.num_moe_experts, seed, device))
    }

    fn shape(&self) -> ExpertShape {
        ExpertShape {
            hidden: self.hidden_size,
            ffn: self.moe_ffn_hidden_size,
            gated: self.activation.is_gated(),
            bias: self.add_bias_linear,
        }
    }

    fn replicated(&self, seed: u64, layer: usize, device: &Device) -> Replicated {
        let forced = self.moe_router_force.as_ref();
        let dims = [self.hidden_size, self.num_moe_experts];
        let losses = AuxiliaryLosses {
            balancing: self.moe_aux_loss_coeff,
            over: self.moe_router_load_balancing,
            z: self.moe_z_loss_coeff,
        };
        let shared_expert = self.shared_expert.map(|SharedExpertConfig { ffn_hidden_size, gate }| {
            let shape = ExpertShape { ffn: ffn_hidden_size, ..self.shape() };
            let stream = [seed, layer as u64, self.num_moe_experts as u64];
            SharedExpert::new(shape, self.activation, gate, stream, device)
        });
        Replicated {
            router: TopKRouter::new(dims, self.moe_router_topk, &self.router, self.compute_dtype, seed, layer, device),
            shared_expert,
            losses,
            forced: forced.map(|forcing| ForcedRouter::new(forcing, self.num_moe_experts, seed, layer)),
            activation: self.activation,
            layer,
        }
    }

    fn check(&self) -> Result<(), FsepError> {
        let fail = |why: String| Err(FsepError::Config(why));
        for (name, value) in [
            ("hidden_size", self.hidden_size),
            ("moe_ffn_hidden_size", self.moe_ffn_hidden_size),
            ("num_moe_experts", self.num_moe_experts),
            ("moe_router_topk", self.moe_router_topk),
        ] {
            if value == 0 {
                return fail(format!("{name} must be at least 1"));
            }
        }
        // Biases are fewer than one matrix.
        let sizes = [4, self.hidden_size, self.moe_ffn_hidden_size, self.num_moe_experts];
        if sizes.into_iter().try_fold(1usize, usize::checked_mul).is_none_or(|all| all > MAX_PARAMS) {
            return fail(format!(
                "{} experts of 3 * {} * {} parameters are more than any machine can hold",
                self.num_moe_experts, self.hidden_size, self.moe_ffn_hidden_size
            ));
        }
        if self.moe_router_topk > self.num_moe_experts {
            return Err(burn_fsep_planner::PlannerError::TopK {
                topk: self.moe_router_topk,
                experts: self.num_moe_experts,
            }
            .into());
        }
        for (name, value) in
            [("moe_aux_loss_coeff", self.moe_aux_loss_coeff), ("moe_z_loss_coeff", self.moe_z_loss_coeff)]
        {
            if !value.is_finite() || value < 0.0 {
                return fail(format!("{name} must be finite and not negative, got {value}"));
            }
        }
        if self.shared_expert.is_some_and(|shared| shared.ffn_hidden_size == 0) {
            return fail("shared_expert.ffn_hidden_size must be at least 1".into());
        }
        if let ExpertActivation::ClampedSwiGlu { alpha, limit } = self.activation
            && !(alpha.is_finite() && limit.is_finite() && limit > 0.0)
        {
            return fail(format!(
                "activation: alpha and limit must be finite, and limit positive; got {alpha} and {limit}"
            ));
        }
        self.router.check(self.num_moe_experts, self.moe_router_topk)?;
        let force = self.moe_router_force.as_ref();
        force.map_or(Ok(()), |forcing| forcing.check(self.num_moe_experts, self.moe_router_topk))
    }
}
