//! What every communicator has to do right.

use std::sync::Arc;

use burn::tensor::Bytes;
use burn_fsep::comm::{
    Block, CommError, Communicator, ExchangePlan, Operation, ReduceBuffer, ReduceOp, all_gather_u64,
    local::LaunchConfig,
};
use burn_fsep_tests::launch;

const OP: Operation = Operation::new("test");

fn on_ranks(ranks: usize, program: impl Fn(&dyn Communicator) -> Result<(), CommError> + Sync) {
    for result in launch(&LaunchConfig::new(ranks), |comm| program(comm.as_ref())) {
        result.unwrap();
    }
}

#[test]
fn reductions_are_in_rank_order() {
    for ranks in [1, 2, 3, 5] {
        on_ranks(ranks, |comm| {
            let mine = [comm.rank() as f32, 0.1, -(comm.rank() as f32)];
            let expected = |combine: fn(f32, f32) -> f32| -> Vec<f32> {
                (0..3).map(|i| (0..ranks).map(|r| [r as f32, 0.1, -(r as f32)][i]).reduce(combine).unwrap()).collect()
            };
            let mut sum = mine;
            comm.all_reduce(OP, ReduceBuffer::F32(&mut sum), ReduceOp::Sum)?;
            assert_eq!(sum.to_vec(), expected(|a, b| a + b));
            let mut max = mine;
            comm.all_reduce(OP, ReduceBuffer::F32(&mut max), ReduceOp::Max)?;
            assert_eq!(max.to_vec(), expected(f32::max));
            let mut mean = [comm.rank() as f64];
            comm.all_reduce(OP, ReduceBuffer::F64(&mut mean), ReduceOp::Mean)?;
            assert_eq!(mean[0], (ranks - 1) as f64 / 2.0);
            Ok(())
        });
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
    on_ranks(4, |comm| {
        let rank = comm.rank() as u64;
        assert_eq!(all_gather_u64(comm, OP, &[rank, 10 * rank])?, [0, 0, 1, 10, 2, 20, 3, 30]);
        let mut buffer = [comm.rank() as u8; 5];
        comm.broadcast(OP, &mut buffer, 2)?;
        assert_eq!(buffer, [2; 5]);
        comm.broadcast(OP, &mut [], 0)?;
        comm.barrier(OP)
    });
}

#[test]
fn blocks_of_any_size_and_order_arrive() {
    // Rank s sends to rank r: (s + r) blocks of length 1, 2, .. from places that overlap; also many megabytes.
    for unit in [1, 300_000] {
        on_ranks(3, |comm| {
            let rank = comm.rank();
            let blocks = |peer: usize| (1..=rank + peer).map(move |len| (peer, len));
            let len_of = |(_, len): &(usize, usize)| len * unit;
            let all: Vec<(usize, usize)> = (0..3).rev().flat_map(blocks).collect();
            let sends: Vec<Block> =
                all.iter().map(|b| Block { peer: b.0, offset: unit * (b.1 % 3), len: len_of(b) }).collect();
            let mut offset = 0;
            let recvs: Vec<Block> = all
                .iter()
                .map(|b| {
                    let block = Block { peer: b.0, offset, len: len_of(b) };
                    offset += block.len;
                    block
                })
                .collect();
            let value = |source: usize, place: usize| (source * 100 + place * 7 % 89) as u8;
            let send_len = 8 * unit;
            let send = Bytes::from_elems((0..send_len).map(|place| value(rank, place)).collect::<Vec<u8>>());
            let plan = ExchangePlan { sends, recvs: recvs.clone(), recv_len: offset, send_len };
            let mut received = vec![0u8; offset];
            comm.start_all_to_all_v(OP, Arc::new(send), plan)?.wait(&mut received)?;
            for block in recvs {
                let first = unit * (block.len / unit % 3);
                for i in [0, block.len / 2, block.len - 1] {
                    assert_eq!(received[block.offset + i], value(block.peer, first + i), "{block:?}");
                }
            }
            Ok(())
        });
    }
}

#[test]
fn duplicates_have_an_order_of_their_own() {
    on_ranks(2, |comm| {
        let other = comm.duplicate("other")?;
        let exchange = |comm: &dyn Communicator, value: u8| {
            let peer = 1 - comm.rank();
            let block = |offset| vec![Block { peer, offset, len: 1 }];
            let plan = ExchangePlan { sends: block(0), recvs: block(0), recv_len: 1, send_len: 1 };
            comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![value])), plan)
        };
        // The ranks start and await the two exchanges in different orders.
        let mut got = [[0u8]; 2];
        if comm.rank() == 0 {
            let (a, b) = (exchange(comm, 1)?, exchange(other.as_ref(), 2)?);
            b.wait(&mut got[1])?;
            a.wait(&mut got[0])?;
        } else {
            let (b, a) = (exchange(other.as_ref(), 4)?, exchange(comm, 3)?);
            a.wait(&mut got[0])?;
            b.wait(&mut got[1])?;
        }
        let expected = if comm.rank() == 0 { [[3], [4]] } else { [[1], [2]] };
        assert_eq!(got, expected);
        Ok(())
    });
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
    on_ranks(1, |comm| {
        assert!(matches!(comm.broadcast(OP, &mut [0], 1), Err(CommError::InvalidArgument { .. })));
        assert!(matches!(comm.all_gather(OP, &[0], &mut [0, 0]), Err(CommError::InvalidArgument { .. })));
        let send = Arc::new(Bytes::from_elems(vec![0u8; 3]));
        let plan = ExchangePlan { send_len: 4, ..Default::default() };
        assert!(matches!(comm.start_all_to_all_v(OP, send, plan), Err(CommError::InvalidArgument { .. })));
        Ok(())
    });
}

/// One rank with a GPU of its own: ranks that share one, as the suite's do, have to go through host memory.
#[cfg(all(feature = "libtorch", feature = "nccl"))]
#[test]
fn an_all_reduce_between_the_backends_operations() {
    use burn_fsep::comm::{local::LocalCommunicator, nccl::NcclConfig};
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
        // SAFETY: the address of a contiguous tensor of `len` numbers, which lives to the end.
        let pending = unsafe { device.start_device_all_reduce(OP, address, len as usize, op) }.unwrap();
        pending.wait().unwrap();
        tensor *= 2.0;
        assert_eq!(tensor.sum(Kind::Double).double_value(&[]), 40.0 * len as f64, "{op:?}");
    }
}
