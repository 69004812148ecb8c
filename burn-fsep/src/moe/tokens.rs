use burn::tensor::{DType, Tensor};

use crate::FsepError;

/// The tokens of an input as rows. `[.., D] -> [T, D]`
///
/// # Errors
///
/// [`FsepError::Shape`] for an input without tokens whose first size is not 0: Burn's `reshape` takes a 0 for "as it is".
pub(super) fn token_rows<const R: usize>(hidden: Tensor<R>) -> Result<Tensor<2>, FsepError> {
    let dims = hidden.dims();
    let tokens = dims[..R - 1].iter().product::<usize>();
    if tokens == 0 && dims[0] != 0 {
        return Err(FsepError::Shape {
            what: "input of the MoE layer without a token".into(),
            expected: format!("the first size 0, as [0, {}]", dims[R - 1]),
            actual: format!("{dims:?}"),
        });
    }
    Ok(hidden.reshape([tokens, dims[R - 1]]))
}

/// Whether the layer takes elements of this type.
pub(super) fn check_dtype(actual: DType, expected: DType) -> Result<(), FsepError> {
    if actual == expected {
        return Ok(());
    }
    Err(FsepError::Shape {
        what: "element type of the MoE layer's input".into(),
        expected: format!("{expected:?}, the layer's"),
        actual: format!("{actual:?}"),
    })
}
