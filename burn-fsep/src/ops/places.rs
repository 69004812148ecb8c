//! Rows that stand for up to `K` others each, by their places among them, on any backend. A place below 0 is none.

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{BoolTensor, FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType, IndexingUpdateOp, Shape},
};

use super::{
    row_order::{arange, bool_dtype},
    types::{CombineGradients, cast},
};

/// `([R, D], [U * K], [U, K]) -> [U, D]`
pub(super) fn sum<B: Backend>(
    rows: &FloatTensor<B>,
    places: &IntTensor<B>,
    weights: Option<&FloatTensor<B>>,
    topk: usize,
) -> FloatTensor<B> {
    let ([num_rows, width], sums) = (rows.shape().dims(), places.shape()[0] / topk);
    let dtype = rows.dtype();
    if num_rows == 0 || sums == 0 {
        return B::float_zeros(Shape::new([sums, width]), &rows.device(), dtype.into());
    }
    let selected = selected::<B>(rows, places);
    let weighted = match weights {
        None => selected,
        Some(weights) => {
            let weights = B::float_reshape(weights.clone(), Shape::new([sums * topk, 1]));
            let (wide, weights) = (cast::<B>(selected, Some(wide(dtype))), cast::<B>(weights, Some(wide(dtype))));
            B::float_mul(wide, weights)
        }
    };
    // Only now: what stands in the first row may be no number.
    let dims = Shape::new([sums * topk, width]);
    let is_none = B::bool_expand(B::bool_reshape(is_none::<B>(places), Shape::new([sums * topk, 1])), dims);
    let weighted = B::float_mask_fill(weighted, is_none, 0.0.into());
    let by_row = cast::<B>(B::float_reshape(weighted, Shape::new([sums, topk, width])), Some(wide(dtype)));
    let sums = B::float_reshape(B::float_sum_dim(by_row, 1), Shape::new([sums, width]));
    cast::<B>(sums, Some(dtype.into()))
}

/// `([U, D], [R, D], [U * K], [U, K]) -> ([R, D], [U, K])`
pub(super) fn spread<B: Backend>(
    rows: &FloatTensor<B>,
    outputs: Option<&FloatTensor<B>>,
    places: &IntTensor<B>,
    weights: Option<&FloatTensor<B>>,
    [num_rows, topk]: [usize; 2],
    want_rows: bool,
) -> CombineGradients<B> {
    let [sources, width] = rows.shape().dims();
    let (device, dtype) = (rows.device(), rows.dtype());
    if sources == 0 || num_rows == 0 {
        let zeros = |dims: [usize; 2], dtype: DType| B::float_zeros(Shape::new(dims), &device, dtype.into());
        return CombineGradients {
            rows: want_rows.then(|| zeros([num_rows, width], dtype)),
            probs: outputs.map(|_| zeros([sources, topk], weights.map_or(dtype, TensorMetadata::dtype))),
        };
    }
    // What stands at each place: the one of all `U * K` that names it. Nothing stands for those that are none: they meet in a
    // row behind the last.
    let nowhere = (num_rows as i64).into();
    let to = B::int_mask_fill(places.clone(), is_none::<B>(places), nowhere);
    let numbers = arange::<B>(sources * topk, places);
    let empty = B::int_zeros(Shape::new([num_rows + 1]), &device, places.dtype().into());
    let named = B::int_scatter(0, empty, to, numbers, IndexingUpdateOp::Add);
    let named = B::int_slice(named, &[(0..num_rows).into()]);
    let source_of = B::int_div_scalar(named.clone(), (topk as i64).into());
    let there = B::float_select(rows.clone(), 0, source_of);

    let d_weights = outputs.map(|outputs| {
        let products =
            B::float_mul(cast::<B>(outputs.clone(), Some(wide(dtype))), cast::<B>(there.clone(), Some(wide(dtype))));
        let dots = B::float_sum_dim(products, 1);
        let by_place = B::float_reshape(selected::<B>(&dots, places), Shape::new([sources * topk]));
        let by_place = B::float_mask_fill(by_place, is_none::<B>(places), 0.0.into());
        B::float_reshape(by_place, Shape::new([sources, topk]))
    });
    let spread = want_rows.then(|| match weights {
        None => there,
        Some(weights) => {
            let weights = B::float_reshape(weights.clone(), Shape::new([sources * topk]));
            let weights = B::float_reshape(B::float_select(weights, 0, named), Shape::new([num_rows, 1]));
            B::float_mul(there, cast::<B>(weights, Some(dtype.into())))
        }
    });
    CombineGradients { rows: spread, probs: d_weights }
}

/// The row at each place, the first one where there is none. `([R, D], [U * K]) -> [U * K, D]`
fn selected<B: Backend>(rows: &FloatTensor<B>, places: &IntTensor<B>) -> FloatTensor<B> {
    let places = B::int_mask_fill(places.clone(), is_none::<B>(places), 0.into());
    B::float_select(rows.clone(), 0, places)
}

fn is_none<B: Backend>(places: &IntTensor<B>) -> BoolTensor<B> {
    B::int_lower_elem(places.clone(), 0.into(), bool_dtype::<B>(&places.device()))
}

/// The type of sums.
fn wide(dtype: DType) -> FloatDType {
    if dtype == DType::F64 { FloatDType::F64 } else { FloatDType::F32 }
}
