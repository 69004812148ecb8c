//! The README's program: a whole training, however it is started.

use burn::{
    optim::{AdamWConfig, GradientsParams},
    prelude::*,
    tensor::Distribution,
};
use burn_fsep::planner::{
    PlannerConfig, Strategy,
    callback::{StepContext, TrainingCallback},
};
use burn_fsep::train::{broadcast_parameters, clip_grad_norm, sync_gradients};
use burn_fsep::{FSEPMoEConfig, FsepError, FsepRuntimeConfig, launch::RankConfig};

fn main() -> std::process::ExitCode {
    // Four threads, or the processes of fsep-launch, torchrun, mpirun or Slurm; a GPU each where there are some.
    RankConfig::new().with_threads(4).main(|rank| -> Result<(), FsepError> {
        let runtime = rank.runtime(FsepRuntimeConfig::new())?;
        let device = rank.device.autodiff();
        // 8 SwiGLU experts of 32 -> 64 -> 32, two for each token.
        let model = FSEPMoEConfig::new(32, 64, 8).init(&runtime, &device);
        let mut model = broadcast_parameters(&runtime, model)?;
        let mut optimizer = AdamWConfig::new().init();
        let mut planner = PlannerConfig::new(Strategy::MinMax).init();
        for step in 1..=3 {
            runtime.begin_step(&model)?; // each layer's experts travel while the layer before computes
            // Forward and backward; a failure of any rank comes out as a typed error that names it.
            let mut grads = runtime.run(|| {
                let x = Tensor::<3>::random([2, 16, 32], Distribution::Default, &device); // [batch, length, hidden]
                let loss = (model.forward(x.clone()) - x).square().mean();
                GradientsParams::from_grads(loss.backward(), &model)
            })?;
            sync_gradients(&runtime, &model, &mut grads)?; // averages everything that is not an expert
            clip_grad_norm(&runtime, &model, &mut grads, 1.0)?; // by the norm of the whole, unsharded model
            model = optimizer.step(1e-3, model, grads);
            planner.on_step_end(&StepContext::new(1, step, &runtime)).expect("the planner goes on"); // new layouts
        }
        println!("rank {} of {} trained", runtime.rank(), runtime.world_size());
        Ok(())
    })
}
