//! FSEP equals the dense layer: values and all gradients, for any world size, layout and dispatch.

use burn::tensor::{FloatDType, Tensor, TensorData};
use burn_fsep::{
    ExpertParallelism, FSEPMoEConfig, FsepError, FsepRuntime,
    comm::local::LaunchConfig,
    moe::{
        ExpertActivation, ExpertBiasConfig, GroupScore, RouterForcing, RouterGroups, ScoreFunction, SharedExpertConfig,
        TopKRouterConfig,
    },
};
use burn_fsep_tests::{
    Fault, FaultyCommunicator, ParityCase, SplitAny, TOKEN_TRAVEL, TokenTravel, check_parity, check_parity_in_turn,
    check_parity_of, device, launch,
};

const TOLERANCE: f64 = 1e-5;

fn config(experts: usize, topk: usize) -> FSEPMoEConfig {
    // 126 parameters an expert: on 4 and 8 ranks the shards need padding.
    FSEPMoEConfig::new(6, 7, experts).with_moe_router_topk(topk)
}

/// Tokens of each rank: equal, different, none on most ranks, none on the first.
fn token_patterns(ranks: usize) -> Vec<Vec<usize>> {
    vec![
        vec![9; ranks],
        (0..ranks).map(|rank| 3 * rank + 1).collect(),
        (0..ranks).map(|rank| if rank == ranks / 2 { 11 } else { 0 }).collect(),
        (0..ranks).map(|rank| if rank == 0 { 0 } else { 5 }).collect(),
    ]
}

fn sweep(ranks: usize) {
    let (mut seed, mut worst) = (0, 0.0f64);
    for experts in [4, 8, 16] {
        let fewest = usize::div_ceil(experts, ranks);
        let mut slots = vec![fewest, (fewest + 1).min(experts), (2 * fewest).min(experts), experts];
        slots.dedup();
        for slots in slots {
            for topk in [1, 2, 4] {
                for tokens in token_patterns(ranks) {
                    for split in SplitAny::ALL {
                        seed += 1;
                        let tokens = tokens.clone();
                        let case = ParityCase {
                            config: config(experts, topk),
                            slots,
                            tokens,
                            groups: 1,
                            split,
                            steps: 3,
                            seed,
                        };
                        worst = worst.max(check_parity_in_turn(&case, seed as usize, TOLERANCE));
                    }
                }
            }
        }
    }
    println!("{ranks} ranks, {seed} cases of 3 steps: largest relative error {worst:.2e}");
}

#[test]
fn one_rank() {
    sweep(1);
}

#[test]
fn two_ranks() {
    sweep(2);
}

#[test]
fn four_ranks() {
    sweep(4);
}

#[test]
fn eight_ranks() {
    sweep(8);
}

fn even(config: FSEPMoEConfig, slots: usize, tokens: usize) -> ParityCase {
    ParityCase { config, slots, tokens: vec![tokens; 4], groups: 1, split: SplitAny::MinMax, steps: 3, seed: 77 }
}

/// A configuration on every world size, token pattern and dispatcher.
fn everywhere(config: &FSEPMoEConfig) {
    let mut index = 0;
    for ranks in [1, 2, 4, 8] {
        for tokens in token_patterns(ranks) {
            for split in SplitAny::ALL {
                let (config, tokens) = (config.clone(), tokens.clone());
                let slots = 8 / ranks + usize::from(ranks > 1);
                let case = ParityCase { config, slots, tokens, groups: 1, split, steps: 2, seed: 7 };
                check_parity_in_turn(&case, index, TOLERANCE);
                index += 1;
            }
        }
    }
}

#[test]
fn auxiliary_losses() {
    everywhere(&config(8, 2).with_moe_aux_loss_coeff(0.1));
    everywhere(&config(8, 2).with_moe_z_loss_coeff(0.05));
    everywhere(&config(8, 2).with_moe_aux_loss_coeff(0.1).with_moe_z_loss_coeff(0.05));
}

/// The mean over ranks of their auxiliary losses is that of the dense layer; see also `auxiliary_losses.rs`.
#[test]
fn auxiliary_losses_are_those_of_the_dense_layer() {
    let config = config(8, 2).with_moe_aux_loss_coeff(0.1).with_moe_z_loss_coeff(0.05);
    let (rows, hidden, ranks) = (24, 6, 4);
    let values: Vec<f32> = (0..rows * hidden).map(|i| (i as f32 * 0.37).sin()).collect();
    let batch =
        |rows: std::ops::Range<usize>| TensorData::new(values[rows.clone()].to_vec(), [rows.len() / hidden, hidden]);
    let dense = config.init_dense(0, 0, &device()).unwrap();
    let x = Tensor::<2>::from_data(batch(0..rows * hidden), &device());
    let expected = dense.try_forward(x).unwrap().aux_loss.unwrap().into_scalar::<f32>();
    let losses = launch(&LaunchConfig::new(ranks), |comm| {
        let part = rows / ranks * hidden;
        let x = Tensor::<2>::from_data(batch(comm.rank() * part..(comm.rank() + 1) * part), &device());
        let layer = config.try_init(&FsepRuntime::new(comm)?, &device())?;
        Ok::<_, FsepError>(layer.try_forward(x)?.aux_loss.unwrap().into_scalar::<f32>())
    });
    let mean = losses.into_iter().map(Result::unwrap).sum::<f32>() / ranks as f32;
    assert!((mean - expected).abs() <= 1e-5 * expected, "{mean} against {expected}");
}

#[test]
fn activations_and_biases() {
    let clamped = ExpertActivation::ClampedSwiGlu { alpha: 1.702, limit: 0.5 };
    for activation in [clamped, ExpertActivation::Geglu, ExpertActivation::Gelu, ExpertActivation::ReluSquared] {
        everywhere(&config(8, 2).with_activation(activation));
        everywhere(&config(8, 2).with_activation(activation).with_add_bias_linear(true).with_moe_layer_recompute(true));
    }
    everywhere(&config(8, 2).with_add_bias_linear(true));
}

#[test]
fn shared_experts() {
    everywhere(&config(8, 2).with_shared_expert(Some(SharedExpertConfig::new(5))));
    let gated = SharedExpertConfig::new(9).with_gate(true);
    everywhere(&config(8, 2).with_shared_expert(Some(gated)).with_add_bias_linear(true));
    everywhere(&config(8, 2).with_shared_expert(Some(gated)).with_activation(ExpertActivation::Gelu));
}

#[test]
fn routers() {
    let router = TopKRouterConfig::new;
    let sigmoid = || router().with_score_function(ScoreFunction::Sigmoid);
    let groups = |score| Some(RouterGroups::new(4, 2).with_score(score));
    for router in [
        router().with_pre_softmax(false).with_logit_bias(true),
        router().with_norm_topk_prob(Some(false)).with_topk_scaling_factor(1.5).with_groups(groups(GroupScore::Max)),
        sigmoid().with_groups(groups(GroupScore::TopTwoSum)).with_expert_bias(Some(ExpertBiasConfig::new())),
        sigmoid().with_norm_topk_prob(Some(false)).with_dtype(Some(FloatDType::F32)),
    ] {
        everywhere(&config(8, 3).with_router(router));
    }
}

#[test]
fn recomputed_activations() {
    everywhere(&config(8, 2).with_moe_layer_recompute(true));
}

/// The comparison sees one wrong number in any exchange of a step.
#[test]
fn a_wrong_number_in_any_exchange_is_seen() {
    for operation in [
        "unshard for forward",
        "tokens to experts in forward",
        "outputs to tokens in forward",
        "unshard for backward",
        "gradients to experts in backward",
        "gradients to tokens in backward",
        "gradient reshard",
    ] {
        for travel in [TOKEN_TRAVEL[0], TOKEN_TRAVEL[1], TOKEN_TRAVEL[3]] {
            is_seen(operation, travel);
        }
    }
    for operation in ["weights and places of tokens in forward", "gradients of weights in backward"] {
        is_seen(operation, TOKEN_TRAVEL[1]);
    }
}

fn is_seen(operation: &'static str, travel: TokenTravel) {
    let case = even(config(8, 2), 3, 10);
    let fault = Fault::Corruption(operation);
    let wrong = || check_parity_of(&case, travel, TOLERANCE, |comm| FaultyCommunicator::new(comm, fault).0);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(wrong));
    let message = *outcome.expect_err(operation).downcast::<String>().unwrap();
    assert!(message.contains("relative error"), "{operation}: {message}");
}

#[test]
fn forced_routing() {
    let forced = |forcing| config(8, 2).with_moe_router_force(Some(forcing));
    check_parity(&even(forced(RouterForcing::Biased(3.0)), 3, 10), TOLERANCE);
    // Whole periods of tokens, so that ranks and the dense layer force the same choices.
    check_parity(&even(forced(RouterForcing::LoadBalancing), 3, 12), TOLERANCE);
    // Half of the experts get no token at all.
    let shares = vec![0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0];
    check_parity(&even(forced(RouterForcing::Shares(shares)), 3, 20), TOLERANCE);
}

#[test]
fn static_expert_parallelism() {
    for ranks in [1, 2, 4, 8] {
        for tokens in token_patterns(ranks) {
            let config = config(8, 2).with_expert_parallelism(ExpertParallelism::Static);
            let case =
                ParityCase { config, slots: 8 / ranks, tokens, groups: 1, split: SplitAny::Even, steps: 2, seed: 5 };
            check_parity(&case, TOLERANCE);
        }
    }
}
