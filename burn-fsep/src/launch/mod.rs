//! Being a rank: a program's `main` runs as threads, or as the processes of fsep-launch, torchrun, mpirun or Slurm, on CPUs
//! and GPUs, with one call.
//!
//! ```
//! use burn_fsep::{FsepError, FsepRuntimeConfig, launch::RankConfig};
//!
//! fn main() -> std::process::ExitCode {
//!     // Four threads, unless a launcher started this process as one of its ranks.
//!     RankConfig::new().with_threads(4).main(|rank| -> Result<(), FsepError> {
//!         let runtime = rank.runtime(FsepRuntimeConfig::new())?;
//!         let device = rank.device.autodiff();
//!         // .. build the model and train it
//!         Ok(())
//!     })
//! }
//! ```

mod config;
#[cfg(feature = "cube")]
mod cube_devices;
mod device;
mod engine;
mod environment;
mod error;
#[cfg(all(feature = "cli", unix))]
mod launcher;
mod rank;
mod ranks;

pub use config::RankConfig;
pub use device::RankDevice;
pub use engine::Engine;
pub use environment::{EnvironmentError, RankEnvironment, TOKEN_VARIABLE};
pub use error::{LaunchError, RunError};
#[cfg(all(feature = "cli", unix))]
pub use launcher::{LauncherConfig, LauncherError};
pub use rank::Rank;
pub use ranks::Ranks;
