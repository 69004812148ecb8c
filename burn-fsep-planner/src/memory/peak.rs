use std::fmt;

use super::RankMemory;

/// When in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The loss and its backward pass: all activations and the logits.
    Loss,
    /// Backward of the last layer: all activations, no gradients yet.
    LastLayer,
    /// Backward of the first layer: all gradients, one layer's activations.
    FirstLayer,
    /// Averaging and the optimizer: all gradients.
    Update,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Loss => "loss",
            Phase::LastLayer => "backward of the last layer",
            Phase::FirstLayer => "backward of the first layer",
            Phase::Update => "update",
        })
    }
}

/// The most bytes that are taken at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peak {
    /// When.
    pub phase: Phase,
    /// Bytes of tensors. What an allocator takes of a GPU is more: it rounds, and keeps what it once had.
    pub bytes: u64,
}

impl RankMemory {
    /// Bytes in each phase. Backward frees activations and makes gradients layer by layer, both evenly, so its ends bound it.
    pub fn phases(&self) -> [Peak; 4] {
        // From the first step on.
        let always = self.parameters.total() + self.optimizer.total() + self.accumulated_gradients;
        let activations = self.activations.total();
        // Gradients of slots come after the rows that they are computed from.
        let experts = self.expert_transient.max(self.expert_transient_late + self.slot_gradients) + self.shard_copies;
        let first = self.activations_of_layer + self.layer_transient + experts;
        // One layer's resident gradients are those that the slots' have become already.
        let gradients =
            self.gradients.total() - if self.restored_experts == 0 { self.one_layer_of_gradients() } else { 0 };
        let at = |phase, bytes| Peak { phase, bytes };
        [
            at(Phase::Loss, always + activations + self.kept_experts + self.logits),
            at(
                Phase::LastLayer,
                always + activations + self.restored_experts + self.logits_gradient + self.layer_transient + experts,
            ),
            at(
                Phase::FirstLayer,
                always
                    + gradients
                    + self.single_precision_means
                    + first
                    + self.restored_experts
                    + self.resharding
                    + self.gradient_buckets,
            ),
            at(Phase::Update, always + self.gradients.total() + self.gradient_buckets),
        ]
    }

    /// The most of all phases.
    pub fn peak(&self) -> Peak {
        let [loss, rest @ ..] = self.phases();
        rest.into_iter().fold(loss, |most, phase| if phase.bytes > most.bytes { phase } else { most })
    }

    fn one_layer_of_gradients(&self) -> u64 {
        self.slot_gradients.min(self.gradients.experts)
    }
}
