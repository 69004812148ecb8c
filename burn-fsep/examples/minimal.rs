//! The README's program: a whole training, however it is started.

use burn::{optim::AdamWConfig, prelude::*, tensor::Distribution};
use burn_fsep::planner::PlannerStrategy;
use burn_fsep::train::{PlannerConfig, TrainerConfig};
use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntimeConfig, launch::RankConfig};

fn main() -> std::process::ExitCode {
    // Four threads, or the processes of fsep-launch, torchrun, mpirun or Slurm; with a GPU each where there are some.
    RankConfig::new().with_threads(4).main(|rank| -> Result<(), FsepError> {
        let runtime = rank.runtime(FsepRuntimeConfig::new())?;
        let device = rank.device.autodiff();
        // 8 SwiGLU experts of 32 -> 64 -> 32, two for each token.
        let model = FSEPMoEConfig::new(32, 64, 8).init(&runtime, &device);
        let config = TrainerConfig::new()
            .with_max_grad_norm(1.0) // of the whole, unsharded model
            .with_planner(PlannerConfig::new(PlannerStrategy::MinMax));
        let mut trainer = config.init(&runtime, model, AdamWConfig::new().init())?;
        for _ in 0..3 {
            // Forward, backward, averaging, optimizer and planner; a failure of any rank is an error that names it.
            let step = trainer.step(1e-3, |model| {
                let x = Tensor::<3>::random([2, 16, 32], Distribution::Default, &device); // [batch, length, hidden]
                (model.forward(x.clone()) - x).square().mean()
            })?;
            println!("rank {} of {}: loss {}", runtime.rank(), runtime.world_size(), trainer.mean_loss(&step)?);
        }
        trainer.finish().map(drop)
    })
}
