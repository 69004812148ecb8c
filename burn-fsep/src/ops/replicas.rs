//! Sums of slot gradients over replicas, on any backend.

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::{FloatDType, Shape, Slice},
};
use burn_fsep_planner::Layout;

use super::types::cast;

/// [`sum_replicas`](crate::shard::sum_replicas) without leaving the device: `[N * C * S] -> [E, S]`, in rank order, half precision summed in single.
pub(super) fn sum_on_device<B: Backend>(
    received: FloatTensor<B>,
    layout: &Layout,
    shard_len: usize,
    scale: f64,
    to: FloatDType,
) -> FloatTensor<B> {
    let dtype: FloatDType = received.dtype().into();
    let wide = if matches!(dtype, FloatDType::BF16 | FloatDType::F16) { FloatDType::F32 } else { dtype };
    let device = received.device();
    let experts = layout.num_experts();
    let mut sums: Vec<Option<FloatTensor<B>>> = vec![None; experts];
    for (slot, &expert) in layout.as_slice().iter().enumerate() {
        let part = B::float_slice(received.clone(), &[Slice::from(slot * shard_len..(slot + 1) * shard_len)]);
        let part = cast::<B>(part, Some(wide));
        let sum = &mut sums[expert as usize];
        *sum = Some(match sum.take() {
            Some(sum) => B::float_add(sum, part),
            None => part,
        });
    }
    let scaled = |sum: Option<FloatTensor<B>>| match sum {
        Some(sum) => cast::<B>(B::float_mul_scalar(sum, scale.into()), Some(to)),
        None => B::float_zeros(Shape::new([shard_len]), &device, to),
    };
    let sums = sums.into_iter().map(scaled).collect();
    B::float_reshape(B::float_cat(sums, 0), Shape::new([experts, shard_len]))
}
