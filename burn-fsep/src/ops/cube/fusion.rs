//! The device's operations where Burn joins operations: queued like Burn's own, since none of them waits for another rank.

use std::fmt;

use burn::{
    backend::{
        get_or_init_device_settings,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, Shape},
};
use burn_fusion::{
    ExecutionError, Fusion, FusionBackend, FusionHandle, FusionRuntime, FusionTensor,
    client::GlobalFusionClient,
    custom::{CustomOpIr, HandleContainer, Operation, OperationIr, StreamId, TensorIr},
};

use super::super::FsepDeviceOps;

impl<B: FusionBackend + FsepDeviceOps> FsepDeviceOps for Fusion<B> {
    fn fsep_sort_assignments(
        experts: IntTensor<Self>,
        num_experts: usize,
        topk: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let (assignments, dtype) = (experts.shape.num_elements(), experts.dtype);
        let outputs = [assignments, assignments, assignments, num_experts + 2].map(|len| (Shape::new([len]), dtype));
        let [row_of, assignment_of, token_of, ends] =
            queue::<B, 1, 4>("fsep::sort_assignments", [experts], outputs, move |[experts], outputs, handles| {
                let experts = handles.get_int_tensor::<B>(experts);
                let (row_of, assignment_of, token_of, ends) = B::fsep_sort_assignments(experts, num_experts, topk);
                for (output, tensor) in outputs.iter().zip([row_of, assignment_of, token_of, ends]) {
                    handles.register_int_tensor::<B>(&output.id, tensor);
                }
                Ok(())
            });
        (row_of, assignment_of, token_of, ends)
    }

    fn fsep_top_k(numbers: FloatTensor<Self>, topk: usize) -> IntTensor<Self> {
        let dtype: DType = get_or_init_device_settings::<B>(numbers.client.device()).int_dtype.into();
        let output = (Shape::new([numbers.shape[0], topk]), dtype);
        let [chosen] = queue::<B, 1, 1>("fsep::top_k", [numbers], [output], move |[numbers], outputs, handles| {
            let numbers = handles.get_float_tensor::<B>(numbers);
            handles.register_int_tensor::<B>(&outputs[0].id, B::fsep_top_k(numbers, topk));
            Ok(())
        });
        chosen
    }

    /// An id names one result of one operation, and of two tensors with one id Burn writes to neither. On another thread a clone
    /// has another id: then nothing is known.
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool {
        a.id == b.id && a.shape == b.shape && a.dtype == b.dtype
    }
}

pub(super) type Handles<B> = HandleContainer<FusionHandle<<B as FusionBackend>::FusionRuntime>>;

/// Queues an operation on `I` tensors, one at least, that gives `O` of these shapes and types.
pub(super) fn queue<B: FusionBackend, const I: usize, const O: usize>(
    name: &'static str,
    inputs: [FusionTensor<B::FusionRuntime>; I],
    outputs: [(Shape, DType); O],
    run: impl Fn(&[TensorIr; I], &[TensorIr; O], &mut Handles<B>) -> Result<(), ExecutionError> + Send + Sync + 'static,
) -> [FusionTensor<B::FusionRuntime>; O] {
    let client = inputs[0].client.clone();
    queue_on::<B, I, O>(&client, name, inputs, outputs, run)
}

/// As [`queue`], also without inputs.
pub(super) fn queue_on<B: FusionBackend, const I: usize, const O: usize>(
    client: &GlobalFusionClient<B::FusionRuntime>,
    name: &'static str,
    inputs: [FusionTensor<B::FusionRuntime>; I],
    outputs: [(Shape, DType); O],
    run: impl Fn(&[TensorIr; I], &[TensorIr; O], &mut Handles<B>) -> Result<(), ExecutionError> + Send + Sync + 'static,
) -> [FusionTensor<B::FusionRuntime>; O] {
    let outputs = outputs.map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
    let desc = CustomOpIr::new(name, &inputs.map(FusionTensor::into_ir), &outputs);
    let operation = Queued::<_, I, O> { desc: desc.clone(), run };
    let outputs = client.register(StreamId::current(), OperationIr::Custom(desc), operation);
    outputs.try_into().unwrap_or_else(|outputs: Vec<_>| panic!("{name} gave {} tensors, not {O}", outputs.len()))
}

struct Queued<F, const I: usize, const O: usize> {
    desc: CustomOpIr,
    run: F,
}

impl<F, const I: usize, const O: usize> fmt::Debug for Queued<F, I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.desc.fmt(f)
    }
}

impl<R: FusionRuntime, F, const I: usize, const O: usize> Operation<R> for Queued<F, I, O>
where
    F: Fn(&[TensorIr; I], &[TensorIr; O], &mut HandleContainer<R::FusionHandle>) -> Result<(), ExecutionError>
        + Send
        + Sync,
{
    fn execute(&self, handles: &mut HandleContainer<R::FusionHandle>) -> Result<(), ExecutionError> {
        let (inputs, outputs) = self.desc.as_fixed::<I, O>();
        (self.run)(inputs, outputs, handles)
    }
}
