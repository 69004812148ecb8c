//! Handles on a model's values, which are copied to host memory when they are wanted, and only those that are.

use std::ops::Range;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, TensorData},
};

use super::HubError;
use crate::burn_compat::ModulePath;

/// A parameter's value on its device, in the form in which Burn's records have it.
pub(super) struct ParamValue {
    path: String,
    /// As one row, and as the rows of a matrix.
    flat: Tensor<1>,
    rows: Option<Tensor<2>>,
}

/// The values of all parameters, in the model's order.
pub(super) fn param_values<M: Module>(model: &M) -> Vec<ParamValue> {
    let mut collect = Collect::default();
    model.visit(&mut collect);
    collect.values
}

impl ParamValue {
    /// All of it.
    pub fn all(&self) -> Result<TensorData, HubError> {
        self.read(self.flat.clone().try_into_data())
    }

    /// A part of a row of a matrix.
    pub fn part_of_row(&self, row: usize, columns: Range<usize>) -> Result<TensorData, HubError> {
        let rows = self.rows.as_ref().expect("experts are a matrix");
        self.read(rows.clone().slice([row..row + 1, columns]).try_into_data())
    }

    fn read<E: std::fmt::Display>(&self, data: Result<TensorData, E>) -> Result<TensorData, HubError> {
        data.map_err(|error| HubError::unsupported(&self.path, format!("the device failed: {error}")))
    }
}

#[derive(Default)]
struct Collect {
    path: ModulePath<crate::moe::ExpertsInfo>,
    values: Vec<ParamValue>,
}

impl ModuleVisitor for Collect {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.transform_for_save().val().detach();
        let shape = value.dims();
        let rows = (D == 2).then(|| value.clone().reshape([shape[0], shape[D - 1]]));
        let flat = value.reshape([shape.iter().product::<usize>()]);
        self.values.push(ParamValue { path: self.path.path(), flat, rows });
    }
}
