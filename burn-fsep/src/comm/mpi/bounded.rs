//! Calls of MPI that wait for other ranks, which may be lost.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use crate::comm::{CommError, Operation, control_group::engine_error};

/// How often a rank that waits looks whether another was lost.
const WATCH: Duration = Duration::from_millis(20);

/// Runs a call of MPI that waits for all ranks, on a thread of its own: that one stays behind if a rank is lost.
pub(super) fn bounded<T: Send + 'static>(
    operation: Operation,
    timeout: Duration,
    failure: impl Fn() -> Option<CommError>,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, CommError> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("mpi".into()).spawn(move || drop(sender.send(call())));
    thread.map_err(|error| engine_error(operation, format!("no thread to call MPI: {error}")))?;
    let start = Instant::now();
    loop {
        match receiver.recv_timeout(WATCH) {
            Ok(value) => return Ok(value),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(engine_error(operation, "the call of MPI panicked".into()));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if let Some(failure) = failure() {
            return Err(failure.seen_from(&operation.to_string()));
        }
        if start.elapsed() > timeout {
            let (operation, missing) = (operation.to_string(), Vec::new());
            return Err(CommError::Timeout { operation, waited: timeout, missing, meanwhile: None });
        }
    }
}
