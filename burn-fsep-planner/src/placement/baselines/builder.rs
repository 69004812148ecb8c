use crate::{Layout, PlannerError};

/// A layout in the making.
#[derive(Debug, Clone)]
pub(super) struct LayoutBuilder {
    slots_per_rank: usize,
    num_experts: usize,
    rows: Vec<Vec<u32>>,
}

impl LayoutBuilder {
    pub fn new(num_ranks: usize, slots_per_rank: usize, num_experts: usize) -> Self {
        Self { slots_per_rank, num_experts, rows: vec![Vec::with_capacity(slots_per_rank); num_ranks] }
    }

    pub fn has_room(&self, rank: usize) -> bool {
        self.rows[rank].len() < self.slots_per_rank
    }

    pub fn holds(&self, rank: usize, expert: usize) -> bool {
        self.rows[rank].contains(&(expert as u32))
    }

    pub fn can_take(&self, rank: usize, expert: usize) -> bool {
        self.has_room(rank) && !self.holds(rank, expert)
    }

    pub fn put(&mut self, rank: usize, expert: usize) {
        debug_assert!(self.can_take(rank, expert));
        self.rows[rank].push(expert as u32);
    }

    /// Places a replica where only ranks that hold the expert already have room: moves another expert there and takes
    /// its slot. Returns false if no exchange of one expert helps.
    pub fn put_by_exchange(&mut self, expert: usize) -> bool {
        for free in (0..self.rows.len()).filter(|&rank| self.has_room(rank)) {
            for rank in (0..self.rows.len()).filter(|&rank| !self.holds(rank, expert)) {
                let movable = self.rows[rank].iter().position(|&other| !self.rows[free].contains(&other));
                if let Some(slot) = movable {
                    let other = std::mem::replace(&mut self.rows[rank][slot], expert as u32);
                    self.rows[free].push(other);
                    return true;
                }
            }
        }
        false
    }

    pub fn finish(self) -> Result<Layout, PlannerError> {
        Layout::from_rows(self.num_experts, &self.rows)
    }
}
