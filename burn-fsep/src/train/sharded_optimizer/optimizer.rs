use std::collections::HashSet;

use burn::{
    lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    module::{Module, Param, ParamId},
    optim::{GradientsParams, ModuleOptimizer},
    tensor::Tensor,
};

use super::{
    super::{
        optimizer_checks::{agree_on_gradients, refuse_state},
        params::{ModulePath, ParamVisitor, Placement, visit_params},
    },
    parts::{CutGradients, CutParameters, PutBack, Stepped, gather},
    probe,
};
use crate::{
    FsepError, FsepRuntime,
    burn_compat::states_of,
    checkpoint::{CheckpointedOptimizer, HeldState},
    comm::Operation,
};

const PARTS: Operation = Operation::new("gradients of a sharded optimizer");

/// An optimizer whose state is cut over ranks: the first stage of ZeRO (arXiv 1910.02054), PyTorch's `ZeroRedundancyOptimizer`,
/// Megatron's distributed optimizer.
///
/// All ranks have the same replicated parameters, and with an optimizer of Burn's each keeps the same state of them: with Adam twice
/// the parameters' size. Here each rank keeps the state of its own part of every replicated parameter, `ceil(n / W)` of `n` elements,
/// makes the step of that part alone, and all ranks gather the parts. Shards of experts are cut over the ranks that have the same, where
/// several groups share the experts; otherwise they are stepped as they are.
///
/// [`Trainer`](super::super::Trainer) and `FsepStrategy::with_sharded_optimizer` take it in place of Burn's, and so do
/// [`checkpoint::save`](crate::checkpoint::save) and [`checkpoint::load`](crate::checkpoint::load): what they write is the same, so a
/// checkpoint goes on with any number of ranks, with or without this.
///
/// Any optimizer of Burn's works that treats every element by itself (SGD, Adam, AdamW, [`FusedAdamW`](super::super::FusedAdamW),
/// RMSprop, Lion, ..), also with groups of parameters and learning rates by module; others (Muon, LAMB, Adafactor, clipping of each
/// gradient by its norm) are refused. Steps are those without cutting, bit for bit where the backend computes an element the same way
/// wherever it stands.
///
/// ```
/// # use burn::{nn::LinearConfig, optim::AdamWConfig, tensor::{Device, Tensor}};
/// # use burn_fsep::{FsepRuntime, train::{ShardedOptimizer, TrainerConfig}};
/// # let device = Device::flex().autodiff();
/// # let runtime = FsepRuntime::single();
/// let model = LinearConfig::new(4, 4).init(&device);
/// let optimizer = ShardedOptimizer::new(&runtime, AdamWConfig::new().init(), &model)?;
/// let mut trainer = TrainerConfig::new().init(&runtime, model, optimizer)?;
/// # let x = Tensor::<2>::ones([2, 4], &device);
/// # trainer.step(1e-3, |model| model.forward(x).square().mean())?;
/// # Ok::<_, burn_fsep::FsepError>(())
/// ```
#[derive(Clone)]
pub struct ShardedOptimizer {
    runtime: FsepRuntime,
    optimizer: ModuleOptimizer,
    /// Parameters whose steps were seen to be element by element.
    probed: HashSet<ParamId>,
}

impl ShardedOptimizer {
    /// `optimizer`, which has made no step yet, for the parameters of `model`. To go on from a checkpoint, load it into this.
    ///
    /// # Errors
    ///
    /// [`FsepError::ShardedOptimizer`] if the optimizer does not step a parameter of the model element by element: found by two steps
    /// of six elements in its place, whole and in halves. [`FsepError::Config`] if the optimizer has state.
    pub fn new<M: Module>(runtime: &FsepRuntime, optimizer: ModuleOptimizer, model: &M) -> Result<Self, FsepError> {
        refuse_state(
            &optimizer,
            "the optimizer has the whole state of its parameters already: make a sharded optimizer of a new one, and load the \
             checkpoint into that",
        )?;
        let mut sharded = Self { runtime: runtime.clone(), optimizer, probed: HashSet::new() };
        let cut = trained(model, |placement| placement.replicas(runtime).is_some());
        sharded.probe(model, cut)?;
        Ok(sharded)
    }

    /// The next model: as [`ModuleOptimizer::step`] of the gradients' mean over ranks
    /// ([`sync_gradients`](super::super::sync_gradients)), which all ranks have. Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if ranks have gradients of different replicated parameters; [`FsepError::ShardedOptimizer`] for a
    /// parameter that had no gradient when this was made and is not stepped element by element; [`FsepError::Comm`] or
    /// [`FsepError::Device`] if the parts cannot be gathered, [`FsepError::Panicked`] if the optimizer panics.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        mut grads: GradientsParams,
    ) -> Result<M, FsepError> {
        let (runtime, lr) = (self.runtime.clone(), lr.into());
        if runtime.world_size() == 1 {
            return runtime.run(|| self.optimizer.step(lr, model, grads));
        }
        let mut cut = CutGradients::new(&runtime, &mut grads);
        visit_params(&model, &mut cut);
        let stepped = cut.stepped;
        self.check_agreed(&stepped)?;
        self.probe(&model, stepped.iter().map(|param| param.id).collect())?;
        runtime.run(|| {
            let mut parameters = CutParameters::new(&stepped);
            let model = self.optimizer.step(lr, model.map(&mut parameters), grads);
            let contexts = parameters.contexts;
            let values = gather(&model, &stepped);
            model.map(&mut PutBack::new(&stepped, contexts, values))
        })
    }

    /// Bytes of the state that this rank keeps, without scalars.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the state cannot be read: this copies it to host memory.
    pub fn state_bytes(&self) -> Result<usize, FsepError> {
        let states = states_of(self.optimizer.to_record()).map_err(FsepError::Device)?;
        Ok(states.values().flat_map(|state| state.tensors.values()).map(|tensor| tensor.as_bytes().len()).sum())
    }

    /// What would not be gathered alike. All ranks get the error.
    fn check_agreed(&self, stepped: &[Stepped]) -> Result<(), FsepError> {
        let facts: Vec<_> = stepped.iter().map(|param| (&param.path, param.shape.as_slice(), param.dtype)).collect();
        let how = "other parameters than rank 0: average them before the step (`sync_gradients`)";
        agree_on_gradients(&self.runtime, PARTS, facts, how)
    }

    /// Looks at those of the parameters that it has not looked at yet.
    fn probe<M: Module>(&mut self, model: &M, mut parameters: HashSet<ParamId>) -> Result<(), FsepError> {
        parameters.retain(|id| !self.probed.contains(id));
        if !parameters.is_empty() {
            probe::check(&self.optimizer, model, &parameters).inspect_err(|error| self.runtime.tell_peers(error))?;
            self.probed.extend(parameters);
        }
        Ok(())
    }
}

impl CheckpointedOptimizer for ShardedOptimizer {
    const HELD: HeldState = HeldState::OwnPart;

    fn module_optimizer(&self) -> &ModuleOptimizer {
        &self.optimizer
    }

    fn with_state(&self, optimizer: ModuleOptimizer) -> Self {
        Self { optimizer, ..self.clone() }
    }
}

/// Checks that the optimizer treats every element of the experts by itself: a rank has no matrix of them, and an optimizer that looks at
/// matrices (Muon) would take its rows of shards for one.
///
/// # Errors
///
/// [`FsepError::ExpertOptimizer`].
pub(in super::super) fn check_experts<M: Module>(
    runtime: &FsepRuntime,
    optimizer: &ModuleOptimizer,
    model: &M,
) -> Result<(), FsepError> {
    let experts = trained(model, |placement| placement == Placement::Sharded);
    if experts.is_empty() {
        return Ok(());
    }
    let checked = probe::check(optimizer, model, &experts).map_err(|error| match error {
        FsepError::ShardedOptimizer { parameter, reason } => FsepError::ExpertOptimizer { parameter, reason },
        other => other,
    });
    checked.inspect_err(|error| runtime.tell_peers(error))
}

/// The trained parameters of some placements.
fn trained<M: Module>(model: &M, is_meant: impl Fn(Placement) -> bool) -> HashSet<ParamId> {
    let mut trained = Trained { is_meant, ids: HashSet::new() };
    visit_params(model, &mut trained);
    trained.ids
}

struct Trained<F> {
    is_meant: F,
    ids: HashSet<ParamId>,
}

impl<F: Fn(Placement) -> bool> ParamVisitor for Trained<F> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        let is_parameter = (self.is_meant)(Placement::at(path)) && !path.is_running_statistic();
        if is_parameter && param.val().is_require_grad() {
            self.ids.insert(param.id);
        }
    }
}
