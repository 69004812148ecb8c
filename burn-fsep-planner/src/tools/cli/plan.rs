use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{CliError, PlanArgs, files::write_whole};
use crate::{LayerPlanner, Layout, PlannerError, RoutingCounts, Topology, dispatch::DispatchPlan};

/// Routing counts by source rank and expert. Shape `[N, E]`.
type Table = Vec<Vec<u32>>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    ranks_per_node: usize,
    slots_per_rank: usize,
    counts: Table,
    #[serde(default)]
    history: Vec<Table>,
}

#[derive(Debug, Serialize)]
struct Output {
    /// Expert of each slot, by rank.
    layout: Vec<Vec<u32>>,
    /// `[source, expert, rank, tokens]`
    dispatch: Vec<[u32; 4]>,
    loads: Vec<u64>,
    max_over_mean: f64,
    inter_node_tokens: u64,
    layout_us: f64,
    dispatch_us: f64,
}

const EXPECTED: &str = "{\"ranks_per_node\": 8, \"slots_per_rank\": 2, \"counts\": [[n of each expert] of each rank]} \
     with whole numbers, and optionally \"history\": [counts, ..]";

pub(super) fn plan(args: &PlanArgs) -> Result<String, CliError> {
    let text = std::fs::read_to_string(&args.input).map_err(CliError::file(&args.input))?;
    let input: Input = serde_json::from_str(&text).map_err(|source| CliError::Json {
        path: args.input.clone(),
        source,
        expected: EXPECTED,
    })?;
    let output = solve(&input, args).map_err(CliError::plan(&args.input))?;
    let json = serde_json::to_vec(&output).map_err(|source| CliError::Json {
        path: args.output.clone(),
        source,
        expected: "numbers that JSON can hold",
    })?;
    write_whole(&args.output, &json)?;
    Ok(format!(
        "max/mean {:.4}, {} tokens between nodes, layout {:.0} us, dispatch {:.0} us: {}\n",
        output.max_over_mean,
        output.inter_node_tokens,
        output.layout_us,
        output.dispatch_us,
        args.output.display()
    ))
}

fn solve(input: &Input, args: &PlanArgs) -> Result<Output, PlannerError> {
    let counts = RoutingCounts::from_rows(&input.counts)?;
    let topology = Topology::uniform(counts.num_ranks(), input.ranks_per_node)?;
    let history: Vec<RoutingCounts> =
        input.history.iter().map(|table| RoutingCounts::from_rows(table)).collect::<Result<_, _>>()?;
    let initial = Layout::static_ep(counts.num_ranks(), input.slots_per_rank, counts.num_experts())?;
    for past in &history {
        initial.check_fits(&topology, past)?;
    }

    let strategy = args.strategy;
    let mut planner =
        LayerPlanner::new(topology.clone(), initial.clone(), strategy.predictor(), strategy.solver(args.seed));
    let mut layout = initial;
    let mut layout_us = 0.0;
    for past in if history.is_empty() { std::slice::from_ref(&counts) } else { &history } {
        let start = Instant::now();
        layout = planner.plan(past)?.clone();
        layout_us = start.elapsed().as_secs_f64() * 1e6;
    }
    let mut plan = DispatchPlan::new();
    let start = Instant::now();
    strategy.dispatcher().dispatch(&topology, &layout, &counts, &mut plan)?;
    let dispatch_us = start.elapsed().as_secs_f64() * 1e6;
    plan.check(&layout, &counts)?;
    Ok(Output {
        layout: (0..layout.num_ranks()).map(|rank| layout.experts_of(rank).to_vec()).collect(),
        dispatch: plan.iter().map(|(s, e, share)| [s as u32, e as u32, share.rank, share.tokens]).collect(),
        loads: plan.loads(),
        max_over_mean: plan.max_over_mean(),
        inter_node_tokens: plan.cross_node_tokens(&topology),
        layout_us,
        dispatch_us,
    })
}
