//! What kernels take and return.

use std::ops::Range;

use burn::{
    backend::{
        Backend, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{FloatDType, Shape, Slice},
};

use crate::shard::{ExpertShape, UnshardedGuard};

/// Index tensors between assignments (`t * K + k`) and rows (assignments sorted by expert). Shape `[T * K]` each.
#[derive(Debug, Clone)]
pub struct RowIndices<B: Backend> {
    /// The row of each assignment.
    pub row_of: IntTensor<B>,
    /// The assignment of each row.
    pub assignment_of: IntTensor<B>,
    /// The token of each row: `assignment_of / K`.
    pub token_of: IntTensor<B>,
}

/// Whole experts, one a slot, for as long as a layer computes.
#[derive(Debug)]
pub struct ExpertWeights<B: Backend> {
    /// Flat parameters of one expert a row, as [`ExpertShape`] says, then padding. `[rows, >= P]`
    pub flat: FloatTensor<B>,
    /// The row of each slot's expert. Shape `[C]`.
    pub rows: Vec<usize>,
    /// Sizes of an expert.
    pub shape: ExpertShape,
    /// Counts the weights as alive; resident experts are not unsharded and not counted.
    pub(super) _guard: Option<UnshardedGuard>,
}

impl<B: Backend> ExpertWeights<B> {
    /// A view of the slot's first projection: gate, if there is one, and up. `[2F or F, D]`
    pub fn gate_up(&self, slot: usize) -> FloatTensor<B> {
        self.part(slot, 0..self.shape.gate_up_len(), [self.shape.first_width(), self.shape.hidden])
    }

    /// A view of the slot's down projection. `[D, F]`
    pub fn down(&self, slot: usize) -> FloatTensor<B> {
        self.part(slot, self.shape.gate_up_len()..self.shape.bias_start(), [self.shape.hidden, self.shape.ffn])
    }

    /// Views of the slot's biases: of the first projection, `[1, 2F or F]`, and of the second, `[1, D]`.
    pub fn biases(&self, slot: usize) -> Option<[FloatTensor<B>; 2]> {
        let (start, width) = (self.shape.bias_start(), self.shape.first_width());
        self.shape.bias.then(|| {
            [
                self.part(slot, start..start + width, [1, width]),
                self.part(slot, start + width..self.shape.num_params(), [1, self.shape.hidden]),
            ]
        })
    }

    fn part(&self, slot: usize, range: Range<usize>, dims: [usize; 2]) -> FloatTensor<B> {
        let row = self.rows[slot];
        let slices = [Slice::from(row..row + 1), Slice::from(range)];
        B::float_reshape(B::float_slice(self.flat.clone(), &slices), Shape::new(dims))
    }
}

/// Result of the experts' forward pass.
#[derive(Debug)]
pub struct ExpertsOutput<B: Backend> {
    /// `[M, D]`
    pub output: FloatTensor<B>,
    /// What backward can use instead of computing it again; in what form is the backend's own matter.
    pub kept: Vec<FloatTensor<B>>,
}

/// Which gradients of the experts are wanted, and what they need.
#[derive(Debug)]
pub struct ExpertsBackward<B: Backend> {
    /// Inputs, `[M, D]`.
    pub tokens: FloatTensor<B>,
    /// What forward kept; `None` if it is to be computed again.
    pub kept: Option<Vec<FloatTensor<B>>>,
    /// Gradient of the output, `[M, D]`.
    pub grad: FloatTensor<B>,
    /// Whether the tokens' gradient is wanted.
    pub want_tokens: bool,
    /// Whether the weights' gradient is wanted.
    pub want_weights: bool,
}

/// Gradients of the experts' inputs; `None` where none is wanted.
#[derive(Debug)]
pub struct ExpertsGradients<B: Backend> {
    /// `[M, D]`
    pub tokens: Option<FloatTensor<B>>,
    /// Maybe with the first projection's still to be computed.
    pub weights: Option<UnfinishedGradients<B>>,
}

/// Gradients of the experts' weights without those of the first projection, which need nothing that travels: they are computed
/// while the tokens' gradients do.
#[derive(Debug)]
pub struct UnfinishedGradients<B: Backend> {
    /// What there is already, as the backend has it.
    pub finished: Vec<FloatTensor<B>>,
    /// Gradients of the first projection's output; of `[M, 2F or F]`, or slot by slot.
    pub first: Vec<FloatTensor<B>>,
    /// Inputs, `[M, D]`.
    pub tokens: FloatTensor<B>,
}

#[cfg(any(feature = "cube", feature = "libtorch"))]
impl<B: Backend> UnfinishedGradients<B> {
    /// Of a backend that has one tensor of each for all slots.
    pub fn of_all_slots(finished: FloatTensor<B>, first: FloatTensor<B>, tokens: FloatTensor<B>) -> Self {
        Self { finished: vec![finished], first: vec![first], tokens }
    }

    /// What there is already, gradients of the first projection's output, and inputs, as [`UnfinishedGradients::of_all_slots`] took them.
    pub fn into_all_slots(self) -> [FloatTensor<B>; 3] {
        let Self { mut finished, mut first, tokens } = self;
        match (finished.pop(), first.pop()) {
            (Some(finished), Some(first)) => [finished, first, tokens],
            _ => unreachable!("what these experts have begun has one tensor of each"),
        }
    }
}

/// Gradients of the inputs of the weighted combination of the experts' outputs; `None` where none is wanted.
#[derive(Debug)]
pub struct CombineGradients<B: Backend> {
    /// `[T * K, D]`
    pub rows: Option<FloatTensor<B>>,
    /// `[T, K]`
    pub probs: Option<FloatTensor<B>>,
}

/// The tensor in this element type, in its own if `None`.
pub fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: Option<FloatDType>) -> FloatTensor<B> {
    match dtype {
        Some(dtype) if tensor.dtype() != dtype.into() => B::float_cast(tensor, dtype),
        _ => tensor,
    }
}
