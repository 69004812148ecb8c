//! Spans of a timeline that begin and end in backward.

use std::sync::{Arc, Mutex, PoisonError};

use burn_fsep::{Timeline, TimelineSpan};

/// What an operation does to a span of a timeline in backward.
#[derive(Debug, Clone)]
pub enum BackwardMark {
    /// Begins it, before it computes.
    Begins(BackwardSpan),
    /// Ends it, when it has computed.
    Ends(BackwardSpan),
}

/// A span of backward, between two operations.
#[derive(Debug, Clone)]
pub struct BackwardSpan {
    name: &'static str,
    timeline: Option<Timeline>,
    open: Arc<Mutex<Option<TimelineSpan>>>,
}

impl BackwardSpan {
    /// A span of compute of this name.
    pub fn new(name: &'static str, timeline: Option<&Timeline>) -> Self {
        Self { name, timeline: timeline.cloned(), open: Arc::default() }
    }

    fn set(&self, span: Option<TimelineSpan>) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = span;
    }
}

impl BackwardMark {
    /// What an operation calls before it computes in backward.
    pub fn before(&self) {
        if let Self::Begins(span) = self {
            span.set(span.timeline.as_ref().and_then(|timeline| timeline.compute(span.name)));
        }
    }

    /// What it calls when it has.
    pub fn after(&self) {
        if let Self::Ends(span) = self {
            span.set(None);
        }
    }
}
