//! Burn's LibTorch backend: the experts' products write straight to where they belong, so that nothing is concatenated,
//! and element-wise work runs once over all slots.

use std::{ops::Range, sync::Arc};

use burn::backend::{
    LibTorch,
    tensor::{FloatTensor, IntTensor},
};
use burn_tch::TchTensor;
use tch::{TchError, Tensor};

use super::{
    FsepKernels, FsepOps, MoeStep,
    kernels::{ExpertsBackward, ExpertsGradients, ExpertsOutput},
    run_moe,
    weights::ExpertWeights,
};
use crate::FsepError;

impl FsepOps for LibTorch {
    fn fsep_moe(
        hidden: FloatTensor<Self>,
        probs: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        row_of: IntTensor<Self>,
        assignment_of: IntTensor<Self>,
        token_of: IntTensor<Self>,
        step: Arc<MoeStep>,
    ) -> FloatTensor<Self> {
        run_moe::<Self>(hidden, probs, weights, row_of, assignment_of, token_of, step)
    }
}

impl FsepKernels for LibTorch {
    fn fsep_experts(
        tokens: &TchTensor,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsOutput<Self>, FsepError> {
        forward(&tokens.tensor, &Matrices::new(weights), slot_rows).map_err(device_error)
    }

    fn fsep_experts_backward(
        args: ExpertsBackward<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsGradients<Self>, FsepError> {
        backward(args, &Matrices::new(weights), slot_rows).map_err(device_error)
    }
}

fn device_error(error: TchError) -> FsepError {
    FsepError::Device(error.to_string())
}

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
}

/// `out[rows] = product(slot, rows)` for the slots that have any.
fn by_slot(
    slot_rows: &[Range<usize>],
    out: &Tensor,
    mut product: impl FnMut(usize, &dyn Fn(&Tensor) -> Result<Tensor, TchError>, &Tensor) -> Result<(), TchError>,
) -> Result<(), TchError> {
    for (slot, rows) in slot_rows.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let part = |tensor: &Tensor| tensor.f_narrow(0, rows.start as i64, rows.len() as i64);
        product(slot, &part, &part(out)?)?;
    }
    Ok(())
}

fn empty(rows: i64, width: i64, like: &Tensor) -> Result<Tensor, TchError> {
    Tensor::f_empty([rows, width], (like.kind(), like.device()))
}

/// Activations before SwiGLU of all slots. `[M, D] -> [M, 2F]`
fn gate_up(tokens: &Tensor, weights: &Matrices<'_>, slot_rows: &[Range<usize>]) -> Result<Tensor, TchError> {
    let gate_up = empty(tokens.size()[0], 2 * weights.ffn, tokens)?;
    by_slot(slot_rows, &gate_up, |slot, part, out| {
        part(tokens)?.f_mm_out(out, &weights.gate_up(slot)?.f_tr()?).map(drop)
    })?;
    Ok(gate_up)
}

fn forward(
    tokens: &Tensor,
    weights: &Matrices<'_>,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsOutput<LibTorch>, TchError> {
    let gate_up = gate_up(tokens, weights, slot_rows)?;
    let [gate, up] = halves(&gate_up, weights.ffn)?;
    let mut hidden = gate.f_silu()?;
    let hidden = hidden.f_mul_(&up)?;
    let output = empty(tokens.size()[0], weights.hidden, tokens)?;
    by_slot(slot_rows, &output, |slot, part, out| {
        part(&hidden)?.f_mm_out(out, &weights.down(slot)?.f_tr()?).map(drop)
    })?;
    Ok(ExpertsOutput { output: TchTensor::new(output), kept: vec![TchTensor::new(gate_up)] })
}

fn backward(
    args: ExpertsBackward<LibTorch>,
    weights: &Matrices<'_>,
    slot_rows: &[Range<usize>],
) -> Result<ExpertsGradients<LibTorch>, TchError> {
    let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
    let (tokens, grad) = (tokens.tensor, grad.tensor);
    let gate_up = match kept.and_then(|mut kept| kept.pop()) {
        Some(kept) => kept.tensor,
        None => gate_up(&tokens, weights, slot_rows)?,
    };
    let rows = tokens.size()[0];
    let mut d_hidden = empty(rows, weights.ffn, &tokens)?;
    by_slot(slot_rows, &d_hidden, |slot, part, out| part(&grad)?.f_mm_out(out, &weights.down(slot)?).map(drop))?;

    let [gate, up] = halves(&gate_up, weights.ffn)?;
    let d_gate_up = empty(rows, 2 * weights.ffn, &tokens)?;
    let [d_gate, d_up] = halves(&d_gate_up, weights.ffn)?;
    let mut silu = gate.f_silu()?;
    let _ = d_hidden.f_mul_out(&d_up, &silu)?;
    let hidden = silu.f_mul_(&up)?;
    let d_silu = d_hidden.f_mul_(&up)?;
    let _ = gate.f_silu_backward_grad_input(&d_gate, &d_silu)?;
    drop((d_silu, d_hidden, gate, up, gate_up));

    let d_weights = if want_weights {
        let out = weights.of(weights.flat.f_empty_like()?);
        let used = 3 * weights.ffn * weights.hidden;
        let width = out.flat.size()[1];
        if used < width {
            let _ = out.flat.f_narrow(1, used, width - used)?.f_zero_()?;
        }
        for (slot, _) in slot_rows.iter().enumerate().filter(|(_, rows)| rows.is_empty()) {
            let _ = out.flat.f_select(0, weights.rows[slot] as i64)?.f_zero_()?;
        }
        by_slot(slot_rows, &tokens, |slot, part, tokens| {
            let _ = part(&d_gate_up)?.f_tr()?.f_mm_out(&out.gate_up(slot)?, tokens)?;
            part(&grad)?.f_tr()?.f_mm_out(&out.down(slot)?, &part(&hidden)?).map(drop)
        })?;
        Some(TchTensor::new(out.flat))
    } else {
        None
    };
    drop(hidden);
    let d_tokens = if want_tokens {
        let d_tokens = empty(rows, weights.hidden, &tokens)?;
        by_slot(slot_rows, &d_tokens, |slot, part, out| {
            part(&d_gate_up)?.f_mm_out(out, &weights.gate_up(slot)?).map(drop)
        })?;
        Some(TchTensor::new(d_tokens))
    } else {
        None
    };
    Ok(ExpertsGradients { tokens: d_tokens, weights: d_weights })
}

fn halves(gate_up: &Tensor, ffn: i64) -> Result<[Tensor; 2], TchError> {
    Ok([gate_up.f_narrow(1, 0, ffn)?, gate_up.f_narrow(1, ffn, ffn)?])
}
