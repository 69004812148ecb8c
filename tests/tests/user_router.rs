//! Experts take any routing: a router of a user's own, which this crate knows nothing of.

use std::sync::Arc;

use burn::{
    module::Param,
    tensor::{
        Int, Tensor, TensorData,
        activation::{sigmoid, silu},
    },
};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntimeConfig,
    comm::local::{LaunchConfig, RankError},
    moe::RouterOutput,
    shard::{ExpertShape, expert_parameters},
};
use burn_fsep_tests::{assert_close, device, launch, random_layout};

const HIDDEN: usize = 6;
const FFN: usize = 7;
const EXPERTS: usize = 8;
const TOPK: usize = 3;
const SEED: u64 = 11;
const STEPS: usize = 3;

fn config() -> FSEPMoEConfig {
    FSEPMoEConfig::new(HIDDEN, FFN, EXPERTS).with_moe_router_topk(TOPK)
}

fn matrix(rows: usize, columns: usize, seed: usize) -> Tensor<2> {
    let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 7 + seed * 131) as f32 * 0.37).sin()).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), &device())
}

/// A sigmoid router with a bias that only chooses, and weights that do not sum to 1: what `TopKRouter` is not.
struct SigmoidRouter {
    weight: Param<Tensor<2>>,
    bias: Tensor<2>,
}

impl SigmoidRouter {
    fn new() -> Self {
        let weight = Param::from_tensor(matrix(HIDDEN, EXPERTS, 1));
        Self { weight, bias: matrix(1, EXPERTS, 2).detach() }
    }

    fn route(&self, tokens: Tensor<2>) -> RouterOutput {
        let scores = sigmoid(tokens.matmul(self.weight.val()));
        let (_, experts) = (scores.clone().detach() + self.bias.clone()).topk_with_indices(TOPK, 1);
        RouterOutput::new(scores.gather(1, experts.clone()) * 2.5, experts)
    }
}

/// What a step leaves: outputs, and gradients of input, router and experts.
type Left = [Vec<f32>; 4];

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// All experts on all tokens, with the weights that the router gives them: no permutation, no exchange.
fn dense(x: Tensor<2>, target: Tensor<2>, ranks: usize) -> Left {
    let shape = ExpertShape::new(HIDDEN, FFN);
    let params: Vec<f32> =
        (0..EXPERTS).flat_map(|e| expert_parameters(shape, SEED, 0, e, 0..shape.num_params())).collect();
    let experts = Tensor::<2>::from_data(TensorData::new(params, [EXPERTS, shape.num_params()]), &device());
    let (experts, x, router) = (experts.require_grad(), x.require_grad(), SigmoidRouter::new());
    let routed = router.route(x.clone());
    let mut output = x.clone() * 0.0;
    for expert in 0..EXPERTS {
        let part = |start: usize, dims: [usize; 2]| {
            let slice = [expert..expert + 1, start * HIDDEN * FFN..(start + 1) * HIDDEN * FFN];
            experts.clone().slice(slice).reshape(dims).transpose()
        };
        let (gate, up, down) = (part(0, [FFN, HIDDEN]), part(1, [FFN, HIDDEN]), part(2, [HIDDEN, FFN]));
        let y = (silu(x.clone().matmul(gate)) * x.clone().matmul(up)).matmul(down);
        let others = routed.experts.clone().not_equal_elem(expert as i32);
        output = output + y * routed.probs.clone().mask_fill(others, 0.0).sum_dim(1);
    }
    // The mean over ranks of their losses.
    let grads = ((output.clone() * target).sum() / ranks as f32).backward();
    let router = router.weight.val().grad(&grads).unwrap();
    [floats(output.inner()), floats(x.grad(&grads).unwrap()), floats(router), floats(experts.grad(&grads).unwrap())]
}

#[test]
fn a_users_router_equals_the_dense_reference() {
    for tokens in [vec![9], vec![5, 8], vec![4, 0, 7, 3]] {
        let (ranks, total) = (tokens.len(), tokens.iter().sum::<usize>());
        let slots = EXPERTS.div_ceil(ranks) + usize::from(ranks > 1);
        let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
            let rank = comm.rank();
            let runtime = FsepRuntimeConfig::new().with_seed(SEED).init(comm)?;
            let experts = config().with_slots_per_rank(Some(slots)).try_init_experts(&runtime, &device())?;
            let router = SigmoidRouter::new();
            let start: usize = tokens[..rank].iter().sum();
            let mut steps: Vec<Left> = Vec::new();
            for step in 0..STEPS {
                runtime.set_layout(0, Arc::new(random_layout(ranks, slots, EXPERTS, step as u64)))?;
                let mine = |all: Tensor<2>| all.slice([start..start + tokens[rank], 0..HIDDEN]).detach();
                let x = mine(matrix(total, HIDDEN, 10 + step)).require_grad();
                runtime.begin_step(&experts)?;
                let routed = router.route(x.clone());
                let output = experts.try_forward(x.clone(), routed)?;
                assert_eq!(output.counts.total() as usize, total * TOPK);
                steps.push(runtime.run(|| {
                    let grads = (output.hidden.clone() * mine(matrix(total, HIDDEN, 20 + step))).sum().backward();
                    let router = router.weight.val().grad(&grads).unwrap();
                    let experts = experts.weight.val().grad(&grads).unwrap();
                    [floats(output.hidden.inner()), floats(x.grad(&grads).unwrap()), floats(router), floats(experts)]
                })?);
            }
            Ok(steps)
        });
        let results: Vec<Vec<Left>> = results.into_iter().map(Result::unwrap).collect();
        for step in 0..STEPS {
            let expected = dense(matrix(total, HIDDEN, 10 + step), matrix(total, HIDDEN, 20 + step), ranks);
            let parts: Vec<&Left> = results.iter().map(|steps| &steps[step]).collect();
            let rows = |i: usize| parts.iter().flat_map(|part| part[i].iter().copied()).collect::<Vec<f32>>();
            let share = |values: Vec<f32>| values.into_iter().map(|v| v / ranks as f32).collect::<Vec<f32>>();
            let mut router = vec![0.0; HIDDEN * EXPERTS];
            parts.iter().for_each(|part| router.iter_mut().zip(&part[2]).for_each(|(sum, d)| *sum += d));
            let (params, shard) = (3 * HIDDEN * FFN, (3 * HIDDEN * FFN).div_ceil(ranks));
            let whole = |e: usize| parts.iter().flat_map(move |part| &part[3][e * shard..(e + 1) * shard]).take(params);
            let experts: Vec<f32> = (0..EXPERTS).flat_map(whole).copied().collect();
            let actual = [rows(0), share(rows(1)), share(router), experts];
            for (what, (actual, expected)) in
                ["output", "input", "router", "experts"].iter().zip(actual.iter().zip(&expected))
            {
                let data = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
                assert_close(&format!("{what}, {ranks} ranks, step {step}"), &data(actual), &data(expected), 1e-5);
            }
        }
    }
}

/// The error of each of two ranks where rank 1 routes its 4 tokens so.
fn errors(routing: impl Fn() -> RouterOutput + Sync) -> Vec<FsepError> {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntimeConfig::new().init(comm)?;
        let experts = config().try_init_experts(&runtime, &device())?;
        let x = matrix(4, HIDDEN, 3);
        let routed = if runtime.rank() == 1 { routing() } else { SigmoidRouter::new().route(x.clone()) };
        experts.try_forward(x, routed).map(|_| ())
    });
    let error = |result: Result<(), RankError<FsepError>>| match result {
        Err(RankError::Failed { error, .. }) => error,
        other => panic!("{other:?}"),
    };
    results.into_iter().map(error).collect()
}

fn chosen(experts: [[i32; TOPK]; 4]) -> RouterOutput {
    RouterOutput::new(
        Tensor::ones([4, TOPK], &device()).require_grad(),
        Tensor::<2, Int>::from_data(experts, &device()),
    )
}

#[test]
fn experts_that_there_are_not_are_told_on_all_ranks() {
    for wrong in [-1, EXPERTS as i32 + 1, 1 << 20] {
        for error in errors(|| chosen([[0, 1, 2], [3, wrong, 4], [5, 6, 7], [0, 1, 2]])) {
            let FsepError::Shape { what, actual, .. } = &error else { panic!("{wrong}: {error}") };
            assert_eq!((what.as_str(), actual.as_str()), ("experts that rank 1 chose in layer 0", "1 others"));
        }
    }
}

#[test]
fn a_token_without_an_expert_is_told_on_all_ranks() {
    let none = EXPERTS as i32;
    for error in errors(|| chosen([[0, 1, 2], [3, none, 4], [5, 6, 7], [0, 1, 2]])) {
        assert_eq!(error, FsepError::NoExpert { layer: 0, rank: 1 });
    }
}

#[test]
fn a_routing_of_the_wrong_shape_is_refused() {
    let probs = || Tensor::<2>::ones([4, TOPK - 1], &device());
    let experts = || Tensor::<2, Int>::zeros([3, TOPK], &device());
    for (routing, named) in [
        (RouterOutput { probs: probs(), ..chosen([[0, 1, 2]; 4]) }, "`probs`"),
        (RouterOutput { experts: experts(), ..chosen([[0, 1, 2]; 4]) }, "`experts`"),
    ] {
        let error = &errors(|| routing.clone())[1];
        assert!(matches!(error, FsepError::Shape { what, .. } if what.contains(named)), "{error}");
    }
}
