use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig,
        attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask},
    },
    tensor::{Device, FloatDType, Int, Tensor, activation::log_softmax, ops::PadMode},
    train::{
        InferenceStep, ItemLazy, TrainOutput, TrainStep,
        metric::{Adaptor, LossInput},
    },
};
use burn_fsep::{
    FSEPMoE, FsepError, FsepRuntime,
    learner::FsepStats,
    moe::DenseMoE,
    train::{GradientBuckets, token_mean},
};

use crate::{Args, data::LmBatch, record::StepRecorder};

/// Values of a byte.
const VOCABULARY: usize = 256;
/// Bytes whose embeddings are summed at each place: its own and those before it.
const NEIGHBOURS: usize = 4;

/// The feed-forward layer of a block.
#[derive(Module, Debug)]
pub(crate) enum FeedForward {
    /// Experts sharded over ranks.
    Fsep(FSEPMoE),
    /// All experts on one rank.
    Dense(DenseMoE),
}

impl FeedForward {
    fn forward(&self, hidden: Tensor<3>) -> (Tensor<3>, Option<Tensor<1>>) {
        let output = match self {
            FeedForward::Fsep(moe) => moe.forward_with_losses(hidden),
            FeedForward::Dense(moe) => moe.try_forward(hidden).unwrap_or_else(|error| panic!("{error}")),
        };
        (output.hidden, output.aux_loss)
    }
}

/// One transformer layer, normalised before attention and feed-forward.
#[derive(Module, Debug)]
pub(crate) struct Block {
    attention_norm: RmsNorm,
    attention: MultiHeadAttention,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

/// A decoder-only transformer over bytes.
#[derive(Module, Debug)]
pub(crate) struct MoeLm {
    /// Of each byte and of those just before it, so that a short training soon gets beyond single bytes.
    embeddings: Vec<Embedding>,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    /// Element type in which the blocks compute.
    #[module(skip)]
    compute_dtype: FloatDType,
    #[module(skip)]
    buckets: GradientBuckets,
    #[module(skip)]
    runtime: FsepRuntime,
    #[module(skip)]
    recorder: StepRecorder,
}

impl MoeLm {
    pub fn new(
        args: &Args,
        runtime: &FsepRuntime,
        buckets: &GradientBuckets,
        recorder: StepRecorder,
        device: &Device,
    ) -> Result<Self, FsepError> {
        let Args { model, training, .. } = args;
        let moe = args.moe_config();
        let block = |layer: usize| -> Result<Block, FsepError> {
            let feed_forward = if training.dense {
                FeedForward::Dense(moe.init_dense(training.seed, layer, device)?)
            } else {
                FeedForward::Fsep(moe.try_init(runtime, device)?)
            };
            Ok(Block {
                attention_norm: RmsNormConfig::new(model.hidden).init(device),
                attention: MultiHeadAttentionConfig::new(model.hidden, model.heads).with_dropout(0.0).init(device),
                feed_forward_norm: RmsNormConfig::new(model.hidden).init(device),
                feed_forward,
            })
        };
        let embedding = |rows: usize| {
            let initializer = burn::module::Initializer::Normal { mean: 0.0, std: 0.02 };
            EmbeddingConfig::new(rows, model.hidden).with_initializer(initializer).init(device)
        };
        Ok(Self {
            embeddings: (0..NEIGHBOURS).map(|_| embedding(VOCABULARY)).collect(),
            positions: embedding(training.context),
            blocks: (0..model.layers).map(block).collect::<Result<_, _>>()?,
            norm: RmsNormConfig::new(model.hidden).init(device),
            head: LinearConfig::new(model.hidden, VOCABULARY).with_bias(false).init(device),
            compute_dtype: args.compute_dtype().unwrap_or(FloatDType::F32),
            buckets: buckets.clone(),
            runtime: runtime.clone(),
            recorder,
        })
    }

    /// Logits of the next byte at each place, and the auxiliary loss. `[B, L] -> [B, L, 256]`
    pub fn forward(&self, bytes: Tensor<2, Int>) -> (Tensor<3>, Option<Tensor<1>>) {
        let [batch, context] = bytes.dims();
        let device = bytes.device();
        let places = Tensor::<1, Int>::arange(0..context as i64, &device).unsqueeze::<2>();
        let mask = generate_autoregressive_mask(batch, context, &device);
        let mut hidden = self.positions.forward(places).repeat_dim(0, batch);
        for (distance, embedding) in self.embeddings.iter().enumerate().take(context) {
            let earlier = bytes.clone().slice([0..batch, 0..context - distance]);
            hidden = hidden + embedding.forward(earlier.pad([(0, 0), (distance, 0)], PadMode::Constant(0.0)));
        }
        hidden = hidden.cast(self.compute_dtype);
        let mut aux_loss: Option<Tensor<1>> = None;
        for block in &self.blocks {
            let block = self.buckets.prepare(block, &hidden);
            let span = self.runtime.timeline().and_then(|timeline| timeline.compute("attention"));
            let input = MhaInput::self_attn(block.attention_norm.forward(hidden.clone())).mask_attn(mask.clone());
            hidden = hidden + block.attention.forward(input).context;
            drop(span);
            let (output, aux) = block.feed_forward.forward(block.feed_forward_norm.forward(hidden.clone()));
            hidden = hidden + output;
            aux_loss = match (aux_loss, aux) {
                (Some(a), Some(b)) => Some(a + b),
                (a, b) => a.or(b),
            };
        }
        (self.head.forward(self.norm.forward(hidden.cast(FloatDType::F32))), aux_loss)
    }

    /// The rank's loss in nat a byte, whose mean over ranks is the mean over all bytes, and the auxiliary loss.
    fn loss(&self, batch: LmBatch) -> (Tensor<1>, Option<Tensor<1>>) {
        let (logits, aux_loss) = self.forward(batch.inputs);
        let [b, l, v] = logits.dims();
        let log_probs = log_softmax(logits.reshape([b * l, v]), 1);
        let loss = -log_probs.gather(1, batch.targets.reshape([b * l, 1])).sum();
        (token_mean(&self.runtime, loss, b * l), aux_loss)
    }
}

/// What a step tells the metrics.
#[derive(Debug, Clone)]
pub(crate) struct LmOutput {
    loss: Tensor<1>,
    stats: FsepStats,
}

impl ItemLazy for LmOutput {
    fn sync(self) -> Result<Self, burn::tensor::ExecutionError> {
        Ok(self)
    }
}

impl Adaptor<LossInput> for LmOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<FsepStats> for LmOutput {
    fn adapt(&self) -> FsepStats {
        self.stats.clone()
    }
}

impl TrainStep for MoeLm {
    type Input = LmBatch;
    type Output = LmOutput;

    fn step(&self, batch: LmBatch) -> TrainOutput<LmOutput> {
        let (loss, aux_loss) = self.loss(batch);
        self.recorder.train_loss(loss.clone().inner());
        let output = LmOutput { loss: loss.clone().inner(), stats: FsepStats(self.runtime.stats()) };
        let total = aux_loss.into_iter().fold(loss, |total, aux| total + aux);
        TrainOutput::new(self, total.backward(), output)
    }
}

impl InferenceStep for MoeLm {
    type Input = LmBatch;
    type Output = LmOutput;

    fn step(&self, batch: LmBatch) -> LmOutput {
        let (loss, _) = self.loss(batch);
        self.recorder.valid_loss(loss.clone().into_scalar::<f32>());
        LmOutput { loss, stats: FsepStats(self.runtime.stats()) }
    }
}
