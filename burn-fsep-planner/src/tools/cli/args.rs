use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::{PlannerStrategy, tools::workload::Workload};

/// Plans expert layouts and token dispatch for fully sharded expert parallelism.
#[derive(Parser, Debug)]
#[command(name = "fsep-planner", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Plans one step from a JSON file of routing counts.
    Plan(PlanArgs),
    /// Replays a trace of routing counts, or a workload, by strategy: each step's layout from the steps before.
    Replay(ReplayArgs),
    /// Replays a trace and writes a page with figures: loads, imbalance over steps, expert heat, solve times.
    Report(ReportArgs),
    /// Tells what a rank's memory has to hold, and whether it fits.
    Memory(MemoryArgs),
    /// Simulates training steps of a model on a cluster by strategy, in seconds.
    Simulate(SimulateArgs),
    /// Finds for worlds of 64 to 4096 ranks how many of them should share the experts.
    Scale(ScaleArgs),
    /// Replays W0 to W7 on 8, 64 and 256 ranks, with and without repairs in the step: balance, and what planning costs.
    Benchmark(BenchmarkArgs),
    /// Measures this machine's compute and copy rates for `simulate`, ranks as threads.
    Calibrate(CalibrateArgs),
}

/// Options of `plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// JSON: `{"ranks_per_node": G, "slots_per_rank": C, "counts": [[n of expert] of source rank], "history": [counts]}`.
    /// With a history, the layout is made from it alone and the dispatch from the counts.
    #[arg(long)]
    pub input: PathBuf,
    /// Where to write the plan as JSON.
    #[arg(long)]
    pub output: PathBuf,
    /// static, paper, eplb, eplb-hierarchical, flex-moe, random or min-max.
    #[arg(long, default_value_t = PlannerStrategy::MinMax)]
    pub strategy: PlannerStrategy,
    /// Seed of random choices.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Options of `replay`.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// What to replay.
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// Options of `report`.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// What to replay.
    #[command(flatten)]
    pub trace: TraceArgs,
    /// Where to write the page (HTML, in one file).
    #[arg(long)]
    pub output: PathBuf,
}

/// A trace or a workload, and how to replay it.
#[derive(Args, Debug)]
pub struct TraceArgs {
    /// CSV: layer,step,src_rank,expert0,expert1,.. (for example what `moe-lm --record-trace` writes)
    #[arg(long, required_unless_present_any = ["workload", "tokens"])]
    pub trace: Option<PathBuf>,
    /// CSV of each token's experts instead: layer,step,src_rank,choice0,choice1,.. `replay` then also tells how many rows the tokens
    /// need to other ranks. Needs --experts.
    #[arg(long, requires = "experts", conflicts_with_all = ["trace", "workload"])]
    pub tokens: Option<PathBuf>,
    /// Generated counts instead of a trace: w0-balanced, w1-hot-expert-set, w2-hot-rank, w3-spread-hot-experts,
    /// w4-source-ragged, w5-zero-expert-rank, w6-rotating-hotspot, w7-burst, PERCENT:EXPERTS (percent of the load on so
    /// many experts, as 80:4), zipf:MAX_OVER_MEAN, zipf-power:POWER, log-normal:SIGMA, sudden-shift, slow-drift, periodic
    /// or near-uniform.
    #[arg(long, requires = "ranks", conflicts_with = "trace")]
    pub workload: Option<Workload>,
    /// Ranks of the workload.
    #[arg(long, requires = "workload")]
    pub ranks: Option<usize>,
    /// Experts of the workload, or of `--tokens`.
    #[arg(long, default_value_t = 64)]
    pub experts: usize,
    /// Experts per token of the workload.
    #[arg(long, default_value_t = 2)]
    pub topk: usize,
    /// Tokens on one rank in one step of the workload.
    #[arg(long, default_value_t = 4096)]
    pub tokens_per_rank: u32,
    /// Layers of the workload.
    #[arg(long, default_value_t = 1)]
    pub layers: usize,
    /// Steps of the workload.
    #[arg(long, default_value_t = 24)]
    pub steps: usize,
    /// Slots a rank.
    #[arg(long)]
    pub slots_per_rank: usize,
    /// Ranks on a node.
    #[arg(long)]
    pub ranks_per_node: usize,
    /// static, paper, eplb, eplb-hierarchical, flex-moe, random or min-max; all if none is named.
    #[arg(long)]
    pub strategy: Vec<PlannerStrategy>,
    /// Steps at the start of each layer that do not count: the first has no history.
    #[arg(long, default_value_t = 1)]
    pub skip_steps: usize,
    /// Repair layouts in the step itself, once its counts are known.
    #[arg(long)]
    pub repair: bool,
    /// Seed of random choices, and of the workload.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// A cluster and a model.
#[derive(Args, Debug)]
pub struct SpecArgs {
    /// JSON of the cluster: examples/simulate/a100-4x8.json has the fields.
    #[arg(long)]
    pub cluster: PathBuf,
    /// JSON of the model and its batch: examples/simulate/mixtral-8x7b-e8k2.json has the fields.
    #[arg(long)]
    pub model: PathBuf,
    /// JSON of measured constants, as `calibrate` writes it, in place of the cluster's own.
    #[arg(long)]
    pub constants: Option<PathBuf>,
}

/// Options of `memory`.
#[derive(Args, Debug)]
pub struct MemoryArgs {
    /// The cluster and the model.
    #[command(flatten)]
    pub specs: SpecArgs,
    /// Ranks that share the experts; all if not given.
    #[arg(long)]
    pub groups: Option<usize>,
    /// The optimizer's state is cut: of replicated parameters over all ranks, of expert shards over their replicas.
    #[arg(long)]
    pub zero: bool,
    /// Largest load of a rank over the mean load: what static expert parallelism has, or 1 with a planner.
    #[arg(long, default_value_t = 1.0)]
    pub imbalance: f64,
}

/// Options of `simulate`.
#[derive(Args, Debug)]
pub struct SimulateArgs {
    /// The cluster and the model.
    #[command(flatten)]
    pub specs: SpecArgs,
    /// CSV: layer,step,src_rank,expert0,expert1,.. Without it, routing is drawn from log-normal expert loads.
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Largest load of a rank over the mean load, of every layer, in place of a trace and of strategies; may be repeated.
    #[arg(long, conflicts_with_all = ["trace", "strategy", "sigma", "steps"])]
    pub imbalance: Vec<f64>,
    /// static, paper or min-max; all that the model allows if none is named.
    #[arg(long)]
    pub strategy: Vec<PlannerStrategy>,
    /// Standard deviation of the logarithm of drawn expert loads.
    #[arg(long, default_value_t = 0.8, conflicts_with = "trace")]
    pub sigma: f64,
    /// Steps to draw.
    #[arg(long, default_value_t = 10, conflicts_with = "trace")]
    pub steps: usize,
    /// Steps at the start that do not count: the first has no history.
    #[arg(long, default_value_t = 1)]
    pub skip_steps: usize,
    /// Repair layouts in the step itself, once its counts are known.
    #[arg(long)]
    pub repair: bool,
    /// Ranks that share the experts; all if not given.
    #[arg(long)]
    pub groups: Option<usize>,
    /// The optimizer's state is cut over ranks.
    #[arg(long)]
    pub zero: bool,
    /// Seed of drawn routing and of random choices.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Options of `scale`.
#[derive(Args, Debug)]
pub struct ScaleArgs {
    /// The cluster, of which only nodes are more or fewer, and the model, with the tokens of a rank.
    #[command(flatten)]
    pub specs: SpecArgs,
    /// World sizes: 64, 128 and so on to 4096 if none is named; may be repeated.
    #[arg(long)]
    pub ranks: Vec<usize>,
    /// The optimizer's state is cut over ranks.
    #[arg(long)]
    pub zero: bool,
    /// Tells of all sizes of groups, not of the best alone.
    #[arg(long)]
    pub all: bool,
    /// Larger groups are not tried.
    #[arg(long, default_value_t = 512)]
    pub most_group_ranks: usize,
    /// Who plans: min-max, with repairs in the step, or any other without.
    #[arg(long, default_value_t = PlannerStrategy::MinMax)]
    pub strategy: PlannerStrategy,
    /// Standard deviation of the logarithm of drawn expert loads.
    #[arg(long, default_value_t = 0.8)]
    pub sigma: f64,
    /// Steps to draw; the first does not count.
    #[arg(long, default_value_t = 4)]
    pub steps: usize,
    /// Seed of drawn routing.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to draw the steps by size of groups (SVG).
    #[arg(long)]
    pub figure: Option<PathBuf>,
}

/// Options of `benchmark`.
#[derive(Args, Debug)]
pub struct BenchmarkArgs {
    /// Numbers of ranks: 8, 64 and 256 if none is named; may be repeated.
    #[arg(long)]
    pub ranks: Vec<usize>,
    /// Workloads, named as for `replay`: W0 to W7 if none is named; may be repeated.
    #[arg(long)]
    pub workload: Vec<Workload>,
    /// Steps of each workload; the first does not count, as it has no history.
    #[arg(long, default_value_t = 24)]
    pub steps: usize,
    /// Seed of random choices, and of the workloads.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Options of `calibrate`.
#[derive(Args, Debug)]
pub struct CalibrateArgs {
    /// Where to write the constants as JSON.
    #[arg(long)]
    pub output: PathBuf,
    /// Bytes a second of one port between nodes, which one machine cannot measure.
    #[arg(long)]
    pub inter_node_bytes_per_second: f64,
    /// Hidden size of the expert to measure.
    #[arg(long, default_value_t = 1024)]
    pub hidden_size: usize,
    /// Intermediate size of the expert to measure.
    #[arg(long, default_value_t = 2048)]
    pub intermediate_size: usize,
    /// Ranks that work at the same time, one thread each; as many as there are cores if not given.
    #[arg(long)]
    pub ranks: Option<usize>,
}
