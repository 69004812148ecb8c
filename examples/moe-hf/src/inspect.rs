use std::fmt::Write as _;

use burn_fsep::{
    FSEPMoEConfig,
    hub::ModelConfig,
    planner::memory::{Phase, RankMemory},
};

use crate::{
    InspectArgs, MoeHfError,
    memory::{Batch, JobSizes, components, gib, misfit},
    model::{DecoderConfig, FeedForwardConfig, QkNorm},
};

/// Runs `inspect`.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work, or config.json cannot be read or is of a model that this program does not run;
/// [`MoeHfError::DoesNotFit`], after the report, if `--memory-gib` is not enough for any of the numbers of ranks.
pub fn inspect(args: &InspectArgs) -> Result<(), MoeHfError> {
    args.check()?;
    let config = ModelConfig::open(&args.model)?;
    let decoder = DecoderConfig::from_hub(&config)?.with_layers(args.layers)?;
    let jobs = Jobs::of(args, decoder)?;
    print!("{}\n{}", sizes(&config, &jobs.decoder), jobs.table());
    jobs.fit()
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

/// What a model is.
fn sizes(config: &ModelConfig, decoder: &DecoderConfig) -> String {
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
    text
}

/// The same training by different numbers of ranks.
struct Jobs {
    decoder: DecoderConfig,
    /// What is equal.
    description: String,
    jobs: Vec<(JobSizes, RankMemory)>,
    /// Bytes of a rank.
    limit: Option<u64>,
}

impl Jobs {
    fn of(args: &InspectArgs, decoder: DecoderConfig) -> Result<Self, MoeHfError> {
        let job = |ranks| JobSizes {
            ranks,
            expert_parallel_size: args.expert_parallel_size,
            slots: args.slots,
            kept_layers: args.kept_layers,
            dtype: args.dtype,
            sharded_optimizer: args.sharded_optimizer,
            batch: Batch::OfRank(args.batch),
            seq_len: args.seq_len,
            backend: args.backend,
        };
        let ranks = args.numbers_of_ranks();
        let jobs = ranks.into_iter().map(job).map(|job| Ok((job, job.memory(&decoder)?)));
        let jobs = jobs.collect::<Result<_, MoeHfError>>()?;
        let description = format!(
            "{} x {} tokens, {}, AdamW{}",
            args.batch,
            args.seq_len,
            format!("{:?}", args.dtype).to_lowercase(),
            if args.sharded_optimizer { " with its state cut over ranks" } else { "" }
        );
        Ok(Self { decoder, description, jobs, limit: args.memory_gib.map(|gib| (gib * (1u64 << 30) as f64) as u64) })
    }

    /// A row a component, a column a number of ranks.
    fn table(&self) -> String {
        let mut text = format!("memory of a rank in a training step, in GiB: {}\n", self.description);
        let mut row = |name: &str, cells: Vec<String>| {
            let cells: String = cells.iter().map(|cell| format!(" {cell:>9}")).collect();
            let _ = writeln!(text, "{name:<32}{cells}");
        };
        let cells = |cell: &dyn Fn(&JobSizes, &RankMemory) -> String| -> Vec<String> {
            self.jobs.iter().map(|(job, memory)| cell(job, memory)).collect()
        };
        row("ranks", cells(&|job, _| job.ranks.to_string()));
        row("ranks that share experts", cells(&|job, _| job.group_ranks().to_string()));
        let names = self.jobs.first().map(|(_, memory)| components(memory)).unwrap_or_default();
        for (place, (name, _)) in names.into_iter().enumerate() {
            row(name, cells(&|_, memory| format!("{:.3}", gib(components(memory)[place].1))));
        }
        row("peak", cells(&|_, memory| format!("{:.3}", gib(memory.peak().bytes))));
        // In a word: the table's columns are narrow.
        row(
            "when",
            cells(&|_, memory| match memory.peak().phase {
                Phase::Loss => "loss".into(),
                Phase::LastLayer => "last bwd".into(),
                Phase::FirstLayer => "first bwd".into(),
                Phase::Update => "update".into(),
            }),
        );
        if let Some(limit) = self.limit {
            let fits = |bytes| if bytes <= limit { "yes" } else { "no" };
            row(&format!("fits into {:.3}", gib(limit)), cells(&|_, memory| fits(memory.peak().bytes).into()));
        }
        text.push_str(
            "Not all of it is there at once: the peak is that of the loss, of backward of the last or of the first layer, or of the \
             update. docs/memory.md has the formulae.\n",
        );
        text
    }

    /// Whether there is a number of ranks with which the job fits.
    fn fit(self) -> Result<(), MoeHfError> {
        let Some(limit) = self.limit else { return Ok(()) };
        let misfits = self.jobs.iter().map(|(job, memory)| misfit(job, &self.decoder, memory, limit));
        // Of several numbers of ranks the one that comes nearest.
        let nearest = |error: &MoeHfError| match error {
            MoeHfError::DoesNotFit { needed_gib, .. } => *needed_gib,
            _ => f64::INFINITY,
        };
        let errors: Option<Vec<MoeHfError>> = misfits.collect();
        match errors.and_then(|errors| errors.into_iter().min_by(|a, b| nearest(a).total_cmp(&nearest(b)))) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
