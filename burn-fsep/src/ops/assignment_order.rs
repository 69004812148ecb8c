//! The order of assignments by expert, found in host memory, and what its ends tell.

use burn::tensor::{DType, TensorData};

use crate::FsepError;

/// Built in the device's own type: Burn would convert number by number.
pub(super) fn with_dtype(values: Vec<i64>, dtype: DType) -> TensorData {
    let len = [values.len()];
    match dtype {
        DType::I32 => TensorData::new(values.into_iter().map(|value| value as i32).collect(), len),
        DType::I64 => TensorData::new(values, len),
        _ => TensorData::new(values, len).convert_dtype(dtype),
    }
}

/// Assignments of each expert, from where the rows of each, of none, and of what is no expert end. `[E + 2] -> [E]`
///
/// # Errors
///
/// [`FsepError::NoExpert`] if an assignment has none, [`FsepError::Shape`] if one is to what is no expert.
pub fn counts_of(ends: &[u32], layer: usize, rank: usize) -> Result<impl Iterator<Item = u32>, FsepError> {
    let experts = ends.len() - 2;
    let last = if experts == 0 { 0 } else { ends[experts - 1] };
    if ends[experts + 1] != ends[experts] {
        return Err(FsepError::Shape {
            what: format!("experts that rank {rank} chose in layer {layer}"),
            expected: format!("0 to {}, or {experts} for none", experts.saturating_sub(1)),
            actual: format!("{} others", ends[experts + 1] - ends[experts]),
        });
    }
    if ends[experts] != last {
        return Err(FsepError::NoExpert { layer, rank });
    }
    let starts = std::iter::once(0).chain(ends.iter().copied());
    Ok(starts.zip(ends).map(|(start, end)| end - start).take(experts))
}

/// Assignments sorted by expert, stably.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct AssignmentOrder {
    pub row_of: Vec<usize>,
    pub assignment_of: Vec<usize>,
    pub ends: Vec<usize>,
}

impl AssignmentOrder {
    /// Counting sort. `[T * K]`, `E` for none; everything else comes last.
    pub fn new(experts: &[i64], num_experts: usize) -> Self {
        let last = num_experts + 1;
        let group = |expert: i64| usize::try_from(expert).map_or(last, |expert| expert.min(last));
        let mut ends = vec![0; num_experts + 2];
        experts.iter().for_each(|&expert| ends[group(expert)] += 1);
        let mut next = Vec::with_capacity(ends.len());
        let mut start = 0;
        for end in &mut ends {
            next.push(start);
            start += *end;
            *end = start;
        }
        let mut row_of = Vec::with_capacity(experts.len());
        let mut assignment_of = vec![0; experts.len()];
        for (assignment, &expert) in experts.iter().enumerate() {
            let row = &mut next[group(expert)];
            row_of.push(*row);
            assignment_of[*row] = assignment;
            *row += 1;
        }
        Self { row_of, assignment_of, ends }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_stable() {
        let sorted = AssignmentOrder::new(&[2, 0, 1, 2, 4, 0, 1], 4);
        assert_eq!(sorted.ends, [2, 4, 6, 6, 7, 7]);
        assert_eq!(sorted.assignment_of, [1, 5, 2, 6, 0, 3, 4]);
        assert_eq!(sorted.row_of, [4, 0, 2, 5, 6, 1, 3]);
    }

    #[test]
    fn what_is_no_expert_comes_last() {
        let sorted = AssignmentOrder::new(&[-1, 3, 1, i64::MAX, 0, 2], 2);
        assert_eq!(sorted.ends, [1, 2, 3, 6]);
        assert_eq!(sorted.assignment_of, [4, 2, 5, 0, 1, 3]);
    }

    #[test]
    fn counts_are_those_of_experts_alone() {
        let counts = |ends: &[u32]| counts_of(ends, 3, 1).map(Iterator::collect::<Vec<_>>);
        assert_eq!(counts(&[2, 4, 4, 4]), Ok(vec![2, 2]));
        assert_eq!(counts(&[2, 4, 5, 5]), Err(FsepError::NoExpert { layer: 3, rank: 1 }));
        let error = counts(&[2, 4, 5, 8]).unwrap_err().to_string();
        assert_eq!(error, "experts that rank 1 chose in layer 3: expected 0 to 1, or 2 for none, got 3 others");
    }
}
