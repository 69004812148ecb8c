//! Top-k on the device: one unit a row, which looks for the best that is worse than the last one found.

use burn::{
    backend::{cubecl::dtype_to_elem_type, get_or_init_device_settings},
    tensor::{DType, Shape},
};
use burn_cubecl::{
    CubeBackend,
    cubecl::{self, calculate_cube_count_elemwise, ir::ElemType, prelude::*},
    kernel::into_contiguous,
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};

/// [`fsep_top_k`](super::super::FsepDeviceOps::fsep_top_k), in the device's type of integers.
pub(super) fn top_k(numbers: CubeTensor, topk: usize) -> CubeTensor {
    let numbers = into_contiguous(numbers);
    let [rows, width] = numbers.meta.shape().dims();
    let dtype: DType = get_or_init_device_settings::<CubeBackend>(&numbers.device).int_dtype.into();
    let (client, device) = (numbers.client.clone(), numbers.device.clone());
    let chosen = empty_device_contiguous_dtype(client.clone(), device, Shape::new([rows, topk]), dtype);
    if rows * topk > 0 {
        let dim = CubeDim::new(&client, rows);
        top_k_of_rows::launch(
            &client,
            calculate_cube_count_elemwise(&client, rows, dim),
            dim,
            numbers.into_tensor_arg(),
            chosen.clone().into_tensor_arg(),
            width as u32,
            topk as u32,
            dtype_to_elem_type(dtype),
        );
    }
    chosen
}

/// Bits that are ordered as the numbers are: equal for both zeros, and for what is no number those of minus infinity. On bits, because
/// shader compilers may take it for granted that there are neither infinities nor NaNs.
#[cube]
fn order_of(number: f32) -> u32 {
    let bits = u32::reinterpret(number);
    let mut order = bits | 0x8000_0000u32;
    if (bits & 0x7fff_ffffu32) > 0x7f80_0000u32 {
        order = 0x007f_ffffu32;
    } else if bits > 0x8000_0000u32 {
        order = !bits;
    }
    order
}

/// `[R, W] -> [R, topk]`
#[cube(launch)]
fn top_k_of_rows<I: Int>(
    numbers: &Tensor<f32>,
    chosen: &mut Tensor<I>,
    width: u32,
    topk: u32,
    #[define(I)] _dtype: ElemType,
) {
    let row = ABSOLUTE_POS;
    if row * topk as usize >= chosen.len() {
        terminate!();
    }
    let mut last = 0u32;
    let mut last_order = 0xffff_ffffu32;
    for k in 0..topk {
        let mut best = 0u32;
        let mut best_order = 0u32;
        for i in 0..width {
            let order = order_of(numbers[row * width as usize + i as usize]);
            let is_left = order < last_order || (order == last_order && i > last);
            if is_left && order > best_order {
                best = i;
                best_order = order;
            }
        }
        chosen[row * topk as usize + k as usize] = I::cast_from(best);
        last = best;
        last_order = best_order;
    }
}
