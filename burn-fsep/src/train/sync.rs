use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
};

use burn::{
    backend::{Dispatch, DispatchTensor},
    module::{Module, Param, ParamId},
    optim::GradientsParams,
    tensor::{Device, Shape, Tensor},
};

use super::{
    buckets::GradientBucketsConfig,
    collector::{Collected, Collector, StartedBucket, split},
    params::{ModulePath, ParamVisitor, Placement, visit_params},
    reduction::{Part, Reduction},
};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, all_gather_u64},
    ops::FsepDeviceOps,
};

/// Averages the gradients of all replicated parameters over ranks; expert shards are left alone, since their
/// gradients are complete after backward. Collective.
///
/// A parameter that got a gradient on some ranks only gets the average too, with zeros for the others; one that got
/// none anywhere (a frozen one) stays without. All ranks end with the same bits. With NCCL, gradients on a GPU stay there;
/// [`GradientBuckets`](super::GradientBuckets) do the same while backward still runs.
///
/// # Errors
///
/// [`FsepError::Comm`] if a collective fails, [`FsepError::Config`] if ranks have different replicated parameters.
pub fn sync_gradients<M: Module>(
    runtime: &FsepRuntime,
    model: &M,
    grads: &mut GradientsParams,
) -> Result<(), FsepError> {
    sync(runtime, None, GradientBucketsConfig::new().bucket_bytes, model, grads)
}

/// [`sync_gradients`] that starts with what a collector has on its way.
pub(super) fn sync<M: Module>(
    runtime: &FsepRuntime,
    collector: Option<&Collector>,
    bucket_bytes: usize,
    model: &M,
    grads: &mut GradientsParams,
) -> Result<(), FsepError> {
    let collected = collector.map(Collector::take);
    if runtime.world_size() == 1 {
        return Ok(());
    }
    let result = average(runtime, collected, bucket_bytes, model, grads);
    let result = result.and_then(|arrivals| match (collector, arrivals) {
        (Some(collector), Some(arrivals)) => plan_buckets(runtime, collector, bucket_bytes, model, &arrivals),
        _ => Ok(()),
    });
    if let Err(error) = &result {
        runtime.comm().abort(&error.to_string());
    }
    result
}

/// Averages and, if there are no buckets yet, returns in which order gradients came.
fn average<M: Module>(
    runtime: &FsepRuntime,
    collected: Option<Collected>,
    bucket_bytes: usize,
    model: &M,
    grads: &mut GradientsParams,
) -> Result<Option<Vec<ParamId>>, FsepError> {
    let gradients = Gradients::of(model, grads);
    let Collected { buckets, started, arrivals } = match collected {
        Some(collected) => collected,
        None => Collected { buckets: None, started: Vec::new(), arrivals: Vec::new() },
    };
    let arrivals = buckets.is_none().then_some(arrivals);
    let buckets = gradients.indices(&buckets.unwrap_or_default())?;
    let agreed = Agreed::on(runtime, &gradients, &started, gradients.fingerprint(bucket_bytes, &buckets))?;

    // Some rank has started these already.
    let mut reductions: Vec<(Vec<usize>, Reduction)> = Vec::new();
    let mut started = started.into_iter();
    for bucket in &buckets[..agreed.started] {
        let reduction = match started.next() {
            Some(bucket) => bucket.reduction,
            None => gradients.start(runtime, bucket)?,
        };
        reductions.push((bucket.clone(), reduction));
    }
    let mut is_done = vec![false; gradients.len()];
    for &i in buckets[..agreed.started].iter().flatten() {
        is_done[i] = !agreed.stale[i];
    }
    let rest = (0..gradients.len()).filter(|&i| agreed.present[i] && !is_done[i]);
    for bucket in split(rest.map(|i| (i, gradients.num_elements(i))), bucket_bytes) {
        let reduction = gradients.start(runtime, &bucket)?;
        reductions.push((bucket, reduction));
    }

    let mut means: Vec<Option<Tensor<1>>> = vec![None; gradients.len()];
    for (bucket, reduction) in reductions {
        let flat = reduction.wait()?;
        let mut start = 0;
        for i in bucket {
            let end = start + gradients.num_elements(i);
            // A stale mean comes first and is replaced.
            means[i] = agreed.present[i].then(|| flat.clone().slice(start..end));
            start = end;
        }
    }
    gradients.put_back(model, grads, means);
    Ok(arrivals)
}

/// What the ranks know together of the gradients. Shape `[P]` each, for `P` replicated parameters.
struct Agreed {
    /// Some rank has a gradient.
    present: Vec<bool>,
    /// Some rank has started a bucket with another gradient than it has now.
    stale: Vec<bool>,
    /// How many buckets some rank has started.
    started: usize,
}

impl Agreed {
    /// `fingerprint`: what has to be equal on all ranks. Collective.
    fn on(
        runtime: &FsepRuntime,
        gradients: &Gradients,
        started: &[StartedBucket],
        fingerprint: u64,
    ) -> Result<Self, FsepError> {
        let count = gradients.len();
        let mut stale = vec![false; count];
        for (id, used) in started.iter().flat_map(|bucket| &bucket.gradients) {
            let i = gradients.index[id];
            let is_same = |now: &DispatchTensor| <Dispatch as FsepDeviceOps>::fsep_is_same(used.clone(), now.clone());
            stale[i] = !gradients.get(i).is_some_and(is_same);
        }
        let present = (0..count).map(|i| gradients.get(i).is_some()).chain(stale);
        let mut ours = vec![fingerprint, started.len() as u64];
        ours.extend(to_bits(present));
        let all = all_gather_u64(runtime.comm(), Operation::new("presence of gradients"), &ours)?;
        let mut flags = vec![0; ours.len() - 2];
        let mut most = 0;
        for theirs in all.chunks_exact(ours.len()) {
            if theirs[0] != all[0] {
                return Err(FsepError::Config(
                    "the ranks' models or gradient buckets differ: replicated parameters have to be of the same shapes \
                     in the same order, and buckets of the same configuration and used from the same step on"
                        .into(),
                ));
            }
            most = most.max(theirs[1] as usize);
            flags.iter_mut().zip(&theirs[2..]).for_each(|(flags, theirs)| *flags |= theirs);
        }
        let is_set = |i: usize| flags[i / 64] >> (i % 64) & 1 == 1;
        Ok(Self {
            present: (0..count).map(is_set).collect(),
            stale: (count..2 * count).map(is_set).collect(),
            started: most,
        })
    }
}

/// 64 flags a number.
fn to_bits(flags: impl Iterator<Item = bool>) -> Vec<u64> {
    let mut bits = Vec::new();
    for (i, flag) in flags.enumerate() {
        if i % 64 == 0 {
            bits.push(0);
        }
        bits[i / 64] |= u64::from(flag) << (i % 64);
    }
    bits
}

/// Makes buckets of the parameters that were hooked, in the order in which their gradients came on rank 0. Collective.
fn plan_buckets<M: Module>(
    runtime: &FsepRuntime,
    collector: &Collector,
    bucket_bytes: usize,
    model: &M,
    arrivals: &[ParamId],
) -> Result<(), FsepError> {
    let gradients = Gradients::of(model, &GradientsParams::new());
    // By parameter: its place in the order, from 1; 0 if it was not hooked.
    let mut places = vec![0u32; gradients.len()];
    for (place, id) in arrivals.iter().enumerate() {
        // Of another rank's making only if the model is another one, which the first reduction will say.
        if let Some(&i) = gradients.index.get(id) {
            places[i] = place as u32 + 1;
        }
    }
    runtime.comm().broadcast(Operation::new("order of gradients"), bytemuck::cast_slice_mut(&mut places), 0)?;
    let mut order: Vec<usize> = (0..places.len()).filter(|&i| places[i] > 0).collect();
    order.sort_by_key(|&i| places[i]);
    if order.is_empty() {
        return Ok(());
    }
    let buckets = split(order.into_iter().map(|i| (i, gradients.num_elements(i))), bucket_bytes);
    let lens: BTreeSet<usize> =
        buckets.iter().map(|bucket| bucket.iter().map(|&i| gradients.num_elements(i)).sum()).collect();
    for len in lens {
        Reduction::warm_up(runtime.dense_comm(), len, gradients.entries[buckets[0][0]].device.clone())?;
    }
    let ids = |bucket: Vec<usize>| bucket.into_iter().map(|i| gradients.entries[i].id).collect();
    collector.set_buckets(buckets.into_iter().map(ids).collect());
    Ok(())
}

/// The replicated parameters of a model in their declared order, each once, and their gradients on this rank.
struct Gradients {
    entries: Vec<Entry>,
    index: HashMap<ParamId, usize>,
}

struct Entry {
    id: ParamId,
    shape: Shape,
    device: Device,
    gradient: Option<DispatchTensor>,
}

impl Gradients {
    fn of<M: Module>(model: &M, grads: &GradientsParams) -> Self {
        let mut collect = Collect { grads, found: Self { entries: Vec::new(), index: HashMap::new() } };
        visit_params(model, &mut collect);
        collect.found
    }

    fn len(&self) -> usize {
        self.entries.len()
    }

    fn get(&self, index: usize) -> Option<&DispatchTensor> {
        self.entries[index].gradient.as_ref()
    }

    fn num_elements(&self, index: usize) -> usize {
        self.entries[index].shape.num_elements()
    }

    /// A number that depends on all shapes and buckets.
    fn fingerprint(&self, bucket_bytes: usize, buckets: &[Vec<usize>]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (bucket_bytes, buckets).hash(&mut hasher);
        for entry in &self.entries {
            entry.shape.as_slice().hash(&mut hasher);
        }
        hasher.finish()
    }

    fn indices(&self, buckets: &[Vec<ParamId>]) -> Result<Vec<Vec<usize>>, FsepError> {
        let index = |id: &ParamId| {
            self.index.get(id).copied().ok_or_else(|| {
                FsepError::Config(format!(
                    "the model lacks the parameter {id}, which was prepared before: gradient buckets are made for one \
                     model"
                ))
            })
        };
        buckets.iter().map(|bucket| bucket.iter().map(index).collect()).collect()
    }

    fn start(&self, runtime: &FsepRuntime, bucket: &[usize]) -> Result<Reduction, FsepError> {
        let part = |&i: &usize| match self.get(i) {
            Some(gradient) => Part::Gradient(gradient.clone()),
            None => Part::Zeros(self.num_elements(i), self.entries[i].device.clone()),
        };
        Reduction::start(runtime.dense_comm(), bucket.iter().map(part).collect())
    }

    /// Replaces the gradients by their means, where there is one.
    fn put_back<M: Module>(self, model: &M, grads: &mut GradientsParams, means: Vec<Option<Tensor<1>>>) {
        let means = self.entries.into_iter().zip(means).filter_map(|(entry, mean)| Some((entry.id, mean?)));
        visit_params(model, &mut PutBack { grads, means: means.collect() });
    }
}

struct Collect<'a> {
    grads: &'a GradientsParams,
    found: Gradients,
}

impl ParamVisitor for Collect<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        let found = &mut self.found;
        if Placement::at(path) == Placement::Sharded || found.index.contains_key(&param.id) {
            return;
        }
        let gradient = self.grads.get::<D>(param.id).map(Tensor::into_dispatch);
        found.index.insert(param.id, found.entries.len());
        found.entries.push(Entry { id: param.id, shape: param.shape(), device: param.device().inner(), gradient });
    }
}

struct PutBack<'a> {
    grads: &'a mut GradientsParams,
    means: HashMap<ParamId, Tensor<1>>,
}

impl ParamVisitor for PutBack<'_> {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, _path: &ModulePath) {
        if let Some(mean) = self.means.remove(&param.id) {
            self.grads.register::<D>(param.id, mean.reshape(param.shape()).cast(param.dtype()));
        }
    }
}
