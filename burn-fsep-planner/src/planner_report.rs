use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// What the planner did so far.
#[derive(Debug, Clone, Default)]
pub struct PlannerReport(Arc<Mutex<ReportData>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ReportData {
    pub adopted: u64,
    pub late: u64,
    pub solve_time: Duration,
}

impl PlannerReport {
    /// Layouts put into use, over all layers.
    pub fn adopted(&self) -> u64 {
        self.data().adopted
    }

    /// How often a layer kept its layout because some rank's planner had not finished.
    pub fn late(&self) -> u64 {
        self.data().late
    }

    /// How long the last step's layouts took, over all layers.
    pub fn solve_time(&self) -> Duration {
        self.data().solve_time
    }

    pub(crate) fn data(&self) -> ReportData {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, data: ReportData) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = data;
    }
}
