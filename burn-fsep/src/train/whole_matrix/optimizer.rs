use std::collections::HashMap;

use burn::{
    lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    module::Module,
    optim::{GradientsParams, ModuleOptimizer},
};

use super::{
    super::{
        optimizer_checks::{agree_on_gradients, refuse_state},
        params::{ModulePath, visit_params},
    },
    experts::{StepExperts, TakeGradients},
    probe,
};
use crate::{
    FsepError, FsepRuntime,
    checkpoint::{CheckpointedOptimizer, HeldState},
    comm::Operation,
};

const STEP: Operation = Operation::new("gradients of a whole-matrix optimizer");

/// An optimizer that sees the experts' matrices whole: for Muon and others that treat no element by itself.
///
/// A rank has a part of each expert, which is no matrix. Here, when the gradients are final, of each layer's `E` experts each of the `N`
/// ranks that share them gets `ceil(E / N)` whole ones, with their gradients, in an All-to-All; steps their matrices, gate and up `[F, D]`
/// and down `[D, F]` (`[out, in]`, so that Muon's factor for the shape is that of its authors), and their biases, if they have some; and
/// returns them to the shards. Such ranks keep the state of their matrices alone. Every other parameter is whole on all ranks and is
/// stepped as ever.
///
/// The optimizer meets each matrix at the path of the experts' parameter (`...experts.weight`), so groups of parameters by path choose
/// who steps experts; learning rates by module reach them, too. [`Trainer`](super::super::Trainer),
/// [`checkpoint::save`](crate::checkpoint::save) and [`checkpoint::load`](crate::checkpoint::load) take it in place of Burn's. What they
/// write is the same, so a checkpoint goes on with any number of ranks and groups, and with an optimizer that steps element by element
/// also without this.
///
/// ```
/// # use burn::{module::ParamGroup, optim::{AdamWConfig, ModuleOptimizer, MuonConfig}, tensor::{Device, Tensor}};
/// # use burn_fsep::{FSEPMoEConfig, FsepRuntime, train::{TrainerConfig, WholeMatrixOptimizer}};
/// # let device = Device::flex().autodiff();
/// # let runtime = FsepRuntime::single();
/// let model = FSEPMoEConfig::new(8, 16, 4).init(&runtime, &device);
/// // Muon for the experts, AdamW for everything else.
/// let optimizer = ModuleOptimizer::from(AdamWConfig::new().build()).with_group(
///     ParamGroup::from_predicate("experts.weight"),
///     MuonConfig::new().build(),
///     None,
/// );
/// let optimizer = WholeMatrixOptimizer::new(&runtime, optimizer, &model)?;
/// let mut trainer = TrainerConfig::new().init(&runtime, model, optimizer)?;
/// # let x = Tensor::<2>::ones([2, 8], &device);
/// # trainer.step(1e-3, |model| model.forward(x).square().mean())?;
/// # Ok::<_, burn_fsep::FsepError>(())
/// ```
#[derive(Clone)]
pub struct WholeMatrixOptimizer {
    runtime: FsepRuntime,
    optimizer: ModuleOptimizer,
}

impl WholeMatrixOptimizer {
    /// `optimizer`, which has made no step yet, for the parameters of `model`. To go on from a checkpoint, load it into this.
    ///
    /// # Errors
    ///
    /// [`FsepError::WholeMatrixOptimizer`] if the optimizer cannot step the experts of a layer, or keeps a state of them for which
    /// checkpoints have no place: tensors of another shape than the matrix's (Adafactor), or of biases other fields than of matrices (Muon
    /// does not take biases at all); or if it has experts in a group by their id. Found by steps of small matrices in their place.
    /// [`FsepError::Config`] if the optimizer has state.
    pub fn new<M: Module>(runtime: &FsepRuntime, optimizer: ModuleOptimizer, model: &M) -> Result<Self, FsepError> {
        refuse_state(
            &optimizer,
            "the optimizer has state already, and it is none of matrices: make a whole-matrix optimizer of a new one, and load the \
             checkpoint into that",
        )?;
        probe::check(&optimizer, model).inspect_err(|error| runtime.tell_peers(error))?;
        Ok(Self { runtime: runtime.clone(), optimizer })
    }

    /// The next model: as [`ModuleOptimizer::step`] of the gradients' mean over ranks
    /// ([`sync_gradients`](super::super::sync_gradients)). Collective.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if ranks have gradients of the experts of different layers, or of different types; [`FsepError::Comm`] or
    /// [`FsepError::Device`] if experts cannot be exchanged, [`FsepError::Panicked`] if the optimizer panics.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        mut grads: GradientsParams,
    ) -> Result<M, FsepError> {
        let (runtime, lr) = (self.runtime.clone(), lr.into());
        let mut take = TakeGradients { grads: &mut grads, taken: HashMap::new(), facts: Vec::new() };
        visit_params(&model, &mut take);
        let (gradients, facts) = (take.taken, take.facts);
        agree_on_gradients(&runtime, STEP, facts, "the experts of other layers than rank 0, or of other types")?;
        runtime.run(|| {
            let (optimizer, path) = (&mut self.optimizer, ModulePath::default());
            let model = model.map(&mut StepExperts { runtime: &runtime, optimizer, lr: &lr, gradients, path });
            self.optimizer.step(lr, model, grads)
        })
    }
}

impl CheckpointedOptimizer for WholeMatrixOptimizer {
    const HELD: HeldState = HeldState::OwnExperts;

    fn module_optimizer(&self) -> &ModuleOptimizer {
        &self.optimizer
    }

    fn with_state(&self, optimizer: ModuleOptimizer) -> Self {
        Self { optimizer, ..self.clone() }
    }
}
