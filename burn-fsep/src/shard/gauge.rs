use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Counts the bytes of unsharded expert weights that are alive on a rank.
#[derive(Debug, Clone, Default)]
pub struct UnshardedGauge(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl UnshardedGauge {
    /// Counts `bytes` for as long as the guard lives. The guard is kept beside the weights it counts.
    pub fn hold(&self, bytes: usize) -> UnshardedGuard {
        let now = self.0.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.0.peak.fetch_max(now, Ordering::Relaxed);
        UnshardedGuard { gauge: self.clone(), bytes }
    }

    /// Bytes alive now.
    pub fn bytes(&self) -> usize {
        self.0.now.load(Ordering::Relaxed)
    }

    /// The most bytes that were alive at once.
    pub fn peak_bytes(&self) -> usize {
        self.0.peak.load(Ordering::Relaxed)
    }
}

/// Unsharded weights being alive.
#[derive(Debug)]
pub struct UnshardedGuard {
    gauge: UnshardedGauge,
    bytes: usize,
}

impl Drop for UnshardedGuard {
    fn drop(&mut self) {
        self.gauge.0.now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_peak() {
        let gauge = UnshardedGauge::default();
        let first = gauge.hold(3);
        drop(gauge.hold(5));
        drop(first);
        assert_eq!((gauge.bytes(), gauge.peak_bytes()), (0, 8));
    }
}
