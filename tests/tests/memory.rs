//! What ranks hold at once, counted: restored expert weights, and parameters that are broadcast.

use std::sync::atomic::Ordering;

use burn::{
    nn::LinearConfig,
    tensor::{Distribution, Tensor},
};
use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntime, comm::local::LaunchConfig, train::broadcast_parameters};
use burn_fsep_tests::{Fault, FaultMode, FaultyCommunicator, device, launch};

/// Runs a stack of `depth` layers on `ranks` ranks. Bytes alive after forward, after backward, and at most.
fn gauge(ranks: usize, depth: usize, slots: usize, hidden: usize, ffn: usize) -> Vec<[usize; 3]> {
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let config = FSEPMoEConfig::new(hidden, ffn, 4).with_slots_per_rank(Some(slots));
        let layers: Vec<_> = (0..depth).map(|_| config.try_init(&runtime, &device())).collect::<Result<_, _>>()?;
        let gauge = runtime.unsharded_gauge();
        runtime.run(|| {
            let x = Tensor::<2>::random([10, hidden], Distribution::Default, &device());
            let y = layers.iter().fold(x, |x, layer| x.clone() + layer.forward(x));
            let after_forward = gauge.bytes();
            let grads = y.sum().backward();
            let counted = [after_forward, gauge.bytes(), gauge.peak_bytes()];
            drop(grads);
            counted
        })
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn at_most_two_layers_of_weights_are_alive() {
    // With 231 parameters an expert, 4 ranks need padding.
    for (ranks, slots, hidden, ffn) in [(2, 3, 8, 12), (4, 2, 7, 11), (4, 4, 7, 11)] {
        let shard = usize::div_ceil(3 * hidden * ffn, ranks);
        let one_layer = slots * ranks * shard * size_of::<f32>();
        for depth in [1, 4] {
            for [after_forward, after_backward, peak] in gauge(ranks, depth, slots, hidden, ffn) {
                assert_eq!((after_forward, after_backward), (0, 0), "weights are freed after each layer");
                assert!(peak >= one_layer, "{peak} bytes counted, but a layer has {one_layer}");
                assert!(peak <= 2 * one_layer, "{peak} bytes alive at once, two layers have {}", 2 * one_layer);
            }
        }
    }
}

#[test]
fn a_model_is_broadcast_one_parameter_at_a_time() {
    let results = launch(&LaunchConfig::new(2), |comm| -> Result<_, FsepError> {
        let never = Fault::Failure { rank: 0, at: usize::MAX, mode: FaultMode::Panic };
        let (comm, record) = FaultyCommunicator::new(comm, never);
        let runtime = FsepRuntime::new(comm)?;
        let model: Vec<_> = [4, 8, 2].map(|width| LinearConfig::new(16, width).init(&device())).into();
        broadcast_parameters(&runtime, model)?;
        Ok(record.largest_broadcast.load(Ordering::Relaxed))
    });
    for result in results {
        assert_eq!(result.unwrap(), 16 * 8 * size_of::<f32>());
    }
}
