use std::{ops::Range, sync::Arc};

use burn::{
    backend::Dispatch as AnyBackend,
    tensor::{Int, Tensor},
};
use burn_fsep_planner::RoutingCounts;

use crate::{
    FsepError,
    comm::{CommError, Communicator},
    ops::{FsepDeviceOps, LayerSpec, Tracked, counts_of},
};

/// What a rank tells the others with its routing counts: what it takes the pass for. What it takes the layer for was compared
/// before.
pub(super) struct RoutingMessage<'a> {
    pub spec: &'a LayerSpec,
    /// Fingerprint of the layout.
    pub layout: u64,
    pub tracked: Tracked,
    /// Fingerprint of the layout of a prefetch, if there was one.
    pub ahead: Option<u64>,
}

/// A part of the header: what it says, its words, and their text for messages.
type Field = (&'static str, Range<usize>, fn(&[u32]) -> String);

const FIELDS: [Field; 3] = [
    ("the layout", 0..2, |words| format!("fingerprint {:08x}{:08x}", words[1], words[0])),
    ("the wanted gradients", 2..3, |words| Tracked::describe(words[0])),
    ("the prefetch (is begin_step called on all ranks?)", 3..5, |words| match words {
        [0, 0] => "none".into(),
        _ => format!("one under layout {:08x}{:08x}", words[1], words[0]),
    }),
];

/// Words before the ends.
const HEADER: usize = 5;

impl RoutingMessage<'_> {
    fn header(&self) -> [u32; HEADER] {
        let halves = |word: u64| [word as u32, (word >> 32) as u32];
        let [layout, layout_high] = halves(self.layout);
        // No prefetch is a layout that no rank has.
        let [ahead, ahead_high] = halves(self.ahead.unwrap_or(0));
        [layout, layout_high, self.tracked.bits(), ahead, ahead_high]
    }

    /// The counts of each chunk of all ranks that share the experts, from where its rows end, `[E + 2]`. `[N, E]` each
    ///
    /// # Errors
    ///
    /// [`FsepError::Divergence`] if ranks differ; what [`counts_of`] finds on any rank; the communicator's.
    pub fn gather_counts(
        &self,
        comm: &Arc<dyn Communicator>,
        mut ends: Vec<Tensor<1, Int>>,
    ) -> Result<Vec<RoutingCounts>, FsepError> {
        let (layer, num_experts) = (self.spec.layer, self.spec.num_experts);
        let operation = self.spec.operation("routing counts");
        let (chunks, len) = (ends.len(), num_experts + 2);
        let ends = if chunks == 1 { ends.swap_remove(0) } else { Tensor::cat(ends, 0) };
        let (ends, header) = (ends.into_dispatch(), self.header().to_vec());
        let all = <AnyBackend as FsepDeviceOps>::fsep_gather_ends(ends, header, comm.clone(), operation)?;

        let messages: Vec<&[u32]> = all.chunks_exact(HEADER + chunks * len).collect();
        let ours = messages[comm.rank()];
        let mut tables = vec![Vec::with_capacity(comm.size() * num_experts); chunks];
        for (peer, theirs) in messages.iter().enumerate() {
            if let Some((what, range, describe)) =
                FIELDS.into_iter().find(|(_, range, _)| theirs[range.clone()] != ours[range.clone()])
            {
                return Err(FsepError::Divergence {
                    what,
                    layer,
                    rank: comm.world_rank(comm.rank()),
                    ours: describe(&ours[range.clone()]),
                    peer: comm.world_rank(peer),
                    theirs: describe(&theirs[range]),
                });
            }
            for (ends, table) in theirs[HEADER..].chunks_exact(len).zip(&mut tables) {
                if !ends.is_sorted() {
                    let reason = format!("what came from rank {} are no counts", comm.world_rank(peer));
                    return Err(CommError::Engine { operation: operation.to_string(), reason }.into());
                }
                table.extend(counts_of(ends, layer, comm.world_rank(peer))?);
            }
        }
        let counts = |table| Ok(RoutingCounts::new(comm.size(), num_experts, table)?);
        tables.into_iter().map(counts).collect()
    }
}
