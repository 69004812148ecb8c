//! Restored expert weights alive at once, counted.

use burn::tensor::{Distribution, Tensor};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntime,
    comm::local::{LaunchConfig, launch},
};
use burn_fsep_tests::device;

#[test]
fn at_most_two_layers_of_weights_are_alive() {
    let (ranks, slots, hidden, ffn) = (2, 3, 8, 12);
    let results = launch(&LaunchConfig::new(ranks), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntime::new(comm)?;
        let config = FSEPMoEConfig::new(hidden, ffn, 4).with_slots_per_rank(Some(slots));
        let layers: Vec<_> = (0..4).map(|_| config.try_init(&runtime, &device())).collect::<Result<_, FsepError>>()?;
        runtime.run(|| {
            let x = Tensor::<2>::random([10, hidden], Distribution::Default, &device());
            let y = layers.iter().fold(x, |x, layer| x.clone() + layer.forward(x));
            let after_forward = runtime.restored_gauge().bytes();
            let _ = y.sum().backward();
            (after_forward, runtime.restored_gauge().bytes(), runtime.restored_gauge().peak_bytes())
        })
    });
    let one_layer = slots * 3 * hidden * ffn * size_of::<f32>();
    for result in results {
        let (after_forward, after_backward, peak) = result.unwrap();
        assert_eq!((after_forward, after_backward), (0, 0), "weights are freed after each layer");
        assert!(peak >= one_layer, "{peak} bytes counted, but a layer has {one_layer}");
        assert!(peak <= 2 * one_layer, "{peak} bytes alive at once, two layers have {}", 2 * one_layer);
    }
}
