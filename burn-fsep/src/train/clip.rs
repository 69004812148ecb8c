use std::collections::HashSet;

use burn::{
    module::{Module, Param, ParamId},
    optim::GradientsParams,
    tensor::{DType, Tensor},
};

use super::params::{ParamVisitor, Placement, visit_params};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
};

/// Scales all gradients so that their global norm is at most `max_norm`; returns the norm before. Collective.
///
/// The norm is that of the unsharded model: replicated parameters count once, shards are summed over ranks. So
/// clipping does not depend on the world size, which Burn's own clipping (of each tensor by itself) would. Call it
/// after [`sync_gradients`](super::sync_gradients). A norm that is not finite scales nothing: check for it.
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
    let mut squares = Squares { grads, seen: HashSet::new(), replicated: 0.0, sharded: 0.0, error: None };
    visit_params(model, &mut squares);
    let Squares { replicated, sharded, error, .. } = squares;
    if let Some(error) = error {
        runtime.comm().abort(&error.to_string());
        return Err(error);
    }
    let mut sharded = [sharded];
    runtime.comm().all_reduce(Operation::new("gradient norm"), ReduceBuffer::F64(&mut sharded), ReduceOp::Sum)?;
    let norm = (replicated + sharded[0]).sqrt();
    if norm.is_finite() && norm > max_norm {
        visit_params(model, &mut Scale { grads, seen: HashSet::new(), factor: max_norm / norm });
    }
    Ok(norm)
}

struct Squares<'a> {
    grads: &'a GradientsParams,
    /// A parameter that stands in two places of a model has one gradient.
    seen: HashSet<ParamId>,
    replicated: f64,
    sharded: f64,
    error: Option<FsepError>,
}

impl ParamVisitor for Squares<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement) {
        if !self.seen.insert(param.id) {
            return;
        }
        let Some(grad) = self.grads.get::<D>(param.id) else { return };
        match sum_of_squares(grad) {
            Ok(sum) if placement == Placement::Sharded => self.sharded += sum,
            Ok(sum) => self.replicated += sum,
            Err(error) => self.error = Some(error),
        }
    }
}

/// Sums runs of a thousand on the device and the runs' sums in double precision: single precision alone would lose
/// digits on large tensors. Half precision is widened first, since squares leave its range.
fn sum_of_squares<const D: usize>(grad: Tensor<D>) -> Result<f64, FsepError> {
    const RUN: usize = 1024;
    let len = grad.shape().num_elements();
    let wide = if grad.dtype() == DType::F64 { grad } else { grad.cast(DType::F32) };
    let flat = wide.reshape([len]).square();
    let whole = len / RUN * RUN;
    let mut sums = Vec::new();
    if whole > 0 {
        sums.push(flat.clone().slice(0..whole).reshape([len / RUN, RUN]).sum_dim(1).reshape([len / RUN]));
    }
    if whole < len {
        sums.push(flat.slice(whole..len).sum());
    }
    let mut total = 0.0;
    for sum in sums {
        let data = sum.try_into_data().map_err(|error| FsepError::Device(error.to_string()))?;
        total += data.iter::<f64>().sum::<f64>();
    }
    Ok(total)
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    seen: HashSet<ParamId>,
    factor: f64,
}

impl ParamVisitor for Scale<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, _placement: Placement) {
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
    use burn::tensor::{Device, TensorData};

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
        // The square of 1000 is infinite in half precision; 1500 numbers are a whole run and a rest.
        let values: Vec<f32> = (0..1500).map(|i| (i % 7) as f32 * 100.0 + 400.0).collect();
        let expected: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let grad = Tensor::<1>::from_data(TensorData::new(values.clone(), [1500]), &Device::flex()).cast(dtype);
            // Of bfloat16, the values themselves are rounded.
            let allowed = if dtype == DType::BF16 { 2e-3 } else { 1e-6 };
            let sum = sum_of_squares(grad).unwrap();
            assert!((sum / expected - 1.0).abs() < allowed, "{dtype:?}: {sum} instead of {expected}");
        }
    }
}
