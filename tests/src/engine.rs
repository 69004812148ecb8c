use std::{fmt, sync::Arc};

use burn_fsep::comm::{
    CommError, Communicator,
    local::{self, LaunchConfig, RankError},
};

/// Runs `program` as `N` ranks over the engine that the suite was built for: local threads; with the feature `nccl` the same
/// threads over NCCL, sharing the first GPU.
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    local::launch(config, |comm| program(engine(comm, config)?))
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
