use std::{fmt, sync::Arc};

use burn_fsep::comm::{
    CommError, Communicator,
    local::{self, LaunchConfig, RankError},
};

/// Runs `program` as `N` ranks that are threads of this process, over local threads' engine. Ranks that are processes of
/// their own, also over NCCL, are started by [`RankProcesses`](crate::RankProcesses).
pub fn launch<T, E, F>(config: &LaunchConfig, program: F) -> Vec<Result<T, RankError<E>>>
where
    T: Send,
    E: Send + fmt::Display + From<CommError>,
    F: Fn(Arc<dyn Communicator>) -> Result<T, E> + Sync,
{
    local::launch(config, program)
}
