use std::time::Duration;

use crate::tools::replay::{ReplayStep, Spread};

/// What a strategy made of a trace: one line of a table.
#[derive(Debug, Clone)]
pub(super) struct Summary {
    pub strategy: &'static str,
    pub max_over_mean: Spread,
    /// In percent of assignments.
    pub cross_node: Spread,
    /// In percent of slots.
    pub moved: Spread,
    /// In percent of slots.
    pub repaired: Spread,
    /// In microseconds.
    pub layout: Spread,
    /// In microseconds.
    pub repair: Spread,
    /// In microseconds.
    pub dispatch: Spread,
}

impl Summary {
    /// Names of the columns.
    pub const COLUMNS: [&'static str; 11] = [
        "strategy",
        "mean",
        "p50",
        "p99",
        "max",
        "cross-node %",
        "moved slots %",
        "repaired %",
        "layout us",
        "repair us",
        "dispatch us",
    ];
    /// What the columns mean.
    pub const LEGEND: &'static str = "mean, p50, p99, max: largest load of a rank over the mean load, 1 is perfect; cross-node: share of assignments \
         computed on another node than their token's; moved and repaired: share of slots whose expert changed before and \
         in the step; times are medians";

    /// Sums up `steps`; `None` if there are none.
    pub fn of(strategy: &'static str, steps: &[&ReplayStep], slots: usize) -> Option<Self> {
        let spread = |value: &dyn Fn(&ReplayStep) -> f64| Spread::of(steps.iter().map(|step| value(step)));
        let percent = |part: usize| part as f64 / slots as f64 * 100.0;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        Some(Self {
            strategy,
            max_over_mean: spread(&|step| step.max_over_mean)?,
            cross_node: spread(&|step| step.cross_node_share * 100.0)?,
            moved: spread(&|step| percent(step.moved_slots))?,
            repaired: spread(&|step| percent(step.repaired_slots.iter().sum()))?,
            layout: spread(&|step| us(step.layout_time))?,
            repair: spread(&|step| us(step.repair_time))?,
            dispatch: spread(&|step| us(step.dispatch_time))?,
        })
    }

    /// The line's cells, in the order of the columns.
    pub fn cells(&self) -> [String; 11] {
        let Spread { mean, p50, p99, max, .. } = self.max_over_mean;
        [
            self.strategy.to_string(),
            format!("{mean:.4}"),
            format!("{p50:.4}"),
            format!("{p99:.4}"),
            format!("{max:.4}"),
            format!("{:.2}", self.cross_node.mean),
            format!("{:.2}", self.moved.mean),
            format!("{:.2}", self.repaired.mean),
            format!("{:.1}", self.layout.p50),
            format!("{:.1}", self.repair.p50),
            format!("{:.1}", self.dispatch.p50),
        ]
    }
}
