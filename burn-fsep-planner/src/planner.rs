//! A layer's planner: predictor and layout solver together, and the strategies that users choose by name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{Dispatcher, EvenSplit, MinMax},
    placement::{LayoutRequest, LayoutSolver, PaperPlanner, RobustPlanner, StaticEp},
    predictor::{Adaptive, LastStep, MovingSum, Predictor},
};

/// A way to plan, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Static expert parallelism: layouts never change, tokens are split evenly.
    Static,
    /// The planner of LAER-MoE: moving sum, greedy placement, even split.
    Paper,
    /// Ours: predictor chosen by past error, robust placement, exact min-max dispatch.
    MinMax,
}

impl Strategy {
    /// All strategies.
    pub const ALL: [Strategy; 3] = [Strategy::Static, Strategy::Paper, Strategy::MinMax];

    /// The name that [`Strategy::from_str`] understands.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Static => "static",
            Strategy::Paper => "paper",
            Strategy::MinMax => "min-max",
        }
    }

    /// A new dispatcher of this strategy.
    pub fn dispatcher(self) -> Box<dyn Dispatcher> {
        match self {
            Strategy::Static | Strategy::Paper => Box::new(EvenSplit::new()),
            Strategy::MinMax => Box::new(MinMax::new()),
        }
    }

    /// A new layout solver of this strategy.
    pub fn solver(self, seed: u64) -> Box<dyn LayoutSolver> {
        match self {
            Strategy::Static => Box::new(StaticEp),
            Strategy::Paper => Box::new(PaperPlanner::default()),
            Strategy::MinMax => Box::new(RobustPlanner::new(seed)),
        }
    }

    /// A new predictor of this strategy.
    pub fn predictor(self) -> Box<dyn Predictor> {
        match self {
            Strategy::Static => Box::new(LastStep::new()),
            Strategy::Paper => Box::new(MovingSum::default()),
            Strategy::MinMax => Box::new(Adaptive::default()),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A strategy that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no planner `{0}`; choose one of static, paper, min-max")]
pub struct UnknownStrategy(String);

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(name: &str) -> Result<Self, UnknownStrategy> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| UnknownStrategy(name.to_string()))
    }
}

/// Plans the layouts of one layer from its routing counts.
///
/// The solver is told of the layout that this planner produced last, not of the one in use: which one is in use
/// depends on timing, and every rank has to plan the same.
#[derive(Debug)]
pub struct LayerPlanner {
    topology: Topology,
    slots_per_rank: usize,
    predictor: Box<dyn Predictor>,
    solver: Box<dyn LayoutSolver>,
    produced: Layout,
}

impl LayerPlanner {
    /// A planner for a layer that starts with `initial`.
    pub fn new(
        topology: Topology,
        initial: Layout,
        predictor: Box<dyn Predictor>,
        solver: Box<dyn LayoutSolver>,
    ) -> Self {
        Self { topology, slots_per_rank: initial.slots_per_rank(), predictor, solver, produced: initial }
    }

    /// Takes the counts of a step and gives the layout for the next.
    ///
    /// # Errors
    ///
    /// [`PlannerError`] if sizes disagree.
    pub fn plan(&mut self, counts: &RoutingCounts) -> Result<&Layout, PlannerError> {
        self.predictor.observe(counts)?;
        if let Some(predicted) = self.predictor.predict() {
            self.produced = self.solver.solve(&LayoutRequest {
                topology: &self.topology,
                slots_per_rank: self.slots_per_rank,
                predicted: &predicted,
                previous: Some(&self.produced),
            })?;
        }
        Ok(&self.produced)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        let error = "best".parse::<Strategy>().unwrap_err();
        assert!(error.to_string().contains("min-max"), "{error}");
    }

    #[test]
    fn every_strategy_balances_at_least_as_well_as_static() {
        let topology = Topology::single_node(4).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![70, 10, 10, 10]; 4]).unwrap();
        let imbalance = |strategy: Strategy| {
            let initial = Layout::static_ep(4, 2, 4).unwrap();
            let mut planner = LayerPlanner::new(topology.clone(), initial, strategy.predictor(), strategy.solver(0));
            let layout = planner.plan(&counts).unwrap();
            let mut plan = Default::default();
            strategy.dispatcher().dispatch(&topology, layout, &counts, &mut plan).unwrap();
            plan.max_over_mean()
        };
        let [fixed, paper, min_max] = Strategy::ALL.map(imbalance);
        assert!(min_max <= paper && paper < fixed, "{fixed} {paper} {min_max}");
    }
}
