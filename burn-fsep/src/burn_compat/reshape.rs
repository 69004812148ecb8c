use burn::{
    backend::{Dispatch, ops::FloatTensorOps},
    tensor::{Shape, Tensor},
};

/// The same elements in another shape, also if there are none: a size 0 is a size.
///
/// Relied on: to `Tensor::reshape` a 0 means the source's size at that place; to the backends' `float_reshape` it means 0.
///
/// # Panics
///
/// If the shapes do not have equally many elements.
pub(crate) fn reshape<const R: usize, const D: usize>(tensor: Tensor<R>, dims: [usize; D]) -> Tensor<D> {
    if !dims.contains(&0) {
        return tensor.reshape(dims);
    }
    assert_eq!(tensor.shape().num_elements(), 0, "elements of {:?} do not fit into {dims:?}", tensor.dims());
    Tensor::from_dispatch(Dispatch::float_reshape(tensor.into_dispatch(), Shape::from(dims)))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn a_size_of_0_is_a_size() {
        let device = Device::flex().autodiff();
        let tensor = |dims: [usize; 3]| Tensor::<3>::ones(dims, &device).require_grad();
        for dims in [[2, 0, 4], [0, 2, 4], [2, 3, 0], [0, 0, 0]] {
            let x = tensor(dims);
            let rows = reshape(x.clone(), [dims[0] * dims[1], dims[2]]);
            assert_eq!(rows.dims(), [dims[0] * dims[1], dims[2]]);
            let back = reshape::<2, 3>(rows, dims);
            assert_eq!(back.dims(), dims);
            assert_eq!(reshape::<3, 5>(back.clone(), [7, 0, 0, 5, 9]).dims(), [7, 0, 0, 5, 9]);
            let grads = back.sum().backward();
            assert_eq!(x.grad(&grads).unwrap().dims(), dims);
        }
        assert_eq!(reshape::<3, 2>(tensor([2, 3, 4]), [6, 4]).dims(), [6, 4]);
    }

    #[test]
    fn burn_takes_it_for_as_it_is() {
        let tensor = Tensor::<2>::ones([6, 2], &Device::flex());
        assert_eq!(tensor.reshape([0, 2]).dims(), [6, 2], "`reshape` is not needed any more");
    }
}
