//! Model folders as Hugging Face transformers writes them (`save_pretrained`), read and written by any number of ranks.
//!
//! - [`HubFolder::open`] reads `config.json` and the tables of all files, and checks them;
//! - [`HubFolder::config`] says what the model is: [`ModelConfig`], for all families and versions of transformers alike;
//! - [`HubFolder::load`] fills a model whose fields have the names of transformers' modules; each rank reads its own part;
//! - [`HubFolder::save`] writes a model back under the same names.
//!
//! # Names
//!
//! A parameter is the tensor of its path (fields joined by dots, without variants of enums), with these exceptions:
//!
//! | in the model | in the folder |
//! | --- | --- |
//! | `weight [in, out]` of Burn's `Linear` | `weight [out, in]` |
//! | `gamma`, `beta` of Burn's norms | `weight`, `bias` |
//! | of an [`FSEPMoE`](crate::FSEPMoE) at `BLOCK` (`mlp`; in files of Mixtral `block_sparse_moe`): | |
//! | `BLOCK.router.weight [D, E]`, `.bias [E]` | `BLOCK.gate.weight [E, D]`; GPT-OSS `BLOCK.router.weight [E, D]`, `.bias [E]` |
//! | `BLOCK.router.expert_bias [E]` | `BLOCK.gate.e_score_correction_bias [E]` |
//! | `BLOCK.experts.weight`, this rank's part of `[E, P]` | `BLOCK.experts.e.{gate_proj,up_proj,down_proj}.weight` (Mixtral `w1`, `w3`, `w2`), or `BLOCK.experts.gate_up_proj [E, 2F, D]` and `BLOCK.experts.down_proj [E, D, F]`; of GPT-OSS these are `[E, D, 2F]` with gate and up in turns and `[E, F, D]`, or MXFP4, beside `..._bias` |
//! | `BLOCK.shared_expert.{gate_proj,up_proj,down_proj}.weight` | the same; DeepSeek `BLOCK.shared_experts...` |
//! | `BLOCK.shared_expert.gate.weight [D, 1]` | `BLOCK.shared_expert_gate.weight [1, D]` |
//!
//! Nothing is guessed from shapes. A tensor that is missing, not used, of another shape, cut off, or there under two names is an
//! error that names file and tensor, on all ranks, before anything is changed; so is a name that leads out of the folder.
//!
//! # Types
//!
//! Parameters keep their type: BF16, F16, F32 and F64 of files are rounded to it once. MXFP4 (GPT-OSS) and FP8 with a scale for
//! each block (DeepSeek-V3) are decoded while they are read.
//!
//! # Memory
//!
//! A rank reads the ranges of files that it needs, one parameter at a time: beside the model itself it holds one parameter and
//! some MB. Files are read by position, not mapped: mapped pages count as the process's memory until the system takes them back,
//! and a file that is cut off while it is mapped ends the process instead of a read.

mod config;
mod decode;
mod error;
mod experts;
mod family;
mod folder;
mod header;
mod hub_folder;
mod json;
mod keys;
mod layout;
mod load;
mod model;
mod moe_config;
mod moe_facts;
mod names;
mod output;
mod plan;
mod progress;
mod read;
mod regular_file;
mod rope;
mod save;
mod save_config;
mod stored;
mod values;
mod view;
mod write;
mod writer;

pub use config::{HiddenAct, LayerType, MlaConfig, ModelConfig, QkNorm, Quantization};
pub use error::HubError;
pub use family::Family;
pub use hub_folder::HubFolder;
pub use load::LoadConfig;
pub use moe_facts::{ClampedSwiGlu, MoeFacts, Scoring};
pub use progress::Progress;
pub use rope::{RopeConfig, RopeScaling};
pub use save_config::SaveConfig;
