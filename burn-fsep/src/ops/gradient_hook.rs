//! A gradient hook: an operation that passes a parameter through and tells of its gradient in backward.
//!
//! Backward runs operations by their depth in the graph, deepest first, so an operation on a parameter alone would run at
//! the very end. A hook has the input of the module as a second parent: it is one deeper than the input, and runs when
//! everything that the module computed has run and before anything that computed the input. What that relies on is tested in
//! `burn_compat::backward_order` and `leaf_gradient`.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::{
    backend::{
        Autodiff, Backend, Dispatch as AnyBackend, DispatchKindConversion, DispatchTensor, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        ops::FloatTensorOps,
        tensor::FloatTensor,
    },
    module::ParamId,
    tensor::{FloatDType, Shape, Tensor},
};

use super::{FsepKernels, types::cast};

/// Is told of parameters' gradients while backward runs.
pub trait GradientSink: Debug + Send + Sync {
    /// Backward has passed a hook of `parameter`; `gradient`, in the parameter's shape and element type, is what it has
    /// found of the parameter's gradient so far.
    fn arrived(&self, parameter: ParamId, gradient: DispatchTensor);
}

/// What a hook does besides passing a parameter through.
#[derive(Debug, Clone)]
pub struct GradientHook {
    /// The parameter.
    pub parameter: ParamId,
    /// Is told of the gradient; `None` if nobody is.
    pub sink: Option<Arc<dyn GradientSink>>,
    /// Element type of the output, that of the parameter if `None`. The gradient is in the parameter's.
    pub dtype: Option<FloatDType>,
    /// Shared by all hooks on one input, `false` at first: one of them gives the input a gradient of zeros. Backward
    /// wants a gradient of every parent, and nobody else might give this one any.
    pub input_served: Arc<AtomicBool>,
}

/// The gradient hook as an operation of a backend. `Autodiff` adds the backward pass.
#[backend_extension(Cube: cfg(feature = "cube"), Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "libtorch"), Autodiff)]
pub trait HookOps: Backend {
    /// The parameter in the hook's element type. `input`, of any shape, decides when the hook runs in backward.
    fn fsep_gradient_hook(
        parameter: FloatTensor<Self>,
        input: FloatTensor<Self>,
        hook: GradientHook,
    ) -> FloatTensor<Self> {
        let _ = input;
        cast::<Self>(parameter, hook.dtype)
    }
}

impl<B: FsepKernels> HookOps for B {}

/// [`HookOps::fsep_gradient_hook`] for tensors of any supported device.
///
/// # Panics
///
/// If the tensors' backend is not one that this crate was built for.
pub fn gradient_hook<const P: usize, const D: usize>(
    parameter: Tensor<P>,
    input: Tensor<D>,
    hook: GradientHook,
) -> Tensor<P> {
    let output = <AnyBackend as HookOps>::fsep_gradient_hook(parameter.into_dispatch(), input.into_dispatch(), hook);
    Tensor::from_dispatch(output)
}

#[derive(Debug)]
struct HookBackward;

/// What backward has to know.
#[derive(Debug, Clone)]
struct State<B: Backend> {
    hook: GradientHook,
    /// Of the parameter.
    dtype: FloatDType,
    /// Whether the parameter keeps its gradient after backward.
    is_leaf: bool,
    input_shape: Shape,
    input_dtype: FloatDType,
    device: burn::backend::tensor::Device<B>,
}

impl<B: Backend> Backward<B, 2> for HookBackward
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [parameter, input] = ops.parents;
        let gradient = grads.consume::<B>(&ops.node);
        let State { hook, dtype, is_leaf, input_shape, input_dtype, device } = ops.state;
        if let Some(input) = input
            && !hook.input_served.swap(true, Ordering::Relaxed)
        {
            grads.register::<B>(input.id, zeros::<B>(input_shape, input_dtype, &device));
        }
        let Some(parameter) = parameter else { return };
        grads.register::<B>(parameter.id, cast::<B>(gradient, Some(dtype)));
        if let (true, Some(sink)) = (is_leaf, &hook.sink) {
            // Of a leaf this is a copy of the handle, the gradient stays registered.
            let so_far = grads.consume::<B>(&parameter);
            sink.arrived(hook.parameter, Tensor::<1>::from_primitive::<B>(so_far).into_dispatch());
        }
    }
}

/// Zeros that take no memory, where the shape lets them.
fn zeros<B: Backend>(shape: Shape, dtype: FloatDType, device: &burn::backend::tensor::Device<B>) -> FloatTensor<B> {
    if shape.num_elements() == 0 {
        return B::float_zeros(shape, device, dtype);
    }
    let one = Shape::from(vec![1; shape.num_dims()]);
    B::float_expand(B::float_zeros(one, device, dtype), shape)
}

impl<B: FsepKernels, C: CheckpointStrategy> HookOps for Autodiff<B, C>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    fn fsep_gradient_hook(
        parameter: FloatTensor<Self>,
        input: FloatTensor<Self>,
        hook: GradientHook,
    ) -> FloatTensor<Self> {
        let nodes = [parameter.node(), input.node()];
        let is_leaf = Self::float_is_require_grad(&parameter);
        let state = State {
            dtype: parameter.dtype().into(),
            is_leaf,
            input_shape: input.shape(),
            input_dtype: input.dtype().into(),
            device: input.device(),
            hook: hook.clone(),
        };
        drop(input);
        let output = cast::<B>(parameter.into_primitive(), hook.dtype);
        match HookBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(state, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device};
    use parking_lot::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Arrivals(Mutex<Vec<(ParamId, DType, f32)>>);

    impl GradientSink for Arrivals {
        fn arrived(&self, parameter: ParamId, gradient: DispatchTensor) {
            let gradient = Tensor::<1>::from_dispatch(gradient);
            self.0.lock().push((parameter, gradient.dtype(), gradient.into_scalar::<f32>()));
        }
    }

    #[test]
    fn hooks_run_when_backward_has_passed_their_module() {
        let device = Device::flex().autodiff();
        let arrivals = Arc::new(Arrivals::default());
        let ids = [ParamId::new(), ParamId::new(), ParamId::new()];
        let hook = |parameter| GradientHook {
            parameter,
            sink: Some(arrivals.clone()),
            dtype: Some(FloatDType::BF16),
            input_served: Arc::default(),
        };
        let leaves = [2.0f32, 3.0, 5.0].map(|value| Tensor::<1>::from_floats([value], &device).require_grad());
        let apply = |x: Tensor<1>, i: usize, input: Tensor<1>| {
            x * gradient_hook(leaves[i].clone(), input, hook(ids[i])).cast(DType::F32)
        };
        let x = Tensor::<1>::from_floats([1.0], &device);
        let x = apply(x.clone(), 0, x);
        // The last one's input is untracked: it has to wait for the end.
        let untracked = x.clone().detach();
        let x = apply(x.clone(), 1, x);
        let x = apply(x, 2, untracked);
        let grads = x.backward();
        let arrivals = arrivals.0.lock();
        assert_eq!(arrivals[0], (ids[1], DType::F32, 10.0), "in the middle of backward");
        let mut last = [arrivals[1], arrivals[2]];
        last.sort_by(|a, b| a.2.total_cmp(&b.2));
        assert_eq!(last, [(ids[2], DType::F32, 6.0), (ids[0], DType::F32, 15.0)]);
        let found = leaves.map(|leaf| leaf.grad(&grads).unwrap().into_scalar::<f32>());
        assert_eq!(found, [15.0, 10.0, 6.0]);
    }
}
