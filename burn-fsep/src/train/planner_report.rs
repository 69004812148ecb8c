use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

/// What the planner did so far.
#[derive(Debug, Clone, Default)]
pub struct PlannerReport(Arc<Mutex<ReportData>>);

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ReportData {
    pub adopted: u64,
    pub late: u64,
    pub skipped: u64,
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

    /// Routing counts that no layout was planned from, since some rank's planner was more than a step behind: equal on all
    /// ranks.
    pub fn skipped(&self) -> u64 {
        self.data().skipped
    }

    /// How long the last step's layouts took, over all layers.
    pub fn solve_time(&self) -> Duration {
        self.data().solve_time
    }

    fn data(&self) -> ReportData {
        *self.0.lock()
    }

    pub(super) fn update(&self, update: impl FnOnce(&mut ReportData)) {
        update(&mut self.0.lock());
    }
}
