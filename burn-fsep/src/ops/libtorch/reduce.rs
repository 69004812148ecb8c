use std::sync::Arc;

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Device, Kind};

use super::super::ReduceOps;
use crate::{
    FsepError,
    comm::{Communicator, Operation, PendingDeviceExchange, ReduceOp},
};

impl ReduceOps for LibTorch {
    fn fsep_is_same(a: TchTensor, b: TchTensor) -> bool {
        let (a, b) = (a.tensor, b.tensor);
        let layout = |tensor: &tch::Tensor| (tensor.kind(), tensor.device(), tensor.size(), tensor.stride());
        a.data_ptr() == b.data_ptr() && layout(&a) == layout(&b)
    }
}
