use std::hash::{DefaultHasher, Hash, Hasher};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor, TensorData},
};

use super::params::{ModulePath, ParamVisitor, Placement, visit_params};
use crate::{
    FsepError, FsepRuntime,
    comm::{Communicator, Difference, Operation, agree},
};

const COUNT: Operation = Operation::new("number of replicated parameters");
const FORM: Operation = Operation::new("shapes of the replicated parameters");
const VALUES: Operation = Operation::new("initial values of the replicated parameters");

/// Gives all ranks rank 0's values of the replicated parameters, bit for bit, and all groups the first one's shards. Collective.
///
/// Needed once, after initialisation, unless all ranks draw the same values anyway;
/// [`TrainerConfig::init`](super::TrainerConfig::init) does it. Parameters travel one by one, so the
/// host holds no more than the largest one at a time.
///
/// # Errors
///
/// [`FsepError::Config`] on all ranks, before anything is sent, if their replicated parameters are not as many and of the
/// same shapes and element types in the same order, or are quantized; [`FsepError::Device`] if one cannot be read,
/// [`FsepError::Comm`] if a collective fails.
pub fn broadcast_parameters<M: Module>(runtime: &FsepRuntime, model: M) -> Result<M, FsepError> {
    if runtime.world_size() == 1 {
        return Ok(model);
    }
    check_forms(runtime, &model)?;
    let mut broadcast = Broadcast { runtime, path: ModulePath::default(), error: None };
    let model = model.map(&mut broadcast);
    match broadcast.error {
        None => Ok(model),
        Some(error) => {
            runtime.comm().abort(&error.to_string());
            Err(error)
        }
    }
}

/// Checks that all ranks have parameters of the same forms. Collective.
pub(super) fn check_forms<M: Module>(runtime: &FsepRuntime, model: &M) -> Result<(), FsepError> {
    let mut forms = Forms(Vec::new());
    visit_params(model, &mut forms);
    let (forms, comm) = (forms.0, runtime.comm());
    let differ = |what: String| Err(FsepError::Config(format!("ranks have different models: {what}")));
    if let Some(Difference { rank, values: [first, theirs], .. }) =
        agree(comm, COUNT, &[("number of replicated parameters", forms.len() as u64)])?
    {
        return differ(format!("rank 0 has {first} replicated parameters, rank {rank} has {theirs}"));
    }
    let fields: Vec<_> = forms.iter().map(|form| (form.parameter.as_str(), form.fingerprint())).collect();
    if let Some(Difference { rank, place, .. }) = agree(comm, FORM, &fields)? {
        let Form { parameter, shape, dtype } = &forms[place];
        return differ(format!(
            "the replicated parameter {} of {} (`{parameter}`) is another one on rank {rank} than on rank 0; here it is \
             {shape:?} of {dtype:?}",
            place + 1,
            forms.len()
        ));
    }
    match forms.iter().find(|form| matches!(form.dtype, DType::QFloat(_))) {
        Some(Form { parameter, .. }) => Err(FsepError::Config(format!(
            "the replicated parameter `{parameter}` is quantized: quantize after training"
        ))),
        None => Ok(()),
    }
}

/// What has to be equal for a parameter's bytes to mean the same.
struct Form {
    /// Its path in the model, for messages.
    parameter: String,
    shape: Vec<usize>,
    dtype: DType,
}

impl Form {
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.shape.hash(&mut hasher);
        self.dtype.hash(&mut hasher);
        hasher.finish()
    }
}

struct Forms(Vec<Form>);

impl ParamVisitor for Forms {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        if Placement::at(path) == Placement::Replicated {
            let value = param.val();
            self.0.push(Form { parameter: path.path(), shape: value.shape().to_vec(), dtype: value.dtype() });
        }
    }
}

/// Sends or receives each parameter where it is met.
struct Broadcast<'a> {
    runtime: &'a FsepRuntime,
    path: ModulePath,
    error: Option<FsepError>,
}

impl Broadcast<'_> {
    /// The ranks that have a parameter's values.
    fn comm(&self, placement: Placement) -> &dyn Communicator {
        match placement {
            Placement::Replicated => self.runtime.comm(),
            Placement::Sharded => self.runtime.groups().replicas().as_ref(),
        }
    }

    fn send<const D: usize>(comm: &dyn Communicator, value: Tensor<D>) -> Result<(), FsepError> {
        let data = value.try_into_data().map_err(|error| FsepError::Device(error.to_string()))?;
        Ok(comm.broadcast(VALUES, &mut data.into_bytes(), 0)?)
    }

    fn receive<const D: usize>(comm: &dyn Communicator, value: &Tensor<D>) -> Result<TensorData, FsepError> {
        let (shape, dtype) = (value.shape(), value.dtype());
        let mut bytes = vec![0; shape.num_elements() * dtype.size()];
        comm.broadcast(VALUES, &mut bytes, 0)?;
        Ok(TensorData::from_bytes_vec(bytes, shape, dtype))
    }
}

impl ModuleMapper for Broadcast<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let is_empty = param.shape().num_elements() == 0;
        let comm = self.comm(Placement::at(&self.path));
        if comm.size() == 1 || is_empty || self.error.is_some() {
            return param;
        }
        if comm.rank() == 0 {
            self.error = Self::send(comm, param.val()).err();
            return param;
        }
        match Self::receive(comm, &param.val()) {
            Ok(data) => param.map(|tensor| {
                let is_trained = tensor.is_require_grad();
                let value = Tensor::<D>::from_data(data, (&tensor.device(), tensor.dtype()));
                value.set_require_grad(is_trained)
            }),
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::comm::local::{LaunchConfig, launch};

    #[derive(Module, Debug)]
    struct Model {
        matrix: Param<Tensor<2>>,
        rows: Vec<Param<Tensor<1>>>,
    }

    /// A model whose values depend on the rank.
    fn model(rank: usize, lens: &[(usize, DType)]) -> Model {
        let device = Device::flex().autodiff();
        let row = |len: usize, dtype: DType| {
            // All bit patterns: numbers that other types round, infinities, and numbers that are none.
            let bytes = (0..len * dtype.size()).map(|i| (i * 37 + i * i * 11 + 101 * (1 - rank.min(1))) as u8);
            Tensor::<1>::from_data(TensorData::from_bytes_vec(bytes.collect(), [len], dtype), (&device, dtype))
        };
        Model {
            matrix: Param::from_tensor(Tensor::full([3, 2], rank as f32 + 0.1, &device)),
            rows: lens.iter().map(|&(len, dtype)| Param::from_tensor(row(len, dtype))).collect(),
        }
    }

    fn bytes(model: &Model) -> Vec<Vec<u8>> {
        let rows = model.rows.iter().map(|row| row.val().into_data().as_bytes().to_vec());
        std::iter::once(model.matrix.val().into_data().as_bytes().to_vec()).chain(rows).collect()
    }

    #[test]
    fn every_rank_gets_rank_0s_bits() {
        let lens = [(300, DType::F32), (400, DType::BF16), (500, DType::F16), (600, DType::F64), (0, DType::F32)];
        let results = launch(&LaunchConfig::new(3), |comm| {
            let runtime = FsepRuntime::new(comm)?;
            let mut model = model(runtime.rank(), &lens);
            model.rows[1] = model.rows[1].clone().set_require_grad(false);
            let model = broadcast_parameters(&runtime, model)?;
            let is_trained: Vec<_> = model.rows.iter().map(|row| row.val().is_require_grad()).collect();
            Ok::<_, FsepError>((bytes(&model), is_trained))
        });
        let expected = bytes(&model(0, &lens));
        assert_ne!(expected, bytes(&model(1, &lens)));
        for result in results {
            let (bytes, is_trained) = result.unwrap();
            assert!(bytes == expected, "bits are lost");
            assert_eq!(is_trained, [true, false, true, true, true]);
        }
    }

    #[test]
    fn ranks_with_different_models_are_told_so_before_anything_is_sent() {
        let f32s = |lens: &[usize]| -> Vec<_> { lens.iter().map(|&len| (len, DType::F32)).collect() };
        for (theirs, expected) in [
            (f32s(&[4]), "rank 0 has 3 replicated parameters, rank 2 has 2"),
            // As many bytes together.
            (f32s(&[5, 4]), "parameter 2 of 3 (`rows.0`) is another one on rank 2"),
            (vec![(4, DType::F32), (10, DType::BF16)], "parameter 3 of 3 (`rows.1`) is another one on rank 2"),
        ] {
            let results = launch(&LaunchConfig::new(3), |comm| {
                let runtime = FsepRuntime::new(comm)?;
                let model = match runtime.rank() {
                    2 => model(2, &theirs),
                    rank => model(rank, &f32s(&[4, 5])),
                };
                match broadcast_parameters(&runtime, model) {
                    Err(FsepError::Config(reason)) => Ok(reason),
                    other => panic!("{other:?}"),
                }
            });
            for result in results {
                let reason: String =
                    result.unwrap_or_else(|error: crate::comm::local::RankError<FsepError>| panic!("{error}"));
                assert!(reason.contains(expected), "{reason}");
            }
        }
    }
}
