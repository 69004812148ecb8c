use thiserror::Error;

/// What can be wrong with the planner's input. Every message says what was expected.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum PlannerError {
    /// A size that must be positive is zero.
    #[error("{what} must be at least 1")]
    Zero {
        /// The size in question.
        what: &'static str,
    },
    /// Two inputs disagree on a size.
    #[error("{what}: expected {expected}, got {actual}")]
    Shape {
        /// The size in question.
        what: String,
        /// The size that the other inputs imply.
        expected: usize,
        /// The size found.
        actual: usize,
    },
    /// `N * C < E`: some expert would stand nowhere.
    #[error(
        "{ranks} ranks with {slots_per_rank} slots each hold {} experts at most, but there are {experts}: \
         raise slots per rank to at least {}",
        ranks * slots_per_rank,
        experts.div_ceil(*ranks)
    )]
    TooFewSlots {
        /// World size N.
        ranks: usize,
        /// Slots a rank C.
        slots_per_rank: usize,
        /// Experts E.
        experts: usize,
    },
    /// `C > E`: a rank cannot hold an expert twice, so some slots could never be filled.
    #[error("{slots_per_rank} slots a rank but only {experts} experts: lower slots per rank to at most {experts}")]
    TooManySlots {
        /// Slots a rank C.
        slots_per_rank: usize,
        /// Experts E.
        experts: usize,
    },
    /// `K > E`.
    #[error("top-k of {topk} is more than the {experts} experts there are")]
    TopK {
        /// Experts per token K.
        topk: usize,
        /// Experts E.
        experts: usize,
    },
    /// An expert index outside `0..E`.
    #[error("rank {rank} slot {slot} names expert {expert}, but experts are 0..{experts}")]
    UnknownExpert {
        /// The rank.
        rank: usize,
        /// The slot on that rank.
        slot: usize,
        /// The index found.
        expert: usize,
        /// Experts E.
        experts: usize,
    },
    /// An expert stands twice on one rank.
    #[error("rank {rank} holds expert {expert} in more than one slot; an expert may stand at most once on a rank")]
    DuplicateExpert {
        /// The rank.
        rank: usize,
        /// The expert.
        expert: usize,
    },
    /// An expert has no replica.
    #[error("expert {expert} has no replica in the layout; every expert needs at least one slot")]
    MissingExpert {
        /// The expert.
        expert: usize,
    },
    /// A load that is not a finite, non-negative number.
    #[error("{what} must be finite and not negative, got {value}")]
    NotFinite {
        /// The quantity.
        what: String,
        /// Its value.
        value: f64,
    },
    /// A count that does not fit the counters.
    #[error("{what} is {value}, more than the {limit} that fit")]
    Overflow {
        /// The quantity.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// A dispatch plan that breaks one of its promises.
    #[error("invalid dispatch plan: {0}")]
    InvalidPlan(String),
    /// Bytes that are no state of a planner.
    #[error("cannot read or write the planner's state: {0}")]
    State(String),
    /// The background planner's thread is gone.
    #[error("the background planner stopped: {0}")]
    Stopped(String),
}
