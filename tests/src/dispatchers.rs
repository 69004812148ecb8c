use burn_fsep_planner::{
    Layout, PlannerError, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, EvenSplit, MinMax},
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Splits each source's assignments at random over the replicas: any valid plan can come out.
#[derive(Debug)]
pub struct RandomDispatch(StdRng);

impl Default for RandomDispatch {
    fn default() -> Self {
        Self(StdRng::seed_from_u64(9))
    }
}

impl Dispatcher for RandomDispatch {
    fn name(&self) -> &'static str {
        "random"
    }

    fn dispatch(
        &mut self,
        topology: &Topology,
        layout: &Layout,
        counts: &RoutingCounts,
        plan: &mut DispatchPlan,
    ) -> Result<(), PlannerError> {
        layout.check_fits(topology, counts)?;
        plan.clear(counts.num_ranks(), counts.num_experts());
        for source in 0..counts.num_ranks() {
            for expert in 0..counts.num_experts() {
                let mut rest = counts.get(source, expert);
                let holders = layout.ranks_of(expert);
                for (i, &rank) in holders.iter().enumerate() {
                    let last = i + 1 == holders.len();
                    let tokens = if last { rest } else { self.0.random_range(0..=rest) };
                    plan.push(rank as usize, tokens);
                    rest -= tokens;
                }
                plan.end_pair();
            }
        }
        Ok(())
    }
}

/// The dispatchers that the suite runs with, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitAny {
    /// Evenly over replicas.
    Even,
    /// Smallest maximum load.
    MinMax,
    /// At random.
    Random,
}

impl SplitAny {
    /// All of them.
    pub const ALL: [SplitAny; 3] = [SplitAny::Even, SplitAny::MinMax, SplitAny::Random];

    /// Makes one.
    pub fn dispatcher(self) -> Box<dyn Dispatcher> {
        match self {
            SplitAny::Even => Box::new(EvenSplit::new()),
            SplitAny::MinMax => Box::new(MinMax::new()),
            SplitAny::Random => Box::new(RandomDispatch::default()),
        }
    }
}
