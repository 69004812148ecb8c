//! Optimizers that look at whole matrices (Muon), also for experts.

mod experts;
mod optimizer;
mod probe;

pub use optimizer::WholeMatrixOptimizer;
