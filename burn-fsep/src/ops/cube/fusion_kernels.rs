//! The layer's kernels where Burn joins operations. Queued as operations of their own, but for exchanges, which run at once.

use std::ops::Range;

use burn::{
    backend::{
        TensorMetadata,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::Shape,
};
use burn_fusion::{ExecutionError, Fusion, FusionBackend};

use super::{
    super::{
        ExpertActivation, FsepKernels, Transposed, combine,
        multiply::multiply,
        slot_experts,
        types::{
            CombineGradients, ExpertWeights, ExpertsBackward, ExpertsGradients, ExpertsOutput, RowIndices,
            UnfinishedGradients,
        },
    },
    activation,
    fusion::queue,
};
use crate::FsepError;
#[cfg(all(feature = "cuda", feature = "nccl"))]
use crate::comm::{CommError, Communicator, ExchangePlan, Operation, PendingDeviceExchange};
#[cfg(all(feature = "cuda", feature = "nccl"))]
use crate::ops::tensor_exchange::{PendingTensor, start_host_exchange};
#[cfg(all(feature = "cuda", feature = "nccl"))]
use burn::backend::{Backend, tensor::Device};

/// Element-wise operations of the default bodies Burn joins itself.
impl<B: FusionBackend + FsepKernels> FsepKernels for Fusion<B> {
    fn fsep_experts(
        tokens: &FloatTensor<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsOutput<Self>, FsepError> {
        if !has_own_experts::<B>(tokens) {
            return Ok(slot_experts::forward::<Self>(tokens, weights, activation, slot_rows));
        }
        let (assignments, shape) = (tokens.shape[0], weights.shape);
        let outputs = [shape.hidden, shape.first_width()].map(|width| (Shape::new([assignments, width]), tokens.dtype));
        let inputs = [tokens.clone(), weights.flat.clone()];
        let (rows, slot_rows) = (weights.rows.clone(), slot_rows.to_vec());
        let [output, kept] =
            queue::<B, 2, 2>("fsep::experts", inputs, outputs, move |[tokens, flat], outputs, handles| {
                let flat = handles.get_float_tensor::<B>(flat);
                let weights = ExpertWeights { flat, rows: rows.clone(), shape, _guard: None };
                let tokens = handles.get_float_tensor::<B>(tokens);
                let mut done = B::fsep_experts(&tokens, &weights, activation, &slot_rows).map_err(failed)?;
                handles.register_float_tensor::<B>(&outputs[0].id, done.output);
                handles.register_float_tensor::<B>(&outputs[1].id, done.kept.swap_remove(0));
                Ok(())
            });
        Ok(ExpertsOutput { output, kept: vec![kept] })
    }

    fn fsep_experts_backward(
        args: ExpertsBackward<Self>,
        weights: &ExpertWeights<Self>,
        activation: ExpertActivation,
        slot_rows: &[Range<usize>],
    ) -> Result<ExpertsGradients<Self>, FsepError> {
        if !has_own_experts::<B>(&args.tokens) {
            return Ok(slot_experts::backward::<Self>(args, weights, activation, slot_rows));
        }
        let ExpertsBackward { tokens, kept, grad, want_tokens, want_weights } = args;
        let (rows, shape, slot_rows) = (weights.rows.clone(), weights.shape, slot_rows.to_vec());
        // An operation has a fixed number of tensors: what is not kept or not wanted is a tensor without elements.
        let (has_kept, dtype) = (kept.is_some(), tokens.dtype);
        let kept = kept.and_then(|mut kept| kept.pop()).unwrap_or_else(|| tokens.clone());
        let wanted = |is_wanted, shape: &Shape| (if is_wanted { shape.clone() } else { Shape::new([0]) }, dtype);
        let first = Shape::new([tokens.shape[0], shape.first_width()]);
        let outputs = [
            wanted(want_tokens, &tokens.shape),
            wanted(want_weights, &weights.flat.shape),
            wanted(want_weights, &first),
        ];
        let inputs = [tokens.clone(), weights.flat.clone(), grad, kept];
        let [d_tokens, d_weights, d_first] = queue::<B, 4, 3>(
            "fsep::experts_backward",
            inputs,
            outputs,
            move |[tokens, flat, grad, kept], outputs, handles| {
                let flat = handles.get_float_tensor::<B>(flat);
                let weights = ExpertWeights { flat, rows: rows.clone(), shape, _guard: None };
                let [tokens, grad, kept] = [tokens, grad, kept].map(|tensor| handles.get_float_tensor::<B>(tensor));
                let nothing = B::float_empty(Shape::new([0]), &tokens.device(), tokens.dtype().into());
                let kept = has_kept.then(|| vec![kept]);
                let args = ExpertsBackward { tokens, kept, grad, want_tokens, want_weights };
                let done = B::fsep_experts_backward(args, &weights, activation, &slot_rows).map_err(failed)?;
                let [d_weights, d_first] = match done.weights.map(UnfinishedGradients::into_all_slots) {
                    Some([d_weights, d_first, _]) => [Some(d_weights), Some(d_first)],
                    None => [None, None],
                };
                for (output, tensor) in outputs.iter().zip([done.tokens, d_weights, d_first]) {
                    handles.register_float_tensor::<B>(&output.id, tensor.unwrap_or_else(|| nothing.clone()));
                }
                Ok(())
            },
        );
        let unfinished = UnfinishedGradients::of_all_slots(d_weights, d_first, tokens);
        Ok(ExpertsGradients { tokens: want_tokens.then_some(d_tokens), weights: want_weights.then_some(unfinished) })
    }

    fn fsep_finish_gradients(
        unfinished: UnfinishedGradients<Self>,
        weights: &ExpertWeights<Self>,
        slot_rows: &[Range<usize>],
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !has_own_experts::<B>(&unfinished.tokens) {
            return Ok(slot_experts::finish::<Self>(unfinished, weights, slot_rows));
        }
        let [d_weights, d_first, tokens] = unfinished.into_all_slots();
        let (rows, shape, slot_rows) = (weights.rows.clone(), weights.shape, slot_rows.to_vec());
        let output = (weights.flat.shape.clone(), tokens.dtype);
        let inputs = [tokens, weights.flat.clone(), d_weights, d_first];
        let [gradients] = queue::<B, 4, 1>(
            "fsep::finish_gradients",
            inputs,
            [output],
            move |[tokens, flat, d_weights, d_first], outputs, handles| {
                let flat = handles.get_float_tensor::<B>(flat);
                let weights = ExpertWeights { flat, rows: rows.clone(), shape, _guard: None };
                let [tokens, d_weights, d_first] =
                    [tokens, d_weights, d_first].map(|tensor| handles.get_float_tensor::<B>(tensor));
                let unfinished = UnfinishedGradients::of_all_slots(d_weights, d_first, tokens);
                let gradients = B::fsep_finish_gradients(unfinished, &weights, &slot_rows).map_err(failed)?;
                handles.register_float_tensor::<B>(&outputs[0].id, gradients);
                Ok(())
            },
        );
        Ok(gradients)
    }

    fn fsep_multiply(left: FloatTensor<Self>, right: FloatTensor<Self>, transposed: Transposed) -> FloatTensor<Self> {
        if !has_own_products::<B>([&left, &right]) {
            return multiply::<Self>(left, right, transposed);
        }
        let [rows, columns] = match transposed {
            Transposed::Neither => [left.shape[0], right.shape[1]],
            Transposed::Left => [left.shape[1], right.shape[1]],
            Transposed::Right => [left.shape[0], right.shape[0]],
        };
        let output = (Shape::new([rows, columns]), left.dtype);
        let [product] =
            queue::<B, 2, 1>("fsep::multiply", [left, right], [output], move |[left, right], outputs, handles| {
                let [left, right] = [left, right].map(|tensor| handles.get_float_tensor::<B>(tensor));
                handles.register_float_tensor::<B>(&outputs[0].id, B::fsep_multiply(left, right, transposed));
                Ok(())
            });
        product
    }

    unsafe fn fsep_select_rows(
        rows: FloatTensor<Self>,
        indices: &IntTensor<Self>,
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !activation::computes(rows.dtype) {
            return Ok(Self::float_select(rows, 0, indices.clone()));
        }
        let output = (Shape::new([indices.shape[0], rows.shape[1]]), rows.dtype);
        let inputs = [rows, indices.clone()];
        let [selected] =
            queue::<B, 2, 1>("fsep::select_rows", inputs, [output], |[rows, indices], outputs, handles| {
                let (rows, indices) = (handles.get_float_tensor::<B>(rows), handles.get_int_tensor::<B>(indices));
                // SAFETY: the caller's.
                let selected = unsafe { B::fsep_select_rows(rows, &indices) }.map_err(failed)?;
                handles.register_float_tensor::<B>(&outputs[0].id, selected);
                Ok(())
            });
        Ok(selected)
    }

    unsafe fn fsep_combine(
        rows: &FloatTensor<Self>,
        row_of: &IntTensor<Self>,
        probs: &FloatTensor<Self>,
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !activation::computes(rows.dtype) {
            return Ok(combine::forward::<Self>(rows, row_of, probs));
        }
        let output = (Shape::new([probs.shape[0], rows.shape[1]]), rows.dtype);
        let inputs = [rows.clone(), row_of.clone(), probs.clone()];
        let [output] =
            queue::<B, 3, 1>("fsep::combine", inputs, [output], |[rows, row_of, probs], outputs, handles| {
                let [rows, probs] = [rows, probs].map(|tensor| handles.get_float_tensor::<B>(tensor));
                let row_of = handles.get_int_tensor::<B>(row_of);
                // SAFETY: the caller's.
                let combined = unsafe { B::fsep_combine(&rows, &row_of, &probs) }.map_err(failed)?;
                handles.register_float_tensor::<B>(&outputs[0].id, combined);
                Ok(())
            });
        Ok(output)
    }

    unsafe fn fsep_combine_backward(
        grad: &FloatTensor<Self>,
        rows: Option<&FloatTensor<Self>>,
        indices: &RowIndices<Self>,
        probs: &FloatTensor<Self>,
        want_rows: bool,
    ) -> Result<CombineGradients<Self>, FsepError> {
        let Some(rows) = rows.filter(|_| want_rows && activation::computes(grad.dtype)) else {
            return Ok(combine::backward::<Self>(grad, rows, indices, probs, want_rows));
        };
        let outputs = [
            (Shape::new([indices.assignment_of.shape[0], grad.shape[1]]), grad.dtype),
            (probs.shape.clone(), probs.dtype),
        ];
        let RowIndices { row_of, assignment_of, token_of } = indices.clone();
        let inputs = [grad.clone(), rows.clone(), probs.clone(), row_of, assignment_of, token_of];
        let [d_rows, d_probs] = queue::<B, 6, 2>(
            "fsep::combine_backward",
            inputs,
            outputs,
            |[grad, rows, probs, row_of, assignment_of, token_of], outputs, handles| {
                let [grad, rows, probs] = [grad, rows, probs].map(|tensor| handles.get_float_tensor::<B>(tensor));
                let [row_of, assignment_of, token_of] =
                    [row_of, assignment_of, token_of].map(|tensor| handles.get_int_tensor::<B>(tensor));
                let indices = RowIndices { row_of, assignment_of, token_of };
                // SAFETY: the caller's.
                let done = unsafe { B::fsep_combine_backward(&grad, Some(&rows), &indices, &probs, true) };
                let CombineGradients { rows: Some(d_rows), probs: Some(d_probs) } = done.map_err(failed)? else {
                    return Err(ExecutionError::WithContext { reason: "a gradient that is wanted is missing".into() });
                };
                handles.register_float_tensor::<B>(&outputs[0].id, d_rows);
                handles.register_float_tensor::<B>(&outputs[1].id, d_probs);
                Ok(())
            },
        );
        Ok(CombineGradients { rows: Some(d_rows), probs: Some(d_probs) })
    }

    unsafe fn fsep_sum_rows(
        rows: &FloatTensor<Self>,
        row_of: &IntTensor<Self>,
        topk: usize,
    ) -> Result<FloatTensor<Self>, FsepError> {
        if !activation::computes(rows.dtype) {
            return Ok(combine::sum_rows::<Self>(rows, row_of, topk));
        }
        let output = (Shape::new([rows.shape[0] / topk, rows.shape[1]]), rows.dtype);
        let inputs = [rows.clone(), row_of.clone()];
        let [sums] = queue::<B, 2, 1>("fsep::sum_rows", inputs, [output], move |[rows, row_of], outputs, handles| {
            let (rows, row_of) = (handles.get_float_tensor::<B>(rows), handles.get_int_tensor::<B>(row_of));
            // SAFETY: the caller's.
            let sums = unsafe { B::fsep_sum_rows(&rows, &row_of, topk) }.map_err(failed)?;
            handles.register_float_tensor::<B>(&outputs[0].id, sums);
            Ok(())
        });
        Ok(sums)
    }

    /// Started now and not queued, on what was computed before.
    #[cfg(all(feature = "cuda", feature = "nccl"))]
    fn fsep_start_exchange(
        tensor: FloatTensor<Self>,
        comm: &dyn Communicator,
        operation: Operation,
        plan: &ExchangePlan,
    ) -> Result<PendingTensor<Self>, FsepError> {
        if comm.device().is_none() {
            return start_host_exchange::<Self>(tensor, comm, operation, plan);
        }
        let client = tensor.client.clone();
        let device = client.device().clone();
        let resolved = client.resolve_tensor_float::<B>(tensor);
        let pending = B::fsep_start_exchange(resolved, comm, operation, plan)?;
        let wrap = |tensor: FloatTensor<B>| {
            let output = (tensor.shape(), tensor.dtype());
            let [wrapped] = super::fusion::queue_on::<B, 0, 1>(&client, "fsep::exchanged", [], [output], {
                move |_, outputs, handles| {
                    handles.register_float_tensor::<B>(&outputs[0].id, tensor.clone());
                    Ok(())
                }
            });
            wrapped
        };
        let flushed = device.clone();
        Ok(pending.wrapped(device, wrap, |pending| Box::new(Flushed::<B> { pending, device: flushed })))
    }
}

/// Hands what is queued to the device before it lets later work wait for the exchange: that work need not wait.
#[cfg(all(feature = "cuda", feature = "nccl"))]
struct Flushed<B: FusionBackend> {
    pending: Box<dyn PendingDeviceExchange>,
    device: Device<Fusion<B>>,
}

#[cfg(all(feature = "cuda", feature = "nccl"))]
impl<B: FusionBackend> PendingDeviceExchange for Flushed<B> {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        // What fails there fails again where its result is read.
        let _ = Fusion::<B>::flush(&self.device);
        self.pending.wait()
    }
}

/// Whether the backend has experts of its own: the default bodies Burn joins better.
fn has_own_experts<B: FusionBackend>(tokens: &FloatTensor<Fusion<B>>) -> bool {
    #[cfg(feature = "cuda")]
    return is_cube_device::<B>(tokens, |device| super::cuda::experts::computes(device, tokens.dtype));
    #[cfg(not(feature = "cuda"))]
    {
        let _: &FloatTensor<Fusion<B>> = tokens;
        false
    }
}

/// Whether the backend has products of its own.
fn has_own_products<B: FusionBackend>(factors: [&FloatTensor<Fusion<B>>; 2]) -> bool {
    #[cfg(feature = "cuda")]
    return is_cube_device::<B>(factors[0], |device| {
        super::cuda::product::multiplies(device, factors.map(|factor| factor.dtype))
    });
    #[cfg(not(feature = "cuda"))]
    {
        let _: [&FloatTensor<Fusion<B>>; 2] = factors;
        false
    }
}

/// Whether the tensor is on a device of CubeCL's that `is` says yes of.
#[cfg(feature = "cuda")]
fn is_cube_device<B: FusionBackend>(
    tensor: &FloatTensor<Fusion<B>>,
    is: impl FnOnce(&burn::backend::CubeDevice) -> bool,
) -> bool {
    let device: &dyn std::any::Any = tensor.client.device();
    device.downcast_ref().is_some_and(is)
}

fn failed(error: FsepError) -> ExecutionError {
    ExecutionError::WithContext { reason: error.to_string() }
}
