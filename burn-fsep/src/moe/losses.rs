use burn::{
    config::Config,
    tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData},
};

use super::{RouterOutput, TokenMask};
use crate::FsepError;

/// Over what the load-balancing loss is taken.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum LoadBalancing {
    /// All tokens of all ranks.
    GlobalBatch,
    /// Each sequence by itself (DeepSeek-V2's and V3's `seq_aux`): the last axis but one of the layer's input.
    Sequence,
}

/// Weights of the auxiliary losses; 0 is off.
///
/// The losses are means over the tokens of all ranks. A rank has its own tokens' part of the sum, divided by the mean number of
/// tokens of a rank: the mean over ranks, which averaged gradients optimise, is then the loss of the whole batch, however its
/// tokens are split. That is, a rank's own mean weighs `W * T_r / T`.
#[derive(Debug, Clone, Copy)]
pub(super) struct AuxiliaryLosses {
    /// Of the load-balancing loss.
    pub balancing: f64,
    /// Over what the load-balancing loss is taken.
    pub over: LoadBalancing,
    /// Of the z-loss.
    pub z: f64,
}

/// How a layer has routed its tokens, for losses over several layers: [`pooled_load_balancing_loss`].
#[derive(Debug, Clone)]
pub struct LayerRouting {
    /// Scores of all experts, if the router says them. `[T, E]`
    pub scores: Option<Tensor<2>>,
    /// Assignments of each expert, on all ranks. Shape `[E]`.
    pub expert_loads: Vec<u64>,
    /// Experts per token `K`.
    pub topk: usize,
    /// World size `W`.
    pub ranks: usize,
}

/// Which sequence each of a rank's tokens is of.
pub(super) struct Sequences {
    number: usize,
    /// `[T]`
    of_token: Tensor<1, Int>,
}

impl Sequences {
    /// Those of an input of the shape `dims`: its last axis but one counts a sequence's tokens.
    pub fn new(dims: &[usize], mask: Option<&TokenMask>, like: &Tensor<2>) -> Self {
        let (len, number) = match dims {
            [rest @ .., len, _] => (*len, rest.iter().product()),
            _ => (1, 1),
        };
        let rows = match mask {
            Some(mask) => mask.rows(),
            None => Tensor::arange(0..like.dims()[0] as i64, &like.device().inner()),
        };
        Self { number, of_token: rows.div_scalar(len.max(1) as i64) }
    }
}

impl LayerRouting {
    /// Tokens of all ranks.
    fn tokens(&self) -> f64 {
        self.expert_loads.iter().sum::<u64>() as f64 / self.topk as f64
    }

    /// Mean number of tokens of a rank. Without a token all sums are 0, and a divisor only has to be a number.
    fn tokens_per_rank(&self) -> f64 {
        if self.tokens() > 0.0 { self.tokens() / self.ranks as f64 } else { 1.0 }
    }
}

impl AuxiliaryLosses {
    /// The sum of those that are on, `[1]`. `routed` is the router's output, without its scores, which are in `routing`.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if a loss is on and the router does not say what it needs.
    pub fn of(
        &self,
        routed: RouterOutput,
        routing: &LayerRouting,
        sequences: impl FnOnce(&Tensor<2>) -> Sequences,
    ) -> Result<Option<Tensor<1>>, FsepError> {
        let needed = |coeff: f64, tensor: Option<Tensor<2>>, option: &str, what: &str| {
            if coeff == 0.0 {
                return Ok(None);
            }
            let missing = || FsepError::Config(format!("{option} is {coeff}, but the router's output has no {what}"));
            tensor.ok_or_else(missing).map(Some)
        };
        let scores = needed(self.balancing, routing.scores.clone(), "moe_aux_loss_coeff", "scores")?;
        let logits = needed(self.z, routed.logits, "moe_z_loss_coeff", "logits")?;
        let balancing = scores.map(|scores| match self.over {
            LoadBalancing::GlobalBatch => load_balancing_loss(scores, routing) * self.balancing,
            LoadBalancing::Sequence => {
                let sequences = sequences(&scores);
                sequence_loss(scores, routed.experts, &sequences, routing) * self.balancing
            }
        });
        let z = logits.map(|logits| z_loss(logits, self.z, routing.tokens_per_rank()));
        Ok([balancing, z].into_iter().flatten().reduce(|a, b| a + b))
    }
}

/// The load-balancing auxiliary loss `E * sum_e f_e * P_e` (Switch Transformer, eq. 4), where `f_e` is the share of all
/// assignments that go to expert `e` and `P_e` its mean score. `scores`: `[T, E]`
fn load_balancing_loss(scores: Tensor<2>, routing: &LayerRouting) -> Tensor<1> {
    let experts = scores.dims()[1];
    let all: u64 = routing.expert_loads.iter().sum();
    let factor = experts as f64 / (all.max(1) as f64 * routing.tokens_per_rank());
    let weights: Vec<f32> = routing.expert_loads.iter().map(|&n| (n as f64 * factor) as f32).collect();
    // As scores are, whatever type the device makes by itself.
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, experts]), (&scores.device(), DType::F32));
    (scores * weights).sum()
}

/// The same of each sequence by itself, and their mean, in which a sequence weighs as many tokens as it has (DeepSeek-V2,
/// section 2.2.3). `scores`: `[T, E]`, `experts`: `[T, K]`
fn sequence_loss(
    scores: Tensor<2>,
    experts: Tensor<2, Int>,
    sequences: &Sequences,
    routing: &LayerRouting,
) -> Tensor<1> {
    let (Sequences { number, of_token }, [tokens, num_experts], device) = (sequences, scores.dims(), scores.device());
    let topk = routing.topk;
    let add = |dims: [usize; 2], at: Tensor<1, Int>, values: Tensor<2>| {
        Tensor::<2>::zeros(dims, (&device, DType::F32)).select_assign(0, at, values, IndexingUpdateOp::Add)
    };
    let ones = |len: usize| Tensor::<2>::ones([len, 1], (&device, DType::F32));
    let lens = add([*number, 1], of_token.clone(), ones(tokens)).clamp_min(1.0);
    let sums = add([*number, num_experts], of_token.clone(), scores);
    // A router's own choice of integers.
    let experts = experts.cast(of_token.dtype());
    let places = of_token.clone().mul_scalar(num_experts as i64).reshape([tokens, 1]) + experts;
    let counts = add([number * num_experts, 1], places.reshape([tokens * topk]), ones(tokens * topk));
    let products = counts.reshape([*number, num_experts]) * sums / lens;
    products.sum() * (num_experts as f64 / (topk as f64 * routing.tokens_per_rank()))
}

/// transformers' load-balancing loss, `load_balancing_loss_func`: `E * sum_e f_e * P_e`, where `f_e`, the assignments to expert `e` per
/// token, and `P_e`, its mean score, are both means over the tokens of all layers and ranks. Scores that are all equal give `K`,
/// not 1. As an auxiliary loss of a layer it is the rank's part: to be multiplied by the model's `router_aux_loss_coef`
/// and added to the rank's loss. `[1]`
///
/// # Errors
///
/// [`FsepError::Config`] if there is no layer, a layer has no scores, or layers have unequally many experts.
pub fn pooled_load_balancing_loss(layers: &[LayerRouting]) -> Result<Tensor<1>, FsepError> {
    let fail = |why: &str| FsepError::Config(format!("the load-balancing loss of all layers: {why}"));
    let first = layers.first().ok_or_else(|| fail("there is no layer"))?;
    let experts = first.expert_loads.len();
    if layers.iter().any(|layer| layer.expert_loads.len() != experts) {
        return Err(fail("layers have unequally many experts"));
    }
    let sums = layers.iter().map(|layer| {
        let scores = layer.scores.clone().ok_or_else(|| fail("a layer's router does not say its scores"))?;
        Ok(scores.sum_dim(0))
    });
    let sums = sums.collect::<Result<Vec<Tensor<2>>, FsepError>>()?;
    let sums = sums.into_iter().reduce(|a, b| a + b).expect("there is a layer");
    let tokens: f64 = layers.iter().map(LayerRouting::tokens).sum::<f64>().max(1.0);
    let factor = (experts * first.ranks) as f64 / (tokens * tokens);
    let weight = |e: usize| (layers.iter().map(|layer| layer.expert_loads[e]).sum::<u64>() as f64 * factor) as f32;
    let weights = TensorData::new((0..experts).map(weight).collect::<Vec<_>>(), [1, experts]);
    Ok((sums.clone() * Tensor::from_data(weights, (&sums.device(), DType::F32))).sum())
}

/// The router z-loss `coeff * mean_t logsumexp(logits_t)^2` (ST-MoE, eq. 5). `logits`: `[T, E]`
fn z_loss(logits: Tensor<2>, coeff: f64, tokens_per_rank: f64) -> Tensor<1> {
    let max = logits.clone().detach().max_dim(1);
    let log_sum = (logits - max.clone()).exp().sum_dim(1).log() + max;
    log_sum.square().sum() * (coeff / tokens_per_rank)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::{
        super::{TopKRouterConfig, choice},
        *,
    };

    /// These logits routed on one rank.
    fn routed(logits: &[f32], experts: usize, topk: usize) -> (RouterOutput, LayerRouting) {
        let data = TensorData::new(logits.to_vec(), [logits.len() / experts, experts]);
        let logits = Tensor::<2>::from_data(data, &Device::flex());
        let routed = choice::top_k(logits, &TopKRouterConfig::new(), None, topk, DType::F32);
        let mut expert_loads = vec![0u64; experts];
        routed.experts.to_data().iter::<i64>().for_each(|expert| expert_loads[expert as usize] += 1);
        let routing = LayerRouting { scores: routed.scores.clone(), expert_loads, topk, ranks: 1 };
        (routed, routing)
    }

    fn losses_over(over: LoadBalancing, dims: &[usize], logits: &[f32], topk: usize) -> [f32; 2] {
        let (routed, routing) = routed(logits, dims[dims.len() - 1], topk);
        [(1.0, 0.0), (0.0, 1.0)].map(|(balancing, z)| {
            let losses = AuxiliaryLosses { balancing, over, z };
            let loss = losses.of(routed.clone(), &routing, |like| Sequences::new(dims, None, like)).unwrap();
            loss.expect("a loss is on").into_scalar::<f32>()
        })
    }

    /// The losses of these logits on one rank, by the router's own choice.
    fn losses(logits: &[f32], experts: usize, topk: usize) -> [f32; 2] {
        losses_over(LoadBalancing::GlobalBatch, &[logits.len() / experts, experts], logits, topk)
    }

    fn assert_near(actual: f32, expected: f32) {
        assert!((actual - expected).abs() <= 2e-6 * expected, "{actual} is not {expected}");
    }

    /// transformers' `load_balancing_loss_func` is `K` times as large (2.0 and 6.4): its shares are per token and sum to `K`.
    #[test]
    fn the_balancing_loss_is_that_of_the_switch_transformer() {
        let [uniform, z] = losses(&[0.0; 4 * 8], 8, 2);
        assert_near(uniform, 1.0);
        assert_near(z, 4.324077);
        // All tokens go to experts 0 and 1, with 0.4 each.
        let token: Vec<f32> = [0.4f32, 0.4].into_iter().chain([0.2 / 6.0; 6]).map(f32::ln).collect();
        assert_near(losses(&token.repeat(5), 8, 2)[0], 3.2);
    }

    /// Two layers that send all tokens to one expert each, with 0.7: pooled over layers, as in transformers, it would be 1.6.
    #[test]
    fn the_balancing_loss_is_that_of_a_layer() {
        for expert in [0, 1] {
            let token: Vec<f32> = (0..4).map(|e| if e == expert { 0.7f32.ln() } else { 0.1f32.ln() }).collect();
            assert_near(losses(&token.repeat(3), 4, 1)[0], 2.8);
        }
    }

    /// The two layers of the test above: pooled it is 1.6, as in transformers, and for equal scores `K`.
    #[test]
    fn the_pooled_loss_is_that_of_transformers() {
        let layers = [0, 1].map(|expert| {
            let token: Vec<f32> = (0..4).map(|e| if e == expert { 0.7f32.ln() } else { 0.1f32.ln() }).collect();
            routed(&token.repeat(3), 4, 1).1
        });
        let pooled = |layers: &[LayerRouting]| pooled_load_balancing_loss(layers).unwrap().into_scalar::<f32>();
        assert_near(pooled(&layers), 1.6);
        assert_near(pooled(&layers[..1]), 2.8);
        assert_near(pooled(&[routed(&[0.0; 4 * 8], 8, 2).1]), 2.0);
        let token: Vec<f32> = [0.4f32, 0.4].into_iter().chain([0.2 / 6.0; 6]).map(f32::ln).collect();
        assert_near(pooled(&[routed(&token.repeat(5), 8, 2).1]), 6.4);

        let other = LayerRouting { expert_loads: vec![1; 3], ..layers[0].clone() };
        let silent = LayerRouting { scores: None, ..layers[0].clone() };
        for (layers, named) in
            [(vec![], "no layer"), (vec![other, layers[1].clone()], "unequally"), (vec![silent], "scores")]
        {
            let error = pooled_load_balancing_loss(&layers).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    /// Two sequences that send all tokens to one expert each: each by itself is as unbalanced as can be, together they are even.
    #[test]
    fn a_sequence_is_balanced_by_itself() {
        let token = |expert: usize| (0..2).map(move |e| if e == expert { 0.9f32.ln() } else { 0.1f32.ln() });
        let logits: Vec<f32> = (0..6).flat_map(|t| token(t / 3)).collect();
        let over = |over, dims: &[usize]| losses_over(over, dims, &logits, 1)[0];
        assert_near(over(LoadBalancing::GlobalBatch, &[2, 3, 2]), 1.0);
        assert_near(over(LoadBalancing::Sequence, &[2, 3, 2]), 1.8);
        // One sequence is the batch.
        assert_near(over(LoadBalancing::Sequence, &[6, 2]), 1.0);
        // With other lengths: the first has tokens of one expert alone, the second one of these and three of the other.
        let second = 2.0 * (0.25 * (0.9 + 3.0 * 0.1) / 4.0 + 0.75 * (0.1 + 3.0 * 0.9) / 4.0);
        let mask = TokenMask::new(&[true, true, false, false, true, true, true, true], &Device::flex());
        let dims = [2, 4, 2];
        let (routed, routing) = routed(&logits, 2, 1);
        let losses = AuxiliaryLosses { balancing: 1.0, over: LoadBalancing::Sequence, z: 0.0 };
        let loss = losses.of(routed, &routing, |like| Sequences::new(&dims, Some(&mask), like)).unwrap().unwrap();
        assert_near(loss.into_scalar::<f32>(), (2.0 * 1.8 + 4.0 * second) / 6.0);
    }

    #[test]
    fn no_loss_without_a_coefficient_and_none_but_zero_without_a_token() {
        for over in [LoadBalancing::GlobalBatch, LoadBalancing::Sequence] {
            let (routed, routing) = routed(&[], 4, 2);
            let routing = LayerRouting { ranks: 2, ..routing };
            let loss = |balancing, z| {
                let losses = AuxiliaryLosses { balancing, over, z };
                losses.of(routed.clone(), &routing, |like| Sequences::new(&[0, 4], None, like)).unwrap()
            };
            assert!(loss(0.0, 0.0).is_none());
            assert_eq!(loss(1.0, 1.0).unwrap().into_scalar::<f32>(), 0.0);
            assert_eq!(pooled_load_balancing_loss(std::slice::from_ref(&routing)).unwrap().into_scalar::<f32>(), 0.0);
        }
    }

    #[test]
    fn a_loss_that_the_router_says_nothing_for_is_refused() {
        for (balancing, z, named) in [(1.0, 0.0, "moe_aux_loss_coeff"), (0.0, 1.0, "moe_z_loss_coeff")] {
            let (mut routed, mut routing) = routed(&[0.0], 1, 1);
            (routed.logits, routing.scores) = (None, None);
            let losses = AuxiliaryLosses { balancing, over: LoadBalancing::GlobalBatch, z };
            let error =
                losses.of(routed, &routing, |like| Sequences::new(&[1, 1], None, like)).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
