use std::{cmp::Reverse, collections::BinaryHeap};

use super::flow::Flow;
use crate::Layout;

/// Cheapest chains from ranks above a target load to ranks below it: successive shortest paths with potentials, the
/// classic algorithm for flows of minimum cost (e.g. Ahuja, Magnanti, Orlin: Network Flows, 1993, section 9.7).
///
/// The network's nodes are ranks, groups (an expert's holders on one node) and experts. A chain leaves a rank for the
/// group of an expert that it computes, and enters another holder of that group, or goes through the expert to a group on
/// another node. An edge's flow up to its holder's own tokens stays on its rank, the rest has left; a group's flow up to
/// its node's own tokens stays on its node. So to take what has stayed costs a token that leaves, to give what will stay
/// gains one, and all else is free. A token that leaves its node costs more than all ranks of a chain can gain.
///
/// The flow before the first push has the fewest tokens that leave of all; pushing along cheapest chains only keeps that
/// true for the loads reached.
///
/// Potentials make all costs non-negative and the cheapest chains those of cost 0, which a breadth-first search finds.
/// When no rank above the target has one left, the potentials are raised to the next cost. Most calls never do.
#[derive(Debug, Clone, Default)]
pub(super) struct Search {
    /// Cost of a token that leaves its rank, and of one that leaves its node.
    prices: [u32; 2],
    /// Cost of the cheapest chain to each node. Shape `[nodes]`.
    potentials: Vec<u32>,
    /// How each node was reached. Shape `[nodes]`.
    steps: Vec<Step>,
    /// The search that reached each node last, or [`DEAD`]. Shape `[nodes]`.
    reached_in: Vec<u32>,
    /// Number of the search at hand.
    number: u32,
    queue: Vec<u32>,
    /// For raising potentials: distance of each node beyond its potential, shape `[nodes]`, and nodes by distance.
    distances: Vec<u32>,
    frontier: BinaryHeap<Reverse<(u32, u32)>>,
}

/// What chains cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prices {
    /// Nothing: only loads matter.
    Free,
    /// Fewest tokens that leave their node, then fewest that leave their rank.
    Lexicographic,
}

/// How a node was reached: from which node, and over which edge between rank and group.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    from: u32,
    edge: u32,
    /// Cost of the step.
    cost: i32,
}

/// No node before: a rank above the target.
const START: u32 = u32::MAX;
/// No chain of cost 0 leads from here to a rank below the target. Pushes do not change that: they use no dead node.
const DEAD: u32 = u32::MAX;
/// Not reached.
const FAR: u32 = u32::MAX;

/// The network's size. Nodes are numbered ranks first, then groups, then experts.
#[derive(Debug, Clone, Copy)]
struct Network<'a> {
    layout: &'a Layout,
    first_expert: usize,
    nodes: usize,
    target: u64,
}

impl Search {
    /// Pushes load until no rank is above the target. Returns the target, raised to the smallest that can be reached.
    pub fn balance(&mut self, flow: &mut Flow, layout: &Layout, target: u64, prices: Prices) -> u64 {
        let first_expert = layout.num_ranks() + flow.groups.len();
        let mut network = Network { layout, first_expert, nodes: first_expert + layout.num_experts(), target };
        self.prices = match prices {
            Prices::Free => [0, 0],
            Prices::Lexicographic => [1, layout.num_ranks() as u32 + 1],
        };
        self.potentials.clear();
        self.potentials.resize(network.nodes, 0);
        self.steps.clear();
        self.steps.resize(network.nodes, Step::default());
        while self.push_free(flow, network) {
            if !self.raise_potentials(flow, network) {
                let reached = flow.loads.iter().zip(&self.distances).filter(|(_, distance)| **distance != FAR);
                let (sum, count) = reached.fold((0, 0), |(sum, count), (&load, _)| (sum + load, count + 1));
                network.target = u64::div_ceil(sum, count);
                // Chains were cheapest for the target before; now only the target matters.
                self.prices = [0, 0];
                self.potentials.fill(0);
            }
        }
        network.target
    }

    /// Pushes along chains of cost 0 until there are none. Returns whether a rank is still above the target.
    fn push_free(&mut self, flow: &mut Flow, network: Network) -> bool {
        self.reached_in.clear();
        self.reached_in.resize(network.nodes, 0);
        self.number = 0;
        let mut is_over = false;
        for rank in 0..network.layout.num_ranks() {
            while flow.loads[rank] > network.target {
                if !self.push_from(rank, flow, network) {
                    self.queue.iter().for_each(|&node| self.reached_in[node as usize] = DEAD);
                    is_over = true;
                    break;
                }
            }
        }
        is_over
    }

    /// Searches breadth-first from a rank and pushes along each chain found, until the rank is at the target. Returns
    /// whether anything was pushed; if not, `queue` has all nodes that were reached.
    fn push_from(&mut self, source: usize, flow: &mut Flow, network: Network) -> bool {
        self.number += 1;
        self.queue.clear();
        self.queue.push(source as u32);
        self.steps[source].from = START;
        self.reached_in[source] = self.number;
        let mut pushed = false;
        let mut at = 0;
        while let Some(&node) = self.queue.get(at) {
            at += 1;
            let node = node as usize;
            if node < network.layout.num_ranks() && flow.loads[node] < network.target {
                pushed |= self.push(flow, network, node);
                if flow.loads[source] <= network.target {
                    break;
                }
                continue;
            }
            for_each_step(flow, network, self.prices, node, |to, edge, cost| {
                let before = self.reached_in[to];
                let is_free = cost + self.potentials[node] as i32 == self.potentials[to] as i32;
                if is_free && before != self.number && before != DEAD {
                    self.reached_in[to] = self.number;
                    self.steps[to] = Step { from: node as u32, edge: edge as u32, cost };
                    self.queue.push(to as u32);
                }
            });
        }
        pushed
    }

    /// Raises potentials so that the cheapest chain from any rank above the target to one below it is free. Returns
    /// false if there is none; then `distances` tells which nodes can be reached.
    fn raise_potentials(&mut self, flow: &Flow, network: Network) -> bool {
        self.distances.clear();
        self.distances.resize(network.nodes, FAR);
        self.frontier.clear();
        for (rank, _) in flow.loads.iter().enumerate().filter(|(_, load)| **load > network.target) {
            self.distances[rank] = 0;
            self.frontier.push(Reverse((0, rank as u32)));
        }
        while let Some(Reverse((distance, node))) = self.frontier.pop() {
            let node = node as usize;
            if self.distances[node] != distance {
                continue;
            }
            if node < network.layout.num_ranks() && flow.loads[node] < network.target {
                for (potential, &far) in self.potentials.iter_mut().zip(&self.distances) {
                    *potential += far.min(distance);
                }
                return true;
            }
            for_each_step(flow, network, self.prices, node, |to, _, cost| {
                let reduced = cost + self.potentials[node] as i32 - self.potentials[to] as i32;
                debug_assert!(reduced >= 0, "potentials keep costs from being negative");
                let next = distance + reduced as u32;
                if next < self.distances[to] {
                    self.distances[to] = next;
                    self.frontier.push(Reverse((next, to as u32)));
                }
            });
        }
        false
    }

    /// Pushes as much as fits along the chain that ends at `spare`; chains used before may have left nothing.
    fn push(&self, flow: &mut Flow, network: Network, spare: usize) -> bool {
        let Network { layout, first_expert, target, .. } = network;
        let ranks = layout.num_ranks();
        let mut amount = target - flow.loads[spare];
        let mut node = spare;
        loop {
            let Step { from, edge, cost } = self.steps[node];
            if from == START {
                break;
            }
            let (from, edge) = (from as usize, edge as usize);
            let fits = if from < ranks {
                takes(flow.edges[edge], flow.own[edge], cost, self.prices[0])
            } else if node < ranks {
                gives(flow.edges[edge], flow.own[edge], cost, self.prices[0])
            } else if node >= first_expert {
                let group = flow.groups[from - ranks];
                takes(group.flow, group.supply, cost, self.prices[1])
            } else {
                let group = flow.groups[node - ranks];
                gives(group.flow, group.supply, cost, self.prices[1])
            };
            amount = amount.min(u64::from(fits));
            node = from;
        }
        amount = amount.min(flow.loads[node].saturating_sub(target));
        if amount == 0 {
            return false;
        }
        flow.loads[node] -= amount;
        flow.loads[spare] += amount;
        let amount = amount as u32;
        let mut node = spare;
        loop {
            let Step { from, edge, .. } = self.steps[node];
            if from == START {
                return true;
            }
            let from = from as usize;
            if from < ranks {
                flow.edges[edge as usize] -= amount;
            } else if node < ranks {
                flow.edges[edge as usize] += amount;
            } else if node >= first_expert {
                flow.groups[from - ranks].flow -= amount;
            } else {
                flow.groups[node - ranks].flow += amount;
            }
            node = from;
        }
    }
}

/// How much can be taken of a flow at this cost, if what is within `home` costs `price`.
fn takes(flow: u32, home: u32, cost: i32, price: u32) -> u32 {
    let away = flow.saturating_sub(home);
    match (price, cost) {
        (0, _) => flow,
        (_, 0) => away,
        _ if away > 0 => 0,
        _ => flow,
    }
}

/// How much can be given to a flow at this cost, if what is within `home` gains `price`.
fn gives(flow: u32, home: u32, cost: i32, price: u32) -> u32 {
    let below = home.saturating_sub(flow);
    match (price, cost) {
        (0, _) => u32::MAX,
        (_, 0) if below > 0 => 0,
        (_, 0) => u32::MAX,
        _ => below,
    }
}

/// The steps from a node, as next node, edge between rank and group, and cost.
fn for_each_step(
    flow: &Flow,
    network: Network,
    prices: [u32; 2],
    node: usize,
    mut step: impl FnMut(usize, usize, i32),
) {
    let Network { layout, first_expert, .. } = network;
    let ranks = layout.num_ranks();
    let [leave_rank, leave_node] = prices.map(|price| price as i32);
    let taken = |flow: u32, home: u32, price: i32| if flow <= home { price } else { 0 };
    let given = |flow: u32, home: u32, price: i32| if flow < home { -price } else { 0 };
    if node < ranks {
        for slot in 0..layout.slots_per_rank() {
            let edge = flow.edge_of(layout, node, slot);
            if flow.edges[edge] > 0 {
                let cost = taken(flow.edges[edge], flow.own[edge], leave_rank);
                step(ranks + flow.group_of[edge] as usize, edge, cost);
            }
        }
    } else if node < first_expert {
        let group = flow.groups[node - ranks];
        for edge in group.edges() {
            let cost = given(flow.edges[edge], flow.own[edge], leave_rank);
            step(layout.holders()[edge] as usize, edge, cost);
        }
        let expert = group.expert as usize;
        let is_only_group = flow.group_starts[expert + 1] - flow.group_starts[expert] == 1;
        if group.flow > 0 && !is_only_group {
            step(first_expert + expert, 0, taken(group.flow, group.supply, leave_node));
        }
    } else {
        let expert = node - first_expert;
        for group in flow.group_starts[expert] as usize..flow.group_starts[expert + 1] as usize {
            let cost = given(flow.groups[group].flow, flow.groups[group].supply, leave_node);
            step(ranks + group, 0, cost);
        }
    }
}
