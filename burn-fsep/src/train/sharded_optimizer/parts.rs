use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    optim::GradientsParams,
    tensor::{DType, Shape, Tensor},
};

use super::super::{
    buckets::GradientBucketsConfig,
    collector::split,
    params::{ModulePath, ParamVisitor, Placement, visit_params},
};
use crate::{
    FsepRuntime,
    burn_compat::ParameterContext,
    comm::{Communicator, Operation},
    ops::all_gather,
    shard::FlatParts,
};

const PARAMETERS: Operation = Operation::new("parts of replicated parameters");

/// A parameter of which this rank steps its part.
pub(super) struct Stepped {
    pub id: ParamId,
    /// Where it stands in the model.
    pub path: String,
    pub shape: Shape,
    pub dtype: DType,
    parts: FlatParts,
    /// The ranks that step the other parts.
    comm: Arc<dyn Communicator>,
}

/// Puts this rank's part of each gradient in the gradient's place.
pub(super) struct CutGradients<'a> {
    runtime: &'a FsepRuntime,
    grads: &'a mut GradientsParams,
    seen: HashSet<ParamId>,
    /// In the model's order, each once.
    pub stepped: Vec<Stepped>,
}

impl<'a> CutGradients<'a> {
    pub fn new(runtime: &'a FsepRuntime, grads: &'a mut GradientsParams) -> Self {
        Self { runtime, grads, seen: HashSet::new(), stepped: Vec::new() }
    }
}

impl ParamVisitor for CutGradients<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        let Some(comm) = Placement::at(path).replicas(self.runtime) else { return };
        let shape = param.shape();
        let Some(parts) = FlatParts::new(shape.num_elements(), comm.size()) else { return };
        // What stands in a second place of the model has one gradient, which is cut already.
        if !self.seen.insert(param.id) {
            return;
        }
        let Some(gradient) = self.grads.remove::<D>(param.id) else { return };
        self.grads.register::<D>(param.id, part_of(gradient, parts, comm.rank()));
        let (id, dtype, comm) = (param.id, param.dtype(), comm.clone());
        self.stepped.push(Stepped { id, path: path.path(), shape, dtype, parts, comm });
    }
}

/// Puts this rank's part of each stepped parameter in the parameter's place, under the same id: an optimizer that treats every
/// element by itself sees a smaller tensor, and its state gets that one's shape.
pub(super) struct CutParameters<'a> {
    stepped: HashMap<ParamId, &'a Stepped>,
    /// What the parameters' tensors carried besides their values.
    pub contexts: HashMap<ParamId, ParameterContext>,
}

impl<'a> CutParameters<'a> {
    pub fn new(stepped: &'a [Stepped]) -> Self {
        let stepped = stepped.iter().map(|stepped| (stepped.id, stepped)).collect();
        Self { stepped, contexts: HashMap::new() }
    }
}

impl ModuleMapper for CutParameters<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // Burn's optimizers step the first of several places, too.
        let Some(Stepped { id, parts, comm, .. }) = self.stepped.remove(&param.id) else { return param };
        param.map(|tensor| {
            self.contexts.insert(*id, ParameterContext::capture(&tensor));
            // Burn's optimizers panic at a parameter without autodiff.
            Tensor::from_inner(part_of(tensor, *parts, comm.rank()))
        })
    }
}

/// A rank's part of a tensor, padded. `[..] -> [1, .., 1, part_len]`
fn part_of<const D: usize>(tensor: Tensor<D>, parts: FlatParts, rank: usize) -> Tensor<D> {
    let tensor = tensor.inner();
    let (device, dtype, range) = (tensor.device(), tensor.dtype(), parts.range(rank));
    let padding = parts.part_len() - range.len();
    let mut rows = Vec::with_capacity(2);
    if !range.is_empty() {
        let len = tensor.shape().num_elements();
        rows.push(tensor.reshape([len]).slice(range));
    }
    if padding > 0 {
        rows.push(Tensor::<1>::zeros([padding], (&device, dtype)));
    }
    let part = if rows.len() == 1 { rows.swap_remove(0) } else { Tensor::cat(rows, 0) };
    let mut dims = [1; D];
    dims.copy_from_slice(&parts.part_shape(D));
    part.reshape(dims)
}

/// The whole values of the stepped parameters, flat, from all ranks' parts. Collective.
///
/// # Panics
///
/// As [`all_gather`].
pub(super) fn gather<M: Module>(model: &M, stepped: &[Stepped]) -> HashMap<ParamId, Tensor<1>> {
    let mut collect = Parts { missing: stepped.iter().map(|stepped| stepped.id).collect(), found: Vec::new() };
    visit_params(model, &mut collect);
    let mut values = HashMap::with_capacity(stepped.len());
    let mut all = stepped.iter().zip(collect.found).peekable();
    while let Some(first) = all.next() {
        // Of one type, on one device and between the same ranks.
        let mut run = vec![first];
        let fits = |(stepped, part): &(&Stepped, Tensor<1>)| {
            let (other, theirs) = &run[0];
            (part.dtype(), part.device()) == (theirs.dtype(), theirs.device())
                && Arc::ptr_eq(&stepped.comm, &other.comm)
        };
        let rest: Vec<_> = std::iter::from_fn(|| all.next_if(fits)).collect();
        run.extend(rest);
        let sized = run.into_iter().map(|(stepped, part)| {
            let len = part.dims()[0] * stepped.comm.size();
            ((stepped, part), len)
        });
        for bucket in split(sized, GradientBucketsConfig::new().bucket_bytes) {
            gather_bucket(bucket, &mut values);
        }
    }
    values
}

fn gather_bucket(bucket: Vec<(&Stepped, Tensor<1>)>, values: &mut HashMap<ParamId, Tensor<1>>) {
    let Some((first, _)) = bucket.first() else { return };
    let comm = first.comm.clone();
    let (stepped, mut parts): (Vec<_>, Vec<_>) = bucket.into_iter().unzip();
    let sent = if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 0) };
    let len = sent.dims()[0];
    let gathered = all_gather(sent, &comm, PARAMETERS).reshape([comm.size(), len]);
    let mut start = 0;
    for Stepped { id, shape, parts, .. } in stepped {
        let (ranks, part) = (comm.size(), parts.part_len());
        let whole = gathered.clone().slice([0..ranks, start..start + part]).reshape([ranks * part]);
        values.insert(*id, whole.slice(0..shape.num_elements()));
        start += part;
    }
}

/// The parts as the optimizer left them, each once, in the model's order.
struct Parts {
    missing: HashSet<ParamId>,
    found: Vec<Tensor<1>>,
}

impl ParamVisitor for Parts {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, _path: &ModulePath) {
        if self.missing.remove(&param.id) {
            let part = param.val().inner();
            let len = part.shape().num_elements();
            self.found.push(part.reshape([len]));
        }
    }
}

/// Puts the whole values in the parts' place.
pub(super) struct PutBack<'a> {
    stepped: HashMap<ParamId, &'a Stepped>,
    contexts: HashMap<ParamId, ParameterContext>,
    values: HashMap<ParamId, Tensor<1>>,
}

impl<'a> PutBack<'a> {
    pub fn new(
        stepped: &'a [Stepped],
        contexts: HashMap<ParamId, ParameterContext>,
        values: HashMap<ParamId, Tensor<1>>,
    ) -> Self {
        Self { stepped: stepped.iter().map(|stepped| (stepped.id, stepped)).collect(), contexts, values }
    }
}

impl ModuleMapper for PutBack<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        let (Some(value), Some(context), Some(stepped)) =
            (self.values.remove(&id), self.contexts.remove(&id), self.stepped.get(&id))
        else {
            return param;
        };
        param.map(|_| context.restore(value.reshape(stepped.shape.clone())))
    }
}
