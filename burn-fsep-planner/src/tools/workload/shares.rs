use super::{
    Workload, WorkloadError, WorkloadShape,
    draws::{Draws, Purpose},
    rows::capped,
};

/// Share of the assignments that hot experts get in W1 to W3, W6 and W7.
const HOT_SHARE: f64 = 0.5;
/// Steps from burst to burst, and the place of the burst in them.
const BURSTS: (usize, usize) = (8, 5);
/// Part of the log-normal loads' variance that stays for ever, and correlation of the rest from step to step: together
/// 0.9 from one step to the next and 0.77 over five steps, as measured in training. No process without a lasting part
/// has both.
const LASTING: f64 = 0.75;
const CARRIED: f64 = 0.6;
/// Steps after which nothing is left of what was carried.
const FORGOTTEN: usize = 40;
/// How much nodes differ in a load, relatively.
const NODE_DEVIATION: f64 = 0.09;
/// The first step after the jump, and the part of the counts that moves in it.
const JUMP: (usize, f64) = (2, 0.4);
/// Deviation of log-loads in the drifting workloads.
const DRIFTING: f64 = 0.8;

/// Shares of the experts in the assignments of a node's ranks, 1 in all. Shape `[E]`.
pub(super) fn of_node(
    workload: Workload,
    shape: &WorkloadShape,
    layer: usize,
    step: usize,
    node: usize,
) -> Result<Vec<f64>, WorkloadError> {
    let experts = shape.num_experts;
    let draws = |purpose, at: usize| Draws::new(shape.seed, layer, purpose, at as u64);
    let places = || draws(Purpose::Places, 0).order(experts);
    let hot = (experts / 8).max(1);
    let weights = match workload {
        Workload::Balanced | Workload::SourceRagged => vec![1.0; experts],
        Workload::HotExpertSet => with_hot(experts, places().into_iter().take(hot), HOT_SHARE),
        Workload::HotRank => {
            let first = places()[0] / hot * hot;
            with_hot(experts, (first..first + hot).map(|e| e % experts), HOT_SHARE)
        }
        Workload::SpreadHotExperts => {
            let (first, distance) = (places()[0], experts / hot);
            with_hot(experts, (0..hot).map(|i| (first + i * distance) % experts), HOT_SHARE)
        }
        Workload::ZeroExpertRank => {
            let idle = (experts / 4).min(experts - shape.topk);
            let first = places()[0];
            let mut weights = vec![1.0; experts];
            (0..idle).for_each(|i| weights[(first + i) % experts] = 0.0);
            weights
        }
        Workload::RotatingHotspot => rotated(&places(), step, hot),
        Workload::Burst if step % BURSTS.0 == BURSTS.1 => rotated(&places(), step / BURSTS.0, hot),
        Workload::Burst => vec![1.0; experts],
        Workload::HotShare { percent, experts: hot } => {
            with_hot(experts, places().into_iter().take(hot), f64::from(percent) / 100.0)
        }
        Workload::ZipfPower(power) => zipf(&places(), power),
        Workload::ZipfImbalance(imbalance) => zipf_of(imbalance, &places(), shape).map_err(|most| {
            let problem = format!("max/mean is at most {most:.2}, since a token chooses an expert once");
            WorkloadError::Impossible { workload, problem }
        })?,
        Workload::LogNormal(sigma) => {
            let mut loads = in_training(sigma, shape, layer, step);
            let mut draws = draws(Purpose::Nodes, step * shape.topology.num_nodes() + node);
            loads.iter_mut().for_each(|load| *load *= (1.0 + NODE_DEVIATION * draws.normal()).max(0.1));
            loads
        }
        Workload::SuddenShift => exponentials(&normals(&mut draws(Purpose::Popularity, step / 10), experts), DRIFTING),
        Workload::SlowDrift => {
            let [from, to] = [step / 20, step / 20 + 1].map(|at| normals(&mut draws(Purpose::Popularity, at), experts));
            let done = (step % 20) as f64 / 20.0;
            exponentials(&from.iter().zip(&to).map(|(a, b)| a * (1.0 - done) + b * done).collect::<Vec<_>>(), DRIFTING)
        }
        Workload::Periodic => {
            let mut draws = draws(Purpose::Popularity, 0);
            let turn = (step % 8) as f64 / 8.0;
            let swing = |phase: f64| (2.0f64).sqrt() * (std::f64::consts::TAU * (turn + phase)).sin();
            exponentials(&(0..experts).map(|_| swing(draws.unit())).collect::<Vec<_>>(), DRIFTING)
        }
        Workload::NearUniform => exponentials(&normals(&mut draws(Purpose::Popularity, 0), experts), 0.02),
    };
    Ok(normalised(weights))
}

fn normalised(mut weights: Vec<f64>) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= sum);
    weights
}

/// Some experts share `share` alike, the others the rest.
fn with_hot(experts: usize, hot: impl Iterator<Item = usize>, share: f64) -> Vec<f64> {
    let mut is_hot = vec![false; experts];
    hot.for_each(|expert| is_hot[expert] = true);
    let number = is_hot.iter().filter(|&&hot| hot).count();
    let (each, other) = (share / number.max(1) as f64, (1.0 - share) / (experts - number).max(1) as f64);
    is_hot.into_iter().map(|hot| if hot { each } else { other }).collect()
}

/// The next `hot` experts of an order are hot with each turn.
fn rotated(order: &[usize], turn: usize, hot: usize) -> Vec<f64> {
    let experts = order.len();
    with_hot(experts, (0..hot).map(|i| order[(turn * hot + i) % experts]), HOT_SHARE)
}

fn normals(draws: &mut Draws, n: usize) -> Vec<f64> {
    (0..n).map(|_| draws.normal()).collect()
}

fn exponentials(logs: &[f64], sigma: f64) -> Vec<f64> {
    logs.iter().map(|log| (sigma * log).exp()).collect()
}

/// Log-normal loads that drift and jump. Shape `[E]`.
fn in_training(sigma: f64, shape: &WorkloadShape, layer: usize, step: usize) -> Vec<f64> {
    let experts = shape.num_experts;
    let lasting = normals(&mut Draws::new(shape.seed, layer, Purpose::Popularity, 0), experts);
    // A sum over past steps instead of a walk from the first: any step by itself, and no beginning.
    let mut carried = vec![0.0; experts];
    let mut weight = (1.0 - CARRIED * CARRIED).sqrt();
    for back in 0..FORGOTTEN {
        let mut draws = Draws::new(shape.seed, layer, Purpose::Step, (step as u64).wrapping_sub(back as u64));
        carried.iter_mut().for_each(|sum| *sum += weight * draws.normal());
        weight *= CARRIED;
    }
    let loads = |lasting: &[f64]| {
        let mixed = lasting.iter().zip(&carried).map(|(l, c)| LASTING.sqrt() * l + (1.0 - LASTING).sqrt() * c);
        normalised(exponentials(&mixed.collect::<Vec<_>>(), sigma))
    };
    let after = loads(&lasting);
    if step >= JUMP.0 {
        return after;
    }
    // Before the jump, popular experts were unpopular, as far as needed to move that part of the counts.
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|&a, &b| lasting[a].total_cmp(&lasting[b]));
    let mut reversed = vec![0.0; experts];
    order.iter().zip(order.iter().rev()).for_each(|(&a, &b)| reversed[a] = lasting[b]);
    let other = loads(&reversed);
    let distance: f64 = after.iter().zip(&other).map(|(a, b)| (a - b).abs() / 2.0).sum();
    let part = if distance > 0.0 { (JUMP.1 / distance).min(1.0) } else { 0.0 };
    after.iter().zip(&other).map(|(a, b)| a * (1.0 - part) + b * part).collect()
}

/// Loads that fall as a power of the place in an order.
fn zipf(order: &[usize], power: f64) -> Vec<f64> {
    let mut loads = vec![0.0; order.len()];
    order.iter().enumerate().for_each(|(place, &expert)| loads[expert] = (place as f64 + 1.0).powf(-power));
    normalised(loads)
}

/// Zipf loads that give static expert parallelism this max/mean, or the most that is possible.
fn zipf_of(imbalance: f64, order: &[usize], shape: &WorkloadShape) -> Result<Vec<f64>, f64> {
    // Neighbouring experts stand on one rank; where there are more ranks than experts, an expert has ranks of its own.
    let blocks = shape.num_ranks().min(shape.num_experts);
    let imbalance_of = |power: f64| {
        let mut loads = vec![0.0; blocks];
        for (expert, load) in capped(&zipf(order, power), 1.0, 1.0 / shape.topk as f64).into_iter().enumerate() {
            loads[expert * blocks / shape.num_experts] += load;
        }
        loads.into_iter().fold(0.0, f64::max) * blocks as f64
    };
    let (mut low, mut high) = (0.0, 8.0);
    let most = imbalance_of(high);
    if most < imbalance {
        return Err(most);
    }
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if imbalance_of(middle) < imbalance { low = middle } else { high = middle }
    }
    Ok(zipf(order, high))
}
