//! Tensors as the model has them, of what stands in files: a quantised one is two or more tensors there.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::{
    HubError, Quantization,
    header::{RawTensor, TensorFile},
};

/// Values of one scale in MXFP4.
pub(super) const MX_BLOCK: usize = 32;
const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";
const SCALE_INV: &str = "_scale_inv";

/// A raw tensor of a file.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    /// The file's number.
    pub file: usize,
    pub name: String,
    pub raw: RawTensor,
}

/// How values stand in files.
#[derive(Debug, Clone)]
pub(super) enum Storage {
    /// As they are.
    Plain(Piece),
    /// `F8_E4M3`, with a scale for each block of the last two dimensions. DeepSeek-V3's `weight_scale_inv`.
    Fp8 { values: Piece, scales: Piece, block: [usize; 2] },
    /// Two 4-bit values a byte, the low one first, with an exponent for every 32. `blocks [.., G, 16]`, `scales [.., G]`; values
    /// `[.., 32 G]`. OCP Microscaling Formats, version 1.0.
    Mxfp4 { blocks: Piece, scales: Piece },
}

/// A tensor of floating point numbers, however it is stored.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    pub name: String,
    /// Of its values.
    pub shape: Vec<usize>,
    pub storage: Storage,
}

impl StoredTensor {
    /// The raw tensor that has its values.
    pub fn piece(&self) -> &Piece {
        match &self.storage {
            Storage::Plain(piece) | Storage::Fp8 { values: piece, .. } | Storage::Mxfp4 { blocks: piece, .. } => piece,
        }
    }

    /// The type that it has where it is not quantised: what its values are written as.
    pub fn dtype(&self) -> Dtype {
        match &self.storage {
            Storage::Plain(piece) => piece.raw.dtype,
            Storage::Fp8 { .. } | Storage::Mxfp4 { .. } => Dtype::BF16,
        }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors of a folder by name.
#[derive(Debug, Clone, Default)]
pub(super) struct StoredTensors {
    pub tensors: BTreeMap<String, StoredTensor>,
}

impl StoredTensors {
    /// # Errors
    ///
    /// [`HubError::TwoNames`] if a name stands twice, [`HubError::Dtype`] or [`HubError::Scales`] for what cannot be decoded.
    pub fn new(files: &[TensorFile], quantization: Option<&Quantization>) -> Result<Self, HubError> {
        let mut raw: BTreeMap<&str, Piece> = BTreeMap::new();
        for (file, content) in files.iter().enumerate() {
            for (name, tensor) in &content.tensors {
                let piece = Piece { file, name: name.clone(), raw: tensor.clone() };
                if let Some(before) = raw.insert(name, piece) {
                    return Err(HubError::TwoNames {
                        file: content.path.clone(),
                        tensor: name.clone(),
                        other_file: files[before.file].path.clone(),
                        other: name.clone(),
                    });
                }
            }
        }
        let mut all = Self::default();
        let group = Group { files, raw: &raw, quantization };
        for (name, piece) in &raw {
            if let Some(tensor) = group.tensor(name, piece)? {
                if let Some(other) = raw.get(tensor.name.as_str()).filter(|other| other.name != *name) {
                    return Err(HubError::TwoNames {
                        file: files[piece.file].path.clone(),
                        tensor: (*name).into(),
                        other_file: files[other.file].path.clone(),
                        other: other.name.clone(),
                    });
                }
                all.tensors.insert(tensor.name.clone(), tensor);
            }
        }
        Ok(all)
    }

    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }
}

/// Puts raw tensors together.
struct Group<'a> {
    files: &'a [TensorFile],
    raw: &'a BTreeMap<&'a str, Piece>,
    quantization: Option<&'a Quantization>,
}

impl Group<'_> {
    /// The tensor whose values are these; none for scales, which belong to another one.
    fn tensor(&self, name: &str, piece: &Piece) -> Result<Option<StoredTensor>, HubError> {
        let stored =
            |name: &str, shape: Vec<usize>, storage| Ok(Some(StoredTensor { name: name.into(), shape, storage }));
        if let Some(values) = name.strip_suffix(SCALE_INV) {
            return match self.raw.contains_key(values) {
                true => Ok(None),
                false => Err(self.scales(piece, format!("these are scales, and there is no `{values}`"))),
            };
        }
        if let Some(stem) = name.strip_suffix(SCALES).filter(|_| piece.raw.dtype == Dtype::U8) {
            let blocks = format!("{stem}{BLOCKS}");
            return match self.raw.contains_key(blocks.as_str()) {
                true => Ok(None),
                false => Err(self.scales(piece, format!("these are scales, and there is no `{blocks}`"))),
            };
        }
        let has_scales = |stem: &&str| self.raw.contains_key(format!("{stem}{SCALES}").as_str());
        if let Some(stem) = name.strip_suffix(BLOCKS).filter(|stem| piece.raw.dtype == Dtype::U8 || has_scales(stem)) {
            let scales = self.find(piece, &format!("{stem}{SCALES}"))?;
            let shape = self.mxfp4_shape(piece, scales)?;
            return stored(stem, shape, Storage::Mxfp4 { blocks: piece.clone(), scales: scales.clone() });
        }
        match piece.raw.dtype {
            Dtype::F8_E4M3 => {
                let scales = self.find(piece, &format!("{name}{SCALE_INV}"))?;
                let block = self.fp8_block(piece, scales)?;
                let storage = Storage::Fp8 { values: piece.clone(), scales: scales.clone(), block };
                stored(name, piece.raw.shape.clone(), storage)
            }
            Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64 => {
                if let Some(scales) = self.raw.get(format!("{name}{SCALE_INV}").as_str()) {
                    let reason = format!("it has scales, but is {}, not F8_E4M3", piece.raw.dtype);
                    return Err(self.scales(piece, format!("{reason} (`{}`)", scales.name)));
                }
                stored(name, piece.raw.shape.clone(), Storage::Plain(piece.clone()))
            }
            dtype => Err(HubError::Dtype {
                file: self.files[piece.file].path.clone(),
                tensor: name.into(),
                dtype: dtype.to_string(),
                reason: "parameters are BF16, F16, F32 or F64, or quantised as MXFP4 (GPT-OSS) or FP8 (DeepSeek-V3)"
                    .into(),
            }),
        }
    }

    fn find(&self, piece: &Piece, scales: &str) -> Result<&Piece, HubError> {
        self.raw.get(scales).ok_or_else(|| self.scales(piece, format!("its scales `{scales}` are missing")))
    }

    fn scales(&self, piece: &Piece, reason: String) -> HubError {
        HubError::Scales { file: self.files[piece.file].path.clone(), tensor: piece.name.clone(), reason }
    }

    fn mxfp4_shape(&self, blocks: &Piece, scales: &Piece) -> Result<Vec<usize>, HubError> {
        let (shape, of_scales) = (&blocks.raw.shape, &scales.raw.shape);
        let [outer @ .., groups, half] = &shape[..] else {
            return Err(self.scales(blocks, format!("its blocks are {shape:?}, not [.., G, {}]", MX_BLOCK / 2)));
        };
        let expected = &shape[..shape.len() - 1];
        let are_bytes = [blocks, scales].iter().all(|piece| piece.raw.dtype == Dtype::U8);
        if !are_bytes || *half != MX_BLOCK / 2 || expected != of_scales {
            let reason = format!(
                "blocks are {} {shape:?} and `{}` are {} {of_scales:?}, not U8 [.., G, {}] and U8 [.., G]",
                blocks.raw.dtype,
                scales.name,
                scales.raw.dtype,
                MX_BLOCK / 2
            );
            return Err(self.scales(blocks, reason));
        }
        Ok(outer.iter().copied().chain([groups * MX_BLOCK]).collect())
    }

    /// Rows and columns that have one scale.
    fn fp8_block(&self, values: &Piece, scales: &Piece) -> Result<[usize; 2], HubError> {
        let fail = |reason: String| Err(self.scales(values, reason));
        let Some(Quantization::Fp8 { block }) = self.quantization else {
            return fail("config.json has no `quantization_config` of the method fp8".into());
        };
        if !matches!(scales.raw.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F8_E8M0) {
            return fail(format!("its scales `{}` are {}", scales.name, scales.raw.dtype));
        }
        let [outer @ .., rows, columns] = &values.raw.shape[..] else {
            return fail(format!("its shape is {:?}, not that of matrices", values.raw.shape));
        };
        let block = block.unwrap_or([*rows, *columns]);
        let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        let expected: Vec<usize> = outer.iter().copied().chain(grid).collect();
        let is_one =
            scales.raw.bytes * 8 == scales.raw.dtype.bitsize() as u64 && expected.iter().all(|&size| size == 1);
        if scales.raw.shape != expected && !is_one {
            return fail(format!(
                "it is {:?} with a scale for each block of {block:?}, but its scales `{}` are {:?} instead of {expected:?}",
                values.raw.shape, scales.name, scales.raw.shape
            ));
        }
        Ok(block)
    }
}
