//! The experts on any backend, slot by slot.

use std::ops::Range;

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{Shape, Slice},
};

use super::{
    ExpertActivation, FsepKernels,
    types::{ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, UnfinishedGradients},
};

/// Forward; keeps what the first projection of each slot that has tokens gives, `[m, 2F or F]`.
pub(super) fn forward<B: FsepKernels>(
    tokens: &FloatTensor<B>,
    weights: &ExpertWeights<B>,
    activation: ExpertActivation,
    slot_rows: &[Range<usize>],
) -> ExpertsOutput<B> {
    let mut outputs = Vec::with_capacity(slot_rows.len());
    let mut kept = Vec::with_capacity(slot_rows.len());
    for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let first = first_projection::<B>(rows_of::<B>(tokens, rows), weights, slot);
        let hidden = B::fsep_activate(activation, first.clone());
        let output = B::float_matmul(hidden, B::float_transpose(weights.down(slot)));
        outputs.push(match weights.biases(slot) {
            Some([_, bias]) => B::float_add(output, bias),
            None => output,
        });
        kept.push(first);
    }
    ExpertsOutput { output: cat_rows::<B>(outputs, tokens), kept }
}

/// Backward. Of the weights' gradients what needs the output's: of each slot that has tokens the second projection's matrix and,
/// if there are biases, its bias.
pub(super) fn backward<B: FsepKernels>(
    args: ExpertsBackward<B>,
    weights: &ExpertWeights<B>,
    activation: ExpertActivation,
    slot_rows: &[Range<usize>],
) -> ExpertsGradients<B> {
    let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
    let mut kept = kept.map(Vec::into_iter);
    let (mut d_tokens, mut finished, mut first) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let dy = rows_of::<B>(&grad, rows);
        let activations = kept
            .as_mut()
            .and_then(Iterator::next)
            .unwrap_or_else(|| first_projection::<B>(rows_of::<B>(&tokens, rows), weights, slot));
        let d_hidden = B::float_matmul(dy.clone(), weights.down(slot));
        let (d_first, hidden) = B::fsep_activate_backward(activation, activations, d_hidden);
        if want_weights {
            finished.push(flat::<B>(B::float_matmul(B::float_transpose(dy.clone()), hidden)));
            finished.extend(weights.shape.bias.then(|| flat::<B>(B::float_sum_dim(dy, 0))));
            first.push(d_first.clone());
        }
        if want_tokens {
            d_tokens.push(B::float_matmul(d_first, weights.gate_up(slot)));
        }
    }
    ExpertsGradients {
        tokens: want_tokens.then(|| cat_rows::<B>(d_tokens, &tokens)),
        weights: want_weights.then_some(UnfinishedGradients { finished, first, tokens }),
    }
}

/// The rest of backward: the first projection's gradients, and all of them in their places.
pub(super) fn finish<B: FsepKernels>(
    unfinished: UnfinishedGradients<B>,
    weights: &ExpertWeights<B>,
    slot_rows: &[Range<usize>],
) -> FloatTensor<B> {
    let UnfinishedGradients { finished, first, tokens } = unfinished;
    let (mut finished, mut first) = (finished.into_iter(), first.into_iter());
    let [_, width] = weights.flat.shape().dims();
    let zeros = |len: usize| B::float_zeros(Shape::new([len]), &weights.flat.device(), weights.flat.dtype().into());
    let padding = width - weights.shape.num_params();
    let of_slot = |(slot, rows): (usize, &Range<usize>)| {
        let d_first = if rows.is_empty() { None } else { first.next() };
        let parts = match d_first {
            None => vec![zeros(width)],
            Some(d_first) => {
                let bias = weights.shape.bias.then(|| flat::<B>(B::float_sum_dim(d_first.clone(), 0)));
                let x = rows_of::<B>(&tokens, rows);
                let mut parts = vec![flat::<B>(B::float_matmul(B::float_transpose(d_first), x))];
                parts.extend(finished.next());
                if bias.is_some() {
                    parts.extend(bias.into_iter().chain(finished.next()));
                }
                parts.extend((padding > 0).then(|| zeros(padding)));
                parts
            }
        };
        (weights.rows[slot], parts)
    };
    let mut gradients: Vec<_> = slot_rows.iter().enumerate().map(of_slot).collect();
    gradients.sort_by_key(|(row, _)| *row);
    let rows = gradients.len();
    let parts = gradients.into_iter().flat_map(|(_, parts)| parts).collect();
    B::float_reshape(B::float_cat(parts, 0), Shape::new([rows, width]))
}

/// `[m, D] -> [m, 2F or F]`
fn first_projection<B: Backend>(x: FloatTensor<B>, weights: &ExpertWeights<B>, slot: usize) -> FloatTensor<B> {
    let product = B::float_matmul(x, B::float_transpose(weights.gate_up(slot)));
    match weights.biases(slot) {
        Some([bias, _]) => B::float_add(product, bias),
        None => product,
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
