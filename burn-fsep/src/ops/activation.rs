use std::f64::consts::{FRAC_1_SQRT_2, PI};

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::Slice,
};
use serde::{Deserialize, Serialize};

/// The nonlinearity between an expert's two projections.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum ExpertActivation {
    /// `silu(gate) * up`.
    SwiGlu,
    /// GPT-OSS: `gate * sigmoid(alpha * gate) * (up + 1)`, `gate` not above `limit` and `up` within `±limit`.
    ClampedSwiGlu {
        /// 1.702 in GPT-OSS.
        alpha: f64,
        /// 7 in GPT-OSS (`swiglu_limit`).
        limit: f64,
    },
    /// `gelu(gate) * up`, with the exact GELU.
    Geglu,
    /// `gelu(up)`, with the exact GELU; no gate.
    Gelu,
    /// `relu(up)^2`; no gate.
    ReluSquared,
}

impl ExpertActivation {
    /// Whether the first projection has a gate beside `up`.
    pub fn is_gated(self) -> bool {
        match self {
            Self::SwiGlu | Self::ClampedSwiGlu { .. } | Self::Geglu => true,
            Self::Gelu | Self::ReluSquared => false,
        }
    }
}

/// The activation of the first projection's output: gate, if there is one, and up, side by side.
/// `[M, 2F or F] -> [M, F]`
pub(super) fn activate<B: Backend>(activation: ExpertActivation, first: FloatTensor<B>) -> FloatTensor<B> {
    match activation {
        ExpertActivation::SwiGlu => {
            let (gate, up) = halves::<B>(first);
            B::float_mul(B::float_mul(gate.clone(), B::sigmoid(gate)), up)
        }
        ExpertActivation::ClampedSwiGlu { alpha, limit } => {
            let (gate, up) = halves::<B>(first);
            let (gate, up) = (B::float_clamp_max(gate, limit.into()), clamped_up::<B>(up, limit));
            let sigmoid = B::sigmoid(B::float_mul_scalar(gate.clone(), alpha.into()));
            B::float_mul(B::float_mul(gate, sigmoid), up)
        }
        ExpertActivation::Geglu => {
            let (gate, up) = halves::<B>(first);
            B::float_mul(B::gelu(gate), up)
        }
        ExpertActivation::Gelu => B::gelu(first),
        ExpertActivation::ReluSquared => {
            let relu = B::relu(first);
            B::float_mul(relu.clone(), relu)
        }
    }
}

/// Backward of [`activate`]: the gradient of the first projection's output and, since backward needs it once more, the
/// activation. `([M, 2F or F], [M, F]) -> ([M, 2F or F], [M, F])`
pub(super) fn activate_backward<B: Backend>(
    activation: ExpertActivation,
    first: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    match activation {
        ExpertActivation::SwiGlu => {
            let (gate, up) = halves::<B>(first);
            let sigmoid = B::sigmoid(gate.clone());
            let silu = B::float_mul(gate, sigmoid.clone());
            // d silu = sigmoid + silu * (1 - sigmoid)
            let d_silu = B::float_add(sigmoid.clone(), B::float_mul(silu.clone(), one_minus::<B>(sigmoid)));
            gated_backward::<B>(grad, silu, up, d_silu)
        }
        ExpertActivation::ClampedSwiGlu { alpha, limit } => {
            let (gate, up) = halves::<B>(first);
            let gate_is_free = not_above::<B>(gate.clone(), limit);
            let up_is_free = not_above::<B>(B::float_abs(up.clone()), limit);
            let (gate, up) = (B::float_clamp_max(gate, limit.into()), clamped_up::<B>(up, limit));
            let sigmoid = B::sigmoid(B::float_mul_scalar(gate.clone(), alpha.into()));
            let act = B::float_mul(gate, sigmoid.clone());
            // d act = sigmoid + alpha * act * (1 - sigmoid)
            let rest = B::float_mul_scalar(B::float_mul(act.clone(), one_minus::<B>(sigmoid.clone())), alpha.into());
            let d_act = B::float_mul(B::float_add(sigmoid, rest), gate_is_free);
            let output = B::float_mul(act.clone(), up.clone());
            let d_gate = B::float_mul(B::float_mul(grad.clone(), up), d_act);
            let d_up = B::float_mul(B::float_mul(grad, act), up_is_free);
            (B::float_cat(vec![d_gate, d_up], 1), output)
        }
        ExpertActivation::Geglu => {
            let (gate, up) = halves::<B>(first);
            let act = B::gelu(gate.clone());
            gated_backward::<B>(grad, act, up, gelu_slope::<B>(gate))
        }
        ExpertActivation::Gelu => (B::float_mul(grad, gelu_slope::<B>(first.clone())), B::gelu(first)),
        ExpertActivation::ReluSquared => {
            let relu = B::relu(first);
            let d_first = B::float_mul(grad, B::float_mul_scalar(relu.clone(), 2.0.into()));
            (d_first, B::float_mul(relu.clone(), relu))
        }
    }
}

/// Of `act(gate) * up`, from `act` and its derivative.
fn gated_backward<B: Backend>(
    grad: FloatTensor<B>,
    act: FloatTensor<B>,
    up: FloatTensor<B>,
    d_act: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let output = B::float_mul(act.clone(), up.clone());
    let d_gate = B::float_mul(B::float_mul(grad.clone(), up), d_act);
    let d_up = B::float_mul(grad, act);
    (B::float_cat(vec![d_gate, d_up], 1), output)
}

/// The derivative of the exact GELU: `(1 + erf(x / sqrt(2))) / 2 + x exp(-x^2 / 2) / sqrt(2 pi)`. Burn's `gelu_backward` is, on most
/// backends, that of an approximation.
fn gelu_slope<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(x.clone(), FRAC_1_SQRT_2.into()));
    let below = B::float_mul_scalar(B::float_add_scalar(erf, 1.0.into()), 0.5.into());
    let density = B::float_exp(B::float_mul_scalar(B::float_mul(x.clone(), x.clone()), (-0.5).into()));
    let density = B::float_mul_scalar(density, (1.0 / (2.0 * PI).sqrt()).into());
    B::float_add(below, B::float_mul(x, density))
}

/// 1 where a number is not above `limit`, else 0.
fn not_above<B: Backend>(x: FloatTensor<B>, limit: f64) -> FloatTensor<B> {
    one_minus::<B>(B::float_sign(B::relu(B::float_add_scalar(x, (-limit).into()))))
}

fn clamped_up<B: Backend>(up: FloatTensor<B>, limit: f64) -> FloatTensor<B> {
    B::float_add_scalar(B::float_clamp(up, (-limit).into(), limit.into()), 1.0.into())
}

fn one_minus<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add_scalar(B::float_neg(x), 1.0.into())
}

fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [rows, width] = gate_up.shape().dims();
    let half = |start: usize| [Slice::from(0..rows), Slice::from(start..start + width / 2)];
    (B::float_slice(gate_up.clone(), &half(0)), B::float_slice(gate_up, &half(width / 2)))
}
