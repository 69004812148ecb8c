//! Attention, normalisation and loss of LibTorch with their own backward passes.

use burn::{
    backend::{
        Autodiff, Backend, Dispatch, DispatchDevice, LibTorch,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};
use burn_tch::TchTensor;
use tch::{Kind, Reduction};

use super::Rope;

/// Whether tensors of this device are LibTorch's.
pub(super) fn is_libtorch(device: &DispatchDevice) -> bool {
    match device {
        DispatchDevice::Autodiff(device) => is_libtorch(device),
        DispatchDevice::LibTorch(_) => true,
        #[allow(unreachable_patterns)]
        _ => false,
    }
}

/// Sizes of attention that its inputs do not tell.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionShape {
    pub batch: usize,
    pub length: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
}

/// Rotates queries and keys and attends, causally. `[B * L, heads * head_dim]`, three times and once
pub(super) fn attention([query, key, value]: [Tensor<2>; 3], rope: &Rope, shape: AttentionShape) -> Tensor<2> {
    let [query, key, value] = [query, key, value].map(Tensor::into_dispatch);
    let (cos, sin) = (rope.cos.clone().into_dispatch(), rope.sin.clone().into_dispatch());
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_attention(query, key, value, cos, sin, shape))
}

/// RMS normalisation with a weight, `[D]`. `[T, D] -> [T, D]`
pub(super) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_rms_norm(x.into_dispatch(), weight.into_dispatch(), epsilon))
}

/// As [`next_token_loss`](super::next_token_loss).
pub(super) fn next_token_loss(logits: Tensor<2>, targets: Tensor<1, Int>, weights: Tensor<1>) -> Tensor<1> {
    let (targets, weights) = (targets.into_dispatch(), weights.into_dispatch());
    Tensor::from_dispatch(<Dispatch as FusedOps>::fused_next_token_loss(logits.into_dispatch(), targets, weights))
}

/// The operations, with autodiff.
#[backend_extension(LibTorch, Autodiff)]
pub(super) trait FusedOps: Backend {
    /// [`attention`]
    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;

    /// [`rms_norm`]
    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self>;

    /// [`next_token_loss`]
    fn fused_next_token_loss(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// What LibTorch computes and differentiates.
#[derive(Debug, Clone)]
pub(super) enum Function {
    Attention(AttentionShape),
    RmsNorm { epsilon: f64 },
    NextTokenLoss,
}

impl Function {
    /// `constants` have no gradients.
    fn apply(&self, inputs: &[tch::Tensor], constants: &[tch::Tensor]) -> tch::Tensor {
        match (self, inputs, constants) {
            (Self::Attention(shape), [query, key, value], [cos, sin]) => shape.apply([query, key, value], [cos, sin]),
            (Self::RmsNorm { epsilon }, [x, weight], []) => {
                x.internal_fused_rms_norm(x.size().last().copied().unwrap_or(1), Some(weight), *epsilon).0
            }
            (Self::NextTokenLoss, [logits], [targets, weights]) => {
                let losses = logits.to_kind(Kind::Float).cross_entropy_loss(
                    targets,
                    None::<&tch::Tensor>,
                    Reduction::None,
                    -100,
                    0.0,
                );
                losses.dot(weights).reshape([1])
            }
            _ => unreachable!("each function has its own number of tensors"),
        }
    }
}

impl AttentionShape {
    fn apply(&self, [query, key, value]: [&tch::Tensor; 3], [cos, sin]: [&tch::Tensor; 2]) -> tch::Tensor {
        let [batch, length, dim] = [self.batch, self.length, self.head_dim].map(|size| size as i64);
        let heads = |x: &tch::Tensor| x.view([batch, length, -1, dim]).transpose(1, 2);
        let rotate = |x: tch::Tensor| {
            let halves = x.chunk(2, 3);
            let [first, second] = &halves[..] else { unreachable!("two halves were asked for") };
            tch::Tensor::cat(&[first * cos - second * sin, second * cos + first * sin], 3)
        };
        let (query, mut key, mut value) = (rotate(heads(query)), rotate(heads(key)), heads(value));
        let (groups, together) = (key.size()[1], query.size()[1] / key.size()[1]);
        let window = self.window.filter(|&window| window < self.length);
        let mask = window.map(|window| {
            let all = tch::Tensor::ones([length, length], (Kind::Bool, query.device()));
            all.tril(0).logical_and(&all.triu(1 - window as i64))
        });
        if mask.is_some() && together > 1 {
            // No fast kernel takes groups and a mask.
            let repeat = |x: &tch::Tensor| {
                let shape = [batch, groups, together, length, dim];
                x.unsqueeze(2).expand(shape, false).reshape([batch, groups * together, length, dim])
            };
            (key, value) = (repeat(&key), repeat(&value));
        }
        let is_grouped = key.size()[1] != query.size()[1];
        let attended = tch::Tensor::scaled_dot_product_attention(
            &query,
            &key,
            &value,
            mask.as_ref(),
            0.0,
            mask.is_none(),
            None,
            is_grouped,
        );
        attended.transpose(1, 2).reshape([batch * length, -1])
    }
}

/// A backend whose operations LibTorch records.
pub(super) trait TorchOps: Backend {
    /// The output with LibTorch's graph.
    fn record(function: &Function, inputs: Vec<FloatTensor<Self>>, constants: Constants<Self>) -> Recorded<Self>;

    /// The output, out of LibTorch's graph.
    fn detached(recorded: &Recorded<Self>) -> FloatTensor<Self>;

    /// Gradients of the inputs.
    fn differentiate(recorded: Recorded<Self>, grad: FloatTensor<Self>) -> Vec<FloatTensor<Self>>;
}

/// Tensors that have no gradients: integers come first.
#[derive(Debug, Clone)]
pub(super) struct Constants<B: Backend> {
    integers: Vec<IntTensor<B>>,
    numbers: Vec<FloatTensor<B>>,
}

/// Inputs and output of an operation, with LibTorch's graph between them.
#[derive(Debug, Clone)]
pub(super) struct Recorded<B: Backend> {
    inputs: Vec<FloatTensor<B>>,
    output: FloatTensor<B>,
}

impl TorchOps for LibTorch {
    fn record(function: &Function, inputs: Vec<TchTensor>, constants: Constants<Self>) -> Recorded<Self> {
        let leaves: Vec<_> = inputs.iter().map(|input| input.tensor.detach().set_requires_grad(true)).collect();
        let constants: Vec<_> =
            constants.integers.into_iter().chain(constants.numbers).map(|constant| constant.tensor).collect();
        let output = TchTensor::new(tch::with_grad(|| function.apply(&leaves, &constants)));
        // With the storage that Burn counts the users of: it must not write over what LibTorch's graph needs.
        let storages = inputs.into_iter().map(|input| input.storage);
        let inputs = leaves.into_iter().zip(storages);
        Recorded { inputs: inputs.map(|(leaf, storage)| TchTensor::from_existing(leaf, storage)).collect(), output }
    }

    fn detached(recorded: &Recorded<Self>) -> TchTensor {
        TchTensor::from_existing(recorded.output.tensor.detach(), recorded.output.storage.clone())
    }

    fn differentiate(recorded: Recorded<Self>, grad: TchTensor) -> Vec<TchTensor> {
        let Recorded { inputs, output } = recorded;
        // tch takes no gradient of an output: that of this product is `grad` times 1.
        let sum = tch::with_grad(|| output.tensor.flatten(0, -1).dot(&grad.tensor.flatten(0, -1)));
        let leaves: Vec<_> = inputs.into_iter().map(|input| input.tensor).collect();
        tch::Tensor::run_backward(&[sum], &leaves, false, false).into_iter().map(TchTensor::new).collect()
    }
}

impl FusedOps for LibTorch {
    fn fused_attention(
        query: TchTensor,
        key: TchTensor,
        value: TchTensor,
        cos: TchTensor,
        sin: TchTensor,
        shape: AttentionShape,
    ) -> TchTensor {
        let inputs = [query, key, value].map(|input| input.tensor);
        let output = tch::no_grad(|| Function::Attention(shape).apply(&inputs, &[cos.tensor, sin.tensor]));
        TchTensor::new(output)
    }

    fn fused_rms_norm(x: TchTensor, weight: TchTensor, epsilon: f64) -> TchTensor {
        TchTensor::new(tch::no_grad(|| Function::RmsNorm { epsilon }.apply(&[x.tensor, weight.tensor], &[])))
    }

    fn fused_next_token_loss(logits: TchTensor, targets: TchTensor, weights: TchTensor) -> TchTensor {
        let constants = [targets.tensor, weights.tensor];
        TchTensor::new(tch::no_grad(|| Function::NextTokenLoss.apply(&[logits.tensor], &constants)))
    }
}

#[derive(Debug)]
struct TorchBackward;

impl<B: TorchOps, const N: usize> Backward<B, N> for TorchBackward {
    type State = Recorded<B>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        for (node, gradient) in ops.parents.into_iter().zip(B::differentiate(ops.state, grad)) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

/// Runs a function with autodiff.
macro_rules! differentiable {
    ($inputs:expr, $constants:expr, $function:expr) => {{
        let inputs = $inputs;
        let nodes = inputs.each_ref().map(|input| input.node());
        let inputs = inputs.into_iter().map(|input| input.into_primitive()).collect();
        let recorded = B::record(&$function, inputs, $constants);
        let output = B::detached(&recorded);
        match TorchBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(recorded, output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }};
}

impl<B: TorchOps, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn fused_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let numbers = vec![cos.into_primitive(), sin.into_primitive()];
        let constants = Constants { integers: Vec::new(), numbers };
        differentiable!([query, key, value], constants, Function::Attention(shape))
    }

    fn fused_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let constants = Constants { integers: Vec::new(), numbers: Vec::new() };
        differentiable!([x, weight], constants, Function::RmsNorm { epsilon })
    }

    fn fused_next_token_loss(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let constants = Constants { integers: vec![targets], numbers: vec![weights.into_primitive()] };
        differentiable!([logits], constants, Function::NextTokenLoss)
    }
}
