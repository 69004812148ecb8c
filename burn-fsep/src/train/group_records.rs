//! Records of groups in one checkpoint: each has a planner of its own.

use std::{borrow::Cow, collections::BTreeMap};

use crate::{
    FsepError, FsepRuntime,
    checkpoint::gather,
    comm::{CommError, Operation},
};

type Records = BTreeMap<String, Vec<u8>>;

const GATHER: Operation = Operation::new("records of groups");
/// What the names of the records of other groups than the first begin with; the group's number and a point follow.
const GROUP: &str = "group-";

/// Lets the first rank of each group add its records, and gives them all to rank 0: the first group's by their names, those of the
/// others by their names with the group's. Collective.
pub(crate) fn gather_records(
    runtime: &FsepRuntime,
    records: &mut Records,
    add: impl FnOnce(&mut Records) -> Result<(), FsepError>,
) -> Result<(), FsepError> {
    let replicas = runtime.groups().replicas();
    if runtime.groups().experts().rank() != 0 {
        return Ok(());
    }
    let group = replicas.rank();
    if group == 0 {
        add(records)?;
        // Also those of a checkpoint that had more groups.
        records.retain(|name, _| !name.starts_with(GROUP));
        if replicas.size() > 1 {
            for (group, bytes) in gather(replicas.as_ref(), GATHER, &[])?.iter().enumerate().skip(1) {
                let unreadable = |error: rmp_serde::decode::Error| CommError::Engine {
                    operation: GATHER.to_string(),
                    reason: error.to_string(),
                };
                let theirs: Records = rmp_serde::from_slice(bytes).map_err(unreadable)?;
                records.extend(theirs.into_iter().map(|(name, bytes)| (format!("{GROUP}{group}.{name}"), bytes)));
            }
        }
        return Ok(());
    }
    let mut ours = Records::new();
    add(&mut ours)?;
    let bytes = rmp_serde::to_vec(&ours).map_err(|error| FsepError::Config(format!("records: {error}")))?;
    gather(replicas.as_ref(), GATHER, &bytes)?;
    Ok(())
}

/// The records that a group goes on with: its own, and the first group's where it has none of that name. Of a checkpoint of another
/// number of groups the first one's, as with layouts.
pub(crate) fn records_of_group<'a>(runtime: &FsepRuntime, records: &'a Records) -> Cow<'a, Records> {
    let replicas = runtime.groups().replicas();
    let own = format!("{GROUP}{}.", replicas.rank());
    let group = |name: &String| name.strip_prefix(GROUP)?.split('.').next()?.parse::<usize>().ok();
    let groups = records.keys().filter_map(group).max().map_or(1, |last| last + 1);
    if groups != replicas.size() || replicas.rank() == 0 {
        return Cow::Borrowed(records);
    }
    let mut mine = records.clone();
    let own = records.iter().filter_map(|(name, bytes)| Some((name.strip_prefix(&own)?, bytes)));
    mine.extend(own.map(|(name, bytes)| (name.to_string(), bytes.clone())));
    Cow::Owned(mine)
}
