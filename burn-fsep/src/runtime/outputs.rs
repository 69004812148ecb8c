use std::collections::BTreeMap;

use burn::tensor::{FloatDType, Tensor};
use parking_lot::Mutex;

/// The first row of each layer's last output, with its pass, to connect it to the loss.
#[derive(Default)]
pub(super) struct Outputs(Mutex<BTreeMap<usize, (u64, Tensor<2>)>>);

impl Outputs {
    pub fn remember(&self, layer: usize, pass: u64, output: &Tensor<2>) {
        let [rows, width] = output.dims();
        // A row of its own: a view would keep the whole output in memory.
        let row = output.clone().slice([0..rows.min(1), 0..width]) + 0.0;
        self.0.lock().insert(layer, (pass, row));
    }

    /// Forgets a layer's output whose backward pass has run: it cannot be connected to another loss.
    pub fn forget(&self, layer: usize, pass: u64) {
        let mut outputs = self.0.lock();
        if outputs.get(&layer).is_some_and(|(last, _)| *last == pass) {
            outputs.remove(&layer);
        }
    }

    /// The loss as it is, but depending on all outputs, which are forgotten.
    pub fn connect(&self, loss: Tensor<1>) -> Tensor<1> {
        let outputs = std::mem::take(&mut *self.0.lock());
        outputs.into_values().fold(loss, |loss, (_, output)| {
            // Masked, not multiplied by zero: an output that is not finite must not reach the loss.
            let everything = Tensor::<2>::ones(output.shape(), &output.device()).equal_elem(1);
            let dtype = FloatDType::from(loss.dtype());
            loss + output.mask_fill(everything, 0.0).sum().cast(dtype)
        })
    }

    pub fn clear(&self) {
        self.0.lock().clear();
    }
}
