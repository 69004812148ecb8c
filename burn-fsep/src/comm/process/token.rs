use std::{fmt, str::FromStr};

use subtle::ConstantTimeEq;
use thiserror::Error;

/// Longest token, in bytes.
pub(super) const MAX_LEN: usize = 64;
/// Shortest token, in bytes.
const MIN_LEN: usize = 16;

/// The secret that the ranks of one job share: 16 to 64 bytes. It is never printed.
#[derive(Clone)]
pub struct JobToken {
    bytes: [u8; MAX_LEN],
    len: u8,
}

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
        let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        hex.parse().map_err(std::io::Error::other)
    }

    /// The secret itself, to be handed to the processes of the job and nobody else.
    pub fn reveal(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.len()]).into_owned()
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// As it travels: padded to one length.
    pub(super) fn padded(&self) -> &[u8; MAX_LEN] {
        &self.bytes
    }

    /// Whether these are the bytes of this token; takes the same time wherever they differ.
    pub(super) fn matches(&self, padded: &[u8; MAX_LEN], len: u8) -> bool {
        (self.bytes.ct_eq(padded) & self.len.ct_eq(&len)).into()
    }
}

impl FromStr for JobToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        if !(MIN_LEN..=MAX_LEN).contains(&text.len()) {
            return Err(TokenError { len: text.len() });
        }
        let mut bytes = [0; MAX_LEN];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, len: text.len() as u8 })
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
        let token: JobToken = "0123456789abcdef".parse().unwrap();
        assert!(token.matches(token.padded(), 16));
        let other: JobToken = "0123456789abcdeg".parse().unwrap();
        let longer: JobToken = "0123456789abcdef\0".parse().unwrap();
        assert!(!token.matches(other.padded(), 16));
        assert!(!token.matches(longer.padded(), 17));
    }

    #[test]
    fn tokens_of_other_lengths_are_refused() {
        assert_eq!("short".parse::<JobToken>().unwrap_err(), TokenError { len: 5 });
        assert_eq!("x".repeat(65).parse::<JobToken>().unwrap_err(), TokenError { len: 65 });
    }

    #[test]
    fn random_tokens_differ_and_are_not_printed() {
        let [a, b] = [JobToken::random().unwrap(), JobToken::random().unwrap()];
        assert!(!a.matches(b.padded(), b.len));
        assert_eq!(a.reveal().len(), 64);
        assert!(!format!("{a:?}").contains(&a.reveal()));
    }
}
