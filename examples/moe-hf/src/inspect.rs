use std::fmt::Write as _;

use burn_fsep::{FSEPMoEConfig, hub::ModelConfig};

use crate::{
    InspectArgs, MoeHfError,
    args::check_positive,
    model::{DecoderConfig, FeedForwardConfig, QkNorm},
};

/// Runs `inspect`.
///
/// # Errors
///
/// [`MoeHfError`] if config.json cannot be read, or is of a model that this program does not run.
pub fn inspect(args: &InspectArgs) -> Result<(), MoeHfError> {
    for &ranks in &args.ranks {
        check_positive([("--ranks", ranks)])?;
    }
    let config = ModelConfig::open(&args.model)?;
    print!("{}", report(&config, &DecoderConfig::from_hub(&config)?, &args.ranks));
    Ok(())
}

/// Parameters of a model, by how ranks hold them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCounts {
    /// Each rank has all of them.
    pub replicated: usize,
    /// Of all experts of all layers: sharded.
    pub experts: usize,
    /// Of the experts that a token does not go to.
    pub idle: usize,
}

impl ParameterCounts {
    /// Those of a decoder.
    pub fn of(config: &DecoderConfig) -> Self {
        let DecoderConfig { hidden_size: hidden, head_dim, num_heads, num_key_value_heads, .. } = *config;
        let (query, key) = (num_heads * head_dim, num_key_value_heads * head_dim);
        let biases = if config.qkv_bias { query + 2 * key } else { 0 } + if config.output_bias { hidden } else { 0 };
        let norms = match config.qk_norm {
            None => 0,
            Some(QkNorm::Head) => 2 * head_dim,
            Some(QkNorm::Projection) => query + key,
        };
        let attention = 2 * hidden * (query + key) + biases + norms + 2 * hidden;
        let embeddings = if config.tie_word_embeddings { 1 } else { 2 } * config.vocab_size * hidden;
        let mut counts = Self { replicated: embeddings + hidden, experts: 0, idle: 0 };
        for feed_forward in &config.feed_forwards {
            counts.replicated += attention;
            match feed_forward {
                FeedForwardConfig::Dense(width) => counts.replicated += 3 * hidden * width,
                FeedForwardConfig::Sparse(moe) => {
                    let experts = moe.num_moe_experts;
                    counts.experts += experts * expert(moe);
                    counts.idle += (experts - moe.moe_router_topk) * expert(moe);
                    let shared = moe
                        .shared_expert
                        .map_or(0, |shared| 3 * hidden * shared.ffn_hidden_size + if shared.gate { hidden } else { 0 });
                    counts.replicated += hidden * experts + shared;
                }
            }
        }
        counts
    }

    /// All.
    pub fn total(self) -> usize {
        self.replicated + self.experts
    }

    /// Those that a token's computation takes.
    pub fn active(self) -> usize {
        self.total() - self.idle
    }
}

/// Parameters of an expert.
fn expert(moe: &FSEPMoEConfig) -> usize {
    3 * moe.hidden_size * moe.moe_ffn_hidden_size
}

fn report(config: &ModelConfig, decoder: &DecoderConfig, ranks: &[usize]) -> String {
    let counts = ParameterCounts::of(decoder);
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<28}{value}");
    };
    let sparse = decoder.feed_forwards.iter().filter(|layer| matches!(layer, FeedForwardConfig::Sparse(_))).count();
    line("family", config.family.to_string());
    line("layers", format!("{}, {sparse} of them with experts", decoder.feed_forwards.len()));
    line("hidden size", decoder.hidden_size.to_string());
    line(
        "attention",
        format!(
            "{} heads of {}, {} for keys and values; rope base {}, {}",
            decoder.num_heads,
            decoder.head_dim,
            decoder.num_key_value_heads,
            decoder.rope.theta,
            match config.sliding_window {
                Some(window) => format!("windows of {window}"),
                None => "no window".into(),
            }
        ),
    );
    line(
        "experts",
        format!(
            "{} of intermediate size {}, {} a token{}",
            config.moe.num_experts,
            config.moe.intermediate_size,
            config.moe.num_experts_per_tok,
            match config.moe.shared_expert_intermediate_size {
                Some(size) => format!(", and a shared one of {size}"),
                None => String::new(),
            }
        ),
    );
    line("vocabulary", decoder.vocab_size.to_string());
    line("parameters", format!("{} ({:.3} billion)", counts.total(), counts.total() as f64 / 1e9));
    line("parameters a token", format!("{} ({:.3} billion)", counts.active(), counts.active() as f64 / 1e9));
    let _ = writeln!(text, "\nmemory of a rank that trains with AdamW, without activations, in GiB:");
    let _ = writeln!(
        text,
        "{:>6} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "ranks", "type", "weights", "gradients", "AdamW", "unsharded", "sum", "full copy"
    );
    for &ranks in ranks {
        for (name, parameter, compute) in [("f32", 4, 4), ("mixed", 4, 2), ("bf16", 2, 2)] {
            let memory = Memory::of(decoder, counts, ranks, parameter, compute);
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            let _ = writeln!(
                text,
                "{ranks:>6} {name:>6} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3}",
                gib(memory.weights),
                gib(memory.gradients),
                gib(memory.optimizer),
                gib(memory.unsharded),
                gib(memory.weights + memory.gradients + memory.optimizer + memory.unsharded),
                gib(4 * counts.total() * parameter),
            );
        }
    }
    text.push_str(
        "unsharded: the experts of two layers, that computes and that is on its way, and as many gradients\n",
    );
    text
}

/// Bytes that a rank holds.
struct Memory {
    weights: usize,
    gradients: usize,
    optimizer: usize,
    unsharded: usize,
}

impl Memory {
    fn of(config: &DecoderConfig, counts: ParameterCounts, ranks: usize, parameter: usize, compute: usize) -> Self {
        let held = counts.replicated + counts.experts.div_ceil(ranks);
        let slots = |moe: &FSEPMoEConfig| {
            let experts = moe.num_moe_experts;
            moe.slots_per_rank.unwrap_or((experts.div_ceil(ranks) + 1).min(experts)) * expert(moe)
        };
        let mut layers: Vec<usize> = config
            .feed_forwards
            .iter()
            .map(|layer| match layer {
                FeedForwardConfig::Sparse(moe) => slots(moe),
                FeedForwardConfig::Dense(_) => 0,
            })
            .collect();
        layers.sort_unstable_by(|a, b| b.cmp(a));
        let two: usize = layers.iter().take(2).sum();
        Self {
            weights: held * parameter,
            gradients: held * parameter,
            optimizer: 2 * held * parameter,
            // One rank has whole experts as they are.
            unsharded: if ranks == 1 { 0 } else { 2 * two * compute },
        }
    }
}
