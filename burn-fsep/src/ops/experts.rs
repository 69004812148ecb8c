use std::ops::Range;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Shape, Slice},
};

use super::{
    FsepOps,
    weights::{RestoredWeights, SlotWeights},
};

/// The experts' forward pass over tokens grouped by slot.
pub(super) struct ExpertsOutput<B: Backend> {
    /// `[M, D]`
    pub output: FloatTensor<B>,
    /// Activations before SwiGLU by slot, `[m, 2F]` each; `None` for slots without tokens.
    pub gate_up: Vec<Option<FloatTensor<B>>>,
}

/// `down(silu(gate x) * up x)` of each slot on its rows. `[M, D] -> [M, D]`
pub(super) fn experts_forward<B: FsepOps>(
    tokens: &FloatTensor<B>,
    weights: &RestoredWeights<B>,
    slot_rows: &[Range<usize>],
) -> ExpertsOutput<B> {
    let mut outputs = Vec::with_capacity(slot_rows.len());
    let mut kept = Vec::with_capacity(slot_rows.len());
    for (slot, rows) in weights.slots.iter().zip(slot_rows) {
        if rows.is_empty() {
            kept.push(None);
            continue;
        }
        let gate_up = B::float_matmul(rows_of::<B>(tokens, rows), B::float_transpose(slot.gate_up.clone()));
        let hidden = B::fsep_swiglu(gate_up.clone());
        outputs.push(B::float_matmul(hidden, B::float_transpose(slot.down.clone())));
        kept.push(Some(gate_up));
    }
    ExpertsOutput { output: cat_rows::<B>(outputs, tokens), gate_up: kept }
}

/// Which gradients of the experts are wanted, and what they need.
pub(super) struct ExpertsBackward<'a, B: Backend> {
    /// Inputs, `[M, D]`.
    pub tokens: &'a FloatTensor<B>,
    /// Kept activations by slot; recomputed if there are none.
    pub gate_up: Option<Vec<Option<FloatTensor<B>>>>,
    /// Gradient of the output, `[M, D]`.
    pub grad: &'a FloatTensor<B>,
    pub want_tokens: bool,
    pub want_weights: bool,
}

/// Gradient of the tokens (`[M, D]`) and of the weights by slot.
pub(super) type ExpertsGradients<B> = (Option<FloatTensor<B>>, Option<Vec<SlotWeights<B>>>);

/// The experts' backward pass. Slots without tokens get zero gradients.
pub(super) fn experts_backward<B: FsepOps>(
    args: ExpertsBackward<'_, B>,
    weights: &RestoredWeights<B>,
    slot_rows: &[Range<usize>],
) -> ExpertsGradients<B> {
    let ExpertsBackward { tokens, mut gate_up, grad, want_tokens, want_weights } = args;
    let mut d_tokens = Vec::new();
    let mut d_weights = Vec::new();
    for (i, (slot, rows)) in weights.slots.iter().zip(slot_rows).enumerate() {
        if rows.is_empty() {
            if want_weights {
                d_weights
                    .push(SlotWeights { gate_up: zeros_like::<B>(&slot.gate_up), down: zeros_like::<B>(&slot.down) });
            }
            continue;
        }
        let x = rows_of::<B>(tokens, rows);
        let dy = rows_of::<B>(grad, rows);
        let activations = gate_up
            .as_mut()
            .and_then(|kept| kept[i].take())
            .unwrap_or_else(|| B::float_matmul(x.clone(), B::float_transpose(slot.gate_up.clone())));
        let d_hidden = B::float_matmul(dy.clone(), slot.down.clone());
        let (d_gate_up, hidden) = B::fsep_swiglu_backward(activations, d_hidden);
        if want_weights {
            d_weights.push(SlotWeights {
                gate_up: B::float_matmul(B::float_transpose(d_gate_up.clone()), x),
                down: B::float_matmul(B::float_transpose(dy), hidden),
            });
        }
        if want_tokens {
            d_tokens.push(B::float_matmul(d_gate_up, slot.gate_up.clone()));
        }
    }
    (want_tokens.then(|| cat_rows::<B>(d_tokens, tokens)), want_weights.then_some(d_weights))
}

fn rows_of<B: Backend>(tensor: &FloatTensor<B>, rows: &Range<usize>) -> FloatTensor<B> {
    let width = tensor.shape()[1];
    B::float_slice(tensor.clone(), &[Slice::from(rows.clone()), Slice::from(0..width)])
}

/// Concatenates the slots' rows; `like` gives device, type and width where no slot has any.
fn cat_rows<B: Backend>(mut parts: Vec<FloatTensor<B>>, like: &FloatTensor<B>) -> FloatTensor<B> {
    match parts.len() {
        0 => B::float_zeros(Shape::new([0, like.shape()[1]]), &like.device(), like.dtype().into()),
        1 => parts.swap_remove(0),
        _ => B::float_cat(parts, 0),
    }
}

fn zeros_like<B: Backend>(tensor: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_zeros(tensor.shape(), &tensor.device(), tensor.dtype().into())
}
