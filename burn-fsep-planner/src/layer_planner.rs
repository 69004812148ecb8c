use crate::{
    Layout, PlannerError, RoutingCounts, Topology,
    placement::{LayoutRequest, LayoutSolver},
    predictor::Predictor,
    state,
};

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

    /// What this planner has learned, for [`load`](Self::load).
    ///
    /// # Errors
    ///
    /// [`PlannerError::State`] if it cannot be written.
    pub fn save(&self) -> Result<Vec<u8>, PlannerError> {
        let mut state = Vec::new();
        state::put(&mut state, &self.kind())?;
        state::put(&mut state, self.produced.as_slice())?;
        self.predictor.save(&mut state)?;
        self.solver.save(&mut state)?;
        Ok(state)
    }

    /// Takes what a planner has learned, and from then on plans as that one. Returns whether it did: the state of another
    /// strategy, world size, number of slots or experts, or of another version, is of no use.
    ///
    /// # Errors
    ///
    /// [`PlannerError::State`] if `state` is none of a planner; then this one is not to be used any more.
    pub fn load(&mut self, mut state: &[u8]) -> Result<bool, PlannerError> {
        let state = &mut state;
        if state::take::<(u32, String, String, [usize; 3])>(state)? != self.kind() {
            return Ok(false);
        }
        let (ranks, experts) = (self.produced.num_ranks(), self.produced.num_experts());
        self.produced = Layout::new(ranks, self.slots_per_rank, experts, state::take(state)?)
            .map_err(|error| PlannerError::State(error.to_string()))?;
        self.predictor.load(state)?;
        self.solver.load(state)?;
        let fits = |counts: RoutingCounts| (counts.num_ranks(), counts.num_experts()) == (ranks, experts);
        if !state.is_empty() || !self.predictor.predict().is_none_or(fits) {
            return Err(PlannerError::State(format!("it is not that of {ranks} ranks and {experts} experts")));
        }
        Ok(true)
    }

    /// What a state has to be of: version, predictor, solver, `N`, `C`, `E`.
    fn kind(&self) -> (u32, String, String, [usize; 3]) {
        let sizes = [self.produced.num_ranks(), self.slots_per_rank, self.produced.num_experts()];
        (STATE_VERSION, self.predictor.name().to_string(), self.solver.name().to_string(), sizes)
    }
}

/// Changes with what predictors and solvers save.
const STATE_VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PlannerStrategy;

    /// Counts of a step: loads that drift, and jump.
    fn drifting(step: u32, sources: usize) -> RoutingCounts {
        let row = |source: u32| (0..6).map(move |e| 5 + (e * e * 7 + step * (e + 3) + step / 9 * e * 31 + source) % 83);
        RoutingCounts::from_rows(&(0..sources as u32).map(|s| row(s).collect()).collect::<Vec<_>>()).unwrap()
    }

    fn planner_of(strategy: PlannerStrategy, ranks: usize) -> LayerPlanner {
        let initial = Layout::static_ep(ranks, 3, 6).unwrap();
        let topology = Topology::single_node(ranks).unwrap();
        LayerPlanner::new(topology, initial, strategy.predictor(), strategy.solver(5))
    }

    #[test]
    fn a_planner_with_the_state_of_another_plans_as_that_one() {
        let mut forgetful = Vec::new();
        for strategy in PlannerStrategy::ALL {
            let (mut planner, mut other) = (planner_of(strategy, 4), planner_of(strategy, 4));
            for step in 0..25 {
                planner.plan(&drifting(step, 4)).unwrap();
            }
            assert!(other.load(&planner.save().unwrap()).unwrap(), "{strategy}");
            let mut anew = planner_of(strategy, 4);
            for step in 25..60 {
                let counts = drifting(step, 4);
                let expected = planner.plan(&counts).unwrap();
                assert_eq!(other.plan(&counts).unwrap(), expected, "{strategy}, step {step}");
                if anew.plan(&counts).unwrap() != expected {
                    forgetful.push(strategy);
                }
            }
            assert_eq!(other.save(), planner.save(), "{strategy}");
        }
        for strategy in
            [PlannerStrategy::Paper, PlannerStrategy::Random, PlannerStrategy::FlexMoe, PlannerStrategy::MinMax]
        {
            assert!(forgetful.contains(&strategy), "the comparison sees nothing: {strategy}");
        }
    }

    #[test]
    fn a_state_of_other_sizes_is_not_taken_and_a_broken_one_is_an_error() {
        let mut planner = planner_of(PlannerStrategy::MinMax, 4);
        planner.plan(&drifting(0, 4)).unwrap();
        let state = planner.save().unwrap();
        for mut other in [planner_of(PlannerStrategy::MinMax, 3), planner_of(PlannerStrategy::Paper, 4)] {
            let (fresh, before) = (other.save().unwrap(), other.load(&state).unwrap());
            assert_eq!((before, other.save().unwrap()), (false, fresh));
        }
        for cut in 0..state.len() {
            assert!(
                matches!(planner_of(PlannerStrategy::MinMax, 4).load(&state[..cut]), Err(PlannerError::State(_))),
                "{cut}"
            );
        }
        let longer = [&state[..], &[0]].concat();
        assert!(matches!(planner_of(PlannerStrategy::MinMax, 4).load(&longer), Err(PlannerError::State(_))));
    }

    /// Any byte of a state may be another: it is an error, or a state that can be planned with.
    #[test]
    fn a_corrupted_state_never_panics() {
        for strategy in [PlannerStrategy::Paper, PlannerStrategy::MinMax] {
            let mut planner = planner_of(strategy, 4);
            for step in 0..3 {
                planner.plan(&drifting(step, 4)).unwrap();
            }
            let state = planner.save().unwrap();
            let (mut rejected, mut taken) = (0, 0);
            for at in 0..state.len() {
                for byte in [0x00, 0x01, 0x7f, 0x90, 0xc0, 0xcb, 0xff, state[at] ^ 1, state[at].wrapping_add(1)] {
                    let mut corrupted = state.clone();
                    corrupted[at] = byte;
                    let mut other = planner_of(strategy, 4);
                    match other.load(&corrupted) {
                        Ok(_) => {
                            (3..5).for_each(|step| _ = other.plan(&drifting(step, 4)).unwrap());
                            taken += 1;
                        }
                        Err(PlannerError::State(_)) => rejected += 1,
                        Err(error) => panic!("{strategy}, byte {at} as {byte:#x}: {error}"),
                    }
                }
            }
            assert!(rejected > 100 && taken > 100, "{strategy}: {rejected} {taken}");
        }
    }
}
