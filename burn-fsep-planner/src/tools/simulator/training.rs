use serde::{Deserialize, Serialize};

use super::{SimulatorError, cluster::at_least_one};

/// How the rows of tokens travel to the ranks that compute them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenRowsSpec {
    /// Once to each of a token's experts.
    #[default]
    ByAssignment,
    /// Once to each rank that has any of them.
    ByRank,
}

/// Where all that is no expert lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DenseParameters {
    /// Cut over all ranks and gathered layer by layer (FSDP), as in the paper's system.
    #[default]
    Sharded,
    /// Whole on each rank, as in burn-fsep; gradients are averaged behind backward.
    Replicated,
}

/// How a model is trained. All fields have defaults: those of mixed precision with AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingSpec {
    /// Bytes of a parameter and of its gradient. In mixed precision parameters are f32 and the master weights, and
    /// [`ModelSpec::element_bytes`](super::ModelSpec::element_bytes) is what computes.
    pub parameter_bytes: usize,
    /// Tensors of the optimizer's state: two of AdamW.
    pub optimizer_tensors: usize,
    /// Bytes of their elements.
    pub optimizer_bytes: usize,
    /// Bytes of a master weight beside the parameter; 0 without.
    pub master_bytes: usize,
    /// Last layers that keep their experts from forward to backward.
    pub kept_layers: usize,
    /// How tokens travel.
    pub token_rows: TokenRowsSpec,
    /// Where all that is no expert lives.
    pub dense_parameters: DenseParameters,
}

impl Default for TrainingSpec {
    fn default() -> Self {
        Self {
            parameter_bytes: 4,
            optimizer_tensors: 2,
            optimizer_bytes: 4,
            master_bytes: 0,
            kept_layers: 1,
            token_rows: TokenRowsSpec::ByAssignment,
            dense_parameters: DenseParameters::Sharded,
        }
    }
}

impl TrainingSpec {
    pub(super) fn check(&self) -> Result<(), SimulatorError> {
        at_least_one("parameter_bytes", self.parameter_bytes)?;
        for (field, value) in [
            ("parameter_bytes", self.parameter_bytes),
            ("optimizer_tensors", self.optimizer_tensors),
            ("optimizer_bytes", self.optimizer_bytes),
            ("master_bytes", self.master_bytes),
        ] {
            if value > 16 {
                return Err(SimulatorError::setting(field, value, "at most 16"));
            }
        }
        Ok(())
    }
}

/// `false`, `true` or `"experts"`.
pub(super) mod recompute {
    use std::fmt;

    use serde::{Deserializer, Serializer, de};

    use crate::memory::Recompute;

    pub(in super::super) fn serialize<S: Serializer>(value: &Recompute, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Recompute::None => serializer.serialize_bool(false),
            Recompute::Layers => serializer.serialize_bool(true),
            Recompute::Experts => serializer.serialize_str("experts"),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Recompute, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean, or \"experts\"")
            }

            fn visit_bool<E: de::Error>(self, layers: bool) -> Result<Recompute, E> {
                Ok(if layers { Recompute::Layers } else { Recompute::None })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Recompute, E> {
                match text {
                    "experts" => Ok(Recompute::Experts),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}
