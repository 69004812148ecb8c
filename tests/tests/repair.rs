//! A layout that does not suit the step's tokens is repaired in the step; values and gradients stay those of the dense
//! layer (`parity.rs` runs with repairs on).

use std::sync::Arc;

use burn::tensor::{Distribution, Tensor};
use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntimeConfig, comm::local::LaunchConfig, moe::RouterForcing};
use burn_fsep_planner::{Layout, repair::RepairConfig};
use burn_fsep_tests::{device, launch};

/// Imbalance of a step on a layout with one replica of the hot expert, and how many slots changed.
fn step(repair: Option<RepairConfig>) -> Vec<(f64, usize)> {
    let results = launch(&LaunchConfig::new(4), |comm| -> Result<_, FsepError> {
        let runtime = FsepRuntimeConfig::new().with_repair(repair).init(comm)?;
        let layer = FSEPMoEConfig::new(4, 6, 4)
            .with_slots_per_rank(Some(2))
            .with_moe_router_topk(1)
            .with_moe_router_force(Some(RouterForcing::Shares(vec![0.05, 0.15, 0.15, 0.65])))
            .try_init(&runtime, &device())?;
        let layout = Layout::from_rows(4, &[vec![0, 1], vec![0, 2], vec![0, 3], vec![1, 2]])?;
        runtime.set_layout(0, Arc::new(layout.clone()))?;
        runtime.run(|| {
            let x = Tensor::<2>::random([40, 4], Distribution::Default, &device());
            let _ = layer.forward(x).sum().backward();
        })?;
        Ok((runtime.stats().imbalance(), runtime.layout(0).moved_slots(&layout)))
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn a_layout_that_does_not_suit_the_step_is_repaired_in_it() {
    for (imbalance, moved) in step(None) {
        assert!(imbalance > 2.0 && moved == 0, "{imbalance}, {moved} slots");
    }
    for (imbalance, moved) in step(Some(RepairConfig::free())) {
        assert!(imbalance < 1.1 && (1..=3).contains(&moved), "{imbalance}, {moved} slots");
    }
}
