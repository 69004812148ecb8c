//! Optimizer state: out of Burn's record, and back into one.

use std::collections::BTreeMap;

use burn::{
    module::ParamId,
    optim::{ModuleOptimizer, OptimizerRecord},
    tensor::{Bytes, TensorData},
};
use burn_pack::{Reader, Scalar, Tensor, Writer};

use super::panics::catch_panic;

/// What an optimizer keeps of one parameter, by field.
///
/// Relied on: Burn shows it in an [`OptimizerRecord`] alone, which shows it in a container of burn-pack alone. There
/// `"42.momentum.time"` is the field `momentum.time` of the parameter with the id 42, a tensor or a scalar; the scalar
/// `__rank` is the parameter's number of dimensions, `history.len` that of the tensors `history.0`, `history.1`, and so on;
/// the note `"42"` is the parameter's path, for optimizers with groups.
#[derive(Debug, Clone)]
pub(crate) struct ParamState<T = TensorData> {
    pub tensors: BTreeMap<String, T>,
    pub scalars: BTreeMap<String, Scalar>,
}

impl<T> Default for ParamState<T> {
    fn default() -> Self {
        Self { tensors: BTreeMap::new(), scalars: BTreeMap::new() }
    }
}

impl<T> ParamState<T> {
    /// The same with other tensors; `to` gets each one's field.
    pub fn try_map<U, E>(self, mut to: impl FnMut(&str, T) -> Result<U, E>) -> Result<ParamState<U>, E> {
        let tensors = self.tensors.into_iter().map(|(field, tensor)| Ok((to(&field, tensor)?, field)));
        let tensors = tensors.map(|result| result.map(|(tensor, field)| (field, tensor)));
        Ok(ParamState { tensors: tensors.collect::<Result<_, E>>()?, scalars: self.scalars })
    }

    /// Makes it the state of a parameter of so many dimensions, if it is one.
    pub fn set_num_dims(&mut self, num_dims: usize) {
        if let Some(rank) = self.scalars.get_mut(RANK) {
            *rank = Scalar::UInt(num_dims as u64);
        }
    }

    fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.scalars.is_empty()
    }
}

/// Where Burn has the number of dimensions of the parameter that a state belongs to.
const RANK: &str = "__rank";

/// What is wrong with a scalar that Burn would trust: of a parameter of so many dimensions, whose state has tensors with these
/// fields.
///
/// Relied on: these are the two kinds of scalars by which Burn takes memory, or panics, before it looks at tensors.
pub(crate) fn check_scalar<'a>(
    field: &str,
    scalar: Scalar,
    num_dims: usize,
    mut fields: impl Iterator<Item = &'a String>,
) -> Result<(), String> {
    let is = |expected: usize| u64::try_from(scalar) == Ok(expected as u64);
    if field == RANK && !is(num_dims) {
        return Err(format!("is not the number of dimensions, {num_dims}"));
    }
    if let Some(list) = field.strip_suffix("len").filter(|list| list.ends_with('.')) {
        let found = fields.by_ref().filter(|field| field.starts_with(list)).count();
        if !is(found) {
            return Err(format!("does not say how many tensors there are, {found}"));
        }
    }
    Ok(())
}

/// The state of each parameter, by id, in host memory.
///
/// # Errors
///
/// What is wrong with the record.
pub(crate) fn states_of(record: OptimizerRecord) -> Result<BTreeMap<u64, ParamState>, String> {
    let bytes = record.into_bytes().map_err(|error| error.to_string())?;
    let reader = Reader::from_bytes(bytes).map_err(|error| error.to_string())?;
    let mut states: BTreeMap<u64, ParamState> = BTreeMap::new();
    for (name, &scalar) in reader.scalars() {
        let (id, field) = split(name)?;
        states.entry(id).or_default().scalars.insert(field, scalar);
    }
    for tensor in reader.into_tensors().map_err(|error| error.to_string())? {
        let (name, dtype, shape, _, bytes) = tensor.into_parts().map_err(|error| error.to_string())?;
        let (id, field) = split(&name)?;
        states.entry(id).or_default().tensors.insert(field, TensorData::from_bytes(bytes, shape, dtype));
    }
    Ok(states)
}

/// `"42.momentum.time"` is the field `momentum.time` of parameter 42.
fn split(name: &str) -> Result<(u64, String), String> {
    let parts = name.split_once('.').and_then(|(id, field)| Some((id.parse().ok()?, field.to_string())));
    parts.ok_or_else(|| format!("`{name}` is of no parameter"))
}

/// Why an optimizer did not take its state.
#[derive(Debug, PartialEq)]
pub(crate) struct StateError {
    /// The place of the parameter whose state it is, if it is one's.
    pub place: Option<usize>,
    pub reason: String,
}

impl StateError {
    fn of_all(reason: String) -> Self {
        Self { place: None, reason }
    }
}

/// The optimizer with these states of parameters, which are given with their ids and paths.
///
/// Relied on: Burn leaves out, without a word, states and fields that the optimizer does not have, and loads tensors in the
/// default types of `Device::default()`. It does so whatever the tensors' sizes are. So the same is loaded first with tensors
/// of one element, to see what is left of it. Where a state's number of dimensions is not the optimizer's, it panics.
///
/// # Errors
///
/// The first parameter whose state the optimizer does not take as it is, and why.
pub(crate) fn load_states(
    optimizer: &ModuleOptimizer,
    params: &[(ParamId, &str)],
    states: Vec<ParamState>,
) -> Result<ModuleOptimizer, StateError> {
    let probes: Vec<_> = states.iter().map(probe).collect();
    let probed = record_of(params, probes.clone()).map_err(StateError::of_all)?;
    let loaded = catch_panic(|| optimizer.clone().load_record(probed))
        .map_err(|message| StateError::of_all(format!("Burn cannot load its state: {message}")))?;
    let mut found = states_of(loaded.to_record()).map_err(StateError::of_all)?;
    for (place, ((id, _), probe)) in params.iter().zip(&probes).enumerate() {
        if !probe.is_empty() {
            let difference = match found.remove(&id.val()) {
                Some(found) => difference(probe, &found),
                None => Some("is of another kind of optimizer".into()),
            };
            if let Some(reason) = difference {
                return Err(StateError { place: Some(place), reason });
            }
        }
    }
    Ok(optimizer.clone().load_record(record_of(params, states).map_err(StateError::of_all)?))
}

/// The same state with tensors of one element.
fn probe(state: &ParamState) -> ParamState {
    let small = |tensor: &TensorData| {
        let (dtype, dims) = (tensor.dtype(), vec![1; tensor.shape().num_dims()]);
        TensorData::from_bytes_vec(vec![0; dtype.size()], dims, dtype)
    };
    let tensors = state.tensors.iter().map(|(field, tensor)| (field.clone(), small(tensor)));
    ParamState { tensors: tensors.collect(), scalars: state.scalars.clone() }
}

/// What an optimizer did not take of a state.
fn difference(saved: &ParamState, found: &ParamState) -> Option<String> {
    let unknown = |field: &str| Some(format!("has a field `{field}` that this optimizer does not have"));
    for (field, tensor) in &saved.tensors {
        match found.tensors.get(field) {
            None => return unknown(field),
            Some(other) if other.dtype() != tensor.dtype() => {
                return Some(format!(
                    "is of type {:?}, but Burn loads it in the default type of `Device::default()`, {:?}: configure that \
                     device before it is used (`Device::configure`), or use an optimizer that keeps the type \
                     (`FusedAdamW`)",
                    tensor.dtype(),
                    other.dtype()
                ));
            }
            Some(_) => {}
        }
    }
    saved.scalars.keys().find(|field| !found.scalars.contains_key(*field)).and_then(|field| unknown(field))
}

fn record_of(params: &[(ParamId, &str)], states: Vec<ParamState>) -> Result<OptimizerRecord, String> {
    let (mut tensors, mut scalars, mut paths) = (Vec::new(), Vec::new(), Vec::new());
    for (&(id, path), state) in params.iter().zip(states) {
        let id = id.val();
        if !state.scalars.is_empty() {
            paths.push((id.to_string(), path));
        }
        scalars.extend(state.scalars.into_iter().map(|(field, scalar)| (format!("{id}.{field}"), scalar)));
        for (field, tensor) in state.tensors {
            let (bytes, shape, dtype): (Bytes, _, _) = tensor.into_parts();
            tensors.push(Tensor::new(format!("{id}.{field}"), dtype, shape, Some(id), bytes));
        }
    }
    let writer = scalars.iter().fold(Writer::new(tensors), |writer, (name, scalar)| writer.with_scalar(name, *scalar));
    let writer = paths.iter().fold(writer, |writer, (id, path)| writer.with_metadata(id, path));
    let bytes = writer.into_bytes().map_err(|error| error.to_string())?;
    OptimizerRecord::from_bytes(bytes).map_err(|error| error.to_string())
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        module::ParamGroup,
        nn::{Linear, LinearConfig},
        optim::{AdamConfig, GradientsParams, LBFGSState, Optimizer, SgdConfig, momentum::MomentumConfig},
        tensor::{Device, Tensor},
    };

    use super::*;

    fn linear() -> Linear {
        LinearConfig::new(2, 3).with_bias(false).init(&Device::flex().autodiff())
    }

    /// The optimizer after a step.
    fn after_a_step(mut optimizer: ModuleOptimizer, linear: &Linear) -> ModuleOptimizer {
        let loss = linear.forward(Tensor::<2>::ones([1, 2], &Device::flex().autodiff())).square().sum();
        optimizer.step(0.1, linear.clone(), GradientsParams::from_grads(loss.backward(), linear));
        optimizer
    }

    fn state_of(optimizer: &ModuleOptimizer, linear: &Linear) -> ParamState {
        let mut states = states_of(optimizer.to_record()).unwrap();
        assert_eq!(states.keys().collect::<Vec<_>>(), [&linear.weight.id.val()]);
        states.remove(&linear.weight.id.val()).unwrap()
    }

    fn fields(state: &ParamState) -> Vec<&str> {
        state.tensors.keys().chain(state.scalars.keys()).map(String::as_str).collect()
    }

    #[test]
    fn records_name_fields_by_the_parameters_id() {
        let linear = linear();
        let adam = after_a_step(AdamConfig::new().init(), &linear);
        let state = state_of(&adam, &linear);
        assert_eq!(fields(&state), ["momentum.moment_1", "momentum.moment_2", "__rank", "momentum.time"]);
        assert_eq!(u64::try_from(state.scalars["__rank"]), Ok(2));
        assert!(state.tensors.values().all(|tensor| tensor.shape().to_vec() == [2, 3]));
        // What was taken out goes in again, also under another id.
        let params = [(ParamId::new(), "weight")];
        let loaded = load_states(&AdamConfig::new().init(), &params, vec![state.clone()]).unwrap();
        let found = states_of(loaded.to_record()).unwrap().remove(&params[0].0.val()).unwrap();
        assert_eq!((found.tensors, found.scalars), (state.tensors, state.scalars));
    }

    #[test]
    fn paths_choose_the_group_that_a_state_is_loaded_into() {
        let linear = linear();
        let grouped = || -> ModuleOptimizer {
            let momentum = SgdConfig::new().with_momentum(Some(MomentumConfig::new()));
            let other = AdamConfig::new().build();
            ModuleOptimizer::from(momentum.build()).with_group(ParamGroup::from_path("weight"), other, None)
        };
        let state = state_of(&after_a_step(grouped(), &linear), &linear);
        assert!(fields(&state).contains(&"momentum.moment_2"), "{:?}", fields(&state));
        let load = |path| load_states(&grouped(), &[(linear.weight.id, path)], vec![state.clone()]);
        load("weight").unwrap();
        assert_eq!(load("elsewhere").err().unwrap().place, Some(0));
    }

    #[test]
    fn what_burn_leaves_out_without_a_word_is_an_error() {
        let linear = linear();
        let adam = state_of(&after_a_step(AdamConfig::new().init(), &linear), &linear);
        let load = |optimizer: ModuleOptimizer, state: &ParamState| {
            let error = load_states(&optimizer, &[(linear.weight.id, "weight")], vec![state.clone()]).err().unwrap();
            assert_eq!(error.place, Some(0));
            error.reason
        };
        let momentum = SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init();
        assert!(load(momentum.clone(), &adam).starts_with("has a field `momentum.moment_1`"));
        let other = state_of(&after_a_step(momentum.clone(), &linear), &linear);
        assert_eq!(load(AdamConfig::new().init(), &other), "is of another kind of optimizer");
        // And Burn does say nothing.
        let ignored = momentum.load_record(after_a_step(AdamConfig::new().init(), &linear).to_record());
        assert!(states_of(ignored.to_record()).unwrap().values().all(|state| state.tensors.is_empty()));

        let mut more = adam.clone();
        more.tensors.insert("moment_3".into(), TensorData::from([[0.0f32]]));
        assert!(load(AdamConfig::new().init(), &more).starts_with("has a field `moment_3`"));
        let mut more = adam.clone();
        more.scalars.insert("count".into(), Scalar::UInt(1));
        assert!(load(AdamConfig::new().init(), &more).starts_with("has a field `count`"));

        let half = adam.try_map(|_, tensor| Ok::<_, String>(tensor.convert::<burn::tensor::f16>())).unwrap();
        assert!(load(AdamConfig::new().init(), &half).starts_with("is of type F16, but Burn loads it in"));
    }

    #[test]
    fn a_wrong_number_of_dimensions_is_a_panic_of_burns() {
        let linear = linear();
        let mut state = state_of(&after_a_step(AdamConfig::new().init(), &linear), &linear);
        state.tensors.values_mut().for_each(|tensor| *tensor = TensorData::from([0.0f32]));
        let error = load_states(&AdamConfig::new().init(), &[(linear.weight.id, "weight")], vec![state]).err().unwrap();
        assert!(error.place.is_none() && error.reason.starts_with("Burn cannot load its state: "), "{error:?}");
    }

    /// An optimizer with Burn's one state that has lists of tensors.
    #[derive(Clone)]
    struct Lists;

    impl Optimizer for Lists {
        type State<const D: usize> = LBFGSState;

        fn step<const D: usize>(
            &self,
            _lr: f64,
            tensor: Tensor<D>,
            grad: Tensor<D>,
            _state: Option<LBFGSState>,
        ) -> (Tensor<D>, Option<LBFGSState>) {
            let grad = grad.flatten(0, D - 1);
            let state = LBFGSState {
                history_s: vec![grad.clone(), grad],
                history_y: Vec::new(),
                d: None,
                t: None,
                prev_flat_grad: None,
                prev_loss: None,
                g_iter: 1,
            };
            (tensor, Some(state))
        }

        fn to_device<const D: usize>(state: LBFGSState, _: &Device) -> LBFGSState {
            state
        }
    }

    #[test]
    fn lists_say_how_long_they_are() {
        let linear = linear();
        let state = state_of(&after_a_step(Lists.into(), &linear), &linear);
        let expected = ["history_s.0", "history_s.1", "__rank", "g_iter", "history_s.len", "history_y.len"];
        assert_eq!(fields(&state), expected);
        for (field, &scalar) in &state.scalars {
            assert_eq!(check_scalar(field, scalar, 2, state.tensors.keys()), Ok(()), "{field}");
        }
    }

    #[test]
    fn scalars_that_burn_would_trust_are_checked() {
        let fields = ["history.0", "history.1", "historys", "momentum.len"].map(String::from);
        let check = |field: &str, scalar| check_scalar(field, scalar, 3, fields.iter()).is_ok();
        for (value, is_right) in [(2, true), (1, false), (u64::MAX, false)] {
            assert_eq!(check("history.len", Scalar::UInt(value)), is_right, "{value}");
        }
        for (value, is_right) in [(3, true), (0, false), (9, false)] {
            assert_eq!(check("__rank", Scalar::UInt(value)), is_right, "{value}");
        }
        assert!(!check("__rank", Scalar::Float(0.5)) && check("momentum.time", Scalar::UInt(u64::MAX)));
    }
}
