use burn::{
    data::dataloader::batcher::Batcher,
    module::Module,
    nn::{Linear, LinearConfig},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Tensor, TensorData},
    train::{
        InferenceStep, ItemLazy, TrainOutput, TrainStep,
        metric::{Adaptor, LossInput},
    },
};
use burn_fsep::{
    FSEPMoE, FSEPMoEConfig, FsepError, FsepRuntime,
    learner::FsepStats,
    moe::DenseMoE,
    train::{GradientBuckets, broadcast_parameters, clip_grad_norm},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const FEATURES: usize = 6;
const HIDDEN: usize = 8;
const FFN: usize = 10;
const EXPERTS: usize = 8;
const LAYERS: usize = 2;

/// The feed-forward layers of the small model.
#[derive(Module, Debug)]
enum FeedForward {
    Fsep(FSEPMoE),
    Dense(DenseMoE),
}

/// A small regression model with two MoE layers.
#[derive(Module, Debug)]
pub struct SmallMoe {
    input: Linear,
    layers: Vec<FeedForward>,
    output: Linear,
    #[module(skip)]
    runtime: FsepRuntime,
    #[module(skip)]
    buckets: Option<GradientBuckets>,
}

fn moe_config() -> FSEPMoEConfig {
    FSEPMoEConfig::new(HIDDEN, FFN, EXPERTS)
}

impl SmallMoe {
    /// The model with its experts sharded, equal on all ranks. Collective.
    ///
    /// # Errors
    ///
    /// As `broadcast_parameters`.
    pub fn fsep(runtime: &FsepRuntime, slots: usize, device: &Device) -> Result<Self, FsepError> {
        Self::fsep_of(&moe_config().with_slots_per_rank(Some(slots)), runtime, device)
    }

    /// As [`SmallMoe::fsep`], with layers of another configuration.
    ///
    /// # Errors
    ///
    /// As `FSEPMoEConfig::try_init` and `broadcast_parameters`.
    pub fn fsep_of(config: &FSEPMoEConfig, runtime: &FsepRuntime, device: &Device) -> Result<Self, FsepError> {
        let layers = (0..LAYERS).map(|_| config.try_init(runtime, device).map(FeedForward::Fsep));
        let model = Self::new(config.hidden_size, layers.collect::<Result<_, _>>()?, runtime, device);
        broadcast_parameters(runtime, model)
    }

    /// The same model with dense layers.
    ///
    /// # Errors
    ///
    /// As `FSEPMoEConfig::init_dense`.
    pub fn dense(seed: u64, device: &Device) -> Result<Self, FsepError> {
        Self::dense_of(&moe_config(), seed, device)
    }

    /// As [`SmallMoe::dense`], with layers of another configuration.
    ///
    /// # Errors
    ///
    /// As `FSEPMoEConfig::init_dense`.
    pub fn dense_of(config: &FSEPMoEConfig, seed: u64, device: &Device) -> Result<Self, FsepError> {
        let layers = (0..LAYERS).map(|layer| config.init_dense(seed, layer, device).map(FeedForward::Dense));
        Ok(Self::new(config.hidden_size, layers.collect::<Result<_, _>>()?, &FsepRuntime::single(), device))
    }

    fn new(hidden: usize, layers: Vec<FeedForward>, runtime: &FsepRuntime, device: &Device) -> Self {
        Self {
            input: fixed_linear(FEATURES, hidden, 1, device),
            layers,
            output: fixed_linear(hidden, FEATURES, 2, device),
            runtime: runtime.clone(),
            buckets: None,
        }
    }

    /// Prepares every block for `buckets`.
    pub fn with_buckets(mut self, buckets: GradientBuckets) -> Self {
        self.buckets = Some(buckets);
        self
    }

    /// Mean squared error. `[B, 6] -> [1]`
    pub fn loss(&self, batch: &TaskBatch) -> Tensor<1> {
        let mut hidden = self.prepare(&self.input, &batch.inputs).forward(batch.inputs.clone());
        for layer in &self.layers {
            let output = match self.prepare(layer, &hidden) {
                FeedForward::Fsep(moe) => moe.forward(hidden.clone()),
                FeedForward::Dense(moe) => moe.forward(hidden.clone()),
            };
            hidden = hidden + output;
        }
        let output = self.prepare(&self.output, &hidden).forward(hidden);
        (output - batch.targets.clone()).square().mean()
    }

    fn prepare<M: Module>(&self, module: &M, input: &Tensor<2>) -> M {
        match &self.buckets {
            Some(buckets) => buckets.prepare(module, input),
            None => module.clone(),
        }
    }

    /// The loss on a batch of all of the items. Collective.
    pub fn loss_of(&self, items: &[TaskItem]) -> f32 {
        self.loss(&TaskBatcher.batch(items.to_vec(), &self.input.weight.device())).into_scalar::<f32>()
    }

    /// Multiplies the input layer's weights: ranks that do so differently have different replicated parameters.
    pub fn scale_input(&mut self, factor: f64) {
        self.input.weight = self.input.weight.clone().map(|weight| (weight * factor).detach().require_grad());
    }

    /// The bias that each FSEP layer's router has on its choice; without one it is left out.
    pub fn expert_biases(&self) -> Vec<Vec<f32>> {
        let bias = |layer: &FeedForward| match layer {
            FeedForward::Fsep(moe) => {
                moe.router.expert_bias.as_ref().map(|bias| bias.val().into_data().iter().collect())
            }
            FeedForward::Dense(_) => None,
        };
        self.layers.iter().filter_map(bias).collect()
    }

    /// Values of all replicated parameters.
    pub fn replicated(&self) -> Vec<f32> {
        let mut values = Vec::new();
        let mut add = |tensor: Tensor<2>| values.extend(tensor.into_data().iter::<f32>());
        add(self.input.weight.val());
        add(self.output.weight.val());
        for layer in &self.layers {
            match layer {
                FeedForward::Fsep(moe) => add(moe.router.weight.val()),
                FeedForward::Dense(moe) => add(moe.router.weight.val()),
            }
        }
        values
    }
}

/// A linear layer without bias, with values that depend on `seed` alone: Burn's generator is shared by all threads.
pub fn fixed_linear(inputs: usize, outputs: usize, seed: u64, device: &Device) -> Linear {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..inputs * outputs).map(|_| rng.random_range(-0.5..0.5)).collect();
    let mut linear = LinearConfig::new(inputs, outputs).with_bias(false).init(device);
    let weight = Tensor::<2>::from_data(TensorData::new(values, [inputs, outputs]), device);
    linear.weight = burn::module::Param::from_tensor(weight);
    linear
}

/// One input of the task; its target follows from it.
pub type TaskItem = Vec<f32>;

/// `count` inputs that crowd around a few centres, so that routing is skewed.
pub fn task_items(count: usize, seed: u64) -> Vec<TaskItem> {
    let mut rng = StdRng::seed_from_u64(seed);
    let centres: Vec<Vec<f32>> = (0..3).map(|_| (0..FEATURES).map(|_| rng.random_range(-1.5..1.5)).collect()).collect();
    let item = |_| {
        let centre = centres[[0, 0, 0, 1, 1, 2][rng.random_range(0..6)]].clone();
        centre.into_iter().map(|c| c + rng.random_range(-0.4..0.4)).collect()
    };
    (0..count).map(item).collect()
}

/// A batch of the task.
#[derive(Debug, Clone)]
pub struct TaskBatch {
    inputs: Tensor<2>,
    targets: Tensor<2>,
}

/// Makes batches.
#[derive(Debug, Clone)]
pub struct TaskBatcher;

impl Batcher<TaskItem, TaskBatch> for TaskBatcher {
    fn batch(&self, items: Vec<TaskItem>, device: &Device) -> TaskBatch {
        let rows = items.len();
        let inputs = Tensor::<2>::from_data(TensorData::new(items.concat(), [rows, FEATURES]), device);
        let targets = inputs.clone().sin() + inputs.clone().flip([1]) * 0.5;
        TaskBatch { inputs, targets }
    }
}

/// Losses of `steps` Adam steps of the dense model on batches of `batch` items.
///
/// # Panics
///
/// If the model cannot be made.
pub fn dense_loss_curve(seed: u64, steps: usize, batch: usize, items: &[TaskItem], clip: f64) -> Vec<f32> {
    dense_loss_curve_on(&crate::device(), seed, steps, batch, items, clip)
}

/// [`dense_loss_curve`] on a device with gradients.
pub fn dense_loss_curve_on(
    device: &Device,
    seed: u64,
    steps: usize,
    batch: usize,
    items: &[TaskItem],
    clip: f64,
) -> Vec<f32> {
    let mut model = SmallMoe::dense(seed, device).unwrap();
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-6).init();
    (0..steps)
        .map(|step| {
            let batch = TaskBatcher.batch(items[step * batch..(step + 1) * batch].to_vec(), device);
            let loss = model.loss(&batch);
            let value = loss.clone().into_scalar::<f32>();
            let mut grads = GradientsParams::from_grads(loss.backward(), &model);
            clip_grad_norm(&model.runtime, &model, &mut grads, clip).unwrap();
            model = optimizer.step(1e-2, model.clone(), grads);
            value
        })
        .collect()
}

/// What a step of the small model tells the metrics.
#[derive(Debug, Clone)]
pub struct SmallOutput {
    loss: Tensor<1>,
    stats: FsepStats,
}

impl ItemLazy for SmallOutput {
    fn sync(self) -> Result<Self, burn::tensor::ExecutionError> {
        Ok(self)
    }
}

impl Adaptor<LossInput> for SmallOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<FsepStats> for SmallOutput {
    fn adapt(&self) -> FsepStats {
        self.stats.clone()
    }
}

impl TrainStep for SmallMoe {
    type Input = TaskBatch;
    type Output = SmallOutput;

    fn step(&self, batch: TaskBatch) -> TrainOutput<SmallOutput> {
        let loss = self.loss(&batch);
        let output = SmallOutput { loss: loss.clone().inner(), stats: FsepStats(self.runtime.stats()) };
        TrainOutput::new(self, loss.backward(), output)
    }
}

impl InferenceStep for SmallMoe {
    type Input = TaskBatch;
    type Output = SmallOutput;

    fn step(&self, batch: TaskBatch) -> SmallOutput {
        SmallOutput { loss: self.loss(&batch), stats: FsepStats(self.runtime.stats()) }
    }
}
