use std::sync::Arc;

use super::{CommError, Communicator, Operation, agree, error::invalid_argument};

/// The groups of a rank where not all ranks of the world share the experts: N consecutive ranks do, and the W / N groups of them are
/// data-parallel replicas of one another.
///
/// ```
/// use burn_fsep::comm::{CommError, Groups, local::{LaunchConfig, launch}};
///
/// // Ranks 0 to 3 share the experts, and so do 4 to 7.
/// let places = launch(&LaunchConfig::new(8), |world| {
///     let groups = Groups::new(world, 4)?;
///     let [experts, replicas] = [groups.experts(), groups.replicas()].map(|group| (group.rank(), group.size()));
///     Ok::<_, CommError>([experts, replicas])
/// });
/// assert_eq!(places[6], Ok([(2, 4), (1, 2)]));
/// ```
#[derive(Debug, Clone)]
pub struct Groups {
    world: Arc<dyn Communicator>,
    experts: Arc<dyn Communicator>,
    replicas: Arc<dyn Communicator>,
}

impl Groups {
    /// Splits `world`, of W ranks, into groups of N = `experts_ranks` that share the experts. Collective.
    ///
    /// # Errors
    ///
    /// [`CommError::InvalidArgument`], on all ranks, if N does not divide W or is not equal on all of them; any other [`CommError`].
    pub fn new(world: Arc<dyn Communicator>, experts_ranks: usize) -> Result<Self, CommError> {
        let operation = Operation::new("groups of ranks");
        let refused = |reason: String| Err(invalid_argument(operation, reason));
        // First of all: else a rank with another number would leave the others waiting.
        if let Some(difference) = agree(world.as_ref(), operation, &[("experts_ranks", experts_ranks as u64)])? {
            let [ours, theirs] = difference.values;
            return refused(format!("{difference}: {ours} and {theirs}; give all ranks the same"));
        }
        let (size, rank) = (world.size(), world.rank());
        if experts_ranks == 0 || !size.is_multiple_of(experts_ranks) {
            let divisors: Vec<_> = (1..=size).filter(|ranks| size.is_multiple_of(*ranks)).collect();
            return refused(format!(
                "groups of {experts_ranks} ranks that share the experts do not divide a world of {size}: give one of \
                 {divisors:?}, or start another number of ranks"
            ));
        }
        let experts = match experts_ranks {
            all if all == size => world.clone(),
            _ => world.split("experts", (rank / experts_ranks) as u64, 0)?,
        };
        let replicas = world.split("replicas", (rank % experts_ranks) as u64, 0)?;
        Ok(Self { world, experts, replicas })
    }

    /// All ranks.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// The ranks that share the experts with this one, of which it is rank r mod N; the world itself if they are all.
    pub fn experts(&self) -> &Arc<dyn Communicator> {
        &self.experts
    }

    /// The ranks that have the same shards as this one, one of each of the groups that share experts, of which it is rank r / N; it
    /// alone if all ranks share the experts.
    pub fn replicas(&self) -> &Arc<dyn Communicator> {
        &self.replicas
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{
        all_gather_u64,
        local::{LaunchConfig, RankError, launch},
    };

    const OP: Operation = Operation::new("test");

    /// World ranks of a group, as its ranks tell them.
    fn ranks(world: &dyn Communicator, group: &dyn Communicator) -> Result<Vec<u64>, CommError> {
        let told = all_gather_u64(group, OP, &[world.rank() as u64])?;
        let known: Vec<_> = (0..group.size()).map(|rank| group.world_rank(rank) as u64).collect();
        assert_eq!(told, known);
        Ok(told)
    }

    #[test]
    fn consecutive_ranks_share_the_experts() {
        for (size, experts_ranks) in [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)] {
            let groups = launch(&LaunchConfig::new(size), |world| {
                let groups = Groups::new(world, experts_ranks)?;
                let world = groups.world().as_ref();
                Ok::<_, CommError>(
                    [groups.experts(), groups.replicas()].map(|group| ranks(world, group.as_ref()).unwrap()),
                )
            });
            for (rank, result) in groups.into_iter().enumerate() {
                let (first, place) = (rank / experts_ranks * experts_ranks, rank % experts_ranks);
                let [experts, replicas] = result.unwrap();
                assert_eq!(experts, (first..first + experts_ranks).map(|rank| rank as u64).collect::<Vec<_>>());
                assert_eq!(replicas, (place..size).step_by(experts_ranks).map(|rank| rank as u64).collect::<Vec<_>>());
            }
        }
    }

    fn refusal(size: usize, experts_ranks: impl Fn(usize) -> usize + Sync) -> String {
        let results = launch(&LaunchConfig::new(size), |world| {
            let ranks = experts_ranks(world.rank());
            Groups::new(world, ranks)
        });
        let told: Vec<_> = results.into_iter().map(|result| result.unwrap_err()).collect();
        let error = |told: &RankError<CommError>| match told {
            RankError::Failed { error: error @ CommError::InvalidArgument { .. }, .. } => error.to_string(),
            other => panic!("{other}"),
        };
        assert!(told.iter().all(|other| error(other) == error(&told[0])), "{told:?}");
        error(&told[0])
    }

    #[test]
    fn groups_that_do_not_fit_the_world_are_refused_everywhere() {
        for ranks in [0, 4, 12] {
            let told = refusal(6, |_| ranks);
            assert!(told.contains("give one of [1, 2, 3, 6]"), "{told}");
        }
        // Also by a rank whose own number would not do.
        let told = refusal(4, |rank| if rank == 2 { 3 } else { 2 });
        assert!(told.contains("ranks 0 and 2 differ in `experts_ranks`: 2 and 3"), "{told}");
    }

    #[test]
    fn a_split_ranks_by_key_then_by_rank() {
        let orders = launch(&LaunchConfig::new(5), |world| {
            // Rank 3 alone, the others in descending order but for the first two, which have one key.
            let (color, key) = (u64::from(world.rank() == 3), 10 - world.rank().max(1) as u64);
            let group = world.split("test", color, key)?;
            ranks(world.as_ref(), group.as_ref())
        });
        let orders: Vec<_> = orders.into_iter().map(Result::unwrap).collect();
        assert_eq!(orders[3], [3]);
        assert!([0, 1, 2, 4].into_iter().all(|rank| orders[rank] == [4, 2, 0, 1]), "{orders:?}");
    }
}
