use std::fmt;

use super::ReduceOp;

/// What a collective is for: names it in errors and signature checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Operation {
    /// For example `"tokens to experts, forward"`.
    pub name: &'static str,
    /// The FSEP layer that it serves, if it serves one.
    pub layer: Option<usize>,
    /// Which of the layer's passes it belongs to: tells the uses of one layer in one step apart.
    pub pass: Option<u64>,
    /// Fingerprint of the layout that it works under, where no pass has made sure that all ranks have the same.
    pub layout: Option<u64>,
    collective: Collective,
}

/// The collective that an exchange carries out, with what has to be equal on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Collective {
    AllToAll,
    AllGather { bytes: usize },
    AllReduce { op: ReduceOp, len: usize, number: &'static str, stage: Stage },
    Broadcast { bytes: usize, root: usize, stage: Stage },
}

/// Which of a collective's exchanges it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// The only one.
    Whole,
    /// The first of two: each rank gets its part.
    Parts,
    /// The second: all ranks get all parts.
    Result,
}

impl Operation {
    /// An operation that serves no layer in particular.
    pub const fn new(name: &'static str) -> Self {
        Self { name, layer: None, pass: None, layout: None, collective: Collective::AllToAll }
    }

    /// An operation of an FSEP layer.
    pub const fn of_layer(name: &'static str, layer: usize) -> Self {
        Self { layer: Some(layer), ..Self::new(name) }
    }

    /// The same operation as part of the layer's `pass`-th training pass.
    pub const fn in_pass(self, pass: u64) -> Self {
        Self { pass: Some(pass), ..self }
    }

    /// The same operation under the layout with this [`fingerprint`](burn_fsep_planner::Layout::fingerprint): ranks with
    /// other layouts find out where signatures are compared.
    pub const fn under_layout(self, fingerprint: u64) -> Self {
        Self { layout: Some(fingerprint), ..self }
    }

    pub(super) const fn by(self, collective: Collective) -> Self {
        Self { collective, ..self }
    }

    /// What has to be equal on all ranks that exchange something for this operation; engines compare it.
    pub fn signature(&self) -> String {
        match self.collective {
            Collective::AllToAll => format!("all-to-all `{self}`"),
            Collective::AllGather { bytes } => format!("all-gather `{self}` of {bytes} bytes"),
            Collective::AllReduce { op, len, number, stage } => {
                format!("all-reduce {op:?} `{self}` of {len} {number}{stage}")
            }
            Collective::Broadcast { bytes, root, stage } => {
                format!("broadcast `{self}` of {bytes} bytes from rank {root}{stage}")
            }
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if let Some(layer) = self.layer {
            write!(f, " of layer {layer}")?;
        }
        if let Some(pass) = self.pass {
            write!(f, " (pass {pass})")?;
        }
        if let Some(fingerprint) = self.layout {
            write!(f, " (layout {fingerprint:016x})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Whole => "",
            Stage::Parts => ", in parts",
            Stage::Result => ", result",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_say_what_they_serve() {
        assert_eq!(Operation::new("test").to_string(), "test");
        let operation = Operation::of_layer("unshard", 3);
        assert_eq!(operation.in_pass(7).to_string(), "unshard of layer 3 (pass 7)");
        assert_eq!(operation.under_layout(0xa1b2).to_string(), "unshard of layer 3 (layout 000000000000a1b2)");
    }

    #[test]
    fn signatures_say_what_has_to_be_equal() {
        let operation = Operation::of_layer("sum", 3);
        assert_eq!(operation.signature(), "all-to-all `sum of layer 3`");
        let reduce = Collective::AllReduce { op: ReduceOp::Sum, len: 2, number: "f32", stage: Stage::Parts };
        assert_eq!(operation.by(reduce).signature(), "all-reduce Sum `sum of layer 3` of 2 f32, in parts");
        let broadcast = Collective::Broadcast { bytes: 5, root: 1, stage: Stage::Whole };
        assert_eq!(operation.by(broadcast).signature(), "broadcast `sum of layer 3` of 5 bytes from rank 1");
    }
}
