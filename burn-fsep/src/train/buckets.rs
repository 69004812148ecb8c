use std::sync::{Arc, atomic::AtomicBool};

use burn::{
    module::{Module, ModuleMapper, Param},
    optim::GradientsParams,
    tensor::{FloatDType, Tensor},
};
use derive_new::new;

use super::{
    collector::Collector,
    params::{ModulePath, Placement},
    sync::sync,
};
use crate::{
    FsepError, FsepRuntime,
    burn_compat::has_running_statistics,
    ops::{GradientHook, gradient_hook},
};

/// Configuration of [`GradientBuckets`]; equal on all ranks.
#[derive(new, Debug, Clone)]
pub struct GradientBucketsConfig {
    /// Bytes of gradients, in single precision, that are reduced together; a bucket ends with the parameter that fills
    /// it.
    #[new(value = "25 << 20")]
    pub bucket_bytes: usize,
    /// Element type in which prepared modules compute; that of their parameters if `None`.
    #[new(default)]
    pub compute_dtype: Option<FloatDType>,
}

impl Default for GradientBucketsConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl GradientBucketsConfig {
    /// Sets how many bytes of gradients are reduced together (25 MiB by default).
    pub fn with_bucket_bytes(mut self, bucket_bytes: usize) -> Self {
        self.bucket_bytes = bucket_bytes;
        self
    }

    /// Sets the element type in which prepared modules compute, usually bfloat16. Parameters, their gradients and the
    /// optimizer's state keep theirs.
    pub fn with_compute_dtype(mut self, dtype: Option<FloatDType>) -> Self {
        self.compute_dtype = dtype;
        self
    }

    /// The buckets of a rank. Not collective.
    pub fn init(&self, runtime: &FsepRuntime) -> GradientBuckets {
        GradientBuckets {
            collector: Arc::new(Collector::new(runtime)),
            bucket_bytes: self.bucket_bytes,
            compute_dtype: self.compute_dtype,
        }
    }
}

/// Averages the gradients of replicated parameters over ranks while backward still runs.
///
/// A model prepares each of its blocks in its forward pass; when backward has passed the block, its gradients are complete
/// and, as soon as a bucket is full, on their way. [`GradientBuckets::sync`], in place of
/// [`sync_gradients`](super::sync_gradients), waits for them and reduces the rest. The result is the same: nothing depends
/// on which parameters were prepared, on which ranks, or how often. Cloning gives another handle on the same buckets, so
/// a model may carry them in a field with `#[module(skip)]`.
///
/// In the first step nothing overlaps: it shows the order in which gradients come (rank 0's), in which all ranks then
/// start their buckets. A parameter that is prepared twice in a step (tied weights) waits for its last use. One that is
/// also used without being prepared, and any whose gradient is changed between backward and the sync (scaled,
/// accumulated), is reduced by the sync as it finds it. So several backward passes before one sync are right; call
/// [`GradientBuckets::pause`] before each of them to not start reductions in vain, or sync each pass and add the results.
///
/// Only over NCCL do reductions overlap with backward. Over TCP, MPI and between threads each one waits for all ranks, so
/// they all happen in the sync.
///
/// Gradients are reduced in single precision. A bucket is a copy, so all replicated gradients exist twice for a while.
///
/// ```
/// # use burn::{module::Module, nn::{Linear, LinearConfig}, optim::GradientsParams, prelude::*};
/// # use burn_fsep::{FsepRuntime, train::{GradientBuckets, GradientBucketsConfig}};
/// #[derive(Module, Debug)]
/// struct Block {
///     linear: Linear,
///     #[module(skip)]
///     buckets: GradientBuckets,
/// }
///
/// impl Block {
///     fn forward(&self, x: Tensor<2>) -> Tensor<2> {
///         let linear = self.buckets.prepare(&self.linear, &x);
///         linear.forward(x)
///     }
/// }
///
/// # let device = Device::flex().autodiff();
/// let buckets = GradientBucketsConfig::new().init(&FsepRuntime::single());
/// let block = Block { linear: LinearConfig::new(4, 4).init(&device), buckets };
/// let loss = block.forward(Tensor::ones([2, 4], &device)).sum();
/// let mut grads = GradientsParams::from_grads(loss.backward(), &block);
/// block.buckets.sync(&block, &mut grads)?;
/// # assert!(grads.get::<2>(block.linear.weight.id).is_some());
/// # Ok::<_, burn_fsep::FsepError>(())
/// ```
#[derive(Debug, Clone)]
pub struct GradientBuckets {
    collector: Arc<Collector>,
    bucket_bytes: usize,
    compute_dtype: Option<FloatDType>,
}

impl GradientBuckets {
    /// Buckets with default configuration; see [`GradientBucketsConfig`].
    pub fn new(runtime: &FsepRuntime) -> Self {
        GradientBucketsConfig::new().init(runtime)
    }

    /// The same module for one use on `input`, an activation that the module's computation starts from: it computes in the
    /// compute type, and its parameters' gradients are collected when backward has come from the module's output to
    /// `input`. Expert shards and parameters without gradients are not collected.
    ///
    /// The gradients are those of `module`'s parameters, in their element type. `input` itself is not cast.
    ///
    /// # Panics
    ///
    /// With a compute type, if the module has a `BatchNorm`: clones share its running statistics, which would get that type
    /// for good. Prepare the modules beside it.
    pub fn prepare<M: Module, const D: usize>(&self, module: &M, input: &Tensor<D>) -> M {
        let input_served = Arc::new(AtomicBool::new(false));
        module.clone().map(&mut Prepare { buckets: self, input, input_served, path: ModulePath::default() })
    }

    /// Bytes of gradients that are reduced together.
    pub(super) fn bucket_bytes(&self) -> usize {
        self.bucket_bytes
    }

    /// Lets no reduction start before the next sync: gradients are accumulated over several backward passes.
    pub fn pause(&self) {
        self.collector.pause();
    }

    /// How many reductions have been started since the last sync: what overlaps with backward.
    pub fn num_started(&self) -> usize {
        self.collector.num_started()
    }

    /// As [`sync_gradients`](super::sync_gradients), of which it starts with what is on its way. Collective.
    ///
    /// # Errors
    ///
    /// As there, and [`FsepError::Config`] if the model lacks a parameter that was prepared in the first step.
    pub fn sync<M: Module>(&self, model: &M, grads: &mut GradientsParams) -> Result<(), FsepError> {
        sync(self.collector.runtime(), Some(&self.collector), self.bucket_bytes, model, grads)
    }
}

struct Prepare<'a, const D: usize> {
    buckets: &'a GradientBuckets,
    input: &'a Tensor<D>,
    input_served: Arc<AtomicBool>,
    path: ModulePath,
}

impl<const I: usize> ModuleMapper for Prepare<'_, I> {
    fn enter_module(&mut self, name: &str, container: &str) {
        assert!(
            self.buckets.compute_dtype.is_none() || !has_running_statistics(container),
            "GradientBuckets::prepare: a BatchNorm cannot compute in another type than its running statistics; prepare the modules \
             beside it"
        );
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if Placement::at(&self.path) == Placement::Sharded {
            return param;
        }
        let dtype = self.buckets.compute_dtype;
        let (id, value, mapper) = param.consume();
        let value = if value.is_require_grad() {
            let collector = &self.buckets.collector;
            collector.expect(id);
            let hook = GradientHook {
                parameter: id,
                sink: Some(collector.clone()),
                dtype,
                input_served: self.input_served.clone(),
            };
            gradient_hook(value, self.input.clone(), hook)
        } else {
            match dtype {
                Some(dtype) => value.cast(dtype),
                None => value,
            }
        };
        Param::from_mapped_value(id, value, mapper)
    }
}
