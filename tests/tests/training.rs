//! Training in a loop of one's own equals that of the dense model.

use burn_fsep::{FsepError, FsepRuntimeConfig, comm::local::LaunchConfig};
use burn_fsep_planner::PlannerStrategy;
use burn_fsep_tests::{
    GradientSync, HandTraining, LayoutSource, SplitAny, Trained, dense_loss_curve, launch, task_items, train_by_hand,
};

const SEED: u64 = 3;
const STEPS: usize = 200;
const BATCH: usize = 16;
const CLIP: f64 = 0.5;

fn train(ranks: usize, split: SplitAny, layouts: LayoutSource, sync: GradientSync) -> Vec<Trained> {
    let items = task_items(STEPS * BATCH, 1);
    let training = HandTraining { steps: STEPS, batch: BATCH, clip: CLIP, layouts, sync };
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
        let config = FsepRuntimeConfig::new().with_seed(SEED).with_dispatcher(move || split.dispatcher());
        train_by_hand(&config.init(comm)?, &items, &training)
    });
    results.into_iter().map(Result::unwrap).collect()
}

/// The largest relative difference of a step's loss.
fn largest_error(losses: &[f32], dense: &[f32]) -> f32 {
    assert_eq!(losses.len(), dense.len());
    let error = |(ours, dense): (&f32, &f32)| {
        assert!(ours.is_finite());
        (ours - dense).abs() / dense
    };
    losses.iter().zip(dense).map(error).fold(0.0, f32::max)
}

fn dense() -> Vec<f32> {
    dense_loss_curve(SEED, STEPS, BATCH, &task_items(STEPS * BATCH, 1), CLIP)
}

#[test]
fn the_loss_curve_is_that_of_the_dense_model() {
    let dense = dense();
    assert!(dense[STEPS - 1] < 0.7 * dense[0], "the model learns: {} to {}", dense[0], dense[STEPS - 1]);
    let after = GradientSync::AfterBackward;
    // The small model has four replicated parameters of 192, 256, 256 and 192 bytes.
    for (ranks, split, layouts, sync) in [
        (2, SplitAny::Even, LayoutSource::Planner(PlannerStrategy::Paper), after),
        (2, SplitAny::MinMax, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(1)),
        (2, SplitAny::Random, LayoutSource::Random, after),
        (4, SplitAny::Even, LayoutSource::Planner(PlannerStrategy::Paper), after),
        (4, SplitAny::MinMax, LayoutSource::Planner(PlannerStrategy::MinMax), after),
        (4, SplitAny::Random, LayoutSource::Random, GradientSync::Buckets(300)),
    ] {
        let results = train(ranks, split, layouts, sync);
        // The min-max planner keeps a layout that is good enough.
        let enough = match layouts {
            LayoutSource::Random => 9 * STEPS / 10,
            LayoutSource::Planner(PlannerStrategy::Paper) => 10,
            LayoutSource::Planner(_) => 2,
        };
        let first = &results[0];
        assert!(first.layouts >= enough, "{ranks} ranks, {layouts:?}: {} new layouts", first.layouts);
        assert!(first.largest_norm > CLIP, "clipping had nothing to do: {}", first.largest_norm);
        for result in &results {
            let error = largest_error(&result.losses, &dense);
            assert!(error <= 1e-4, "{ranks} ranks, {layouts:?}: {error:.2e}");
            assert_eq!(result.replicated, first.replicated, "replicated parameters differ between ranks");
            // All but the first step's.
            let buckets = match sync {
                GradientSync::Buckets(1) => 4,
                GradientSync::Buckets(_) => 2,
                _ => 0,
            };
            assert_eq!(result.overlapped, buckets * (STEPS - 1), "{ranks} ranks, {sync:?}");
        }
        let error = largest_error(&first.losses, &dense);
        println!("{ranks} ranks, {split:?}, {layouts:?}: {} new layouts, largest error {error:.2e}", first.layouts);
    }
}

#[test]
fn without_gradient_sync_the_loss_curve_is_another_one() {
    let results = train(2, SplitAny::Even, LayoutSource::Random, GradientSync::Off);
    let error = largest_error(&results[0].losses, &dense());
    assert!(error > 1e-3, "the comparison sees nothing: {error:.2e}");
    assert_ne!(results[0].replicated, results[1].replicated);
}

#[test]
fn training_again_gives_the_same_bits() {
    let run = || train(4, SplitAny::MinMax, LayoutSource::Planner(PlannerStrategy::MinMax), GradientSync::Buckets(200));
    for (first, second) in run().iter().zip(run()) {
        assert_eq!(first.losses, second.losses);
        assert_eq!(first.replicated, second.replicated);
    }
}
