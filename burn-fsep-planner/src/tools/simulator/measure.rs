//! Measures this machine's constants: ranks as threads of one process.

use std::{
    hint::black_box,
    sync::Barrier,
    time::{Duration, Instant},
};

use super::{MeasuredConstants, SimulatorError, cluster};

/// Elements of the buffer that a rank copies: larger than caches.
const COPY_ELEMENTS: usize = 16 << 20;
/// Rows and columns of a block that stays in the cache.
const BLOCK: usize = 64;

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measurement {
    /// Hidden size `D` of the expert.
    pub hidden_size: usize,
    /// Intermediate size `F` of the expert.
    pub intermediate_size: usize,
    /// Ranks that compute and copy at the same time, one thread each.
    pub ranks: usize,
    /// Bytes a second between nodes, which one machine cannot measure.
    pub inter_node_bytes_per_second: f64,
    /// How long to repeat each measurement at least.
    pub duration: Duration,
}

impl Measurement {
    /// Measures, all ranks at the same time: the three matrix products of a SwiGLU expert in f32, by a simple blocked
    /// loop (a BLAS is faster: measure with your backend if you can), and copies of another rank's memory.
    ///
    /// # Errors
    ///
    /// [`SimulatorError::Setting`] for sizes of 0, sizes above 16,384 or a rate that is not positive.
    pub fn run(&self) -> Result<MeasuredConstants, SimulatorError> {
        for (field, value, most) in [
            ("hidden_size", self.hidden_size, 16_384),
            ("intermediate_size", self.intermediate_size, 16_384),
            ("ranks", self.ranks, 4096),
        ] {
            if !(1..=most).contains(&value) {
                return Err(SimulatorError::setting(field, value, format!("a whole number from 1 to {most}")));
            }
        }
        cluster::positive("inter_node_bytes_per_second", self.inter_node_bytes_per_second)?;
        Ok(MeasuredConstants {
            seconds_per_assignment: self.seconds_per_assignment(),
            bytes_per_token: (self.hidden_size * size_of::<f32>()) as f64,
            intra_node_bytes_per_second: self.copied_bytes_per_second(),
            inter_node_bytes_per_second: self.inter_node_bytes_per_second,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
        })
    }

    fn seconds_per_assignment(&self) -> f64 {
        let (tokens, hidden, inner) = (BLOCK, self.hidden_size, self.intermediate_size);
        self.slowest(|| {
            let x = vec![0.5f32; tokens * hidden];
            let up = vec![0.25f32; hidden * inner];
            let down = vec![0.125f32; inner * hidden];
            let (mut gated, mut raised) = (vec![0.0f32; tokens * inner], vec![0.0f32; tokens * inner]);
            let mut y = vec![0.0f32; tokens * hidden];
            move || {
                matmul(&x, &up, &mut gated, [tokens, hidden, inner]);
                matmul(&x, &up, &mut raised, [tokens, hidden, inner]);
                for (g, u) in gated.iter_mut().zip(&raised) {
                    *g = *g / (1.0 + (-*g).exp()) * u;
                }
                matmul(&gated, &down, &mut y, [tokens, inner, hidden]);
                black_box(&y);
            }
        }) / tokens as f64
    }

    fn copied_bytes_per_second(&self) -> f64 {
        // Sources are written by this thread, so that ranks copy memory that another thread has touched.
        let sources: Vec<Vec<f32>> = (0..self.ranks.min(8)).map(|i| vec![i as f32 + 1.0; COPY_ELEMENTS]).collect();
        let next = std::sync::atomic::AtomicUsize::new(0);
        let seconds = self.slowest(|| {
            let turn = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let source = &sources[turn % sources.len()];
            let mut copy = vec![0.0f32; COPY_ELEMENTS];
            move || {
                copy.copy_from_slice(black_box(source));
                black_box(&copy);
            }
        });
        (COPY_ELEMENTS * size_of::<f32>()) as f64 / seconds
    }

    /// Seconds of one call on the slowest of all ranks, that work at the same time; the first call is a warm-up.
    fn slowest<W: FnMut()>(&self, prepare: impl Fn() -> W + Sync) -> f64 {
        let barrier = Barrier::new(self.ranks);
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..self.ranks)
                .map(|_| {
                    scope.spawn(|| {
                        let mut work = prepare();
                        work();
                        barrier.wait();
                        let start = Instant::now();
                        let mut calls = 0;
                        while calls == 0 || start.elapsed() < self.duration {
                            work();
                            calls += 1;
                        }
                        start.elapsed().as_secs_f64() / f64::from(calls)
                    })
                })
                .collect();
            // A rank cannot fail but by a panic, which is handed on.
            let join = |rank: std::thread::ScopedJoinHandle<'_, f64>| {
                rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            ranks.into_iter().map(join).fold(0.0, f64::max)
        })
    }
}

/// `c = a b` for row-major `a` of `[m, k]` and `b` of `[k, n]`.
fn matmul(a: &[f32], b: &[f32], c: &mut [f32], [m, k, n]: [usize; 3]) {
    c.fill(0.0);
    for k0 in (0..k).step_by(BLOCK) {
        for n0 in (0..n).step_by(4 * BLOCK) {
            let (k1, n1) = ((k0 + BLOCK).min(k), (n0 + 4 * BLOCK).min(n));
            for row in 0..m {
                let out = &mut c[row * n + n0..row * n + n1];
                for inner in k0..k1 {
                    let factor = a[row * k + inner];
                    for (o, w) in out.iter_mut().zip(&b[inner * n + n0..inner * n + n1]) {
                        *o += factor * w;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_right() {
        let (m, k, n) = (3, 70, 300);
        let a: Vec<f32> = (0..m * k).map(|i| (i % 7) as f32).collect();
        let b: Vec<f32> = (0..k * n).map(|i| (i % 5) as f32).collect();
        let mut c = vec![1.0; m * n];
        matmul(&a, &b, &mut c, [m, k, n]);
        for (at, &value) in c.iter().enumerate() {
            let expected: f32 = (0..k).map(|i| a[at / n * k + i] * b[i * n + at % n]).sum();
            assert_eq!(value, expected);
        }
    }

    #[test]
    fn constants_are_positive_and_bad_sizes_are_named() {
        let small = Measurement {
            hidden_size: 32,
            intermediate_size: 48,
            ranks: 2,
            inter_node_bytes_per_second: 1e9,
            duration: Duration::ZERO,
        };
        small.run().unwrap().check().unwrap();
        let bad = |measurement: Measurement| measurement.run().unwrap_err().field().unwrap();
        assert_eq!(bad(Measurement { hidden_size: 0, ..small }), "hidden_size");
        assert_eq!(bad(Measurement { ranks: 0, ..small }), "ranks");
        assert_eq!(bad(Measurement { inter_node_bytes_per_second: -1.0, ..small }), "inter_node_bytes_per_second");
    }
}
