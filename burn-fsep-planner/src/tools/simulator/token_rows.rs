/// How many ranks have any of a token's experts, on average, if it chooses `K` of `E` experts without preference and `M` ranks serve the
/// experts evenly: where rows travel once to a rank, these are the rows of a token, its own rank's included.
///
/// A rank serves `E / M` experts; that it has none of the `K` is drawing `K` times without replacement from the others:
/// `M (1 - prod_j (1 - (E / M) / (E - j)))`. Where ranks outnumber experts, each expert of a token is another rank's: `K`.
pub fn expected_ranks(experts: usize, topk: usize, ranks: usize) -> f64 {
    if ranks >= experts {
        return topk as f64;
    }
    let served = experts as f64 / ranks as f64;
    let none: f64 = (0..topk).map(|j| (1.0 - served / (experts - j) as f64).max(0.0)).product();
    ranks as f64 * (1.0 - none)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SplitMix64;

    #[test]
    fn drawn_tokens_agree() {
        for (experts, topk, ranks) in
            [(64, 8, 2), (64, 8, 8), (64, 8, 16), (256, 8, 32), (8, 2, 4), (8, 2, 8), (12, 5, 3)]
        {
            let mut rng = SplitMix64::new(7);
            let (tokens, per_rank) = (20_000, experts / ranks);
            let mut sum = 0;
            for _ in 0..tokens {
                let mut all: Vec<usize> = (0..experts).collect();
                let mut hit = vec![false; ranks];
                for j in 0..topk {
                    all.swap(j, j + rng.below(experts - j));
                    hit[all[j] / per_rank] = true;
                }
                sum += hit.iter().filter(|hit| **hit).count();
            }
            let (drawn, expected) = (sum as f64 / f64::from(tokens), expected_ranks(experts, topk, ranks));
            assert!((drawn / expected - 1.0).abs() < 0.01, "{experts} {topk} {ranks}: {drawn} {expected}");
        }
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(expected_ranks(64, 8, 1), 1.0);
        assert_eq!(expected_ranks(64, 8, 64), 8.0);
        assert_eq!(expected_ranks(8, 2, 512), 2.0);
        // What was counted on two and eight ranks: 0.255 and 0.685 of the bytes, replicas and counting included.
        assert!((expected_ranks(64, 8, 2) / 8.0 - 0.25).abs() < 0.01);
        assert!((expected_ranks(64, 8, 8) / 8.0 - 0.685).abs() < 0.03);
        let rising: Vec<f64> = (0..7).map(|log| expected_ranks(64, 8, 1 << log)).collect();
        assert!(rising.is_sorted());
    }
}
