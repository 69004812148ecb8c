use std::{io::ErrorKind, path::Path};

use burn::{module::Module, tensor::Device};
use burn_fsep::{
    FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
    launch::Rank,
    planner::PlannerStrategy,
    train::{FusedAdamWConfig, PlannerConfig, ShardedOptimizer, TrainOptimizer, Trainer, TrainerConfig},
};

use super::record::{Recorder, Summary};
use crate::{
    Corpus, FinetuneArgs, ModelFolder, MoeHfError, TextCodec, TokenBatch,
    files::check_output_folder,
    generate::Sampling,
    memory::{self, JobSizes, PeakMemory},
    model::CausalLm,
    ranks,
};

/// What the ranks of a process share.
pub(super) struct Job<'a> {
    pub args: &'a FinetuneArgs,
    pub folder: &'a ModelFolder,
    /// `None` if no step is made.
    pub text: Option<&'a (TextCodec, Corpus)>,
    /// All ranks are threads of this process.
    pub is_thread: bool,
}

/// What a rank has at the end; equal on all ranks.
pub(super) struct Finetuned {
    pub summary: Summary,
    /// What the sample continues, and the sample.
    pub sample: Option<[String; 2]>,
}

/// Sequences of held-out text that the model is measured on.
const HELD_OUT: usize = 32;

impl Job<'_> {
    /// The program of one rank.
    pub fn run(&self, rank: &Rank) -> Result<Finetuned, MoeHfError> {
        let (args, options) = (self.args, &self.args.optimizer);
        if rank.is_first() {
            check_output_folder(&args.output())?;
        }
        let estimated = self.text.map(|_| {
            let job = JobSizes::of_finetune(args, rank.comm.size());
            memory::check(&job, self.folder.decoder(), rank, (&args.parallel.ranks, args.memory), self.is_thread)
        });
        let (estimated, memory) = (estimated.transpose()?, PeakMemory::start(rank.gpu));
        let (runtime, device) = ranks::start(rank, &args.parallel, options.seed)?;
        let device = device.autodiff();
        let model = self.folder.load(&args.parallel, &runtime, &device)?;
        let Some((codec, corpus)) = self.text else {
            let summary = Recorder::new(&runtime, 0, false).summary;
            self.save(&model, &runtime)?;
            return Ok(Finetuned { summary, sample: None });
        };
        let held_out = corpus.held_out(HELD_OUT, options.seq_len);
        let before = validate(&model, &held_out, options.batch, &runtime, &device)?;
        let (model, mut recorder) = self.train(model, corpus, &runtime, &device)?;
        // Of training: what comes after is done once.
        recorder.summary.peak_gib = largest(memory.gib(), &runtime)?;
        recorder.summary.estimated_peak_gib = estimated.map(|estimated| estimated.peak_gib());
        recorder.summary.valid_loss_before = Some(before);
        recorder.summary.valid_loss_after = Some(validate(&model, &held_out, options.batch, &runtime, &device)?);
        self.save(&model, &runtime)?;
        // After the model, which is worth more.
        if let Some(path) = &args.record_trace {
            recorder.write_trace(path)?;
        }
        let sample = self.sample(&model, codec, &held_out[0], &runtime, &device)?;
        Ok(Finetuned { summary: recorder.summary, sample })
    }

    fn save(&self, model: &CausalLm, runtime: &FsepRuntime) -> Result<(), MoeHfError> {
        let output = self.args.output();
        if self.args.output.is_some() {
            return self.folder.save(model, runtime, &output);
        }
        // The folder that is nobody's but this program's. What the run before left there may be the model that was trained: it goes
        // when the new one is there.
        let (new, is_first) = (output.with_extension("new"), runtime.rank() == 0);
        if is_first {
            remove(&new)?;
        }
        runtime.comm().barrier(Operation::new("room for the model"))?;
        self.folder.save(model, runtime, &new)?;
        if is_first {
            remove(&output)?;
            std::fs::rename(&new, &output).map_err(MoeHfError::file(&output))?;
        }
        Ok(())
    }

    fn train(
        &self,
        model: CausalLm,
        corpus: &Corpus,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<(CausalLm, Recorder), MoeHfError> {
        let (args, options) = (self.args, &self.args.optimizer);
        let model = if options.freeze_router { model.freeze_routers() } else { model };
        let coeff = options.aux_loss_coeff.unwrap_or(model.config().router_aux_loss_coef);
        let mut config =
            TrainerConfig::new().with_max_grad_norm(options.clip).with_gradient_buckets(model.buckets().clone());
        if !args.parallel.no_planner {
            let planner = PlannerConfig::new(PlannerStrategy::MinMax).with_seed(options.seed);
            config = config.with_planner(planner.with_synchronous(args.parallel.ranks.synchronous));
        }
        let optimizer =
            FusedAdamWConfig::new().with_epsilon(1e-8).with_weight_decay(options.weight_decay as f32).init();
        if args.memory.sharded_optimizer {
            let optimizer = ShardedOptimizer::new(runtime, optimizer, &model)?;
            return self.steps(config.init(runtime, model, optimizer)?, coeff, corpus, runtime, device);
        }
        self.steps(config.init(runtime, model, optimizer)?, coeff, corpus, runtime, device)
    }

    fn steps<O: TrainOptimizer>(
        &self,
        mut trainer: Trainer<CausalLm, O>,
        coeff: f64,
        corpus: &Corpus,
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<(CausalLm, Recorder), MoeHfError> {
        let (args, options) = (self.args, &self.args.optimizer);
        let mut recorder = Recorder::new(runtime, options.steps, args.record_trace.is_some());
        for step in 0..options.steps {
            let texts = corpus.batch(options.seed, step, options.batch, options.seq_len);
            let batch = TokenBatch::of_rank(&texts, runtime, device);
            let done = trainer.step(options.lr, |model| model.loss(&batch, coeff, runtime))?;
            let loss = trainer.mean_loss(&done)?;
            recorder.add(runtime, loss);
        }
        recorder.finish(options.batch * options.seq_len);
        Ok((trainer.finish()?, recorder))
    }

    fn sample(
        &self,
        model: &CausalLm,
        codec: &TextCodec,
        text: &[u32],
        runtime: &FsepRuntime,
        device: &Device,
    ) -> Result<Option<[String; 2]>, MoeHfError> {
        if self.args.sample == 0 {
            return Ok(None);
        }
        let prompt = &text[..text.len().min(48)];
        let sampling = Sampling { tokens: self.args.sample, temperature: 0.7, seed: self.args.optimizer.seed };
        let tokens = sampling.continue_text(&model.valid(), prompt, runtime, &device.clone().inner())?;
        Ok(Some([codec.decode(prompt)?, codec.decode_after(prompt, &tokens)?]))
    }
}

/// The most GiB of all ranks; `None` where the system does not tell. Collective.
fn largest(gib: f64, runtime: &FsepRuntime) -> Result<Option<f64>, MoeHfError> {
    let mut most = [gib];
    runtime.comm().all_reduce(Operation::new("memory"), ReduceBuffer::F64(&mut most), ReduceOp::Max)?;
    Ok(Some(most[0]).filter(|gib| gib.is_finite()))
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) -> Result<(), MoeHfError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(MoeHfError::file(folder)(error)),
        _ => Ok(()),
    }
}

/// The mean over held-out tokens of minus their log probability. Collective.
fn validate(
    model: &CausalLm,
    texts: &[Vec<u32>],
    batch: usize,
    runtime: &FsepRuntime,
    device: &Device,
) -> Result<f64, MoeHfError> {
    let (model, device) = (model.valid(), device.clone().inner());
    let (mut sum, mut weight) = (0.0, 0.0);
    for texts in texts.chunks(batch) {
        let batch = TokenBatch::of_rank(texts, runtime, &device);
        let loss = runtime.run(|| model.loss(&batch, 0.0, runtime))?;
        sum += loss.into_data().iter::<f64>().sum::<f64>() * texts.len() as f64;
        weight += texts.len() as f64;
    }
    let mut mean = [sum / weight];
    runtime.comm().all_reduce(Operation::new("held-out loss"), ReduceBuffer::F64(&mut mean), ReduceOp::Mean)?;
    Ok(mean[0])
}
