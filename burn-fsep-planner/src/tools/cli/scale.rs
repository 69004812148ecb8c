use std::fmt::Write as _;

use super::{CliError, ScaleArgs, files::write_whole, scale_figure, specs};
use crate::tools::simulator::{ScalePoint, ScaleRun, SyntheticRouting};

/// World sizes if none is named.
const RANKS: [usize; 7] = [64, 128, 256, 512, 1024, 2048, 4096];

/// The best size of groups for each world size.
pub(super) fn table(args: &ScaleArgs) -> Result<String, CliError> {
    let option = |source| CliError::Option { source };
    let simulator = specs::simulator(&args.specs)?;
    let (cluster, model) = (simulator.cluster(), simulator.model());
    let run = ScaleRun {
        routing: SyntheticRouting { sigma: args.sigma, steps: args.steps, seed: args.seed },
        skip_steps: 1.min(args.steps.saturating_sub(1)),
        strategy: args.strategy,
        zero: args.zero,
        most_group_ranks: args.most_group_ranks,
    };
    let worlds = if args.ranks.is_empty() { RANKS.to_vec() } else { args.ranks.clone() };
    let mut table = format!(
        "{:.1} billion parameters, {:.1} a token; {} tokens a rank and step; planner {}, {} ZeRO\n\n{:>6}{:>7}{:>7}{:>11}{:>14}{:>8}{:>10}{:>10}{:>10}  fits\n",
        model.parameters() / 1e9,
        model.active_parameters() / 1e9,
        model.tokens() * model.micro_batches as f64,
        args.strategy,
        if args.zero { "with" } else { "without" },
        "ranks",
        "groups",
        "slots",
        "step ms",
        "tokens/s",
        "% peak",
        "max/mean",
        "slowest",
        "GiB",
    );
    let mut all = Vec::new();
    for world in worlds {
        let points = run.points(cluster, model, world).map_err(option)?;
        let best = ScalePoint::best(&points);
        for point in points.iter().filter(|point| args.all || best == Some(point)) {
            row(point, if args.all && best == Some(point) { " best" } else { "" }, &mut table);
        }
        if best.is_none() {
            let least = points.iter().map(|point| point.memory_bytes).min().unwrap_or(0) as f64 / (1u64 << 30) as f64;
            let _ =
                writeln!(table, "{world:>6}  no size of groups fits a rank's memory; the least takes {least:.1} GiB");
        }
        all.push(points);
    }
    if let Some(path) = &args.figure {
        write_whole(path, scale_figure::draw(&all)?.as_bytes())?;
        let _ = writeln!(table, "\nfigure: {}", path.display());
    }
    table.push_str(
        "\ngroups: ranks that share the experts; max/mean: largest load of a rank over the mean of its group, mean of all groups, and of \
         those that were slowest in backward; GiB: a rank's tensors at their most\n",
    );
    Ok(table)
}

fn row(point: &ScalePoint, mark: &str, table: &mut String) {
    let fits = match point.fits {
        None => "?",
        Some(true) => "yes",
        Some(false) => "no",
    };
    let _ = writeln!(
        table,
        "{:>6} {:>6} {:>6} {:>10.1} {:>13.0} {:>7.1} {:>9.3} {:>9.3} {:>9.1}  {fits}{mark}",
        point.world_size,
        point.group_ranks,
        point.slots_per_rank,
        point.outcome.time.total() * 1e3,
        point.tokens_per_second,
        point.share_of_peak * 100.0,
        point.outcome.max_over_mean,
        point.outcome.slowest_max_over_mean,
        point.memory_bytes as f64 / (1u64 << 30) as f64,
    );
}
