use thiserror::Error;

use crate::{PlannerError, memory::MemoryError};

/// Why a step cannot be simulated.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SimulatorError {
    /// A setting of the cluster or the model that makes no sense.
    #[error("`{field}` is {value}, expected {expected}")]
    Setting {
        /// The field, as the JSON files spell it.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// Loads or routing that the planner refuses.
    #[error(transparent)]
    Planner(#[from] PlannerError),
    /// Memory that cannot be told.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Nothing to average or to fit.
    #[error("{0}")]
    Empty(String),
}

impl SimulatorError {
    pub(in crate::tools) fn setting(
        field: &'static str,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> SimulatorError {
        Self::Setting { field, value: value.to_string(), expected: expected.into() }
    }

    /// The JSON field at fault, if it is one.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Setting { field, .. } => Some(field),
            Self::Memory(error) => error.field(),
            _ => None,
        }
    }
}
