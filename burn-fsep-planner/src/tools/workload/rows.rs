use super::draws::Draws;

/// Adds a rank's counts as close to the shares as whole numbers can be. Ranks take turns in what does not divide, so that
/// equal shares give equal totals.
pub(super) fn push_exact(counts: &mut Vec<u32>, shares: &[f64], rank: usize, tokens: u32, topk: usize) {
    let total = u64::from(tokens) * topk as u64;
    let loads = capped(shares, total as f64, f64::from(tokens));
    let missing = total % shares.len() as u64;
    push_rounded(counts, &loads, total, tokens, (rank as u64 * missing) as usize % shares.len());
}

/// Adds a rank's counts as its tokens happen to choose them: each expert's count deviates from its share like the number
/// of successes among the tokens.
pub(super) fn push_sampled(counts: &mut Vec<u32>, shares: &[f64], tokens: u32, topk: usize, draws: &mut Draws) {
    let (total, limit) = (u64::from(tokens) * topk as u64, f64::from(tokens));
    let mut loads = capped(shares, total as f64, limit);
    for load in &mut loads {
        let deviation = (*load * (1.0 - *load / limit.max(1.0)).max(0.0)).sqrt();
        *load = (*load + deviation * draws.normal()).clamp(0.0, limit);
    }
    push_rounded(counts, &capped(&loads, total as f64, limit), total, tokens, 0);
}

/// Loads in proportion to weights, `total` in all, none above `limit`: what is cut goes to the others in proportion, and
/// where too few have a weight, to those without. Expects `total <= limit * len`.
pub(super) fn capped(weights: &[f64], total: f64, limit: f64) -> Vec<f64> {
    let mut loads = vec![0.0; weights.len()];
    let mut is_full = vec![false; weights.len()];
    loop {
        let left = total - limit * is_full.iter().filter(|&&full| full).count() as f64;
        let open: f64 = weights.iter().zip(&is_full).filter(|(_, full)| !**full).map(|(weight, _)| weight).sum();
        let mut any_more = false;
        for (i, &weight) in weights.iter().enumerate() {
            if is_full[i] {
                continue;
            }
            loads[i] = if open > 0.0 { weight / open * left } else { 0.0 };
            if loads[i] > limit {
                loads[i] = limit;
                is_full[i] = true;
                any_more = true;
            }
        }
        if !any_more {
            if open <= 0.0 && left > 0.0 {
                let idle = is_full.iter().filter(|&&full| !full).count() as f64;
                loads.iter_mut().zip(&is_full).filter(|(_, full)| !**full).for_each(|(load, _)| *load = left / idle);
            }
            return loads;
        }
    }
}

/// Rounds loads to whole numbers, `total` in all, none above `limit`: all down, and then those up that lost most, from
/// `first` on where they lost alike. Experts without load stay without, if that can be.
fn push_rounded(counts: &mut Vec<u32>, loads: &[f64], total: u64, limit: u32, first: usize) {
    let n = loads.len();
    let start = counts.len();
    // A load a rounding error below a whole number is that number.
    counts.extend(loads.iter().map(|&load| ((load + 1e-6) as u32).min(limit)));
    let row = &mut counts[start..];
    let mut order: Vec<usize> = (0..n).map(|i| (i + first) % n).collect();
    let lost = |i: usize| (loads[i] - loads[i].floor() - 1e-6).max(0.0);
    // In steps of 2^-20, so that rounding errors do not decide.
    order.sort_by_key(|&i| (loads[i] <= 0.0, std::cmp::Reverse((lost(i) * f64::from(1 << 20)) as u32)));
    let mut given: u64 = row.iter().map(|&n| u64::from(n)).sum();
    while given != total {
        let before = given;
        for &i in &order {
            if given < total && row[i] < limit {
                row[i] += 1;
                given += 1;
            } else if given > total && row[i] > 0 {
                row[i] -= 1;
                given -= 1;
            }
        }
        if given == before {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_goes_to_the_others() {
        assert_eq!(capped(&[6.0, 2.0, 1.0, 1.0], 200.0, 100.0), [100.0, 50.0, 25.0, 25.0]);
        assert_eq!(capped(&[1.0, 0.0, 0.0], 200.0, 100.0), [100.0, 50.0, 50.0]);
        assert_eq!(capped(&[1.0, 1.0], 0.0, 0.0), [0.0, 0.0]);
    }

    #[test]
    fn what_does_not_divide_goes_round() {
        let mut counts = Vec::new();
        (0..3).for_each(|rank| push_exact(&mut counts, &[1.0 / 3.0; 3], rank, 4, 2));
        assert_eq!(counts, [3, 3, 2, 3, 2, 3, 2, 3, 3]);
    }
}
