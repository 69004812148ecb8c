use std::{fmt::Write as _, sync::Arc};

use burn_fsep_planner::tools::trace::Trace;
use serde::Serialize;

use crate::{
    Args, Corpus, MoeLmError,
    corpus::digest,
    data::Windows,
    files::write_whole,
    record::{StepRow, Summary},
    train::{Trained, TrainingData, train_rank},
    unigram_entropy,
};

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEnd {
    /// Its training is done.
    Finished,
    /// It was told to stop (SIGTERM), and saved a checkpoint.
    Stopped,
}

/// Runs the whole job, or, as a process of a launcher, one rank of it.
///
/// # Errors
///
/// [`MoeLmError`] if an option cannot work, a file cannot be read or written, or training fails.
pub fn run(args: &Args) -> Result<JobEnd, MoeLmError> {
    let Args { model, training, output, .. } = args;
    let ranks = args.check()?;
    let corpus = Corpus::load(&training.text)?;
    corpus.check(training.context)?;

    let digest = digest(&corpus);
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
        digest,
        prompt,
    };
    let entropy = unigram_entropy(data.valid.targets());

    let Some(trained) = ranks.run(|rank| train_rank(args, &data, rank))? else { return Ok(JobEnd::Stopped) };
    if !ranks.has_first() {
        return Ok(JobEnd::Finished);
    }
    let summary = summarise(ranks.world_size(), &trained, entropy);
    let title = format!("moe-lm: {} ranks, {} experts, {} steps", summary.ranks, model.experts, summary.steps);
    let curves = output.out.join("curves.html");
    write_whole(&curves, Curves::of(&title, &trained.rows, entropy).page()?.as_bytes())?;
    if let Some(path) = &output.record_trace {
        let trace = Trace::new(trained.trace.clone())
            .map_err(|error| MoeLmError::Training(format!("there is no routing to record: {error}")))?;
        write_whole(path, trace.to_csv().as_bytes())?;
    }
    if let Some(path) = &output.summary {
        write_whole(path, format!("{}\n", to_json(&summary)?).as_bytes())?;
    }
    print!("{}", report(&summary, &data.prompt, &trained.sample));
    println!("metrics: {}\ncurves:  {}", output.out.join("metrics.jsonl").display(), curves.display());
    Ok(JobEnd::Finished)
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

/// What the page of curves draws: numbers of each step, and one for all.
#[derive(Serialize)]
struct Curves<'a> {
    title: &'a str,
    unigram_entropy: f64,
    loss: Vec<f64>,
    imbalance_static: Vec<f64>,
    imbalance: Vec<f64>,
    imbalance_max: Vec<f64>,
}

impl<'a> Curves<'a> {
    fn of(title: &'a str, rows: &[StepRow], unigram_entropy: f64) -> Self {
        let all = |value: fn(&StepRow) -> f64| rows.iter().map(value).collect();
        Self {
            title,
            unigram_entropy,
            loss: all(|row| row.loss),
            imbalance_static: all(|row| row.imbalance_static),
            imbalance: all(|row| row.imbalance),
            imbalance_max: all(|row| row.imbalance_max),
        }
    }

    fn page(&self) -> Result<String, MoeLmError> {
        Ok(include_str!("curves.html").replacen("RUN", &to_json(self)?, 1))
    }
}

fn to_json(value: &impl Serialize) -> Result<String, MoeLmError> {
    serde_json::to_string_pretty(value).map_err(|error| MoeLmError::Training(format!("summary: {error}")))
}
