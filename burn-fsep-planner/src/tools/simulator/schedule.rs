//! What prefetching hides: `docs/design.md` ("Schedule") and LAER-MoE, section 4.2.

/// Seconds of one layer in one micro-batch, as far as hiding communication is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Overlap {
    /// Forward compute.
    pub forward: f64,
    /// Backward compute, with recomputation.
    pub backward: f64,
    /// Restoring the layer's weights.
    pub restore: f64,
    /// The same for backward; 0 where they are kept.
    pub restore_again: f64,
    /// Resharding its gradients.
    pub reshard: f64,
}

/// Seconds of restoring and resharding that a micro-batch's compute does not hide.
///
/// Forward, the restore of layer `l + 1` hides behind the compute of layer `l`. Backward, the restore of layer `l - 1`
/// and the delayed reshard of layer `l + 1` share the compute of layer `l`. The first restore and the last reshard have
/// nothing to hide behind; the first restore of backward hides behind the output layer (`head` seconds).
pub(super) fn exposed(layers: &[Overlap], head: f64) -> f64 {
    let (Some(first), Some(last)) = (layers.first(), layers.last()) else { return 0.0 };
    let over = |communication: f64, compute: f64| (communication - compute).max(0.0);
    let forward: f64 = layers.windows(2).map(|pair| over(pair[1].restore, pair[0].forward)).sum();
    let backward: f64 = (0..layers.len())
        .map(|l| {
            let before = if l > 0 { layers[l - 1].restore_again } else { 0.0 };
            let after = layers.get(l + 1).map_or(0.0, |next| next.reshard);
            over(before + after, layers[l].backward)
        })
        .sum();
    first.restore + forward + over(last.restore_again, head) + backward + first.reshard
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ends_show_when_compute_is_long() {
        let layer = Overlap { forward: 10.0, backward: 20.0, restore: 4.0, restore_again: 4.0, reshard: 3.0 };
        assert_eq!(exposed(&[layer; 5], 1.0), 4.0 + 3.0 + 3.0);
        assert_eq!(exposed(&[], 1.0), 0.0);
    }

    #[test]
    fn what_does_not_fit_shows() {
        let layer = Overlap { forward: 3.0, backward: 5.0, restore: 4.0, restore_again: 4.0, reshard: 4.0 };
        // Ends 4 + 4 + 4, forward 2 times 1, backward: middle 8 - 5, both ends below 5.
        assert_eq!(exposed(&[layer; 3], 0.0), 12.0 + 2.0 + 3.0);
    }

    #[test]
    fn without_compute_all_of_it_shows() {
        let layer = Overlap { forward: 0.0, backward: 0.0, restore: 2.0, restore_again: 2.0, reshard: 1.0 };
        assert_eq!(exposed(&[layer; 4], 0.0), 4.0 * (2.0 + 2.0 + 1.0));
    }
}
