use serde::Serialize;

/// Seconds of a training step by what they are spent on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct StepTime {
    /// Attention, forward and backward.
    pub attention: f64,
    /// Matrix products of the experts of the mean rank.
    pub experts: f64,
    /// Everything else that the mean rank does in memory for its assignments.
    pub elementwise: f64,
    /// Waiting for the most loaded rank, and in forward for the slowest group.
    pub waiting: f64,
    /// Token All-to-Alls.
    pub all_to_all: f64,
    /// Restoring weights and resharding gradients, as far as compute does not hide it.
    pub exposed_restore: f64,
    /// Collectives of tensor parallelism.
    pub tensor_parallel: f64,
    /// What compute loses to communication that it hides.
    pub slowed: f64,
    /// The fixed part of each layer in each micro-batch.
    pub overhead: f64,
    /// Output layer.
    pub head: f64,
    /// Sums of gradients over copies, as far as compute does not hide them, and the optimizer.
    pub update: f64,
}

impl StepTime {
    /// Seconds of the whole step.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// Share of the step that a profiler sees in token All-to-Alls, in which ranks wait for the most loaded one.
    pub fn communication_share(&self) -> f64 {
        (self.waiting + self.all_to_all) / self.total()
    }

    /// The parts with their names.
    pub fn parts(&self) -> [(&'static str, f64); 11] {
        [
            ("attention", self.attention),
            ("experts", self.experts),
            ("elementw.", self.elementwise),
            ("waiting", self.waiting),
            ("all-to-all", self.all_to_all),
            ("restore", self.exposed_restore),
            ("tensor-par", self.tensor_parallel),
            ("slowed", self.slowed),
            ("overhead", self.overhead),
            ("head", self.head),
            ("update", self.update),
        ]
    }

    /// The mean of some steps, part by part; `None` if there are none.
    pub fn mean(steps: &[Self]) -> Option<Self> {
        let mean = |part: fn(&Self) -> f64| steps.iter().map(part).sum::<f64>() / steps.len() as f64;
        (!steps.is_empty()).then(|| Self {
            attention: mean(|s| s.attention),
            experts: mean(|s| s.experts),
            elementwise: mean(|s| s.elementwise),
            waiting: mean(|s| s.waiting),
            all_to_all: mean(|s| s.all_to_all),
            exposed_restore: mean(|s| s.exposed_restore),
            tensor_parallel: mean(|s| s.tensor_parallel),
            slowed: mean(|s| s.slowed),
            overhead: mean(|s| s.overhead),
            head: mean(|s| s.head),
            update: mean(|s| s.update),
        })
    }
}
