use burn::backend::{Backend, tensor::FloatTensor};

/// Which factor of a product is taken transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transposed {
    /// `left * right`
    Neither,
    /// `left^T * right`
    Left,
    /// `left * right^T`
    Right,
}

/// What a backend without products of its own computes: Burn's.
pub(super) fn multiply<B: Backend>(
    left: FloatTensor<B>,
    right: FloatTensor<B>,
    transposed: Transposed,
) -> FloatTensor<B> {
    match transposed {
        Transposed::Neither => B::float_matmul(left, right),
        Transposed::Left => B::float_matmul(B::float_transpose(left), right),
        Transposed::Right => B::float_matmul(left, B::float_transpose(right)),
    }
}
