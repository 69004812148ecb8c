//! What every communicator has to do right. Collective: all ranks call these in the same order.

use std::sync::Arc;

use burn::tensor::Bytes;
use burn_fsep::comm::{
    Block, CommError, Communicator, ExchangePlan, Operation, ReduceBuffer, ReduceOp, all_gather_u64,
};

const OP: Operation = Operation::new("test");

/// Reductions are in rank order, of few numbers, none, and many.
///
/// # Errors
///
/// Any [`CommError`].
///
/// # Panics
///
/// If numbers are not what they should be.
pub fn check_reductions(comm: &dyn Communicator) -> Result<(), CommError> {
    let ranks = comm.size();
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
    comm.all_reduce(OP, ReduceBuffer::F32(&mut []), ReduceOp::Sum)?;

    let value = |rank: usize, i: usize| ((rank * 31 + i * 7) % 1009) as f32 * 0.1;
    let mut many: Vec<f32> = (0..100_003).map(|i| value(comm.rank(), i)).collect();
    comm.all_reduce(OP, ReduceBuffer::F32(&mut many), ReduceOp::Sum)?;
    for (i, sum) in many.into_iter().enumerate() {
        let expected = (0..ranks).map(|rank| value(rank, i)).reduce(|a, b| a + b).unwrap();
        assert_eq!(sum.to_bits(), expected.to_bits(), "number {i}");
    }
    Ok(())
}

/// # Errors
///
/// Any [`CommError`].
///
/// # Panics
///
/// If values are not what they should be.
pub fn check_gather_and_broadcast(comm: &dyn Communicator) -> Result<(), CommError> {
    let rank = comm.rank() as u64;
    let expected: Vec<u64> = (0..comm.size() as u64).flat_map(|rank| [rank, 10 * rank]).collect();
    assert_eq!(all_gather_u64(comm, OP, &[rank, 10 * rank])?, expected);
    let root = comm.size() - 1;
    for len in [5, 3_000_000] {
        let mut buffer = vec![comm.rank() as u8; len];
        comm.broadcast(OP, &mut buffer, root)?;
        assert!(buffer.iter().all(|&byte| byte == root as u8));
    }
    comm.broadcast(OP, &mut [], 0)?;
    comm.barrier(OP)
}

/// Rank s sends to rank r: (s + r) blocks of 1, 2, .. times `unit` bytes, from places that overlap.
///
/// # Errors
///
/// Any [`CommError`].
///
/// # Panics
///
/// If bytes are not what they should be.
pub fn check_blocks(comm: &dyn Communicator, unit: usize) -> Result<(), CommError> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let blocks = |peer: usize| (1..=rank + peer).map(move |len| (peer, len));
    let len_of = |(_, len): &(usize, usize)| len * unit;
    let all: Vec<(usize, usize)> = (0..ranks).rev().flat_map(blocks).collect();
    let sends: Vec<Block> = all.iter().map(|b| Block { peer: b.0, offset: unit * (b.1 % 3), len: len_of(b) }).collect();
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
    let send_len = (2 * ranks + 2) * unit;
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
}

/// Duplicates have an order of their own: ranks start and await two exchanges in different orders.
///
/// # Errors
///
/// Any [`CommError`].
///
/// # Panics
///
/// If an exchange gets what belongs to the other.
pub fn check_duplicates(comm: &dyn Communicator) -> Result<(), CommError> {
    let other = comm.duplicate("other")?;
    let (rank, ranks) = (comm.rank(), comm.size());
    let exchange = |comm: &dyn Communicator, value: usize| {
        let block = |peer| vec![Block { peer, offset: 0, len: 1 }];
        let (sends, recvs) = (block((rank + 1) % ranks), block((rank + ranks - 1) % ranks));
        let plan = ExchangePlan { sends, recvs, recv_len: 1, send_len: 1 };
        comm.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![value as u8])), plan)
    };
    let mut got = [[0u8]; 2];
    if rank.is_multiple_of(2) {
        let (a, b) = (exchange(comm, rank)?, exchange(other.as_ref(), 100 + rank)?);
        b.wait(&mut got[1])?;
        a.wait(&mut got[0])?;
    } else {
        let (b, a) = (exchange(other.as_ref(), 100 + rank)?, exchange(comm, rank)?);
        a.wait(&mut got[0])?;
        b.wait(&mut got[1])?;
    }
    let before = ((rank + ranks - 1) % ranks) as u8;
    assert_eq!(got, [[before], [100 + before]]);
    Ok(())
}

/// # Errors
///
/// None; for symmetry.
///
/// # Panics
///
/// If a wrong argument is accepted.
pub fn check_wrong_arguments(comm: &dyn Communicator) -> Result<(), CommError> {
    assert!(matches!(comm.broadcast(OP, &mut [0], comm.size()), Err(CommError::InvalidArgument { .. })));
    let gathered = comm.all_gather(OP, &[0], &mut vec![0; comm.size() + 1]);
    assert!(matches!(gathered, Err(CommError::InvalidArgument { .. })));
    let send = Arc::new(Bytes::from_elems(vec![0u8; 3]));
    let plan = ExchangePlan { send_len: 4, ..Default::default() };
    assert!(matches!(comm.start_all_to_all_v(OP, send.clone(), plan), Err(CommError::InvalidArgument { .. })));
    // The sum of offset and length does not fit a number.
    let beyond = vec![Block { peer: 0, offset: usize::MAX, len: 2 }];
    let plan = ExchangePlan { sends: beyond, send_len: 3, ..Default::default() };
    assert!(matches!(comm.start_all_to_all_v(OP, send, plan), Err(CommError::InvalidArgument { .. })));
    Ok(())
}
