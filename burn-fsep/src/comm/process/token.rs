use std::{fmt, str::FromStr};

use thiserror::Error;

/// Longest token, in bytes.
const MAX_LEN: usize = 64;
/// Shortest token, in bytes.
const MIN_LEN: usize = 16;

/// The secret that the ranks of one job share: 16 to 64 bytes. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct JobToken(String);

/// A token that is too short or too long.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a job token has {MIN_LEN} to {MAX_LEN} bytes, this one has {len}; `openssl rand -hex 32` makes a good one")]
pub struct TokenError {
    /// Its length in bytes.
    pub len: usize,
}

impl JobToken {
    /// A new token from the operating system's random numbers.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn random() -> std::io::Result<Self> {
        let mut seed = [0u8; MAX_LEN / 2];
        getrandom::fill(&mut seed).map_err(std::io::Error::other)?;
        Ok(Self(seed.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The secret itself, to be handed to the processes of the job and nobody else.
    pub fn reveal(&self) -> String {
        self.0.clone()
    }
}

impl FromStr for JobToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        match text.len() {
            MIN_LEN..=MAX_LEN => Ok(Self(text.into())),
            len => Err(TokenError { len }),
        }
    }
}

impl fmt::Debug for JobToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobToken(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_matches() {
        let token = |text: &str| text.parse::<JobToken>().unwrap();
        assert_eq!(token("0123456789abcdef"), token("0123456789abcdef"));
        for other in ["0123456789abcdeg", "0123456789abcdef\0"] {
            assert_ne!(token("0123456789abcdef"), token(other));
        }
    }

    #[test]
    fn tokens_of_other_lengths_are_refused() {
        assert_eq!("short".parse::<JobToken>().unwrap_err(), TokenError { len: 5 });
        assert_eq!("x".repeat(65).parse::<JobToken>().unwrap_err(), TokenError { len: 65 });
    }

    #[test]
    fn random_tokens_differ_and_are_not_printed() {
        let [a, b] = [JobToken::random().unwrap(), JobToken::random().unwrap()];
        assert_ne!(a, b);
        assert_eq!(a.reveal().len(), 64);
        assert!(!format!("{a:?}").contains(&a.reveal()));
    }
}
