use std::sync::Arc;

use burn::{
    backend::Dispatch as AnyBackend,
    tensor::{Int, Tensor},
};
use burn_fsep_planner::{Layout, dispatch::DispatchPlan};

use super::{
    FsepDeviceOps, LayerSpec,
    replica_order::order_by_replica,
    row_order::{AssignmentPlaces, AssignmentRun, LeadingOrder},
};
use crate::{
    FsepError,
    comm::{Block, CommError, Communicator, ExchangePlan, Operation},
};

/// Rows of a rank's tokens that go once to each rank that computes any of their experts, by rank and then by token.
#[derive(Debug)]
pub struct RankRows {
    /// Where they go, one block a pair of ranks; in rows.
    pub exchange: ExchangePlan,
    /// The row of each assignment's token for its rank; `-1 - row` unless it is the first of them. `[T * K]`
    pub row_of: Tensor<1, Int>,
    /// The token of each row. `[U]`
    pub token_of: Tensor<1, Int>,
    /// The row, among the slot rows of the rank that a row goes to, of each of the token's assignments; -1 where another rank
    /// computes it. `[U * K]`
    pub places: Tensor<1, Int>,
}

/// Where the assignments of a rank go, and which of them lead their token's row to a rank: all but the number of rows.
pub struct PlacedAssignments {
    rank: usize,
    num_ranks: usize,
    topk: usize,
    /// An empty tensor on the rank's device, if it has no token.
    tensors: Result<Placed, Tensor<1, Int>>,
}

struct Placed {
    assignments: AssignmentPlaces<Tensor<1, Int>>,
    order: LeadingOrder<Tensor<1, Int>>,
}

impl PlacedAssignments {
    /// `row_of`: the row of each assignment among those sorted by expert, `[T * K]`.
    pub fn new(row_of: Tensor<1, Int>, plan: &DispatchPlan, layout: &Layout, spec: &LayerSpec) -> Self {
        let (rank, num_ranks, topk) = (spec.rank, spec.num_ranks, spec.topk);
        if row_of.dims()[0] == 0 {
            return Self { rank, num_ranks, topk, tensors: Err(row_of) };
        }
        let runs = assignment_runs(plan, layout, rank);
        let row_of = order_by_replica(row_of, plan, spec).into_dispatch();
        let (rank_of, place_of, first_of, leading) =
            <AnyBackend as FsepDeviceOps>::fsep_place_assignments(row_of, runs, num_ranks, topk);
        let (row_of, _, token_of, ends) =
            <AnyBackend as FsepDeviceOps>::fsep_sort_assignments(leading, num_ranks, topk);
        let wrap = Tensor::<1, Int>::from_dispatch;
        let assignments =
            AssignmentPlaces { rank_of: wrap(rank_of), place_of: wrap(place_of), first_of: wrap(first_of) };
        let order = LeadingOrder { row_of: wrap(row_of), token_of: wrap(token_of), ends: wrap(ends) };
        Self { rank, num_ranks, topk, tensors: Ok(Placed { assignments, order }) }
    }

    /// How many rows go from each rank to each, counted. The host waits for it. Collective. Shape `[N, N]`
    ///
    /// # Errors
    ///
    /// The communicator's, [`FsepError::Device`] if the device cannot be read, and [`CommError::Engine`] if what came are no
    /// counts, of at most `most`.
    pub fn gather_counts(
        &self,
        comm: &Arc<dyn Communicator>,
        operation: Operation,
        most: &[u64],
    ) -> Result<Vec<u64>, FsepError> {
        let ends = match &self.tensors {
            Ok(placed) => placed.order.ends.clone(),
            Err(empty) => Tensor::zeros([self.num_ranks + 2], (&empty.device(), empty.dtype())),
        };
        let ends = ends.into_dispatch();
        let all = <AnyBackend as FsepDeviceOps>::fsep_gather_ends(ends, Vec::new(), comm.clone(), operation)?;
        let mut counts = Vec::with_capacity(self.num_ranks * self.num_ranks);
        for (peer, ends) in all.chunks_exact(self.num_ranks + 2).enumerate() {
            let ends = &ends[..self.num_ranks];
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let rows = starts.zip(ends).map(|(start, &end)| u64::from(end.wrapping_sub(start)));
            counts.extend(rows);
            let first = peer * self.num_ranks;
            if counts[first..].iter().zip(&most[first..]).any(|(rows, most)| rows > most) {
                let reason = format!("what came from rank {peer} are no counts");
                return Err(CommError::Engine { operation: operation.to_string(), reason }.into());
            }
        }
        Ok(counts)
    }

    /// Lays rows out, `rows` from each rank to each, `[N, N]`: at least as many as there are.
    pub fn lay_out(self, rows: &[u64]) -> RankRows {
        let exchange = row_exchange(rows, self.rank, self.num_ranks);
        let (assignments, order) = match self.tensors {
            Err(empty) => return RankRows { exchange, row_of: empty.clone(), token_of: empty.clone(), places: empty },
            Ok(Placed { assignments, order }) => (assignments, order),
        };
        let lens = rows[self.rank * self.num_ranks..][..self.num_ranks].iter().map(|&rows| rows as usize).collect();
        let (row_of, token_of, places) = <AnyBackend as FsepDeviceOps>::fsep_lay_out_rows(
            assignments.rank_of.into_dispatch(),
            assignments.place_of.into_dispatch(),
            assignments.first_of.into_dispatch(),
            order.row_of.into_dispatch(),
            order.token_of.into_dispatch(),
            order.ends.into_dispatch(),
            lens,
            self.topk,
        );
        let [row_of, token_of, places] = [row_of, token_of, places].map(Tensor::from_dispatch);
        RankRows { exchange, row_of, token_of, places }
    }
}

/// The assignments of `rank`, sorted by expert, as runs that go to one rank each.
fn assignment_runs(plan: &DispatchPlan, layout: &Layout, rank: usize) -> Vec<AssignmentRun> {
    let (ranks, experts) = (plan.num_ranks(), plan.num_experts());
    // Of each expert on each rank: assignments of all sources, and of those before this one. A slot's rows are by source.
    let mut all = vec![0i64; experts * ranks];
    let mut before = vec![0i64; experts * ranks];
    for (source, expert, share) in plan.iter() {
        let i = expert * ranks + share.rank as usize;
        all[i] += i64::from(share.tokens);
        before[i] += if source < rank { i64::from(share.tokens) } else { 0 };
    }
    for peer in 0..ranks {
        let mut slot_start = 0;
        for &expert in layout.experts_of(peer) {
            let i = expert as usize * ranks + peer;
            before[i] += slot_start;
            slot_start += all[i];
        }
    }
    let mut start = 0;
    let shares = (0..experts).flat_map(|expert| plan.shares(rank, expert).iter().map(move |share| (expert, share)));
    shares
        .map(|(expert, share)| {
            let (peer, len) = (share.rank as usize, share.tokens as usize);
            let shift = before[expert * ranks + peer] - start;
            start += len as i64;
            AssignmentRun { rank: peer, len, shift }
        })
        .collect()
}

/// One block a pair of ranks, `rows` from each to each, `[N, N]`, in the order of ranks on both sides.
fn row_exchange(rows: &[u64], rank: usize, ranks: usize) -> ExchangePlan {
    let blocks = |rows: &mut dyn Iterator<Item = u64>| {
        let mut offset = 0;
        let mut blocks = Vec::with_capacity(ranks);
        for (peer, rows) in rows.enumerate().filter(|(_, rows)| *rows > 0) {
            blocks.push(Block { peer, offset, len: rows as usize });
            offset += rows as usize;
        }
        (blocks, offset)
    };
    let (sends, send_len) = blocks(&mut rows[rank * ranks..][..ranks].iter().copied());
    let (recvs, recv_len) = blocks(&mut (0..ranks).map(|source| rows[source * ranks + rank]));
    ExchangePlan { sends, recvs, recv_len, send_len }
}
