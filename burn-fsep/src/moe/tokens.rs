use burn::tensor::{DType, IndexingUpdateOp, Tensor};

use super::TokenMask;
use crate::{FsepError, burn_compat::reshape};

/// The tokens of an input as rows; with a mask the real ones. `[.., D] -> [T, D]`
///
/// # Errors
///
/// [`FsepError::Shape`] if the mask is one of another batch.
pub(super) fn token_rows<const R: usize>(hidden: Tensor<R>, mask: Option<&TokenMask>) -> Result<Tensor<2>, FsepError> {
    let dims = hidden.dims();
    let tokens = dims[..R - 1].iter().product::<usize>();
    let rows = reshape(hidden, [tokens, dims[R - 1]]);
    let Some(mask) = mask else { return Ok(rows) };
    if !mask.fits(&dims[..R - 1]) {
        return Err(FsepError::Shape {
            what: "mask of the MoE layer's tokens".into(),
            expected: format!("{tokens} tokens, as in the input {dims:?}"),
            actual: format!("{}, as a mask {:?}", mask.num_tokens(), mask.dims()),
        });
    }
    // Also where all are real: on every rank the same operations, so that backward comes to the layers in the same order.
    Ok(rows.select(0, mask.rows()))
}

/// Undoes [`token_rows`] for an input of the shape `dims`: rows that the mask leaves out are zeros. `[T, D] -> [.., D]`
pub(super) fn from_token_rows<const R: usize>(
    rows: Tensor<2>,
    dims: [usize; R],
    mask: Option<&TokenMask>,
) -> Tensor<R> {
    let rows = match mask {
        None => rows,
        Some(mask) => {
            let zeros = Tensor::zeros([mask.num_tokens(), dims[R - 1]], (&rows.device(), rows.dtype()));
            zeros.select_assign(0, mask.rows(), rows, IndexingUpdateOp::Add)
        }
    };
    reshape(rows, dims)
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

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn rows_of_no_token_have_any_shape() {
        let device = Device::flex().autodiff();
        let check = |dims: [usize; 4]| {
            let x = Tensor::<4>::zeros(dims, &device).require_grad();
            let rows = token_rows(x.clone(), None).unwrap();
            assert_eq!(rows.dims(), [0, 3]);
            let back = from_token_rows(rows, dims, None);
            assert_eq!(back.dims(), dims);
            let grads = back.sum().backward();
            assert_eq!(x.grad(&grads).unwrap().dims(), dims);
        };
        [[0, 2, 4, 3], [2, 0, 4, 3], [2, 4, 0, 3], [2, 0, 0, 3], [0, 0, 0, 3]].into_iter().for_each(check);
    }

    #[test]
    fn real_rows_are_gathered_and_put_back() {
        let device = Device::flex().autodiff();
        let data = TensorData::new((0..12).map(|i| i as f32).collect(), [2, 3, 2]);
        for real in [[true, false, true, true, false, false], [false; 6], [true; 6]] {
            let mask = TokenMask::from_tensor(Tensor::<2, burn::tensor::Bool>::from_data(
                TensorData::new(real.to_vec(), [2, 3]),
                &device,
            ));
            let mask = mask.unwrap();
            assert_eq!((mask.num_tokens(), mask.num_real()), (6, real.iter().filter(|&&real| real).count()));
            let x = Tensor::<3>::from_data(data.clone(), &device).require_grad();
            let rows = token_rows(x.clone(), Some(&mask)).unwrap();
            assert_eq!(rows.dims(), [mask.num_real(), 2]);
            let back = from_token_rows(rows * 2.0, [2, 3, 2], Some(&mask));
            let grads = back.clone().sum().backward();
            let (back, grad) = (back.into_data(), x.grad(&grads).unwrap().into_data());
            for (i, (back, grad)) in back.iter::<f32>().zip(grad.iter::<f32>()).enumerate() {
                let expected = if real[i / 2] { (2.0 * i as f32, 2.0) } else { (0.0, 0.0) };
                assert_eq!((back, grad), expected);
            }
        }
    }

    #[test]
    fn a_mask_of_another_batch_is_refused() {
        let mask = TokenMask::new(&[true; 5], &Device::flex());
        let error = token_rows(Tensor::<3>::zeros([2, 3, 2], &Device::flex()), Some(&mask)).unwrap_err();
        assert!(matches!(&error, FsepError::Shape { what, .. } if what.contains("mask")), "{error}");
        assert!(error.to_string().contains("expected 6 tokens, as in the input [2, 3, 2], got 5"), "{error}");
    }

    #[test]
    fn a_mask_is_of_the_batchs_shape_or_of_its_rows() {
        let device = Device::flex();
        let real = Tensor::<2, burn::tensor::Bool>::from_data(TensorData::new(vec![true; 6], [3, 2]), &device);
        let mask = TokenMask::from_tensor(real).unwrap();
        // Transposed: as many tokens, but others.
        let error = token_rows(Tensor::<3>::zeros([2, 3, 2], &device), Some(&mask)).unwrap_err().to_string();
        assert!(error.contains("6 tokens, as in the input [2, 3, 2], got 6, as a mask [3, 2]"), "{error}");
        assert!(token_rows(Tensor::<3>::zeros([3, 2, 2], &device), Some(&mask)).is_ok());
        assert!(token_rows(Tensor::<2>::zeros([6, 2], &device), Some(&mask)).is_ok());
        let rows = TokenMask::new(&[true; 6], &device);
        assert!(token_rows(Tensor::<3>::zeros([2, 3, 2], &device), Some(&rows)).is_ok());
    }
}
