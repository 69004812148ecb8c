use std::{collections::HashMap, sync::Arc};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, TensorData},
};
use safetensors::Dtype;

use super::{
    HubError, HubFolder,
    decode::size_of,
    hub_folder::Inner,
    model::{ModelParam, model_params},
    plan::{Plan, PlannedParam, Source, parts_at},
    progress::{Listener, Progress},
    read::Reader,
};
use crate::{
    FsepRuntime,
    burn_compat::ModulePath,
    checkpoint::{Sharding, SharedError, Work, all_or_none},
    comm::{self, Communicator, Operation, local::LocalCommunicator},
    moe::ExpertsInfo,
};

const LOAD: Operation = Operation::new("load of a model folder");

/// How a model is loaded; equal on all ranks.
#[derive(Debug, Clone, Default)]
pub struct LoadConfig {
    runtime: Option<FsepRuntime>,
    ignored: Vec<String>,
    prefix: String,
    progress: Listener,
}

impl LoadConfig {
    /// Everything in the folder has to be in the model, which is one rank's.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the runtime of the model's layers: loading is collective then, and succeeds on all ranks or on none.
    pub fn with_runtime(mut self, runtime: &FsepRuntime) -> Self {
        self.runtime = Some(runtime.clone());
        self
    }

    /// Adds names of tensors that the folder may have and the model has not; `*` stands for anything.
    pub fn with_ignored<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.ignored.extend(names.into_iter().map(Into::into));
        self
    }

    /// Sets what stands before the paths of the model's parameters in the folder, for a model that is a part of it:
    /// `model.layers.0.mlp.`
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets who is told after each parameter how far this rank is.
    pub fn with_progress(mut self, progress: impl Fn(Progress<'_>) + Send + Sync + 'static) -> Self {
        self.progress = Listener::new(progress);
        self
    }
}

impl SharedError for HubError {
    fn severity(&self) -> u8 {
        1
    }

    fn of_peer(rank: usize, message: String, _severity: u8) -> Self {
        Self::Peer { rank, message }
    }

    fn panicked(reason: String) -> Self {
        Self::Panicked(reason)
    }
}

impl HubFolder {
    /// The model with the folder's values. Collective if the configuration has a runtime.
    ///
    /// Each rank reads its own part of the experts and everything else. Parameters keep types, devices and ids, and whether they
    /// are trained. Everything that can be known without values is checked first, for the whole model.
    ///
    /// # Errors
    ///
    /// On all ranks if one has an error: [`HubError::Missing`], [`HubError::Unused`], [`HubError::Shape`],
    /// [`HubError::TwoNames`] or [`HubError::MappedTwice`] if folder and model are not the same; [`HubError::Unsupported`] for
    /// a parameter that cannot be loaded; [`HubError::Changed`] or [`HubError::Io`] while reading; [`HubError::Divergence`] if
    /// ranks have another folder or model; [`HubError::Peer`] on ranks that have no error themselves; [`HubError::Comm`].
    pub fn load<M: Module>(&self, model: M, config: &LoadConfig) -> Result<M, HubError> {
        let LoadConfig { runtime, ignored, prefix, progress } = config;
        let single = LocalCommunicator::single();
        let comm = runtime.as_ref().map_or(&single as &dyn Communicator, FsepRuntime::comm);
        let shard = runtime.as_ref().map_or([0, 1], |runtime| {
            let experts = runtime.groups().experts();
            [experts.rank(), experts.size()]
        });
        let plan = model_params(runtime.as_ref(), &model)
            .and_then(|params| Plan::new(&self.inner.lookup(), params, prefix, ignored));
        let plan = Arc::new(all_or_none(comm, LOAD, plan)?);
        check_equal(comm, &self.inner, &plan)?;
        let total = plan.params.iter().map(|planned| planned.param.bytes() as u64).sum();
        progress.tell(0, total, "");
        let places = plan.params.iter().enumerate().map(|(i, planned)| (planned.param.path.clone(), i)).collect();
        let mut load = Load {
            path: ModulePath::default(),
            places,
            reading: Reading { folder: self.inner.clone(), plan, shard, reader: None },
            comm,
            listener: progress,
            done: 0,
            total,
            error: None,
        };
        let model = model.map(&mut load);
        let left = load.places.into_keys().next().map(|path| HubError::unsupported(&path, OTHER_PARAMETERS));
        match load.error.or(left) {
            None => Ok(model),
            Some(error) => Err(error),
        }
    }
}

const OTHER_PARAMETERS: &str = "a module's `visit` and `map` do not meet the same parameters";

/// Whether all ranks are about to do the same.
pub(super) fn check_equal(comm: &dyn Communicator, folder: &Inner, plan: &Plan) -> Result<(), HubError> {
    let difference = comm::agree(comm, LOAD, &[("the folder", folder.digest()), ("the model", plan.digest())])?;
    match difference {
        None => Ok(()),
        Some(comm::Difference { field, rank, .. }) => {
            let hint = "all ranks have to read the same folder to the same model";
            Err(HubError::Divergence { what: field, rank, hint })
        }
    }
}

impl ModelParam {
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of(self.dtype)
    }
}

/// Reads a parameter of the plan.
struct Reading {
    folder: Arc<Inner>,
    plan: Arc<Plan>,
    /// Which part of the experts, of how many.
    shard: [usize; 2],
    reader: Option<Reader>,
}

impl Reading {
    fn read(&mut self, place: usize, comm: &dyn Communicator) -> Result<Vec<u8>, HubError> {
        let reader = self.reader.take();
        let mut reader = reader.unwrap_or_else(|| Reader::new(self.folder.clone()));
        let [rank, ranks] = self.shard;
        if comm.size() == 1 {
            let bytes = read_param(&mut reader, &self.plan.params[place], rank, ranks)?;
            self.reader = Some(reader);
            return Ok(bytes);
        }
        // Disks differ in speed by more than any timeout, so ranks meet while they read.
        let plan = self.plan.clone();
        let work = Work::<_, HubError>::start(move || {
            let bytes = read_param(&mut reader, &plan.params[place], rank, ranks)?;
            Ok((bytes, reader))
        });
        let (bytes, reader) = work.finish(comm, LOAD)?;
        self.reader = Some(reader);
        Ok(bytes)
    }
}

/// What rank `rank` of the `ranks` that share the experts has of a parameter.
fn read_param(
    reader: &mut Reader,
    PlannedParam { param, source }: &PlannedParam,
    rank: usize,
    ranks: usize,
) -> Result<Vec<u8>, HubError> {
    let mut bytes = vec![0; param.bytes()];
    match source {
        Source::Tensor(name, view) => reader.read(name, view, 0..view.len(), param.dtype, &mut bytes)?,
        Source::Experts(parts) => {
            let width = size_of(param.dtype);
            let (experts, positions) = match &param.experts {
                Some(info) => {
                    let sharding = Sharding::new(info, ranks);
                    (sharding.experts_of(rank), sharding.params_of(rank))
                }
                None => (0..parts.len(), 0..param.shape[1]),
            };
            // Rows are as long as the longest shard: the last ones are padded with zeros.
            let rows = bytes.chunks_exact_mut((param.shape[1] * width).max(1));
            for (expert, row) in experts.zip(rows) {
                for (part, range, at) in parts_at(&parts[expert], positions.clone()) {
                    let to = &mut row[at * width..][..range.len() * width];
                    reader.read(&part.tensor, &part.view, range, param.dtype, to)?;
                }
            }
        }
    }
    Ok(bytes)
}

struct Load<'a> {
    path: ModulePath<ExpertsInfo>,
    /// Of parameters that are still to be read.
    places: HashMap<String, usize>,
    reading: Reading,
    comm: &'a dyn Communicator,
    listener: &'a Listener,
    done: u64,
    total: u64,
    error: Option<HubError>,
}

impl Load<'_> {
    fn read(&mut self) -> Result<TensorData, HubError> {
        let path = self.path.path();
        let place = self.places.remove(&path).ok_or_else(|| HubError::unsupported(&path, OTHER_PARAMETERS))?;
        let bytes = self.reading.read(place, self.comm)?;
        self.done += bytes.len() as u64;
        self.listener.tell(self.done, self.total, &path);
        let ModelParam { dtype, shape, .. } = &self.reading.plan.params[place].param;
        Ok(TensorData::from_bytes_vec(bytes, shape.clone(), burn_dtype(*dtype)))
    }
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let device = param.lazy_device();
        // The old value goes before the new one comes: no two of them at once.
        let param = match param.is_initialized() {
            true => param.map(|_| Tensor::zeros([1; D], &device)),
            false => param,
        };
        match self.read() {
            Ok(data) => {
                let (id, dtype) = (param.id, data.dtype());
                param.transform_for_load(Tensor::from_data(data, (&device, dtype)), id)
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

fn burn_dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => DType::F32,
    }
}
