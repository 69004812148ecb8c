use std::{sync::Arc, time::Duration};

use crate::comm::{RoundsCommunicator, rounds::Rounds};

/// A rank's handle on a group of threads.
pub type LocalCommunicator = RoundsCommunicator;

impl LocalCommunicator {
    /// A group of `size` ranks that are threads, one handle each, to be moved to one thread each. A collective that not all
    /// ranks have reached after `timeout` ends in an error on all.
    ///
    /// [`launch`](super::launch()) does this and starts the threads.
    ///
    /// # Panics
    ///
    /// If `size` is 0.
    pub fn group(size: usize, timeout: Duration) -> Vec<Self> {
        assert!(size > 0, "a group needs at least one rank");
        let rounds = Arc::new(Rounds::new(size, size, timeout, |_| {}));
        (0..size).map(|rank| Self::new(rounds.clone(), rank, size, None)).collect()
    }

    /// The group of one rank: for training without peers and for inference.
    pub fn single() -> Self {
        let mut ranks = Self::group(1, Duration::from_secs(30));
        ranks.swap_remove(0)
    }
}
