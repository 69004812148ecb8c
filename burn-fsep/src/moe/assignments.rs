use burn::tensor::{Device, Int, IntDType, Slice, Tensor, TensorData};

/// The assignments (token, expert) of one rank, and their order by expert.
///
/// Assignment `t * K + k` is the `k`-th choice of token `t`; rows are assignments sorted by expert, stably.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignments {
    topk: usize,
    /// Assignments to each expert. Shape `[E]`.
    pub counts: Vec<u32>,
    /// Row of each assignment. Shape `[T * K]`.
    row_of: Vec<i32>,
    /// Assignment of each row. Shape `[T * K]`.
    assignment_of: Vec<i32>,
}

impl Assignments {
    /// Sorts assignments by expert. `experts`: `[T * K]`, each below `num_experts`.
    pub fn new(experts: &[u32], num_experts: usize, topk: usize) -> Self {
        let mut counts = vec![0u32; num_experts];
        for &expert in experts {
            counts[expert as usize] += 1;
        }
        let mut next: Vec<u32> = counts
            .iter()
            .scan(0, |start, &n| {
                *start += n;
                Some(*start - n)
            })
            .collect();
        let mut row_of = Vec::with_capacity(experts.len());
        let mut assignment_of = vec![0; experts.len()];
        for (assignment, &expert) in experts.iter().enumerate() {
            let row = &mut next[expert as usize];
            row_of.push(*row as i32);
            assignment_of[*row as usize] = assignment as i32;
            *row += 1;
        }
        Self { topk, counts, row_of, assignment_of }
    }

    /// [`row_of`, `assignment_of`, token of each row] on the device, sent in one piece. Shape `[T * K]` each.
    pub fn to_device(&self, device: &Device) -> [Tensor<1, Int>; 3] {
        let (device, len) = (device.clone().inner(), self.row_of.len());
        // In the device's own type: Burn would convert number by number, for longer than all else here takes.
        let data = match device.settings().int_dtype {
            IntDType::I64 => TensorData::new(self.indices(i64::from), [3 * len]),
            _ => TensorData::new(self.indices(|index| index), [3 * len]),
        };
        let all = Tensor::<1, Int>::from_data(data, &device);
        [0, 1, 2].map(|i| all.clone().slice([Slice::from(i * len..(i + 1) * len)]))
    }

    fn indices<I>(&self, convert: impl Fn(i32) -> I) -> Vec<I> {
        let topk = self.topk as i32;
        let mut all = Vec::with_capacity(3 * self.row_of.len());
        all.extend(self.row_of.iter().map(|&row| convert(row)));
        all.extend(self.assignment_of.iter().map(|&assignment| convert(assignment)));
        all.extend(self.assignment_of.iter().map(|&assignment| convert(assignment / topk)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_stable() {
        let sorted = Assignments::new(&[2, 0, 1, 2, 0, 1], 4, 2);
        assert_eq!(sorted.counts, [2, 2, 2, 0]);
        assert_eq!(sorted.assignment_of, [1, 4, 2, 5, 0, 3]);
        assert_eq!(sorted.row_of, [4, 0, 2, 5, 1, 3]);
    }
}
