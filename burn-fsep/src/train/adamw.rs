use burn::{
    config::Config,
    optim::{
        AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, LearningRate, ModuleOptimizer, Optimizer, RecordState,
        StateSink, StateSource, join_path,
    },
    tensor::{DType, Device, Tensor},
};

#[cfg(feature = "libtorch")]
use crate::ops::{AdamWStep, AdamWTensors, fused_adamw, fuses_adamw};

/// Configuration of [`FusedAdamW`]; names and defaults are those of Burn's [`AdamWConfig`].
#[derive(Config, Debug)]
pub struct FusedAdamWConfig {
    /// Decay of the first moment.
    #[config(default = 0.9)]
    beta_1: f32,
    /// Decay of the second moment.
    #[config(default = 0.999)]
    beta_2: f32,
    /// Added to the root of the second moment.
    #[config(default = 1e-5)]
    epsilon: f32,
    /// Decoupled weight decay.
    #[config(default = 1e-4)]
    weight_decay: f32,
    /// Decays only what the step makes smaller: <https://arxiv.org/abs/2510.12402>.
    #[config(default = false)]
    cautious_weight_decay: bool,
    /// Keeps the moments of half-precision parameters in single precision.
    #[config(default = false)]
    single_precision_moments: bool,
}

impl FusedAdamWConfig {
    /// The optimizer of one parameter, for [`ModuleOptimizer::with_group`].
    pub fn build(&self) -> FusedAdamW {
        let plain = AdamWConfig::new()
            .with_beta_1(self.beta_1)
            .with_beta_2(self.beta_2)
            .with_epsilon(self.epsilon)
            .with_weight_decay(self.weight_decay)
            .with_cautious_weight_decay(self.cautious_weight_decay);
        FusedAdamW { config: self.clone(), plain: plain.build() }
    }

    /// The optimizer of a module.
    pub fn init(&self) -> ModuleOptimizer {
        self.build().into()
    }
}

/// AdamW in one kernel a parameter: on NVIDIA GPUs with LibTorch, where Burn's [`AdamW`] launches some fifteen. Elsewhere
/// it is Burn's.
///
/// Steps are equal to those of Burn's, up to rounding: in half precision the kernel rounds results only. State and records
/// are Burn's, too, so checkpoints can be exchanged. Parameters and moments are overwritten in place where the optimizer is
/// given the only handle on them: `model = optimizer.step(lr, model, grads)` rather than with a clone of the model.
///
/// There is no clipping in it: see [`clip_grad_norm`](super::clip_grad_norm).
#[derive(Clone)]
pub struct FusedAdamW {
    config: FusedAdamWConfig,
    plain: AdamW,
}

/// Burn's state of AdamW, except that the type of the moments survives a record: Burn loads them in the default type of
/// the default device, which need not be the one that trains.
#[derive(Clone)]
pub struct FusedAdamWState<const D: usize>(AdamWState<D>);

impl<const D: usize> RecordState for FusedAdamWState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        self.0.state_flatten(prefix, out);
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        let prefix = join_path(prefix, "momentum");
        let time = source.take_scalar(&prefix, "time")?.try_into().ok()?;
        let mut moment = |name| {
            let data = source.take_tensor(&prefix, name)?;
            let dtype = data.dtype();
            Some(Tensor::from_data(data, (device, dtype)))
        };
        let mut momentum = AdaptiveMomentumState::new(time, moment("moment_1")?, moment("moment_2")?);
        momentum.max_moment_2 = moment("max_moment_2");
        Some(Self(AdamWState::new(momentum)))
    }
}

impl Optimizer for FusedAdamW {
    type State<const D: usize> = FusedAdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let dtype = tensor.dtype();
        let is_half = matches!(dtype, DType::BF16 | DType::F16);
        let moments = if is_half && self.config.single_precision_moments { DType::F32 } else { dtype };
        let grad = cast(grad, dtype);
        // Of a record that was made with another choice.
        let state = state.map(|state| in_dtype(state.0, moments));
        #[cfg(feature = "libtorch")]
        if fuses_adamw(&tensor, moments) {
            let (tensor, state) = self.fused_step(lr, tensor, grad, state, moments);
            return (tensor, state.map(FusedAdamWState));
        }
        let (tensor, state) = self.plain.step(lr, cast(tensor, moments), cast(grad, moments), state);
        (cast(tensor, dtype), state.map(FusedAdamWState))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        FusedAdamWState(AdamW::to_device(state.0, device))
    }
}

#[cfg(feature = "libtorch")]
impl FusedAdamW {
    fn fused_step<const D: usize>(
        &self,
        lr: LearningRate,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<AdamWState<D>>,
        moments: DType,
    ) -> (Tensor<D>, Option<AdamWState<D>>) {
        let FusedAdamWConfig { beta_1, beta_2, epsilon, weight_decay, cautious_weight_decay, .. } = self.config;
        let AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } = match state {
            Some(state) => state.momentum,
            None => {
                let zeros = || Tensor::zeros(parameter.shape(), (&parameter.device(), moments));
                AdaptiveMomentumState::new(0, zeros(), zeros())
            }
        };
        let time = time + 1;
        let step = AdamWStep {
            beta_1,
            beta_2,
            epsilon,
            correction_1: 1.0 - beta_1.powi(time as i32),
            correction_2: 1.0 - beta_2.powi(time as i32),
            learning_rate: lr as f32,
            decay: (lr * f64::from(weight_decay)) as f32,
            cautious: cautious_weight_decay,
        };
        let tensors = AdamWTensors { parameter, gradient, moment_1, moment_2 };
        let [parameter, moment_1, moment_2] =
            fused_adamw(tensors, &step).unwrap_or_else(|error| panic!("AdamW: {error}"));
        let mut momentum = AdaptiveMomentumState::new(time, moment_1, moment_2);
        momentum.max_moment_2 = max_moment_2;
        (parameter, Some(AdamWState::new(momentum)))
    }
}

fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}

fn in_dtype<const D: usize>(mut state: AdamWState<D>, dtype: DType) -> AdamWState<D> {
    state.momentum.moment_1 = cast(state.momentum.moment_1, dtype);
    state.momentum.moment_2 = cast(state.momentum.moment_2, dtype);
    state
}
