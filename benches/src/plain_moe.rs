//! The layer of Burn's own operations, as Burn's users write it.

use burn::tensor::{
    Device, Distribution, Int, Tensor,
    activation::{silu, softmax},
};

/// A mixture of SwiGLU experts with a router by softmax, whose top-k weights are normalised. Nothing of burn-fsep is in it.
#[derive(Debug)]
pub struct PlainMoe {
    /// `[D, E]`
    router: Tensor<2>,
    /// Gate and up of each expert, `[D, 2F]`.
    gate_up: Vec<Tensor<2>>,
    /// `[F, D]`
    down: Vec<Tensor<2>>,
    topk: usize,
}

impl PlainMoe {
    /// With random parameters that want gradients.
    pub fn new(hidden: usize, ffn: usize, experts: usize, topk: usize, device: &Device) -> Self {
        let random =
            |dims: [usize; 2]| Tensor::random(dims, Distribution::Normal(0.0, 0.02), device).detach().require_grad();
        Self {
            router: random([hidden, experts]),
            gate_up: (0..experts).map(|_| random([hidden, 2 * ffn])).collect(),
            down: (0..experts).map(|_| random([ffn, hidden])).collect(),
            topk,
        }
    }

    /// `[T, D] -> [T, D]`
    ///
    /// # Panics
    ///
    /// If the device cannot be read.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let ([tokens, hidden], device, experts) = (x.dims(), x.device(), self.down.len());
        let probs = softmax(x.clone().matmul(self.router.clone()), 1);
        let (weights, chosen) = probs.topk_with_indices(self.topk, 1);
        let weights = weights.clone() / weights.sum_dim(1);
        // Assignments in the order of experts: each expert computes one run of rows.
        let chosen: Vec<usize> = chosen.into_data().iter::<i64>().map(|expert| expert as usize).collect();
        let mut order: Vec<usize> = (0..chosen.len()).collect();
        order.sort_by_key(|&assignment| chosen[assignment]);
        let mut row_of = vec![0i32; order.len()];
        order.iter().enumerate().for_each(|(row, &assignment)| row_of[assignment] = row as i32);
        let token_of: Vec<i32> = order.iter().map(|assignment| (assignment / self.topk) as i32).collect();
        let upload = |indices: &[i32]| Tensor::<1, Int>::from_ints(indices, &device);
        let rows = x.select(0, upload(&token_of));
        let mut outputs = Vec::with_capacity(experts);
        let mut start = 0;
        for expert in 0..experts {
            let len = chosen.iter().filter(|&&of| of == expert).count();
            if len == 0 {
                continue;
            }
            let first = rows.clone().narrow(0, start, len).matmul(self.gate_up[expert].clone());
            let [gate, up] = first.chunk(2, 1).try_into().expect("two halves");
            outputs.push((silu(gate) * up).matmul(self.down[expert].clone()));
            start += len;
        }
        let rows = Tensor::cat(outputs, 0).select(0, upload(&row_of)).reshape([tokens, self.topk, hidden]);
        (rows * weights.reshape([tokens, self.topk, 1])).sum_dim(1).reshape([tokens, hidden])
    }
}
