//! Combining the experts' outputs, on any backend.

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::Shape,
};

use super::types::{CombineGradients, RowIndices};

/// `([T * K, D], [T * K], [T, K]) -> [T, D]`
pub(super) fn forward<B: Backend>(
    rows: &FloatTensor<B>,
    row_of: &IntTensor<B>,
    probs: &FloatTensor<B>,
) -> FloatTensor<B> {
    let [num_tokens, topk] = probs.shape().dims();
    let outputs = by_assignment::<B>(rows, row_of, topk);
    let weighted = B::float_mul(outputs, B::float_reshape(probs.clone(), Shape::new([num_tokens, topk, 1])));
    sum_of_tokens::<B>(weighted)
}

/// `([T, D], [T * K, D], [T * K], [T, K]) -> ([T * K, D], [T, K])`
pub(super) fn backward<B: Backend>(
    grad: &FloatTensor<B>,
    rows: Option<&FloatTensor<B>>,
    indices: &RowIndices<B>,
    probs: &FloatTensor<B>,
    want_rows: bool,
) -> CombineGradients<B> {
    let [num_tokens, topk] = probs.shape().dims();
    let width = grad.shape()[1];
    let grad = B::float_reshape(grad.clone(), Shape::new([num_tokens, 1, width]));
    let d_probs = rows.map(|rows| {
        let products = B::float_mul(by_assignment::<B>(rows, &indices.row_of, topk), grad.clone());
        B::float_reshape(B::float_sum_dim(products, 2), Shape::new([num_tokens, topk]))
    });
    let d_rows = want_rows.then(|| {
        let scaled = B::float_mul(grad, B::float_reshape(probs.clone(), Shape::new([num_tokens, topk, 1])));
        let scaled = B::float_reshape(scaled, Shape::new([num_tokens * topk, width]));
        B::float_select(scaled, 0, indices.assignment_of.clone())
    });
    CombineGradients { rows: d_rows, probs: d_probs }
}

/// `([T * K, D], [T * K]) -> [T, D]`
pub(super) fn sum_rows<B: Backend>(rows: &FloatTensor<B>, row_of: &IntTensor<B>, topk: usize) -> FloatTensor<B> {
    sum_of_tokens::<B>(by_assignment::<B>(rows, row_of, topk))
}

/// `[T * K, D] -> [T, K, D]`
fn by_assignment<B: Backend>(rows: &FloatTensor<B>, row_of: &IntTensor<B>, topk: usize) -> FloatTensor<B> {
    let [assignments, width] = rows.shape().dims();
    let selected = B::float_select(rows.clone(), 0, row_of.clone());
    B::float_reshape(selected, Shape::new([assignments / topk, topk, width]))
}

/// `[T, K, D] -> [T, D]`
fn sum_of_tokens<B: Backend>(by_assignment: FloatTensor<B>) -> FloatTensor<B> {
    let [num_tokens, _, width] = by_assignment.shape().dims();
    B::float_reshape(B::float_sum_dim(by_assignment, 1), Shape::new([num_tokens, width]))
}
