//! The experts' activations, each pass over memory once. In single precision, whatever the tensors' type is.

use burn::{
    backend::cubecl::dtype_to_elem_type,
    tensor::{DType, Shape},
};
use burn_cubecl::{
    cubecl::{self, calculate_cube_count_elemwise, ir::ElemType, prelude::*},
    kernel::into_contiguous,
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};

use super::{super::ExpertActivation, vector_size};

/// Whether the kernels compute in this type: all that every device with the type can convert.
pub(super) fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Which formula a kernel is compiled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Formula {
    SwiGlu,
    ClampedSwiGlu,
    Geglu,
    Gelu,
    ReluSquared,
}

impl Formula {
    /// With `alpha` and `limit`, which only the clamped one has.
    fn of(activation: ExpertActivation) -> (Self, f32, f32) {
        match activation {
            ExpertActivation::SwiGlu => (Self::SwiGlu, 1.0, 0.0),
            ExpertActivation::ClampedSwiGlu { alpha, limit } => (Self::ClampedSwiGlu, alpha as f32, limit as f32),
            ExpertActivation::Geglu => (Self::Geglu, 1.0, 0.0),
            ExpertActivation::Gelu => (Self::Gelu, 1.0, 0.0),
            ExpertActivation::ReluSquared => (Self::ReluSquared, 1.0, 0.0),
        }
    }

    fn is_gated(self) -> bool {
        !matches!(self, Self::Gelu | Self::ReluSquared)
    }
}

/// `[M, 2F or F] -> [M, F]`
pub(super) fn activate(activation: ExpertActivation, first: CubeTensor) -> CubeTensor {
    let (formula, alpha, limit) = Formula::of(activation);
    let first = into_contiguous(first);
    let output = empty_like(&first, if formula.is_gated() { 2 } else { 1 });
    let elements = output.meta.num_elements();
    if elements > 0 {
        let vector_size = vector_size(&output, output.meta.shape()[1]);
        let units = elements / vector_size;
        let (client, dtype) = (first.client.clone(), first.dtype);
        let dim = CubeDim::new(&client, units);
        forward_kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, units, dim),
            dim,
            first.required_address_type(),
            vector_size,
            first.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            alpha,
            limit,
            formula,
            dtype_to_elem_type(dtype),
        );
    }
    output
}

/// `([M, 2F or F], [M, F]) -> ([M, 2F or F], [M, F])`: the gradient of the first, and the activation.
pub(super) fn activate_backward(
    activation: ExpertActivation,
    first: CubeTensor,
    grad: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let (formula, alpha, limit) = Formula::of(activation);
    let (first, grad) = (into_contiguous(first), into_contiguous(grad));
    let (d_first, output) = (empty_like(&first, 1), empty_like(&grad, 1));
    let elements = output.meta.num_elements();
    if elements > 0 {
        let vector_size = vector_size(&output, output.meta.shape()[1]);
        let units = elements / vector_size;
        let (client, dtype) = (first.client.clone(), first.dtype);
        let dim = CubeDim::new(&client, units);
        backward_kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, units, dim),
            dim,
            first.required_address_type(),
            vector_size,
            first.into_tensor_arg(),
            grad.into_tensor_arg(),
            d_first.clone().into_tensor_arg(),
            output.clone().into_tensor_arg(),
            alpha,
            limit,
            formula,
            dtype_to_elem_type(dtype),
        );
    }
    (d_first, output)
}

/// Of the tensor's type, with a part of its width. `[M, W] -> [M, W / parts]`
fn empty_like(tensor: &CubeTensor, parts: usize) -> CubeTensor {
    let [rows, width] = tensor.meta.shape().dims();
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::new([rows, width / parts]), tensor.dtype)
}

#[cube]
fn sigmoid(x: f32) -> f32 {
    1.0f32 / (1.0f32 + (-x).exp())
}

/// The share of the normal distribution below `x`: `(1 + erf(x / sqrt(2))) / 2`.
#[cube]
fn below_gauss<F: Float>(x: F) -> F {
    F::new(0.5) * (F::new(1.0) + F::erf(x * F::new(0.707_106_77)))
}

/// The nonlinearity of the gate, or of `up` where there is no gate.
#[cube]
fn act(x: f32, alpha: f32, #[comptime] formula: Formula) -> f32 {
    if comptime!(formula == Formula::SwiGlu || formula == Formula::ClampedSwiGlu) {
        x * sigmoid(alpha * x)
    } else if comptime!(formula == Formula::ReluSquared) {
        let relu = max(x, 0.0f32);
        relu * relu
    } else {
        x * below_gauss::<f32>(x)
    }
}

/// The derivative of [`act`].
#[cube]
fn slope(x: f32, alpha: f32, #[comptime] formula: Formula) -> f32 {
    if comptime!(formula == Formula::SwiGlu || formula == Formula::ClampedSwiGlu) {
        let sigmoid = sigmoid(alpha * x);
        sigmoid + alpha * x * sigmoid * (1.0f32 - sigmoid)
    } else if comptime!(formula == Formula::ReluSquared) {
        2.0f32 * max(x, 0.0f32)
    } else {
        // The density is exp(-x^2 / 2) / sqrt(2 pi).
        let below = below_gauss::<f32>(x);
        below + x * 0.398_942_3f32 * (-0.5f32 * x * x).exp()
    }
}

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    first: &Tensor<Vector<E, N>>,
    output: &mut Tensor<Vector<E, N>>,
    alpha: f32,
    limit: f32,
    #[comptime] formula: Formula,
    #[define(E)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= output.len() {
        terminate!();
    }
    if comptime!(formula.is_gated()) {
        let width = output.shape(1) / N::value();
        let place = i / width * 2 * width + i % width;
        let (gates, ups) = (first[place], first[place + width]);
        let mut activated = gates;
        #[unroll]
        for k in 0..N::value() {
            let mut gate = f32::cast_from(gates.extract(k));
            let mut up = f32::cast_from(ups.extract(k));
            if comptime!(formula == Formula::ClampedSwiGlu) {
                gate = min(gate, limit);
                up = clamp(up, -limit, limit) + 1.0f32;
            }
            activated.insert(k, E::cast_from(act(gate, alpha, formula) * up));
        }
        output[i] = activated;
    } else {
        let ups = first[i];
        let mut activated = ups;
        #[unroll]
        for k in 0..N::value() {
            activated.insert(k, E::cast_from(act(f32::cast_from(ups.extract(k)), alpha, formula)));
        }
        output[i] = activated;
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    first: &Tensor<Vector<E, N>>,
    grad: &Tensor<Vector<E, N>>,
    d_first: &mut Tensor<Vector<E, N>>,
    output: &mut Tensor<Vector<E, N>>,
    alpha: f32,
    limit: f32,
    #[comptime] formula: Formula,
    #[define(E)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= output.len() {
        terminate!();
    }
    let grads = grad[i];
    let mut activations = grads;
    if comptime!(formula.is_gated()) {
        let width = output.shape(1) / N::value();
        let place = i / width * 2 * width + i % width;
        let (gates, ups) = (first[place], first[place + width]);
        let (mut gate_grads, mut up_grads) = (gates, ups);
        #[unroll]
        for k in 0..N::value() {
            let grad = f32::cast_from(grads.extract(k));
            let mut gate = f32::cast_from(gates.extract(k));
            let mut up = f32::cast_from(ups.extract(k));
            let (mut gate_grad, mut up_grad) = (grad, grad);
            if comptime!(formula == Formula::ClampedSwiGlu) {
                if gate > limit {
                    gate = limit;
                    gate_grad = 0.0f32;
                }
                if up > limit || up < -limit {
                    up_grad = 0.0f32;
                }
                up = clamp(up, -limit, limit) + 1.0f32;
            }
            let activated = act(gate, alpha, formula);
            gate_grads.insert(k, E::cast_from(gate_grad * up * slope(gate, alpha, formula)));
            up_grads.insert(k, E::cast_from(up_grad * activated));
            activations.insert(k, E::cast_from(activated * up));
        }
        d_first[place] = gate_grads;
        d_first[place + width] = up_grads;
    } else {
        let ups = first[i];
        let mut up_grads = ups;
        #[unroll]
        for k in 0..N::value() {
            let up = f32::cast_from(ups.extract(k));
            let grad = f32::cast_from(grads.extract(k));
            up_grads.insert(k, E::cast_from(grad * slope(up, alpha, formula)));
            activations.insert(k, E::cast_from(act(up, alpha, formula)));
        }
        d_first[i] = up_grads;
    }
    output[i] = activations;
}
