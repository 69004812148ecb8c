//! What collectives of all engines refuse in the same words.

use super::{CommError, Operation};

fn invalid(operation: Operation, reason: String) -> CommError {
    CommError::InvalidArgument { operation: operation.to_string(), reason }
}

/// The buffer to send is as long as the plan says; in bytes.
pub(super) fn send_buffer(operation: Operation, len: usize, planned: usize) -> Result<(), CommError> {
    if len == planned {
        return Ok(());
    }
    Err(invalid(operation, format!("send buffer of {len} bytes, plan of {planned}")))
}

/// The buffer to receive into is as long as the plan says; in bytes.
pub(super) fn receive_buffer(operation: Operation, len: usize, planned: usize) -> Result<(), CommError> {
    if len == planned {
        return Ok(());
    }
    Err(invalid(operation, format!("receive buffer of {len} bytes, plan of {planned}")))
}

/// What is gathered has room for what each of `size` ranks sends; in bytes.
pub(super) fn gathered(operation: Operation, size: usize, sent: usize, received: usize) -> Result<(), CommError> {
    if received == sent * size {
        return Ok(());
    }
    Err(invalid(operation, format!("{sent} bytes from each of {size} ranks into {received}")))
}

/// The root of a broadcast is a rank.
pub(super) fn root(operation: Operation, size: usize, root: usize) -> Result<(), CommError> {
    if root < size {
        return Ok(());
    }
    Err(invalid(operation, format!("root {root} is not one of {size} ranks")))
}
