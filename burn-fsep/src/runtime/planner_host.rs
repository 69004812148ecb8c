//! The planner's view of the runtime.
