//! What a launcher tells a rank in environment variables.

use std::str::FromStr;

use burn_fsep_planner::Topology;
use thiserror::Error;

use crate::comm::{
    CommError, Communicator, Operation, all_gather_u64,
    process::{JobToken, ProcessConfig, TokenError},
};

/// Variable of the job's secret.
pub const TOKEN_VARIABLE: &str = "BURN_FSEP_TOKEN";

/// Names of the variables of one kind of launcher.
struct Names {
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
    local_world_size: &'static str,
}

const TORCHRUN: Names =
    Names { rank: "RANK", world_size: "WORLD_SIZE", local_rank: "LOCAL_RANK", local_world_size: "LOCAL_WORLD_SIZE" };
const OPEN_MPI: Names = Names {
    rank: "OMPI_COMM_WORLD_RANK",
    world_size: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local_world_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
};
const SLURM: Names = Names {
    rank: "SLURM_PROCID",
    world_size: "SLURM_NTASKS",
    local_rank: "SLURM_LOCALID",
    local_world_size: "SLURM_NTASKS_PER_NODE",
};

/// A rank's place in its job, as its launcher tells; [`RankConfig`](super::RankConfig) makes a rank of it.
///
/// Read from torchrun's variables (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`), which `fsep-launch` sets, too; else
/// from those of Open MPI (`OMPI_COMM_WORLD_RANK` ..), else from those of Slurm (`SLURM_PROCID`, `SLURM_NTASKS`,
/// `SLURM_LOCALID`, `SLURM_NTASKS_PER_NODE`). With all of them, `MASTER_ADDR` and `MASTER_PORT` say where rank 0 listens, and
/// `BURN_FSEP_TOKEN` is the job's secret. Where torchrun itself listens on `MASTER_PORT` (`TORCHELASTIC_USE_AGENT_STORE` is
/// `True`), rank 0 takes the next port.
///
/// ```no_run
/// use burn_fsep::{FsepError, FsepRuntime, launch::RankEnvironment};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let environment = RankEnvironment::from_env()?;
/// environment.process_config()?.run(|comm| -> Result<(), FsepError> {
///     let runtime = FsepRuntime::new(comm)?;
///     // .. build the model and train it
///     Ok(())
/// })?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct RankEnvironment {
    /// This rank, `0..world_size`.
    pub rank: usize,
    /// World size `N`.
    pub world_size: usize,
    /// This rank's number on its machine: the index of its GPU.
    pub local_rank: usize,
    /// Ranks on this machine, if the launcher says.
    pub local_world_size: Option<usize>,
    /// Host and port at which rank 0 listens.
    pub master: (String, u16),
    /// The job's secret, if one is set.
    pub token: Option<JobToken>,
}

/// Environment variables that do not make a rank.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// No launcher started this process.
    #[error(
        "this process is no rank: none of RANK, OMPI_COMM_WORLD_RANK and SLURM_PROCID is set; start it through \
         fsep-launch, torchrun, mpirun or srun"
    )]
    NotLaunched,
    /// A variable is missing although `because` is set.
    #[error("{variable} is not set, although {because} is: both are needed")]
    Missing {
        /// The variable.
        variable: &'static str,
        /// The one that makes it necessary.
        because: &'static str,
    },
    /// A variable's value cannot be read.
    #[error("{variable} is `{value}`, which is not {expected}")]
    Malformed {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Two variables contradict each other.
    #[error("{variable}={value} contradicts {other}={other_value}: {rule}")]
    Contradiction {
        /// A variable.
        variable: &'static str,
        /// Its value.
        value: usize,
        /// The other variable.
        other: &'static str,
        /// That one's value.
        other_value: usize,
        /// What has to hold.
        rule: &'static str,
    },
    /// The job has no secret.
    #[error(
        "{TOKEN_VARIABLE} is not set: set it to one secret on all ranks, for example that of `openssl rand -hex 32` \
         (fsep-launch makes one by itself)"
    )]
    NoToken,
    /// The job's secret is too short or too long.
    #[error("{TOKEN_VARIABLE}: {0}")]
    Token(#[from] TokenError),
}

impl RankEnvironment {
    /// Reads this process's environment.
    ///
    /// # Errors
    ///
    /// Any [`EnvironmentError`]; values that are no Unicode count as not set.
    pub fn from_env() -> Result<Self, EnvironmentError> {
        Self::from_lookup(|variable| std::env::var(variable).ok())
    }

    /// Reads what `lookup` gives for the variables.
    ///
    /// # Errors
    ///
    /// Any [`EnvironmentError`] but [`EnvironmentError::NoToken`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, EnvironmentError> {
        let is_set = |variable: &str| lookup(variable).is_some();
        let launchers = [&TORCHRUN, &OPEN_MPI, &SLURM];
        let names = launchers.into_iter().find(|names| is_set(names.rank)).ok_or(EnvironmentError::NotLaunched)?;
        let number = |variable: &'static str| parse::<usize>(&lookup, variable, "a number");
        let needed = |variable: &'static str| {
            number(variable)?.ok_or(EnvironmentError::Missing { variable, because: names.rank })
        };
        let (rank, world_size, local_rank) =
            (needed(names.rank)?, needed(names.world_size)?, needed(names.local_rank)?);
        let local_world_size = number(names.local_world_size)?;
        let less = "a rank is less than the number of ranks";
        check(names.rank, rank, names.world_size, world_size, rank < world_size, less)?;
        check(names.local_rank, local_rank, names.rank, rank, local_rank <= rank || names.is_slurm(), ORDER)?;
        if let Some(local) = local_world_size {
            check(names.local_rank, local_rank, names.local_world_size, local, local_rank < local, less)?;
            let fits = local <= world_size || names.is_slurm();
            check(names.local_world_size, local, names.world_size, world_size, fits, "it is a part of the whole")?;
        }
        // Left over from another job, RANK would make every process the same rank. torchrun itself may be started by mpirun.
        if names.rank == TORCHRUN.rank && !is_set("TORCHELASTIC_RUN_ID") {
            for (ours, theirs, value) in
                [(TORCHRUN.rank, OPEN_MPI.rank, rank), (TORCHRUN.world_size, OPEN_MPI.world_size, world_size)]
            {
                if let Some(other) = number(theirs)? {
                    check(ours, value, theirs, other, value == other, "unset the one that is left over")?;
                }
            }
        }
        let master = lookup("MASTER_ADDR")
            .filter(|host| !host.trim().is_empty())
            .ok_or(EnvironmentError::Missing { variable: "MASTER_ADDR", because: names.rank })?;
        let port = parse::<u16>(&lookup, "MASTER_PORT", "a port")?
            .ok_or(EnvironmentError::Missing { variable: "MASTER_PORT", because: names.rank })?;
        let is_taken = names.rank == TORCHRUN.rank && lookup(AGENT_STORE).is_some_and(|value| value == "True");
        let malformed =
            |expected| EnvironmentError::Malformed { variable: "MASTER_PORT", value: port.to_string(), expected };
        let port = match (port, is_taken) {
            (0, _) => return Err(malformed("a port")),
            (port, false) => port,
            (port, true) => port.checked_add(1).ok_or_else(|| malformed("a port with one after it"))?,
        };
        let token = lookup(TOKEN_VARIABLE).map(|token| token.parse()).transpose()?;
        Ok(Self { rank, world_size, local_rank, local_world_size, master: (master, port), token })
    }

    /// The configuration of this rank's communicator.
    ///
    /// # Errors
    ///
    /// [`EnvironmentError::NoToken`].
    pub fn process_config(&self) -> Result<ProcessConfig, EnvironmentError> {
        let token = self.token.clone().ok_or(EnvironmentError::NoToken)?;
        Ok(ProcessConfig::new(self.rank, self.world_size, self.master.clone(), token))
    }

    /// Which ranks share a machine, by the numbers that launchers give ranks on theirs; for
    /// [`FsepRuntimeConfig::with_topology`](crate::FsepRuntimeConfig::with_topology). `None` if the ranks of a machine do not
    /// follow each other. Collective.
    ///
    /// # Errors
    ///
    /// Any [`CommError`].
    pub fn topology(&self, comm: &dyn Communicator) -> Result<Option<Topology>, CommError> {
        let local_ranks = all_gather_u64(comm, Operation::new("places of ranks"), &[self.local_rank as u64])?;
        Ok(nodes_of(&local_ranks).and_then(|nodes| Topology::new(&nodes).ok()))
    }
}

/// Ranks of each machine, given each rank's number on its own. `[N] -> [nodes]`
fn nodes_of(local_ranks: &[u64]) -> Option<Vec<usize>> {
    let mut nodes = Vec::new();
    for &local_rank in local_ranks {
        match nodes.last_mut() {
            Some(ranks) if *ranks as u64 == local_rank => *ranks += 1,
            _ if local_rank == 0 => nodes.push(1),
            _ => return None,
        }
    }
    Some(nodes)
}

/// Says that the agent of torchrun listens on `MASTER_PORT`, for PyTorch's store.
const AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";

const ORDER: &str = "ranks of a machine are numbered within all ranks";

impl Names {
    /// Slurm numbers ranks within nodes in any order, and gives the tasks per node as they were asked for.
    fn is_slurm(&self) -> bool {
        self.rank == SLURM.rank
    }
}

fn parse<T: FromStr>(
    lookup: impl Fn(&str) -> Option<String>,
    variable: &'static str,
    expected: &'static str,
) -> Result<Option<T>, EnvironmentError> {
    let Some(value) = lookup(variable) else { return Ok(None) };
    let malformed = |_| EnvironmentError::Malformed { variable, value: value.clone(), expected };
    value.trim().parse().map(Some).map_err(malformed)
}

fn check(
    variable: &'static str,
    value: usize,
    other: &'static str,
    other_value: usize,
    holds: bool,
    rule: &'static str,
) -> Result<(), EnvironmentError> {
    if holds { Ok(()) } else { Err(EnvironmentError::Contradiction { variable, value, other, other_value, rule }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef";
    const MASTER: [(&str, &str); 3] = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), (TOKEN_VARIABLE, TOKEN)];
    const TORCHRUN: [(&str, &str); 4] =
        [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")];

    /// Later variables replace earlier ones; `-` unsets.
    fn read(parts: &[&[(&str, &str)]]) -> Result<RankEnvironment, EnvironmentError> {
        RankEnvironment::from_lookup(|name| {
            let value = parts.iter().copied().flatten().rev().find(|(other, _)| *other == name)?.1;
            (value != "-").then(|| value.to_string())
        })
    }

    #[test]
    fn every_launcher_is_understood() {
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ];
        let slurm =
            [("SLURM_PROCID", "5"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1"), ("SLURM_NTASKS_PER_NODE", "4")];
        for launcher in [&TORCHRUN, &mpi, &slurm] {
            let environment = read(&[launcher, &MASTER]).unwrap();
            let RankEnvironment { rank, world_size, local_rank, local_world_size, .. } = environment;
            assert_eq!((rank, world_size, local_rank, local_world_size), (5, 8, 1, Some(4)));
            let config = environment.process_config().unwrap();
            assert_eq!((config.rank, config.world_size, config.master), (5, 8, ("10.0.0.1".into(), 29500)));
            assert_eq!(config.token.reveal(), TOKEN);
        }
    }

    #[test]
    fn machines_show_in_the_numbers_of_their_ranks() {
        for (local_ranks, nodes) in [
            (&[0, 1, 2, 3][..], Some(vec![4])),
            (&[0, 1, 2, 0, 1], Some(vec![3, 2])),
            (&[0, 0, 0], Some(vec![1, 1, 1])),
            // Slurm's cyclic distribution; and numbers that cannot be.
            (&[0, 0, 1, 1], None),
            (&[1, 0], None),
            (&[0, 2], None),
        ] {
            assert_eq!(nodes_of(local_ranks), nodes, "{local_ranks:?}");
        }
    }

    #[test]
    fn ranks_learn_who_shares_a_machine_with_them() {
        use crate::comm::local::{LaunchConfig, launch};
        let topologies = launch(&LaunchConfig::new(4), |comm| {
            let mut environment = read(&[&TORCHRUN, &MASTER]).unwrap();
            environment.local_rank = comm.rank() % 2;
            environment.topology(&*comm)
        });
        for topology in topologies {
            assert_eq!(topology.unwrap(), Some(Topology::new(&[2, 2]).unwrap()));
        }
    }

    #[test]
    fn torchrun_within_another_launcher_counts() {
        // A batch script is itself a task of Slurm.
        let slurm = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "0")];
        assert_eq!(read(&[&slurm, &TORCHRUN, &MASTER]).unwrap().rank, 5);
        let mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")];
        assert_eq!(read(&[&mpi, &TORCHRUN, &MASTER]).unwrap().rank, 5);
    }

    #[test]
    fn the_port_of_torchruns_agent_is_left_alone() {
        for (value, port) in [("True", 29501), ("False", 29500), ("-", 29500)] {
            let environment = read(&[&TORCHRUN, &MASTER, &[(AGENT_STORE, value)]]).unwrap();
            assert_eq!(environment.master.1, port, "{value}");
        }
        let error = read(&[&TORCHRUN, &MASTER, &[(AGENT_STORE, "True"), ("MASTER_PORT", "65535")]]).unwrap_err();
        assert!(error.to_string().contains("MASTER_PORT is `65535`"), "{error}");
    }

    #[test]
    fn what_cannot_be_names_the_variable() {
        for (change, variable) in [
            (("WORLD_SIZE", "-"), "WORLD_SIZE is not set"),
            (("LOCAL_RANK", "-"), "LOCAL_RANK is not set"),
            (("MASTER_ADDR", "-"), "MASTER_ADDR is not set"),
            (("MASTER_ADDR", " "), "MASTER_ADDR is not set"),
            (("MASTER_PORT", "-"), "MASTER_PORT is not set"),
            (("RANK", "-1"), "RANK is `-1`"),
            (("RANK", ""), "RANK is ``"),
            (("WORLD_SIZE", "many"), "WORLD_SIZE is `many`"),
            (("LOCAL_WORLD_SIZE", "4(x2)"), "LOCAL_WORLD_SIZE is `4(x2)`"),
            (("MASTER_PORT", "70000"), "MASTER_PORT is `70000`"),
            (("MASTER_PORT", "0"), "MASTER_PORT is `0`"),
            (("RANK", "8"), "RANK=8 contradicts WORLD_SIZE=8"),
            (("WORLD_SIZE", "0"), "RANK=5 contradicts WORLD_SIZE=0"),
            (("LOCAL_RANK", "4"), "LOCAL_RANK=4 contradicts LOCAL_WORLD_SIZE=4"),
            (("LOCAL_RANK", "6"), "LOCAL_RANK=6 contradicts RANK=5"),
            (("LOCAL_WORLD_SIZE", "9"), "LOCAL_WORLD_SIZE=9 contradicts WORLD_SIZE=8"),
            (("OMPI_COMM_WORLD_RANK", "4"), "RANK=5 contradicts OMPI_COMM_WORLD_RANK=4"),
            (("OMPI_COMM_WORLD_SIZE", "4"), "WORLD_SIZE=8 contradicts OMPI_COMM_WORLD_SIZE=4"),
            ((TOKEN_VARIABLE, "short"), "BURN_FSEP_TOKEN"),
        ] {
            let error = read(&[&TORCHRUN, &MASTER, &[change]]).expect_err(variable).to_string();
            assert!(error.contains(variable), "{change:?}: {error}");
        }
    }

    #[test]
    fn no_launcher_and_no_token_are_told_apart() {
        assert_eq!(read(&[&MASTER]).unwrap_err(), EnvironmentError::NotLaunched);
        let environment = read(&[&TORCHRUN, &MASTER, &[(TOKEN_VARIABLE, "-")]]).unwrap();
        assert_eq!(environment.process_config().unwrap_err(), EnvironmentError::NoToken);
    }
}
