use std::sync::{Arc, Mutex, PoisonError};

use burn_fsep::{comm::Operation, launch::Rank};

use super::train::{Finetuned, Job};
use crate::{
    Corpus, FinetuneArgs, MakeArgs, ModelFolder, MoeHfError, TextCodec,
    files::{check_output, write_json},
    make, ranks,
};

/// Ranks where neither a launcher nor an option says how many there are.
const THREADS: usize = 4;

/// Runs `finetune`, or, as a process of a launcher, one rank of it.
///
/// # Errors
///
/// [`MoeHfError`] if an option cannot work, a file cannot be read or written, or training fails.
pub fn finetune(args: &FinetuneArgs) -> Result<(), MoeHfError> {
    args.check()?;
    for (option, file) in [("--summary", &args.summary), ("--record-trace", &args.record_trace)] {
        file.as_deref().map_or(Ok(()), |file| check_output(option, file))?;
    }
    let ranks = args.parallel.init(THREADS)?;
    let (shared, is_thread) = (Mutex::new(None), ranks.environment().is_none());
    let Finetuned { summary, sample } = ranks.run(|rank| {
        let files = Files::shared(args, &rank, &shared)?;
        ranks::check_equal(rank.comm.as_ref(), "options, texts or models", &(options(args), &files))?;
        let Files { folder, text } = &*files;
        if rank.is_first() {
            println!("{}", describe(args, &files, rank.comm.size()));
        }
        Job { args, folder, text: text.as_ref(), is_thread }.run(&rank)
    })?;
    if !ranks.has_first() {
        return Ok(());
    }
    if let Some(file) = &args.summary {
        write_json(file, &summary)?;
    }
    print!("\n{}", summary.report());
    if let Some([prompt, text]) = sample {
        println!("\nsample, after {prompt:?}:\n{text}");
    }
    println!("\nsaved in the hub's format: {}", args.output().display());
    Ok(())
}

/// What a process reads, once for all its ranks.
#[derive(Debug)]
struct Files {
    folder: ModelFolder,
    /// `None` if no step is made.
    text: Option<(TextCodec, Corpus)>,
}

impl std::hash::Hash for Files {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.folder.digest(), self.text.as_ref().map(|(_, corpus)| corpus)).hash(state);
    }
}

impl Files {
    /// The files of this process; the first rank makes the model if none is given.
    fn shared(args: &FinetuneArgs, rank: &Rank, shared: &Mutex<Option<Arc<Self>>>) -> Result<Arc<Self>, MoeHfError> {
        let model = args.model();
        if args.model.is_none() && rank.is_first() {
            make::write(&MakeArgs::tiny(model.clone(), args.optimizer.seed))?;
        }
        rank.comm.barrier(Operation::new("the model's folder"))?;
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(files) = &*shared {
            return Ok(files.clone());
        }
        let folder = ModelFolder::open(&model)?;
        let read = || {
            let codec = TextCodec::open(&model, folder.decoder().vocab_size)?;
            let corpus = Corpus::load(&args.text, &codec)?;
            corpus.check(args.optimizer.seq_len)?;
            Ok::<_, MoeHfError>((codec, corpus))
        };
        let text = (args.optimizer.steps > 0).then(read).transpose()?;
        Ok(shared.insert(Arc::new(Self { folder, text })).clone())
    }
}

/// What has to be equal on all ranks, and names no file of one of them.
fn options(args: &FinetuneArgs) -> String {
    let parallel = &args.parallel;
    format!(
        "{:?} {} {:?} {:?} {:?} {} {}",
        args.optimizer,
        args.sample,
        args.memory,
        parallel.dtype,
        parallel.ranks.slots,
        parallel.no_planner,
        parallel.ranks.synchronous
    )
}

fn describe(args: &FinetuneArgs, files: &Files, ranks: usize) -> String {
    let what = match &args.model {
        Some(model) => format!("fine-tuning {}", model.display()),
        None => format!("no --model: made a tiny one of bytes with random values in {}", args.model().display()),
    };
    let tokens = files.text.as_ref().map_or(String::new(), |(codec, corpus)| {
        let unit = if matches!(codec, TextCodec::Bytes) { "bytes" } else { "tokens" };
        let text = if args.text.is_empty() { " (burn-fsep's sources; --text FILE... for other text)" } else { "" };
        format!("; {} {unit} to train on, {} held out{text}", corpus.train.len(), corpus.valid.len())
    });
    format!("{what}: {}, on {ranks} rank(s){tokens}", files.folder.describe())
}
