//! What all-reduces of all engines have in common: the order in which ranks are combined.

use std::ops::{AddAssign, DivAssign};

use super::ReduceOp;

/// A number that ranks combine.
pub(super) trait Number: bytemuck::Pod + AddAssign + DivAssign + PartialOrd + From<f32> {}

impl Number for f32 {}
impl Number for f64 {}

/// Combines all ranks' numbers, in rank order: the same bits wherever it is done. `[N][len] -> [len]`
pub(super) fn reduce<F: Number>(parts: &[&[F]], out: &mut [F], op: ReduceOp) {
    out.copy_from_slice(parts[0]);
    for part in &parts[1..] {
        for (a, &b) in out.iter_mut().zip(*part) {
            match op {
                ReduceOp::Sum | ReduceOp::Mean => *a += b,
                ReduceOp::Max if b > *a => *a = b,
                ReduceOp::Max => {}
            }
        }
    }
    if op == ReduceOp::Mean {
        let ranks = F::from(parts.len() as f32);
        out.iter_mut().for_each(|a| *a /= ranks);
    }
}
