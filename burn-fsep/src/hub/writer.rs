use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    sync::Arc,
};

use burn::tensor::Bytes;
use safetensors::Dtype;

use super::{
    HubError,
    decode::{convert, size_of},
    layout::{OutFile, OutTensor},
    read::Reader,
    stored::{Storage, StoredTensor},
    view::View,
    write::{Content, Job, Unit},
};

/// Bytes of a tensor that are copied at once.
const CHUNK: usize = 4 << 20;

/// A file that this rank writes.
pub(super) struct Writer {
    pub job: Arc<Job>,
    file: Option<File>,
    name: String,
    header: Vec<u8>,
    reader: Option<Reader>,
}

impl Writer {
    pub fn new(job: &Arc<Job>, file: &OutFile) -> Self {
        Self { job: job.clone(), file: None, name: file.name.clone(), header: file.header.clone(), reader: None }
    }

    fn at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), HubError> {
        let path = self.job.output.partial.join(&self.name);
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let mut file = File::create_new(&path).map_err(HubError::io("create", &path))?;
                file.write_all(&self.header).map_err(HubError::io("write", &path))?;
                none.insert(file)
            }
        };
        write_at(file, offset, bytes).map_err(HubError::io("write", &path))
    }

    pub fn write(&mut self, job: &Job, unit: &Unit, content: Content) -> Result<(), HubError> {
        let tensor = &job.layout.tensors[unit.tensor];
        match content {
            Content::Folder => self.copy(job, tensor, unit.start),
            Content::Values(bytes) => {
                let (place, views, first) = job.views(tensor, unit);
                let (from, to) = (job.plan.params[place].param.dtype, tensor.dtype);
                let (offset, content) = arrange(&views, bytes, from, to);
                let offset = (first + offset) as u64 * size_of(to) as u64;
                self.at(unit.start + offset, &content)
            }
        }
    }

    /// Copies a tensor of the folder, decoded if it is quantised.
    fn copy(&mut self, job: &Job, tensor: &OutTensor, start: u64) -> Result<(), HubError> {
        let stored = job.folder.stored.get(&tensor.name).expect("it is the folder's");
        let width = size_of(tensor.dtype);
        let mut reader = self.reader.take().unwrap_or_else(|| Reader::new(job.folder.clone()));
        let mut at = start;
        for view in copied_views(stored) {
            for from in (0..view.len()).step_by(CHUNK / width) {
                let range = from..(from + CHUNK / width).min(view.len());
                let mut bytes = vec![0; range.len() * width];
                reader.read(&tensor.name, &view, range, tensor.dtype, &mut bytes)?;
                self.at(at, &bytes)?;
                at += bytes.len() as u64;
            }
        }
        self.reader = Some(reader);
        Ok(())
    }

    pub fn close(mut self) -> Result<(), HubError> {
        // A file without tensors has its header.
        self.at(self.header.len() as u64, &[])?;
        let path = self.job.output.partial.join(&self.name);
        self.file.map_or(Ok(()), |file| file.sync_all().map_err(HubError::io("write", &path)))
    }
}

/// Puts values in the order and the type that a file has them in; with the first one's place.
fn arrange(views: &[(usize, View)], bytes: Bytes, from: Dtype, to: Dtype) -> (usize, Bytes) {
    let converted = if from == to {
        bytes
    } else {
        let mut converted = vec![0; bytes.len() / size_of(from) * size_of(to)];
        convert(from, &bytes, to, &mut converted);
        Bytes::from_bytes_vec(converted)
    };
    if let [(_, view)] = views
        && view.is_run()
    {
        return (view.base, converted);
    }
    let width = size_of(to);
    let mut arranged = vec![0; converted.len()];
    for (at, view) in views {
        for place in 0..view.len() {
            arranged[view.at(place) * width..][..width].copy_from_slice(&converted[(at + place) * width..][..width]);
        }
    }
    (0, Bytes::from_bytes_vec(arranged))
}

/// A stored tensor as it is written where it is not quantised.
fn copied_views(stored: &StoredTensor) -> Vec<View> {
    match &stored.storage {
        Storage::Mxfp4 { .. } => {
            let &[.., rows, columns] = &stored.shape[..] else { return vec![View::run(0, stored.len())] };
            let size = rows * columns;
            (0..stored.len()).step_by(size.max(1)).map(|base| View::transposed(base, columns, rows)).collect()
        }
        _ => vec![View::run(0, stored.len())],
    }
}

fn write_at(file: &mut File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}
