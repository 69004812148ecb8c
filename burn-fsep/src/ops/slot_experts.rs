//! The experts on any backend, slot by slot.

use std::ops::Range;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Shape, Slice},
};

use super::types::{ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput};

/// Forward; keeps the activations before SwiGLU of each slot that has tokens, `[m, 2F]`.
pub(super) fn forward<B: Backend>(
    tokens: &FloatTensor<B>,
    weights: &ExpertWeights<B>,
    slot_rows: &[Range<usize>],
) -> ExpertsOutput<B> {
    let mut outputs = Vec::with_capacity(slot_rows.len());
    let mut kept = Vec::with_capacity(slot_rows.len());
    for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let gate_up = B::float_matmul(rows_of::<B>(tokens, rows), B::float_transpose(weights.gate_up(slot)));
        let hidden = swiglu::<B>(gate_up.clone());
        outputs.push(B::float_matmul(hidden, B::float_transpose(weights.down(slot))));
        kept.push(gate_up);
    }
    ExpertsOutput { output: cat_rows::<B>(outputs, tokens), kept }
}

/// Backward.
pub(super) fn backward<B: Backend>(
    args: ExpertsBackward<B>,
    weights: &ExpertWeights<B>,
    slot_rows: &[Range<usize>],
) -> ExpertsGradients<B> {
    let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
    let mut kept = kept.map(Vec::into_iter);
    let mut d_tokens = Vec::new();
    // Flat gradients by row of the weights.
    let mut d_weights: Vec<(usize, Vec<FloatTensor<B>>)> = Vec::new();
    let [_, width] = weights.flat.shape().dims();
    let zeros = |len: usize| B::float_zeros(Shape::new([len]), &weights.flat.device(), weights.flat.dtype().into());
    for (slot, rows) in slot_rows.iter().enumerate() {
        let row = weights.rows[slot];
        if rows.is_empty() {
            if want_weights {
                d_weights.push((row, vec![zeros(width)]));
            }
            continue;
        }
        let x = rows_of::<B>(&tokens, rows);
        let dy = rows_of::<B>(&grad, rows);
        let activations = kept
            .as_mut()
            .and_then(Iterator::next)
            .unwrap_or_else(|| B::float_matmul(x.clone(), B::float_transpose(weights.gate_up(slot))));
        let d_hidden = B::float_matmul(dy.clone(), weights.down(slot));
        let (d_gate_up, hidden) = swiglu_backward::<B>(activations, d_hidden);
        if want_weights {
            let mut parts = vec![
                flat::<B>(B::float_matmul(B::float_transpose(d_gate_up.clone()), x)),
                flat::<B>(B::float_matmul(B::float_transpose(dy), hidden)),
            ];
            let padding = width - weights.shape.num_params();
            parts.extend((padding > 0).then(|| zeros(padding)));
            d_weights.push((row, parts));
        }
        if want_tokens {
            d_tokens.push(B::float_matmul(d_gate_up, weights.gate_up(slot)));
        }
    }
    d_weights.sort_by_key(|(row, _)| *row);
    ExpertsGradients {
        tokens: want_tokens.then(|| cat_rows::<B>(d_tokens, &tokens)),
        weights: want_weights.then(|| {
            let rows = d_weights.len();
            let parts = d_weights.into_iter().flat_map(|(_, parts)| parts).collect();
            B::float_reshape(B::float_cat(parts, 0), Shape::new([rows, width]))
        }),
    }
}

fn flat<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let len = tensor.shape().num_elements();
    B::float_reshape(tensor, Shape::new([len]))
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

/// `silu(gate) * up`. `[M, 2F] -> [M, F]`, gate in the first `F` columns.
fn swiglu<B: Backend>(gate_up: FloatTensor<B>) -> FloatTensor<B> {
    let (gate, up) = halves::<B>(gate_up);
    let silu = B::float_mul(gate.clone(), B::sigmoid(gate));
    B::float_mul(silu, up)
}

/// Backward of [`swiglu`]: the gradient of `gate_up` and, since backward needs it once more, the output.
/// `([M, 2F], [M, F]) -> ([M, 2F], [M, F])`
fn swiglu_backward<B: Backend>(gate_up: FloatTensor<B>, grad: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let (gate, up) = halves::<B>(gate_up);
    let sigmoid = B::sigmoid(gate.clone());
    let silu = B::float_mul(gate.clone(), sigmoid.clone());
    let output = B::float_mul(silu.clone(), up.clone());
    // d silu = sigmoid + silu * (1 - sigmoid)
    let rest = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1.0.into());
    let d_silu = B::float_add(sigmoid, B::float_mul(silu.clone(), rest));
    let d_gate = B::float_mul(B::float_mul(grad.clone(), up), d_silu);
    let d_up = B::float_mul(grad, silu);
    (B::float_cat(vec![d_gate, d_up], 1), output)
}

fn halves<B: Backend>(gate_up: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [rows, width] = gate_up.shape().dims();
    let half = |start: usize| [Slice::from(0..rows), Slice::from(start..start + width / 2)];
    (B::float_slice(gate_up.clone(), &half(0)), B::float_slice(gate_up, &half(width / 2)))
}
