/// How the gradients of micro-batches make those of an optimizer step.
///
/// With unequally large micro-batches the mean is still that of the micro-batches' gradients: a small one counts as much as
/// a large one. Where that matters, weigh their losses, or make micro-batches of equal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accumulation {
    /// Their mean: four micro-batches of `b` items each train as one batch of `4 b` does.
    #[default]
    Mean,
    /// Their sum, as burn-train's own strategies have it. The more micro-batches, the larger the step, and the sooner
    /// clipping has something to do.
    Sum,
}
