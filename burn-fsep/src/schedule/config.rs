use burn::config::Config;

/// Which communication is moved behind compute; equal on all ranks. Results do not depend on it.
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
pub struct ScheduleConfig {
    /// Unshard the next layer's experts while this one computes, in forward. Needs
    /// [`FsepRuntime::begin_step`](crate::FsepRuntime::begin_step) before each forward pass.
    #[config(default = true)]
    pub prefetch_forward: bool,
    /// The same in backward, of the layer before.
    #[config(default = true)]
    pub prefetch_backward: bool,
    /// Return gradients to their shards behind the backward pass of the layer before.
    #[config(default = true)]
    pub delay_reshard: bool,
    /// How many of a step's last layers keep their experts from forward to backward, instead of freeing and restoring them once
    /// more: a third of the traffic of their parameters, for the memory of their `C` experts each. `usize::MAX` keeps all, as
    /// FSDP2's `reshard_after_forward=False`. With 0 backward begins by waiting for the last layer's.
    #[config(default = 1)]
    pub kept_layers: usize,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl ScheduleConfig {
    /// Every layer unshards, computes and reshards by itself: the paper's ablation, and the least memory.
    pub fn off() -> Self {
        Self { prefetch_forward: false, prefetch_backward: false, delay_reshard: false, kept_layers: 0 }
    }
}
