//! FSEP equals the dense layer: values and all gradients, for any world size, layout and dispatch.

use burn_fsep::{ExpertParallelism, FSEPMoEConfig};
use burn_fsep_tests::{ParityCase, SplitAny, check_parity};

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
    let mut seed = 0;
    for experts in [4, 8, 16] {
        let fewest = usize::div_ceil(experts, ranks);
        let mut slots = vec![fewest, (fewest + 1).min(experts), (2 * fewest).min(experts)];
        slots.dedup();
        for slots in slots {
            for topk in [1, 2, 4] {
                for tokens in token_patterns(ranks) {
                    seed += 1;
                    let split = SplitAny::ALL[seed as usize % 3];
                    let case = ParityCase { config: config(experts, topk), slots, tokens, split, steps: 3, seed };
                    check_parity(&case, TOLERANCE);
                }
            }
        }
    }
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
    ParityCase { config, slots, tokens: vec![tokens; 4], split: SplitAny::MinMax, steps: 3, seed: 77 }
}

#[test]
fn auxiliary_losses() {
    let config = config(8, 2).with_moe_aux_loss_coeff(0.1).with_moe_z_loss_coeff(0.05);
    check_parity(&even(config, 3, 10), TOLERANCE);
}

#[test]
fn recomputed_activations() {
    check_parity(&even(config(8, 2).with_moe_layer_recompute(true), 3, 10), TOLERANCE);
}

#[test]
fn forced_routing() {
    check_parity(&even(config(8, 2).with_moe_router_force_biased(Some(3.0)), 3, 10), TOLERANCE);
    // Whole periods of tokens, so that ranks and the dense layer force the same choices.
    check_parity(&even(config(8, 2).with_moe_router_force_load_balancing(true), 3, 12), TOLERANCE);
    // Half of the experts get no token at all.
    let shares = vec![0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0];
    check_parity(&even(config(8, 2).with_moe_router_force_shares(Some(shares)), 3, 20), TOLERANCE);
}

#[test]
fn static_expert_parallelism() {
    for tokens in token_patterns(4) {
        let config = config(8, 2).with_expert_parallelism(ExpertParallelism::Static);
        let case = ParityCase { config, slots: 2, tokens, split: SplitAny::Even, steps: 2, seed: 5 };
        check_parity(&case, TOLERANCE);
    }
}
