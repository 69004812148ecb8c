//! Fine-tuning: text and a model's folder in, a model's folder out.

mod command;
mod record;
mod train;

pub use command::finetune;
