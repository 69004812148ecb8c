use super::replicas::{PerReplica, replicate};
use crate::{
    Layout, PlannerError, Topology,
    placement::{LayoutRequest, LayoutSolver},
};

/// DeepSeek's expert parallelism load balancer (EPLB), a baseline.
///
/// Experts are replicated, always the one with the most load per replica; then replicas are packed to ranks in
/// descending load, each to the least loaded rank with a free slot. The *global* policy does so for all ranks at once. The
/// *hierarchical* policy first packs groups of experts to nodes by load, then replicates and packs within each node, so
/// that an expert stands on one node alone.
///
/// EPLB may put an expert on a rank twice; here it stands there at most once. A replica takes the least loaded rank that
/// does not hold its expert, and where only ranks that do have room, it changes places with a replica elsewhere.
#[derive(Debug, Clone)]
pub struct Eplb {
    /// How the hierarchical policy groups experts; `None` for the global policy.
    groups: Option<Groups>,
}

#[derive(Debug, Clone, Copy)]
enum Groups {
    /// Each expert is a group, which balances nodes best.
    Single,
    Of(usize),
}

impl Eplb {
    /// The global policy.
    pub fn global() -> Self {
        Self { groups: None }
    }

    /// The hierarchical policy for models without expert groups: each expert is a group of its own.
    pub fn hierarchical() -> Self {
        Self { groups: Some(Groups::Single) }
    }

    /// The hierarchical policy for `groups` groups of neighbouring experts, as group-limited routing has them.
    pub fn with_groups(groups: usize) -> Self {
        Self { groups: Some(Groups::Of(groups)) }
    }

    /// Number of groups if the hierarchical policy can be used: like EPLB, it wants equally many groups on equal nodes. A
    /// node also needs experts enough to fill a rank without repetition, and slots enough for its experts.
    fn usable_groups(&self, topology: &Topology, slots: usize, experts: usize) -> Option<usize> {
        let groups = match self.groups? {
            Groups::Single => experts,
            Groups::Of(groups) => groups,
        };
        let nodes = topology.num_nodes();
        let ranks = topology.ranks_of(0).len();
        let is_uniform = (0..nodes).all(|node| topology.ranks_of(node).len() == ranks);
        let divides = groups > 0 && experts.is_multiple_of(groups) && groups.is_multiple_of(nodes);
        let fits = (slots..=ranks * slots).contains(&(experts / nodes));
        (is_uniform && divides && fits).then_some(groups)
    }
}

impl LayoutSolver for Eplb {
    fn name(&self) -> &'static str {
        if self.groups.is_some() { "eplb-hierarchical" } else { "eplb" }
    }

    fn solve(&mut self, request: &LayoutRequest<'_>) -> Result<Layout, PlannerError> {
        request.check()?;
        let LayoutRequest { topology, slots_per_rank: slots, predicted, .. } = *request;
        let loads = predicted.expert_totals();
        let nodes = topology.num_nodes();
        let rows = match self.usable_groups(topology, slots, loads.len()) {
            None => place((0..loads.len()).collect(), &loads, topology.world_size(), slots),
            Some(groups) => {
                let size = loads.len() / groups;
                let group_loads: Vec<f64> = loads.chunks(size).map(|group| group.iter().sum::<u64>() as f64).collect();
                let items: Vec<(f64, u32)> = group_loads.into_iter().zip(0..).collect();
                let ranks = topology.ranks_of(0).len();
                let mut rows = Vec::with_capacity(topology.world_size());
                for groups in pack(items, nodes, groups / nodes) {
                    let experts = groups.into_iter().flat_map(|g| g as usize * size..(g as usize + 1) * size);
                    rows.extend(place(experts.collect(), &loads, ranks, slots));
                }
                rows
            }
        };
        Layout::from_rows(loads.len(), &rows)
    }
}

/// Replicates some experts on some ranks and packs the replicas. `[n][C]`
fn place(experts: Vec<usize>, loads: &[u64], ranks: usize, slots: usize) -> Vec<Vec<u32>> {
    let own: Vec<u64> = experts.iter().map(|&e| loads[e]).collect();
    let replicas = replicate(&own, ranks, ranks * slots);
    let mut items: Vec<(PerReplica, usize)> = Vec::with_capacity(ranks * slots);
    for ((&expert, &load), &count) in experts.iter().zip(&own).zip(&replicas) {
        items.extend(std::iter::repeat_n((PerReplica { load, replicas: count as u64 }, expert), count));
    }
    pack(items.into_iter().map(|(p, e)| (p.load as f64 / p.replicas as f64, e as u32)).collect(), ranks, slots)
}

/// Balanced packing: items in descending weight, each to the lightest pack with room that does not hold its like.
///
/// Expects `packs * room` items, and no more like items than packs.
fn pack(mut items: Vec<(f64, u32)>, packs: usize, room: usize) -> Vec<Vec<u32>> {
    // A stable sort: EPLB leaves the order of equal weights open, all ranks have to choose the same.
    items.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut packed: Vec<Vec<(f64, u32)>> = vec![Vec::with_capacity(room); packs];
    let mut weights = vec![0.0f64; packs];
    for item in items {
        let open = (0..packs).filter(|&p| packed[p].len() < room && packed[p].iter().all(|other| other.1 != item.1));
        let (pack, item) = match open.min_by(|&a, &b| weights[a].total_cmp(&weights[b]).then(a.cmp(&b))) {
            Some(pack) => (pack, item),
            None => exchange(&mut packed, &mut weights, item, room),
        };
        weights[pack] += item.0;
        packed[pack].push(item);
    }
    packed.into_iter().map(|pack| pack.into_iter().map(|(_, item)| item).collect()).collect()
}

/// Puts an item that no pack with room can take into the place of another. Gives that other item and a pack with room for
/// it, chosen so that the heavier of the two packs is as light as can be.
///
/// There is always one: a full pack without the item's like holds more kinds than a pack with room can share with it.
fn exchange(packed: &mut [Vec<(f64, u32)>], weights: &mut [f64], item: (f64, u32), room: usize) -> (usize, (f64, u32)) {
    let mut best: Option<(f64, usize, usize, usize)> = None;
    for free in (0..packed.len()).filter(|&p| packed[p].len() < room) {
        for full in (0..packed.len()).filter(|&p| packed[p].iter().all(|other| other.1 != item.1)) {
            for (place, other) in packed[full].iter().enumerate() {
                if packed[free].iter().all(|held| held.1 != other.1) {
                    let heavier = (weights[full] - other.0 + item.0).max(weights[free] + other.0);
                    if best.is_none_or(|(least, ..)| heavier < least) {
                        best = Some((heavier, free, full, place));
                    }
                }
            }
        }
    }
    let (_, free, full, place) = best.expect("no more like items than packs");
    let other = std::mem::replace(&mut packed[full][place], item);
    weights[full] += item.0 - other.0;
    (free, other)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{RoutingCounts, test_cases::cases};

    fn layout(mut solver: Eplb, topology: &Topology, slots: usize, loads: &[u32]) -> Layout {
        let ranks = topology.world_size();
        let counts = RoutingCounts::from_rows(&vec![loads.to_vec(); ranks]).unwrap();
        let request = LayoutRequest { topology, slots_per_rank: slots, predicted: &counts, previous: None };
        solver.solve(&request).unwrap()
    }

    #[test]
    fn hierarchical_keeps_groups_on_one_node() {
        let topology = Topology::uniform(8, 4).unwrap();
        let loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86];
        let layout = layout(Eplb::with_groups(4), &topology, 2, &loads);
        for group in 0..4 {
            let nodes: Vec<usize> = (group * 3..group * 3 + 3)
                .flat_map(|e| layout.ranks_of(e).iter().map(|&r| topology.node_of(r as usize)).collect::<Vec<_>>())
                .collect();
            assert!(nodes.windows(2).all(|pair| pair[0] == pair[1]), "group {group} stands on {nodes:?}");
        }
        // The result that EPLB's README gives for this example, as sets of experts by rank.
        let mut ranks: Vec<Vec<u32>> = (0..8).map(|rank| layout.experts_of(rank).to_vec()).collect();
        ranks.iter_mut().for_each(|experts| experts.sort_unstable());
        for node in ranks.chunks_mut(4) {
            node.sort();
        }
        assert_eq!(ranks[..4], [[3, 4], [4, 8], [5, 6], [5, 7]]);
        assert_eq!(ranks[4..], [[0, 1], [1, 11], [2, 10], [9, 10]]);
    }

    #[test]
    fn nodes_of_different_size_fall_back_to_the_global_policy() {
        let topology = Topology::new(&[4, 2]).unwrap();
        let loads = [50, 40, 30, 20, 10, 5];
        assert_eq!(layout(Eplb::hierarchical(), &topology, 2, &loads), layout(Eplb::global(), &topology, 2, &loads));
    }

    #[test]
    fn a_collision_is_exchanged() {
        // Expert 0 has a replica on every rank, so its last one meets a rank that has it already.
        let packed = pack(vec![(5.0, 0), (4.0, 1), (4.0, 1), (1.0, 0), (0.5, 2), (0.5, 3)], 2, 3);
        for pack in &packed {
            assert!(pack.contains(&0) && pack.contains(&1), "{packed:?}");
        }
        let packed = pack(vec![(3.0, 1), (2.0, 0), (0.0, 0), (0.0, 2)], 2, 2);
        assert!(packed.iter().all(|pack| pack.contains(&0)), "{packed:?}");
    }

    proptest! {
        #[test]
        fn layouts_are_deterministic_and_fit(case in cases(8, 12), groups in 1usize..8) {
            let request = LayoutRequest {
                topology: &case.topology,
                slots_per_rank: case.layout.slots_per_rank(),
                predicted: &case.counts,
                previous: Some(&case.layout),
            };
            for solver in [Eplb::global(), Eplb::hierarchical(), Eplb::with_groups(groups)] {
                let layout = solver.clone().solve(&request).unwrap();
                prop_assert_eq!(&layout, &solver.clone().solve(&request).unwrap());
                prop_assert_eq!(layout.as_slice().len(), case.layout.as_slice().len());
            }
        }
    }
}
