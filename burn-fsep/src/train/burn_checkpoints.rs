use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::{
    module::{Module, Param, ParamId},
    tensor::Tensor,
    train::{Learner, LearnerModel, LearningCheckpointer, metric::store::EventStoreClient},
};

use super::params::{ParamVisitor, Placement, visit_params};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, all_gather_u64},
    shard::is_shard_of,
};

const BEGIN: Operation = Operation::new("checkpointers of burn-train");
const WRITTEN: Operation = Operation::new("checkpoint of burn-train is written");
const CHECK: Operation = Operation::new("check of burn-train's checkpoint");

/// burn-train's own checkpointers, one set a rank.
///
/// They name their files by epoch alone and tell nobody where they put them. Ranks that share a folder would overwrite
/// each other's shards, and all go on from those of one rank. So what was saved is read back, until all ranks have found what
/// they saved in the same epoch. That waits for the slowest rank's disk, at most as long as a collective may take.
pub(super) struct BurnCheckpoints<M: LearnerModel> {
    checkpointer: Option<LearningCheckpointer<M>>,
    is_checked: bool,
}

impl<M: LearnerModel> BurnCheckpoints<M> {
    /// `epoch` is the one whose checkpoint training goes on from: the Learner has loaded it already. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] on all ranks if they go on from different epochs, only some have checkpointers, or one has
    /// another rank's shards.
    pub fn new(
        runtime: &FsepRuntime,
        checkpointer: Option<LearningCheckpointer<M>>,
        epoch: Option<usize>,
        model: &M,
    ) -> Result<Self, FsepError> {
        let is_loaded = runtime.world_size() > 1 && epoch.is_some() && checkpointer.is_some();
        let is_foreign = is_loaded && !has_own_shards(runtime, model);
        let ours = [epoch.unwrap_or(0) as u64, u64::from(checkpointer.is_some()), u64::from(is_foreign)];
        let all = all_gather_u64(runtime.comm(), BEGIN, &ours)?;
        let all: Vec<_> = all.chunks_exact(ours.len()).collect();
        let differs = |what: usize| all.iter().position(|theirs| theirs[what] != all[0][what]);
        if let Some(rank) = differs(0) {
            return Err(FsepError::Config(format!(
                "ranks go on from different epochs: rank 0 from {}, rank {rank} from {}; give `checkpoint` the same one \
                 on all ranks",
                all[0][0], all[rank][0]
            )));
        }
        if let Some(rank) = differs(1) {
            let (with, without) = if all[0][1] == 1 { (0, rank) } else { (rank, 0) };
            return Err(FsepError::Config(format!(
                "rank {with} has burn-train's checkpointers and rank {without} has none, but each rank has its own part \
                 of the experts to save: give them to all ranks, each with a folder of its own, or use \
                 FsepStrategy::with_checkpoints"
            )));
        }
        if let Some(rank) = all.iter().position(|theirs| theirs[2] == 1) {
            return Err(FsepError::Config(format!(
                "what rank {rank} has loaded is another rank's part of the experts, or of another number of ranks, \
                 or of an earlier version of burn-fsep: burn-train's checkpointers go on only with as many ranks, each with the folder that was its own. \
                 Checkpoints of FsepStrategy::with_checkpoints are for any number of ranks"
            )));
        }
        Ok(Self { checkpointer, is_checked: runtime.world_size() == 1 })
    }

    /// Lets burn-train's checkpointers save what they want to of an epoch. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] on all ranks if one of them reads another one's shards where it has just saved its own.
    pub fn save(
        &mut self,
        runtime: &FsepRuntime,
        learner: &Learner<M>,
        epoch: usize,
        event_store: &EventStoreClient,
    ) -> Result<(), FsepError> {
        let Some(checkpointer) = &mut self.checkpointer else { return Ok(()) };
        checkpointer.checkpoint(learner, epoch, event_store);
        if self.is_checked {
            return Ok(());
        }
        // They write in the background; what answers after that has written.
        read_back(checkpointer, learner, epoch);
        runtime.comm().barrier(WRITTEN)?;
        let found = match read_back(checkpointer, learner, epoch) {
            None => Found::Nothing,
            // Not by the owner: a record of an earlier version left other ids.
            Some(model) if shard_ids(&model) == shard_ids(&learner.model()) => Found::Own,
            Some(_) => Found::Foreign,
        };
        let all = all_gather_u64(runtime.comm(), CHECK, &[found as u64])?;
        if let Some(rank) = all.iter().position(|&theirs| theirs == Found::Foreign as u64) {
            return Err(FsepError::Config(format!(
                "another rank has overwritten what rank {rank} saved with burn-train's checkpointers: give \
                 SupervisedTraining a folder of its own on each rank, or use FsepStrategy::with_checkpoints"
            )));
        }
        // Else again after the next epoch: a checkpointing strategy need not save each one.
        self.is_checked = all.iter().all(|&theirs| theirs == Found::Own as u64);
        Ok(())
    }
}

/// What a rank finds where it has saved its shards.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    Own,
    Foreign,
}

/// The model of an epoch's checkpoint, if there is one.
fn read_back<M: LearnerModel>(checkpointer: &LearningCheckpointer<M>, learner: &Learner<M>, epoch: usize) -> Option<M> {
    // Panicking is how it says that there is none.
    catch_unwind(AssertUnwindSafe(|| checkpointer.load_checkpoint(learner.clone(), epoch).model())).ok()
}

fn has_own_shards<M: Module>(runtime: &FsepRuntime, model: &M) -> bool {
    shard_ids(model).into_iter().all(|id| is_shard_of(id, runtime.rank(), runtime.world_size()))
}

fn shard_ids<M: Module>(model: &M) -> Vec<ParamId> {
    let mut ids = ShardIds(Vec::new());
    visit_params(model, &mut ids);
    ids.0
}

struct ShardIds(Vec<ParamId>);

impl ParamVisitor for ShardIds {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, placement: Placement) {
        if placement == Placement::Sharded {
            self.0.push(param.id);
        }
    }
}
