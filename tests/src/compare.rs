use burn::tensor::TensorData;

/// The largest difference, relative to the largest expected value: 0 for equal tensors.
///
/// # Panics
///
/// If shapes differ.
pub fn relative_error(actual: &TensorData, expected: &TensorData) -> f64 {
    assert_eq!(actual.shape(), expected.shape(), "shapes");
    let pairs = || actual.iter::<f64>().zip(expected.iter::<f64>());
    if pairs().any(|(a, b)| !a.is_finite() || !b.is_finite()) {
        return f64::INFINITY;
    }
    let largest = pairs().map(|(_, b)| b.abs()).fold(0.0, f64::max);
    let difference = pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // Where zero is expected, nothing but zero is right.
    if difference == 0.0 { 0.0 } else { difference / largest }
}

/// Checks that tensors agree to `tolerance` and returns their relative error.
///
/// # Panics
///
/// If they do not; the message names `what`.
pub fn assert_close(what: &str, actual: &TensorData, expected: &TensorData, tolerance: f64) -> f64 {
    let error = relative_error(actual, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e}, allowed {tolerance:.0e}");
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_seen() {
        let expected = TensorData::from([1.0f32, -100.0]);
        assert_eq!(relative_error(&expected, &expected), 0.0);
        assert!(relative_error(&TensorData::from([1.01f32, -100.0]), &expected) > 5e-5);
        let zero = TensorData::from([0.0f32, 0.0]);
        assert_eq!(relative_error(&zero, &zero), 0.0);
        assert_eq!(relative_error(&TensorData::from([1e-30f32, 0.0]), &zero), f64::INFINITY);
        assert_eq!(relative_error(&TensorData::from([f32::NAN, -100.0]), &expected), f64::INFINITY);
    }
}
