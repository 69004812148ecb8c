//! cuBLAS and NCCL against the default bodies. Without a GPU they pass, and say that they checked nothing.

use std::ops::Range;

use burn::{
    backend::{
        Backend, CubeDevice, Flex, FlexDevice,
        tensor::{Device, FloatTensor},
    },
    tensor::{FloatDType, TensorData, read_sync},
};
use burn_cubecl::{Cube, CubeBackend};

use super::super::super::{
    ExpertActivation, FsepKernels, slot_experts,
    types::{ExpertWeights, ExpertsBackward},
};
use crate::shard::ExpertShape;

/// The first GPU, if there is one and cuBLAS.
fn gpu() -> Option<CubeDevice> {
    let devices = burn::tensor::Device::enumerate(burn::tensor::DeviceType::Cuda);
    let device = devices.into_iter().next().and_then(|device| match device.as_dispatch() {
        burn::backend::DispatchDevice::Cube(device) => Some(device.clone()),
        _ => None,
    });
    let device = device.filter(|device| super::experts::computes(device, burn::tensor::DType::F32));
    if device.is_none() {
        eprintln!("skipped: there is no NVIDIA GPU, or no cuBLAS");
    }
    device
}

/// Both factors transposed or neither, of sizes that no tile divides.
fn check_products<B: FsepKernels>(device: &Device<B>) {
    use super::super::super::Transposed::{self, Left, Neither, Right};

    fn run<B: FsepKernels>(device: &Device<B>, transposed: Transposed, dtype: FloatDType) -> Vec<f32> {
        let (left, right) = match transposed {
            Neither => ([37, 19], [19, 53]),
            Left => ([19, 37], [19, 53]),
            Right => ([37, 19], [53, 19]),
        };
        let factor = |[rows, width]: [usize; 2], phase| {
            B::float_add_scalar(waves::<B>(rows, width, phase, device, dtype), 0.5.into())
        };
        let product = B::fsep_multiply(factor(left, 0.1), factor(right, 0.9), transposed);
        read::<B>(B::float_add_scalar(product, 1.0.into()))
    }
    // The gradient of a matrix on a rank without tokens.
    let none = |width| B::float_zeros([0, width].into(), device, FloatDType::F32);
    let gradient = read::<B>(B::fsep_multiply(none(3), none(5), Left));
    assert_eq!(gradient, [0.0; 15]);
    for (dtype, tolerance) in [(FloatDType::F32, 1e-6), (FloatDType::BF16, 2e-2), (FloatDType::F16, 3e-3)] {
        for transposed in [Neither, Left, Right] {
            let expected = run::<Flex>(&FlexDevice, transposed, FloatDType::F32);
            let actual = run::<B>(device, transposed, dtype);
            assert_close(&format!("{transposed:?}, {dtype:?}"), &actual, &expected, tolerance);
        }
    }
}

#[test]
fn products_are_those_of_the_default_bodies() {
    if let Some(device) = gpu() {
        check_products::<CubeBackend>(&device);
        check_products::<Cube>(&device);
    }
}

/// Numbers between -1 and 1 that nothing repeats.
fn waves<B: Backend>(rows: usize, width: usize, phase: f32, device: &Device<B>, dtype: FloatDType) -> FloatTensor<B> {
    let numbers: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37 + phase).sin()).collect();
    B::float_cast(B::float_from_data(TensorData::new(numbers, [rows, width]), device), dtype)
}

fn read<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
    let data = read_sync(B::float_into_data(B::float_cast(tensor, FloatDType::F32))).unwrap();
    data.iter::<f32>().collect()
}

/// The largest difference, relative to the largest expected number.
fn assert_close(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let difference = actual.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(difference <= tolerance * largest, "{what}: {difference} of {largest}");
}

struct Case {
    activation: ExpertActivation,
    bias: bool,
    /// Rows of each slot.
    lens: &'static [usize],
    /// The row of each slot's parameters.
    rows: &'static [usize],
    padding: usize,
}

const CASES: [Case; 4] = [
    Case { activation: ExpertActivation::SwiGlu, bias: false, lens: &[33, 0, 7, 64], rows: &[0, 1, 2, 3], padding: 0 },
    Case { activation: ExpertActivation::SwiGlu, bias: true, lens: &[5, 9, 1], rows: &[2, 0, 1], padding: 3 },
    Case { activation: ExpertActivation::Gelu, bias: true, lens: &[0, 40], rows: &[1, 0], padding: 1 },
    Case { activation: ExpertActivation::ReluSquared, bias: false, lens: &[0, 0], rows: &[0, 1], padding: 8 },
];

/// Output and gradients, by the backend's experts or by the default bodies.
fn run<B: FsepKernels>(case: &Case, device: &Device<B>, dtype: FloatDType, is_default: bool) -> [Vec<f32>; 3] {
    let (hidden, ffn) = (24, 40);
    let shape = ExpertShape { hidden, ffn, bias: case.bias, gated: case.activation.is_gated() };
    let mut slot_rows: Vec<Range<usize>> = Vec::new();
    for len in case.lens {
        let start = slot_rows.last().map_or(0, |rows| rows.end);
        slot_rows.push(start..start + len);
    }
    let total = slot_rows.last().map_or(0, |rows| rows.end);
    let flat = waves::<B>(case.rows.len(), shape.num_params() + case.padding, 0.3, device, dtype);
    let weights = ExpertWeights { flat, rows: case.rows.to_vec(), shape, _guard: None };
    // Kernels before and after: what is queued between has to wait for the first and be waited for by the second.
    let one = |tensor| B::float_add_scalar(tensor, 1.0.into());
    let tokens = one(waves::<B>(total, hidden, 0.1, device, dtype));
    let grad = one(waves::<B>(total, hidden, 0.7, device, dtype));
    let forward = if is_default {
        slot_experts::forward::<B>(&tokens, &weights, case.activation, &slot_rows)
    } else {
        B::fsep_experts(&tokens, &weights, case.activation, &slot_rows).unwrap()
    };
    let output = one(forward.output);
    let args = ExpertsBackward { tokens, kept: Some(forward.kept), grad, want_tokens: true, want_weights: true };
    let gradients = if is_default {
        slot_experts::backward::<B>(args, &weights, case.activation, &slot_rows)
    } else {
        B::fsep_experts_backward(args, &weights, case.activation, &slot_rows).unwrap()
    };
    let unfinished = gradients.weights.unwrap();
    let d_weights = if is_default {
        slot_experts::finish::<B>(unfinished, &weights, &slot_rows)
    } else {
        B::fsep_finish_gradients(unfinished, &weights, &slot_rows).unwrap()
    };
    let gradients = [gradients.tokens.unwrap(), d_weights].map(one);
    let [tokens, weights] = gradients.map(read::<B>);
    [read::<B>(output), tokens, weights]
}

fn check<B: FsepKernels>(device: &Device<B>) {
    for case in &CASES {
        for (dtype, tolerance) in [(FloatDType::F32, 1e-5), (FloatDType::BF16, 4e-2), (FloatDType::F16, 5e-3)] {
            // On the CPU: CubeCL's own products in single precision are of TF32.
            let expected = run::<Flex>(case, &FlexDevice, FloatDType::F32, true);
            let actual = run::<B>(case, device, dtype, false);
            for ((what, actual), expected) in ["output", "tokens", "weights"].iter().zip(actual).zip(expected) {
                assert_close(&format!("{what}, {:?}, {dtype:?}", case.activation), &actual, &expected, tolerance);
            }
        }
    }
}

#[test]
fn experts_are_those_of_the_default_bodies() {
    if let Some(device) = gpu() {
        check::<CubeBackend>(&device);
    }
}

#[test]
fn experts_are_those_of_the_default_bodies_where_operations_are_joined() {
    if let Some(device) = gpu() {
        check::<Cube>(&device);
    }
}

/// One rank with itself: what is sent is what a kernel queued just before has made, and is read by one queued just after.
#[cfg(feature = "nccl")]
#[test]
fn exchanges_run_between_the_kernels() {
    use std::sync::Arc;

    use crate::{
        comm::{
            Block, CommError, Communicator, ExchangePlan, Operation, ReduceOp, local::LocalCommunicator,
            nccl::NcclConfig,
        },
        ops::FsepDeviceOps,
    };

    fn check<B: FsepKernels + FsepDeviceOps>(device: &Device<B>, comm: &Arc<dyn Communicator>) {
        let operation = Operation::new("test");
        let len = 3_000_007;
        let blocks = vec![Block { peer: 0, offset: 0, len }];
        let plan = ExchangePlan { sends: blocks.clone(), recvs: blocks, send_len: len, recv_len: len };
        let add = |tensor| B::float_add_scalar(tensor, 1.0.into());
        let mut tensor = B::float_zeros([len].into(), device, FloatDType::F32);
        for _ in 0..10 {
            tensor = add(tensor);
            tensor = B::fsep_start_exchange(tensor, comm.as_ref(), operation, &plan).unwrap().wait([len]).unwrap();
        }
        let mut tensor = add(tensor);
        for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Mean] {
            let pending = B::fsep_start_device_all_reduce(tensor.clone(), comm.clone(), operation, op);
            pending.unwrap().expect("NCCL reaches the GPU").wait().unwrap_or_else(|error| panic!("{op:?}: {error}"));
            tensor = add(tensor);
        }
        assert!(read::<B>(tensor).iter().all(|&number| number == 14.0));
    }

    let Some(device) = gpu() else { return };
    let comm: Arc<dyn Communicator> = match NcclConfig::new(0).init(Arc::new(LocalCommunicator::single())) {
        Ok(comm) => Arc::new(comm),
        Err(error @ CommError::Engine { .. }) => return eprintln!("skipped: {error}"),
        Err(error) => panic!("{error}"),
    };
    check::<CubeBackend>(&device, &comm);
    check::<Cube>(&device, &comm);
}
