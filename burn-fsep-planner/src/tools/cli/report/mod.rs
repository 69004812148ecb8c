//! `report`: one self-contained page about a trace.

mod figures;
mod page;

pub(super) use page::report;
