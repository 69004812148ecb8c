use std::sync::Arc;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Gradients, Tensor, TensorData, activation::softmax},
};
use burn_fsep::{
    ExpertParallelism, FSEPMoEConfig, FsepError, FsepRuntimeConfig, TokenRows,
    comm::Communicator,
    moe::{DenseMoE, SharedExpert, TopKRouter},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::{SplitAny, assert_close, device, launch, launch_config, random_layout};

/// One comparison of the FSEP layer with the dense layer.
#[derive(Debug, Clone)]
pub struct ParityCase {
    /// Layer configuration; its slots are this case's `C`.
    pub config: FSEPMoEConfig,
    /// Slots a rank `C`.
    pub slots: usize,
    /// Tokens of each rank. Shape `[W]`.
    pub tokens: Vec<usize>,
    /// Groups of ranks that share the experts.
    pub groups: usize,
    /// Who computes what.
    pub split: SplitAny,
    /// Steps, each with another random layout.
    pub steps: usize,
    /// Seed of values and layouts.
    pub seed: u64,
}

/// What one step leaves on a rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ParityStep {
    output: Vec<f32>,
    d_input: Vec<f32>,
    d_router: Vec<f32>,
    /// Of the router's bias and of the shared expert, one after the other.
    d_others: Vec<f32>,
    d_experts: Vec<f32>,
}

/// Runs the layer on `W` ranks and the dense layer on all tokens, and compares outputs, input gradients and the
/// gradients of all parameters to `tolerance`, for all ways in which tokens travel.
///
/// The experts' gradients are compared expert by expert: each has a scale of its own. Returns the largest relative
/// error.
///
/// # Panics
///
/// If they differ or a rank fails.
pub fn check_parity(case: &ParityCase, tolerance: f64) -> f64 {
    check_ways(case, &TOKEN_TRAVEL, tolerance)
}

/// As [`check_parity`], of the `index`-th of many cases: once to an expert, and of every fifth case one of the other ways, too, in
/// turns. With `FSEP_TEST_TOKEN_ROWS=all` all ways of every case.
///
/// # Panics
///
/// As [`check_parity`], and if `FSEP_TEST_TOKEN_ROWS` is something else.
pub fn check_parity_in_turn(case: &ParityCase, index: usize, tolerance: f64) -> f64 {
    let [plain, others @ ..] = TOKEN_TRAVEL;
    match std::env::var("FSEP_TEST_TOKEN_ROWS").as_deref() {
        Ok("all") => check_parity(case, tolerance),
        Ok(other) => panic!("FSEP_TEST_TOKEN_ROWS={other}: leave it out, or say all"),
        Err(_) if index.is_multiple_of(5) => check_ways(case, &[plain, others[index / 5 % others.len()]], tolerance),
        Err(_) => check_ways(case, &[plain], tolerance),
    }
}

/// How tokens travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenTravel {
    /// In which rows.
    pub rows: TokenRows,
    /// In how many chunks.
    pub chunks: usize,
}

impl From<TokenRows> for TokenTravel {
    /// In one chunk.
    fn from(rows: TokenRows) -> Self {
        Self { rows, chunks: 1 }
    }
}

impl TokenTravel {
    /// The runtime's configuration with it.
    pub fn of(self, config: FsepRuntimeConfig) -> FsepRuntimeConfig {
        config.with_token_rows(self.rows).with_token_chunks(self.chunks)
    }
}

/// Ways in which tokens travel: of both sorts of rows whole and in chunks.
pub const TOKEN_TRAVEL: [TokenTravel; 5] = [
    TokenTravel { rows: TokenRows::ByAssignment, chunks: 1 },
    TokenTravel { rows: TokenRows::ByRank { counted: true }, chunks: 1 },
    TokenTravel { rows: TokenRows::ByRank { counted: false }, chunks: 2 },
    TokenTravel { rows: TokenRows::ByAssignment, chunks: 3 },
    TokenTravel { rows: TokenRows::ByRank { counted: true }, chunks: 4 },
];

fn check_ways(case: &ParityCase, ways: &[TokenTravel], tolerance: f64) -> f64 {
    // On one rank nothing travels.
    let ways = if case.tokens.len() == case.groups { &ways[..1] } else { ways };
    ways.iter().map(|&way| check_parity_of(case, way, tolerance, |comm| comm)).fold(0.0, f64::max)
}

/// As [`check_parity`], of one way in which tokens travel, over communicators that `wrap` makes of the ranks' own.
///
/// # Panics
///
/// As [`check_parity`].
pub fn check_parity_of(
    case: &ParityCase,
    travel: TokenTravel,
    tolerance: f64,
    wrap: impl Fn(Arc<dyn Communicator>) -> Arc<dyn Communicator> + Sync,
) -> f64 {
    let run = |comm| case.run_rank(wrap(comm), travel);
    let results = launch(&launch_config(case.tokens.len()), run);
    let fail = |error| panic!("{travel:?}, {case:?}: {error}");
    let results = results.into_iter().map(|rank| rank.unwrap_or_else(fail)).collect();
    case.compare(results, tolerance)
}

impl ParityCase {
    /// Inputs and targets of all ranks, by step. `[T * D]` each
    fn inputs(&self) -> Vec<(Vec<f32>, Vec<f32>)> {
        let len = self.tokens.iter().sum::<usize>() * self.config.hidden_size;
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut values = || -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        (0..self.steps).map(|_| (values(), values())).collect()
    }

    /// One rank's part.
    ///
    /// # Errors
    ///
    /// Any [`FsepError`].
    ///
    /// # Panics
    ///
    /// If a gradient is missing.
    pub fn run_rank(&self, comm: Arc<dyn Communicator>, travel: TokenTravel) -> Result<Vec<ParityStep>, FsepError> {
        let (case, rank, ranks, hidden) = (self, comm.rank(), comm.size(), self.config.hidden_size);
        let split = case.split;
        let runtime = FsepRuntimeConfig::new().with_seed(case.seed).with_dispatcher(move || split.dispatcher());
        let shared_by = ranks / case.groups;
        let runtime = travel.of(runtime).with_expert_parallel_size(shared_by).init(comm)?;
        let layer = case.config.clone().with_slots_per_rank(Some(case.slots)).try_init(&runtime, &device())?;
        let start: usize = case.tokens[..rank].iter().sum::<usize>() * hidden;
        let mine = start..start + case.tokens[rank] * hidden;
        let step = |(i, (x, target)): (usize, &(Vec<f32>, Vec<f32>))| {
            if case.config.expert_parallelism == ExpertParallelism::Fsep {
                // Groups change their layouts by themselves.
                let seed = case.seed * 100 + (i + 1000 * (rank / shared_by)) as u64;
                let layout = random_layout(shared_by, case.slots, case.config.num_moe_experts, seed);
                runtime.set_layout(0, Arc::new(layout))?;
            }
            let matrix = |values: &[f32]| {
                let data = TensorData::new(values[mine.clone()].to_vec(), [case.tokens[rank], hidden]);
                Tensor::<2>::from_data(data, &device())
            };
            let x = matrix(x).require_grad();
            runtime.begin_step(&layer)?;
            runtime.run(|| {
                let output = layer.forward_with_losses(x.clone());
                let loss = (output.hidden.clone() * matrix(target)).sum();
                let loss = output.aux_loss.into_iter().fold(loss, |loss, aux| loss + aux);
                let grads = loss.backward();
                ParityStep {
                    output: floats(output.hidden.inner()),
                    d_input: floats(x.grad(&grads).expect("input gradient")),
                    d_router: floats(layer.router.weight.val().grad(&grads).expect("router gradient")),
                    d_others: other_gradients(&layer.router, &layer.shared_expert, &grads),
                    d_experts: floats(layer.experts.weight.val().grad(&grads).expect("experts' gradient")),
                }
            })
        };
        self.inputs().iter().enumerate().map(step).collect()
    }

    /// Compares what the ranks have with the dense layer; see [`check_parity`]. `[W][steps]`
    ///
    /// # Panics
    ///
    /// If they differ.
    pub fn compare(&self, results: Vec<Vec<ParityStep>>, tolerance: f64) -> f64 {
        let (case, ranks) = (self, self.tokens.len());
        let dense = case.config.init_dense(case.seed, 0, &reference()).unwrap();
        let all_expected: Vec<ParityStep> =
            self.inputs().iter().map(|(x, target)| dense_step(&dense, x, target, case)).collect();
        let routers = all_expected.iter().flat_map(|step| &step.d_router);
        let scale = routers.fold(0.0f32, |largest, d| largest.max(d.abs()));
        let mut worst = 0.0f64;
        for (i, expected) in all_expected.iter().enumerate() {
            let parts: Vec<&ParityStep> = results.iter().map(|steps| &steps[i]).collect();
            let all = |part: fn(&ParityStep) -> &Vec<f32>| {
                parts.iter().flat_map(|s| part(s).iter().copied()).collect::<Vec<_>>()
            };
            // A rank's gradients are those of its own loss; the dense ones of the mean over ranks.
            let share = |values: Vec<f32>| values.into_iter().map(|v| v / ranks as f32).collect::<Vec<_>>();
            let sum_of = |of: fn(&ParityStep) -> &Vec<f32>| {
                let mut sum = vec![0.0; of(expected).len()];
                parts.iter().for_each(|part| sum.iter_mut().zip(of(part)).for_each(|(sum, d)| *sum += d));
                sum
            };
            let router = sum_of(|s| &s.d_router);
            let per_expert = expected.d_experts.len() / case.config.num_moe_experts;
            let mut compare = |what: &str, actual: &[f32], expected: &[f32]| {
                let data = |values: &[f32]| TensorData::new(values.to_vec(), [values.len()]);
                let what = format!("{what}, step {i}, {case:?}");
                worst = worst.max(assert_close(&what, &data(actual), &data(expected), tolerance));
            };
            compare("output", &all(|s| &s.output), &expected.output);
            compare("input gradient", &share(all(|s| &s.d_input)), &expected.d_input);
            let router = share(router);
            // One token's gradient may cancel to next to nothing, down to the rounding of what it is the difference of: the
            // steps' gradients are compared on one scale.
            let with_scale = |values: &[f32]| values.iter().copied().chain([scale]).collect::<Vec<_>>();
            compare("router gradient", &with_scale(&router), &with_scale(&expected.d_router));
            compare("other gradients", &share(sum_of(|s| &s.d_others)), &expected.d_others);
            for group in parts.chunks(ranks / case.groups) {
                let experts = whole_experts(group, case, expected.d_experts.len());
                let by_expert = experts.chunks(per_expert).zip(expected.d_experts.chunks(per_expert));
                for (expert, (actual, expected)) in by_expert.enumerate() {
                    compare(&format!("gradient of expert {expert}"), actual, expected);
                }
            }
        }
        worst
    }
}

/// What the dense layer computes on, whatever the ranks do: CubeCL's products in single precision are of TF32 on NVIDIA GPUs.
fn reference() -> Device {
    Device::flex().autodiff()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The gradients of the replicated parameters but the router's weight: zeros where there is none.
fn other_gradients(router: &TopKRouter, shared_expert: &Option<SharedExpert>, grads: &Gradients) -> Vec<f32> {
    struct Visitor<'a>(&'a Gradients, Vec<f32>);

    impl ModuleVisitor for Visitor<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            let grad = value.grad(self.0).unwrap_or_else(|| value.inner().zeros_like());
            self.1.extend(floats(grad));
        }
    }

    let mut visitor = Visitor(grads, Vec::new());
    router.bias.visit(&mut visitor);
    shared_expert.visit(&mut visitor);
    visitor.1
}

fn dense_step(dense: &DenseMoE, x: &[f32], target: &[f32], case: &ParityCase) -> ParityStep {
    let hidden = case.config.hidden_size;
    let matrix = |values: &[f32]| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), [values.len() / hidden, hidden]), &reference())
    };
    let x = matrix(x).require_grad();
    let output = dense.try_forward(x.clone()).unwrap();
    let loss = (output.hidden.clone() * matrix(target)).sum() / case.tokens.len() as f32;
    let loss = loss + auxiliary_losses(dense, x.clone(), &case.config);
    let grads = loss.backward();
    let or_zeros = |grad: Option<Tensor<2>>, like: Tensor<2>| floats(grad.unwrap_or_else(|| like.inner().zeros_like()));
    ParityStep {
        output: floats(output.hidden.inner()),
        d_input: or_zeros(x.grad(&grads), x),
        d_router: or_zeros(dense.router.weight.val().grad(&grads), dense.router.weight.val()),
        d_others: other_gradients(&dense.router, &dense.shared_expert, &grads),
        d_experts: or_zeros(dense.weight.val().grad(&grads), dense.weight.val()),
    }
}

/// The auxiliary losses of the whole batch, from the formulas, whatever the ranks have of it.
fn auxiliary_losses(dense: &DenseMoE, x: Tensor<2>, config: &FSEPMoEConfig) -> Tensor<1> {
    let experts = config.num_moe_experts;
    if x.dims()[0] == 0 {
        return Tensor::zeros([1], &reference());
    }
    let chosen: Vec<i64> = dense.router.forward(x.clone()).unwrap().experts.into_data().iter().collect();
    let mut shares = vec![0.0f32; experts];
    chosen.iter().for_each(|&e| shares[e as usize] += 1.0 / chosen.len() as f32);
    let shares = Tensor::<2>::from_data(TensorData::new(shares, [1, experts]), &reference());

    let logits = x.matmul(dense.router.weight.val());
    let mean_probs = softmax(logits.clone(), 1).mean_dim(0);
    let balancing = (mean_probs * shares).sum() * (config.moe_aux_loss_coeff * experts as f64);
    balancing + logits.exp().sum_dim(1).log().square().mean() * config.moe_z_loss_coeff
}

/// Puts the experts' gradients together from the parts of the ranks that share them. `len` is `E * P`.
fn whole_experts(parts: &[&ParityStep], case: &ParityCase, len: usize) -> Vec<f32> {
    let experts = case.config.num_moe_experts;
    if case.config.expert_parallelism == ExpertParallelism::Static {
        return parts.iter().flat_map(|part| part.d_experts.iter().copied()).collect();
    }
    let params = len / experts;
    let shard = params.div_ceil(parts.len());
    (0..experts)
        .flat_map(|expert| {
            let whole = parts.iter().flat_map(move |part| &part.d_experts[expert * shard..(expert + 1) * shard]);
            whole.copied().take(params)
        })
        .collect()
}
