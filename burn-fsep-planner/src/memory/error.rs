use thiserror::Error;

/// Why memory cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A size that makes no sense.
    #[error("`{field}` is {value}, expected {expected}")]
    Setting {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be right.
        expected: String,
    },
    /// More bytes than 64 bits count.
    #[error("{what}: more bytes than 64 bits can count")]
    Overflow {
        /// The part in question.
        what: &'static str,
    },
}

impl MemoryError {
    /// The field at fault, if it is one.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Setting { field, .. } => Some(field),
            Self::Overflow { .. } => None,
        }
    }
}
