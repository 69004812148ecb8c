//! A layer's planner: predictor and layout solver together, and the strategies that users choose by name.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{Dispatcher, EvenSplit, MinMax},
    placement::{
        Eplb, EvenOverAll, FlexMoe, LayoutRequest, LayoutSolver, PaperPlanner, RandomPlacement, RobustPlanner, StaticEp,
    },
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
    /// DeepSeek's EPLB, global policy: moving sum, replication and balanced packing over all ranks, even split
    /// over all replicas.
    Eplb,
    /// DeepSeek's EPLB, hierarchical policy: experts are packed to nodes first.
    EplbHierarchical,
    /// FlexMoE: last step, a few expand and shrink changes of the layout in use, even split.
    FlexMoe,
    /// Moving sum, replicas in proportion to load at random places, even split over all replicas.
    Random,
    /// Ours: predictor chosen by past error, robust placement, exact min-max dispatch.
    MinMax,
}

impl Strategy {
    /// All strategies.
    pub const ALL: [Strategy; 7] = [
        Strategy::Static,
        Strategy::Paper,
        Strategy::Eplb,
        Strategy::EplbHierarchical,
        Strategy::FlexMoe,
        Strategy::Random,
        Strategy::MinMax,
    ];

    /// The name that [`Strategy::from_str`] understands.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Static => "static",
            Strategy::Paper => "paper",
            Strategy::Eplb => "eplb",
            Strategy::EplbHierarchical => "eplb-hierarchical",
            Strategy::FlexMoe => "flex-moe",
            Strategy::Random => "random",
            Strategy::MinMax => "min-max",
        }
    }

    /// A new dispatcher of this strategy.
    pub fn dispatcher(self) -> Box<dyn Dispatcher> {
        match self {
            Strategy::MinMax => Box::new(MinMax::new()),
            // Baselines dispatch as their systems do: replicas get equal shares, here wherever they stand ..
            Strategy::Eplb | Strategy::Random => Box::new(EvenOverAll),
            // .. and here those on the source's node alone, if there are any.
            Strategy::Static | Strategy::Paper | Strategy::EplbHierarchical | Strategy::FlexMoe => {
                Box::new(EvenSplit::new())
            }
        }
    }

    /// A new layout solver of this strategy.
    pub fn solver(self, seed: u64) -> Box<dyn LayoutSolver> {
        match self {
            Strategy::Static => Box::new(StaticEp),
            Strategy::Paper => Box::new(PaperPlanner::default()),
            Strategy::Eplb => Box::new(Eplb::global()),
            Strategy::EplbHierarchical => Box::new(Eplb::hierarchical()),
            Strategy::FlexMoe => Box::new(FlexMoe::default()),
            Strategy::Random => Box::new(RandomPlacement::new(seed)),
            Strategy::MinMax => Box::new(RobustPlanner::new(seed)),
        }
    }

    /// A new predictor of this strategy.
    pub fn predictor(self) -> Box<dyn Predictor> {
        match self {
            Strategy::Static | Strategy::FlexMoe => Box::new(LastStep::new()),
            Strategy::Paper | Strategy::Eplb | Strategy::EplbHierarchical | Strategy::Random => {
                Box::new(MovingSum::default())
            }
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
#[error("there is no planner `{0}`; choose one of {known}", known = Strategy::ALL.map(Strategy::name).join(", "))]
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
        assert_eq!(
            error.to_string(),
            "there is no planner `best`; choose one of static, paper, eplb, eplb-hierarchical, flex-moe, random, min-max"
        );
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
        let (fixed, min_max) = (imbalance(Strategy::Static), imbalance(Strategy::MinMax));
        for strategy in Strategy::ALL {
            let planned = imbalance(strategy);
            assert!(min_max <= planned && planned <= fixed, "{strategy}: {planned}, static {fixed}, ours {min_max}");
        }
        assert!(imbalance(Strategy::Paper) < fixed);
    }
}
