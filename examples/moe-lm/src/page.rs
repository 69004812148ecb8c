use std::fmt::Write as _;

use crate::record::StepRow;

/// A self-contained page with the curves of loss and imbalance.
pub(crate) fn curves(title: &str, rows: &[StepRow], unigram_entropy: f64) -> String {
    let line = |name, class, value: fn(&StepRow) -> f64| Line { name, class, values: rows.iter().map(value).collect() };
    let loss = Chart {
        title: "Loss (nat/byte)",
        lines: vec![
            line("training loss", "a", |row| row.loss),
            Line {
                name: "unigram entropy of the held-out text",
                class: "c",
                values: vec![unigram_entropy; rows.len()],
            },
        ],
    };
    let imbalance = Chart {
        title: "Expert load, max/mean over ranks (1 is perfect)",
        lines: vec![
            line("static expert parallelism", "b", |row| row.imbalance_static),
            line("as planned, mean of layers", "a", |row| row.imbalance),
            line("as planned, worst layer", "c", |row| row.imbalance_max),
        ],
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\n<style>{STYLE}</style>\n\
         <h1>{title}</h1>\n{}{}</html>\n",
        loss.svg(),
        imbalance.svg()
    )
}

const STYLE: &str = ":root{color-scheme:light dark;--a:#2563eb;--b:#dc2626;--c:#9ca3af;--grid:#8884}\
    body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em}\
    h1{font-size:1.3em}h2{font-size:1em;margin:1.5em 0 .3em}svg{width:100%;height:auto}\
    text{font-size:12px;fill:currentColor}.grid{stroke:var(--grid)}path{fill:none;stroke-width:1.6}\
    .a{stroke:var(--a)}.b{stroke:var(--b)}.c{stroke:var(--c);stroke-dasharray:5 3}";

struct Line {
    name: &'static str,
    class: &'static str,
    values: Vec<f64>,
}

struct Chart {
    title: &'static str,
    lines: Vec<Line>,
}

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 46.0;

impl Chart {
    fn svg(&self) -> String {
        let finite = || self.lines.iter().flat_map(|line| &line.values).copied().filter(|v| v.is_finite());
        let (low, high) = finite().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        let (low, high) = if low < high { (low, high) } else { (low - 0.5, low + 0.5) };
        let steps = self.lines.iter().map(|line| line.values.len()).max().unwrap_or(0);
        let x = |i: usize| LEFT + (WIDTH - LEFT - RIGHT) * i as f64 / (steps.max(2) - 1) as f64;
        let y = |v: f64| TOP + (HEIGHT - TOP - BOTTOM) * (high - v) / (high - low);

        let mut svg = format!("<h2>{}</h2>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">", self.title);
        for tick in 0..=4 {
            let value = low + (high - low) * f64::from(tick) / 4.0;
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/>\
                 <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{value:.2}</text>",
                WIDTH - RIGHT,
                y(value),
                LEFT - 6.0,
                y(value) + 4.0
            );
        }
        for (i, line) in self.lines.iter().enumerate() {
            let points = line.values.iter().enumerate().filter(|(_, v)| v.is_finite());
            let path: Vec<String> = points.map(|(i, &v)| format!("{:.1} {:.1}", x(i), y(v))).collect();
            let legend = LEFT + i as f64 * 260.0;
            let _ = write!(
                svg,
                "<path class=\"{0}\" d=\"M{1}\"/><path class=\"{0}\" d=\"M{legend} {2}h24\"/>\
                 <text x=\"{3}\" y=\"{4}\">{5}</text>",
                line.class,
                path.join("L"),
                HEIGHT - 8.0,
                legend + 30.0,
                HEIGHT - 4.0,
                line.name
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{LEFT}\" y=\"{0}\">step 1</text><text x=\"{1}\" y=\"{0}\" text-anchor=\"end\">step {steps}</text>",
            HEIGHT - BOTTOM + 16.0,
            WIDTH - RIGHT
        );
        svg + "</svg>\n"
    }
}
