use std::fmt::Write as _;

use super::{BenchmarkArgs, CliError};
use crate::tools::{
    benchmark::{BenchmarkRow, BenchmarkSize, run},
    replay::Spread,
    workload::{Workload, WorkloadError},
};

/// Largest bound with which a step counts as one that can be balanced: the goal itself.
const CAN_BE_BALANCED: f64 = 1.02;

const LEGEND: &str = "\
static, planned (from past steps), repaired and priced (in the step; priced: only where it saves more than the transfer takes):
largest load of a rank over the mean load, mean over the steps but the first; bound: what no layout beats; slots: share that
changed in the step. The layer's time is the cost model's, forward and backward, and so is what it waits for the changed slots;
transfer: both over the layer's time without repairs. Times of repair and dispatch (both in the step) and layout (beside it) are
medians on this machine, one thread, and shares of the layer's time.
";

pub(super) fn table(args: &BenchmarkArgs) -> Result<String, CliError> {
    let known = |ranks: &usize| BenchmarkSize::ALL.iter().any(|size| size.ranks == *ranks);
    if let Some(&ranks) = args.ranks.iter().find(|ranks| !known(ranks)) {
        return Err(CliError::BenchmarkRanks(ranks));
    }
    let workloads = if args.workload.is_empty() { Workload::BENCHMARK.to_vec() } else { args.workload.clone() };
    let sizes = BenchmarkSize::ALL.into_iter().filter(|size| args.ranks.is_empty() || args.ranks.contains(&size.ranks));
    let mut table = String::new();
    for size in sizes {
        let rows: Vec<BenchmarkRow> = workloads
            .iter()
            .map(|&workload| run(size, workload, args.steps, args.seed))
            .collect::<Result<_, WorkloadError>>()?;
        let _ = writeln!(table, "{}", size.describe());
        section(&mut table, &rows);
    }
    table.push_str(LEGEND);
    Ok(table)
}

fn section(table: &mut String, rows: &[BenchmarkRow]) {
    let _ = writeln!(
        table,
        "{:<23}{:>8}{:>9} |{:>9}{:>8}{:>8}{:>9} |{:>8}{:>8}{:>9}{:>10} |{:>7} |{:>10}{:>11}{:>9}{:>10}{:>12}{:>12}{:>11}{:>10}",
        "workload",
        "static",
        "planned",
        "repaired",
        "p95",
        "slots%",
        "transfer",
        "priced",
        "p95",
        "slots%",
        "transfer",
        "bound",
        "layer ms",
        "repair us",
        "p95 us",
        "repair %",
        "dispatch us",
        "dispatch %",
        "layout us",
        "layout %"
    );
    for row in rows {
        let BenchmarkRow { fixed, planned, free, priced, bound, .. } = row;
        // Most steps of some workloads need no repair: the 95th percentile is of one that does.
        let us = |spread: Spread| spread.p50 * 1e6;
        let share = |spread: Spread| spread.p50 / free.layer.mean * 100.0;
        let with_transfer = |mean: f64| mean / planned.layer.mean;
        let _ = writeln!(
            table,
            "{:<23}{:>8.3}{:>9.3} |{:>9.4}{:>8.4}{:>8.1}{:>9.3} |{:>8.4}{:>8.4}{:>9.1}{:>10.3} |{:>7.3} |{:>10.2}{:>11.1}{:>9.1}{:>10.2}{:>12.1}{:>12.2}{:>11.0}{:>10.2}",
            row.workload.name(),
            fixed.max_over_mean.mean,
            planned.max_over_mean.mean,
            free.max_over_mean.mean,
            free.max_over_mean.p95,
            free.repaired.mean * 100.0,
            with_transfer(free.layer.mean + free.transfer.mean),
            priced.max_over_mean.mean,
            priced.max_over_mean.p95,
            priced.repaired.mean * 100.0,
            with_transfer(priced.layer.mean + priced.transfer.mean),
            bound.mean,
            free.layer.mean * 1e3,
            us(free.repair),
            free.repair.p95 * 1e6,
            share(free.repair),
            us(free.dispatch),
            share(free.dispatch),
            us(free.layout),
            share(free.layout),
        );
    }
    let steps = rows.iter().flat_map(|row| &row.steps);
    let (allowed, others): (Vec<_>, Vec<_>) = steps.partition(|(_, bound)| *bound <= CAN_BE_BALANCED);
    let name = format!("all, bound <= {CAN_BE_BALANCED}");
    if let Some(Spread { mean, p95, max, .. }) = Spread::of(allowed.iter().map(|(imbalance, _)| *imbalance)) {
        let (allowed, others) = (allowed.len(), others.len());
        let _ = writeln!(
            table,
            "{name:<40} |{mean:>9.4}{p95:>8.4}  largest {max:.4}, {allowed} steps ({others} cannot be balanced)\n"
        );
    }
}
