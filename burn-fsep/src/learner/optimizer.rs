use burn::{
    optim::GradientsParams,
    train::{Learner, LearnerModel},
};
use parking_lot::Mutex;

use super::{
    checkpoints::LearnerCheckpoints,
    strategy_optimizer::{check_optimizer, set_parameters},
};
use crate::{
    FsepError, FsepRuntime,
    checkpoint::HeldState,
    train::{ShardedOptimizer, has_expert_biases, update_expert_biases},
};

/// Who steps a Learner's model: its own optimizer, or one of the strategy's, whose state is cut.
#[derive(Default)]
pub(super) struct LearnerOptimizer(Option<Mutex<ShardedOptimizer>>);

impl LearnerOptimizer {
    pub fn sharded(optimizer: ShardedOptimizer) -> Self {
        Self(Some(Mutex::new(optimizer)))
    }

    pub fn held(&self) -> HeldState {
        if self.0.is_some() { HeldState::OwnPart } else { HeldState::Whole }
    }

    /// Checks before training that the Learner's own optimizer leaves the steps to the strategy's, if that has one.
    pub fn check<M: LearnerModel>(&self, learner: &Learner<M>, has_burn_checkpointers: bool) -> Result<(), FsepError> {
        match &self.0 {
            None => Ok(()),
            Some(_) if has_burn_checkpointers => Err(FsepError::Config(
                "burn-train's own checkpointers do not see the strategy's optimizer: use FsepStrategy::with_checkpoints".into(),
            )),
            Some(_) => check_optimizer(learner),
        }
    }

    /// Also moves expert biases.
    pub fn step<M: LearnerModel>(
        &self,
        runtime: &FsepRuntime,
        learner: &mut Learner<M>,
        grads: GradientsParams,
    ) -> Result<(), FsepError> {
        let Some(optimizer) = &self.0 else {
            return runtime.run(|| {
                learner.optimizer_step(grads);
                let model = learner.model();
                if has_expert_biases(&model) {
                    // The Learner's own way to another model.
                    learner.load_model(update_expert_biases(runtime, model).into_record());
                }
            });
        };
        let model = optimizer.lock().step(learner.lr_current(), learner.model(), grads)?;
        runtime.run(|| set_parameters(learner, &update_expert_biases(runtime, model)))
    }

    pub fn save<M: LearnerModel>(
        &self,
        checkpoints: &mut LearnerCheckpoints,
        learner: &Learner<M>,
    ) -> Result<(), FsepError> {
        let sharded = self.0.as_ref().map(|optimizer| optimizer.lock());
        checkpoints.save(learner, sharded.as_deref())
    }
}
