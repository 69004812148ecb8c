use std::ops::Range;

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Kind, TchError, Tensor};

use super::{
    super::types::{ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput},
    cuda::{self, Fused},
};

/// Rows a slot up to which products of all slots in one launch beat a launch a slot (measured on an H200).
const GROUPED_UP_TO: usize = 1024;

/// Views of flat parameters, or of a buffer for their gradient, as matrices.
struct Matrices<'a> {
    flat: Tensor,
    rows: &'a [usize],
    hidden: i64,
    ffn: i64,
}

impl<'a> Matrices<'a> {
    fn new(weights: &'a ExpertWeights<LibTorch>) -> Self {
        let (hidden, ffn) = (weights.shape.hidden as i64, weights.shape.ffn as i64);
        Self { flat: weights.flat.tensor.shallow_clone(), rows: &weights.rows, hidden, ffn }
    }

    /// The same views of another buffer of this shape.
    fn of(&self, flat: Tensor) -> Self {
        Self { flat, ..*self }
    }

    /// `[2F, D]`
    fn gate_up(&self, slot: usize) -> Result<Tensor, TchError> {
        self.part(slot, 0, [2 * self.ffn, self.hidden])
    }

    /// `[D, F]`
    fn down(&self, slot: usize) -> Result<Tensor, TchError> {
        self.part(slot, 2 * self.ffn * self.hidden, [self.hidden, self.ffn])
    }

    fn part(&self, slot: usize, start: i64, dims: [i64; 2]) -> Result<Tensor, TchError> {
        self.flat.f_select(0, self.rows[slot] as i64)?.f_narrow(0, start, dims[0] * dims[1])?.f_view(dims)
    }

    /// Gate and up projections of all slots, `[C, 2F, D]`, if rows are in the order of slots.
    fn all_gate_up(&self) -> Result<Tensor, TchError> {
        self.all(0, [2 * self.ffn, self.hidden])
    }

    /// `[C, D, F]`, likewise.
    fn all_down(&self) -> Result<Tensor, TchError> {
        self.all(2 * self.ffn * self.hidden, [self.hidden, self.ffn])
    }

    fn all(&self, start: i64, dims: [i64; 2]) -> Result<Tensor, TchError> {
        self.flat.f_narrow(1, start, dims[0] * dims[1])?.f_unflatten(1, dims)
    }
}

/// How products of tokens with their slots' matrices are computed.
enum Products<'a> {
    /// One launch for all slots; where each slot's rows end. Shape `[C]`.
    Grouped(Tensor),
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
            return Ok(Self::Grouped(cuda::upload(&ends, tokens.device())?));
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
            Self::Grouped(ends) => tokens.f_internal_grouped_mm(&all()?, Some(ends), None, None),
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

fn part(tensor: &Tensor, rows: &Range<usize>) -> Result<Tensor, TchError> {
    tensor.f_narrow(0, rows.start as i64, rows.len() as i64)
}

fn empty(rows: i64, width: i64, like: &Tensor) -> Result<Tensor, TchError> {
    Tensor::f_empty([rows, width], (like.kind(), like.device()))
}

/// Activations before SwiGLU of all slots. `[M, D] -> [M, 2F]`
fn gate_up(tokens: &Tensor, weights: &Matrices<'_>, products: &Products<'_>) -> Result<Tensor, TchError> {
    let all = || weights.all_gate_up()?.f_transpose(1, 2);
    products.product(tokens, 2 * weights.ffn, |slot| weights.gate_up(slot)?.f_tr(), all)
}

pub(super) fn forward(
    tokens: &Tensor,
    weights: &ExpertWeights<LibTorch>,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsOutput<LibTorch>, TchError> {
    let weights = Matrices::new(weights);
    let products = Products::new(tokens, &weights, slot_rows)?;
    let gate_up = gate_up(tokens, &weights, &products)?;
    let hidden = swiglu(&gate_up)?;
    let all = || weights.all_down()?.f_transpose(1, 2);
    let output = products.product(&hidden, weights.hidden, |slot| weights.down(slot)?.f_tr(), all)?;
    Ok(ExpertsOutput { output: TchTensor::new(output), kept: vec![TchTensor::new(gate_up)] })
}

pub(super) fn backward(
    args: ExpertsBackward<LibTorch>,
    weights: &ExpertWeights<LibTorch>,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsGradients<LibTorch>, TchError> {
    let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
    let (tokens, grad) = (tokens.tensor, grad.tensor);
    let weights = Matrices::new(weights);
    let products = Products::new(&tokens, &weights, slot_rows)?;
    let gate_up = match kept.and_then(|mut kept| kept.pop()) {
        Some(kept) => kept.tensor,
        None => gate_up(&tokens, &weights, &products)?,
    };
    let d_hidden = products.product(&grad, weights.ffn, |slot| weights.down(slot), || weights.all_down())?;
    let (d_gate_up, hidden) = swiglu_backward(&gate_up, d_hidden)?;
    drop(gate_up);

    let d_weights = if want_weights {
        let out = weights.of(weights.flat.f_empty_like()?);
        let used = 3 * weights.ffn * weights.hidden;
        let width = out.flat.size()[1];
        if used < width {
            let _ = out.flat.f_narrow(1, used, width - used)?.f_zero_()?;
        }
        for (slot, rows) in slot_rows.iter().enumerate() {
            if rows.is_empty() {
                let _ = out.flat.f_select(0, weights.rows[slot] as i64)?.f_zero_()?;
            } else {
                let _ = part(&d_gate_up, rows)?.f_tr()?.f_mm_out(&out.gate_up(slot)?, &part(&tokens, rows)?)?;
                let _ = part(&grad, rows)?.f_tr()?.f_mm_out(&out.down(slot)?, &part(&hidden, rows)?)?;
            }
        }
        Some(TchTensor::new(out.flat))
    } else {
        None
    };
    drop(hidden);
    let d_tokens = want_tokens
        .then(|| products.product(&d_gate_up, weights.hidden, |slot| weights.gate_up(slot), || weights.all_gate_up()))
        .transpose()?;
    Ok(ExpertsGradients { tokens: d_tokens.map(TchTensor::new), weights: d_weights })
}

/// `silu(gate) * up`. `[M, 2F] -> [M, F]`
fn swiglu(gate_up: &Tensor) -> Result<Tensor, TchError> {
    let ffn = gate_up.size()[1] / 2;
    if let Some(fused) = Fused::of(gate_up, ffn) {
        return fused.swiglu(gate_up);
    }
    let [gate, up] = halves(gate_up, ffn)?;
    gate.f_silu()?.f_mul_(&up)
}

/// Gradient of `gate_up`, and the output of SwiGLU once more. `([M, 2F], [M, F]) -> ([M, 2F], [M, F])`
fn swiglu_backward(gate_up: &Tensor, mut grad: Tensor) -> Result<(Tensor, Tensor), TchError> {
    let ffn = gate_up.size()[1] / 2;
    if let Some(fused) = Fused::of(gate_up, ffn) {
        return fused.swiglu_backward(gate_up, &grad);
    }
    let [gate, up] = halves(gate_up, ffn)?;
    let d_gate_up = gate_up.f_empty_like()?;
    let [d_gate, d_up] = halves(&d_gate_up, ffn)?;
    let mut silu = gate.f_silu()?;
    let _ = grad.f_mul_out(&d_up, &silu)?;
    let hidden = silu.f_mul_(&up)?;
    let d_silu = grad.f_mul_(&up)?;
    let _ = gate.f_silu_backward_grad_input(&d_gate, &d_silu)?;
    Ok((d_gate_up, hidden))
}

fn halves(gate_up: &Tensor, ffn: i64) -> Result<[Tensor; 2], TchError> {
    Ok([gate_up.f_narrow(1, 0, ffn)?, gate_up.f_narrow(1, ffn, ffn)?])
}
