//! Repair of a layout in the step itself, when the exact counts show that it pays.

mod config;
mod exchange;
mod layout_repair;
#[cfg(test)]
mod tests;

pub use config::RepairConfig;
pub use layout_repair::LayoutRepair;
