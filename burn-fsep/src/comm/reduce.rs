/// How an all-reduce combines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Sum, in rank order: the same bits on every rank and in every run.
    Sum,
    /// Sum divided by the world size.
    Mean,
    /// Maximum.
    Max,
}

/// Numbers that an all-reduce replaces by their combination over ranks.
#[derive(Debug)]
pub enum ReduceBuffer<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Double precision.
    F64(&'a mut [f64]),
}
