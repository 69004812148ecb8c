use proptest::prelude::*;

use super::*;

const GIB: f64 = (1u64 << 30) as f64;

fn swiglu(layers: u64, [hidden_size, intermediate_size, experts, topk]: [u64; 4], slots_per_rank: u64) -> MoeSizes {
    let expert_parameters = 3 * hidden_size * intermediate_size;
    MoeSizes { layers, experts, expert_parameters, hidden_size, intermediate_size, gated: true, topk, slots_per_rank }
}

/// OLMoE-1B-7B: normalised queries and keys, so 12 rows of D elements a token and layer; 16 heads.
fn olmoe(slots_per_rank: u64) -> MemoryModel {
    MemoryModel {
        replicated_parameters: 2 * 50304 * 2048 + 2048 + 16 * (4 * 2048 * 2048 + 4 * 2048 + 2048 * 64),
        moe: swiglu(16, [2048, 1024, 64, 8], slots_per_rank),
        activations: ActivationSizes {
            layers: 16,
            elements_per_token: 12 * 2048,
            f32_elements_per_token: 16,
            vocabulary: 50304,
        },
    }
}

/// One layer alone, whose input is what it keeps besides; without an optimizer.
fn layer(tokens: u64, sizes: [u64; 4]) -> RankMemory {
    let model = MemoryModel {
        replicated_parameters: sizes[0] * sizes[2],
        moe: swiglu(1, sizes, sizes[2]),
        activations: ActivationSizes {
            layers: 1,
            elements_per_token: sizes[0],
            f32_elements_per_token: 0,
            vocabulary: 0,
        },
    };
    let optimizer = OptimizerState { tensors: 0, element_bytes: 0, master_bytes: 0 };
    let training = TrainingSizes { tokens, optimizer, ..TrainingSizes::bf16() };
    RankMemory::of(&model, &training, RankSplit::single()).unwrap()
}

/// `gpu_layer --memory`, bf16, N = 1, H100 and H200 (README), LibTorch without its cache.
#[test]
fn one_layer_is_what_was_measured() {
    for (tokens, sizes, measured) in [
        (16384, [4096, 14336, 8, 2], 8.63),
        (8192, [4096, 7168, 16, 4], 7.19),
        (8192, [2048, 1408, 64, 6], 2.95),
        (2048, [1024, 4096, 8, 2], 0.49),
    ] {
        let peak = layer(tokens, sizes).peak().bytes as f64 / GIB;
        println!("{tokens} {sizes:?}: {peak:.2} GiB, measured {measured}: {:+.1} %", 100.0 * (peak / measured - 1.0));
        assert!((peak / measured - 1.0).abs() < 0.05, "{sizes:?}: {peak}, measured {measured}");
    }
}

/// `moe-hf bench` of OLMoE-1B-7B's sizes, all bf16, 4 sequences of 2048, one H200 (README): LibTorch's allocator had reserved 69.2 GiB at
/// most. Tensors take a part of that: 0.90 by these formulae.
#[test]
fn a_fine_tuning_step_fits_into_what_was_reserved() {
    let training = TrainingSizes { tokens: 8192, ..TrainingSizes::bf16() };
    let memory = RankMemory::of(&olmoe(64), &training, RankSplit::single()).unwrap();
    let peak = memory.peak();
    let share = peak.bytes as f64 / GIB / 69.2;
    println!("{:.1} GiB in {}, {share:.3} of what was reserved", peak.bytes as f64 / GIB, peak.phase);
    assert_eq!(peak.phase, Phase::Loss);
    assert!((0.87..1.0).contains(&share), "{share}");
    assert_eq!(memory.restored_experts, 0);
    assert_eq!(memory.parameters.total(), 2 * 6_919_161_856);
}

/// `tests/schedule.rs` of burn-fsep counts two layers' experts on two ranks, 9 being an odd size.
#[test]
fn the_gauge_counts_two_layers_or_those_kept() {
    let model = MemoryModel { moe: swiglu(4, [6, 9, 4, 2], 3), ..olmoe(0) };
    let restored = |kept_layers, prefetch| {
        let training = TrainingSizes { kept_layers, prefetch, ..TrainingSizes::f32() };
        let memory = RankMemory::of(&model, &training, RankSplit { world_size: 2, group_ranks: 2, zero: false });
        memory.unwrap().restored_experts
    };
    let one_layer = 3 * (3 * 6 * 9) * 4;
    assert_eq!([restored(0, false), restored(0, true), restored(1, true)], [one_layer, 2 * one_layer, 2 * one_layer]);
    assert_eq!([restored(3, true), restored(u64::MAX, true)], [3 * one_layer, 4 * one_layer]);
    let staying = |kept_layers| {
        let training = TrainingSizes { kept_layers, micro_batches: 2, ..TrainingSizes::f32() };
        let split = RankSplit { world_size: 2, group_ranks: 2, zero: false };
        RankMemory::of(&model, &training, split).unwrap().restored_experts / one_layer
    };
    assert_eq!([0, 1, 2, 4, u64::MAX].map(staying), [2, 3, 4, 4, 4], "two beside those that stay");
}

#[test]
fn means_over_replicas_are_of_single_precision() {
    let means = |training: TrainingSizes, world_size| {
        let split = RankSplit { world_size, group_ranks: 4, zero: false };
        RankMemory::of(&olmoe(17), &training, split).unwrap()
    };
    let memory = means(TrainingSizes::bf16(), 8);
    assert_eq!(memory.single_precision_means, memory.gradients.experts, "4 bytes, not 2");
    assert_eq!(means(TrainingSizes::bf16(), 4).single_precision_means, 0, "no replicas");
    assert_eq!(means(TrainingSizes::mixed(), 8).single_precision_means, 0, "so are gradients");
}

#[test]
fn zero_cuts_the_state_of_replicated_parameters_to_an_eighth() {
    let of = |zero| {
        let split = RankSplit { world_size: 8, group_ranks: 4, zero };
        RankMemory::of(&olmoe(17), &TrainingSizes::mixed(), split).unwrap()
    };
    let (with, without) = (of(true), of(false));
    assert_eq!(with.optimizer.replicated, without.optimizer.replicated.div_ceil(8));
    assert_eq!(with.optimizer.experts, without.optimizer.experts / 2, "two replicas of the shards");
    assert_eq!((with.parameters, with.gradients), (without.parameters, without.gradients));
}

#[test]
fn bad_sizes_are_named() {
    let split = |world_size, group_ranks| RankSplit { world_size, group_ranks, zero: false };
    let field = |model: MemoryModel, training: TrainingSizes, split| {
        RankMemory::of(&model, &training, split).unwrap_err().field()
    };
    let training = TrainingSizes::bf16();
    assert_eq!(field(olmoe(64), training, split(0, 1)), Some("world_size"));
    assert_eq!(field(olmoe(64), training, split(8, 0)), Some("groups"));
    assert_eq!(field(olmoe(64), training, split(8, 3)), Some("groups"));
    assert_eq!(field(olmoe(3), training, split(8, 8)), Some("slots_per_rank"));
    assert_eq!(field(olmoe(65), training, split(8, 8)), Some("slots_per_rank"));
    assert_eq!(field(olmoe(64), TrainingSizes { tokens: 0, ..training }, split(1, 1)), Some("tokens"));
    let of = |max_over_mean| TrainingSizes { max_over_mean, ..training };
    for imbalance in [0.5, f64::NAN, f64::INFINITY] {
        assert_eq!(field(olmoe(64), of(imbalance), split(1, 1)), Some("max_over_mean"));
    }
    let mut absurd = olmoe(1 << 30);
    absurd.moe = MoeSizes { layers: 16, experts: 1 << 30, expert_parameters: 1 << 50, ..absurd.moe };
    let error = RankMemory::of(&absurd, &training, split(1, 1)).unwrap_err();
    assert!(matches!(error, MemoryError::Overflow { .. }), "{error}");
}

#[test]
fn advice_names_what_fits() {
    let (model, training) = (olmoe(9), TrainingSizes { tokens: 4096, ..TrainingSizes::mixed() });
    let split = RankSplit { world_size: 64, group_ranks: 8, zero: false };
    let peak = RankMemory::of(&model, &training, split).unwrap().peak().bytes;
    let changes = changes_that_fit(&model, &training, split, peak - 1).unwrap();
    assert!(changes.iter().any(|(change, _)| *change == MemoryChange::Groups(16)), "{changes:?}");
    assert!(changes.iter().any(|(change, _)| *change == MemoryChange::Zero), "{changes:?}");
    assert!(changes.iter().all(|(_, bytes)| *bytes < peak));
    assert_eq!(changes_that_fit(&model, &training, split, 1 << 20).unwrap(), []);
}

prop_compose! {
    fn job()(layers in 1u64..5, experts in 1u64..20, hidden in 1u64..40, ffn in 1u64..40, tokens in 1u64..200, log_world in 0u32..6,
             topk in 1u64..4, mixed: bool, replicated in 1u64..10_000) -> (MemoryModel, TrainingSizes, u64) {
        let moe = swiglu(layers, [hidden, ffn, experts, topk.min(experts)], experts);
        let activations = ActivationSizes { layers, elements_per_token: 9 * hidden, f32_elements_per_token: 2, vocabulary: 50 };
        let kind = if mixed { TrainingSizes::mixed() } else { TrainingSizes::bf16() };
        let model = MemoryModel { replicated_parameters: replicated, moe, activations };
        (model, TrainingSizes { tokens, ..kind }, 1 << log_world)
    }
}

proptest! {
    /// Nothing is lost by cutting, and no more is added than padding: less than one element a part.
    #[test]
    fn what_is_cut_adds_up((model, training, world_size) in job()) {
        let mut group_ranks = 1;
        while group_ranks <= world_size {
            let split = RankSplit { world_size, group_ranks, zero: true };
            let memory = RankMemory::of(&model, &training, split).unwrap();
            let moe = &model.moe;
            let whole = moe.layers * moe.experts * moe.expert_parameters * training.parameter_bytes;
            let padding = moe.layers * moe.experts * (group_ranks - 1) * training.parameter_bytes;
            let held = memory.parameters.experts * group_ranks;
            prop_assert!(whole <= held && held <= whole + padding, "{} {} {}", whole, held, padding);
            let width = training.optimizer.tensors * training.optimizer.element_bytes;
            let state = model.replicated_parameters * width;
            let cut = memory.optimizer.replicated * world_size;
            prop_assert!(state <= cut && cut < state + world_size * width);
            let shards = RankMemory::of(&model, &training, RankSplit { zero: false, ..split }).unwrap().optimizer.experts;
            let cut = memory.optimizer.experts * split.replicas();
            prop_assert!(shards <= cut && cut < shards + moe.layers * split.replicas() * width);
            group_ranks *= 2;
        }
    }

    /// More ranks that share the experts take no more of a rank for what is cut, and ZeRO, recomputation and fewer tokens take no more
    /// of anything.
    #[test]
    fn sharing_and_recomputing_take_no_more((model, training, world_size) in job()) {
        let of = |training: &TrainingSizes, group_ranks, zero| {
            RankMemory::of(&model, training, RankSplit { world_size, group_ranks, zero }).unwrap()
        };
        let mut group_ranks = 1;
        while group_ranks <= world_size {
            let (plain, zero) = (of(&training, group_ranks, false), of(&training, group_ranks, true));
            prop_assert!(zero.peak().bytes <= plain.peak().bytes);
            if group_ranks > 1 {
                let fewer = of(&training, group_ranks / 2, false);
                prop_assert!(plain.parameters.experts <= fewer.parameters.experts);
                prop_assert!(plain.optimizer.experts <= fewer.optimizer.experts);
            }
            for recompute in [Recompute::Experts, Recompute::Layers] {
                let less = of(&TrainingSizes { recompute, ..training }, group_ranks, false);
                prop_assert!(less.activations.total() <= plain.activations.total());
            }
            let half = TrainingSizes { tokens: training.tokens.div_ceil(2), ..training };
            prop_assert!(of(&half, group_ranks, false).peak().bytes <= plain.peak().bytes);
            group_ranks *= 2;
        }
    }
}
