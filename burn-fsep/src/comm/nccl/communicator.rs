use std::{
    ffi::c_void,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::Bytes;
use cudarc::{
    driver::{CudaSlice, CudaStream, DevicePtr, DriverError},
    nccl::{
        result::{self, NcclError},
        sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t},
    },
};

use super::{
    exchange::{DeviceExchange, StagedExchange},
    group::{Group, engine},
    handle::Handle,
};
use crate::comm::{
    Block, CommError, Communicator, DeviceCommunicator, ExchangePlan, Operation, PendingDeviceExchange,
    PendingExchange, ReduceBuffer, ReduceOp, check, reduction,
};

/// From this size on (bytes) an all-reduce sends each rank its part only.
const REDUCE_IN_PARTS: usize = 64 << 10;

/// A rank's handle on NCCL, with a stream of its own on the rank's GPU. See [`NcclConfig`](super::NcclConfig).
pub struct NcclCommunicator {
    group: Arc<Group>,
    handle: Arc<Handle>,
    stream: Arc<CudaStream>,
    /// What it carries: its track in a timeline.
    name: &'static str,
    /// For comparing what ranks are about to do; `None` if they do not.
    signatures: Option<Arc<dyn Communicator>>,
    sequence: AtomicU64,
}

impl fmt::Debug for NcclCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NcclCommunicator(rank {} of {}, {:?})", self.rank(), self.size(), self.group)
    }
}

/// Points of an exchange's buffers on the GPU.
struct Buffers {
    send: u64,
    recv: u64,
}

impl NcclCommunicator {
    pub(super) fn connect(group: Arc<Group>, name: &'static str, check_signatures: bool) -> Result<Self, CommError> {
        let operation = Operation::new("connection of NCCL");
        let signatures = check_signatures.then(|| group.control.duplicate("signatures")).transpose()?;
        let handle = group.connect()?;
        let stream = group.context.new_stream().map_err(|error| group.fail(group.cuda(operation, error)))?;
        let comm = Self { group, handle, stream, name, signatures, sequence: AtomicU64::new(0) };
        comm.connect_pairs(operation)?;
        Ok(comm)
    }

    /// NCCL connects two ranks when they first exchange something, and both wait for each other then. Done now, for all
    /// pairs, no later exchange makes the host wait, whatever the order of the exchanges on different communicators.
    fn connect_pairs(&self, operation: Operation) -> Result<(), CommError> {
        let ranks = self.size();
        let blocks: Vec<_> = (0..ranks).map(|peer| Block { peer, offset: peer, len: 1 }).collect();
        let plan = ExchangePlan { sends: blocks.clone(), recvs: blocks, recv_len: ranks, send_len: ranks };
        Box::new(self.start_staged(operation, &vec![0; ranks], plan)?).wait(&mut vec![0; ranks])
    }

    /// Compares what the ranks are about to do.
    fn check_signature(&self, describe: impl FnOnce() -> String) -> Result<(), CommError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let Some(control) = &self.signatures else { return Ok(()) };
        const LEN: usize = 256;
        let mut mine = describe().into_bytes();
        mine.resize(LEN, 0);
        let mut all = vec![0; LEN * self.size()];
        control.all_gather(Operation::new("comparison of collectives"), &mine, &mut all)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string();
        match all.chunks_exact(LEN).position(|theirs| theirs != mine) {
            None => Ok(()),
            Some(peer) => Err(self.group.fail(CommError::Mismatch {
                sequence,
                rank: self.rank(),
                operation: text(&mine),
                peer,
                peer_operation: text(&all[peer * LEN..(peer + 1) * LEN]),
            })),
        }
    }

    fn cuda(&self, operation: Operation) -> impl Fn(DriverError) -> CommError + '_ {
        move |error| self.group.fail(self.group.cuda(operation, error))
    }

    /// Queues NCCL's work, as one group, on this communicator's stream.
    fn enqueue(
        &self,
        operation: Operation,
        calls: impl FnOnce(ncclComm_t, cudaStream_t) -> Result<(), NcclError>,
    ) -> Result<(), CommError> {
        self.group.check(operation)?;
        self.group.context.bind_to_thread().map_err(self.cuda(operation))?;
        let queued = self.handle.call(|raw| {
            result::group_start()?;
            let called = calls(raw, self.stream.cu_stream().cast());
            // Always ended: the group belongs to the thread.
            let ended = result::group_end();
            called.and(ended)
        });
        queued.map_err(|fault| self.group.fail(self.group.fault(operation, fault)))?;
        self.group.wait_ready(&self.handle, operation)
    }

    fn enqueue_exchange(&self, operation: Operation, buffers: Buffers, plan: &ExchangePlan) -> Result<(), CommError> {
        let rank = self.rank();
        let address = |start: u64, block: &Block| (start + block.offset as u64) as *mut c_void;
        // NCCL would copy what stays here through its own buffers.
        let of_rank = |blocks: &[Block]| blocks.iter().filter(|block| block.peer == rank).copied().collect::<Vec<_>>();
        let (kept, kept_at) = (of_rank(&plan.sends), of_rank(&plan.recvs));
        if kept.len() != kept_at.len() || kept.iter().zip(&kept_at).any(|(from, to)| from.len != to.len) {
            return Err(self.group.fail(CommError::InvalidArgument {
                operation: operation.to_string(),
                reason: "what this rank sends itself is not what it receives".into(),
            }));
        }
        self.group.context.bind_to_thread().map_err(self.cuda(operation))?;
        for (from, to) in kept.iter().zip(&kept_at) {
            // SAFETY: the plan was checked against the lengths of both buffers, which the callers vouch for.
            unsafe {
                cudarc::driver::result::memcpy_dtod_async(
                    address(buffers.recv, to) as u64,
                    address(buffers.send, from) as u64,
                    from.len,
                    self.stream.cu_stream(),
                )
            }
            .map_err(self.cuda(operation))?;
        }
        self.enqueue(operation, |raw, stream| {
            for block in plan.sends.iter().filter(|block| block.peer != rank) {
                let (from, peer) = (address(buffers.send, block), block.peer as i32);
                // SAFETY: as above.
                unsafe { result::send(from, block.len, ncclDataType_t::ncclUint8, peer, raw, stream)? };
            }
            for block in plan.recvs.iter().filter(|block| block.peer != rank) {
                let (to, peer) = (address(buffers.recv, block), block.peer as i32);
                // SAFETY: as above.
                unsafe { result::recv(to, block.len, ncclDataType_t::ncclUint8, peer, raw, stream)? };
            }
            Ok(())
        })
    }

    fn check_exchange(&self, operation: Operation, plan: &ExchangePlan) -> Result<(), CommError> {
        plan.check(operation, self.size())?;
        self.check_signature(|| format!("all-to-all `{operation}`"))
    }

    /// A buffer on the GPU for this communicator's stream.
    fn buffer(&self, operation: Operation, len: usize) -> Result<CudaSlice<u8>, CommError> {
        self.stream.alloc_zeros::<u8>(len.max(1)).map_err(self.cuda(operation))
    }

    fn upload(&self, operation: Operation, bytes: &[u8]) -> Result<CudaSlice<u8>, CommError> {
        if bytes.is_empty() {
            return self.buffer(operation, 0);
        }
        self.stream.clone_htod(bytes).map_err(self.cuda(operation))
    }

    fn address(&self, buffer: &CudaSlice<u8>) -> u64 {
        // Only this stream uses the buffer: there is nothing that the guard would order.
        buffer.device_ptr(&self.stream).0
    }

    /// Waits for the stream and copies a buffer to the host.
    fn download(&self, operation: Operation, buffer: &CudaSlice<u8>, to: &mut [u8]) -> Result<(), CommError> {
        let done = self.stream.record_event(None).map_err(self.cuda(operation))?;
        self.group.wait_event(&done, operation)?;
        if to.is_empty() {
            return Ok(());
        }
        self.stream.memcpy_dtoh(&buffer.slice(..to.len()), to).map_err(self.cuda(operation))
    }

    fn gather_bytes(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        let (sent, gathered) = (self.upload(operation, send)?, self.buffer(operation, recv.len())?);
        let (from, to) = (self.address(&sent), self.address(&gathered));
        self.enqueue(operation, |raw, stream| {
            let (from, to) = (from as *const c_void, to as *mut c_void);
            // SAFETY: the buffers are as long as the calls say and live until the download has waited.
            unsafe { result::all_gather(from, to, send.len(), ncclDataType_t::ncclUint8, raw, stream) }.map(drop)
        })?;
        self.download(operation, &gathered, recv)
    }

    /// Each rank combines its part of the numbers, in rank order, and all gather the parts: the traffic of a ring, and the
    /// same bits on every rank and in every run.
    fn reduce<F: reduction::Number>(
        &self,
        operation: Operation,
        data: &mut [F],
        op: ReduceOp,
    ) -> Result<(), CommError> {
        let (ranks, bytes) = (self.size(), size_of_val(data));
        if bytes < REDUCE_IN_PARTS {
            let mut all = vec![F::zeroed(); data.len() * ranks];
            self.gather_bytes(operation, bytemuck::cast_slice(data), bytemuck::cast_slice_mut(&mut all))?;
            let parts: Vec<&[F]> = all.chunks_exact(data.len().max(1)).collect();
            if !data.is_empty() {
                reduction::reduce(&parts, data, op);
            }
            return Ok(());
        }
        let part = data.len().div_ceil(ranks);
        let mut padded = data.to_vec();
        padded.resize(part * ranks, F::zeroed());
        let blocks = (0..ranks).map(|peer| Block { peer, offset: peer * part, len: part }).collect::<Vec<_>>();
        let plan =
            ExchangePlan { sends: blocks.clone(), recvs: blocks, recv_len: part * ranks, send_len: part * ranks };
        let plan = plan.scaled(size_of::<F>());
        let mut received = vec![F::zeroed(); part * ranks];
        let pending = self.start_staged(operation, bytemuck::cast_slice(&padded), plan)?;
        Box::new(pending).wait(bytemuck::cast_slice_mut(&mut received))?;
        let mut mine = vec![F::zeroed(); part];
        reduction::reduce(&received.chunks_exact(part).collect::<Vec<_>>(), &mut mine, op);
        self.gather_bytes(operation, bytemuck::cast_slice(&mine), bytemuck::cast_slice_mut(&mut padded))?;
        data.copy_from_slice(&padded[..data.len()]);
        Ok(())
    }

    /// Queues work on buffers of the compute stream, after what is queued there and before what will be after the wait.
    fn start_on_device(
        &self,
        operation: Operation,
        queue: impl FnOnce() -> Result<(), CommError>,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        let cuda = self.cuda(operation);
        let ready = self.group.compute.record_event(None).map_err(&cuda)?;
        self.stream.wait(&ready).map_err(&cuda)?;
        let timeline = self.group.timeline.as_ref();
        let began = timeline.and_then(|timeline| timeline.mark(&self.stream));
        let queued = queue();
        // Also of a failed start something may be queued that uses the buffers.
        let done = Arc::new(self.stream.record_event(None).map_err(&cuda)?);
        if let (Some(timeline), Some(began)) = (timeline, began)
            && let Some(ended) = timeline.mark(&self.stream)
        {
            timeline.push(self.name, operation.to_string(), [began, ended]);
        }
        let pending = DeviceExchange { group: self.group.clone(), operation, done: Some(done.clone()) };
        queued?;
        self.group.watch_over(done, operation);
        Ok(Box::new(pending))
    }

    fn start_staged(&self, operation: Operation, send: &[u8], plan: ExchangePlan) -> Result<StagedExchange, CommError> {
        let (sent, received) = (self.upload(operation, send)?, self.buffer(operation, plan.recv_len)?);
        let buffers = Buffers { send: self.address(&sent), recv: self.address(&received) };
        self.enqueue_exchange(operation, buffers, &plan)?;
        let done = self.stream.record_event(None).map_err(self.cuda(operation))?;
        let ExchangePlan { recvs, recv_len, .. } = plan;
        let (group, stream) = (self.group.clone(), self.stream.clone());
        Ok(StagedExchange { group, stream, operation, done, sent, received, recvs, recv_len })
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.group.control.rank()
    }

    fn size(&self) -> usize {
        self.group.control.size()
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        self.check_exchange(operation, &plan)?;
        check::send_buffer(operation, send.len(), plan.send_len)?;
        Ok(Box::new(self.start_staged(operation, &send, plan)?))
    }

    fn all_gather(&self, operation: Operation, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        check::gathered(operation, self.size(), send.len(), recv.len())?;
        self.check_signature(|| format!("all-gather `{operation}` of {} bytes", send.len()))?;
        if send.is_empty() {
            // A barrier: NCCL does nothing for no bytes.
            let mut all = vec![0; self.size()];
            return self.gather_bytes(operation, &[0], &mut all);
        }
        self.gather_bytes(operation, send, recv)
    }

    fn all_reduce(&self, operation: Operation, buffer: ReduceBuffer<'_>, op: ReduceOp) -> Result<(), CommError> {
        match buffer {
            ReduceBuffer::F32(data) => {
                self.check_signature(|| format!("all-reduce {op:?} `{operation}` of {} f32", data.len()))?;
                self.reduce(operation, data, op)
            }
            ReduceBuffer::F64(data) => {
                self.check_signature(|| format!("all-reduce {op:?} `{operation}` of {} f64", data.len()))?;
                self.reduce(operation, data, op)
            }
        }
    }

    fn broadcast(&self, operation: Operation, buffer: &mut [u8], root: usize) -> Result<(), CommError> {
        check::root(operation, self.size(), root)?;
        self.check_signature(|| format!("broadcast `{operation}` of {} bytes from rank {root}", buffer.len()))?;
        let data = self.upload(operation, buffer)?;
        let address = self.address(&data);
        self.enqueue(operation, |raw, stream| {
            let (from, to, kind) = (address as *const c_void, address as *mut c_void, ncclDataType_t::ncclUint8);
            // SAFETY: the buffer is as long as the call says (or one byte longer) and lives until the download has waited.
            unsafe { result::broadcast(from, to, buffer.len(), kind, root as i32, raw, stream) }.map(drop)
        })?;
        self.download(operation, &data, buffer)
    }

    fn abort(&self, reason: &str) {
        self.group.fail(engine(Operation::new("abort"), reason.into()));
    }

    fn failure(&self) -> Option<CommError> {
        self.group.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::connect(self.group.clone(), name, self.signatures.is_some())?))
    }

    fn device(&self) -> Option<&dyn DeviceCommunicator> {
        Some(self)
    }
}

impl DeviceCommunicator for NcclCommunicator {
    fn gpu(&self) -> usize {
        self.group.context.ordinal()
    }

    unsafe fn start_device_all_to_all_v(
        &self,
        operation: Operation,
        send: u64,
        recv: u64,
        plan: &ExchangePlan,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        self.check_exchange(operation, plan)?;
        self.start_on_device(operation, || self.enqueue_exchange(operation, Buffers { send, recv }, plan))
    }

    unsafe fn start_device_all_gather(
        &self,
        operation: Operation,
        send: u64,
        recv: u64,
        len: usize,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        self.check_signature(|| format!("all-gather `{operation}` of {len} bytes"))?;
        self.start_on_device(operation, || {
            self.enqueue(operation, |raw, stream| {
                let (from, to) = (send as *const c_void, recv as *mut c_void);
                // SAFETY: the caller vouches for both buffers.
                unsafe { result::all_gather(from, to, len, ncclDataType_t::ncclUint8, raw, stream) }.map(drop)
            })
        })
    }

    unsafe fn start_device_all_reduce(
        &self,
        operation: Operation,
        address: u64,
        len: usize,
        op: ReduceOp,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        let op = match op {
            ReduceOp::Sum => ncclRedOp_t::ncclSum,
            ReduceOp::Mean => ncclRedOp_t::ncclAvg,
            ReduceOp::Max => ncclRedOp_t::ncclMax,
        };
        self.start_on_device(operation, || {
            self.enqueue(operation, |raw, stream| {
                let (from, to, kind) = (address as *const c_void, address as *mut c_void, ncclDataType_t::ncclFloat32);
                // SAFETY: the caller vouches for the numbers; NCCL reduces in place where both addresses are equal.
                unsafe { result::all_reduce(from, to, len, kind, op, raw, stream) }.map(drop)
            })
        })
    }
}
