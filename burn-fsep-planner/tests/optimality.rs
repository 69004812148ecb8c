//! Dispatch and layouts against the optima of linear and integer programs, which microlp solves.

use burn_fsep_planner::{
    Layout, RoutingCounts, Topology,
    dispatch::{DispatchPlan, Dispatcher, MinMax},
    placement::{LayoutRequest, LayoutSolver, RobustSolver},
};
use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem, SolveOutcome, Variable};
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};

struct Case {
    topology: Topology,
    layout: Layout,
    counts: RoutingCounts,
}

/// A valid layout, else arbitrary: every expert once, then any experts that a rank does not hold yet.
fn random_layout(ranks: usize, slots: usize, experts: usize, random: &mut SmallRng) -> Layout {
    let mut order: Vec<u32> = (0..experts as u32).collect();
    order.shuffle(random);
    let mut rows: Vec<Vec<u32>> = vec![Vec::new(); ranks];
    order.iter().enumerate().for_each(|(i, &expert)| rows[i % ranks].push(expert));
    for row in &mut rows {
        order.shuffle(random);
        let fresh: Vec<u32> = order.iter().copied().filter(|expert| !row.contains(expert)).collect();
        row.extend(fresh.into_iter().take(slots - row.len()));
    }
    Layout::from_rows(experts, &rows).unwrap()
}

/// Counts of any skew: some experts hot, some sources and experts without tokens.
fn random_counts(ranks: usize, experts: usize, random: &mut SmallRng) -> RoutingCounts {
    let power = random.random_range(1..8);
    let heat: Vec<f64> = (0..experts).map(|_| random.random::<f64>().powi(power)).collect();
    let counts = (0..ranks * experts).map(|i| (heat[i % experts] * f64::from(random.random_range(0..1000u32))) as u32);
    RoutingCounts::new(ranks, experts, counts.collect()).unwrap()
}

fn random_case(max_ranks: usize, max_experts: usize, max_slots: usize, random: &mut SmallRng) -> Case {
    let ranks = random.random_range(1..=max_ranks);
    let slots = random.random_range(1..=max_slots);
    let experts = random.random_range(slots..=(ranks * slots).min(max_experts).max(slots));
    Case {
        topology: Topology::uniform(ranks, random.random_range(1..=ranks)).unwrap(),
        layout: random_layout(ranks, slots, experts, random),
        counts: random_counts(ranks, experts, random),
    }
}

fn dispatch(case: &Case) -> DispatchPlan {
    let mut plan = DispatchPlan::new();
    MinMax::exact().dispatch(&case.topology, &case.layout, &case.counts, &mut plan).unwrap();
    plan.check(&case.layout, &case.counts).unwrap();
    plan
}

fn max_load(plan: &DispatchPlan) -> u64 {
    plan.loads().into_iter().max().unwrap()
}

/// The optimum that the solver proves.
fn objective(problem: &Problem) -> f64 {
    match problem.solve().unwrap() {
        SolveOutcome::Solution(solution) => solution.objective(),
        SolveOutcome::Interrupted(why) => panic!("no limit was set, but the solver stopped: {why:?}"),
    }
}

/// `minimise T` such that each expert's tokens are spread over its holders and no rank gets more than `T`.
fn least_max_load(case: &Case) -> f64 {
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let max = problem.add_var(1.0, (0.0, f64::INFINITY));
    let mut loads = vec![LinearExpr::empty(); case.layout.num_ranks()];
    for (expert, &total) in case.counts.expert_totals().iter().enumerate() {
        let mut shares = LinearExpr::empty();
        for &rank in case.layout.ranks_of(expert) {
            let share = problem.add_var(0.0, (0.0, f64::INFINITY));
            shares.add(share, 1.0);
            loads[rank as usize].add(share, 1.0);
        }
        problem.add_constraint(shares, ComparisonOp::Eq, total as f64);
    }
    for mut load in loads {
        load.add(max, -1.0);
        problem.add_constraint(load, ComparisonOp::Le, 0.0);
    }
    objective(&problem)
}

/// Fewest tokens that cross nodes among the dispatches whose largest load is at most `max`.
fn fewest_crossing(case: &Case, max: u64) -> f64 {
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let mut loads = vec![LinearExpr::empty(); case.layout.num_ranks()];
    for node in 0..case.topology.num_nodes() {
        for expert in 0..case.layout.num_experts() {
            let supply: u32 = case.topology.ranks_of(node).map(|source| case.counts.get(source, expert)).sum();
            let mut shares = LinearExpr::empty();
            for &rank in case.layout.ranks_of(expert) {
                let crosses = case.topology.node_of(rank as usize) != node;
                let share = problem.add_var(f64::from(u8::from(crosses)), (0.0, f64::INFINITY));
                shares.add(share, 1.0);
                loads[rank as usize].add(share, 1.0);
            }
            problem.add_constraint(shares, ComparisonOp::Eq, f64::from(supply));
        }
    }
    for load in loads {
        problem.add_constraint(load, ComparisonOp::Le, max as f64);
    }
    objective(&problem)
}

#[test]
fn no_dispatch_has_a_smaller_largest_load() {
    let mut random = SmallRng::seed_from_u64(1);
    for number in 0..1000 {
        let case = random_case(64, 64, 6, &mut random);
        let least = least_max_load(&case);
        let ours = max_load(&dispatch(&case));
        assert_eq!(ours, (least - 1e-6).ceil() as u64, "case {number}: the linear program says {least}");
    }
}

/// Fewest tokens that leave their rank with at most `crossing` between nodes and largest load `max`.
fn fewest_leaving(case: &Case, max: u64, crossing: u64) -> f64 {
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let mut loads = vec![LinearExpr::empty(); case.layout.num_ranks()];
    let mut between = LinearExpr::empty();
    for source in 0..case.layout.num_ranks() {
        for expert in 0..case.layout.num_experts() {
            let mut shares = LinearExpr::empty();
            for &rank in case.layout.ranks_of(expert) {
                let rank = rank as usize;
                let share = problem.add_var(f64::from(u8::from(rank != source)), (0.0, f64::INFINITY));
                shares.add(share, 1.0);
                loads[rank].add(share, 1.0);
                if !case.topology.same_node(rank, source) {
                    between.add(share, 1.0);
                }
            }
            problem.add_constraint(shares, ComparisonOp::Eq, f64::from(case.counts.get(source, expert)));
        }
    }
    for load in loads {
        problem.add_constraint(load, ComparisonOp::Le, max as f64);
    }
    problem.add_constraint(between, ComparisonOp::Le, crossing as f64);
    objective(&problem)
}

#[test]
fn no_dispatch_of_that_largest_load_has_fewer_tokens_that_leave_their_node_and_then_their_rank() {
    let mut random = SmallRng::seed_from_u64(2);
    for number in 0..300 {
        let case = random_case(10, 10, 4, &mut random);
        let plan = dispatch(&case);
        let (max, crossing, leaving) =
            (max_load(&plan), plan.cross_node_tokens(&case.topology), plan.off_rank_tokens());
        assert!((fewest_crossing(&case, max) - crossing as f64).abs() < 1e-3, "case {number}: {crossing} cross nodes");
        let fewest = fewest_leaving(&case, max, crossing);
        assert!((fewest - leaving as f64).abs() < 1e-3, "case {number}: {leaving} leave their rank, {fewest} have to");
    }
}

/// The best layout for known counts, by branch and bound: binary `y[e, r]` says whether a rank holds an expert.
fn best_layout_max_load(ranks: usize, slots: usize, totals: &[u64]) -> f64 {
    let mut problem = Problem::new(OptimizationDirection::Minimize);
    let max = problem.add_var(1.0, (0.0, f64::INFINITY));
    let mut loads = vec![LinearExpr::empty(); ranks];
    let mut held = vec![LinearExpr::empty(); ranks];
    for &total in totals {
        let mut shares = LinearExpr::empty();
        for rank in 0..ranks {
            let share: Variable = problem.add_var(0.0, (0.0, 1.0));
            let holds = problem.add_binary_var(0.0);
            shares.add(share, 1.0);
            loads[rank].add(share, total as f64);
            held[rank].add(holds, 1.0);
            problem.add_constraint([(share, 1.0), (holds, -1.0)], ComparisonOp::Le, 0.0);
        }
        problem.add_constraint(shares, ComparisonOp::Eq, 1.0);
    }
    for (mut load, held) in loads.into_iter().zip(held) {
        load.add(max, -1.0);
        problem.add_constraint(load, ComparisonOp::Le, 0.0);
        problem.add_constraint(held, ComparisonOp::Le, slots as f64);
    }
    objective(&problem)
}

#[test]
fn layouts_are_within_one_percent_of_the_best() {
    let mut random = SmallRng::seed_from_u64(4);
    let mut worst = 1.0f64;
    for number in 0..300 {
        let ranks = random.random_range(2..=5);
        let slots = random.random_range(1..=4);
        let experts = random.random_range(slots..=(ranks * slots).min(7));
        let counts = random_counts(ranks, experts, &mut random);
        let topology = Topology::single_node(ranks).unwrap();
        let request = LayoutRequest { topology: &topology, slots_per_rank: slots, predicted: &counts, previous: None };
        let layout = RobustSolver::new(7).solve(&request).unwrap();
        let ours = max_load(&dispatch(&Case { topology, layout, counts: counts.clone() })) as f64;
        let best = (best_layout_max_load(ranks, slots, &counts.expert_totals()) - 1e-6).ceil();
        worst = worst.max(ours / best.max(1.0));
        // Of a few tokens, one is more than a percent.
        assert!(ours <= (best * 1.01).max(best + 1.0), "case {number}: N {ranks} C {slots} E {experts}: {ours} {best}");
    }
    println!("largest load over that of the best layout: {worst:.4} in the worst of 300 cases");
}
