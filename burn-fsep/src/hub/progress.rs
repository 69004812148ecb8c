use std::{fmt, sync::Arc};

/// How far a rank is with reading or writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// Bytes of values that are done: read, or written by this rank.
    pub done: u64,
    /// Bytes of values that there are for this rank.
    pub total: u64,
    /// What was done last: a parameter's path, or a tensor's name; empty at the beginning.
    pub last: &'a str,
}

/// Who is told.
#[derive(Clone, Default)]
pub(super) struct Listener(Option<Arc<Tell>>);

type Tell = dyn Fn(Progress<'_>) + Send + Sync;

impl Listener {
    pub fn new(listener: impl Fn(Progress<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(listener)))
    }

    pub fn tell(&self, done: u64, total: u64, last: &str) {
        if let Some(listener) = &self.0 {
            listener(Progress { done, total, last });
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Listener" } else { "nobody" })
    }
}
