use std::hash::{DefaultHasher, Hash, Hasher};

use burn::tensor::{DType, Device, FloatDType, IntDType, Tensor};
use burn_fsep::{
    FsepError, FsepRuntime,
    comm::{Communicator, Operation, all_gather_u64},
    launch::Rank,
};

use crate::{MoeHfError, args::ParallelArgs};

/// A rank's runtime, and its device with the type of new parameters. Collective.
pub(crate) fn start(rank: &Rank, parallel: &ParallelArgs, seed: u64) -> Result<(FsepRuntime, Device), MoeHfError> {
    let mut device = rank.device.clone();
    let parameters = parallel.dtype.parameters();
    if parameters != FloatDType::F32
        && let Err(error) = device.configure((parameters, IntDType::I64))
        // Ranks that share a device also share its settings: one of them was first.
        && Tensor::<1>::empty([1], &device).dtype() != DType::from(parameters)
    {
        return Err(FsepError::Device(error.to_string()).into());
    }
    Ok((rank.runtime(parallel.ranks.runtime_config().with_seed(seed))?, device))
}

/// Ranks that are processes each have a command line and files of their own; other ones would compute, but not as one.
pub(crate) fn check_equal(comm: &dyn Communicator, what: &'static str, value: &impl Hash) -> Result<(), MoeHfError> {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    let all = all_gather_u64(comm, Operation::new(what), &[hasher.finish()])?;
    match all.iter().position(|theirs| *theirs != all[0]) {
        Some(rank) => Err(MoeHfError::Option(format!(
            "ranks 0 and {rank} were started with other {what}, or of another build: give all the same"
        ))),
        None => Ok(()),
    }
}
