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
    driver::{CudaSlice, CudaStream, DevicePtr, DriverError, result::event},
    nccl::{
        result::{self, NcclError},
        sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t},
    },
};

use super::{
    handle::Handle,
    pending::{DeviceExchange, StagedExchange},
    watchdog::{Group, cuda_error},
};
use crate::comm::{
    Block, CommError, Communicator, ComputeStream, DeviceCommunicator, ExchangePlan, Operation, PendingDeviceExchange,
    PendingExchange, ReduceOp, control_group::engine_error, error::check_buffer, exchange_plan::own_blocks,
    headers::Headers, operation::Collective,
};

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
    /// `in_background`: what it carries is hidden by compute.
    pub(super) fn connect(
        group: Arc<Group>,
        name: &'static str,
        in_background: bool,
        check_signatures: bool,
    ) -> Result<Self, CommError> {
        let operation = Operation::new("connection of NCCL");
        let signatures = check_signatures.then(|| group.control.comm.duplicate("signatures")).transpose()?;
        let handle = group.connect(in_background)?;
        let stream = group.context.new_stream().map_err(|error| group.fail(cuda_error(operation, error)))?;
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
    fn check_signature(&self, operation: Operation, plan: &ExchangePlan) -> Result<(), CommError> {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let Some(control) = &self.signatures else { return Ok(()) };
        let headers = Headers::new(operation, plan, self.size());
        let (data, plan) = headers.exchange();
        let pending = control.start_all_to_all_v(Operation::new("comparison of collectives"), data, plan)?;
        let mut differs = None;
        pending.wait_for_blocks(&mut |block, said| {
            differs = differs.take().or_else(|| Some((block.peer, headers.difference(block.peer, said)?)));
        })?;
        match differs {
            None => Ok(()),
            Some((peer, texts)) => Err(self.group.fail(self.group.control.mismatch(sequence, peer, texts))),
        }
    }

    fn cuda(&self, operation: Operation) -> impl Fn(DriverError) -> CommError + '_ {
        move |error| self.group.fail(cuda_error(operation, error))
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
        self.group.context.bind_to_thread().map_err(self.cuda(operation))?;
        // NCCL would copy what stays here through its own buffers.
        for (from, to) in own_blocks(operation, plan, rank).map_err(|error| self.group.fail(error))? {
            // SAFETY: the plan was checked against the lengths of both buffers, which the callers vouch for.
            unsafe {
                cudarc::driver::result::memcpy_dtod_async(
                    address(buffers.recv, &to) as u64,
                    address(buffers.send, &from) as u64,
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
        self.check_signature(operation, plan)
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

    /// Queues work on buffers of the compute stream, after what is queued there and before what will be after the wait.
    fn start_on_device(
        &self,
        operation: Operation,
        compute: ComputeStream,
        queue: impl FnOnce() -> Result<(), CommError>,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        let cuda = self.cuda(operation);
        // Makes the context current.
        let ready = self.group.context.new_event(None).map_err(&cuda)?;
        // SAFETY: the callers vouch for the stream: it is alive and of this GPU's primary context.
        unsafe { event::record(ready.cu_event(), compute.as_raw() as _) }.map_err(&cuda)?;
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
        let pending = DeviceExchange { group: self.group.clone(), operation, compute, done: Some(done.clone()) };
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
        Ok(StagedExchange { group, stream, operation, done, _sent: sent, received, recvs, recv_len })
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn world_rank(&self, rank: usize) -> usize {
        self.group.control.comm.world_rank(rank)
    }

    fn start_all_to_all_v(
        &self,
        operation: Operation,
        send: Arc<Bytes>,
        plan: ExchangePlan,
    ) -> Result<Box<dyn PendingExchange>, CommError> {
        self.check_exchange(operation, &plan)?;
        check_buffer(operation, "send", send.len(), plan.send_len)?;
        Ok(Box::new(self.start_staged(operation, &send, plan)?))
    }

    fn abort(&self, reason: &str) {
        self.group.fail(engine_error(Operation::new("abort"), reason.into()));
    }

    fn failure(&self) -> Option<CommError> {
        self.group.failure()
    }

    fn duplicate(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::connect(self.group.clone(), name, false, self.signatures.is_some())?))
    }

    fn duplicate_in_background(&self, name: &'static str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::connect(self.group.clone(), name, true, self.signatures.is_some())?))
    }

    fn split(&self, name: &'static str, color: u64, key: u64) -> Result<Arc<dyn Communicator>, CommError> {
        let group = self.group.split(name, color, key)?;
        Ok(Arc::new(Self::connect(group, name, false, self.signatures.is_some())?))
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
        compute: ComputeStream,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        self.check_exchange(operation, plan)?;
        self.start_on_device(operation, compute, || self.enqueue_exchange(operation, Buffers { send, recv }, plan))
    }

    unsafe fn start_device_all_gather(
        &self,
        operation: Operation,
        send: u64,
        recv: u64,
        len: usize,
        compute: ComputeStream,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        let gather = operation.by(Collective::AllGather { bytes: len });
        self.check_signature(gather, &ExchangePlan::default())?;
        self.start_on_device(operation, compute, || {
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
        compute: ComputeStream,
    ) -> Result<Box<dyn PendingDeviceExchange>, CommError> {
        let op = match op {
            ReduceOp::Sum => ncclRedOp_t::ncclSum,
            ReduceOp::Mean => ncclRedOp_t::ncclAvg,
            ReduceOp::Max => ncclRedOp_t::ncclMax,
        };
        self.start_on_device(operation, compute, || {
            self.enqueue(operation, |raw, stream| {
                let (from, to, kind) = (address as *const c_void, address as *mut c_void, ncclDataType_t::ncclFloat32);
                // SAFETY: the caller vouches for the numbers; NCCL reduces in place where both addresses are equal.
                unsafe { result::all_reduce(from, to, len, kind, op, raw, stream) }.map(drop)
            })
        })
    }
}
