//! Writing the files of a model, each by one rank, from parts that all ranks have.
//!
//! Ranks go through their files in equal steps. In each step every rank sends the writers its parts of some experts, some MB at
//! once, and every writer writes them; so no rank ever has more than those and one replicated parameter.

use std::{ops::Range, sync::Arc};

use burn::tensor::Bytes;

use super::{
    HubError,
    decode::size_of,
    hub_folder::Inner,
    layout::{Layout, Origin, OutFile, OutTensor},
    output::Output,
    plan::{Plan, PlannedParam, Source},
    progress::Listener,
    values::ParamValue,
    view::View,
    writer::Writer,
};
use crate::{
    checkpoint::{Sharding, Work, all_or_none},
    comm::{Block, Communicator, ExchangePlan, Operation},
};

const WRITE: Operation = Operation::new("files of a model folder");
/// Bytes written in a step, if a part is not larger.
const STEP: u64 = 4 << 20;

/// What is written at once: a part of an expert, or a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    /// The tensor, and where it starts in the file.
    pub tensor: usize,
    pub start: u64,
    /// The place among the experts that the tensor has.
    pub expert: Option<usize>,
}

/// All that is known on every rank.
pub(super) struct Job {
    pub folder: Arc<Inner>,
    pub plan: Plan,
    pub layout: Layout,
    pub output: Output,
    /// Ranks that share the experts: the first of all have them whole together.
    pub expert_ranks: usize,
}

impl Job {
    /// Writes all files. Collective.
    pub fn write(
        job: &Arc<Self>,
        comm: &dyn Communicator,
        values: &[ParamValue],
        listener: &Listener,
    ) -> Result<(), HubError> {
        let (rank, ranks) = (comm.rank(), comm.size());
        let ours = job.layout.files.iter().skip(rank).step_by(ranks);
        let total = ours.map(|file| file.len).sum();
        let mut done = 0;
        listener.tell(0, total, "");
        for wave in job.layout.files.chunks(ranks) {
            let steps: Vec<Vec<Vec<Unit>>> = wave.iter().map(|file| job.steps(file)).collect();
            let mut writer = wave.get(rank).map(|file| Writer::new(job, file));
            for step in 0..steps.iter().map(Vec::len).max().unwrap_or(0) {
                let units: Vec<&[Unit]> =
                    steps.iter().map(|steps| steps.get(step).map_or(&[][..], |units| units)).collect();
                let parts = job.exchange(comm, values, &units)?;
                let mine = units.get(rank).copied().unwrap_or(&[]);
                let Some(mut ready) = writer.take() else {
                    Work::<_, HubError>::start(|| Ok(())).finish(comm, WRITE)?;
                    continue;
                };
                let content = job.content(values, mine, parts, rank);
                let job = job.clone();
                let work = Work::<_, HubError>::start(move || {
                    for (unit, content) in content? {
                        ready.write(&job, &unit, content)?;
                    }
                    Ok(ready)
                });
                let ready = work.finish(comm, WRITE)?;
                done += mine.iter().map(|unit| job_bytes(&ready.job, unit)).sum::<u64>();
                if let Some(unit) = mine.last() {
                    listener.tell(done, total, &ready.job.layout.tensors[unit.tensor].name);
                }
                writer = Some(ready);
            }
            let closing = Work::<_, HubError>::start(move || writer.map_or(Ok(()), Writer::close));
            closing.finish(comm, WRITE)?;
        }
        listener.tell(total, total, "");
        Ok(())
    }

    /// What is written of a file in each step.
    fn steps(&self, file: &OutFile) -> Vec<Vec<Unit>> {
        let units = file.tensors.iter().flat_map(|&(tensor, start)| {
            let experts = match &self.layout.tensors[tensor].origin {
                Origin::Experts(_, slices) => Some(slices.len()),
                _ => None,
            };
            (0..experts.unwrap_or(1)).map(move |expert| Unit { tensor, start, expert: experts.map(|_| expert) })
        });
        let mut steps: Vec<Vec<Unit>> = Vec::new();
        let mut size = 0;
        for unit in units {
            let bytes = job_bytes(self, &unit);
            match steps.last_mut() {
                Some(step) if size + bytes <= STEP => {
                    step.push(unit);
                    size += bytes;
                }
                _ => {
                    steps.push(vec![unit]);
                    size = bytes;
                }
            }
        }
        steps
    }

    /// Sends each writer this rank's parts of the experts in its units; `units[w]` are those of rank `w`. What came for this rank, one
    /// rank's after the other's, with their lengths.
    fn exchange(
        &self,
        comm: &dyn Communicator,
        values: &[ParamValue],
        units: &[&[Unit]],
    ) -> Result<(Vec<u8>, Vec<usize>), HubError> {
        let (rank, ranks) = (comm.rank(), comm.size());
        if units.iter().all(|units| units.iter().all(|unit| unit.expert.is_none())) {
            return Ok((Vec::new(), vec![0; ranks]));
        }
        let (send, sends) = all_or_none(comm, WRITE, self.pieces(values, units, rank))?;
        let mut plan = ExchangePlan { sends, ..ExchangePlan::default() };
        let mine = units.get(rank).copied().unwrap_or(&[]);
        let mut lens = Vec::with_capacity(ranks);
        for peer in 0..ranks {
            let pieces = mine.iter().filter_map(|unit| self.piece(unit, peer, rank));
            let len =
                pieces.map(|(place, piece)| piece.columns.len() * size_of(self.plan.params[place].param.dtype)).sum();
            if len > 0 {
                plan.recvs.push(Block { peer, offset: plan.recv_len, len });
            }
            plan.recv_len += len;
            lens.push(len);
        }
        plan.send_len = send.len();
        let mut received = vec![0; plan.recv_len];
        comm.start_all_to_all_v(WRITE, Arc::new(Bytes::from_bytes_vec(send)), plan)?.wait(&mut received)?;
        Ok((received, lens))
    }

    /// What rank `rank` sends to the writers of these units.
    fn pieces(&self, values: &[ParamValue], units: &[&[Unit]], rank: usize) -> Result<(Vec<u8>, Vec<Block>), HubError> {
        let pieces = |peer: usize, units: &&[Unit]| -> usize {
            let pieces = units.iter().filter_map(|unit| self.piece(unit, rank, peer));
            pieces.map(|(place, piece)| self.bytes_of(place, &piece)).sum()
        };
        let len = units.iter().enumerate().map(|(peer, units)| pieces(peer, units)).sum();
        let (mut send, mut blocks) = (Vec::with_capacity(len), Vec::new());
        for (peer, units) in units.iter().enumerate() {
            let offset = send.len();
            for unit in *units {
                let Some((place, piece)) = self.piece(unit, rank, peer) else { continue };
                send.extend_from_slice(values[place].part_of_row(piece.row, piece.columns)?.as_bytes());
            }
            if send.len() > offset {
                blocks.push(Block { peer, offset, len: send.len() - offset });
            }
        }
        Ok((send, blocks))
    }

    fn bytes_of(&self, place: usize, piece: &Piece) -> usize {
        piece.columns.len() * size_of(self.plan.params[place].param.dtype)
    }

    /// What rank `rank` has of an expert's part that rank `writer` writes; with the parameter's place.
    fn piece(&self, unit: &Unit, rank: usize, writer: usize) -> Option<(usize, Piece)> {
        let (Origin::Experts(place, slices), Some(expert)) = (&self.layout.tensors[unit.tensor].origin, unit.expert)
        else {
            return None;
        };
        let (expert, wanted) = &slices[expert];
        let PlannedParam { param, source } = &self.plan.params[*place];
        let Source::Experts(parts) = source else { return None };
        let (experts, positions) = match &param.experts {
            Some(_) if rank >= self.expert_ranks => return None,
            Some(info) => {
                let sharding = Sharding::new(info, self.expert_ranks);
                (sharding.experts_of(rank), sharding.params_of(rank))
            }
            // A dense layer's, which every rank has.
            None if rank == writer => (0..parts.len(), 0..param.shape[1]),
            None => return None,
        };
        let range = wanted.start.max(positions.start)..wanted.end.min(positions.end);
        if !experts.contains(expert) || range.is_empty() {
            return None;
        }
        let columns = range.start - positions.start..range.end - positions.start;
        Some((*place, Piece { row: expert - experts.start, columns, at: range.start - wanted.start }))
    }

    /// The values of this rank's units.
    fn content(
        &self,
        values: &[ParamValue],
        units: &[Unit],
        (received, lens): (Vec<u8>, Vec<usize>),
        rank: usize,
    ) -> Result<Vec<(Unit, Content)>, HubError> {
        let mut after = received.as_slice();
        let parts = lens.into_iter().map(|len| after.split_off(..len).unwrap_or_default());
        let mut rest: Vec<&[u8]> = parts.collect();
        let mut all = Vec::with_capacity(units.len());
        for unit in units {
            let content = match &self.layout.tensors[unit.tensor].origin {
                Origin::Folder => Content::Folder,
                Origin::Param(place) => Content::Values(values[*place].all()?.into_bytes()),
                Origin::Experts(place, slices) => {
                    let width = size_of(self.plan.params[*place].param.dtype);
                    let (_, range) = &slices[unit.expert.unwrap_or(0)];
                    let mut bytes = vec![0; range.len() * width];
                    for (peer, rest) in rest.iter_mut().enumerate() {
                        let Some((_, piece)) = self.piece(unit, peer, rank) else { continue };
                        let (part, after) = rest.split_at(piece.columns.len() * width);
                        *rest = after;
                        bytes[piece.at * width..][..part.len()].copy_from_slice(part);
                    }
                    Content::Values(Bytes::from_bytes_vec(bytes))
                }
            };
            all.push((*unit, content));
        }
        Ok(all)
    }
}

/// A part of a row of a rank's experts, and where it belongs in what is written.
struct Piece {
    row: usize,
    columns: Range<usize>,
    at: usize,
}

pub(super) enum Content {
    /// In the parameter's order and type.
    Values(Bytes),
    /// As the folder has it that was read.
    Folder,
}

/// Bytes of a unit in its file.
fn job_bytes(job: &Job, unit: &Unit) -> u64 {
    let tensor = &job.layout.tensors[unit.tensor];
    match (&tensor.origin, unit.expert) {
        (Origin::Experts(_, slices), Some(expert)) => (slices[expert].1.len() * size_of(tensor.dtype)) as u64,
        _ => tensor.bytes(),
    }
}

impl Job {
    /// Where the values of a unit stand in its tensor: views, each with the place of its first value among the unit's, and the
    /// tensor's element that the unit starts at.
    pub fn views(&self, tensor: &OutTensor, unit: &Unit) -> (usize, Vec<(usize, View)>, usize) {
        match &tensor.origin {
            Origin::Experts(place, slices) => {
                let (expert, range) = &slices[unit.expert.unwrap_or(0)];
                let Source::Experts(parts) = &self.plan.params[*place].source else { unreachable!("made of experts") };
                let parts = parts[*expert].iter().filter(|part| part.tensor == tensor.name);
                let first = parts.clone().map(|part| part.view.base).min().unwrap_or(0);
                let views = parts.map(|part| {
                    let view = View { base: part.view.base - first, ..part.view };
                    (part.at - range.start, view)
                });
                (*place, views.collect(), first)
            }
            Origin::Param(place) => {
                let Source::Tensor(_, view) = &self.plan.params[*place].source else {
                    unreachable!("made of a tensor")
                };
                (*place, vec![(0, *view)], 0)
            }
            Origin::Folder => unreachable!("it has no values of the model's"),
        }
    }
}
