use std::{fmt, sync::Arc};

use burn_fsep::comm::{
    CommError, Communicator,
    local::{self, LaunchConfig, RankError},
};

/// Runs `program` as `N` ranks that are threads of this process, over the engine of local threads; with the feature
/// `process-comm` connected by TCP as processes are. For processes, also over NCCL, see [`RankProcesses`](crate::RankProcesses).
#[cfg(not(feature = "process-comm"))]
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    local::launch(config, program)
}

/// Runs `program` as `N` ranks that are threads of this process, connected by TCP as processes are.
///
/// # Panics
///
/// If the operating system refuses a socket or random numbers.
#[cfg(feature = "process-comm")]
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    use burn_fsep::comm::process::{JobToken, ProcessConfig};
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a socket");
    let port = listener.local_addr().expect("the socket's port").port();
    let token = JobToken::random().expect("random numbers");
    local::launch(config, |comm| {
        let mut process = ProcessConfig::new(comm.rank(), comm.size(), ("127.0.0.1", port), token.clone())
            .with_timeout(config.timeout);
        if comm.rank() == 0 {
            process = process.with_listener(listener.try_clone().expect("a second handle on the socket"));
        }
        process.run(&program)
    })
}
