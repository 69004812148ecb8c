use std::time::{Duration, Instant};

use cudarc::nccl::{
    result::{self, NcclError, NcclStatus},
    sys,
};
use parking_lot::Mutex;

/// What NCCL says of a call.
#[derive(Debug)]
pub(super) enum Fault {
    /// NCCL's own error.
    Nccl(sys::ncclResult_t),
    /// The communicator was aborted before.
    Aborted,
}

impl From<NcclError> for Fault {
    fn from(error: NcclError) -> Self {
        Fault::Nccl(error.0)
    }
}

/// One NCCL communicator of this rank, from its birth to its one end: destroyed in peace or aborted.
///
/// NCCL's calls must not meet an abort on another thread: the lock keeps them apart. Communicators are non-blocking, so no
/// call holds it for long.
#[derive(Debug)]
pub(super) struct Handle {
    raw: Mutex<Option<Raw>>,
    /// How long the end may wait for peers.
    patience: Duration,
}

#[derive(Debug)]
struct Raw(sys::ncclComm_t);

// SAFETY: NCCL allows calls on a communicator from any thread, one at a time; the mutex around it sees to that.
unsafe impl Send for Raw {}

/// A unique id, which rank 0 makes and all others receive.
pub(super) type UniqueId = [u8; 128];

/// # Errors
///
/// NCCL's.
pub(super) fn unique_id() -> Result<UniqueId, Fault> {
    Ok(result::get_uniqueid()?.internal.map(|byte| byte as u8))
}

impl Handle {
    /// Starts to connect; [`Handle::is_ready`] tells when it is done. A kernel has at most so many `blocks`.
    pub fn connect(id: &UniqueId, size: usize, rank: usize, blocks: usize, patience: Duration) -> Result<Self, Fault> {
        const UNDEFINED: i32 = i32::MIN;
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: 0xcafe_beef,
            // What came after this version is left to NCCL, of which 2.28 or a later one may be there.
            version: 22800,
            // So that a missing rank is a timeout of ours instead of a hang in NCCL.
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: blocks as i32,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
            trafficClass: UNDEFINED,
            commName: std::ptr::null(),
            collnetEnable: UNDEFINED,
            CTAPolicy: UNDEFINED,
            shrinkShare: UNDEFINED,
            nvlsCTAs: UNDEFINED,
            nChannelsPerNetPeer: UNDEFINED,
            nvlinkCentricSched: UNDEFINED,
            graphUsageMode: UNDEFINED,
            numRmaCtx: UNDEFINED,
            maxP2pPeers: UNDEFINED,
        };
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as std::ffi::c_char) };
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` and `config` live through the call; the configuration is NCCL_CONFIG_INITIALIZER of nccl.h.
        unsafe { result::comm_init_rank_config(&mut raw, size as i32, id, rank as i32, &mut config)? };
        Ok(Self { raw: Mutex::new(Some(Raw(raw))), patience })
    }

    /// Calls NCCL with the communicator, unless it was aborted.
    pub fn call(
        &self,
        call: impl FnOnce(sys::ncclComm_t) -> Result<NcclStatus, NcclError>,
    ) -> Result<NcclStatus, Fault> {
        match &*self.raw.lock() {
            Some(raw) => Ok(call(raw.0)?),
            None => Err(Fault::Aborted),
        }
    }

    /// Whether what was asked of the communicator has been done (or, of work on the GPU, queued).
    pub fn is_ready(&self) -> Result<bool, Fault> {
        self.call(|raw| {
            let mut state = sys::ncclResult_t::ncclSuccess;
            // SAFETY: the communicator lives as long as it is in the handle.
            unsafe { sys::ncclCommGetAsyncError(raw, &mut state) }.result()?;
            state.result()
        })
        .map(|status| status != NcclStatus::InProgress)
    }

    /// Ends the communicator at once: work on the GPU that waits for a peer ends, with garbage.
    pub fn abort(&self) {
        if let Some(raw) = self.raw.lock().take() {
            // SAFETY: taken out of the handle, so this is its only and last use.
            let _ = unsafe { result::comm_abort(raw.0) };
        }
    }
}

impl Drop for Handle {
    /// Peers may still be reading what this rank has sent, so it does not just leave.
    fn drop(&mut self) {
        // SAFETY: the communicator is in the handle, thus alive.
        let finalized = self.call(|raw| unsafe { result::comm_finalize(raw) });
        let start = Instant::now();
        while finalized.is_ok() && start.elapsed() < self.patience {
            match self.is_ready() {
                Ok(false) => std::thread::sleep(Duration::from_micros(100)),
                Ok(true) => {
                    if let Some(raw) = self.raw.lock().take() {
                        // SAFETY: as in `abort`.
                        let _ = unsafe { result::comm_destroy(raw.0) };
                    }
                    return;
                }
                Err(_) => break,
            }
        }
        self.abort();
    }
}
