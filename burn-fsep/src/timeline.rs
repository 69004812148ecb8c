//! What ran when, on the host and on the GPU's streams.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

#[cfg(any(feature = "libtorch", feature = "nccl"))]
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, sys::CUevent_flags};
use parking_lot::Mutex;
use serde::Serialize;

use crate::FsepError;

/// The track of work that the device computes.
pub const COMPUTE: &str = "compute";
/// The track of times that the host waits.
pub const HOST: &str = "host waits";

/// Records spans of time, to be looked at in [Perfetto](https://ui.perfetto.dev) or Chrome's `about:tracing`.
///
/// Work on a GPU is timed by CUDA events on its streams, so recording makes nobody wait. Clones share one record.
#[derive(Clone)]
pub struct Timeline(Arc<Inner>);

struct Inner {
    origin: Instant,
    is_recording: AtomicBool,
    spans: Mutex<Vec<Span>>,
    #[cfg(any(feature = "libtorch", feature = "nccl"))]
    gpu: Option<Gpu>,
}

#[cfg(any(feature = "libtorch", feature = "nccl"))]
struct Gpu {
    compute: Arc<CudaStream>,
    /// Recorded at the timeline's origin.
    origin: CudaEvent,
}

struct Span {
    track: String,
    name: String,
    begin: Stamp,
    end: Stamp,
}

/// A moment; shared, so that one event can end a span and begin another.
#[derive(Clone)]
enum Stamp {
    Host(Duration),
    #[cfg(any(feature = "libtorch", feature = "nccl"))]
    Gpu(Arc<CudaEvent>),
}

/// A span that was recorded, in microseconds since the timeline was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TimelineRecord {
    /// Stream, or the host.
    pub track: String,
    /// What ran.
    pub name: String,
    /// When it began.
    pub start: f64,
    /// When it ended.
    pub end: f64,
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timeline({} spans)", self.0.spans.lock().len())
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

impl Timeline {
    /// A timeline by the host's clock, for backends that compute on the CPU. It records at once.
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            origin: Instant::now(),
            is_recording: AtomicBool::new(true),
            spans: Mutex::default(),
            #[cfg(any(feature = "libtorch", feature = "nccl"))]
            gpu: None,
        }))
    }

    /// A timeline by the clock of a GPU. It records at once.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if there is no such GPU.
    #[cfg(any(feature = "libtorch", feature = "nccl"))]
    pub fn of_gpu(index: usize) -> Result<Self, FsepError> {
        // cudarc panics where the library is missing.
        // SAFETY: only asks whether the library can be loaded.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(FsepError::Device("libcuda was not found: is the NVIDIA driver installed?".into()));
        }
        let gpu = || -> Result<Gpu, DriverError> {
            let compute = CudaContext::new(index)?.default_stream();
            let origin = compute.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
            origin.synchronize()?;
            Ok(Gpu { compute, origin })
        };
        let gpu = gpu().map_err(|error| FsepError::Device(format!("GPU {index}: {error}")))?;
        let (origin, is_recording, spans) = (Instant::now(), AtomicBool::new(true), Mutex::default());
        Ok(Self(Arc::new(Inner { origin, is_recording, spans, gpu: Some(gpu) })))
    }

    /// Goes on or stops recording: what is recorded stays in memory.
    pub fn set_recording(&self, on: bool) {
        self.0.is_recording.store(on, Ordering::Relaxed);
    }

    /// Forgets what was recorded.
    pub fn clear(&self) {
        self.0.spans.lock().clear();
    }

    fn is_recording(&self) -> bool {
        self.0.is_recording.load(Ordering::Relaxed)
    }

    /// Marks what the device computes from now on, until the span is dropped. `None` while nothing is recorded.
    pub fn compute(&self, name: impl Into<String>) -> Option<TimelineSpan> {
        self.is_recording().then(|| self.span(COMPUTE, name.into(), self.now_on_device()))
    }

    /// Marks that the host waits, until the span is dropped. `None` while nothing is recorded.
    pub fn wait(&self, name: impl Into<String>) -> Option<TimelineSpan> {
        self.is_recording().then(|| self.span(HOST, name.into(), Some(self.now())))
    }

    fn span(&self, track: &'static str, name: String, begin: Option<Stamp>) -> TimelineSpan {
        TimelineSpan { timeline: self.clone(), track, name, begin }
    }

    fn now(&self) -> Stamp {
        Stamp::Host(self.0.origin.elapsed())
    }

    /// `None` where the GPU takes no event: then nothing is recorded.
    fn now_on_device(&self) -> Option<Stamp> {
        #[cfg(any(feature = "libtorch", feature = "nccl"))]
        if let Some(gpu) = &self.0.gpu {
            return self.mark(&gpu.compute).map(Stamp::Gpu);
        }
        Some(self.now())
    }

    /// The moment at which a stream comes here.
    #[cfg(any(feature = "libtorch", feature = "nccl"))]
    pub(crate) fn mark(&self, stream: &CudaStream) -> Option<Arc<CudaEvent>> {
        let is_wanted = self.is_recording() && self.0.gpu.is_some();
        is_wanted.then(|| stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).ok())?.map(Arc::new)
    }

    /// Records what a stream did between two marks.
    #[cfg(feature = "nccl")]
    pub(crate) fn push(&self, track: &str, name: String, marks: [Arc<CudaEvent>; 2]) {
        let [begin, end] = marks.map(Stamp::Gpu);
        self.0.spans.lock().push(Span { track: track.to_string(), name, begin, end });
    }

    /// What was recorded so far, once all of it is done.
    ///
    /// # Errors
    ///
    /// [`FsepError::Device`] if the GPU fails.
    pub fn records(&self) -> Result<Vec<TimelineRecord>, FsepError> {
        let micros = |stamp: &Stamp| -> Result<f64, FsepError> {
            match stamp {
                Stamp::Host(time) => Ok(time.as_secs_f64() * 1e6),
                #[cfg(any(feature = "libtorch", feature = "nccl"))]
                Stamp::Gpu(event) => {
                    let gpu = self.0.gpu.as_ref().ok_or_else(|| FsepError::Device("no GPU to time".into()))?;
                    let elapsed = event.synchronize().and_then(|()| gpu.origin.elapsed_ms(event));
                    elapsed.map(|ms| f64::from(ms) * 1e3).map_err(|error| FsepError::Device(error.to_string()))
                }
            }
        };
        let spans = self.0.spans.lock();
        let record = |span: &Span| {
            let (start, end) = (micros(&span.begin)?, micros(&span.end)?);
            Ok(TimelineRecord { track: span.track.clone(), name: span.name.clone(), start, end })
        };
        spans.iter().map(record).collect()
    }

    /// The records in Chrome's trace event format (JSON), as process `rank`.
    ///
    /// # Errors
    ///
    /// As [`Timeline::records`].
    pub fn chrome_trace(&self, rank: usize) -> Result<String, FsepError> {
        let mut tracks: Vec<String> = Vec::new();
        let mut events = Vec::new();
        for TimelineRecord { track, name, start, end } in self.records()? {
            let thread = tracks.iter().position(|other| *other == track).unwrap_or_else(|| {
                tracks.push(track);
                tracks.len() - 1
            });
            events.push(serde_json::json!({
                "ph": "X", "pid": rank, "tid": thread, "name": name, "ts": start, "dur": end - start
            }));
        }
        events.extend(tracks.iter().enumerate().map(|(thread, name)| {
            serde_json::json!({"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": name}})
        }));
        events.push(serde_json::json!({
            "ph": "M", "pid": rank, "name": "process_name", "args": {"name": format!("rank {rank}")}
        }));
        Ok(serde_json::json!({ "traceEvents": events }).to_string())
    }
}

/// A span that has not ended yet; it ends when it is dropped.
#[derive(Debug)]
pub struct TimelineSpan {
    timeline: Timeline,
    track: &'static str,
    name: String,
    begin: Option<Stamp>,
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stamp::Host(time) => write!(f, "{time:?}"),
            #[cfg(any(feature = "libtorch", feature = "nccl"))]
            Stamp::Gpu(_) => f.write_str("event"),
        }
    }
}

impl Drop for TimelineSpan {
    fn drop(&mut self) {
        let is_host = self.track == HOST;
        let end = if is_host { Some(self.timeline.now()) } else { self.timeline.now_on_device() };
        if let (Some(begin), Some(end)) = (self.begin.take(), end) {
            let (track, name) = (self.track.to_string(), std::mem::take(&mut self.name));
            self.timeline.0.spans.lock().push(Span { track, name, begin, end });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_become_trace_events() {
        let timeline = Timeline::new();
        let outer = timeline.compute("outer");
        drop(timeline.wait("inner"));
        drop(outer);
        timeline.set_recording(false);
        assert!(timeline.compute("unseen").is_none());
        let records = timeline.records().unwrap();
        assert_eq!(records.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["inner", "outer"]);
        assert!(records[1].start <= records[0].start && records[0].end <= records[1].end);
        let trace: serde_json::Value = serde_json::from_str(&timeline.chrome_trace(3).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.iter().filter(|event| event["ph"] == "X" && event["pid"] == 3).count(), 2);
        timeline.clear();
        assert!(timeline.records().unwrap().is_empty());
    }
}
