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
    custom::{CustomOpIr, HandleContainer, Operation, OperationIr, OperationOutput, StreamId, TensorIr},
};

use super::super::{FsepDeviceOps, FsepKernels};

/// Element-wise operations of the default bodies Burn joins itself, the combination's with the selection before it.
impl<B: FusionBackend + FsepKernels> FsepKernels for Fusion<B> {}

impl<B: FusionBackend + FsepDeviceOps> FsepDeviceOps for Fusion<B> {
    fn fsep_sort_assignments(
        experts: IntTensor<Self>,
        num_experts: usize,
        topk: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let (assignments, dtype) = (experts.shape.num_elements(), experts.dtype);
        let outputs = [assignments, assignments, assignments, num_experts + 2].map(|len| (Shape::new([len]), dtype));
        let [row_of, assignment_of, token_of, ends] =
            queue::<B, 4>("fsep::sort_assignments", experts, outputs, move |experts, outputs, handles| {
                let experts = handles.get_int_tensor::<B>(experts);
                let (row_of, assignment_of, token_of, ends) = B::fsep_sort_assignments(experts, num_experts, topk);
                for (output, tensor) in outputs.iter().zip([row_of, assignment_of, token_of, ends]) {
                    handles.register_int_tensor::<B>(&output.id, tensor);
                }
            });
        (row_of, assignment_of, token_of, ends)
    }

    fn fsep_top_k(numbers: FloatTensor<Self>, topk: usize) -> IntTensor<Self> {
        let dtype: DType = get_or_init_device_settings::<B>(numbers.client.device()).int_dtype.into();
        let output = (Shape::new([numbers.shape[0], topk]), dtype);
        let [chosen] = queue::<B, 1>("fsep::top_k", numbers, [output], move |numbers, outputs, handles| {
            let numbers = handles.get_float_tensor::<B>(numbers);
            handles.register_int_tensor::<B>(&outputs[0].id, B::fsep_top_k(numbers, topk));
        });
        chosen
    }

    /// An id names one result of one operation, and of two tensors with one id Burn writes to neither. On another thread a clone
    /// has another id: then nothing is known.
    fn fsep_is_same(a: FloatTensor<Self>, b: FloatTensor<Self>) -> bool {
        a.id == b.id && a.shape == b.shape && a.dtype == b.dtype
    }
}

type Handles<B> = HandleContainer<FusionHandle<<B as FusionBackend>::FusionRuntime>>;

/// Queues an operation on one tensor that gives `N` of these shapes and types.
fn queue<B: FusionBackend, const N: usize>(
    name: &'static str,
    input: FusionTensor<B::FusionRuntime>,
    outputs: [(Shape, DType); N],
    run: impl Fn(&TensorIr, &[TensorIr; N], &mut Handles<B>) + Send + Sync + 'static,
) -> [FusionTensor<B::FusionRuntime>; N] {
    let client = input.client.clone();
    let outputs = outputs.map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
    let desc = CustomOpIr::new(name, &[input.into_ir()], &outputs);
    let operation = Queued::<_, N> { desc: desc.clone(), run };
    client.register(StreamId::current(), OperationIr::Custom(desc), operation).outputs()
}

struct Queued<F, const N: usize> {
    desc: CustomOpIr,
    run: F,
}

impl<F, const N: usize> fmt::Debug for Queued<F, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.desc.fmt(f)
    }
}

impl<R: FusionRuntime, F, const N: usize> Operation<R> for Queued<F, N>
where
    F: Fn(&TensorIr, &[TensorIr; N], &mut HandleContainer<R::FusionHandle>) + Send + Sync,
{
    fn execute(&self, handles: &mut HandleContainer<R::FusionHandle>) -> Result<(), ExecutionError> {
        let ([input], outputs) = self.desc.as_fixed::<1, N>();
        (self.run)(input, outputs, handles);
        Ok(())
    }
}
