//! Models of each family beside what transformers computes: `tests/golden/make_golden.py`.

mod common;
mod finetune;
mod logits;
