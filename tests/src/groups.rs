//! What every communicator has to do right where ranks are split into groups.

use std::sync::Arc;

use burn::tensor::Bytes;
use burn_fsep::comm::{Block, CommError, Communicator, ExchangePlan, Groups, Operation, PendingExchange};

use crate::{check_blocks, check_duplicates, check_gather_and_broadcast, check_reductions};

const OP: Operation = Operation::new("test");

/// All collectives in the groups of a world of which `experts_ranks` share the experts, in groups of these groups, and in several
/// groups at once. Collective.
///
/// # Errors
///
/// Any [`CommError`].
///
/// # Panics
///
/// If values are not what they should be.
pub fn check_groups(world: &Arc<dyn Communicator>, experts_ranks: usize) -> Result<(), CommError> {
    let groups = Groups::new(world.clone(), experts_ranks)?;
    let (experts, replicas) = (groups.experts(), groups.replicas());
    for group in [experts, replicas] {
        check_reductions(group.as_ref())?;
        check_gather_and_broadcast(group.as_ref())?;
        check_blocks(group.as_ref(), 1000)?;
        check_duplicates(group.as_ref())?;
    }
    // No two groups of experts make equally many collectives, duplicates and splits; what they make then is told apart all the same.
    let mut made = vec![world.clone(), experts.clone(), replicas.clone()];
    for _ in 0..replicas.rank() {
        let duplicate = experts.duplicate("some groups' own")?;
        check_gather_and_broadcast(duplicate.as_ref())?;
        made.push(duplicate.split("nested in some groups' own", u64::from(duplicate.rank() > 0), 0)?);
        made.push(duplicate);
    }
    if experts.size().is_multiple_of(2) {
        let halves = Groups::new(experts.clone(), experts.size() / 2)?;
        made.extend([halves.experts().clone(), halves.replicas().clone()]);
    }
    made.push(replicas.duplicate("replicas")?);
    made.push(world.duplicate_in_background("world")?);
    made.push(experts.duplicate_in_background("experts")?);
    check_at_once(world.as_ref(), &made)
}

/// An exchange in each of the groups, all under way at once: each rank starts and awaits them in an order of its own.
fn check_at_once(world: &dyn Communicator, groups: &[Arc<dyn Communicator>]) -> Result<(), CommError> {
    // Where NCCL's ranks compare what they are about to do, they start alike.
    let turn = if cfg!(feature = "nccl") { 0 } else { world.rank() };
    let order = |turn: usize| (0..groups.len()).map(move |i| (i + turn) % groups.len());
    let mut pending: Vec<Option<Box<dyn PendingExchange>>> = groups.iter().map(|_| None).collect();
    for place in order(turn) {
        pending[place] = Some(start(groups[place].as_ref(), world.rank())?);
    }
    for place in order(2 * turn + 1) {
        let group = groups[place].as_ref();
        let mut received = vec![u8::MAX; 2 * group.size()];
        pending[place].take().expect("started above").wait(&mut received)?;
        let expected = (0..group.size()).flat_map(|rank| [group.world_rank(rank) as u8, group.size() as u8]);
        assert_eq!(received, expected.collect::<Vec<_>>(), "{group:?}");
    }
    Ok(())
}

/// Starts to send all ranks of a group this rank's number in the world and the group's size.
fn start(group: &dyn Communicator, world_rank: usize) -> Result<Box<dyn PendingExchange>, CommError> {
    let size = group.size();
    let plan = ExchangePlan {
        sends: (0..size).map(|peer| Block { peer, offset: 0, len: 2 }).collect(),
        recvs: (0..size).map(|peer| Block { peer, offset: 2 * peer, len: 2 }).collect(),
        recv_len: 2 * size,
        send_len: 2,
    };
    group.start_all_to_all_v(OP, Arc::new(Bytes::from_elems(vec![world_rank as u8, size as u8])), plan)
}
