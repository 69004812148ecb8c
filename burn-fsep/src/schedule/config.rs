use derive_new::new;

/// Which communication is moved behind compute; equal on all ranks. Results do not depend on it.
#[derive(new, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScheduleConfig {
    /// Unshard the next layer's experts while this one computes, in forward. Needs
    /// [`FsepRuntime::begin_step`](crate::FsepRuntime::begin_step) before each forward pass.
    #[new(value = "true")]
    pub prefetch_forward: bool,
    /// The same in backward, of the layer before; the last layer's experts are kept for it.
    #[new(value = "true")]
    pub prefetch_backward: bool,
    /// Return gradients to their shards behind the backward pass of the layer before.
    #[new(value = "true")]
    pub delay_reshard: bool,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl ScheduleConfig {
    /// Every layer unshards, computes and reshards by itself: the paper's ablation, and the least memory.
    pub fn off() -> Self {
        Self { prefetch_forward: false, prefetch_backward: false, delay_reshard: false }
    }

    /// Sets whether experts are prefetched in forward (on by default).
    pub fn with_prefetch_forward(mut self, on: bool) -> Self {
        self.prefetch_forward = on;
        self
    }

    /// Sets whether experts are prefetched in backward (on by default).
    pub fn with_prefetch_backward(mut self, on: bool) -> Self {
        self.prefetch_backward = on;
        self
    }

    /// Sets whether gradients return to their shards behind the next layer's backward pass (on by default).
    pub fn with_delay_reshard(mut self, on: bool) -> Self {
        self.delay_reshard = on;
        self
    }
}
