use std::hash::{DefaultHasher, Hash, Hasher};

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, Int, IntDType, Tensor},
};

use super::{
    broadcast::check_forms,
    params::{ModulePath, ParamVisitor, Placement, visit_params},
};
use crate::{
    FsepError, FsepRuntime,
    comm::{Operation, all_gather_u64},
};

const FINGERPRINT: Operation = Operation::new("fingerprint of the replicated parameters");
const PARAMETERS: Operation = Operation::new("fingerprints of each replicated parameter");

/// Checks that all ranks have the same replicated parameters, and all groups the same shards, by fingerprints: each device is read once
/// for either, and ranks exchange two numbers. Collective.
///
/// [`Trainer`](super::Trainer) and `FsepStrategy` do so by themselves. Running statistics (`BatchNorm`) are each rank's own and are
/// not looked at; those of a module of your own are taken for parameters.
///
/// # Errors
///
/// [`FsepError::ReplicasDiffer`] on all ranks, with the first parameter that differs; [`FsepError::Config`] if models have other
/// parameters, [`FsepError::Device`] if one cannot be read, [`FsepError::Comm`] if a collective fails.
pub fn check_replicas<M: Module>(runtime: &FsepRuntime, model: &M) -> Result<(), FsepError> {
    check(
        runtime,
        model,
        "all ranks have to begin with equal values (`broadcast_parameters`) and to average gradients (`sync_gradients`)",
    )
}

/// [`check_replicas`] with the advice of the error.
pub(super) fn check<M: Module>(runtime: &FsepRuntime, model: &M, hint: &'static str) -> Result<(), FsepError> {
    if runtime.world_size() == 1 {
        return Ok(());
    }
    let mut rows = Rows(Vec::new());
    visit_params(model, &mut rows);
    let rows = rows.0;
    let tell = |error: &FsepError| runtime.comm().abort(&error.to_string());
    let of = |placement| {
        let rows = rows.iter().filter(move |row| row.placement == placement);
        fingerprint(rows.map(|row| &row.values)).inspect_err(tell)
    };
    let placements = [Placement::Replicated, Placement::Sharded];
    let shards = runtime.groups().experts().size();
    // Where there is one group, nobody else has a rank's shards.
    let has_groups = runtime.groups().replicas().size() > 1;
    let ours = [of(Placement::Replicated)?, if has_groups { of(Placement::Sharded)? } else { 0 }];
    if differing(runtime, FINGERPRINT, &ours, &placements, shards)?.is_none() {
        return Ok(());
    }
    check_forms(runtime, model)?;
    let ours: Result<Vec<u64>, FsepError> = rows.iter().map(|row| fingerprint([&row.values])).collect();
    let placements: Vec<_> = rows.iter().map(|row| row.placement).collect();
    // Only what is read twice and not the same twice is equal now.
    let found = differing(runtime, PARAMETERS, &ours.inspect_err(tell)?, &placements, shards)?;
    let (place, ranks) = found.unwrap_or_default();
    let parameter = rows.get(place).map(|row| row.name.clone()).unwrap_or_default();
    Err(FsepError::ReplicasDiffer { parameter, ranks, hint })
}

/// The first of several numbers that some ranks have otherwise than the first rank that should have the same, and these ranks: for what
/// is sharded over `shards` ranks, those that have the same shards. Collective.
fn differing(
    runtime: &FsepRuntime,
    operation: Operation,
    ours: &[u64],
    placements: &[Placement],
    shards: usize,
) -> Result<Option<(usize, Vec<usize>)>, FsepError> {
    let all = all_gather_u64(runtime.comm(), operation, ours)?;
    let of = |rank: usize, place: usize| all[rank * ours.len() + place];
    let first = |rank: usize, place: usize| match placements[place] {
        Placement::Replicated => 0,
        Placement::Sharded => rank % shards,
    };
    let ranks = |place| -> Vec<usize> {
        (0..runtime.world_size()).filter(|&rank| of(rank, place) != of(first(rank, place), place)).collect()
    };
    Ok((0..ours.len()).map(|place| (place, ranks(place))).find(|(_, ranks)| !ranks.is_empty()))
}

/// A parameter as a row.
struct Row {
    name: String,
    placement: Placement,
    values: Tensor<1>,
}

/// The parameters that ranks have alike.
struct Rows(Vec<Row>);

impl ParamVisitor for Rows {
    fn visit<const D: usize>(&mut self, param: &Param<Tensor<D>>, path: &ModulePath) {
        if path.is_running_statistic() {
            return;
        }
        let value = param.val().inner();
        if !matches!(value.dtype(), DType::QFloat(_)) {
            let len = value.shape().num_elements();
            self.0.push(Row { name: path.path(), placement: Placement::at(path), values: value.reshape([len]) });
        }
    }
}

/// Elements that are worked on at once: what they take on the device is a hundred megabytes.
const PART: usize = 1 << 22;

/// A number that depends on the values of all rows: to the last bit of those from 2^-36 to 2^67, to 2^-61 of smaller ones; larger
/// ones are all alike. Reads each device once (once more for double precision).
///
/// Devices add in orders of their own, so nothing is rounded here: integers, of which no sum is larger than 64 bits, and steps
/// whose results are exact.
fn fingerprint<'a>(rows: impl IntoIterator<Item = &'a Tensor<1>>) -> Result<u64, FsepError> {
    let mut groups: Vec<Group> = Vec::new();
    let mut hasher = DefaultHasher::new();
    for row in rows {
        let dtype = if row.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let device = row.device();
        let place = match groups.iter().position(|group| group.dtype == dtype && group.device == device) {
            Some(place) => place,
            None => {
                groups.push(Group { device, dtype, parts: Vec::new(), len: 0, weights: None, sums: Vec::new() });
                groups.len() - 1
            }
        };
        let len = row.dims()[0];
        (place, len).hash(&mut hasher);
        for start in (0..len).step_by(PART) {
            groups[place].push(row.clone().slice(start..len.min(start + PART)));
        }
    }
    for mut group in groups {
        group.add();
        if !group.sums.is_empty() {
            let sums = Tensor::cat(group.sums, 0).try_into_data();
            let sums = sums.map_err(|error| FsepError::Device(error.to_string()))?;
            sums.iter::<i64>().for_each(|sum| sum.hash(&mut hasher));
        }
    }
    Ok(hasher.finish())
}

/// Rows of one device and type, small ones together.
struct Group {
    device: Device,
    dtype: DType,
    parts: Vec<Tensor<1>>,
    len: usize,
    /// By place. `[at most PART]`
    weights: Option<Tensor<1, Int>>,
    /// `[1]` each
    sums: Vec<Tensor<1, Int>>,
}

impl Group {
    fn push(&mut self, part: Tensor<1>) {
        let len = part.dims()[0];
        if self.len + len > PART {
            self.add();
        }
        self.parts.push(part.cast(self.dtype));
        self.len += len;
    }

    /// Adds up what has been pushed.
    fn add(&mut self) {
        /// A power of two, so that nothing is rounded; all bits of a number of 2^-36 or more are before the point then.
        const SCALE: f64 = (1u64 << 60) as f64;
        /// The largest prime number below 2^24: all residues are whole numbers of single precision.
        const MODULUS: f64 = 16_777_213.0;
        /// Also a prime number. 2^24 * 2^10 * 2^22 is less than 2^63.
        const WEIGHTS: i64 = 1021;
        if self.len == 0 {
            return;
        }
        let row = Tensor::cat(std::mem::take(&mut self.parts), 0);
        let residues = (row * SCALE).round().remainder_scalar(MODULUS).cast(IntDType::I64);
        // As many as there are rows for, and divided in the device's own integers: a division in 64 bits is a loop over the bits on
        // many GPUs, and four million of them took a driver in software a minute.
        let weights = self.weights.take().filter(|weights| weights.dims()[0] >= self.len).unwrap_or_else(|| {
            let places = Tensor::arange(0..self.len.next_power_of_two() as i64, &self.device);
            (places.remainder_scalar(WEIGHTS) + 1).cast(IntDType::I64)
        });
        self.sums.push((residues * weights.clone().slice(0..self.len)).sum());
        self.weights = Some(weights);
        self.len = 0;
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::TensorData;

    use super::*;

    fn of(values: &[f32], dtype: DType) -> u64 {
        let row = Tensor::<1>::from_data(TensorData::new(values.to_vec(), [values.len()]), &Device::flex());
        fingerprint([&row.cast(dtype)]).unwrap()
    }

    #[test]
    fn a_fingerprint_depends_on_the_last_bit_of_every_element() {
        let mut values: Vec<f32> = (0..3000).map(|i| ((i * i) as f32 * 0.37).sin() * 10f32.powi(i % 9 - 5)).collect();
        let expected = of(&values, DType::F32);
        assert_eq!(expected, of(&values, DType::F32));
        for i in (1..3000).step_by(37) {
            let value = values[i];
            for other in [f32::from_bits(value.to_bits() + 1), -value, 0.0, f32::NAN, f32::INFINITY] {
                values[i] = other;
                assert_ne!(expected, of(&values, DType::F32), "{value} and {other}");
            }
            values[i] = value;
            values.swap(i, i + 1);
            assert_ne!(expected, of(&values, DType::F32), "places {i} and the next");
            values.swap(i, i + 1);
        }
        assert_eq!(expected, of(&values, DType::F32));
    }

    #[test]
    fn other_types_and_large_numbers_count_too() {
        for dtype in [DType::BF16, DType::F16, DType::F64] {
            assert_ne!(of(&[1.0, 2.0, 3.0], dtype), of(&[1.0, 2.0, 3.015625], dtype), "{dtype:?}");
            assert_eq!(of(&[1.0, 2.0, 3.0], dtype), of(&[1.0, 2.0, 3.0], dtype));
        }
        assert_ne!(of(&[1e19], DType::F32), of(&[1.000_001e19], DType::F32));
        let row = |value: f64| Tensor::<1>::from_data(TensorData::new(vec![value], [1]), (&Device::flex(), DType::F64));
        assert_ne!(fingerprint([&row(0.1)]).unwrap(), fingerprint([&row(0.1 + 1e-16)]).unwrap());
    }

    #[test]
    fn long_rows_are_worked_on_in_parts() {
        let len = PART + 100;
        let row = |value: f32, place: usize| {
            let mut values = vec![0.5f32; len];
            values[place] = value;
            fingerprint([&Tensor::<1>::from_data(TensorData::new(values, [len]), &Device::flex())]).unwrap()
        };
        let expected = row(0.5, 0);
        for place in [0, PART - 1, PART, len - 1] {
            assert_ne!(row(0.50001, place), expected);
        }
    }

    #[test]
    fn parameters_are_told_apart_by_their_lengths() {
        let row = |len: usize| Tensor::<1>::ones([len], &Device::flex());
        assert_ne!(fingerprint([&row(2), &row(3)]).unwrap(), fingerprint([&row(3), &row(2)]).unwrap());
        assert_ne!(fingerprint([]).unwrap(), fingerprint([&row(0)]).unwrap());
    }
}
