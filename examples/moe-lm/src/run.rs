use std::{fmt::Write as _, path::Path, sync::Arc, time::Duration};

use burn_fsep::comm::local::{LaunchConfig, RankError, launch};
use burn_fsep_planner::trace::Trace;

use crate::{
    Args, Corpus, MoeLmError, Summary,
    data::Windows,
    page,
    record::StepRow,
    train::{Trained, TrainingData, train_rank},
    unigram_entropy,
};

/// Runs the whole job and returns its summary.
///
/// # Errors
///
/// [`MoeLmError`] if an option cannot work, a file cannot be read or written, or training fails.
pub fn run(args: &Args) -> Result<Summary, MoeLmError> {
    args.check()?;
    let corpus = Corpus::load(&args.text)?;
    corpus.check(args.context)?;
    std::fs::create_dir_all(&args.out).map_err(MoeLmError::file(&args.out))?;

    let (train, valid) = (Arc::new(corpus.train), Arc::new(corpus.valid));
    println!(
        "{} bytes to train on, {} held out; {} layers, {} experts, top-{}, {} rank(s){}",
        train.len(),
        valid.len(),
        args.layers,
        args.experts,
        args.top_k,
        args.world_size(),
        if args.dense { ", dense" } else { "" },
    );
    let prompt = valid[..args.context.min(32)].to_vec();
    let data = TrainingData {
        train: Windows::random(train, args.context, args.steps * args.batch, args.seed),
        valid: Windows::spread(valid, args.context, args.valid_batches * args.batch),
        prompt,
    };
    let entropy = unigram_entropy(data.valid.targets());

    let config = LaunchConfig::new(args.world_size()).with_timeout(Duration::from_secs(120));
    let ranks = launch(&config, |comm| train_rank(args, &data, comm));
    let trained = first_result(ranks)?;
    let summary = summarise(args, &trained, entropy);

    let title = format!("moe-lm: {} ranks, {} experts, {} steps", summary.ranks, args.experts, summary.steps);
    let curves = args.out.join("curves.html");
    write_whole(&curves, page::curves(&title, &trained.rows, entropy).as_bytes())?;
    if let Some(path) = &args.record_trace {
        let trace = Trace::new(trained.trace.clone())
            .map_err(|error| MoeLmError::Ranks(format!("there is no routing to record: {error}")))?;
        write_whole(path, trace.to_csv().as_bytes())?;
    }
    if let Some(path) = &args.summary {
        write_whole(path, format!("{}\n", to_json(&summary)?).as_bytes())?;
    }
    print!("{}", report(&summary, &data.prompt, &trained.sample));
    println!("metrics: {}\ncurves:  {}", args.out.join("metrics.jsonl").display(), curves.display());
    Ok(summary)
}

/// The first rank's result, or the error of the rank that failed of itself rather than for another's sake.
fn first_result(ranks: Vec<Result<Trained, RankError<MoeLmError>>>) -> Result<Trained, MoeLmError> {
    let mut first = None;
    let mut errors = Vec::new();
    for rank in ranks {
        match rank {
            Ok(trained) => {
                first.get_or_insert(trained);
            }
            Err(error) => errors.push(error),
        }
    }
    let own = |error: &RankError<MoeLmError>| !error.to_string().contains("failed while this rank was in");
    match errors.iter().find(|error| own(error)).or(errors.first()) {
        Some(error) => Err(MoeLmError::Ranks(error.to_string())),
        None => first.ok_or_else(|| MoeLmError::Ranks("no rank has a result".into())),
    }
}

fn summarise(args: &Args, trained: &Trained, unigram_entropy: f64) -> Summary {
    let rows = &trained.rows;
    let mean =
        |rows: &[StepRow], value: fn(&StepRow) -> f64| rows.iter().map(value).sum::<f64>() / rows.len().max(1) as f64;
    let last = &rows[rows.len() - rows.len().div_ceil(10)..];
    Summary {
        train_loss: mean(last, |row| row.loss),
        valid_loss: trained.valid_loss,
        unigram_entropy,
        imbalance_static: mean(rows, |row| row.imbalance_static),
        imbalance_planned: mean(rows, |row| row.imbalance),
        tokens_per_second: (args.batch * args.context * rows.len()) as f64 / trained.seconds,
        seconds: trained.seconds,
        steps: rows.len(),
        ranks: args.world_size(),
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
    line("training time", format!("{:.1} s for {} steps", summary.seconds, summary.steps));
    let _ =
        writeln!(text, "\nsample, after {:?}:\n{}\n", String::from_utf8_lossy(prompt), String::from_utf8_lossy(sample));
    text
}

fn to_json(summary: &Summary) -> Result<String, MoeLmError> {
    serde_json::to_string_pretty(summary).map_err(|error| MoeLmError::Ranks(format!("summary: {error}")))
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), MoeLmError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, content).map_err(MoeLmError::file(path))?;
    std::fs::rename(&partial, path).map_err(MoeLmError::file(path))
}
