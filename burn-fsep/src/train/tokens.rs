use burn::tensor::Tensor;

use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
};

/// The loss whose mean over ranks is the mean over the tokens of all ranks. Collective, of one number.
///
/// `sum` is the sum of the losses of this rank's real tokens, `tokens` how many those are. Gradients are averaged over ranks, and
/// so each rank's loss must be: with a mean of its own, a rank of 10 tokens would weigh as much as one of 30. A rank
/// without tokens takes part with a sum of zero. With gradient accumulation, each micro-batch is a mean of its own.
///
/// ```
/// # use burn::tensor::{Device, Tensor};
/// # use burn_fsep::{FsepRuntime, train::token_mean};
/// # let runtime = FsepRuntime::single();
/// # let device = Device::flex();
/// let losses = Tensor::<1>::from_data([0.5f32, 1.5, 9.0], &device); // of each token
/// let is_real = Tensor::<1>::from_data([1f32, 1.0, 0.0], &device); // the last one is padding
/// let loss = token_mean(&runtime, (losses * is_real).sum(), 2);
/// assert_eq!(loss.into_scalar::<f32>(), 1.0);
/// ```
///
/// # Panics
///
/// Where [`try_token_mean`] has an error, with it: [`FsepRuntime::run`] and all that trains here return it.
pub fn token_mean(runtime: &FsepRuntime, sum: Tensor<1>, tokens: usize) -> Tensor<1> {
    try_token_mean(runtime, sum, tokens).unwrap_or_else(|error| runtime.fail(error))
}

/// [`token_mean`] with an error in place of a panic.
///
/// # Errors
///
/// [`FsepError::Shape`] on all ranks if none has a token: there is no mean. [`FsepError::Comm`] if the collective fails.
pub fn try_token_mean(runtime: &FsepRuntime, sum: Tensor<1>, tokens: usize) -> Result<Tensor<1>, FsepError> {
    let mut all = [tokens as f64];
    runtime.comm().all_reduce(Operation::new("number of tokens"), ReduceBuffer::F64(&mut all), ReduceOp::Sum)?;
    if all[0] == 0.0 {
        return Err(FsepError::Shape {
            what: "tokens of all ranks".into(),
            expected: "at least one that is not padding".into(),
            actual: "none".into(),
        });
    }
    Ok(sum * (runtime.world_size() as f64 / all[0]))
}
