use burn::{
    config::Config,
    tensor::{Device, FloatDType},
};

use super::{DenseMoE, FSEPMoE, FsepExperts, RouterForcing, TopKRouter, losses::AuxiliaryLosses};
use crate::{
    FsepError, FsepRuntime,
    ops::{self, LayerSpec, WeightStorage},
    shard::ExpertShape,
};

/// How experts are spread over ranks.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum ExpertParallelism {
    /// Fully sharded: any layout in any step.
    Fsep,
    /// Static expert parallelism with resident experts: rank `r` owns experts `r * E / N ..`, nothing is restored,
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
    /// Slots a rank `C`: whole experts that a rank restores. `None` is the fewest that hold all experts, plus one so
    /// that some can stand twice.
    #[config(default = "None")]
    pub slots_per_rank: Option<usize>,
    /// How experts are spread over ranks.
    #[config(default = "ExpertParallelism::Fsep")]
    pub expert_parallelism: ExpertParallelism,
    /// Weight of the load-balancing auxiliary loss (Switch Transformer, eq. 4); 0 is off.
    #[config(default = 0.0)]
    pub moe_aux_loss_coeff: f64,
    /// Weight of the router z-loss (ST-MoE, eq. 5); 0 is off.
    #[config(default = 0.0)]
    pub moe_z_loss_coeff: f64,
    /// For throughput tests: route all experts equally many tokens, whatever the router says.
    #[config(default = false)]
    pub moe_router_force_load_balancing: bool,
    /// For throughput tests: add a fixed random bias with this standard deviation to the router's logits, so that
    /// routing is skewed.
    #[config(default = "None")]
    pub moe_router_force_biased: Option<f64>,
    /// For throughput tests: route exactly these shares of the assignments to the experts, whatever the router says.
    /// Shape `[E]`, sum 1, none above `1 / K`.
    #[config(default = "None")]
    pub moe_router_force_shares: Option<Vec<f64>>,
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
        let router = self.router(runtime.seed(), experts.layer_index(), device);
        Ok(FSEPMoE { router, experts, losses: self.losses() })
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
        let (ranks, experts) = (runtime.world_size(), self.num_moe_experts);
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
        let shape = ExpertShape { hidden: self.hidden_size, ffn: self.moe_ffn_hidden_size };
        let storage = if is_static || ranks == 1 { WeightStorage::Resident } else { WeightStorage::Sharded };
        let spec = runtime.register_layer(|layer| LayerSpec {
            layer,
            rank: runtime.rank(),
            world_size: ranks,
            num_experts: experts,
            slots_per_rank,
            topk: self.moe_router_topk,
            shape,
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
        let shape = ExpertShape { hidden: self.hidden_size, ffn: self.moe_ffn_hidden_size };
        let router = self.router(seed, layer, device);
        Ok(DenseMoE::new(router, shape, self.num_moe_experts, self.losses(), seed, layer, device))
    }

    fn losses(&self) -> AuxiliaryLosses {
        AuxiliaryLosses { balancing: self.moe_aux_loss_coeff, z: self.moe_z_loss_coeff }
    }

    fn router(&self, seed: u64, layer: usize, device: &Device) -> TopKRouter {
        TopKRouter::new(self, self.forcing(seed, layer), seed, layer, device)
    }

    fn forcing(&self, seed: u64, layer: usize) -> RouterForcing {
        let experts = self.num_moe_experts;
        if let Some(shares) = &self.moe_router_force_shares {
            RouterForcing::Shares(shares.clone())
        } else if self.moe_router_force_load_balancing {
            RouterForcing::Shares(vec![1.0 / experts as f64; experts])
        } else if let Some(std) = self.moe_router_force_biased {
            RouterForcing::biased(std, experts, seed, layer)
        } else {
            RouterForcing::Off
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
        let sizes = [3, self.hidden_size, self.moe_ffn_hidden_size, self.num_moe_experts];
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
        for (name, value) in [
            ("moe_aux_loss_coeff", Some(self.moe_aux_loss_coeff)),
            ("moe_z_loss_coeff", Some(self.moe_z_loss_coeff)),
            ("moe_router_force_biased", self.moe_router_force_biased),
        ] {
            if let Some(value) = value.filter(|v| !v.is_finite() || *v < 0.0) {
                return fail(format!("{name} must be finite and not negative, got {value}"));
            }
        }
        let forced = [
            self.moe_router_force_load_balancing,
            self.moe_router_force_biased.is_some(),
            self.moe_router_force_shares.is_some(),
        ];
        if forced.into_iter().filter(|on| *on).count() > 1 {
            return fail("of the moe_router_force_* options at most one can be set".into());
        }
        if let Some(shares) = &self.moe_router_force_shares {
            let largest = 1.0 / self.moe_router_topk as f64 + 1e-9;
            let sum: f64 = shares.iter().sum();
            if shares.len() != self.num_moe_experts
                || (sum - 1.0).abs() > 1e-6
                || shares.iter().any(|s| !(0.0..=largest).contains(s))
            {
                return fail(format!(
                    "moe_router_force_shares needs {} shares between 0 and 1 / moe_router_topk that sum to 1, got \
                     {shares:?}",
                    self.num_moe_experts
                ));
            }
        }
        Ok(())
    }
}
