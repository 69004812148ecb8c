use burn::tensor::{Device, TensorData};
use burn_fsep::{
    FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
};
use moe_hf::{ModelFolder, MoeHfError, TokenBatch, model::CausalLm};

use crate::common::{FAMILIES, Golden, error, folder, load, on_ranks, parallel};

/// The logits of all ranks' texts, those of padding left out. Collective.
fn logits(
    model: &CausalLm,
    texts: &[Vec<u32>],
    runtime: &FsepRuntime,
    device: &Device,
) -> Result<Vec<f32>, MoeHfError> {
    let (rank, ranks) = (runtime.rank(), runtime.world_size());
    let batch = TokenBatch::of_rank(texts, runtime, device);
    let logits = runtime.run(|| model.forward(batch.ids.clone(), batch.mask.as_ref()).logits)?;
    let data: TensorData = logits.into_data();
    let ours: Vec<f32> = data.iter::<f32>().collect();
    let (length, vocabulary) = (texts.iter().map(Vec::len).max().unwrap(), model.config().vocab_size);
    // Every rank adds its own rows to zeros.
    let mut all = vec![0f64; texts.iter().map(Vec::len).sum::<usize>() * vocabulary];
    let (first, last) = (rank * texts.len() / ranks, (rank + 1) * texts.len() / ranks);
    let mut at = texts[..first].iter().map(Vec::len).sum::<usize>() * vocabulary;
    for (place, text) in texts[first..last].iter().enumerate() {
        for value in &ours[place * length * vocabulary..][..text.len() * vocabulary] {
            all[at] = f64::from(*value);
            at += 1;
        }
    }
    runtime.comm().all_reduce(Operation::new("logits"), ReduceBuffer::F64(&mut all), ReduceOp::Sum)?;
    Ok(all.into_iter().map(|value| value as f32).collect())
}

#[test]
fn logits_are_those_of_transformers_on_any_number_of_ranks() {
    for family in FAMILIES {
        let golden = Golden::of(family);
        let (texts, expected) = (&golden.ids("ids")[0], golden.numbers("logits"));
        for ranks in [1, 2, 4] {
            let actual =
                on_ranks(ranks, |runtime, device| logits(&load(family, runtime, device)?, texts, runtime, device));
            let error = error(&actual, &expected);
            println!("{family}, {ranks} ranks: logits within {error:.2e} of the largest");
            assert!(error <= 1e-5, "{family}, {ranks} ranks: {error}");
        }
    }
}

/// Texts of 9, 12 and 5 tokens: what comes later in the whole ones, no token sees.
#[test]
fn padding_changes_no_real_token() {
    for family in FAMILIES {
        let golden = Golden::of(family);
        let lens = [9, 12, 5];
        let texts: Vec<Vec<u32>> =
            golden.ids("ids")[0].iter().zip(lens).map(|(row, len)| row[..len].to_vec()).collect();
        let whole = golden.numbers("logits");
        let rows = whole.chunks_exact(whole.len() / 3).zip(lens);
        let expected: Vec<f32> = rows.flat_map(|(row, len)| row[..row.len() / 12 * len].to_vec()).collect();
        for ranks in [1, 2, 4] {
            let actual =
                on_ranks(ranks, |runtime, device| logits(&load(family, runtime, device)?, &texts, runtime, device));
            let error = error(&actual, &expected);
            println!("{family}, {ranks} ranks, padded: logits within {error:.2e} of the largest");
            assert!(error <= 1e-5, "{family}, {ranks} ranks: {error}");
        }
    }
}

/// Both losses of a batch, with and without padding: cross entropy, and all layers' load balancing.
#[test]
fn losses_are_those_of_transformers() {
    for family in FAMILIES {
        let golden = Golden::of(family);
        let whole = golden.ids("ids")[0].clone();
        let padded = whole.iter().zip([9, 12, 5]).map(|(row, len)| row[..len].to_vec()).collect();
        for (texts, prefix) in [(whole, ""), (padded, "masked.")] {
            let [cross_entropy, balancing] =
                ["loss.ce", "loss.aux"].map(|name| f64::from(golden.numbers(&format!("{prefix}{name}"))[0]));
            for ranks in [1, 2, 4] {
                for coeff in [0.0, 1.0] {
                    let loss = on_ranks(ranks, |runtime, device| {
                        let model = load(family, runtime, device)?;
                        let batch = TokenBatch::of_rank(&texts, runtime, device);
                        let loss = runtime.run(|| model.loss(&batch, coeff, runtime))?;
                        let mut mean = [loss.into_data().iter::<f64>().sum()];
                        let operation = Operation::new("loss");
                        runtime.comm().all_reduce(operation, ReduceBuffer::F64(&mut mean), ReduceOp::Mean)?;
                        Ok(mean[0])
                    });
                    let expected = cross_entropy + coeff * balancing;
                    let error = (loss - expected).abs() / expected;
                    assert!(error <= 2e-6, "{family}, {ranks} ranks, {prefix}{coeff}: {loss} is not {expected}");
                }
            }
        }
    }
}

/// The way to stretch rotary embeddings that no family's folder has, with Mixtral's weights. OLMoE's is linear, Qwen2-MoE's
/// Llama 3's, Qwen3-MoE's YaRN.
#[test]
fn dynamic_rope_is_that_of_transformers() {
    let golden = Golden::of("mixtral");
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder("mixtral").join("golden.json")).unwrap()).unwrap();
    let texts = &golden.ids("ids")[0];
    for kind in facts["rope"].as_object().unwrap().keys() {
        let copy = tempfile::tempdir().unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder("mixtral").join("config.json")).unwrap()).unwrap();
        for (key, value) in facts["rope"][kind.as_str()].as_object().unwrap() {
            if key != "margin" {
                config[key] = value.clone();
            }
        }
        std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(folder("mixtral").join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
        let expected = golden.numbers(&format!("rope.{kind}.logits"));
        let actual = on_ranks(2, |runtime, device| {
            let model = ModelFolder::open(copy.path())?.load(&parallel(), runtime, device)?;
            logits(&model, texts, runtime, device)
        });
        let error = error(&actual, &expected);
        println!("rope {kind}: logits within {error:.2e} of the largest");
        assert!(error <= 1e-5, "{kind}: {error}");
    }
}
