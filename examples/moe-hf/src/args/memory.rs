use clap::Args;

/// What takes a rank's memory, and whether a job starts that is estimated not to fit.
#[derive(Args, Debug, Clone, Copy)]
#[command(next_help_heading = "Memory")]
pub struct MemoryArgs {
    /// Cut the optimizer's state over ranks (ZeRO-1): steps are the same, each rank keeps its part.
    #[arg(long)]
    pub sharded_optimizer: bool,
    /// Start although the memory that there is does not hold what the job is estimated to take.
    #[arg(long)]
    pub ignore_memory_estimate: bool,
}
