//! Tokens that travel once to a rank, or in chunks: the same results and gradients as once to an expert and all at once; and fewer
//! bytes.

use std::sync::Arc;

use burn::{
    module::Module,
    tensor::{FloatDType, Int, Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntimeConfig, LayerStats, TokenRows,
    comm::{Communicator, local::LocalCommunicator},
    moe::RouterOutput,
};
use burn_fsep_tests::{
    CallRecord, Fault, FaultyCommunicator, SplitAny, TOKEN_TRAVEL, TokenTravel, device, launch, launch_config,
    random_layout,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::index::sample};

const BY_RANK: [TokenRows; 2] = [TokenRows::ByRank { counted: true }, TokenRows::ByRank { counted: false }];

/// The exchanges that carry tokens, their gradients, and what comes with them.
const TOKEN_EXCHANGES: [&str; 6] = [
    "tokens to experts in forward",
    "weights and places of tokens in forward",
    "outputs to tokens in forward",
    "gradients to experts in backward",
    "gradients of weights in backward",
    "gradients to tokens in backward",
];

/// One layer of experts on some ranks, and one step of it.
#[derive(Debug, Clone)]
struct Case {
    /// `[D, F, E, K]`
    sizes: [usize; 4],
    slots: usize,
    tokens: Vec<usize>,
    /// Whether gradients are wanted of input, probabilities and experts.
    wanted: [bool; 3],
    recompute: bool,
    dtype: FloatDType,
    /// Whether a token may choose an expert twice, and layouts and dispatch are random.
    wild: bool,
}

/// Output, and gradients of input, probabilities and experts, of all ranks.
type Left = Vec<[Vec<f32>; 4]>;

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

impl Case {
    fn new(sizes: [usize; 4], slots: usize, tokens: Vec<usize>) -> Self {
        let (wanted, dtype) = ([true; 3], FloatDType::F32);
        Self { sizes, slots, tokens, wanted, recompute: false, dtype, wild: true }
    }

    fn run(&self, travel: impl Into<TokenTravel>) -> Left {
        let travel = travel.into();
        let results = launch(&launch_config(self.tokens.len()), |comm| self.run_rank(comm, travel));
        results.into_iter().map(|rank| rank.unwrap_or_else(|error| panic!("{self:?}: {error}")).0).collect()
    }

    fn run_rank(
        &self,
        comm: Arc<dyn Communicator>,
        travel: TokenTravel,
    ) -> Result<([Vec<f32>; 4], LayerStats), FsepError> {
        let ([hidden, ffn, experts, topk], rank, ranks) = (self.sizes, comm.rank(), comm.size());
        let mut config = travel.of(FsepRuntimeConfig::new().with_seed(3));
        if self.wild {
            config = config.with_dispatcher(|| SplitAny::Random.dispatcher());
        }
        let runtime = config.init(comm)?;
        let config = FSEPMoEConfig::new(hidden, ffn, experts)
            .with_moe_router_topk(topk)
            .with_slots_per_rank(Some(self.slots))
            .with_compute_dtype(Some(self.dtype))
            .with_moe_layer_recompute(self.recompute);
        let mut layer = config.init_experts(&runtime, &device());
        if !self.wanted[2] {
            layer = layer.no_grad();
        }
        if self.wild {
            runtime.set_layout(0, Arc::new(random_layout(ranks, self.slots, experts, 5)))?;
        }

        let mut rng = StdRng::seed_from_u64(rank as u64);
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let tokens = self.tokens[rank];
        let matrix = |values: Vec<f32>, width: usize| {
            Tensor::<2>::from_data(TensorData::new(values, [tokens, width]), &device()).cast(self.dtype).detach()
        };
        let (x, target) = (matrix(values(tokens * hidden), hidden), matrix(values(tokens * hidden), hidden));
        let probs = matrix(values(tokens * topk), topk);
        let chosen: Vec<i64> = (0..tokens)
            .flat_map(|_| match self.wild {
                true => (0..topk).map(|_| rng.random_range(0..experts as i64)).collect::<Vec<_>>(),
                false => sample(&mut rng, experts, topk).iter().map(|expert| expert as i64).collect(),
            })
            .collect();
        let chosen = Tensor::<2, Int>::from_data(TensorData::new(chosen, [tokens, topk]), &device());
        let [want_input, want_probs, _] = self.wanted;
        let x = if want_input { x.require_grad() } else { x };
        let probs = if want_probs { probs.require_grad() } else { probs };

        runtime.begin_step(&layer)?;
        let left = runtime.run(|| {
            let output = layer.forward(x.clone(), RouterOutput::new(probs.clone(), chosen)).hidden;
            let weight = layer.weight.val();
            if !self.wanted.contains(&true) {
                return [floats(output), vec![], vec![], vec![]];
            }
            let grads = (output.clone() * target).sum().backward();
            let of = |tensor: &Tensor<2>| tensor.grad(&grads).map(floats).unwrap_or_default();
            let left = [of(&x), of(&probs), of(&weight)];
            let [x, probs, weight] = left;
            [floats(output.inner()), x, probs, weight]
        })?;
        let stats = runtime.stats().layers.pop().unwrap_or_else(|| panic!("no training pass"));
        Ok((left, stats))
    }
}

/// Root of the mean square of differences over that of the expected values.
fn rms_error(actual: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let expected_squares = squares(&mut expected.iter().copied());
    let difference = squares(&mut actual.iter().zip(expected).map(|(a, b)| a - b));
    if difference == 0.0 { 0.0 } else { (difference / expected_squares).sqrt() }
}

fn check(case: &Case) {
    let expected = case.run(TokenRows::ByAssignment);
    for travel in &TOKEN_TRAVEL[1..] {
        let actual = case.run(*travel);
        assert_eq!(actual, case.run(*travel), "equal bits from run to run: {travel:?}, {case:?}");
        for (actual, expected) in actual.iter().flatten().zip(expected.iter().flatten()) {
            let error = rms_error(actual, expected);
            assert!(error < 1e-6, "{error:.1e}: {travel:?}, {case:?}");
        }
    }
}

#[test]
fn every_combination_of_wanted_gradients() {
    for bits in 1..8 {
        let wanted = [1, 2, 4].map(|bit| bits & bit != 0);
        for recompute in [false, true] {
            let case = Case::new([6, 5, 8, 3], 3, vec![5, 0, 9, 4]);
            check(&Case { wanted, recompute, ..case });
        }
    }
}

#[test]
fn any_number_of_ranks_experts_and_tokens() {
    for (sizes, slots, tokens) in [
        ([6, 5, 8, 2], 5, vec![7, 11]),
        ([6, 5, 8, 1], 4, vec![7, 11]),
        ([4, 3, 4, 4], 4, vec![0, 3, 0]),
        ([4, 3, 4, 4], 2, vec![0, 0]),
        ([6, 5, 16, 8], 3, (0..8).map(|rank| rank * 3 % 7).collect()),
        ([6, 5, 2, 2], 1, vec![1, 1]),
        ([6, 5, 4, 2], 4, vec![6]),
    ] {
        check(&Case::new(sizes, slots, tokens));
    }
}

#[test]
fn bf16_is_as_exact_as_once_to_an_expert() {
    let full = Case::new([32, 16, 8, 4], 4, vec![33, 20, 27]);
    let half = Case { dtype: FloatDType::BF16, ..full.clone() };
    let (exact, plain) = (full.run(TokenRows::ByAssignment), half.run(TokenRows::ByAssignment));
    for travel in &TOKEN_TRAVEL[1..] {
        let actual = half.run(*travel);
        for ((actual, plain), exact) in actual.iter().flatten().zip(plain.iter().flatten()).zip(exact.iter().flatten())
        {
            let (error, plain) = (rms_error(actual, exact), rms_error(plain, exact));
            assert!(error <= 1.2 * plain && plain < 0.05, "{travel:?}: {error:.1e}, plain {plain:.1e}");
        }
    }
}

/// Bytes that all ranks send to others for tokens, counted, and what the layer's statistics say of them.
fn token_bytes(case: &Case, token_rows: TokenRows) -> (u64, LayerStats) {
    let results = launch(&launch_config(case.tokens.len()), |comm| {
        let (comm, record): (_, Arc<CallRecord>) = FaultyCommunicator::new(comm, Fault::None);
        let (_, stats) = case.run_rank(comm, token_rows.into())?;
        let sent = record.sent.lock().unwrap();
        Ok::<_, FsepError>((TOKEN_EXCHANGES.iter().filter_map(|name| sent.get(name)).sum::<usize>(), stats))
    });
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    let sum = results.iter().map(|(bytes, _)| *bytes as u64).sum();
    (sum, results.into_iter().next().unwrap().1)
}

#[test]
fn fewer_bytes_of_tokens_travel() {
    for (ranks, tokens, most) in [(2, 512, 0.3), (8, 256, 0.7)] {
        let case = Case { wild: false, ..Case::new([512, 4, 64, 8], 64 / ranks, vec![tokens; ranks]) };
        let (before, stats) = token_bytes(&case, TokenRows::ByAssignment);
        assert_eq!((before, before), (stats.token_bytes, stats.token_bytes_by_assignment));
        // The default finds that it pays.
        let (after, stats) = token_bytes(&case, TokenRows::Auto);
        assert_eq!((after, before), (stats.token_bytes, stats.token_bytes_by_assignment));
        let share = after as f64 / before as f64;
        println!("{ranks} ranks, E = 64, K = 8: {after} bytes of tokens to other ranks, {before} before: {share:.3}");
        assert!(share <= most, "{share} on {ranks} ranks");
    }
}

#[test]
fn by_default_little_is_sent_as_before() {
    let case = Case::new([6, 5, 8, 2], 5, vec![7, 11]);
    let (bytes, stats) = token_bytes(&case, TokenRows::Auto);
    assert_eq!(bytes, stats.token_bytes_by_assignment);
    // Nothing of tokens leaves the only rank.
    let (bytes, stats) = token_bytes(&Case::new([6, 5, 8, 2], 8, vec![7]), BY_RANK[0]);
    assert_eq!((bytes, stats.token_bytes, stats.token_bytes_by_assignment), (0, 0, 0));
}

#[test]
fn no_chunk_and_absurdly_many_are_refused() {
    for chunks in [0, usize::MAX] {
        let config = FsepRuntimeConfig::new().with_token_chunks(chunks);
        let error = config.init(Arc::new(LocalCommunicator::single())).unwrap_err();
        assert!(error.to_string().contains("token_chunks"), "{error}");
    }
}

#[test]
fn ranks_that_differ_in_it_find_out() {
    let errors = launch(&launch_config(2), |comm| {
        let token_rows = if comm.rank() == 0 { TokenRows::ByAssignment } else { BY_RANK[0] };
        FsepRuntimeConfig::new().with_token_rows(token_rows).init(comm).map(drop)
    });
    for error in errors {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("token_rows"), "{error}");
    }
}
