//! Routing traces: what a training run's routers did, layer by layer and step by step.

use std::{collections::BTreeMap, fmt::Write as _};

use thiserror::Error;

use crate::{PlannerError, RoutingCounts};

/// The routing counts of some layers in some steps, all of one size.
///
/// As text, a trace is CSV with one line a layer, step and source rank: `layer,step,src_rank,expert0,expert1,..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    num_ranks: usize,
    num_experts: usize,
    /// By layer and step.
    counts: BTreeMap<(usize, usize), RoutingCounts>,
}

/// A trace that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TraceError {
    /// A line that is not as it should be; lines count from 1.
    #[error("line {line}: {problem}")]
    Line {
        /// The line.
        line: usize,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// Lines that are missing.
    #[error("layer {layer}, step {step}: {problem}")]
    Incomplete {
        /// The layer.
        layer: usize,
        /// The step.
        step: usize,
        /// What is missing.
        problem: String,
    },
    /// No line but the header.
    #[error("the trace is empty: expected lines `layer,step,src_rank,expert0,..` below the header")]
    Empty,
}

impl Trace {
    /// A trace of the given counts, by layer and step.
    ///
    /// # Errors
    ///
    /// [`PlannerError::Shape`] if counts differ in size, [`PlannerError::Zero`] if there are none.
    pub fn new(counts: BTreeMap<(usize, usize), RoutingCounts>) -> Result<Self, PlannerError> {
        let first = counts.values().next().ok_or(PlannerError::Zero { what: "number of traced steps" })?;
        let (num_ranks, num_experts) = (first.num_ranks(), first.num_experts());
        for ((layer, step), other) in &counts {
            for (what, expected, actual) in
                [("ranks", num_ranks, other.num_ranks()), ("experts", num_experts, other.num_experts())]
            {
                if expected != actual {
                    let what = format!("{what} of layer {layer}, step {step}");
                    return Err(PlannerError::Shape { what, expected, actual });
                }
            }
        }
        Ok(Self { num_ranks, num_experts, counts })
    }

    /// Reads a trace from CSV.
    ///
    /// # Errors
    ///
    /// [`TraceError`] naming the first line that is wrong and what was expected.
    pub fn from_csv(text: &str) -> Result<Self, TraceError> {
        let fail = |line: usize, problem: String| Err(TraceError::Line { line: line + 1, problem });
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let Some((at, header)) = lines.next() else { return Err(TraceError::Empty) };
        let columns: Vec<&str> = header.split(',').map(str::trim).collect();
        let num_experts = columns.len().saturating_sub(3);
        let expected: Vec<String> = ["layer".into(), "step".into(), "src_rank".into()]
            .into_iter()
            .chain((0..num_experts).map(|e| format!("expert{e}")))
            .collect();
        if num_experts == 0 || columns != expected {
            return fail(at, format!("expected the header `layer,step,src_rank,expert0,..`, got `{header}`"));
        }

        let mut rows: BTreeMap<(usize, usize), BTreeMap<usize, Vec<u32>>> = BTreeMap::new();
        for (at, line) in lines {
            let mut numbers = Vec::with_capacity(columns.len());
            for (column, field) in columns.iter().zip(line.split(',')) {
                match field.trim().parse::<u32>() {
                    Ok(number) => numbers.push(number),
                    Err(_) => return fail(at, format!("{column}: expected a whole number, got `{}`", field.trim())),
                }
            }
            let fields = line.split(',').count();
            if fields != columns.len() {
                return fail(at, format!("expected {} columns, got {fields}", columns.len()));
            }
            let counts = numbers.split_off(3);
            let (layer, step, rank) = (numbers[0] as usize, numbers[1] as usize, numbers[2] as usize);
            if rows.entry((layer, step)).or_default().insert(rank, counts).is_some() {
                return fail(at, format!("a second line for layer {layer}, step {step}, rank {rank}"));
            }
        }

        let num_ranks = rows.values().map(BTreeMap::len).max().ok_or(TraceError::Empty)?;
        let mut counts = BTreeMap::new();
        for ((layer, step), ranks) in rows {
            let incomplete = |problem: String| TraceError::Incomplete { layer, step, problem };
            if let Some(missing) = (0..num_ranks).find(|rank| !ranks.contains_key(rank)) {
                return Err(incomplete(format!("no line for rank {missing}; expected ranks 0..{num_ranks}")));
            }
            let table = RoutingCounts::new(num_ranks, num_experts, ranks.into_values().flatten().collect());
            counts.insert((layer, step), table.map_err(|error| incomplete(error.to_string()))?);
        }
        Ok(Self { num_ranks, num_experts, counts })
    }

    /// The trace as CSV.
    pub fn to_csv(&self) -> String {
        let mut text = "layer,step,src_rank".to_string();
        for expert in 0..self.num_experts {
            let _ = write!(text, ",expert{expert}");
        }
        text.push('\n');
        for ((layer, step), counts) in &self.counts {
            for rank in 0..self.num_ranks {
                let _ = write!(text, "{layer},{step},{rank}");
                for n in counts.row(rank) {
                    let _ = write!(text, ",{n}");
                }
                text.push('\n');
            }
        }
        text
    }

    /// World size `N`.
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// Experts `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The layers, ascending.
    pub fn layers(&self) -> Vec<usize> {
        let mut layers: Vec<usize> = self.counts.keys().map(|(layer, _)| *layer).collect();
        layers.dedup();
        layers
    }

    /// The steps of a layer with their counts, ascending.
    pub fn steps(&self, layer: usize) -> impl Iterator<Item = (usize, &RoutingCounts)> {
        self.counts.range((layer, 0)..=(layer, usize::MAX)).map(|((_, step), counts)| (*step, counts))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn round_trip() {
        let text = "layer,step,src_rank,expert0,expert1\n0,0,0,1,2\n0,0,1,3,4\n2,1,0,5,6\n2,1,1,7,8\n";
        let trace = Trace::from_csv(text).unwrap();
        assert_eq!(trace.to_csv(), text);
        assert_eq!(trace.layers(), [0, 2]);
        assert_eq!(trace.steps(2).next().unwrap().1.get(1, 0), 7);
    }

    #[test]
    fn errors_name_the_line_and_what_is_expected() {
        let header = "layer,step,src_rank,expert0,expert1\n";
        for (text, line, expected) in [
            ("step,layer\n", "line 1", "layer,step,src_rank"),
            (&format!("{header}0,0,0,1\n"), "line 2", "5 columns"),
            (&format!("{header}0,0,0,1,2,3\n"), "line 2", "5 columns"),
            (&format!("{header}\n0,0,0,1,x\n"), "line 3", "expert1: expected a whole number, got `x`"),
            (&format!("{header}0,0,0,1,-2\n"), "line 2", "whole number"),
            (&format!("{header}0,0,0,1,2\n0,0,0,1,2\n"), "line 3", "second line"),
            (&format!("{header}0,0,0,1,2\n0,0,2,1,2\n"), "layer 0, step 0", "rank 1"),
            (header, "empty", "layer,step"),
            ("", "empty", "layer,step"),
        ] {
            let error = Trace::from_csv(text).unwrap_err().to_string();
            assert!(error.contains(line) && error.contains(expected), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "\\PC*", tail in "[0-9,\n-]{0,200}") {
            let _ = Trace::from_csv(&text);
            let _ = Trace::from_csv(&format!("layer,step,src_rank,expert0\n{tail}"));
        }
    }
}
