//! Combining the experts' outputs: each pass reads and writes every row once, and sums in single precision.

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

use super::vector_size;

/// Units of a cube that sums one row.
const ROW_UNITS: u32 = 64;

/// The sum over a token's rows, weighted if there are weights. `([R, D], [T * K], [T, K]) -> [T, D]`
///
/// # Safety
///
/// `row_of` names rows of `rows`.
pub(super) unsafe fn sum_rows(
    rows: CubeTensor,
    row_of: CubeTensor,
    probs: Option<CubeTensor>,
    topk: usize,
) -> CubeTensor {
    let (rows, row_of) = (into_contiguous(rows), into_contiguous(row_of));
    let [_, width] = rows.meta.shape().dims();
    let output = empty(&rows, [row_of.meta.num_elements() / topk, width], rows.dtype);
    let elements = output.meta.num_elements();
    if elements == 0 {
        return output;
    }
    let vector_size = vector_size(&output, width);
    let units = elements / vector_size;
    let (client, weighted, dtypes) = (rows.client.clone(), probs.is_some(), [rows.dtype, row_of.dtype]);
    // Nothing is read of it.
    let probs = probs.map_or_else(|| rows.clone(), into_contiguous);
    let dim = CubeDim::new(&client, units);
    let elems = [dtypes[0], probs.dtype, dtypes[1]].map(dtype_to_elem_type);
    // SAFETY: units beyond the output return, `row_of` has `T * K` indices of rows, and there are as many weights.
    unsafe {
        sum_rows_kernel::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, units, dim),
            dim,
            rows.required_address_type(),
            vector_size,
            rows.into_tensor_arg(),
            row_of.into_tensor_arg(),
            probs.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            topk as u32,
            weighted,
            elems,
        );
    }
    output
}

/// Each row's share of its token's gradient. `([T, D], [T * K], [T, K]) -> [T * K, D]`
///
/// # Safety
///
/// `assignment_of` is a permutation of the assignments.
pub(super) unsafe fn spread_rows(grad: CubeTensor, assignment_of: CubeTensor, probs: CubeTensor) -> CubeTensor {
    let (grad, assignment_of, probs) = (into_contiguous(grad), into_contiguous(assignment_of), into_contiguous(probs));
    let [_, topk] = probs.meta.shape().dims();
    let [_, width] = grad.meta.shape().dims();
    let output = empty(&grad, [assignment_of.meta.num_elements(), width], grad.dtype);
    let elements = output.meta.num_elements();
    if elements == 0 {
        return output;
    }
    let vector_size = vector_size(&output, width);
    let units = elements / vector_size;
    let client = grad.client.clone();
    let dim = CubeDim::new(&client, units);
    let elems = [grad.dtype, probs.dtype, assignment_of.dtype].map(dtype_to_elem_type);
    // SAFETY: units beyond the output return, and `assignment_of` has assignments: each has a weight and a token.
    unsafe {
        spread_rows_kernel::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, units, dim),
            dim,
            output.required_address_type(),
            vector_size,
            grad.into_tensor_arg(),
            assignment_of.into_tensor_arg(),
            probs.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            topk as u32,
            elems,
        );
    }
    output
}

/// The gradient of the weights: products of each assignment's row and its token's gradient.
/// `([T, D], [T * K, D], [T * K]) -> [T, K]`, of type `dtype`
///
/// # Safety
///
/// `row_of` names rows of `rows`.
pub(super) unsafe fn dot_rows(
    grad: CubeTensor,
    rows: CubeTensor,
    row_of: CubeTensor,
    topk: usize,
    dtype: DType,
) -> CubeTensor {
    let (grad, rows, row_of) = (into_contiguous(grad), into_contiguous(rows), into_contiguous(row_of));
    let [tokens, width] = grad.meta.shape().dims();
    let assignments = row_of.meta.num_elements();
    let output = empty(&grad, [tokens, topk], dtype);
    if assignments == 0 {
        return output;
    }
    let vector_size = vector_size(&rows, width);
    let client = grad.client.clone();
    let elems = [grad.dtype, dtype, row_of.dtype].map(dtype_to_elem_type);
    // SAFETY: cubes beyond the assignments return, and `row_of` has indices of rows.
    unsafe {
        dot_rows_kernel::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, assignments, CubeDim::new_1d(1)),
            CubeDim::new_1d(ROW_UNITS),
            rows.required_address_type(),
            vector_size,
            grad.into_tensor_arg(),
            rows.into_tensor_arg(),
            row_of.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            topk as u32,
            ROW_UNITS,
            elems,
        );
    }
    output
}

fn empty(like: &CubeTensor, dims: [usize; 2], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), Shape::new(dims), dtype)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_rows_kernel<E: Float, N: Size, P: Float, I: Int>(
    rows: &Tensor<Vector<E, N>>,
    row_of: &Tensor<I>,
    probs: &Tensor<P>,
    output: &mut Tensor<Vector<E, N>>,
    topk: u32,
    #[comptime] weighted: bool,
    #[define(E, P, I)] _dtypes: [ElemType; 3],
) {
    let i = ABSOLUTE_POS;
    if i >= output.len() {
        terminate!();
    }
    let width = output.shape(1) / N::value();
    let first = i / width * topk as usize;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for k in 0..topk as usize {
        let row = usize::cast_from(row_of[first + k]);
        let value = Vector::<f32, N>::cast_from(rows[row * width + i % width]);
        if comptime!(weighted) {
            sum += value * Vector::<f32, N>::new(f32::cast_from(probs[first + k]));
        } else {
            sum += value;
        }
    }
    output[i] = Vector::cast_from(sum);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn spread_rows_kernel<E: Float, N: Size, P: Float, I: Int>(
    grad: &Tensor<Vector<E, N>>,
    assignment_of: &Tensor<I>,
    probs: &Tensor<P>,
    output: &mut Tensor<Vector<E, N>>,
    topk: u32,
    #[define(E, P, I)] _dtypes: [ElemType; 3],
) {
    let i = ABSOLUTE_POS;
    if i >= output.len() {
        terminate!();
    }
    let width = output.shape(1) / N::value();
    let assignment = usize::cast_from(assignment_of[i / width]);
    let token = assignment / topk as usize;
    let grad = Vector::<f32, N>::cast_from(grad[token * width + i % width]);
    output[i] = Vector::cast_from(grad * Vector::<f32, N>::new(f32::cast_from(probs[assignment])));
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn dot_rows_kernel<E: Float, N: Size, P: Float, I: Int>(
    grad: &Tensor<Vector<E, N>>,
    rows: &Tensor<Vector<E, N>>,
    row_of: &Tensor<I>,
    output: &mut Tensor<P>,
    topk: u32,
    #[comptime] units: u32,
    #[define(E, P, I)] _dtypes: [ElemType; 3],
) {
    let assignment = CUBE_POS;
    if assignment >= output.len() {
        terminate!();
    }
    let width = grad.shape(1) / N::value();
    let (from_grad, from_rows) = (assignment / topk as usize * width, usize::cast_from(row_of[assignment]) * width);
    let mut sums = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let unit = UNIT_POS_X as usize;
    let mut sum = 0.0f32;
    let mut d = unit;
    while d < width {
        let (grads, values) = (grad[from_grad + d], rows[from_rows + d]);
        #[unroll]
        for k in 0..N::value() {
            sum += f32::cast_from(grads.extract(k)) * f32::cast_from(values.extract(k));
        }
        d += comptime!(units as usize);
    }
    sums[unit] = sum;
    sync_cube();
    // In halves: always in the same order.
    let mut half = (units / 2).runtime() as usize;
    while half > 0 {
        if unit < half {
            sums[unit] += sums[unit + half];
        }
        sync_cube();
        half /= 2;
    }
    if unit == 0 {
        output[assignment] = P::cast_from(sums[0]);
    }
}
