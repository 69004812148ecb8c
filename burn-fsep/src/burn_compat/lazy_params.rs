//! Relied on: a parameter that has no value yet gets it once, for all clones, when any of them is looked at; its shape is
//! known before. So what a visitor reads of a clone of a model is what the model has, on whichever rank and whenever it is
//! read.

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use burn::{
        module::{Param, ParamId},
        tensor::{Device, Tensor},
    };

    #[test]
    fn clones_of_a_parameter_get_their_value_together() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let init = move |device: &Device, _: bool| {
            let call = counted.fetch_add(1, Ordering::Relaxed);
            Tensor::<1>::full([2], call as f32 + 1.0, device)
        };
        let param = Param::uninitialized(ParamId::new(), init, Device::flex(), true, [2].into());
        let clone = param.clone();
        assert_eq!(param.lazy_shape().to_vec(), [2]);
        assert!(!param.is_initialized() && calls.load(Ordering::Relaxed) == 0);
        assert_eq!(clone.val().into_data().iter::<f32>().collect::<Vec<_>>(), [1.0, 1.0]);
        assert!(param.is_initialized());
        assert_eq!(param.val().into_data().iter::<f32>().collect::<Vec<_>>(), [1.0, 1.0]);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }
}
