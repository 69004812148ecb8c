//! LibTorch, on the CPU.

use crate::common::{losses, summary};

#[test]
fn losses_do_not_depend_on_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let run = |options: &[&str]| losses(&summary(folder.path(), &[&["--backend", "libtorch"], options].concat()));
    let dense = run(&["--dense"]);
    for (options, tolerance) in [
        (vec!["--ranks", "2"], 1e-4),
        (vec!["--ranks", "4", "--planner", "static"], 1e-4),
        (vec!["--mixed-precision"], 1e-2),
    ] {
        for (ours, dense) in run(&options).iter().zip(dense) {
            assert!((ours - dense).abs() <= tolerance * dense, "{options:?}: {ours}, not {dense}");
        }
    }
}
