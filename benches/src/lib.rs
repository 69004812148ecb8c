//! Side-by-side timing.
//!
//! The competitors take turns in one run, so that a machine that slows down slows all of them; results are ratios of
//! medians.

#![cfg_attr(feature = "libtorch", allow(deprecated))] // Burn's LibTorch backend: see burn-fsep/src/lib.rs

#[cfg(feature = "libtorch")]
pub mod fused;
#[cfg(feature = "gpu")]
mod gpu_backend;
mod plain_moe;

use std::time::Duration;

#[cfg(feature = "gpu")]
pub use gpu_backend::{GpuBackend, HalfPrecision};
pub use plain_moe::PlainMoe;

/// Times of one competitor.
#[derive(Debug, Clone, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Adds a time.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The middle time; zero if there is none.
    pub fn median(&self) -> Duration {
        let mut times = self.0.clone();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

/// Prints one comparison: the ratio of two medians beside its target.
pub fn report(what: &str, ratio: f64, target: &str, is_met: bool) {
    println!("{what:<66} {ratio:>6.2}x   target {target}   {}", if is_met { "met" } else { "NOT MET" });
}
