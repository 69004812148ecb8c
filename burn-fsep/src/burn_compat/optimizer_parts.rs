//! Relied on: a [`ModuleOptimizer`](burn::optim::ModuleOptimizer) finds the state of a parameter by its id, and its group by id or path,
//! whatever module the parameter stands in and whatever its shape, also where several stand at one path; optimizers that treat every element by itself step a part of a
//! parameter as they step it in the whole, and keep a state of the part's shape. Loading an empty record leaves no state.

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        module::{Module, Param},
        optim::{AdamConfig, GradientsParams, ModuleOptimizer, OptimizerRecord},
        tensor::{Device, Tensor},
    };

    use crate::burn_compat::states_of;

    #[derive(Module, Debug)]
    struct Row {
        weight: Param<Tensor<2>>,
    }

    fn row(values: [[f32; 4]; 1]) -> Tensor<2> {
        Tensor::from_data(values, &Device::flex())
    }

    fn step(optimizer: &mut ModuleOptimizer, weight: Param<Tensor<2>>, gradient: Tensor<2>) -> Param<Tensor<2>> {
        let mut grads = GradientsParams::new();
        grads.register(weight.id, gradient);
        optimizer.step(0.1, Row { weight }, grads).weight
    }

    #[test]
    fn a_part_under_the_same_id_is_stepped_as_in_the_whole() {
        let (value, gradient) = (row([[0.5, -1.0, 2.0, 0.1]]), row([[0.3, 4.0, -0.2, 1.0]]));
        let whole = Param::from_tensor(Tensor::from_inner(value.clone()));
        let id = whole.id;
        let part = |tensor: Tensor<2>| tensor.slice([0..1, 2..4]);
        let mut cut = Param::initialized(id, Tensor::from_inner(part(value)));
        let (mut stepped, mut optimizers) = (whole, [(); 2].map(|()| AdamConfig::new().init()));
        for _ in 0..3 {
            stepped = step(&mut optimizers[0], stepped, gradient.clone());
            cut = step(&mut optimizers[1], cut, part(gradient.clone()));
        }
        assert_eq!(part(stepped.val().inner()).into_data(), cut.val().inner().into_data());
        let state = states_of(optimizers[1].to_record()).unwrap().remove(&id.val()).unwrap();
        assert!(state.tensors.values().all(|tensor| tensor.shape().to_vec() == [1, 2]), "{state:?}");
        // At the same path under another id it has another state.
        let other = Param::from_tensor(Tensor::from_inner(row([[1.0; 4]])));
        let other_id = other.id;
        step(&mut optimizers[1], other, row([[2.0; 4]]));
        let mut states = states_of(optimizers[1].to_record()).unwrap();
        let ours = states.remove(&id.val()).unwrap();
        assert_eq!(ours.tensors, state.tensors);
        assert_eq!(states.into_keys().collect::<Vec<_>>(), [other_id.val()]);
        let [_, optimizer] = optimizers;
        let without = optimizer.load_record(OptimizerRecord::default());
        assert!(states_of(without.to_record()).unwrap().is_empty());
    }
}
