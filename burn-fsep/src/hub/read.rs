//! Reading ranges of tensors.
//!
//! Files are read by position into small buffers, not mapped: mapped pages count as the process's memory until the system
//! takes them back, and a file that somebody cuts off while it is mapped ends the process (`SIGBUS`) instead of a read.

use std::{collections::HashMap, fs::File, io, ops::Range, sync::Arc};

use safetensors::Dtype;

use super::{
    HubError,
    decode::{convert, e4m3_values, e8m0, encode_all, fp4_pair, size_of},
    header::TensorFile,
    hub_folder::Inner,
    stored::{MX_BLOCK, Piece, Storage, StoredTensor},
    view::View,
};

/// Elements decoded at once.
const CHUNK: usize = 1 << 18;

/// A rank's hand on the files of a folder, opened when they are first read.
pub(super) struct Reader {
    folder: Arc<Inner>,
    opened: HashMap<usize, File>,
    e4m3: [f32; 256],
    /// Buffers, kept from one read to the next.
    raw: Vec<u8>,
    decoded: Vec<u8>,
    /// The scales that were decoded last, by the name of their tensor.
    scales: (String, Vec<f32>),
}

impl Reader {
    pub fn new(folder: Arc<Inner>) -> Self {
        Self {
            folder,
            opened: HashMap::new(),
            e4m3: e4m3_values(),
            raw: Vec::new(),
            decoded: Vec::new(),
            scales: (String::new(), Vec::new()),
        }
    }

    /// Reads the elements at `range` of a view, row by row, as `dtype`.
    ///
    /// # Errors
    ///
    /// [`HubError::Io`]; [`HubError::Changed`] if the file is not the one whose table was read.
    ///
    /// # Panics
    ///
    /// If the folder has no such tensor.
    pub fn read(
        &mut self,
        tensor: &str,
        view: &View,
        range: Range<usize>,
        dtype: Dtype,
        to: &mut [u8],
    ) -> Result<(), HubError> {
        let folder = self.folder.clone();
        let tensor = folder.stored.get(tensor).expect("plans name tensors of their folder");
        let width = size_of(dtype);
        let mut filled = 0;
        for span in view.spans(range.clone(), CHUNK) {
            if span.is_dense() {
                self.read_run(tensor, span.start, span.len, dtype, &mut to[filled..filled + span.len * width])?;
                filled += span.len * width;
            } else {
                let mut decoded = std::mem::take(&mut self.decoded);
                decoded.resize(span.len * width, 0);
                let read = self.read_run(tensor, span.start, span.len, dtype, &mut decoded);
                if read.is_ok() {
                    view.scatter(&range, &span, &decoded, to, width);
                }
                self.decoded = decoded;
                read?;
            }
        }
        Ok(())
    }

    fn read_run(
        &mut self,
        tensor: &StoredTensor,
        start: usize,
        len: usize,
        dtype: Dtype,
        to: &mut [u8],
    ) -> Result<(), HubError> {
        if let Storage::Plain(piece) = &tensor.storage
            && piece.raw.dtype == dtype
        {
            return self.bytes(piece, start * size_of(dtype), to);
        }
        let width = size_of(dtype);
        for from in (start..start + len).step_by(CHUNK) {
            let count = CHUNK.min(start + len - from);
            let to = &mut to[(from - start) * width..][..count * width];
            let mut raw = std::mem::take(&mut self.raw);
            let read = self.read_chunk(tensor, from, count, dtype, to, &mut raw);
            self.raw = raw;
            read?;
        }
        Ok(())
    }

    fn read_chunk(
        &mut self,
        tensor: &StoredTensor,
        start: usize,
        len: usize,
        dtype: Dtype,
        to: &mut [u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), HubError> {
        match &tensor.storage {
            Storage::Plain(piece) => {
                let width = size_of(piece.raw.dtype);
                raw.resize(len * width, 0);
                self.bytes(piece, start * width, raw)?;
                convert(piece.raw.dtype, raw, dtype, to);
            }
            Storage::Fp8 { values, scales, block } => {
                self.load_scales(scales)?;
                raw.resize(len, 0);
                self.bytes(values, start, raw)?;
                let &[.., rows, columns] = &tensor.shape[..] else { unreachable!("checked when it was opened") };
                let grid = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
                let mut values = Vec::with_capacity(len);
                let mut rest = raw.as_slice();
                while let Some(element) = (!rest.is_empty()).then(|| start + len - rest.len()) {
                    let (row, column) = (element / columns, element % columns);
                    // Up to the end of the block, or of the row.
                    let count = (block[1] - column % block[1]).min(columns - column).min(rest.len());
                    let (matrix, row) = (row / rows, row % rows);
                    let scale = self.scales.1[(matrix * grid[0] + row / block[0]) * grid[1] + column / block[1]];
                    let (part, after) = rest.split_at(count);
                    values.extend(part.iter().map(|&bits| self.e4m3[usize::from(bits)] * scale));
                    rest = after;
                }
                encode_all(&values, dtype, to);
            }
            Storage::Mxfp4 { blocks, scales } => {
                // Whole blocks, of which the first and the last may stand out.
                let (first, last) = (start / MX_BLOCK, (start + len).div_ceil(MX_BLOCK));
                let mut exponents = vec![0; last - first];
                self.bytes(scales, first, &mut exponents)?;
                raw.resize((last - first) * MX_BLOCK / 2, 0);
                self.bytes(blocks, first * MX_BLOCK / 2, raw)?;
                let values = raw.chunks_exact(MX_BLOCK / 2).zip(&exponents).flat_map(|(bytes, &exponent)| {
                    let scale = e8m0(exponent);
                    bytes.iter().flat_map(move |&byte| fp4_pair(byte).map(|value| value * scale))
                });
                let values: Vec<f32> = values.skip(start - first * MX_BLOCK).take(len).collect();
                encode_all(&values, dtype, to);
            }
        }
        Ok(())
    }

    /// All scales of a tensor: one in 16,384 values of DeepSeek's.
    fn load_scales(&mut self, scales: &Piece) -> Result<(), HubError> {
        if self.scales.0 == scales.name {
            return Ok(());
        }
        let mut bytes = vec![0; scales.raw.bytes as usize];
        self.bytes(scales, 0, &mut bytes)?;
        let values = if scales.raw.dtype == Dtype::F8_E8M0 {
            bytes.into_iter().map(e8m0).collect()
        } else {
            let mut singles = vec![0; bytes.len() / size_of(scales.raw.dtype) * 4];
            convert(scales.raw.dtype, &bytes, Dtype::F32, &mut singles);
            singles.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        };
        self.scales = (scales.name.clone(), values);
        Ok(())
    }

    /// Fills `to` from a place in a raw tensor.
    fn bytes(&mut self, piece: &Piece, offset: usize, to: &mut [u8]) -> Result<(), HubError> {
        let file = &self.folder.files[piece.file];
        let opened = match self.opened.entry(piece.file) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(open_again(file)?),
        };
        read_at(opened, to, piece.raw.start + offset as u64).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => HubError::Changed {
                file: file.path.clone(),
                tensor: Some(piece.name.clone()),
                reason: "is cut off".into(),
            },
            _ => HubError::io("read", &file.path)(error),
        })
    }
}

/// Opens a file whose table was read before.
fn open_again(file: &TensorFile) -> Result<File, HubError> {
    let failed = HubError::io("open", &file.path);
    let opened = File::open(&file.path).map_err(&failed)?;
    let found = opened.metadata().map_err(&failed)?;
    let changed = |reason: String| HubError::Changed { file: file.path.clone(), tensor: None, reason };
    if found.len() != file.len {
        return Err(changed(format!("it has {} bytes instead of {}", found.len(), file.len)));
    }
    if found.modified().ok() != file.modified {
        return Err(changed("it was written to".into()));
    }
    Ok(opened)
}

#[cfg(unix)]
fn read_at(file: &mut File, to: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, to, offset)
}

#[cfg(not(unix))]
fn read_at(file: &mut File, to: &mut [u8], offset: u64) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};

    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(to)
}
