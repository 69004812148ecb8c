use burn::optim::ModuleOptimizer;

/// What a rank keeps of the optimizer state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldState {
    /// Of replicated parameters all of it, as every other rank does; of experts that of its shards.
    Whole,
    /// Of replicated parameters that of its own part of each.
    OwnPart,
    /// Of replicated parameters all of it; of experts that of the matrices of those that it steps whole.
    OwnExperts,
}

/// An optimizer whose state checkpoints hold: Burn's [`ModuleOptimizer`], one whose state is cut over ranks
/// ([`ShardedOptimizer`](crate::train::ShardedOptimizer)), or one that steps whole experts
/// ([`WholeMatrixOptimizer`](crate::train::WholeMatrixOptimizer)). What is in the files is the same.
pub trait CheckpointedOptimizer: Clone {
    /// What a rank keeps of the state.
    const HELD: HeldState;

    /// The optimizer that has the state.
    fn module_optimizer(&self) -> &ModuleOptimizer;

    /// The same with the state of `optimizer`, which was made of [`module_optimizer`](Self::module_optimizer).
    fn with_state(&self, optimizer: ModuleOptimizer) -> Self;
}

impl CheckpointedOptimizer for ModuleOptimizer {
    const HELD: HeldState = HeldState::Whole;

    fn module_optimizer(&self) -> &ModuleOptimizer {
        self
    }

    fn with_state(&self, optimizer: ModuleOptimizer) -> Self {
        optimizer
    }
}
