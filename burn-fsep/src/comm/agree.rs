use std::fmt;

use sha2::{Digest, Sha256};

use super::{CommError, Communicator, Operation, all_gather_u64};

/// A value that is another one on a rank than on rank 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The first rank that differs from rank 0.
    pub rank: usize,
    /// What differs: the first such field of that rank.
    pub field: String,
    /// The field's place among all.
    pub place: usize,
    /// Rank 0's value and that rank's.
    pub values: [u64; 2],
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ranks 0 and {} differ in `{}`", self.rank, self.field)
    }
}

/// Compares values that have to be equal on all ranks with those of rank 0: all ranks get the same answer, `None` if they are
/// equal. Larger things take part by their [`digest`]. Collective; `fields` are equally many on all ranks, with the same names.
///
/// # Errors
///
/// Any [`CommError`].
pub fn agree(
    comm: &dyn Communicator,
    operation: Operation,
    fields: &[(impl AsRef<str>, u64)],
) -> Result<Option<Difference>, CommError> {
    let ours: Vec<u64> = fields.iter().map(|(_, value)| *value).collect();
    let all = all_gather_u64(comm, operation, &ours)?;
    let place = all.iter().enumerate().position(|(place, value)| *value != all[place % ours.len()]);
    Ok(place.map(|at| {
        let (rank, place) = (at / ours.len(), at % ours.len());
        Difference { rank, field: fields[place].0.as_ref().into(), place, values: [all[place], all[at]] }
    }))
}

/// A number that stands for bytes where ranks compare them, the same on every machine and in every build.
pub fn digest(bytes: &[u8]) -> u64 {
    Sha256::digest(bytes).iter().take(8).fold(0, |digest, byte| digest << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::{LaunchConfig, launch};

    #[test]
    fn all_ranks_learn_which_rank_differs_in_what() {
        let ask = |values: fn(u64) -> [u64; 2]| {
            let answers = launch(&LaunchConfig::new(3), |comm| {
                let [seed, size] = values(comm.rank() as u64);
                agree(comm.as_ref(), Operation::new("test"), &[("seed", seed), ("size", size)])
            });
            let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
            assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
            answers.into_iter().next().unwrap()
        };
        assert_eq!(ask(|_| [7, 8]), None);
        let difference = ask(|rank| [rank / 2, rank]).unwrap();
        assert_eq!((difference.rank, difference.place, difference.values), (1, 1, [0, 1]));
        assert_eq!(difference.to_string(), "ranks 0 and 1 differ in `size`");
    }

    #[test]
    fn a_digest_is_the_same_everywhere() {
        // printf abc | sha256sum
        assert_eq!(digest(b"abc"), 0xba78_16bf_8f01_cfea);
    }

    #[test]
    fn nothing_is_agreed_on() {
        let fields: [(&str, u64); 0] = [];
        let answers = launch(&LaunchConfig::new(2), |comm| agree(comm.as_ref(), Operation::new("test"), &fields));
        assert!(answers.into_iter().all(|answer| answer == Ok(None)));
    }
}
