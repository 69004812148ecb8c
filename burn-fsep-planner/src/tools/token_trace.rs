//! Traces of what each token's router chose: from them follow counts, and which ranks a token goes to.

use std::collections::BTreeMap;

use super::trace::{Trace, TraceError};
use crate::RoutingCounts;

/// The experts of each token of some layers in some steps.
///
/// As text CSV with one line a token: `layer,step,src_rank,choice0,choice1,..`, tokens of a rank in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTrace {
    /// Experts of each token of each rank, by layer and step. Shape `[N][T][K]`
    tokens: BTreeMap<(usize, usize), Vec<Vec<Vec<u32>>>>,
    num_experts: usize,
}

/// No trace has more ranks.
const MAX_RANKS: usize = 1 << 13;

impl TokenTrace {
    /// Reads a trace of `num_experts` experts from CSV.
    ///
    /// # Errors
    ///
    /// [`TraceError`] naming the first line that is wrong and what was expected.
    pub fn from_csv(text: &str, num_experts: usize) -> Result<Self, TraceError> {
        let fail = |line: usize, problem: String| Err(TraceError::Line { line: line + 1, problem });
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let Some((at, header)) = lines.next() else { return Err(TraceError::Empty) };
        let topk = header.split(',').count().saturating_sub(3);
        let choices: String = (0..topk).map(|k| format!(",choice{k}")).collect();
        if topk == 0 || header.trim() != format!("layer,step,src_rank{choices}") {
            return fail(at, format!("expected the header `layer,step,src_rank,choice0,..`, got `{header}`"));
        }
        let mut tokens: BTreeMap<(usize, usize), Vec<Vec<Vec<u32>>>> = BTreeMap::new();
        for (at, line) in lines {
            let fields: Result<Vec<u32>, _> = line.split(',').map(|field| field.trim().parse()).collect();
            let Some(mut numbers) = fields.ok().filter(|fields| fields.len() == topk + 3) else {
                return fail(at, format!("expected {} whole numbers, got `{line}`", topk + 3));
            };
            let experts = numbers.split_off(3);
            if let Some(expert) = experts.iter().find(|&&expert| expert as usize >= num_experts) {
                return fail(at, format!("expert {expert}: expected one of 0..{num_experts}"));
            }
            let rank = numbers[2] as usize;
            // A wrong number of a rank would ask for that much memory.
            if rank >= MAX_RANKS {
                return fail(at, format!("src_rank {rank}: expected one of 0..{MAX_RANKS}"));
            }
            let ranks = tokens.entry((numbers[0] as usize, numbers[1] as usize)).or_default();
            ranks.resize(ranks.len().max(rank + 1), Vec::new());
            ranks[rank].push(experts);
        }
        let num_ranks = tokens.values().map(Vec::len).max().ok_or(TraceError::Empty)?;
        tokens.values_mut().for_each(|ranks| ranks.resize(num_ranks, Vec::new()));
        Ok(Self { tokens, num_experts })
    }

    /// The counts.
    ///
    /// # Errors
    ///
    /// [`TraceError::Incomplete`] for a step whose counts do not fit 32 bits.
    pub fn counts(&self) -> Result<Trace, TraceError> {
        let mut counts = BTreeMap::new();
        for (&(layer, step), ranks) in &self.tokens {
            let mut table = vec![0u32; ranks.len() * self.num_experts];
            for (rank, tokens) in ranks.iter().enumerate() {
                tokens.iter().flatten().for_each(|&expert| table[rank * self.num_experts + expert as usize] += 1);
            }
            let of_step = RoutingCounts::new(ranks.len(), self.num_experts, table);
            let incomplete =
                |error: crate::PlannerError| TraceError::Incomplete { layer, step, problem: error.to_string() };
            counts.insert((layer, step), of_step.map_err(incomplete)?);
        }
        Trace::new(counts).map_err(|_| TraceError::Empty)
    }

    /// The experts of each token of each rank in the `step`-th traced step of a layer. Shape `[N][T][K]`
    pub fn tokens(&self, layer: usize, step: usize) -> Option<&[Vec<Vec<u32>>]> {
        let mut steps = self.tokens.range((layer, 0)..=(layer, usize::MAX));
        steps.nth(step).map(|(_, tokens)| tokens.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "layer,step,src_rank,choice0,choice1\n0,0,0,1,2\n0,0,1,0,2\n0,0,0,2,3\n0,5,0,3,1\n";

    #[test]
    fn tokens_are_read_and_counted() {
        let trace = TokenTrace::from_csv(TEXT, 4).unwrap();
        assert_eq!(trace.tokens(0, 0).unwrap(), [vec![vec![1, 2], vec![2, 3]], vec![vec![0, 2]]]);
        assert_eq!(trace.tokens(0, 1).unwrap(), [vec![vec![3, 1]], vec![]]);
        assert_eq!(trace.tokens(1, 0), None);
        let counts = trace.counts().unwrap();
        let (_, first) = counts.steps(0).next().unwrap();
        assert_eq!((first.row(0), first.row(1)), (&[0, 1, 2, 1][..], &[1, 0, 1, 0][..]));
    }

    #[test]
    fn damage_is_named_with_its_line() {
        for (text, part) in [
            ("", "empty"),
            ("layer,step,src_rank\n", "choice0"),
            ("layer,step,src_rank,choice0\n0,0,0\n", "line 2: expected 4 whole numbers"),
            ("layer,step,src_rank,choice0\n0,0,0,x\n", "line 2"),
            ("layer,step,src_rank,choice0\n0,0,0,4\n", "expert 4: expected one of 0..4"),
            ("layer,step,src_rank,choice0\n0,0,4000000000,1\n", "src_rank"),
            ("layer,step,src_rank,choice0\n", "empty"),
        ] {
            let error = TokenTrace::from_csv(text, 4).unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
