use burn::tensor::DType;
use burn_fsep::comm::Operation;
use serde::Serialize;

use crate::{
    LogitsArgs, ModelFolder, MoeHfError, TokenBatch,
    batch::rows_of,
    files::{check_output, write_json},
    ranks,
};

/// `{"logits": [[[...]]]}`
#[derive(Serialize)]
struct Logits {
    logits: Vec<Vec<Vec<f32>>>,
}

/// Runs `logits`, or, as a process of a launcher, one rank of it.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work, a file cannot be read or written, or the computation fails.
pub fn logits(args: &LogitsArgs) -> Result<(), MoeHfError> {
    check_output("--output", &args.output)?;
    let ranks = args.parallel.init(1)?;
    let folder = ModelFolder::open(&args.model)?;
    let vocab_size = folder.decoder().vocab_size;
    let text = std::fs::read(&args.ids).map_err(MoeHfError::file(&args.ids))?;
    let ids: Vec<Vec<u32>> = serde_json::from_slice(&text).map_err(|error| {
        MoeHfError::content(&args.ids, format!("expected token ids as [[token, ...], ...]: {error}"))
    })?;
    if let Some(row) = ids.iter().position(Vec::is_empty) {
        return Err(MoeHfError::content(&args.ids, format!("row {row} has no token")));
    }
    if let Some(token) = ids.iter().flatten().find(|&&token| token as usize >= vocab_size) {
        return Err(MoeHfError::content(
            &args.ids,
            format!("token {token} is not below the vocabulary of {vocab_size}"),
        ));
    }
    let rows = ranks.run(|rank| -> Result<Vec<Vec<Vec<f32>>>, MoeHfError> {
        ranks::check_equal(rank.comm.as_ref(), "token ids or models", &(&ids, folder.digest()))?;
        let (runtime, device) = ranks::start(&rank, &args.parallel, 0)?;
        let model = folder.load(&args.parallel, &runtime, &device)?;
        let batch = TokenBatch::of_rank(&ids, &runtime, &device);
        let logits = runtime.run(|| model.forward(batch.ids.clone(), batch.mask.as_ref()).logits.cast(DType::F32))?;
        // All ranks get as many rows: gathering takes equally long buffers.
        let [_, length] = batch.ids.dims();
        let ranks = runtime.world_size();
        let mut ours: Vec<f32> = logits.into_data().iter::<f32>().collect();
        ours.resize(ids.len().div_ceil(ranks) * length * vocab_size, 0.0);
        let bytes: Vec<u8> = ours.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut all = vec![0; bytes.len() * ranks];
        runtime.comm().all_gather(Operation::new("logits"), &bytes, &mut all)?;
        let values: Vec<f32> = all.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let row = |owner: usize, place: usize, tokens: usize| -> Vec<Vec<f32>> {
            let start = owner * ours.len() + place * length * vocab_size;
            values[start..].chunks_exact(vocab_size).take(tokens).map(<[f32]>::to_vec).collect()
        };
        let rows_of_rank = |owner: usize| rows_of(owner, ranks, ids.len()).enumerate();
        let all = (0..ranks).flat_map(|owner| rows_of_rank(owner).map(move |(place, index)| (owner, place, index)));
        Ok(all.map(|(owner, place, index)| row(owner, place, ids[index].len())).collect())
    })?;
    if ranks.has_first() {
        write_json(&args.output, &Logits { logits: rows })?;
        println!("logits of {} texts on {} rank(s): {}", ids.len(), ranks.world_size(), args.output.display());
    }
    Ok(())
}
