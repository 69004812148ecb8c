use std::sync::Arc;

use burn::{
    lr_scheduler::LrSchedulerRecord,
    optim::OptimizerRecord,
    store::ModuleRecord,
    train::{
        Learner, LearnerModel, LearningCheckpointer,
        checkpoint::{
            AsyncCheckpointer, Checkpoint, Checkpointer, CheckpointerError, CheckpointingAction, CheckpointingStrategy,
        },
        metric::store::EventStoreClient,
    },
};
use parking_lot::Mutex;

/// The records of a Learner's optimizer and scheduler.
///
/// Relied on: it shows them to nobody but a `LearningCheckpointer`, which gives them to its checkpointers, one each, when a
/// strategy says so, and waits for these when it is dropped. So one whose checkpointers keep what they get, or, of the
/// model, which the Learner shows, drop it.
///
/// `None` if it did not hand them over.
pub(crate) fn learner_records<M: LearnerModel>(
    learner: &Learner<M>,
    event_store: &EventStoreClient,
) -> Option<(OptimizerRecord, LrSchedulerRecord)> {
    let (optimizer, scheduler) = (Keep::default(), Keep::default());
    let mut checkpointer = LearningCheckpointer::new(
        AsyncCheckpointer::new(Ignore),
        AsyncCheckpointer::new(Keep(optimizer.0.clone())),
        AsyncCheckpointer::new(Keep(scheduler.0.clone())),
        Box::new(AlwaysSave),
    );
    checkpointer.checkpoint(learner, 0, event_store);
    drop(checkpointer);
    let records = (optimizer.0.lock().take(), scheduler.0.lock().take());
    records.0.zip(records.1)
}

/// A checkpointer that keeps the record in memory.
struct Keep<R>(Arc<Mutex<Option<R>>>);

impl<R> Default for Keep<R> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<R: Checkpoint> Checkpointer<R> for Keep<R> {
    fn save(&self, _epoch: usize, record: R) -> Result<(), CheckpointerError> {
        *self.0.lock() = Some(record);
        Ok(())
    }

    fn delete(&self, _epoch: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, _epoch: usize) -> Result<R, CheckpointerError> {
        Err(CheckpointerError::Unknown("nothing is restored from here".into()))
    }
}

/// A checkpointer that saves nothing.
struct Ignore;

impl Checkpointer<ModuleRecord> for Ignore {
    fn save(&self, _epoch: usize, _record: ModuleRecord) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn delete(&self, _epoch: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, _epoch: usize) -> Result<ModuleRecord, CheckpointerError> {
        Err(CheckpointerError::Unknown("nothing is restored from here".into()))
    }
}

struct AlwaysSave;

impl CheckpointingStrategy for AlwaysSave {
    fn checkpointing(&mut self, _epoch: usize, _store: &EventStoreClient) -> Vec<CheckpointingAction> {
        vec![CheckpointingAction::Save]
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        data::{
            dataloader::{DataLoaderBuilder, batcher::Batcher},
            dataset::InMemDataset,
        },
        lr_scheduler::linear::LinearLrSchedulerConfig,
        module::Module,
        nn::{Linear, LinearConfig},
        optim::AdamConfig,
        tensor::{Device, Tensor},
        train::{
            InferenceStep, SupervisedLearningStrategy, SupervisedTraining, SupervisedTrainingEventProcessor,
            TrainLoader, TrainOutput, TrainStep, TrainingComponents, TrainingStrategy, ValidLoader,
            renderer::CliMetricsRenderer,
        },
    };

    use super::*;
    use crate::burn_compat::states_of;

    #[derive(Module, Debug)]
    struct Model {
        linear: Linear,
    }

    impl TrainStep for Model {
        type Input = ();
        type Output = ();

        fn step(&self, (): ()) -> TrainOutput<()> {
            let input = Tensor::<2>::ones([1, 2], &Device::flex().autodiff());
            TrainOutput::new(self, self.linear.forward(input).sum().backward(), ())
        }
    }

    impl InferenceStep for Model {
        type Input = ();
        type Output = ();

        fn step(&self, (): ()) {}
    }

    #[derive(Clone)]
    struct NoBatches;

    impl Batcher<(), ()> for NoBatches {
        fn batch(&self, _: Vec<()>, _: &Device) {}
    }

    /// A training of one step that takes the records then.
    #[derive(Default)]
    struct TakeRecords(Mutex<Option<(OptimizerRecord, LrSchedulerRecord)>>);

    impl SupervisedLearningStrategy<Model> for TakeRecords {
        fn fit(
            &self,
            components: TrainingComponents<Model>,
            mut learner: Learner<Model>,
            _train: TrainLoader<Model>,
            _valid: ValidLoader<Model>,
            _epoch: usize,
        ) -> (Model, SupervisedTrainingEventProcessor<Model>) {
            learner.lr_step();
            let output = learner.train_step(());
            learner.optimizer_step(output.grads);
            *self.0.lock() = learner_records(&learner, &components.event_store);
            (learner.model(), components.event_processor)
        }
    }

    #[test]
    fn a_learner_hands_over_what_it_stands_at() {
        let folder = tempfile::tempdir().unwrap();
        let loader = || DataLoaderBuilder::new(NoBatches).build(InMemDataset::new(vec![()]));
        let strategy = Arc::new(TakeRecords::default());
        let training = SupervisedTraining::new(folder.path(), loader(), loader())
            .with_application_logger(None)
            .renderer(Box::new(CliMetricsRenderer::new()))
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()));
        let scheduler = || LinearLrSchedulerConfig::new(0.5, 0.1, 4).init().unwrap();
        let model = Model { linear: LinearConfig::new(2, 3).with_bias(false).init(&Device::flex().autodiff()) };
        let id = model.linear.weight.id.val();
        training.launch(Learner::new(model, AdamConfig::new().init(), scheduler()));

        let (optimizer, record) = strategy.0.lock().take().unwrap();
        let state = states_of(optimizer).unwrap().remove(&id).unwrap();
        assert_eq!(u64::try_from(state.scalars["momentum.time"]), Ok(1));
        assert!(state.tensors["momentum.moment_1"].iter::<f32>().all(|moment| moment != 0.0));
        let (mut expected, mut found) = (scheduler(), scheduler().load_record(record));
        expected.step();
        assert_eq!(found.step().base(), expected.step().base());
    }
}
