use burn::{
    data::dataloader::batcher::Batcher,
    module::Module,
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntime,
    comm::{Operation, ReduceBuffer, ReduceOp},
    train::{ShardedOptimizer, TrainOptimizer, clip_grad_norm, sync_gradients},
};

use crate::{SmallMoe, TaskBatcher, TaskItem, device, random_layout, training::layout_seed};

/// Training of the small model that can stop and go on: nothing but what is in here and the items decides a step.
pub struct Trainer<O = ModuleOptimizer> {
    /// This rank's model.
    pub model: SmallMoe,
    /// Its optimizer.
    pub optimizer: O,
    /// Steps done.
    pub step: usize,
    runtime: FsepRuntime,
}

fn adamw() -> ModuleOptimizer {
    AdamWConfig::new().with_epsilon(1e-6).with_weight_decay(0.01).init()
}

impl Trainer {
    /// A new model. Collective.
    ///
    /// # Errors
    ///
    /// As `SmallMoe::fsep_of`.
    pub fn new(config: &FSEPMoEConfig, runtime: &FsepRuntime) -> Result<Self, FsepError> {
        let model = SmallMoe::fsep_of(config, runtime, &device())?;
        Ok(Self { model, optimizer: adamw(), step: 0, runtime: runtime.clone() })
    }
}

impl Trainer<ShardedOptimizer> {
    /// The same with the optimizer's state cut over ranks. Collective.
    ///
    /// # Errors
    ///
    /// As `SmallMoe::fsep_of` and `ShardedOptimizer::new`.
    pub fn sharded(config: &FSEPMoEConfig, runtime: &FsepRuntime) -> Result<Self, FsepError> {
        let model = SmallMoe::fsep_of(config, runtime, &device())?;
        let optimizer = ShardedOptimizer::new(runtime, adamw(), &model)?;
        Ok(Self { model, optimizer, step: 0, runtime: runtime.clone() })
    }
}

impl<O: TrainOptimizer> Trainer<O> {
    /// Makes `steps` steps on batches of `batch` items and returns the mean loss over ranks of each. The layouts change in
    /// each step, unless experts have fixed owners. Collective.
    ///
    /// # Errors
    ///
    /// Any [`FsepError`].
    pub fn train(&mut self, items: &[TaskItem], batch: usize, steps: usize) -> Result<Vec<f32>, FsepError> {
        let (runtime, device) = (self.runtime.clone(), device());
        let share = batch / runtime.world_size();
        let mut losses = Vec::with_capacity(steps);
        for _ in 0..steps {
            let start = self.step * batch % items.len() + runtime.rank() * share;
            let batch = TaskBatcher.batch(items[start..start + share].to_vec(), &device);
            let model = &self.model;
            let (loss, mut grads) = runtime.run(|| {
                let loss = model.loss(&batch);
                let value = loss.clone().into_scalar::<f32>();
                (value, GradientsParams::from_grads(loss.backward(), model))
            })?;
            sync_gradients(&runtime, model, &mut grads)?;
            clip_grad_norm(&runtime, model, &mut grads, 0.5)?;
            self.model = self.optimizer.step_model(1e-2.into(), self.model.clone(), grads)?;
            self.step += 1;
            for layer in 0..runtime.num_layers() {
                let layout = runtime.layout(layer);
                let seed = layout_seed(&runtime, self.step, layer);
                let next =
                    random_layout(runtime.topology().world_size(), layout.slots_per_rank(), layout.num_experts(), seed);
                // Refused where experts have fixed owners.
                let _ = runtime.set_layout(layer, next.into());
            }
            let mut mean = [loss];
            runtime.comm().all_reduce(Operation::new("loss"), ReduceBuffer::F32(&mut mean), ReduceOp::Mean)?;
            losses.push(mean[0]);
        }
        Ok(losses)
    }

    /// All that training has changed on this rank, byte by byte: parameters, then optimizer state by parameter.
    ///
    /// # Panics
    ///
    /// If Burn cannot make records.
    pub fn bits(&self) -> Vec<(String, Vec<u8>)> {
        let mut bits = Vec::new();
        let model = burn_pack::Reader::from_bytes(self.model.clone().into_record().into_bytes().unwrap()).unwrap();
        let optimizer =
            burn_pack::Reader::from_bytes(self.optimizer.module_optimizer().to_record().into_bytes().unwrap()).unwrap();
        // Ids differ between processes; the path of each is kept beside the state.
        let paths = optimizer.metadata().clone();
        let named = |name: &str| {
            let (id, field) = name.split_once('.').unwrap();
            format!("{}/{field}", paths[id])
        };
        for (name, scalar) in optimizer.scalars() {
            bits.push((named(name), format!("{scalar:?}").into_bytes()));
        }
        for (tensors, is_state) in [(model.into_tensors().unwrap(), false), (optimizer.into_tensors().unwrap(), true)] {
            for tensor in tensors {
                let (name, _, _, _, bytes) = tensor.into_parts().unwrap();
                bits.push((if is_state { named(&name) } else { name }, bytes.to_vec()));
            }
        }
        bits.sort();
        bits
    }
}
