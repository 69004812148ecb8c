//! What every communicator has to do right, with ranks as threads.

use std::sync::Arc;

use burn::tensor::Bytes;
use burn_fsep::comm::{Block, CommError, Communicator, ExchangePlan, Operation, local::LaunchConfig};
use burn_fsep_tests::{
    check_blocks, check_duplicates, check_gather_and_broadcast, check_reductions, check_wrong_arguments, launch,
};

const OP: Operation = Operation::new("test");

fn on_ranks(ranks: usize, program: impl Fn(&dyn Communicator) -> Result<(), CommError> + Sync) {
    for result in launch(&LaunchConfig::new(ranks), |comm| program(comm.as_ref())) {
        result.unwrap();
    }
}

#[test]
fn reductions_are_in_rank_order() {
    for ranks in [1, 2, 3, 5] {
        on_ranks(ranks, check_reductions);
    }
}

#[test]
fn a_timeout_may_be_for_ever() {
    let config = LaunchConfig::new(2).with_timeout(std::time::Duration::MAX);
    for result in launch(&config, |comm| comm.barrier(OP)) {
        result.unwrap();
    }
}

#[test]
fn gather_and_broadcast() {
    on_ranks(4, check_gather_and_broadcast);
}

#[test]
fn blocks_of_any_size_and_order_arrive() {
    for unit in [1, 300_000] {
        on_ranks(3, |comm| check_blocks(comm, unit));
    }
}

#[test]
fn duplicates_have_an_order_of_their_own() {
    on_ranks(2, check_duplicates);
}

#[test]
fn blocks_that_do_not_match_name_both_sides() {
    let results = launch(&LaunchConfig::new(2), |comm| {
        let peer = 1 - comm.rank();
        let len = comm.rank() + 1;
        let plan = ExchangePlan {
            sends: vec![Block { peer, offset: 0, len: 2 }],
            recvs: vec![Block { peer, offset: 0, len }],
            recv_len: len,
            send_len: 2,
        };
        let mut received = vec![0u8; len];
        comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![0u8; 2])), plan)?.wait(&mut received)
    });
    let error = results[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("expects a block of 1 bytes") && error.contains("sends a block of 2 bytes"), "{error}");
}

#[test]
fn wrong_arguments_are_refused() {
    on_ranks(1, check_wrong_arguments);
}

/// One rank with a GPU of its own: ranks that share one, as the suite's do, have to go through host memory.
#[cfg(all(feature = "libtorch", feature = "nccl"))]
#[test]
fn an_all_reduce_between_the_backends_operations() {
    use burn_fsep::comm::{ComputeStream, ReduceOp, local::LocalCommunicator, nccl::NcclConfig};
    use tch::{Device, Kind, Tensor};

    let comm = NcclConfig::new(0).init(Arc::new(LocalCommunicator::single())).unwrap();
    let device = comm.device().expect("a GPU of its own");
    for op in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max] {
        let len = 10_000_019;
        let mut tensor = Tensor::zeros([len], (Kind::Float, Device::Cuda(0)));
        for _ in 0..20 {
            tensor += 1.0;
        }
        let address = tensor.data_ptr() as u64;
        let stream = ComputeStream::LEGACY_DEFAULT;
        // SAFETY: the address of a contiguous tensor of `len` numbers, which lives to the end.
        let pending = unsafe { device.start_device_all_reduce(OP, address, len as usize, op, stream) }.unwrap();
        pending.wait().unwrap();
        tensor *= 2.0;
        assert_eq!(tensor.sum(Kind::Double).double_value(&[]), 40.0 * len as f64, "{op:?}");
    }
}
