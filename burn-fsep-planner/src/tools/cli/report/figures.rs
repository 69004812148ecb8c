use std::fmt::Display;

use plotters::prelude::*;

use crate::{
    PlannerStrategy,
    tools::{
        cli::{CliError, replay::Replays, summary::Summary},
        replay::ReplayStep,
    },
};

/// A figure's title, what it shows, and its SVG.
pub(super) type Figure = (&'static str, String, String);

const WIDTH: u32 = 900;

/// The figures of a report.
pub(super) fn all(replays: &Replays) -> Result<Vec<Figure>, CliError> {
    let mut figures = vec![imbalance_over_steps(replays)?];
    figures.extend(load_per_rank(replays)?);
    figures.push(expert_heat(replays)?);
    figures.push(solve_times(&replays.summaries()?)?);
    Ok(figures)
}

/// Colour-blind safe (Okabe and Ito).
fn colour(i: usize) -> RGBColor {
    const COLOURS: [RGBColor; 8] = [
        RGBColor(0xD5, 0x5E, 0x00),
        RGBColor(0xE6, 0x9F, 0x00),
        RGBColor(0x00, 0x72, 0xB2),
        RGBColor(0x00, 0x9E, 0x73),
        RGBColor(0xCC, 0x79, 0xA7),
        RGBColor(0x56, 0xB4, 0xE9),
        RGBColor(0x00, 0x00, 0x00),
        RGBColor(0x99, 0x99, 0x99),
    ];
    COLOURS[i % COLOURS.len()]
}

fn failed(error: impl Display) -> CliError {
    CliError::Figure(error.to_string())
}

/// Draws into an SVG of this height.
fn svg(
    height: u32,
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Result<(), CliError>,
) -> Result<String, CliError> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        draw(&root)?;
        root.present().map_err(failed)?;
    }
    // Scales with the page.
    Ok(text.replacen(&format!("width=\"{WIDTH}\" height=\"{height}\" "), "", 1))
}

fn imbalance_over_steps(replays: &Replays) -> Result<Figure, CliError> {
    let lines: Vec<(PlannerStrategy, Vec<f64>)> =
        replays.steps.iter().map(|(strategy, steps)| (*strategy, mean_by_step(steps))).collect();
    let steps = lines.iter().map(|(_, line)| line.len()).max().unwrap_or(0);
    let top = lines.iter().flat_map(|(_, line)| line).copied().fold(1.1, f64::max);
    let figure = svg(360, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..steps.saturating_sub(1).max(1) as f64, 1.0..1.0 + (top - 1.0) * 1.25)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("max/mean load")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        for (i, (strategy, line)) in lines.iter().enumerate() {
            chart
                .draw_series(LineSeries::new(
                    line.iter().enumerate().map(|(step, &value)| (step as f64, value)),
                    colour(i).stroke_width(2),
                ))
                .map_err(failed)?
                .label(strategy.name())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour(i).stroke_width(3)));
        }
        legend(&mut chart)
    })?;
    Ok((
        "Imbalance over steps",
        "Largest load of a rank over the mean load, mean over layers; 1 is perfect.".into(),
        figure,
    ))
}

fn mean_by_step(steps: &[ReplayStep]) -> Vec<f64> {
    let count = steps.iter().map(|step| step.step + 1).max().unwrap_or(0);
    let mut sums = vec![(0.0, 0.0); count];
    for step in steps {
        sums[step.step].0 += step.max_over_mean;
        sums[step.step].1 += 1.0;
    }
    sums.iter().map(|(sum, layers)| sum / layers).collect()
}

/// Loads under the first and the last strategy, where the first is worst.
fn load_per_rank(replays: &Replays) -> Result<Option<Figure>, CliError> {
    let (Some((first, before)), Some((last, after))) = (replays.steps.first(), replays.steps.last()) else {
        return Ok(None);
    };
    let worst = replays.counted(before).into_iter().max_by(|a, b| a.max_over_mean.total_cmp(&b.max_over_mean));
    let Some(worst) = worst else { return Ok(None) };
    let same = after.iter().find(|step| (step.layer, step.step) == (worst.layer, worst.step));
    let Some(same) = same else { return Ok(None) };
    let mut shown = vec![(first, worst)];
    if first != last {
        shown.push((last, same));
    }
    let ranks = worst.loads.len();
    let mean = (worst.loads.iter().sum::<u64>() as f64 / ranks as f64).max(1.0);
    let top = shown.iter().map(|(_, step)| step.max_over_mean).fold(1.0, f64::max);
    let figure = svg(320, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..ranks as f64, 0.0..top * 1.2)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_desc("rank")
            .y_desc("load / mean load")
            .x_label_formatter(&|rank| format!("{rank:.0}"))
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        let width = 0.9 / shown.len() as f64;
        for (i, (strategy, step)) in shown.iter().enumerate() {
            let style = colour(if i == 0 { 0 } else { 2 }).filled();
            chart
                .draw_series(step.loads.iter().enumerate().map(|(rank, &load)| {
                    let left = rank as f64 + 0.05 + i as f64 * width;
                    Rectangle::new([(left, 0.0), (left + width, load as f64 / mean)], style)
                }))
                .map_err(failed)?
                .label(strategy.name())
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], style));
        }
        legend(&mut chart)
    })?;
    let note = format!("Layer {}, step {}: where {first} balances worst.", worst.layer, worst.step);
    Ok(Some(("Load per rank", note, figure)))
}

fn expert_heat(replays: &Replays) -> Result<Figure, CliError> {
    let (layers, experts) = (replays.trace.layers(), replays.trace.num_experts());
    let shares: Vec<Vec<f64>> = layers
        .iter()
        .map(|&layer| {
            let mut totals = vec![0u64; experts];
            for (_, counts) in replays.trace.steps(layer) {
                totals.iter_mut().zip(counts.expert_totals()).for_each(|(total, n)| *total += n);
            }
            let all = totals.iter().sum::<u64>().max(1) as f64;
            totals.iter().map(|&total| total as f64 / all * experts as f64).collect()
        })
        .collect();
    let top = shares.iter().flatten().copied().fold(1.0, f64::max);
    let height = 100 + 14 * layers.len().min(60) as u32;
    let figure = svg(height, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..experts as f64, 0.0..layers.len() as f64)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_desc("expert")
            .y_desc("layer")
            .x_label_formatter(&|expert| format!("{expert:.0}"))
            .y_label_formatter(&|row| layers.get(*row as usize).map(usize::to_string).unwrap_or_default())
            .draw()
            .map_err(failed)?;
        let cells = shares.iter().enumerate().flat_map(|(row, shares)| {
            shares.iter().enumerate().map(move |(expert, &share)| {
                let corners = [(expert as f64, row as f64), (expert as f64 + 1.0, row as f64 + 1.0)];
                Rectangle::new(corners, heat(share / top).filled())
            })
        });
        chart.draw_series(cells).map_err(failed)?;
        Ok(())
    })?;
    let note = format!(
        "Share of each layer's assignments, over all steps: white is none, the darkest {top:.1} times the fair share."
    );
    Ok(("Expert load by layer", note, figure))
}

/// White to dark red.
fn heat(part: f64) -> RGBColor {
    let part = part.clamp(0.0, 1.0);
    let between = |from: f64, to: f64| (from + (to - from) * part) as u8;
    RGBColor(between(255.0, 140.0), between(250.0, 20.0), between(240.0, 30.0))
}

fn solve_times(summaries: &[Summary]) -> Result<Figure, CliError> {
    let bars: Vec<(String, [f64; 2])> = summaries
        .iter()
        .flat_map(|summary| {
            let times = [("layout", summary.layout), ("dispatch", summary.dispatch)];
            times.map(|(what, time)| (format!("{} {what}", summary.strategy), [time.p50, time.p99]))
        })
        .collect();
    let top = bars.iter().flat_map(|(_, times)| times).copied().fold(10.0, f64::max);
    let height = 80 + 26 * bars.len() as u32;
    let figure = svg(height, |root| {
        let mut chart = ChartBuilder::on(root)
            .margin(10)
            .margin_right(30)
            .x_label_area_size(40)
            .y_label_area_size(170)
            .build_cartesian_2d((0.1..top * 1.5).log_scale(), 0.0..bars.len() as f64)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(0)
            .x_desc("microseconds")
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        let row = |i: usize| (bars.len() - 1 - i) as f64;
        for (percentile, style) in [(1, colour(5).mix(0.5).filled()), (0, colour(2).filled())] {
            let boxes = bars.iter().enumerate().map(|(i, (_, times))| {
                Rectangle::new([(0.1, row(i) + 0.15), (times[percentile].max(0.1), row(i) + 0.85)], style)
            });
            chart
                .draw_series(boxes)
                .map_err(failed)?
                .label(["median", "99th percentile"][percentile])
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], style));
        }
        for (i, (name, _)) in bars.iter().enumerate() {
            let (_, y) = chart.backend_coord(&(0.1, row(i) + 0.5));
            root.draw(&Text::new(name.clone(), (10, y - 6), ("sans-serif", 13))).map_err(failed)?;
        }
        legend(&mut chart)
    })?;
    Ok(("Solve times", "On one core of the machine that wrote this page, for one layer in one step.".into(), figure))
}

fn legend<'a, X: Ranged, Y: Ranged>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
) -> Result<(), CliError> {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(0xCC, 0xCC, 0xCC))
        .draw()
        .map_err(failed)
}
