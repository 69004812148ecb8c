use burn::tensor::{DType, Device, activation::softmax};
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
        let (runtime, device) = ranks::start(&rank, args.parallel.dtype, args.seed)?;
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
            let next = if self.temperature == 0.0 {
                scores.argmax(1).into_data().iter::<i64>().next()
            } else {
                let mut rest = rng.unit() as f32;
                let probabilities = softmax(scores / self.temperature, 1).into_data();
                let position = probabilities.iter::<f32>().position(|p| {
                    rest -= p;
                    rest <= 0.0
                });
                position.map(|position| position as i64)
            };
            tokens.push(next.unwrap_or(0) as u32);
            if model.config().eos_tokens.contains(&tokens[tokens.len() - 1]) {
                break;
            }
        }
        Ok(tokens.split_off(prompt.len()))
    }
}
