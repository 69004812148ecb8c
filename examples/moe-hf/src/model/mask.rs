use burn::tensor::{DType, Device, Tensor, TensorData};

/// What is added to attention's scores: 0 where a position is seen, minus infinity where it is not.
#[derive(Debug, Clone)]
pub(super) struct CausalMask {
    /// The windows that layers have, and the mask of each. `[1, 1, L, L]`
    masks: Vec<(Option<usize>, Tensor<4>)>,
}

impl CausalMask {
    /// The masks of texts of `length` positions for all windows that layers have.
    pub fn new(windows: &[Option<usize>], length: usize, device: &Device) -> Self {
        let mut masks: Vec<(Option<usize>, Tensor<4>)> = Vec::new();
        for window in windows.iter().map(|window| effective(*window, length)) {
            if masks.iter().all(|(other, _)| *other != window) {
                masks.push((window, mask(window, length, device)));
            }
        }
        Self { masks }
    }

    /// The mask of a layer's window. `[1, 1, L, L]`
    pub fn of(&self, window: Option<usize>) -> Tensor<4> {
        let length = self.masks[0].1.dims()[2];
        let window = effective(window, length);
        let found = self.masks.iter().find(|(other, _)| *other == window);
        found.map_or_else(|| mask(window, length, &self.masks[0].1.device()), |(_, mask)| mask.clone())
    }
}

/// A window that a text does not fill is none.
pub(super) fn effective(window: Option<usize>, length: usize) -> Option<usize> {
    window.filter(|&window| window < length)
}

fn mask(window: Option<usize>, length: usize, device: &Device) -> Tensor<4> {
    let sees = |query: usize, key: usize| key <= query && window.is_none_or(|window| query - key < window);
    let value = |query: usize, key: usize| if sees(query, key) { 0.0 } else { f32::NEG_INFINITY };
    let values: Vec<f32> = (0..length).flat_map(|query| (0..length).map(move |key| value(query, key))).collect();
    // Beside scores in single precision, whatever the device makes by itself.
    Tensor::from_data(TensorData::new(values, [1, 1, length, length]), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_the_own_position_and_those_just_before() {
        let device = Device::flex();
        let mask = CausalMask::new(&[None, Some(2), Some(9)], 3, &device);
        assert_eq!(mask.masks.len(), 2);
        let seen = |window| -> Vec<bool> { mask.of(window).into_data().iter::<f32>().map(|v| v == 0.0).collect() };
        let (yes, no) = (true, false);
        assert_eq!(seen(None), [yes, no, no, yes, yes, no, yes, yes, yes]);
        assert_eq!(seen(Some(9)), seen(None));
        assert_eq!(seen(Some(2)), [yes, no, no, yes, yes, no, no, yes, yes]);
    }
}
