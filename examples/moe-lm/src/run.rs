use std::{fmt::Write as _, sync::Arc};

use burn_fsep_planner::tools::trace::Trace;

use crate::{
    Args, Corpus, MoeLmError, Summary,
    data::Windows,
    files::write_whole,
    page,
    record::StepRow,
    train::{Trained, TrainingData, train_rank},
    unigram_entropy,
};

/// Runs the whole job, or, as a process of a launcher, one rank of it; returns its summary where the first rank is.
///
/// # Errors
///
/// [`MoeLmError`] if an option cannot work, a file cannot be read or written, or training fails.
pub fn run(args: &Args) -> Result<Option<Summary>, MoeLmError> {
    let Args { model, training, parallel, output } = args;
    let ranks = args.check(|variable| std::env::var(variable).ok())?;
    let devices = ranks.devices(parallel)?;
    let corpus = Corpus::load(&training.text)?;
    corpus.check(training.context)?;

    let (train, valid) = (Arc::new(corpus.train), Arc::new(corpus.valid));
    if ranks.has_first() {
        println!(
            "{} bytes to train on, {} held out; {} layers, {} experts, top-{}, {} rank(s){}",
            train.len(),
            valid.len(),
            model.layers,
            model.experts,
            model.top_k,
            ranks.world_size(),
            if training.dense { ", dense" } else { "" },
        );
    }
    let prompt = valid[..training.context.min(32)].to_vec();
    let data = TrainingData {
        train: Windows::random(train, training.context, training.steps * training.batch, training.seed),
        valid: Windows::spread(valid, training.context, training.valid_batches * training.batch),
        prompt,
    };
    let entropy = unigram_entropy(data.valid.targets());

    let trained = ranks.run(parallel, |comm, index| train_rank(args, &data, &ranks, comm, devices[index].clone()))?;
    if !ranks.has_first() {
        return Ok(None);
    }
    let summary = summarise(ranks.world_size(), &trained, entropy);
    let title = format!("moe-lm: {} ranks, {} experts, {} steps", summary.ranks, model.experts, summary.steps);
    let curves = output.out.join("curves.html");
    write_whole(&curves, page::curves(&title, &trained.rows, entropy).as_bytes())?;
    if let Some(path) = &output.record_trace {
        let trace = Trace::new(trained.trace.clone())
            .map_err(|error| MoeLmError::Ranks(format!("there is no routing to record: {error}")))?;
        write_whole(path, trace.to_csv().as_bytes())?;
    }
    if let Some(path) = &output.summary {
        write_whole(path, format!("{}\n", to_json(&summary)?).as_bytes())?;
    }
    print!("{}", report(&summary, &data.prompt, &trained.sample));
    println!("metrics: {}\ncurves:  {}", output.out.join("metrics.jsonl").display(), curves.display());
    Ok(Some(summary))
}

fn summarise(ranks: usize, trained: &Trained, unigram_entropy: f64) -> Summary {
    let rows = &trained.rows;
    let mean =
        |rows: &[StepRow], value: fn(&StepRow) -> f64| rows.iter().map(value).sum::<f64>() / rows.len().max(1) as f64;
    // Every step has as many tokens.
    let speed = |rows: &[StepRow]| rows.len() as f64 / rows.iter().map(|row| 1.0 / row.tokens_per_second).sum::<f64>();
    let last = &rows[rows.len() - rows.len().div_ceil(10)..];
    Summary {
        train_loss: mean(last, |row| row.loss),
        valid_loss: trained.valid_loss,
        unigram_entropy,
        imbalance_static: mean(rows, |row| row.imbalance_static),
        imbalance_planned: mean(rows, |row| row.imbalance),
        tokens_per_second: speed(rows),
        tokens_per_second_after_warmup: speed(&rows[rows.len() / 10..]),
        seconds: trained.seconds,
        steps: rows.len(),
        ranks,
    }
}

fn report(summary: &Summary, prompt: &[u8], sample: &[u8]) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<34}{value}");
    };
    line("training loss", format!("{:.3} nat/byte", summary.train_loss));
    line("validation loss", format!("{:.3} nat/byte", summary.valid_loss));
    line("byte-unigram entropy of that text", format!("{:.3} nat/byte", summary.unigram_entropy));
    line("better than unigram by", format!("{:.3} nat/byte", summary.unigram_entropy - summary.valid_loss));
    line("expert imbalance, static EP", format!("{:.3} max/mean", summary.imbalance_static));
    line("expert imbalance, as planned", format!("{:.3} max/mean", summary.imbalance_planned));
    line("speed", format!("{:.0} tokens/s", summary.tokens_per_second));
    line("speed after the first tenth", format!("{:.0} tokens/s", summary.tokens_per_second_after_warmup));
    line("training time", format!("{:.1} s for {} steps", summary.seconds, summary.steps));
    let _ =
        writeln!(text, "\nsample, after {:?}:\n{}\n", String::from_utf8_lossy(prompt), String::from_utf8_lossy(sample));
    text
}

fn to_json(summary: &Summary) -> Result<String, MoeLmError> {
    serde_json::to_string_pretty(summary).map_err(|error| MoeLmError::Ranks(format!("summary: {error}")))
}
