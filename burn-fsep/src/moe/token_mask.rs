use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::FsepError;

/// Which tokens of a batch are real, and which are padding that MoE layers leave out: it takes no part in routing, losses,
/// statistics and planning, and no expert computes it.
///
/// Made once a batch and given to every layer, as the host looks at it only then.
#[derive(Debug, Clone)]
pub struct TokenMask {
    num_tokens: usize,
    /// Dimensions of the batch, `[T]` if they are not known.
    dims: Vec<usize>,
    /// Rows of the real tokens, ascending, without autodiff. `[real]`
    rows: Tensor<1, Int>,
}

impl TokenMask {
    /// The mask of tokens of which these are real. `real`: `[T]`, in the order of the batch's rows; `device`: the layers'.
    pub fn new(real: &[bool], device: &Device) -> Self {
        let rows: Vec<i32> = (0..real.len() as i32).filter(|&row| real[row as usize]).collect();
        let len = rows.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [len]), device).inner();
        Self { num_tokens: real.len(), dims: vec![real.len()], rows }
    }

    /// As [`TokenMask::new`], on the device of `real`, which has the shape of the batch: `[.., D]` without `D`. Layers refuse a batch of
    /// another shape, such as the transposed one; rows `[T, D]` of the batch they take.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if `real` cannot be read.
    pub fn from_tensor<const R: usize>(real: Tensor<R, Bool>) -> Result<Self, FsepError> {
        let (device, dims) = (real.device(), real.dims().to_vec());
        let data = real.try_into_data().map_err(|error| FsepError::Device(error.to_string()))?;
        Ok(Self { dims, ..Self::new(&data.iter::<bool>().collect::<Vec<_>>(), &device) })
    }

    /// Tokens `T`, real and padding.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Real tokens.
    pub fn num_real(&self) -> usize {
        self.rows.dims()[0]
    }

    /// Dimensions of the batch, `[T]` if they are not known.
    pub(super) fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Whether it is one of a batch with these dimensions, or of its rows.
    pub(super) fn fits(&self, dims: &[usize]) -> bool {
        let is_of_rows = dims.len() == 1 || self.dims.len() == 1;
        if is_of_rows { dims.iter().product::<usize>() == self.num_tokens } else { *dims == *self.dims }
    }

    /// Rows of the real tokens, ascending, without autodiff. `[real]`
    pub(super) fn rows(&self) -> Tensor<1, Int> {
        self.rows.clone()
    }
}
