//! What a job takes of a rank's memory: told before it starts, refused where it is more than there is, and measured.

mod advice;
mod available;
mod check;
mod estimate;
mod peak;

pub(crate) use advice::{gib, misfit};
pub(crate) use check::check;
pub(crate) use estimate::{Batch, JobSizes, components};
pub(crate) use peak::PeakMemory;
