//! MPI: ranks that `mpirun` or `srun` started on a cluster of CPUs, over whatever network the library speaks.
//!
//! MPI carries the data. It cannot say which rank was lost, so a second communicator over the same ranks, the control group,
//! does: a [`ProcessCommunicator`](super::process::ProcessCommunicator) made from
//! [`RankEnvironment`](crate::launch::RankEnvironment).
//!
//! **Progress.** MPI moves data only within its calls, and a prefetched unshard has to travel while the rank computes. A thread
//! therefore calls MPI as long as any exchange is under way, and sleeps otherwise; a rank that waits polls by itself, so small
//! collectives do not wait for that thread. All calls take one lock: `MPI_THREAD_SERIALIZED` is enough, which more libraries
//! have, and have in faster form, than `MPI_THREAD_MULTIPLE`. Nothing ever blocks in MPI: every operation is a non-blocking one
//! that is tested until it is done, the group has failed, or its time is over.
//!
//! **Lost ranks.** When a process ends without notice or with an error, Open MPI's `mpirun` kills all others, mostly before
//! they can say anything, names the process itself and exits with its status. With `mpirun --enable-recovery` it leaves them
//! alone: each of them ends by itself, with an error that names the lost rank. But `mpirun` then exits with 0 whatever the ranks
//! return (seen with 4.1.4). Neither needs fault tolerance of MPI: a group is spent after its first failure.

mod bounded;
mod communicator;
mod config;
mod group;
mod library;
mod pending;
mod transfer;
mod universe;

pub use communicator::MpiCommunicator;
pub use config::MpiConfig;
pub use universe::MpiUniverse;
