use burn::tensor::{DType, Device};
use burn_fsep::{FsepRuntime, planner::SplitMix64};

use crate::{GenerateArgs, ModelFolder, MoeHfError, TextCodec, TokenBatch, model::CausalLm, ranks};

/// Runs `generate`, or, as a process of a launcher, one rank of it.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work, the model cannot be read, or the computation fails.
pub fn generate(args: &GenerateArgs) -> Result<(), MoeHfError> {
    args.check()?;
    let ranks = args.parallel.init(1)?;
    let folder = ModelFolder::open(&args.model)?;
    let codec = TextCodec::open(&args.model, folder.decoder().vocab_size)?;
    let prompt = codec.encode(args.prompt.as_bytes())?;
    if prompt.is_empty() {
        return Err(MoeHfError::Option("--prompt is empty: give at least one token to continue".into()));
    }
    let text = ranks.run(|rank| -> Result<String, MoeHfError> {
        let options = (&args.prompt, args.tokens, args.temperature.to_bits(), args.seed, folder.digest());
        ranks::check_equal(rank.comm.as_ref(), "options or models", &options)?;
        let (runtime, device) = ranks::start(&rank, &args.parallel, args.seed)?;
        let model = folder.load(&args.parallel, &runtime, &device)?;
        let sampling = Sampling { tokens: args.tokens, temperature: args.temperature, seed: args.seed };
        codec.decode_after(&prompt, &sampling.continue_text(&model, &prompt, &runtime, &device)?)
    })?;
    if ranks.has_first() {
        println!("{}{text}", args.prompt);
    }
    Ok(())
}

/// How tokens are drawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sampling {
    pub tokens: usize,
    pub temperature: f64,
    pub seed: u64,
}

impl Sampling {
    /// The tokens after `prompt`. All ranks call it with the same arguments: they run the layers together, and draw the same
    /// tokens.
    pub fn continue_text(
        self,
        model: &CausalLm,
        prompt: &[u32],
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<Vec<u32>, MoeHfError> {
        let mut rng = SplitMix64::new(self.seed);
        let longest = model.config().rope.max_positions;
        let mut tokens = prompt.to_vec();
        for _ in 0..self.tokens {
            let window = tokens[tokens.len().saturating_sub(longest)..].to_vec();
            let length = window.len();
            let batch = TokenBatch::new(&[window], length, device);
            let scores = runtime.run(|| {
                let logits = model.forward(batch.ids, None).logits;
                logits.narrow(0, length - 1, 1).cast(DType::F32)
            })?;
            let scores: Vec<f32> = scores.into_data().iter::<f32>().collect();
            let next =
                draw(&scores, self.temperature, rng.unit()).ok_or(MoeHfError::NoScore { token: tokens.len() })?;
            tokens.push(next as u32);
            if model.config().eos_tokens.contains(&tokens[tokens.len() - 1]) {
                break;
            }
        }
        Ok(tokens.split_off(prompt.len()))
    }
}

/// The token that a number between 0 and 1 draws from scores; `None` if none of them is finite. At temperature 0 the best one.
fn draw(scores: &[f32], temperature: f64, unit: f64) -> Option<usize> {
    let finite = || scores.iter().enumerate().filter(|(_, score)| score.is_finite());
    let (best, &largest) = finite().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)))?;
    if temperature == 0.0 {
        return Some(best);
    }
    // The largest is taken off first, so that no temperature makes infinities.
    let weights = || finite().map(|(i, score)| (i, (f64::from(score - largest) / temperature).exp()));
    let mut rest = unit * weights().map(|(_, weight)| weight).sum::<f64>();
    // Rounding may leave a rest after the last one.
    let drawn = weights().find(|(_, weight)| {
        rest -= weight;
        rest <= 0.0
    });
    Some(drawn.map_or(best, |(i, _)| i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_by_their_probabilities() {
        let scores = [0.0, f32::NAN, 4.0f32.ln(), f32::NEG_INFINITY, 5.0f32.ln()];
        for (unit, expected) in [(0.0, 0), (0.09, 0), (0.11, 2), (0.49, 2), (0.51, 4), (1.0, 4)] {
            assert_eq!(draw(&scores, 1.0, unit), Some(expected), "{unit}");
        }
        for temperature in [0.0, 1e-300] {
            assert_eq!(draw(&scores, temperature, 0.5), Some(4), "{temperature}");
        }
        assert_eq!(draw(&[1.0, 1.0], 0.0, 0.9), Some(0));
        for temperature in [0.0, 1.0] {
            assert_eq!(draw(&[f32::NAN, f32::INFINITY], temperature, 0.5), None);
        }
    }
}
