use std::{fmt, net::TcpListener, sync::Arc};

use burn_fsep::{
    FsepError, FsepRuntime, FsepRuntimeConfig,
    comm::{
        CommError, Communicator,
        local::{self, LaunchConfig, RankError},
        process::{JobToken, ProcessConfig},
    },
};

/// Runs `program` as `N` ranks that are threads of this process, over the engine of local threads; with `FSEP_TEST_ENGINE=tcp`
/// connected by TCP as processes are. For processes, also over NCCL, see [`RankProcesses`](crate::RankProcesses).
///
/// # Panics
///
/// If `FSEP_TEST_ENGINE` is something else, or the operating system refuses a socket or random numbers.
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    match std::env::var("FSEP_TEST_ENGINE").as_deref() {
        Err(_) => local::launch(config, program),
        Ok("tcp") => launch_over_tcp(config, program),
        Ok(other) => panic!("FSEP_TEST_ENGINE={other}: leave it out, or say tcp"),
    }
}

/// [`launch`] of ranks with a runtime of this configuration each, none of which fails.
///
/// # Panics
///
/// As [`launch`], and with the error of a rank that fails.
pub fn launch_runtimes<T: Send>(
    launched: &LaunchConfig,
    config: &FsepRuntimeConfig,
    program: impl Fn(&FsepRuntime) -> Result<T, FsepError> + Sync,
) -> Vec<T> {
    let results = launch(launched, |comm| program(&config.init(comm)?));
    results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}"))).collect()
}

fn launch_over_tcp<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a socket");
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
