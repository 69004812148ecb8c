//! Dispatch sits in every layer of every step: once its buffers have grown, it allocates nothing.
#![cfg(feature = "tools")]

use std::{
    alloc::{GlobalAlloc, Layout as MemoryLayout, System},
    cell::Cell,
};

use burn_fsep_planner::{
    Layout, Topology,
    dispatch::{DispatchPlan, Dispatcher, EvenSplit, MinMax},
    tools::workload::{Workload, WorkloadShape},
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: MemoryLayout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: MemoryLayout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn dispatch_allocates_nothing_in_the_steady_state() {
    let topology = Topology::uniform(32, 8).unwrap();
    let layout = Layout::static_ep(32, 4, 32).unwrap();
    // Static layouts and hot experts: the target is raised, and chains cross nodes.
    let shape = WorkloadShape { topology: topology.clone(), num_experts: 32, topk: 2, tokens_per_rank: 2048, seed: 1 };
    let counts: Vec<_> = (0..6).map(|step| Workload::RotatingHotspot.counts(&shape, 0, step).unwrap()).collect();
    for dispatcher in [&mut MinMax::new() as &mut dyn Dispatcher, &mut MinMax::exact(), &mut EvenSplit::new()] {
        let mut plan = DispatchPlan::new();
        let mut round = || {
            for counts in &counts {
                dispatcher.dispatch(&topology, &layout, counts, &mut plan).unwrap();
            }
        };
        round();
        let before = ALLOCATIONS.get();
        round();
        assert_eq!(ALLOCATIONS.get() - before, 0, "{}", dispatcher.name());
    }
    let before = ALLOCATIONS.get();
    drop(vec![1u8; 10]);
    assert_eq!(ALLOCATIONS.get() - before, 1, "the count counts");
}
