//! What planners have learned, as bytes: checkpoints keep it, so that a training that goes on plans as if it had not
//! stopped.

use serde::{Serialize, de::DeserializeOwned};

use crate::PlannerError;

/// Appends a value.
pub(crate) fn put<T: Serialize + ?Sized>(state: &mut Vec<u8>, value: &T) -> Result<(), PlannerError> {
    rmp_serde::encode::write(state, value).map_err(|error| PlannerError::State(error.to_string()))
}

/// Takes the value that comes next.
pub(crate) fn take<T: DeserializeOwned>(state: &mut &[u8]) -> Result<T, PlannerError> {
    rmp_serde::decode::from_read(state).map_err(|error| PlannerError::State(error.to_string()))
}
