use std::ops::Range;

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Kind, TchError, Tensor};

use super::{
    super::{
        ExpertActivation,
        types::{ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, UnfinishedGradients},
    },
    activation, cuda,
};
use crate::shard::ExpertShape;

/// Rows a slot up to which products of all slots in one launch beat a launch a slot (measured on an H200).
const GROUPED_UP_TO: usize = 1024;

/// Slots whose gradients one launch computes: they are copied to their places afterwards, so this bounds what is there twice.
const SLOTS_AT_ONCE: usize = 16;

/// Views of flat parameters, or of a buffer for their gradient, as matrices.
struct Matrices<'a> {
    flat: Tensor,
    rows: &'a [usize],
    hidden: i64,
    ffn: i64,
    /// Width of the first projection.
    first: i64,
    has_bias: bool,
}

impl<'a> Matrices<'a> {
    fn new(weights: &'a ExpertWeights<LibTorch>) -> Self {
        let ExpertShape { hidden, ffn, bias, .. } = weights.shape;
        Self {
            flat: weights.flat.tensor.shallow_clone(),
            rows: &weights.rows,
            hidden: hidden as i64,
            ffn: ffn as i64,
            first: weights.shape.first_width() as i64,
            has_bias: bias,
        }
    }

    /// The same views of another buffer of this shape.
    fn of(&self, flat: Tensor) -> Self {
        Self { flat, ..*self }
    }

    /// The first projection. `[2F or F, D]`
    fn gate_up(&self, slot: usize) -> Result<Tensor, TchError> {
        self.part(slot, 0, [self.first, self.hidden])
    }

    /// `[D, F]`
    fn down(&self, slot: usize) -> Result<Tensor, TchError> {
        self.part(slot, self.first * self.hidden, [self.hidden, self.ffn])
    }

    fn part(&self, slot: usize, start: i64, dims: [i64; 2]) -> Result<Tensor, TchError> {
        self.flat.f_select(0, self.rows[slot] as i64)?.f_narrow(0, start, dims[0] * dims[1])?.f_view(dims)
    }

    /// Biases of the first projection, `[2F or F]`, and of the second, `[D]`, if there are any.
    fn biases(&self, slot: usize) -> Result<Option<[Tensor; 2]>, TchError> {
        if !self.has_bias {
            return Ok(None);
        }
        let row = self.flat.f_select(0, self.rows[slot] as i64)?;
        let start = self.bias_start();
        Ok(Some([row.f_narrow(0, start, self.first)?, row.f_narrow(0, start + self.first, self.hidden)?]))
    }

    /// Parameters of both matrices.
    fn bias_start(&self) -> i64 {
        (self.first + self.ffn) * self.hidden
    }

    /// Parameters of an expert.
    fn num_params(&self) -> i64 {
        self.bias_start() + if self.has_bias { self.first + self.hidden } else { 0 }
    }

    /// First projections of all slots, `[C, 2F or F, D]`, if rows are in the order of slots.
    fn all_gate_up(&self) -> Result<Tensor, TchError> {
        self.all(0, [self.first, self.hidden])
    }

    /// `[C, D, F]`, likewise.
    fn all_down(&self) -> Result<Tensor, TchError> {
        self.all(self.first * self.hidden, [self.hidden, self.ffn])
    }

    fn all(&self, start: i64, dims: [i64; 2]) -> Result<Tensor, TchError> {
        self.flat.f_narrow(1, start, dims[0] * dims[1])?.f_unflatten(1, dims)
    }
}

/// How products of tokens with their slots' matrices are computed.
enum Products<'a> {
    /// One launch for all slots; where each slot's rows end. Shape `[C]`.
    Grouped(Tensor, &'a [Range<usize>]),
    /// One launch a slot that has rows.
    BySlot(&'a [Range<usize>]),
}

impl<'a> Products<'a> {
    fn new(tokens: &Tensor, weights: &Matrices<'_>, slot_rows: &'a [Range<usize>]) -> Result<Self, TchError> {
        let rows: usize = slot_rows.iter().map(Range::len).sum();
        let is_small = rows > 0 && rows <= GROUPED_UP_TO * slot_rows.len();
        let in_order = weights.rows.iter().enumerate().all(|(slot, &row)| slot == row);
        let fits = weights.hidden % 8 == 0 && weights.ffn % 8 == 0 && weights.flat.size()[1] % 8 == 0;
        if is_small
            && in_order
            && fits
            && tokens.kind() == Kind::BFloat16
            && cuda::has_grouped_products(tokens.device())
        {
            let ends: Vec<i32> = slot_rows.iter().map(|rows| rows.end as i32).collect();
            return Ok(Self::Grouped(cuda::upload(&ends, tokens.device())?, slot_rows));
        }
        Ok(Self::BySlot(slot_rows))
    }

    /// `tokens[rows of slot] * matrix(slot)` for all slots. `[M, in] -> [M, out]`
    fn product(
        &self,
        tokens: &Tensor,
        out_width: i64,
        matrix: impl Fn(usize) -> Result<Tensor, TchError>,
        all: impl Fn() -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        match self {
            Self::Grouped(ends, _) => tokens.f_internal_grouped_mm(&all()?, Some(ends), None, None),
            Self::BySlot(slot_rows) => {
                let out = empty(tokens.size()[0], out_width, tokens)?;
                for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                    let _ = part(tokens, rows)?.f_mm_out(&part(&out, rows)?, &matrix(slot)?)?;
                }
                Ok(out)
            }
        }
    }
}

impl Products<'_> {
    /// `grads[rows of slot]^T * tokens[rows of slot]`, written to the matrices of all slots that have rows.
    /// `([M, out], [M, in]) -> [out, in]`, C times
    fn gradients(
        &self,
        grads: &Tensor,
        tokens: &Tensor,
        matrix: impl Fn(usize) -> Result<Tensor, TchError>,
        all: impl Fn() -> Result<Tensor, TchError>,
    ) -> Result<(), TchError> {
        match self {
            Self::Grouped(_, slot_rows) => {
                for (i, slots) in slot_rows.chunks(SLOTS_AT_ONCE).enumerate() {
                    let start = slots[0].start;
                    let rows = start..slots[slots.len() - 1].end;
                    if rows.is_empty() {
                        continue;
                    }
                    let ends: Vec<i32> = slots.iter().map(|rows| (rows.end - start) as i32).collect();
                    let ends = cuda::upload(&ends, tokens.device())?;
                    let grads = part(grads, &rows)?.f_tr()?;
                    let products = grads.f_internal_grouped_mm(&part(tokens, &rows)?, Some(&ends), None, None)?;
                    let places = all()?.f_narrow(0, (i * SLOTS_AT_ONCE) as i64, slots.len() as i64)?;
                    copy_wide(&places, &products)?;
                }
            }
            Self::BySlot(slot_rows) => {
                for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
                    let _ = part(grads, rows)?.f_tr()?.f_mm_out(&matrix(slot)?, &part(tokens, rows)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Copies matrices, eight elements of two bytes at a time: rows of a buffer are no whole of memory, for which LibTorch copies
/// element by element. `[C, rows, columns]`, both, of bf16 and with columns and strides that eight divides.
fn copy_wide(to: &Tensor, from: &Tensor) -> Result<(), TchError> {
    let wide = |tensor: &Tensor| tensor.f_view_dtype(Kind::ComplexDouble);
    wide(to)?.f_copy_(&wide(from)?)
}

fn part(tensor: &Tensor, rows: &Range<usize>) -> Result<Tensor, TchError> {
    tensor.f_narrow(0, rows.start as i64, rows.len() as i64)
}

fn empty(rows: i64, width: i64, like: &Tensor) -> Result<Tensor, TchError> {
    Tensor::f_empty([rows, width], (like.kind(), like.device()))
}

/// The first projection of all slots. `[M, D] -> [M, 2F or F]`
fn first_projection(
    tokens: &Tensor,
    weights: &Matrices<'_>,
    products: &Products<'_>,
    slot_rows: &[Range<usize>],
) -> Result<Tensor, TchError> {
    let all = || weights.all_gate_up()?.f_transpose(1, 2);
    let out = products.product(tokens, weights.first, |slot| weights.gate_up(slot)?.f_tr(), all)?;
    add_biases(&out, weights, slot_rows, 0)?;
    Ok(out)
}

/// Adds each slot's bias of one projection, in place, if there are biases.
fn add_biases(
    out: &Tensor,
    weights: &Matrices<'_>,
    slot_rows: &[Range<usize>],
    projection: usize,
) -> Result<(), TchError> {
    for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let Some(biases) = weights.biases(slot)? else { return Ok(()) };
        let _ = part(out, rows)?.f_add_(&biases[projection])?;
    }
    Ok(())
}

pub(super) fn forward(
    tokens: &Tensor,
    weights: &ExpertWeights<LibTorch>,
    activation: ExpertActivation,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsOutput<LibTorch>, TchError> {
    let weights = Matrices::new(weights);
    let products = Products::new(tokens, &weights, slot_rows)?;
    let first = first_projection(tokens, &weights, &products, slot_rows)?;
    let hidden = activation::activate(activation, &first, weights.ffn)?;
    let all = || weights.all_down()?.f_transpose(1, 2);
    let output = products.product(&hidden, weights.hidden, |slot| weights.down(slot)?.f_tr(), all)?;
    add_biases(&output, &weights, slot_rows, 1)?;
    Ok(ExpertsOutput { output: TchTensor::new(output), kept: vec![TchTensor::new(first)] })
}

pub(super) fn backward(
    args: ExpertsBackward<LibTorch>,
    weights: &ExpertWeights<LibTorch>,
    activation: ExpertActivation,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsGradients<LibTorch>, TchError> {
    let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
    let (tokens, grad) = (tokens.tensor, grad.tensor);
    let weights = Matrices::new(weights);
    let products = Products::new(&tokens, &weights, slot_rows)?;
    let first = match kept.and_then(|mut kept| kept.pop()) {
        Some(kept) => kept.tensor,
        None => first_projection(&tokens, &weights, &products, slot_rows)?,
    };
    let d_hidden = products.product(&grad, weights.ffn, |slot| weights.down(slot), || weights.all_down())?;
    let (d_first, hidden) = activation::backward(activation, &first, d_hidden)?;
    drop(first);

    let d_weights = if want_weights {
        let out = weights.of(weights.flat.f_empty_like()?);
        let used = weights.num_params();
        let width = out.flat.size()[1];
        if used < width {
            let _ = out.flat.f_narrow(1, used, width - used)?.f_zero_()?;
        }
        products.gradients(&grad, &hidden, |slot| out.down(slot), || out.all_down())?;
        for (slot, rows) in slot_rows.iter().enumerate() {
            if rows.is_empty() {
                let _ = out.flat.f_select(0, weights.rows[slot] as i64)?.f_zero_()?;
            } else if let Some([_, bias]) = out.biases(slot)? {
                sum_rows_to(bias, &grad, rows)?;
            }
        }
        Some(out.flat)
    } else {
        None
    };
    drop((hidden, grad));
    let d_tokens = want_tokens
        .then(|| products.product(&d_first, weights.hidden, |slot| weights.gate_up(slot), || weights.all_gate_up()))
        .transpose()?;
    let unfinished = d_weights.map(|flat| {
        let [flat, d_first, tokens] = [flat, d_first, tokens].map(TchTensor::new);
        UnfinishedGradients::of_all_slots(flat, d_first, tokens)
    });
    Ok(ExpertsGradients { tokens: d_tokens.map(TchTensor::new), weights: unfinished })
}

/// The first projection's gradients, written to their places beside what `backward` has written.
pub(super) fn finish(
    unfinished: UnfinishedGradients<LibTorch>,
    weights: &ExpertWeights<LibTorch>,
    slot_rows: &[Range<usize>],
) -> Result<TchTensor, TchError> {
    let [flat, d_first, tokens] = unfinished.into_all_slots().map(|tensor| tensor.tensor);
    let out = Matrices::new(weights).of(flat);
    let products = Products::new(&tokens, &out, slot_rows)?;
    products.gradients(&d_first, &tokens, |slot| out.gate_up(slot), || out.all_gate_up())?;
    for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let Some([bias, _]) = out.biases(slot)? else { break };
        sum_rows_to(bias, &d_first, rows)?;
    }
    Ok(TchTensor::new(out.flat))
}

/// Writes the gradient of a bias.
fn sum_rows_to(mut bias: Tensor, grad: &Tensor, rows: &Range<usize>) -> Result<(), TchError> {
    bias.f_copy_(&part(grad, rows)?.f_sum_dim_intlist([0i64].as_slice(), false, None::<Kind>)?)
}
