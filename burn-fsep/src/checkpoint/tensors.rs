use std::{
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use burn::tensor::{BoolStore, Bytes, DType, TensorData};
use burn_pack::Scalar;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use sha2::{Digest, Sha256};

use super::{
    CheckpointError,
    manifest::FileEntry,
    output::{CreateFile, OutputFile},
};

/// A tensor in host memory.
#[derive(Clone)]
pub(super) struct HostTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
}

impl HostTensor {
    /// # Errors
    ///
    /// As [`file_dtype`].
    pub fn new(name: &str, data: TensorData) -> Result<Self, CheckpointError> {
        let (bytes, shape, dtype) = data.into_parts();
        Ok(Self { dtype: file_dtype(name, dtype)?, shape: shape.to_vec(), bytes })
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { dtype: Dtype::U8, shape: vec![bytes.len()], bytes: Bytes::from_bytes_vec(bytes) }
    }

    /// A tensor of no dimensions.
    pub fn from_scalar(scalar: Scalar) -> Self {
        let (dtype, bytes) = match scalar {
            Scalar::Int(value) => (Dtype::I64, value.to_le_bytes().to_vec()),
            Scalar::UInt(value) => (Dtype::U64, value.to_le_bytes().to_vec()),
            Scalar::Float(value) => (Dtype::F64, value.to_le_bytes().to_vec()),
            Scalar::Bool(value) => (Dtype::BOOL, vec![u8::from(value)]),
        };
        Self { dtype, shape: Vec::new(), bytes: Bytes::from_bytes_vec(bytes) }
    }

    /// The inverse of [`HostTensor::from_scalar`].
    pub fn scalar(&self) -> Option<Scalar> {
        let word = || <[u8; 8]>::try_from(&self.bytes[..]).ok();
        match self.dtype {
            Dtype::I64 => word().map(|word| Scalar::Int(i64::from_le_bytes(word))),
            Dtype::U64 => word().map(|word| Scalar::UInt(u64::from_le_bytes(word))),
            Dtype::F64 => word().map(|word| Scalar::Float(f64::from_le_bytes(word))),
            Dtype::BOOL if self.bytes.len() == 1 => Some(Scalar::Bool(self.bytes[0] != 0)),
            _ => None,
        }
    }
}

/// Types of Burn's and their names in tensor files. Of several with one name, the first is loaded.
const DTYPES: [(DType, Dtype); 14] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::I64, Dtype::I64),
    (DType::I32, Dtype::I32),
    (DType::I16, Dtype::I16),
    (DType::I8, Dtype::I8),
    (DType::U64, Dtype::U64),
    (DType::U32, Dtype::U32),
    (DType::U16, Dtype::U16),
    (DType::U8, Dtype::U8),
    (DType::Bool(BoolStore::Native), Dtype::BOOL),
    (DType::Bool(BoolStore::U8), Dtype::BOOL),
];

/// The name in tensor files of the type of a tensor.
///
/// # Errors
///
/// [`CheckpointError::Unsupported`] for types that they do not have.
pub(super) fn file_dtype(name: &str, dtype: DType) -> Result<Dtype, CheckpointError> {
    let known = DTYPES.iter().find(|(burn, _)| *burn == dtype).map(|(_, file)| *file);
    let reason = || format!("tensor files have no type {dtype:?}");
    known.ok_or_else(|| CheckpointError::Unsupported { what: name.into(), reason: reason() })
}

/// The inverse of [`file_dtype`].
pub(super) fn burn_dtype(dtype: Dtype) -> Option<DType> {
    DTYPES.iter().find(|(_, file)| *file == dtype).map(|(burn, _)| *burn)
}

/// Bytes of a tensor; `None` if no machine can count them.
pub(super) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    shape.iter().copied().try_fold(dtype.bitsize() / 8, usize::checked_mul)
}

/// The first bytes of a tensor file, and where each tensor starts behind them.
pub(super) fn header(tensors: &[(&str, Dtype, &[usize])]) -> Result<(Vec<u8>, Vec<usize>), CheckpointError> {
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    let mut starts = Vec::with_capacity(tensors.len());
    for &(name, dtype, shape) in tensors {
        let unsupported =
            || CheckpointError::Unsupported { what: name.into(), reason: "it is larger than any file".into() };
        let end = byte_len(dtype, shape).and_then(|len| len.checked_add(offset)).ok_or_else(unsupported)?;
        infos.push((name.to_string(), TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (offset, end) }));
        starts.push(offset);
        offset = end;
    }
    let invalid = |reason: String| CheckpointError::Unsupported { what: "the table of tensors".into(), reason };
    let metadata = Metadata::new(None, infos).map_err(|error| invalid(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| invalid(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER {
        return Err(invalid(format!("it has {} bytes, the format allows {MAX_HEADER}", json.len())));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    let data = bytes.len();
    starts.iter_mut().for_each(|start| *start += data);
    Ok((bytes, starts))
}

/// Writes a tensor file and waits until the disk has it.
pub(super) fn write_tensors(
    files: &dyn CreateFile,
    folder: &Path,
    name: &str,
    mut tensors: Vec<(String, HostTensor)>,
) -> Result<FileEntry, CheckpointError> {
    // As the format's own library does: wide types first, so that everything is aligned.
    tensors.sort_by(|(a, x), (b, y)| y.dtype.cmp(&x.dtype).then(a.cmp(b)));
    let infos: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t.dtype, t.shape.as_slice())).collect();
    let (header, _) = header(&infos)?;
    let path = folder.join(name);
    let failed = CheckpointError::io("write", &path);
    let file = files.create(&path).map_err(&failed)?;
    let mut writer = BufWriter::with_capacity(1 << 20, HashingFile { file, hasher: Sha256::new(), bytes: 0 });
    writer.write_all(&header).map_err(&failed)?;
    for (_, tensor) in tensors {
        writer.write_all(&tensor.bytes).map_err(&failed)?;
    }
    let mut file = writer.into_inner().map_err(|error| failed(error.into_error()))?;
    file.file.sync().map_err(&failed)?;
    Ok(FileEntry { name: name.into(), bytes: file.bytes, sha256: hex(&file.hasher.finalize()) })
}

/// Writes a small file and waits until the disk has it.
pub(super) fn write_bytes(files: &dyn CreateFile, path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let failed = CheckpointError::io("write", path);
    let mut file = files.create(path).map_err(&failed)?;
    file.write_all(bytes).and_then(|()| file.sync()).map_err(&failed)
}

struct HashingFile {
    file: Box<dyn OutputFile>,
    hasher: Sha256,
    bytes: u64,
}

impl Write for HashingFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(data)?;
        self.hasher.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

pub(super) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks that a file is there and has the expected size and checksum.
pub(super) fn check_file(folder: &Path, entry: &FileEntry) -> Result<(), CheckpointError> {
    let path = folder.join(&entry.name);
    let mut file = open(&path)?;
    let failed = CheckpointError::io("read", &path);
    check_len(&path, file.metadata().map_err(&failed)?.len(), entry.bytes)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(&failed)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    if hex(&hasher.finalize()) != entry.sha256 {
        return Err(CheckpointError::damaged(&path, "its checksum is not the one in the manifest"));
    }
    Ok(())
}

/// Opens a file; one that is missing is a damaged checkpoint.
pub(super) fn open(path: &Path) -> Result<File, CheckpointError> {
    File::open(path).map_err(not_there("open", path))
}

/// Makes a system error one of a checkpoint's file: one that is missing is damage.
pub(super) fn not_there(action: &'static str, path: &Path) -> impl Fn(io::Error) -> CheckpointError {
    move |error| match error.kind() {
        io::ErrorKind::NotFound => CheckpointError::damaged(path, "it is missing"),
        _ => CheckpointError::io(action, path)(error),
    }
}

pub(super) fn check_len(path: &Path, found: u64, expected: u64) -> Result<(), CheckpointError> {
    match found == expected {
        true => Ok(()),
        false => Err(CheckpointError::damaged(path, format!("it has {found} bytes instead of {expected}"))),
    }
}

/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor file to read from. Nothing that its header says is believed before it was compared with the file's length.
pub(super) struct TensorFile {
    pub path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let mut file = open(path)?;
        let failed = CheckpointError::io("read", path);
        let len = file.metadata().map_err(&failed)?.len();
        let damaged = |reason: String| CheckpointError::damaged(path, reason);
        if len < 8 {
            return Err(damaged(format!("it has {len} bytes, too few for a tensor file")));
        }
        let mut header_len = [0; 8];
        file.read_exact(&mut header_len).map_err(&failed)?;
        let header_len = u64::from_le_bytes(header_len);
        if header_len > MAX_HEADER.min(len - 8) {
            return Err(damaged(format!("its header claims {header_len} bytes, the file has {len}")));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(&failed)?;
        // Checks that tensors follow each other without gaps and have the sizes that their shapes say.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| damaged(format!("its header is invalid: {error}")))?;
        let (described, found) = (metadata.data_len() as u64, len - 8 - header_len);
        if described != found {
            return Err(damaged(format!("its header describes {described} bytes, {found} follow")));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start: 8 + header_len })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.metadata.offset_keys();
        names.sort();
        names
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// The tensor's place in the file, if it has this type and shape.
    pub fn expect(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<u64, CheckpointError> {
        let info = self
            .info(name)
            .ok_or_else(|| CheckpointError::damaged(&self.path, format!("it has no tensor `{name}`")))?;
        if info.dtype != dtype || info.shape != shape {
            return Err(CheckpointError::damaged(
                &self.path,
                format!("tensor `{name}` is {} {:?} instead of {dtype} {shape:?}", info.dtype, info.shape),
            ));
        }
        Ok(self.data_start + info.data_offsets.0 as u64)
    }

    /// A whole tensor, of whatever type and shape it is.
    pub fn read(&mut self, name: &str) -> Result<HostTensor, CheckpointError> {
        let info = self.info(name).cloned();
        let info = info.ok_or_else(|| CheckpointError::damaged(&self.path, format!("it has no tensor `{name}`")))?;
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        self.read_at(self.data_start + info.data_offsets.0 as u64, &mut bytes)?;
        Ok(HostTensor { dtype: info.dtype, shape: info.shape, bytes: Bytes::from_bytes_vec(bytes) })
    }

    /// Fills `bytes` from a place in the file.
    pub fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        let failed = CheckpointError::io("read", &self.path);
        self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(bytes)).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_keep_their_bits() {
        for scalar in [Scalar::Int(-3), Scalar::UInt(u64::MAX), Scalar::Float(0.1), Scalar::Bool(true)] {
            assert_eq!(HostTensor::from_scalar(scalar).scalar(), Some(scalar));
        }
        let nan = f64::from_bits(0x7ff8_0000_0000_1234);
        let Some(Scalar::Float(read)) = HostTensor::from_scalar(Scalar::Float(nan)).scalar() else { panic!("a float") };
        assert_eq!(read.to_bits(), nan.to_bits());
    }
}
