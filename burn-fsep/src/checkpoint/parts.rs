//! Optimizer state that is cut over ranks, made whole for files.

use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::Bytes;

use super::{CheckpointError, HeldState, snapshot::SavedParam, tensors::HostTensor};
use crate::{
    FsepRuntime,
    comm::{Block, Communicator, ExchangePlan, Operation},
    shard::FlatParts,
};

const STATE: Operation = Operation::new("parts of the optimizer state");

/// The parameters with their states whole on the first of the ranks that share them, which writes them; the others keep none. One
/// tensor after the other: only where it is written there is more than one at a time. Collective.
pub(super) fn gather_states(
    runtime: &FsepRuntime,
    params: Vec<SavedParam>,
) -> Result<Vec<SavedParam>, CheckpointError> {
    let whole = |mut saved: SavedParam| {
        let Some((parts, comm)) =
            saved.param.state_parts(runtime, HeldState::OwnPart).filter(|_| saved.parts.is_some())
        else {
            return Ok(saved);
        };
        let mut tensors = BTreeMap::new();
        for (field, tensor) in std::mem::take(&mut saved.state.tensors) {
            if let Some(whole) = gather_tensor(comm.as_ref(), parts, tensor, &saved.param.value_shape)? {
                tensors.insert(field, whole);
            }
        }
        saved.state.tensors = tensors;
        saved.parts = None;
        Ok(saved)
    };
    params.into_iter().map(whole).collect()
}

/// A tensor of which each rank has a part, on rank 0.
fn gather_tensor(
    comm: &dyn Communicator,
    parts: FlatParts,
    tensor: HostTensor,
    shape: &[usize],
) -> Result<Option<HostTensor>, CheckpointError> {
    let (size, is_root) = (tensor.dtype.bitsize() / 8, comm.rank() == 0);
    let len = |rank| parts.range(rank).len() * size;
    let block = |peer, offset, len| Some(Block { peer, offset, len }).filter(|block| block.len > 0);
    let mut recvs = Vec::new();
    if is_root {
        recvs.extend((0..comm.size()).filter_map(|rank| block(rank, parts.range(rank).start * size, len(rank))));
    }
    let recv_len = if is_root { shape.iter().product::<usize>() * size } else { 0 };
    let sends = block(0, 0, len(comm.rank())).into_iter().collect();
    let plan = ExchangePlan { sends, recvs, recv_len, send_len: tensor.bytes.len() };
    let mut bytes = vec![0; recv_len];
    comm.start_all_to_all_v(STATE, Arc::new(tensor.bytes), plan)?.wait(&mut bytes)?;
    let whole = HostTensor { dtype: tensor.dtype, shape: shape.to_vec(), bytes: Bytes::from_bytes_vec(bytes) };
    Ok(is_root.then_some(whole))
}
