use burn::{
    data::dataloader::batcher::Batcher,
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
};
use burn_fsep::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
    train::{
        GradientBucketsConfig, PlannerConfig, ShardedOptimizer, TrainOptimizer, TrainerConfig, TrainingCallback,
        clip_grad_norm, sync_gradients,
    },
};
use burn_fsep_planner::PlannerStrategy;

use crate::{SmallMoe, TaskBatcher, TaskItem, device, random_layout};

/// Where layouts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayoutSource {
    /// The planner's callback.
    Planner(PlannerStrategy),
    /// Every step another one at random.
    Random,
}

/// How the replicated parameters' gradients are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientSync {
    /// Not at all: a negative control.
    Off,
    /// After backward.
    AfterBackward,
    /// During backward, in buckets of so many bytes.
    Buckets(usize),
}

/// Training of the small model in a loop of the user's own.
#[derive(Debug, Clone, Copy)]
pub struct HandTraining {
    /// Adam steps.
    pub steps: usize,
    /// Items of a step, of all ranks together.
    pub batch: usize,
    /// Maximum norm of the gradient.
    pub clip: f64,
    /// Where layouts come from.
    pub layouts: LayoutSource,
    /// How the replicated parameters' gradients are averaged.
    pub sync: GradientSync,
}

/// A rank's losses and what it ended with.
#[derive(Debug, Clone)]
pub struct Trained {
    /// Mean loss over ranks, by step.
    pub losses: Vec<f32>,
    /// Values of all replicated parameters.
    pub replicated: Vec<f32>,
    /// In how many steps the first layer's layout changed.
    pub layouts: usize,
    /// Largest norm of a gradient before clipping.
    pub largest_norm: f64,
    /// Reductions of gradients that backward has started.
    pub overlapped: usize,
}

/// Training without a strategy or trainer: each part by hand. Items are used again when there are no more.
///
/// # Errors
///
/// Any [`FsepError`].
pub fn train_by_hand(runtime: &FsepRuntime, items: &[TaskItem], training: &HandTraining) -> Result<Trained, FsepError> {
    let HandTraining { steps, batch, clip, layouts, sync } = *training;
    let device = device();
    let slots = small_slots(runtime.topology().world_size());
    let mut model = SmallMoe::fsep(runtime, slots, &device)?;
    let buckets = match sync {
        GradientSync::Buckets(bytes) => Some(GradientBucketsConfig::new().with_bucket_bytes(bytes).init(runtime)),
        _ => None,
    };
    if let Some(buckets) = &buckets {
        model = model.with_buckets(buckets.clone());
    }
    let mut optimizer = adamw();
    let mut planner = match layouts {
        LayoutSource::Planner(strategy) => Some(PlannerConfig::new(strategy).with_synchronous(true).init()),
        LayoutSource::Random => None,
    };
    let share = batch / runtime.world_size();
    let mut trained = Trained { losses: vec![], replicated: vec![], layouts: 0, largest_norm: 0.0, overlapped: 0 };
    let mut layout = runtime.layout(0);
    if let Some(planner) = &mut planner {
        planner.on_train_start(runtime)?;
    }
    for step in 0..steps {
        let start = step * batch % items.len() + runtime.rank() * share;
        let batch = TaskBatcher.batch(items[start..start + share].to_vec(), &device);
        runtime.begin_step(&model)?;
        let (loss, mut grads) = runtime.run(|| {
            let loss = model.loss(&batch);
            let value = loss.clone().into_scalar::<f32>();
            (value, GradientsParams::from_grads(loss.backward(), &model))
        })?;
        match &buckets {
            Some(buckets) => {
                trained.overlapped += buckets.num_started();
                buckets.sync(&model, &mut grads)?;
            }
            None if sync == GradientSync::Off => {}
            None => sync_gradients(runtime, &model, &mut grads)?,
        }
        let norm = clip_grad_norm(runtime, &model, &mut grads, clip)?;
        model = optimizer.step(1e-2, model, grads);
        match &mut planner {
            Some(planner) => planner.step(runtime)?,
            None => {
                for layer in 0..runtime.num_layers() {
                    let seed = layout_seed(runtime, step, layer);
                    let experts = runtime.layout(layer).num_experts();
                    runtime.set_layout(
                        layer,
                        random_layout(runtime.topology().world_size(), slots, experts, seed).into(),
                    )?;
                }
            }
        }

        let mut mean = [loss];
        runtime.comm().all_reduce(Operation::new("loss"), ReduceBuffer::F32(&mut mean), ReduceOp::Mean)?;
        trained.losses.push(mean[0]);
        trained.largest_norm = trained.largest_norm.max(norm);
        trained.layouts += usize::from(runtime.layout(0) != layout);
        layout = runtime.layout(0);
    }
    if let Some(planner) = &mut planner {
        planner.on_train_end(runtime)?;
    }
    trained.replicated = model.replicated();
    Ok(trained)
}

/// As [`train_by_hand`], by a `Trainer`. How many reductions overlapped is not known.
///
/// # Errors
///
/// Any [`FsepError`].
///
/// # Panics
///
/// Without gradient sync: a trainer cannot do that.
pub fn train_with_trainer(
    runtime: &FsepRuntime,
    items: &[TaskItem],
    training: &HandTraining,
) -> Result<Trained, FsepError> {
    train_with_optimizer(runtime, items, training, |_| Ok(adamw()))
}

/// As [`train_with_trainer`], with the optimizer's state cut over ranks.
///
/// # Errors
///
/// Any [`FsepError`].
///
/// # Panics
///
/// As there.
pub fn train_with_sharded_optimizer(
    runtime: &FsepRuntime,
    items: &[TaskItem],
    training: &HandTraining,
) -> Result<Trained, FsepError> {
    train_with_optimizer(runtime, items, training, |model| ShardedOptimizer::new(runtime, adamw(), model))
}

fn adamw() -> ModuleOptimizer {
    AdamWConfig::new().with_epsilon(1e-6).init()
}

fn train_with_optimizer<O: TrainOptimizer>(
    runtime: &FsepRuntime,
    items: &[TaskItem],
    training: &HandTraining,
    optimizer: impl FnOnce(&SmallMoe) -> Result<O, FsepError>,
) -> Result<Trained, FsepError> {
    let HandTraining { steps, batch, clip, layouts, sync } = *training;
    let device = device();
    let slots = small_slots(runtime.topology().world_size());
    let mut model = SmallMoe::fsep(runtime, slots, &device)?;
    let mut config = TrainerConfig::new().with_max_grad_norm(clip);
    match sync {
        GradientSync::Off => panic!("a trainer averages gradients"),
        GradientSync::AfterBackward => {}
        GradientSync::Buckets(bytes) => {
            let buckets = GradientBucketsConfig::new().with_bucket_bytes(bytes).init(runtime);
            model = model.with_buckets(buckets.clone());
            config = config.with_gradient_buckets(buckets);
        }
    }
    if let LayoutSource::Planner(strategy) = layouts {
        config = config.with_planner(PlannerConfig::new(strategy).with_synchronous(true));
    }
    let optimizer = optimizer(&model)?;
    let mut trainer = config.init(runtime, model, optimizer)?;
    let share = batch / runtime.world_size();
    let mut trained = Trained { losses: vec![], replicated: vec![], layouts: 0, largest_norm: 0.0, overlapped: 0 };
    let mut layout = runtime.layout(0);
    for step in 0..steps {
        let start = step * batch % items.len() + runtime.rank() * share;
        let batch = TaskBatcher.batch(items[start..start + share].to_vec(), &device);
        let done = trainer.step(1e-2, |model| model.loss(&batch))?;
        if layouts == LayoutSource::Random {
            for layer in 0..runtime.num_layers() {
                let seed = layout_seed(runtime, step, layer);
                let experts = runtime.layout(layer).num_experts();
                runtime
                    .set_layout(layer, random_layout(runtime.topology().world_size(), slots, experts, seed).into())?;
            }
        }
        trained.losses.push(trainer.mean_loss(&done)? as f32);
        trained.largest_norm = trained.largest_norm.max(done.gradient_norm.unwrap_or_default());
        trained.layouts += usize::from(runtime.layout(0) != layout);
        layout = runtime.layout(0);
    }
    trained.replicated = trainer.finish()?.replicated();
    Ok(trained)
}

/// The seed of a layer's random layout after a step: another one in each group.
pub(crate) fn layout_seed(runtime: &FsepRuntime, step: usize, layer: usize) -> u64 {
    (1000 * runtime.groups().replicas().rank() + step * runtime.num_layers() + layer) as u64
}

/// Slots a rank of the small model: the fewest that hold all 8 experts, and one more.
pub fn small_slots(ranks: usize) -> usize {
    8usize.div_ceil(ranks) + usize::from(ranks > 1)
}
