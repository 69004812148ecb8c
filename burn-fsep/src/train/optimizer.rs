use burn::{
    lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    module::Module,
    optim::{GradientsParams, ModuleOptimizer},
};

use super::{ShardedOptimizer, WholeMatrixOptimizer};
use crate::{FsepError, checkpoint::CheckpointedOptimizer};

/// An optimizer that [`Trainer`](super::Trainer) steps: Burn's [`ModuleOptimizer`], [`ShardedOptimizer`], or
/// [`WholeMatrixOptimizer`].
pub trait TrainOptimizer: CheckpointedOptimizer {
    /// The next model, from the gradients that all ranks have. Collective.
    ///
    /// # Errors
    ///
    /// As [`ShardedOptimizer::step`] and [`WholeMatrixOptimizer::step`].
    fn step_model<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: M,
        grads: GradientsParams,
    ) -> Result<M, FsepError>;
}

impl TrainOptimizer for ModuleOptimizer {
    fn step_model<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: M,
        grads: GradientsParams,
    ) -> Result<M, FsepError> {
        Ok(self.step(lr, model, grads))
    }
}

impl TrainOptimizer for ShardedOptimizer {
    fn step_model<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: M,
        grads: GradientsParams,
    ) -> Result<M, FsepError> {
        self.step(lr, model, grads)
    }
}

impl TrainOptimizer for WholeMatrixOptimizer {
    fn step_model<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: M,
        grads: GradientsParams,
    ) -> Result<M, FsepError> {
        self.step(lr, model, grads)
    }
}
