//! Burn's CPU backend.

use burn::backend::Flex;

use super::FsepOps;

impl FsepOps for Flex {}
