//! The launcher behind `fsep-launch`: starts ranks as processes of this machine.

mod config;
mod error;
mod job;
mod output;

pub use config::LauncherConfig;
pub use error::LauncherError;
