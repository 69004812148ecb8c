use std::collections::HashMap;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    optim::{GradientsParams, ModuleOptimizer},
    tensor::Tensor,
};

/// A matrix as a model of its own.
#[derive(Module, Debug)]
struct Matrix {
    weight: Param<Tensor<2>>,
}

/// Steps the small dense model's experts matrix by matrix with Burn's own optimizer, each as a model of its own.
pub struct DenseMatrices {
    optimizer: ModuleOptimizer,
    /// Hidden and intermediate size of an expert.
    sizes: [usize; 2],
    /// By layer, expert and place.
    matrices: HashMap<(String, usize, usize), Matrix>,
}

impl DenseMatrices {
    /// For experts of hidden size `D` and intermediate size `F`.
    pub fn new(optimizer: ModuleOptimizer, sizes: [usize; 2]) -> Self {
        Self { optimizer, sizes, matrices: HashMap::new() }
    }

    /// The model with its experts' next values; takes their gradients out of `grads`.
    pub fn step<M: Module>(&mut self, lr: f64, model: M, grads: &mut GradientsParams) -> M {
        model.map(&mut StepMatrices { path: Vec::new(), lr, grads, state: self })
    }
}

struct StepMatrices<'a> {
    path: Vec<String>,
    lr: f64,
    grads: &'a mut GradientsParams,
    state: &'a mut DenseMatrices,
}

impl ModuleMapper for StepMatrices<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        if !path.ends_with("Dense.weight") {
            return param;
        }
        let [hidden, ffn] = self.state.sizes;
        let (shape, len) = (param.shape(), hidden * ffn);
        let gradient = self.grads.remove::<D>(param.id).expect("a gradient of the experts").inner();
        let [experts, params] = [shape[0], 3 * len];
        let gradients = gradient.reshape([experts, params]);
        param.map(|tensor| {
            let values = tensor.inner().reshape([experts, params]);
            let mut stepped = Vec::new();
            for expert in 0..experts {
                for (place, dims) in [[ffn, hidden], [ffn, hidden], [hidden, ffn]].into_iter().enumerate() {
                    let start = place * len;
                    let of = |tensor: &Tensor<2>| {
                        tensor.clone().slice([expert..expert + 1, start..start + len]).reshape(dims)
                    };
                    let values = || Param::from_tensor(Tensor::<2>::from_inner(of(&values)).require_grad());
                    let key = (path.clone(), expert, place);
                    let matrix = self.state.matrices.remove(&key).unwrap_or_else(|| Matrix { weight: values() });
                    let mut grads = GradientsParams::new();
                    grads.register(matrix.weight.id, of(&gradients));
                    let matrix = self.state.optimizer.step(self.lr, matrix, grads);
                    stepped.push(matrix.weight.val().inner().reshape([len]));
                    self.state.matrices.insert(key, matrix);
                }
            }
            Tensor::from_inner(Tensor::cat(stepped, 0).reshape(shape)).require_grad()
        })
    }
}

/// Values of all parameters whose path ends so.
struct Rows<'a> {
    path: Vec<String>,
    end: &'a str,
    rows: Vec<Vec<Vec<f32>>>,
}

impl ModuleVisitor for Rows<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.path.join(".").ends_with(self.end) {
            let rows = param.shape()[0];
            let values: Vec<f32> = param.val().into_data().iter().collect();
            self.rows.push(values.chunks(values.len() / rows).map(<[f32]>::to_vec).collect());
        }
    }
}

/// The rows of all parameters whose path in the model ends with `end`. `[parameters, rows, ..]`
pub fn parameter_rows<M: Module>(model: &M, end: &str) -> Vec<Vec<Vec<f32>>> {
    let mut rows = Rows { path: Vec::new(), end, rows: Vec::new() };
    model.visit(&mut rows);
    rows.rows
}
