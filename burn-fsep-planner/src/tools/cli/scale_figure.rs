use std::fmt::Display;

use plotters::prelude::*;

use super::CliError;
use crate::tools::simulator::ScalePoint;

const SIZE: (u32, u32) = (900, 420);

fn failed(error: impl Display) -> CliError {
    CliError::Figure(error.to_string())
}

/// Steps by size of groups, a line for each world; hollow where memory is too small.
pub(super) fn draw(worlds: &[Vec<ScalePoint>]) -> Result<String, CliError> {
    let at = |point: &ScalePoint| (f64::from(point.group_ranks as u32).log2(), point.outcome.time.total() * 1e3);
    let all = || worlds.iter().flatten().map(at);
    let right = all().map(|(x, _)| x).fold(1.0, f64::max);
    // Of steps that are several times as long the figure need not tell.
    let least = all().map(|(_, y)| y).fold(f64::INFINITY, f64::min);
    let top = all().map(|(_, y)| y).fold(0.0, f64::max).min(3.0 * least);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..right, 0.0..top * 1.05)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc("ranks that share the experts")
            .y_desc("ms a step")
            .x_labels(right as usize + 1)
            .x_label_formatter(&|log| format!("{:.0}", log.exp2()))
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        for (i, points) in worlds.iter().enumerate() {
            let colour = Palette99::pick(i).to_rgba();
            let shown: Vec<&ScalePoint> = points.iter().filter(|point| at(point).1 <= top).collect();
            let label = points.first().map_or_else(String::new, |point| format!("{} ranks", point.world_size));
            chart
                .draw_series(LineSeries::new(shown.iter().map(|point| at(point)), colour.stroke_width(2)))
                .map_err(failed)?
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(3)));
            let mark = |point: &&ScalePoint| {
                let style = if point.fits == Some(false) { colour.stroke_width(1) } else { colour.filled() };
                Circle::new(at(point), 4, style)
            };
            chart.draw_series(shown.iter().map(mark)).map_err(failed)?;
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw().map_err(failed)?;
        root.present().map_err(failed)?;
    }
    Ok(text)
}
