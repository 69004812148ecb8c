//! Burn's CPU backend.

use std::sync::Arc;

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};

use super::{FsepKernels, FsepOps, MoeStep, run_moe, run_start_restore};
use crate::{FsepError, FsepRuntime, schedule::Restore};

impl FsepKernels for Flex {}

impl FsepOps for Flex {
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

    fn fsep_start_restore(
        weights: FloatTensor<Self>,
        restore: Arc<Restore>,
        runtime: FsepRuntime,
    ) -> Result<(), FsepError> {
        run_start_restore::<Self>(weights, restore, runtime)
    }
}
