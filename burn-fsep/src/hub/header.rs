//! The table of a safetensors file. Nothing that it says is believed before it was compared with the file's length.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::SystemTime,
};

use safetensors::Dtype;
use serde_json::Value;

use super::{
    HubError,
    json::{Object, parse_object},
    regular_file::regular_file,
};

/// The longest table that the format allows.
const MAX_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// A tensor as it stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Where its bytes start in the file, and how many there are.
    pub start: u64,
    pub bytes: u64,
}

/// A file with its table.
#[derive(Debug, Clone)]
pub(super) struct TensorFile {
    pub path: PathBuf,
    pub len: u64,
    pub modified: Option<SystemTime>,
    /// In the order of their places in the file.
    pub tensors: Vec<(String, RawTensor)>,
    /// What transformers writes about the whole file: `format: pt`.
    pub metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// # Errors
    ///
    /// [`HubError::Io`]; [`HubError::Damaged`] if the table is not one, or describes anything but this file: tensors follow each
    /// other without gaps and overlaps, have the sizes that their shapes say, and fill the file.
    pub fn open(path: &Path) -> Result<Self, HubError> {
        let damaged = |reason: String| HubError::damaged(path, reason);
        let failed = HubError::io("read", path);
        let found = regular_file(path)?;
        let (len, modified) = (found.len(), found.modified().ok());
        if len < 8 {
            return Err(damaged(format!("it has {len} bytes, too few for a safetensors file")));
        }
        let mut file = File::open(path).map_err(HubError::io("open", path))?;
        let mut header_len = [0; 8];
        file.read_exact(&mut header_len).map_err(&failed)?;
        let header_len = u64::from_le_bytes(header_len);
        if header_len > MAX_HEADER.min(len - 8) {
            return Err(damaged(format!("its header claims {header_len} bytes, the file has {len}")));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(&failed)?;
        let mut table = parse_object(path, &header, "its header")?;
        let metadata = match table.remove(METADATA) {
            None => BTreeMap::new(),
            Some(value) => serde_json::from_value(value)
                .map_err(|error| damaged(format!("`{METADATA}` of its header is no table of words: {error}")))?,
        };
        let data_start = 8 + header_len;
        let tensors = table.into_iter().map(|(name, info)| {
            let tensor = raw_tensor(&info, data_start)
                .map_err(|reason| HubError::damaged_tensor(path, &name, format!("is described wrongly: {reason}")))?;
            Ok((name, tensor))
        });
        let mut tensors: Vec<_> = tensors.collect::<Result<_, HubError>>()?;
        tensors.sort_by(|(a, x), (b, y)| (x.start, x.bytes, a).cmp(&(y.start, y.bytes, b)));
        let mut end = data_start;
        let mut before = None;
        for (name, tensor) in &tensors {
            let wrong = |reason| Err(HubError::damaged_tensor(path, name, reason));
            match before {
                Some(before) if tensor.start < end => {
                    return wrong(format!("overlaps tensor `{before}`"));
                }
                _ if tensor.start > end => return wrong(format!("starts {} bytes too late", tensor.start - end)),
                _ => {}
            }
            end = match tensor.start.checked_add(tensor.bytes) {
                Some(end) if end <= len => end,
                _ => return wrong(format!("is cut off: the file ends at {len} bytes")),
            };
            before = Some(name);
        }
        if end != len {
            return Err(damaged(format!("its header describes {end} bytes, the file has {len}")));
        }
        Ok(Self { path: path.to_path_buf(), len, modified, tensors, metadata })
    }
}

fn raw_tensor(info: &Value, data_start: u64) -> Result<RawTensor, String> {
    let info: &Object = info.as_object().ok_or("its entry is no object")?;
    let field = |name: &str| info.get(name).ok_or_else(|| format!("`{name}` is missing"));
    if let Some(key) = info.keys().find(|key| !["dtype", "shape", "data_offsets"].contains(&key.as_str())) {
        return Err(format!("`{key}` is unknown"));
    }
    let numbers = |name: &'static str| -> Result<Vec<u64>, String> {
        serde_json::from_value(field(name)?.clone()).map_err(|error| format!("`{name}`: {error}"))
    };
    let dtype: Dtype =
        serde_json::from_value(field("dtype")?.clone()).map_err(|error| format!("unknown `dtype`: {error}"))?;
    let shape = numbers("shape")?;
    let &[start, end] = &numbers("data_offsets")?[..] else { return Err("`data_offsets` are not two".into()) };
    let bytes = end.checked_sub(start).ok_or("it ends before it starts")?;
    let bits = shape.iter().copied().try_fold(dtype.bitsize() as u64, u64::checked_mul);
    if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != bytes) {
        return Err(format!("{dtype} {shape:?} does not have {bytes} bytes"));
    }
    let shape = shape.into_iter().map(|size| size as usize).collect();
    let start = start.checked_add(data_start).ok_or("it starts beyond any file")?;
    Ok(RawTensor { dtype, shape, start, bytes })
}
