use std::collections::HashSet;

use burn::{
    module::{Module, Param, ParamId},
    optim::GradientsParams,
    tensor::Tensor,
};

use super::params::{ModulePath, ParamVisitor, Placement, visit_params};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
    ops::sums_of_squares,
};

/// Scales all gradients so that their global norm is at most `max_norm`; returns the norm before. Collective.
///
/// The norm is that of the unsharded model: replicated parameters count once, shards are summed over the ranks of a group. So
/// clipping does not depend on the world size, which Burn's own clipping (of each tensor by itself) would. Call it
/// after [`sync_gradients`](super::sync_gradients). A norm that is not finite scales nothing: check for it,
/// as [`Trainer`](super::Trainer) does.
///
/// # Errors
///
/// [`FsepError::Comm`] if a collective fails, [`FsepError::Config`] if `max_norm` is not positive.
pub fn clip_grad_norm<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
    grads: &mut GradientsParams,
    max_norm: f64,
) -> Result<f64, FsepError> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(FsepError::Config(format!("the maximum gradient norm must be positive, got {max_norm}")));
    }
    let norm = grad_norm(runtime, model, grads)?;
    if norm.is_finite() && norm > max_norm {
        scale(model, grads, max_norm / norm);
    }
    Ok(norm)
}

/// The global norm of all gradients, that of the unsharded model. Reads the device once. Collective.
pub(super) fn grad_norm<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
    grads: &GradientsParams,
) -> Result<f64, FsepError> {
    let mut squares = Squares { grads, seen: HashSet::new(), sums: Vec::new() };
    visit_params(model, &mut squares);
    let (replicated, sharded) =
        read_sums(squares.sums).inspect_err(|error| runtime.comm().abort(&error.to_string()))?;
    // Of the replicated parameters rank 0's, of shards those of one group: devices that add in another order must not clip by another
    // norm.
    let sharded = if runtime.groups().replicas().rank() == 0 { sharded } else { 0.0 };
    let mut square = [if runtime.rank() == 0 { replicated + sharded } else { sharded }];
    runtime.comm().all_reduce(Operation::new("gradient norm"), ReduceBuffer::F64(&mut square), ReduceOp::Sum)?;
    Ok(square[0].sqrt())
}

/// Multiplies all gradients of a model.
pub(super) fn scale<M: Module>(model: &M, grads: &mut GradientsParams, factor: f64) {
    visit_params(model, &mut Scale { grads, seen: HashSet::new(), factor });
}

struct Squares<'a> {
    grads: &'a GradientsParams,
    /// A parameter that stands in two places of a model has one gradient.
    seen: HashSet<ParamId>,
    sums: Vec<(Placement, Tensor<1>)>,
}

impl ParamVisitor for Squares<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        if self.seen.insert(param.id)
            && let Some(grad) = self.grads.get::<D>(param.id)
        {
            let placement = Placement::at(path);
            self.sums.push((placement, sums_of_squares(grad)));
        }
    }
}

/// Totals of the replicated and of the sharded parameters, in double precision. A device is read once (once more for
/// gradients in double precision): each read waits for all that it has to compute.
fn read_sums(sums: Vec<(Placement, Tensor<1>)>) -> Result<(f64, f64), FsepError> {
    let mut groups: Vec<Vec<(Placement, Tensor<1>)>> = Vec::new();
    for (placement, sum) in sums {
        let fits = |group: &&mut Vec<(Placement, Tensor<1>)>| {
            let (_, first) = &group[0];
            first.dtype() == sum.dtype() && first.device() == sum.device()
        };
        match groups.iter_mut().find(fits) {
            Some(group) => group.push((placement, sum)),
            None => groups.push(vec![(placement, sum)]),
        }
    }
    let (mut replicated, mut sharded) = (0.0, 0.0);
    for group in groups {
        let parts: Vec<_> = group.iter().map(|(placement, sum)| (*placement, sum.dims()[0])).collect();
        let all = Tensor::cat(group.into_iter().map(|(_, sum)| sum).collect(), 0);
        let data = all.try_into_data().map_err(|error| FsepError::Device(error.to_string()))?;
        let mut values = data.iter::<f64>();
        for (placement, len) in parts {
            let total: f64 = values.by_ref().take(len).sum();
            match placement {
                Placement::Replicated => replicated += total,
                Placement::Sharded => sharded += total,
            }
        }
    }
    Ok((replicated, sharded))
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    seen: HashSet<ParamId>,
    factor: f64,
}

impl ParamVisitor for Scale<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, _path: &ModulePath) {
        if !self.seen.insert(param.id) {
            return;
        }
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register::<D>(param.id, grad * self.factor);
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device, TensorData};

    use super::*;

    #[test]
    fn a_parameter_in_two_places_is_counted_and_scaled_once() {
        let device = Device::flex().autodiff();
        let tied = Param::<Tensor<1>>::from_data([1.0f32], &device);
        let model = vec![tied.clone(), tied];
        let loss = (model[0].val() * 3.0 + model[1].val() * 5.0).sum();
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        let norm = clip_grad_norm(&FsepRuntime::single(), &model, &mut grads, 1.0).unwrap();
        let clipped = grads.get::<1>(model[0].id).unwrap().into_scalar::<f32>();
        assert!((norm - 8.0).abs() < 1e-6 && (clipped - 1.0).abs() < 1e-6, "{norm}, {clipped}");
    }

    #[test]
    fn the_norm_of_half_precision_gradients_is_that_of_single_precision() {
        // The square of 1000 is infinite in half precision; the numbers are one run, one and a rest, and more runs than a run has.
        for len in [1024, 1500, 1_060_000] {
            let values: Vec<f32> = (0..len).map(|i| (i % 7) as f32 * 100.0 + 400.0).collect();
            check_norm_of(&values);
        }
    }

    fn check_norm_of(values: &[f32]) {
        let expected: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let grad =
                Tensor::<1>::from_data(TensorData::new(values.to_vec(), [values.len()]), &Device::flex()).cast(dtype);
            // Of bfloat16, the values themselves are rounded.
            let allowed = if dtype == DType::BF16 { 2e-3 } else { 1e-6 };
            let (sum, none) = read_sums(vec![(Placement::Replicated, sums_of_squares(grad))]).unwrap();
            assert_eq!(none, 0.0);
            assert!((sum / expected - 1.0).abs() < allowed, "{dtype:?}: {sum} instead of {expected}");
        }
    }

    #[test]
    fn totals_are_kept_apart_by_placement_whatever_the_element_types() {
        let device = Device::flex();
        let sums =
            |value: f32, len: usize, dtype| sums_of_squares(Tensor::<1>::full([len], value, &device).cast(dtype));
        let all = [
            (Placement::Replicated, sums(1.0, 3000, DType::F32)),
            (Placement::Sharded, sums(2.0, 1024, DType::BF16)),
            (Placement::Replicated, sums(3.0, 5, DType::F64)),
            (Placement::Sharded, sums(4.0, 0, DType::F32)),
            (Placement::Sharded, sums(5.0, 1, DType::F32)),
        ];
        assert_eq!(read_sums(all.into()).unwrap(), (3000.0 + 45.0, 4096.0 + 25.0));
    }
}
