use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, TensorData},
};

use crate::{FsepRuntime, burn_compat::ModulePath, moe::RouterInfo};

/// Moves the bias that each router of the model has on its choice, if it has one
/// ([`ExpertBiasConfig`](crate::moe::ExpertBiasConfig)), by how many assignments each expert got on all ranks in the training passes
/// since the last call: up by the rate for experts that got less than the mean, down for those that got more
/// (arXiv 2408.15664, algorithm 1). Called after each optimizer step; [`Trainer`](super::Trainer) and `FsepStrategy` do so.
///
/// All ranks know all counts, so nothing travels, and all get the same bits.
pub fn update_expert_biases<M: Module>(runtime: &FsepRuntime, model: M) -> M {
    model.map(&mut Update { path: ModulePath::default(), runtime })
}

/// Whether [`update_expert_biases`] would change anything.
#[cfg(feature = "learner")]
pub(crate) fn has_expert_biases<M: Module>(model: &M) -> bool {
    let mut find = Find { path: ModulePath::default(), is_found: false };
    model.visit(&mut find);
    find.is_found
}

#[cfg(feature = "learner")]
struct Find {
    path: ModulePath<RouterInfo>,
    is_found: bool,
}

#[cfg(feature = "learner")]
impl burn::module::ModuleVisitor for Find {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
        self.is_found |= self.path.metadata().is_some_and(|router| router.expert_bias.is_some());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }
}

struct Update<'a> {
    path: ModulePath<RouterInfo>,
    runtime: &'a FsepRuntime,
}

impl ModuleMapper for Update<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(RouterInfo { router_of_layer, expert_bias: Some((rate, zero_mean)) }) = self.path.metadata().copied()
        else {
            return param;
        };
        if !self.path.path().ends_with("expert_bias") {
            return param;
        }
        let loads = self.runtime.take_expert_loads(router_of_layer);
        // The router of a dense layer, which counts nothing, has none.
        if param.shape()[..] != [loads.len()] {
            return param;
        }
        param.map(|bias| {
            let (shape, dtype) = (bias.shape(), bias.dtype());
            let moves = TensorData::new(moves(&loads, rate, zero_mean), shape);
            let moves = Tensor::<D>::from_data(moves, &bias.device()).cast(DType::F32);
            (bias.cast(DType::F32) + moves).cast(dtype)
        })
    }
}

/// How far each expert's bias moves. `[E] -> [E]`
fn moves(loads: &[u64], rate: f64, zero_mean: bool) -> Vec<f32> {
    // In whole numbers: a mean of counts that are rounded may lie on the other side of a count.
    let (total, experts) = (loads.iter().sum::<u64>(), loads.len() as u64);
    let sign = |&load: &u64| match (load * experts).cmp(&total) {
        std::cmp::Ordering::Less => 1.0,
        std::cmp::Ordering::Equal => 0.0,
        std::cmp::Ordering::Greater => -1.0,
    };
    let signs: Vec<f64> = loads.iter().map(sign).collect();
    let mean = if zero_mean { signs.iter().sum::<f64>() / experts.max(1) as f64 } else { 0.0 };
    signs.into_iter().map(|sign| (rate * (sign - mean)) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_move_towards_balance() {
        assert_eq!(moves(&[10, 30, 20, 20], 1e-3, false), [1e-3, -1e-3, 0.0, 0.0]);
        assert_eq!(moves(&[0, 0, 0, 8], 1e-3, false), [1e-3, 1e-3, 1e-3, -1e-3]);
        let zero_mean = moves(&[0, 0, 0, 8], 1e-3, true);
        assert_eq!(zero_mean, [0.5e-3, 0.5e-3, 0.5e-3, -1.5e-3]);
        assert_eq!(moves(&[0; 4], 1e-3, true), [0.0; 4]);
    }

    /// 64 ranks' counts of 608 to 676 tokens, summed 40,840 where the mean is 40,960 (Megatron-LM PR 7081): in half precision
    /// the sum is not below the mean.
    #[test]
    fn large_counts_are_not_rounded() {
        assert_eq!(moves(&[40_840, 41_080], 1e-3, false), [1e-3, -1e-3]);
        let large = (1 << 55) - 1;
        assert_eq!(moves(&[large, large + 2, large + 1], 1.0, false), [1.0, -1.0, 0.0]);
    }
}
