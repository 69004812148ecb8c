use burn_fsep::planner::memory::{
    ActivationSizes, MemoryError, MemoryModel, MoeSizes, OptimizerState, RankMemory, RankSplit, TrainingSizes,
};
use rank_args::Backend;

use crate::{
    BenchArgs, Dtype, FinetuneArgs, MemoryArgs, MoeHfError, OptimizerArgs, ParallelArgs,
    inspect::ParameterCounts,
    model::{DecoderConfig, FeedForwardConfig},
};

/// Tensors as wide as a dense network that Burn's operations keep of it: gate, its sigmoid, their product, up, and what goes down.
const DENSE_KEPT: usize = 5;

/// Sequences of a step, as the options of commands count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batch {
    /// Of each rank: `bench`.
    OfRank(usize),
    /// Of all ranks together: `finetune`.
    OfJob(usize),
}

impl Batch {
    /// What the option says.
    pub fn option(self) -> usize {
        let (Self::OfRank(count) | Self::OfJob(count)) = self;
        count
    }

    /// The same with another number.
    pub fn with(self, count: usize) -> Self {
        match self {
            Self::OfRank(_) => Self::OfRank(count),
            Self::OfJob(_) => Self::OfJob(count),
        }
    }

    /// Of the rank that has most. A rank without any computes a padded one.
    fn of_rank(self, ranks: usize) -> usize {
        match self {
            Self::OfRank(count) => count,
            Self::OfJob(count) => count.div_ceil(ranks.max(1)),
        }
    }
}

/// The options that memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JobSizes {
    pub ranks: usize,
    pub expert_parallel_size: Option<usize>,
    pub slots: Option<usize>,
    pub kept_layers: usize,
    pub dtype: Dtype,
    pub sharded_optimizer: bool,
    pub batch: Batch,
    pub seq_len: usize,
    pub backend: Backend,
}

impl JobSizes {
    /// Those of `bench` with so many ranks.
    pub fn of_bench(args: &BenchArgs, ranks: usize) -> Self {
        Self::of(&args.parallel, &args.memory, ranks, Batch::OfRank(args.batch), args.seq_len)
    }

    /// Those of `finetune` with so many ranks.
    pub fn of_finetune(args: &FinetuneArgs, ranks: usize) -> Self {
        let OptimizerArgs { batch, seq_len, .. } = args.optimizer;
        Self::of(&args.parallel, &args.memory, ranks, Batch::OfJob(batch), seq_len)
    }

    fn of(parallel: &ParallelArgs, memory: &MemoryArgs, ranks: usize, batch: Batch, seq_len: usize) -> Self {
        Self {
            ranks,
            expert_parallel_size: parallel.ranks.expert_parallel_size,
            slots: parallel.ranks.slots,
            kept_layers: parallel.ranks.kept_layers,
            dtype: parallel.dtype,
            sharded_optimizer: memory.sharded_optimizer,
            batch,
            seq_len,
            backend: parallel.ranks.backend,
        }
    }

    /// Ranks that share the experts.
    pub fn group_ranks(&self) -> usize {
        self.expert_parallel_size.unwrap_or(self.ranks)
    }

    /// What a rank's memory has to hold for a decoder.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Option`] naming an option that makes no sense.
    pub fn memory(&self, decoder: &DecoderConfig) -> Result<RankMemory, MoeHfError> {
        let split = RankSplit {
            world_size: self.ranks as u64,
            group_ranks: self.group_ranks() as u64,
            zero: self.sharded_optimizer,
        };
        let refuse = |error: MemoryError| MoeHfError::Option(self.explain(&error));
        split.check().map_err(refuse)?;
        RankMemory::of(&self.model(decoder), &self.training(), split).map_err(refuse)
    }

    /// The planner's names of sizes are not those of options.
    fn explain(&self, error: &MemoryError) -> String {
        let option = match error.field() {
            Some("groups") => format!("--expert-parallel-size {}: ", self.group_ranks()),
            Some("slots_per_rank") => {
                self.slots.map_or(String::new(), |slots| format!("--slots {slots} of {} ranks: ", self.group_ranks()))
            }
            Some("tokens") => format!("--batch {} of --seq-len {}: ", self.batch.option(), self.seq_len),
            _ => String::new(),
        };
        format!("{option}{error}")
    }

    fn training(&self) -> TrainingSizes {
        let sizes = match self.dtype {
            Dtype::F32 => TrainingSizes::f32(),
            Dtype::Mixed => TrainingSizes::mixed(),
            Dtype::Bf16 => TrainingSizes::bf16(),
        };
        TrainingSizes {
            tokens: (self.batch.of_rank(self.ranks) as u64).saturating_mul(self.seq_len as u64),
            // FusedAdamWConfig as the commands have it: two moments of the parameter's type.
            optimizer: OptimizerState { tensors: 2, element_bytes: sizes.parameter_bytes, master_bytes: 0 },
            kept_layers: self.kept_layers as u64,
            ..sizes
        }
    }

    fn model(&self, decoder: &DecoderConfig) -> MemoryModel {
        MemoryModel {
            replicated_parameters: ParameterCounts::of(decoder).replicated as u64,
            moe: self.moe(decoder),
            activations: self.activations(decoder),
        }
    }

    fn moe(&self, decoder: &DecoderConfig) -> MoeSizes {
        let mut sparse = decoder.feed_forwards.iter().filter_map(|layer| match layer {
            FeedForwardConfig::Sparse(moe) => Some(moe),
            FeedForwardConfig::Dense(_) => None,
        });
        // All of them are alike: `DecoderConfig::from_hub`.
        let Some(moe) = sparse.next() else {
            return MoeSizes {
                layers: 0,
                experts: 0,
                expert_parameters: 0,
                hidden_size: decoder.hidden_size as u64,
                intermediate_size: 0,
                gated: true,
                topk: 0,
                slots_per_rank: 0,
            };
        };
        let (experts, ranks) = (moe.num_moe_experts, self.group_ranks());
        MoeSizes {
            layers: 1 + sparse.count() as u64,
            experts: experts as u64,
            expert_parameters: 3 * (moe.hidden_size * moe.moe_ffn_hidden_size) as u64,
            hidden_size: moe.hidden_size as u64,
            intermediate_size: moe.moe_ffn_hidden_size as u64,
            gated: true,
            topk: moe.moe_router_topk as u64,
            slots_per_rank: self.slots.unwrap_or((experts.div_ceil(ranks) + 1).min(experts)) as u64,
        }
    }

    /// docs/memory.md has these as `A`; LibTorch's kernels keep less than Burn's operations, one by one.
    fn activations(&self, decoder: &DecoderConfig) -> ActivationSizes {
        let hidden = decoder.hidden_size;
        let [query, key] = [decoder.num_heads, decoder.num_key_value_heads].map(|heads| heads * decoder.head_dim);
        let normalised = if decoder.qk_norm.is_some() { query + key } else { 0 };
        let networks: usize = decoder
            .feed_forwards
            .iter()
            .map(|layer| match layer {
                FeedForwardConfig::Dense(width) => *width,
                FeedForwardConfig::Sparse(moe) => moe.shared_expert.map_or(0, |shared| shared.ffn_hidden_size),
            })
            .sum();
        let layers = decoder.feed_forwards.len().max(1);
        let (elements, single, once, single_once) = if self.backend == Backend::Libtorch {
            // Inputs of both halves of a layer, plain and normalised; logarithms of attention's sums.
            (4 * hidden, decoder.num_heads, 2 * hidden, 0)
        } else {
            // Normalisation keeps its input in single precision, what it divides, and what it multiplies; attention all its weights, and
            // in single precision what these are quotients of.
            let weights = decoder.num_heads.saturating_mul(self.seq_len);
            (
                (4 * hidden).saturating_add(weights),
                (2 * hidden + normalised).saturating_add(weights),
                2 * hidden,
                hidden,
            )
        };
        let elements = elements.saturating_add(3 * (query + key) + normalised);
        // The last normalisation is in no layer.
        let of_layers = |all: usize| all.div_ceil(layers) as u64;
        ActivationSizes {
            layers: decoder.feed_forwards.len() as u64,
            elements_per_token: (elements as u64).saturating_add(of_layers(DENSE_KEPT * networks + once)),
            f32_elements_per_token: (single as u64).saturating_add(of_layers(single_once)),
            vocabulary: decoder.vocab_size as u64,
        }
    }
}

/// The components of an estimate, and their bytes.
pub(crate) fn components(memory: &RankMemory) -> Vec<(&'static str, u64)> {
    let activations = &memory.activations;
    vec![
        ("parameters, replicated", memory.parameters.replicated),
        ("parameters, expert shards", memory.parameters.experts),
        ("gradients, replicated", memory.gradients.replicated),
        ("gradients, expert shards", memory.gradients.experts),
        ("optimizer state, replicated", memory.optimizer.replicated),
        ("optimizer state, expert shards", memory.optimizer.experts),
        ("restored experts", memory.restored_experts),
        ("gradients of a layer's slots", memory.slot_gradients),
        ("on their way to the shards", memory.resharding),
        ("copies of a layer's shards", memory.shard_copies),
        ("buckets of gradients", memory.gradient_buckets),
        ("activations, attention", activations.attention),
        ("activations, experts", activations.experts),
        ("activations, routing", activations.routing),
        ("copies of parameters", activations.parameter_copies),
        ("logits and loss", memory.logits),
        ("backward of a layer's experts", memory.expert_transient.max(memory.expert_transient_late)),
        ("backward of a layer, besides", memory.layer_transient),
    ]
}
