use burn::{
    config::Config,
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, Tensor, TensorData, activation::sigmoid},
};

use super::activate::activate;
use crate::{
    ops::{ExpertActivation, product},
    shard::{ExpertShape, expert_parameters, mix, uniform},
};

/// Configuration of a [`SharedExpert`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub struct SharedExpertConfig {
    /// Its intermediate size (Megatron-Core's `moe_shared_expert_intermediate_size`): that of several shared experts is their sum.
    pub ffn_hidden_size: usize,
    /// Whether its output is multiplied by the sigmoid of a number for each token (Qwen2-MoE; Megatron-Core's
    /// `moe_shared_expert_gate`).
    #[config(default = false)]
    pub gate: bool,
}

/// An expert that computes all tokens, beside those that the router chooses. Its parameters are replicated, as those of any other
/// module of the model.
#[derive(Module, Debug)]
pub struct SharedExpert {
    /// `D -> F`, of gated activations.
    pub gate_proj: Option<Linear>,
    /// `D -> F`
    pub up_proj: Linear,
    /// `F -> D`
    pub down_proj: Linear,
    /// `D -> 1`: weighs the output.
    pub gate: Option<Linear>,
    #[module(skip)]
    activation: ExpertActivation,
}

impl SharedExpert {
    /// `shape` is that of this expert; `expert` the number of its random stream, beyond those of the routed ones.
    pub(super) fn new(
        shape: ExpertShape,
        activation: ExpertActivation,
        gate: bool,
        [seed, layer, expert]: [u64; 3],
        device: &Device,
    ) -> Self {
        let ExpertShape { hidden, ffn, gated, bias } = shape;
        let draw = |start: usize, [fan_out, fan_in]: [usize; 2]| {
            let positions = start..start + fan_out * fan_in;
            let values = expert_parameters(shape, seed, layer as usize, expert as usize, positions).collect();
            // The expert's rows are [out, in], a `Linear` has [in, out].
            let weight = Tensor::<2>::from_data(TensorData::new(values, [fan_out, fan_in]), device).transpose();
            let bias = bias.then(|| Param::from_tensor(Tensor::zeros([fan_out], device)));
            Linear { weight: Param::from_tensor(weight), bias }
        };
        let up = if gated { ffn * hidden } else { 0 };
        let gate = gate.then(|| {
            let stream = mix(mix(seed, layer + 1), expert + 2);
            let value = |position: usize| uniform(mix(stream, position as u64 + 1)) / (hidden as f32).sqrt();
            let values: Vec<f32> = (0..hidden).map(value).collect();
            Linear { weight: Param::from_data(TensorData::new(values, [hidden, 1]), device), bias: None }
        });
        Self {
            gate_proj: gated.then(|| draw(0, [ffn, hidden])),
            up_proj: draw(up, [ffn, hidden]),
            down_proj: draw(shape.gate_up_len(), [hidden, ffn]),
            gate,
            activation,
        }
    }

    /// Computes tokens, in their type. `[T, D] -> [T, D]`
    ///
    /// # Panics
    ///
    /// If the hidden size is another one.
    pub fn forward(&self, tokens: Tensor<2>) -> Tensor<2> {
        let gate = self.gate_proj.as_ref().map(|gate| linear(gate, tokens.clone()));
        let hidden = activate(self.activation, gate, linear(&self.up_proj, tokens.clone()));
        let output = linear(&self.down_proj, hidden);
        match &self.gate {
            Some(gate) => output * sigmoid(linear(gate, tokens)),
            None => output,
        }
    }
}

/// A projection in the type of its input, whatever that of its parameters.
fn linear(linear: &Linear, x: Tensor<2>) -> Tensor<2> {
    let dtype = x.dtype();
    let output = product(x, linear.weight.val().cast(dtype));
    match &linear.bias {
        Some(bias) => output + bias.val().cast(dtype).unsqueeze(),
        None => output,
    }
}
