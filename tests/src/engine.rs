use std::{fmt, sync::Arc};

use burn_fsep::comm::{
    CommError, Communicator,
    local::{self, LaunchConfig, RankError},
};

/// Runs `program` as `N` ranks over the engine that the suite was built for: local threads; with the feature `nccl` the same
/// threads over NCCL, sharing the first GPU; with `process-comm` the same threads, connected by TCP as processes are.
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    launch_control(config, |comm| program(engine(comm, config)?))
}

/// As [`launch`], but over the control group where there is one: whose errors say which rank failed.
#[cfg(not(feature = "process-comm"))]
pub fn launch_control<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    local::launch(config, program)
}

/// As [`launch`], but over the control group where there is one: whose errors say which rank failed.
///
/// # Panics
///
/// If the operating system refuses a socket or random numbers.
#[cfg(feature = "process-comm")]
pub fn launch_control<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
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

#[cfg(not(feature = "nccl"))]
fn engine(comm: Arc<dyn Communicator>, _config: &LaunchConfig) -> Result<Arc<dyn Communicator>, CommError> {
    Ok(comm)
}

#[cfg(feature = "nccl")]
fn engine(comm: Arc<dyn Communicator>, config: &LaunchConfig) -> Result<Arc<dyn Communicator>, CommError> {
    use burn_fsep::comm::nccl::NcclConfig;
    Ok(Arc::new(NcclConfig::new(0).with_timeout(config.timeout).init(comm)?))
}
