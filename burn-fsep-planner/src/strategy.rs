use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    dispatch::{Dispatcher, EvenOverAll, EvenSplit, MinMax},
    placement::{Eplb, FlexMoe, LayoutSolver, PaperSolver, RandomPlacement, RobustSolver, StaticEp},
    predictor::{Adaptive, LastStep, MovingSum, Predictor},
};

/// A way to plan, by name: a predictor, a layout solver and a dispatcher that belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlannerStrategy {
    /// Static expert parallelism: the planner never changes a layout, tokens are split evenly. A runtime that repairs layouts in
    /// the step (`FsepRuntimeConfig::repair`) still does.
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
    /// Ours: predictor chosen by past error, robust placement, [min-max dispatch](MinMax).
    MinMax,
}

impl PlannerStrategy {
    /// All strategies.
    pub const ALL: [Self; 7] =
        [Self::Static, Self::Paper, Self::Eplb, Self::EplbHierarchical, Self::FlexMoe, Self::Random, Self::MinMax];

    /// The name that [`PlannerStrategy::from_str`] understands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Paper => "paper",
            Self::Eplb => "eplb",
            Self::EplbHierarchical => "eplb-hierarchical",
            Self::FlexMoe => "flex-moe",
            Self::Random => "random",
            Self::MinMax => "min-max",
        }
    }

    /// A new dispatcher of this strategy.
    pub fn dispatcher(self) -> Box<dyn Dispatcher> {
        match self {
            Self::MinMax => Box::new(MinMax::new()),
            // Baselines dispatch as their systems do: replicas get equal shares, here wherever they stand ..
            Self::Eplb | Self::Random => Box::new(EvenOverAll),
            // .. and here those on the source's node alone, if there are any.
            Self::Static | Self::Paper | Self::EplbHierarchical | Self::FlexMoe => Box::new(EvenSplit::new()),
        }
    }

    /// A new layout solver of this strategy.
    pub fn solver(self, seed: u64) -> Box<dyn LayoutSolver> {
        match self {
            Self::Static => Box::new(StaticEp),
            Self::Paper => Box::new(PaperSolver::default()),
            Self::Eplb => Box::new(Eplb::global()),
            Self::EplbHierarchical => Box::new(Eplb::hierarchical()),
            Self::FlexMoe => Box::new(FlexMoe::default()),
            Self::Random => Box::new(RandomPlacement::new(seed)),
            Self::MinMax => Box::new(RobustSolver::new(seed)),
        }
    }

    /// A new predictor of this strategy.
    pub fn predictor(self) -> Box<dyn Predictor> {
        match self {
            Self::Static | Self::FlexMoe => Box::new(LastStep::new()),
            Self::Paper | Self::Eplb | Self::EplbHierarchical | Self::Random => Box::new(MovingSum::default()),
            Self::MinMax => Box::new(Adaptive::default()),
        }
    }
}

impl fmt::Display for PlannerStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A strategy that does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "there is no planner `{0}`; choose one of {known}",
    known = PlannerStrategy::ALL.map(PlannerStrategy::name).join(", ")
)]
pub struct UnknownStrategy(String);

impl FromStr for PlannerStrategy {
    type Err = UnknownStrategy;

    fn from_str(name: &str) -> Result<Self, UnknownStrategy> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| UnknownStrategy(name.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LayerPlanner, Layout, RoutingCounts, Topology};

    #[test]
    fn names_round_trip() {
        for strategy in PlannerStrategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        let error = "best".parse::<PlannerStrategy>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no planner `best`; choose one of static, paper, eplb, eplb-hierarchical, flex-moe, random, min-max"
        );
    }

    #[test]
    fn every_strategy_balances_at_least_as_well_as_static() {
        let topology = Topology::single_node(4).unwrap();
        let counts = RoutingCounts::from_rows(&vec![vec![70, 10, 10, 10]; 4]).unwrap();
        let imbalance = |strategy: PlannerStrategy| {
            let initial = Layout::static_ep(4, 2, 4).unwrap();
            let mut planner = LayerPlanner::new(topology.clone(), initial, strategy.predictor(), strategy.solver(0));
            let layout = planner.plan(&counts).unwrap();
            let mut plan = Default::default();
            strategy.dispatcher().dispatch(&topology, layout, &counts, &mut plan).unwrap();
            plan.max_over_mean()
        };
        let (fixed, min_max) = (imbalance(PlannerStrategy::Static), imbalance(PlannerStrategy::MinMax));
        for strategy in PlannerStrategy::ALL {
            let planned = imbalance(strategy);
            assert!(min_max <= planned && planned <= fixed, "{strategy}: {planned}, static {fixed}, ours {min_max}");
        }
        assert!(imbalance(PlannerStrategy::Paper) < fixed);
    }
}
