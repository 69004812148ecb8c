//! Products of whole matrices by cuBLAS.

use burn::{
    backend::{CubeDevice, ops::FloatTensorOps},
    tensor::{DType, Shape},
};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::{
    super::super::Transposed,
    blas::{self, Matrix, Product},
    empty,
    stream::{gpu_of, on_stream},
};
use crate::FsepError;

/// Whether products of these types on this device are computed here.
pub(in super::super) fn multiplies(device: &CubeDevice, [left, right]: [DType; 2]) -> bool {
    left == right && gpu_of(device).is_some() && blas::computes(left)
}

/// As [`fsep_multiply`](super::super::super::FsepKernels::fsep_multiply); both matrices are of a type that [`multiplies`] takes.
///
/// # Errors
///
/// [`FsepError::Shape`] if one has not as many columns as the other has rows, [`FsepError::Device`] if cuBLAS refuses.
pub(in super::super) fn multiply(
    left: CubeTensor,
    right: CubeTensor,
    transposed: Transposed,
) -> Result<CubeTensor, FsepError> {
    let gpu = gpu_of(&left.device).ok_or_else(|| FsepError::Device(format!("cuBLAS reaches no {:?}", left.device)))?;
    let (left, right) = (into_contiguous(left), into_contiguous(right));
    let [left_dims, right_dims]: [[usize; 2]; 2] = [&left, &right].map(|tensor| tensor.meta.shape().dims());
    let [transpose_left, transpose_right] = [transposed == Transposed::Left, transposed == Transposed::Right];
    let in_order = |[rows, columns]: [usize; 2], transpose| if transpose { [columns, rows] } else { [rows, columns] };
    let ([rows, inner], [right_rows, columns]) =
        (in_order(left_dims, transpose_left), in_order(right_dims, transpose_right));
    if inner != right_rows {
        return Err(FsepError::Shape {
            what: "rows of the right factor of a product".into(),
            expected: inner.to_string(),
            actual: right_rows.to_string(),
        });
    }
    if inner == 0 {
        // The gradient of a matrix on a rank without tokens.
        return Ok(CubeBackend::float_zeros(Shape::new([rows, columns]), &left.device, left.dtype.into()));
    }
    let output = empty(&left, [rows, columns]);
    if rows * columns == 0 {
        return Ok(output);
    }
    let dtype = left.dtype;
    on_stream(&[&left, &right, &output], |stream, addresses| {
        let matrix =
            |i: usize, [rows, columns]: [usize; 2]| Matrix { address: addresses[i], rows, columns, stride: columns };
        let product = Product {
            left: matrix(0, left_dims),
            transpose_left,
            right: matrix(1, right_dims),
            transpose_right,
            output: matrix(2, [rows, columns]),
            accumulate: false,
        };
        // SAFETY: the context is current, and the matrices are contiguous tensors of this type on this GPU.
        unsafe { blas::multiply(gpu, stream, &[product], dtype) }
    })?;
    Ok(output)
}
