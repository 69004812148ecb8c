/// Communicators of a rank whose kernels fit on the GPU together: those of an FSEP runtime on the world.
const COMMUNICATORS: usize = 4;
/// At most so many blocks of one kernel: as many as NCCL takes by itself between GPUs with NVLink.
const MAX_BLOCKS: usize = 32;

/// Thread blocks that a kernel of a group's communicators may have; one takes a multiprocessor. See "Engines" in docs/design.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KernelBlocks {
    /// A power of two, to which NCCL rounds up where ranks send to each other.
    foreground: usize,
    /// Of what compute hides.
    background: usize,
}

impl KernelBlocks {
    /// For the world, on a GPU with so many multiprocessors; `background` as [`NcclConfig`](super::NcclConfig) has it.
    pub fn new(multiprocessors: usize, background: Option<usize>) -> Self {
        let share = (multiprocessors / COMMUNICATORS).clamp(1, MAX_BLOCKS);
        let foreground = 1 << share.ilog2();
        Self { foreground, background: background.map_or(foreground, |blocks| blocks.clamp(1, foreground)) }
    }

    /// For a group that is split off.
    pub fn of_part(self) -> Self {
        let foreground = (self.foreground / 2).max(1);
        Self { foreground, background: self.background.min(foreground) }
    }

    pub fn get(self, in_background: bool) -> usize {
        if in_background { self.background } else { self.foreground }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_of_all_communicators_fit_on_the_gpu() {
        // H100 and H200, A100, L4, and the smallest.
        for (multiprocessors, blocks) in [(132, 32), (108, 16), (58, 8), (8, 2), (4, 1), (1, 1)] {
            let world = KernelBlocks::new(multiprocessors, None);
            assert_eq!(world.get(false), blocks);
            assert_eq!(world.get(true), blocks);
            assert!(COMMUNICATORS * blocks <= multiprocessors.max(COMMUNICATORS));
            // Two of the world and four of groups, from eight multiprocessors on.
            let part = world.of_part().get(false);
            assert!(2 * blocks + 4 * part <= multiprocessors.max(6), "{multiprocessors}");
        }
    }

    #[test]
    fn what_compute_hides_takes_no_more_than_is_asked_for() {
        let blocks = |background| {
            let world = KernelBlocks::new(132, background);
            [world.get(true), world.of_part().get(true), world.of_part().of_part().get(true)]
        };
        assert_eq!(blocks(Some(4)), [4, 4, 4]);
        assert_eq!(blocks(Some(16)), [16, 16, 8]);
        assert_eq!(blocks(Some(64)), [32, 16, 8]);
    }
}
