use super::{HubError, keys::Keys};

/// Rotary position embeddings.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How they are changed for longer sequences.
    pub scaling: RopeScaling,
    /// The part of a head's dimensions that is rotated: 1 is all of them.
    pub partial_rotary_factor: f64,
}

/// How frequencies are changed for sequences longer than those of pretraining, as `modeling_rope_utils.py` of transformers
/// computes it. Each kind has its keys there.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions are divided by the factor.
    Linear {
        /// How much longer sequences are.
        factor: f64,
    },
    /// The base grows with the sequence.
    Dynamic {
        /// How much longer sequences are.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// How much longer sequences are.
        factor: f64,
        /// The longest sequence of pretraining.
        original_max_position_embeddings: usize,
        /// Dimensions that turn more often than this in a sequence stay as they are.
        beta_fast: f64,
        /// Dimensions that turn less often than this are interpolated.
        beta_slow: f64,
        /// Factor of the rotated queries and keys; otherwise it follows from the others.
        attention_factor: Option<f64>,
        /// DeepSeek's factor in the attention factor's numerator.
        mscale: Option<f64>,
        /// DeepSeek's factor in its denominator.
        mscale_all_dim: Option<f64>,
        /// Whether the bounds between dimensions are whole numbers.
        truncate: bool,
    },
    /// Llama 3.1.
    Llama3 {
        /// How much longer sequences are.
        factor: f64,
        /// Wavelengths longer than the original length divided by this are stretched.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original length divided by this stay.
        high_freq_factor: f64,
        /// The longest sequence of pretraining.
        original_max_position_embeddings: usize,
    },
    /// LongRoPE (arXiv 2402.13753).
    LongRope {
        /// Factor of each dimension for sequences up to the original length.
        short_factor: Vec<f64>,
        /// And for longer ones.
        long_factor: Vec<f64>,
        /// How much longer sequences are, where it is given.
        factor: Option<f64>,
        /// Factor of the rotated queries and keys; otherwise it follows from the others.
        attention_factor: Option<f64>,
        /// The longest sequence of pretraining.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before), of which the latter goes first, as
    /// in transformers.
    pub(super) fn read(keys: Keys<'_>, default_theta: f64, if_none: RopeScaling) -> Result<Self, HubError> {
        let mut found = keys.find_object("rope_scaling", "rope_scaling.")?;
        if found.is_none_or(|found| found.object.is_empty()) {
            found = keys.find_object("rope_parameters", "rope_parameters.")?;
        }
        let theta = keys.f64_or("rope_theta", default_theta)?;
        let partial = keys.f64_or("partial_rotary_factor", 1.0)?;
        let Some(rope) = found.filter(|found| !found.object.is_empty()) else {
            return Ok(Self { theta, scaling: if_none, partial_rotary_factor: partial });
        };
        if let Some((kind, _)) = rope.object.iter().find(|(_, value)| value.is_object()) {
            return Err(rope.error(kind, "is of one type of layers: all layers of the known families have the same"));
        }
        Ok(Self {
            theta: rope.f64_or("rope_theta", theta)?,
            scaling: RopeScaling::read(rope, keys)?,
            partial_rotary_factor: rope.f64_or("partial_rotary_factor", partial)?,
        })
    }
}

impl RopeScaling {
    /// `keys` are those of the whole configuration.
    fn read(rope: Keys<'_>, keys: Keys<'_>) -> Result<Self, HubError> {
        let kind = match rope.find_str("rope_type")? {
            Some(kind) => kind,
            None => rope.find_str("type")?.unwrap_or("default"),
        };
        let original = || match keys.find_usize("original_max_position_embeddings")? {
            Some(original) => Ok(original),
            None => match rope.find_usize("original_max_position_embeddings")? {
                Some(original) => Ok(original),
                None => keys.size("max_position_embeddings"),
            },
        };
        Ok(match kind {
            "default" => Self::Default,
            "linear" => Self::Linear { factor: rope.f64("factor")? },
            "dynamic" => Self::Dynamic { factor: rope.f64("factor")? },
            "yarn" => Self::Yarn {
                factor: rope.f64("factor")?,
                original_max_position_embeddings: original()?,
                beta_fast: rope.f64_or("beta_fast", 32.0)?,
                beta_slow: rope.f64_or("beta_slow", 1.0)?,
                attention_factor: rope.find_f64("attention_factor")?,
                mscale: rope.find_f64("mscale")?,
                mscale_all_dim: rope.find_f64("mscale_all_dim")?,
                truncate: rope.bool_or("truncate", true)?,
            },
            "llama3" => Self::Llama3 {
                factor: rope.f64("factor")?,
                low_freq_factor: rope.f64("low_freq_factor")?,
                high_freq_factor: rope.f64("high_freq_factor")?,
                original_max_position_embeddings: original()?,
            },
            "longrope" => Self::LongRope {
                short_factor: rope
                    .find_f64s("short_factor")?
                    .ok_or_else(|| rope.error("short_factor", "is missing"))?,
                long_factor: rope.find_f64s("long_factor")?.ok_or_else(|| rope.error("long_factor", "is missing"))?,
                factor: rope.find_f64("factor")?,
                attention_factor: rope.find_f64("attention_factor")?,
                original_max_position_embeddings: original()?,
            },
            other => {
                let reason = format!("is `{other}`; known are default, linear, dynamic, yarn, llama3 and longrope");
                return Err(rope.error("rope_type", reason));
            }
        })
    }
}
