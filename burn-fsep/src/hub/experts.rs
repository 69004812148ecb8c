//! Where the experts of a layer stand in a folder.

use super::{
    Family, HubError,
    plan::Lookup,
    stored::{Storage, StoredTensor},
    view::View,
};
use crate::shard::ExpertShape;

/// A part of an expert's flat vector: where it starts there, and what it is of which tensor.
#[derive(Debug, Clone)]
pub(super) struct ExpertPart {
    pub at: usize,
    pub tensor: String,
    pub view: View,
}

/// Tensors that have the experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Three for each expert.
    Single,
    /// Two for all experts (and two of biases).
    Fused,
}

/// The parts of each expert, in their order.
///
/// # Errors
///
/// [`HubError::Missing`], [`HubError::TwoNames`], [`HubError::Shape`].
pub(super) fn expert_parts(
    lookup: &Lookup<'_>,
    parameter: &str,
    blocks: &[String],
    num_experts: usize,
    shape: ExpertShape,
) -> Result<Vec<Vec<ExpertPart>>, HubError> {
    if !shape.gated {
        return Err(HubError::unsupported(
            parameter,
            "its experts have no gate, and those of all known families have one",
        ));
    }
    let family = lookup.family();
    let found = |block: &String, format| {
        let first = match format {
            Format::Single => lookup.with_prefix(&format!("{block}.experts.")).find(|name| is_single(block, name)),
            Format::Fused => {
                let names = ["gate_up_proj", "down_proj"].map(|name| format!("{block}.experts.{name}"));
                names.into_iter().find(|name| lookup.get(name).is_some())
            }
        };
        first.map(|tensor| (block.clone(), format, tensor))
    };
    let mut all =
        blocks.iter().flat_map(|block| [Format::Single, Format::Fused].map(|format| found(block, format))).flatten();
    let Some((block, format, tensor)) = all.next() else {
        let format = if family == Family::GptOss { Format::Fused } else { Format::Single };
        let first = match format {
            Format::Single => single(family, &blocks[0], 0)[0].clone(),
            Format::Fused => format!("{}.experts.gate_up_proj", blocks[0]),
        };
        return Err(lookup.missing(&first, parameter));
    };
    if let Some((.., other)) = all.next() {
        return Err(lookup.two_names(&tensor, &other));
    }
    let finder = Finder { lookup, parameter, shape };
    match format {
        Format::Single => (0..num_experts).map(|expert| finder.single(&single(family, &block, expert))).collect(),
        Format::Fused => finder.fused(&block, num_experts),
    }
}

/// Whether a name is that of an expert by itself.
fn is_single(block: &str, name: &str) -> bool {
    let rest = name.strip_prefix(block).and_then(|rest| rest.strip_prefix(".experts."));
    rest.and_then(|rest| rest.split('.').next()).is_some_and(|number| number.parse::<usize>().is_ok())
}

/// Names of gate, up and down.
fn single(family: Family, block: &str, expert: usize) -> [String; 3] {
    family.projections().map(|projection| format!("{block}.experts.{expert}.{projection}.weight"))
}

struct Finder<'a> {
    lookup: &'a Lookup<'a>,
    parameter: &'a str,
    shape: ExpertShape,
}

impl Finder<'_> {
    fn find(&self, name: &str, shape: &[usize]) -> Result<&StoredTensor, HubError> {
        self.lookup.expect(name, self.parameter, shape)
    }

    fn single(&self, [gate, up, down]: &[String; 3]) -> Result<Vec<ExpertPart>, HubError> {
        let ExpertShape { hidden, ffn, bias, .. } = self.shape;
        let mut at = 0;
        let mut parts = Vec::with_capacity(3);
        for (name, shape) in [(gate, [ffn, hidden]), (up, [ffn, hidden]), (down, [hidden, ffn])] {
            let tensor = self.find(name, &shape)?;
            parts.push(ExpertPart { at, tensor: name.clone(), view: View::run(0, tensor.len()) });
            at += tensor.len();
        }
        if bias {
            let name = format!("{}.bias", gate.trim_end_matches(".weight"));
            return Err(self.lookup.missing(&name, self.parameter));
        }
        Ok(parts)
    }

    fn fused(&self, block: &str, experts: usize) -> Result<Vec<Vec<ExpertPart>>, HubError> {
        let ExpertShape { hidden, ffn, bias, .. } = self.shape;
        let name = |name: &str| format!("{block}.experts.{name}");
        let (gate_up, down) = (name("gate_up_proj"), name("down_proj"));
        let is_gpt_oss = self.lookup.family() == Family::GptOss;
        // GPT-OSS has [in, out] weights, but [out, in] where they are quantised, in blocks along `in`.
        let is_quantised =
            |name: &str| self.lookup.get(name).is_some_and(|tensor| matches!(tensor.storage, Storage::Mxfp4 { .. }));
        let is_transposed = |name: &str| is_gpt_oss && !is_quantised(name);
        let matrix = |name: &str, [rows, columns]: [usize; 2]| {
            let shape = if is_transposed(name) { [experts, columns, rows] } else { [experts, rows, columns] };
            self.find(name, &shape)?;
            Ok::<_, HubError>(is_transposed(name) || is_gpt_oss && self.lookup.as_written)
        };
        let (first_is_transposed, down_is_transposed) =
            (matrix(&gate_up, [2 * ffn, hidden])?, matrix(&down, [hidden, ffn])?);
        let biases = [name("gate_up_proj_bias"), name("down_proj_bias")];
        if bias {
            self.find(&biases[0], &[experts, 2 * ffn])?;
            self.find(&biases[1], &[experts, hidden])?;
        }
        let parts = |expert: usize| {
            let (half, base, down_base) = (ffn * hidden, expert * 2 * ffn * hidden, expert * ffn * hidden);
            let mut parts = Vec::with_capacity(6);
            let mut add = |at, tensor: &String, view| parts.push(ExpertPart { at, tensor: tensor.clone(), view });
            match (is_gpt_oss, first_is_transposed) {
                (false, _) => add(0, &gate_up, View::run(base, 2 * half)),
                // Gate and up in turns.
                (true, true) => [0, 1].into_iter().for_each(|part| {
                    add(part * half, &gate_up, View::every_column_transposed(base + part, ffn, hidden, 2));
                }),
                (true, false) => [0, 1].into_iter().for_each(|part| {
                    add(part * half, &gate_up, View::every_row(base + part * hidden, ffn, hidden, 2));
                }),
            }
            let view =
                if down_is_transposed { View::transposed(down_base, hidden, ffn) } else { View::run(down_base, half) };
            add(2 * half, &down, view);
            if bias {
                let start = self.shape.bias_start();
                [0, 1].into_iter().for_each(|part| {
                    add(start + part * ffn, &biases[0], View::every(expert * 2 * ffn + part, ffn, 2));
                });
                add(start + 2 * ffn, &biases[1], View::run(expert * hidden, hidden));
            }
            parts
        };
        Ok((0..experts).map(parts).collect())
    }
}
