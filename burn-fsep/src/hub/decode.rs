//! Bytes of one type as bytes of another, and the quantised types.

use burn::tensor::{DType, FloatDType};
use half::{bf16, f16};
use safetensors::Dtype;

/// Values that FP4 (E2M1) has, by their four bits.
const FP4: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of E8M0, a power of two.
pub(super) fn e8m0(bits: u8) -> f32 {
    match bits {
        0 => f32::from_bits(1 << 22),
        u8::MAX => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The value of F8_E4M3 (without infinities, `e4m3fn`).
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (bits >> 3 & 15, f32::from(bits & 7));
    let value = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((u32::from(exponent) + 120) << 23),
    };
    if bits & 128 == 0 { value } else { -value }
}

/// All values of F8_E4M3, by their bits.
pub(super) fn e4m3_values() -> [f32; 256] {
    std::array::from_fn(|bits| e4m3(bits as u8))
}

/// The two values of a byte of MXFP4, without their scale.
pub(super) fn fp4_pair(byte: u8) -> [f32; 2] {
    [FP4[usize::from(byte & 15)], FP4[usize::from(byte >> 4)]]
}

/// The type of parameters in files.
pub(super) fn file_dtype(dtype: DType) -> Option<Dtype> {
    match dtype {
        DType::F64 => Some(Dtype::F64),
        DType::F32 => Some(Dtype::F32),
        DType::F16 => Some(Dtype::F16),
        DType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

pub(super) fn file_float(dtype: FloatDType) -> Option<Dtype> {
    file_dtype(dtype.into())
}

/// Bytes of a value of a type that parameters have.
pub(super) fn size_of(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Writes floating point numbers of one type as those of another, rounded once, to the nearest, ties to even. Both are
/// little-endian, and equally many.
pub(super) fn convert(from: Dtype, input: &[u8], to: Dtype, output: &mut [u8]) {
    if from == to {
        return output.copy_from_slice(input);
    }
    // By way of single precision, which has every number of the narrower ones.
    match from {
        Dtype::F64 => each(input, |bytes| narrow(f64::from_le_bytes(bytes), to), output, to),
        Dtype::F32 => each(input, |bytes| encode(f32::from_le_bytes(bytes), to), output, to),
        Dtype::F16 => each(input, |bytes| encode(f16::from_le_bytes(bytes).to_f32(), to), output, to),
        Dtype::BF16 => each(input, |bytes| encode(bf16::from_le_bytes(bytes).to_f32(), to), output, to),
        _ => unreachable!("not a type of parameters: {from}"),
    }
}

/// Writes numbers in a type that parameters have.
pub(super) fn encode_all(values: &[f32], to: Dtype, output: &mut [u8]) {
    for (value, bytes) in values.iter().zip(output.chunks_exact_mut(size_of(to))) {
        bytes.copy_from_slice(&encode(*value, to)[..size_of(to)]);
    }
}

fn each<const N: usize>(input: &[u8], encode: impl Fn([u8; N]) -> [u8; 8], output: &mut [u8], to: Dtype) {
    let width = size_of(to);
    for (input, output) in input.as_chunks().0.iter().zip(output.chunks_exact_mut(width)) {
        output.copy_from_slice(&encode(*input)[..width]);
    }
}

fn encode(value: f32, to: Dtype) -> [u8; 8] {
    let mut bytes = [0; 8];
    match to {
        Dtype::F32 => bytes[..4].copy_from_slice(&value.to_le_bytes()),
        Dtype::BF16 => bytes[..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => bytes[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Dtype::F64 => bytes = f64::from(value).to_le_bytes(),
        _ => unreachable!("not a type of parameters: {to}"),
    }
    bytes
}

fn narrow(value: f64, to: Dtype) -> [u8; 8] {
    encode(if to == Dtype::F32 { value as f32 } else { to_odd(value) }, to)
}

/// In single precision, cut off, with an odd last bit if anything was cut off: what is half way between two numbers in half precision
/// is told from what is next to it, so that rounding once more is rounding once. The crate half forgets the last 32 bits.
fn to_odd(value: f64) -> f32 {
    let near = value as f32;
    if !near.is_finite() || f64::from(near) == value {
        return near;
    }
    let cut = if f64::from(near).abs() > value.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(cut | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_has_its_values() {
        let values = e4m3_values();
        // 2^-9 the smallest, 448 the largest, by the format's definition.
        for (bits, value) in [(0x00, 0.0), (0x01, 0.001953125), (0x07, 0.013671875), (0x08, 0.015625), (0x38, 1.0)] {
            assert_eq!(values[bits], value);
            assert_eq!(values[bits + 128].to_bits(), (-value).to_bits());
        }
        assert_eq!((values[0x7e], values[0xfe], values[0x3c]), (448.0, -448.0, 1.5));
        assert!(values[0x7f].is_nan() && values[0xff].is_nan());
        assert!((0..126).all(|bits| values[bits] < values[bits + 1]));
    }

    #[test]
    fn exponents_are_powers_of_two() {
        assert_eq!((e8m0(127), e8m0(128), e8m0(120)), (1.0, 2.0, 0.0078125));
        assert_eq!((e8m0(0), e8m0(1)), (2f32.powi(-127), 2f32.powi(-126)));
        assert!(e8m0(255).is_nan() && e8m0(254) == 2f32.powi(127));
    }

    #[test]
    fn numbers_are_rounded_once() {
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let mut output = [0; 6];
        // A tie goes to the even number, anything more up.
        convert(
            Dtype::F32,
            &bytes(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.01 / 256.0]),
            Dtype::BF16,
            &mut output,
        );
        assert_eq!(output, [0x80, 0x3f, 0x82, 0x3f, 0x81, 0x3f]);
        // By way of single precision this would be a tie.
        let mut output = [0; 2];
        convert(Dtype::F64, &(1.00390625f64 + 1e-12).to_le_bytes(), Dtype::BF16, &mut output);
        assert_eq!(output, [0x81, 0x3f]);
        convert(Dtype::F64, &(-1.00390625f64).to_le_bytes(), Dtype::BF16, &mut output);
        assert_eq!(output, [0x80, 0xbf]);
        for (value, bits) in [(1e300, 0x7f80), (1e-300, 0), (-1.01171875 + 1e-12, 0xbf81), (0.1, 0x3dcd)] {
            convert(Dtype::F64, &f64::to_le_bytes(value), Dtype::BF16, &mut output);
            assert_eq!(u16::from_le_bytes(output), bits, "{value}");
        }
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F64] {
            let (values, mut there, mut back) = ([1.5f32, -0.0, 0.0625], vec![0; 3 * size_of(dtype)], [0; 12]);
            encode_all(&values, dtype, &mut there);
            convert(dtype, &there, Dtype::F32, &mut back);
            assert_eq!(back[..], bytes(&values)[..]);
        }
    }
}
