//! The experts by cuBLAS: products read the flat parameters where they are and write to where their results belong.

use std::ops::Range;

use burn::{
    backend::{CubeDevice, ops::FloatTensorOps},
    tensor::{DType, Shape},
};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use cudarc::driver::result::memset_d8_async;

use super::{
    super::super::{
        ExpertActivation, FsepKernels,
        types::{ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, UnfinishedGradients},
    },
    blas::{self, Matrix, Product, driver_error},
    empty,
    stream::{gpu_of, on_stream},
};
use crate::{FsepError, shard::ExpertShape};

/// Whether experts on this device and of this type are computed here.
pub(in super::super) fn computes(device: &CubeDevice, dtype: DType) -> bool {
    gpu_of(device).is_some() && blas::computes(dtype)
}

/// One of an expert's two matrices, with its bias.
#[derive(Debug, Clone, Copy)]
enum Projection {
    /// Gate, if there is one, and up. `[2F or F, D]`
    First,
    /// `[D, F]`
    Down,
}

/// Experts and the rows of their tokens: what every group of products needs.
struct Slots<'a> {
    gpu: usize,
    dtype: DType,
    shape: &'a ExpertShape,
    /// The row of each slot's flat parameters.
    rows: &'a [usize],
    slot_rows: &'a [Range<usize>],
    /// As many ones as a slot has rows at most, if there are biases: a bias is added, and its gradient summed, by a product.
    ones: Option<CubeTensor>,
}

/// A group's matrix of which each slot has a part: rows of tokens, or flat parameters.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    address: u64,
    /// Distance of rows in elements.
    stride: usize,
}

impl<'a> Slots<'a> {
    fn new(
        tokens: &CubeTensor,
        weights: &'a ExpertWeights<CubeBackend>,
        slot_rows: &'a [Range<usize>],
    ) -> Result<Self, FsepError> {
        let gpu = gpu_of(&tokens.device)
            .ok_or_else(|| FsepError::Device(format!("cuBLAS reaches no {:?}", tokens.device)))?;
        if weights.flat.dtype != tokens.dtype {
            return Err(FsepError::Device(format!(
                "experts of type {:?} cannot compute tokens of type {:?}",
                weights.flat.dtype, tokens.dtype
            )));
        }
        let most = slot_rows.iter().map(Range::len).max().unwrap_or(0);
        let ones = (weights.shape.bias && most > 0)
            .then(|| CubeBackend::float_ones(Shape::new([most]), &tokens.device, tokens.dtype.into()));
        let Some(last) = slot_rows.last() else {
            return Err(FsepError::Device("a rank without slots".into()));
        };
        let fits = last.end <= tokens.meta.shape()[0]
            && slot_rows.len() == weights.rows.len()
            && weights.rows.iter().all(|&row| row < weights.flat.meta.shape()[0])
            && weights.shape.num_params() <= weights.flat.meta.shape()[1];
        if !fits {
            return Err(FsepError::Shape {
                what: "slots' rows and flat parameters of the experts".into(),
                expected: format!("at most {:?} and {:?}", tokens.meta.shape(), weights.flat.meta.shape()),
                actual: format!("{slot_rows:?} and {:?}", weights.rows),
            });
        }
        Ok(Self { gpu, dtype: tokens.dtype, shape: &weights.shape, rows: &weights.rows, slot_rows, ones })
    }

    /// Slots that have rows.
    fn used(&self) -> impl Iterator<Item = (usize, &Range<usize>)> {
        self.slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty())
    }

    /// Rows and columns of a projection's matrix.
    fn dims(&self, projection: Projection) -> [usize; 2] {
        match projection {
            Projection::First => [self.shape.first_width(), self.shape.hidden],
            Projection::Down => [self.shape.hidden, self.shape.ffn],
        }
    }

    fn address(&self, buffer: Buffer, element: usize) -> u64 {
        buffer.address + (element * self.dtype.size()) as u64
    }

    /// A slot's matrix in a buffer of flat parameters.
    fn matrix(&self, flat: Buffer, slot: usize, projection: Projection) -> Matrix {
        let [rows, columns] = self.dims(projection);
        let start = match projection {
            Projection::First => 0,
            Projection::Down => self.shape.gate_up_len(),
        };
        let address = self.address(flat, self.rows[slot] * flat.stride + start);
        Matrix { address, rows, columns, stride: columns }
    }

    /// A slot's bias in a buffer of flat parameters, as a row.
    fn bias(&self, flat: Buffer, slot: usize, projection: Projection) -> Matrix {
        let start = self.shape.bias_start()
            + match projection {
                Projection::First => 0,
                Projection::Down => self.shape.first_width(),
            };
        let [columns, _] = self.dims(projection);
        let address = self.address(flat, self.rows[slot] * flat.stride + start);
        Matrix { address, rows: 1, columns, stride: columns }
    }

    /// A slot's rows of a buffer of tokens.
    fn tokens(&self, buffer: Buffer, rows: &Range<usize>, columns: usize) -> Matrix {
        let address = self.address(buffer, rows.start * buffer.stride);
        Matrix { address, rows: rows.len(), columns, stride: buffer.stride }
    }

    /// `tokens * matrix^T + bias` of each slot. `[M, in] -> [M, out]`
    fn forward(&self, tokens: &CubeTensor, flat: &CubeTensor, projection: Projection) -> Result<CubeTensor, FsepError> {
        let [out_width, in_width] = self.dims(projection);
        let output = empty(tokens, [tokens.meta.shape()[0], out_width]);
        self.queue(&[tokens, flat, &output], |[tokens, flat, output], ones| {
            let products = self.used().map(|(slot, rows)| Product {
                left: self.tokens(tokens, rows, in_width),
                transpose_left: false,
                right: self.matrix(flat, slot, projection),
                transpose_right: true,
                output: self.tokens(output, rows, out_width),
                accumulate: ones.is_some(),
            });
            // A bias comes first, in a group of its own: a column of ones times the bias.
            let biases = ones.map(|ones| {
                let bias = |(slot, rows): (usize, &Range<usize>)| Product {
                    left: Matrix { address: ones.address, rows: rows.len(), columns: 1, stride: 1 },
                    transpose_left: false,
                    right: self.bias(flat, slot, projection),
                    transpose_right: false,
                    output: self.tokens(output, rows, out_width),
                    accumulate: false,
                };
                self.used().map(bias).collect()
            });
            [biases.unwrap_or_default(), products.collect()]
        })?;
        Ok(output)
    }

    /// `grads * matrix` of each slot. `[M, out] -> [M, in]`
    fn backward(&self, grads: &CubeTensor, flat: &CubeTensor, projection: Projection) -> Result<CubeTensor, FsepError> {
        let [out_width, in_width] = self.dims(projection);
        let output = empty(grads, [grads.meta.shape()[0], in_width]);
        self.queue(&[grads, flat, &output], |[grads, flat, output], _| {
            let products = self.used().map(|(slot, rows)| Product {
                left: self.tokens(grads, rows, out_width),
                transpose_left: false,
                right: self.matrix(flat, slot, projection),
                transpose_right: false,
                output: self.tokens(output, rows, in_width),
                accumulate: false,
            });
            [products.collect(), Vec::new()]
        })?;
        Ok(output)
    }

    /// `grads^T * tokens` of each slot, and the sum of its `grads`, to their places in `flat`.
    fn gradients(
        &self,
        grads: &CubeTensor,
        tokens: &CubeTensor,
        flat: &CubeTensor,
        projection: Projection,
    ) -> Result<(), FsepError> {
        let [out_width, in_width] = self.dims(projection);
        self.queue(&[grads, tokens, flat], |[grads, tokens, flat], ones| {
            let mut products: Vec<_> = self
                .used()
                .map(|(slot, rows)| Product {
                    left: self.tokens(grads, rows, out_width),
                    transpose_left: true,
                    right: self.tokens(tokens, rows, in_width),
                    transpose_right: false,
                    output: self.matrix(flat, slot, projection),
                    accumulate: false,
                })
                .collect();
            products.extend(ones.into_iter().flat_map(|ones| {
                self.used().map(move |(slot, rows)| Product {
                    left: Matrix { address: ones.address, rows: rows.len(), columns: 1, stride: 1 },
                    transpose_left: true,
                    right: self.tokens(grads, rows, out_width),
                    transpose_right: false,
                    output: self.bias(flat, slot, projection),
                    accumulate: false,
                })
            }));
            [products, Vec::new()]
        })
    }

    /// Queues two groups of products, one after the other, on three tensors, contiguous but for the distance of rows.
    fn queue(
        &self,
        tensors: &[&CubeTensor; 3],
        products: impl FnOnce([Buffer; 3], Option<Buffer>) -> [Vec<Product>; 2] + Send,
    ) -> Result<(), FsepError> {
        let all: Vec<&CubeTensor> = tensors.iter().copied().chain(&self.ones).collect();
        let strides = tensors.map(|tensor| tensor.meta.strides()[0]);
        on_stream(&all, |stream, addresses| {
            let buffer = |i: usize| Buffer { address: addresses[i], stride: strides[i] };
            let ones = addresses.get(3).map(|&address| Buffer { address, stride: 1 });
            for group in products([buffer(0), buffer(1), buffer(2)], ones) {
                // SAFETY: the context is current; matrices are parts of tensors of this type on this GPU, within their shapes, which
                // `new` compared with the slots' rows. Slots' rows do not overlap, nor do their places in an output.
                unsafe { blas::multiply(self.gpu, stream, &group, self.dtype)? };
            }
            Ok(())
        })
    }

    /// Zeroes what no product writes of flat gradients: rows of slots without tokens, and what pads the others.
    fn zero_rest(&self, flat: &CubeTensor) -> Result<(), FsepError> {
        let (stride, used, size) = (flat.meta.strides()[0], self.shape.num_params(), self.dtype.size());
        let rest = |slot: usize| if self.slot_rows[slot].is_empty() { 0 } else { used };
        on_stream(&[flat], |stream, addresses| {
            for (slot, &row) in self.rows.iter().enumerate().filter(|(slot, _)| rest(*slot) < stride) {
                let start = addresses[0] + ((row * stride + rest(slot)) * size) as u64;
                // SAFETY: the rest of a row of the tensor.
                unsafe { memset_d8_async(start, 0, (stride - rest(slot)) * size, stream) }.map_err(driver_error)?;
            }
            Ok(())
        })
    }
}

/// Experts whose parameters are whole in memory, whatever the distance of their rows.
fn with_rows(weights: &ExpertWeights<CubeBackend>) -> CubeTensor {
    match weights.flat.meta.strides().last() {
        Some(1) => weights.flat.clone(),
        _ => into_contiguous(weights.flat.clone()),
    }
}

/// As [`FsepKernels::fsep_experts`]; keeps what the first projection gives, `[M, 2F or F]`.
pub(in super::super) fn forward(
    tokens: &CubeTensor,
    weights: &ExpertWeights<CubeBackend>,
    activation: ExpertActivation,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsOutput<CubeBackend>, FsepError> {
    let (tokens, flat) = (into_contiguous(tokens.clone()), with_rows(weights));
    let slots = Slots::new(&tokens, weights, slot_rows)?;
    let first = slots.forward(&tokens, &flat, Projection::First)?;
    let hidden = CubeBackend::fsep_activate(activation, first.clone());
    let output = slots.forward(&hidden, &flat, Projection::Down)?;
    Ok(ExpertsOutput { output, kept: vec![first] })
}

/// As [`FsepKernels::fsep_experts_backward`].
pub(in super::super) fn backward(
    args: ExpertsBackward<CubeBackend>,
    weights: &ExpertWeights<CubeBackend>,
    activation: ExpertActivation,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsGradients<CubeBackend>, FsepError> {
    let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
    let (tokens, grad, flat) = (into_contiguous(tokens), into_contiguous(grad), with_rows(weights));
    let slots = Slots::new(&tokens, weights, slot_rows)?;
    let first = match kept.and_then(|mut kept| kept.pop()) {
        Some(kept) => kept,
        None => slots.forward(&tokens, &flat, Projection::First)?,
    };
    let d_hidden = slots.backward(&grad, &flat, Projection::Down)?;
    let (d_first, hidden) = CubeBackend::fsep_activate_backward(activation, first, d_hidden);
    let d_weights = if want_weights {
        let d_flat = empty(&flat, flat.meta.shape().dims());
        slots.zero_rest(&d_flat)?;
        slots.gradients(&grad, &hidden, &d_flat, Projection::Down)?;
        Some(d_flat)
    } else {
        None
    };
    drop((hidden, grad));
    let d_tokens = want_tokens.then(|| slots.backward(&d_first, &flat, Projection::First)).transpose()?;
    let unfinished = d_weights.map(|flat| UnfinishedGradients::of_all_slots(flat, d_first, tokens.clone()));
    Ok(ExpertsGradients { tokens: d_tokens, weights: unfinished })
}

/// As [`FsepKernels::fsep_finish_gradients`]; writes beside what [`backward`] has written.
pub(in super::super) fn finish(
    unfinished: UnfinishedGradients<CubeBackend>,
    weights: &ExpertWeights<CubeBackend>,
    slot_rows: &[Range<usize>],
) -> Result<CubeTensor, FsepError> {
    let [d_flat, d_first, tokens] = unfinished.into_all_slots();
    Slots::new(&tokens, weights, slot_rows)?.gradients(&d_first, &tokens, &d_flat, Projection::First)?;
    Ok(d_flat)
}
