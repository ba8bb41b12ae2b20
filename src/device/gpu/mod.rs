//! NVIDIA GPUs: a plan's arena in device memory, its steps as kernel launches prepared once.
//!
//! A [`Gpu`] has one of two ends: the driver of a real GPU (feature `cuda`) or the emulator, which runs
//! the same kernels on the CPU for tests (feature `emulator`). Everything above the ends is shared, so
//! that the emulator tests launch shapes and arguments as well as kernels. A third end runs nothing and only tells
//! what would be launched.
//!
//! - [`launch`]: how an operation says what to launch; one typed wrapper per kernel;
//! - [`Session`]: memory and launches of one plan, and their replay;
//! - [`Graph`]: a captured replay, one call to the driver for the whole step.
//!
//! Work is queued on one stream, in order. Nothing waits for it but [`Session::read`], [`Gpu::synchronize`]
//! and, for what was queued before the fetch alone, [`crate::device::Session::fetched`]. What is to be read while work goes
//! on is copied within the device ([`crate::device::Aside`]) and read on a stream of its own.

mod copies;
#[cfg(feature = "cuda")]
pub(crate) mod driver;
#[cfg(feature = "emulator")]
mod emulated;
pub mod launch;
mod outline;
mod session;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(any(feature = "cuda", feature = "emulator"))]
use super::FETCH;
use crate::error::{Error, Result};

pub(crate) use session::Hold;
pub use session::{Graph, Session, Timed};

/// What a kernel runs on: the driver's stream or the emulator. Handles are the end's own numbers; the
/// types above give them owners.
pub(crate) trait End: Send + Sync {
    /// What it is.
    fn description(&self) -> Description;
    /// Device memory of `bytes` (above 0), aligned to 256.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    fn free(&self, address: u64);
    /// What [`Memory`] holds of it.
    fn allocated(&self) -> &Allocated;
    /// Fills memory with zeros.
    fn clear(&self, address: u64, bytes: usize) -> Result<()>;
    /// Copies to the device behind the work queued so far; `from` may change when this returns.
    fn write(&self, address: u64, from: &[u8]) -> Result<()>;
    /// Copies to the host once the work queued so far is done.
    fn read(&self, address: u64, to: &mut [u8]) -> Result<()>;
    /// As [`End::read`], for another thread than the one that queues: what is queued meanwhile does not wait for it.
    fn read_aside(&self, address: u64, to: &mut [u8]) -> Result<()>;
    /// Copies within the device, behind the work queued so far.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    /// Queues a copy of at most [`FETCH`] bytes to the host's memory behind the work queued so far, and returns
    /// the number by which [`End::fetched`] waits for it.
    fn fetch(&self, address: u64, bytes: usize) -> Result<u64>;
    /// The bytes of a fetch, once they are there: later work is not waited for.
    fn fetched(&self, fetch: u64, to: &mut [u8]) -> Result<()>;
    fn free_fetch(&self, fetch: u64);
    /// Finds (and, where need be, compiles) a kernel.
    fn function(&self, name: &str) -> Result<Function>;
    /// Queues a launch.
    ///
    /// # Safety
    /// `arguments` hold the kernel's parameters, each at the beginning of its eight bytes; the memory
    /// that the kernel touches is allocated.
    unsafe fn launch(
        &self,
        function: &Function,
        grid: &launch::Grid,
        arguments: &[u64],
    ) -> Result<()>;
    /// Blocks of that launch that fit on one multiprocessor; 0 where the end has none.
    fn occupancy(&self, function: &Function, grid: &launch::Grid) -> Result<u32>;
    /// Waits for the work queued so far.
    fn synchronize(&self) -> Result<()>;
    /// A point in the queue whose time can be taken.
    fn event(&self) -> Result<u64>;
    fn record(&self, event: u64) -> Result<()>;
    /// Milliseconds between two events that lie behind.
    fn elapsed(&self, from: u64, to: u64) -> Result<f32>;
    fn free_event(&self, event: u64);
    /// Runs `queue`, whose launches are not executed but become a graph. Until it is done, whatever else
    /// needs the queue is refused, launches of other threads too; `free` takes effect afterwards.
    fn capture(&self, queue: &mut dyn FnMut() -> Result<()>) -> Result<u64>;
    fn replay(&self, graph: u64) -> Result<()>;
    fn free_graph(&self, graph: u64);
    /// A named stretch of the timeline that profilers show (NVTX), where there is one.
    fn range_push(&self, name: &str);
    fn range_pop(&self);
    /// Chooses the order in which threads run, where there is a choice.
    fn reorder(&self, _seed: u64) {}
    /// What was asked of it so far, where that is counted.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// How often the host has asked the emulator for something: what a GPU takes some microseconds for each, and those that
/// wait for it many more.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Traffic {
    /// Launches one by one.
    pub launches: usize,
    /// Replays of graphs.
    pub replays: usize,
    /// Copies from the host.
    pub writes: usize,
    /// Copies within the device.
    pub copies: usize,
    /// Copies to the host that what is queued next need not wait for, but may soon ([`Session::fetch`]).
    ///
    /// [`Session::fetch`]: crate::device::Session::fetch
    pub fetches: usize,
    /// Copies to the host that wait for all that was queued.
    pub reads: usize,
    /// The same beside the work that is queued meanwhile ([`Memory::read_aside`]).
    pub reads_aside: usize,
    /// Waits for all that was queued.
    pub waits: usize,
}

/// Device memory in use.
#[derive(Default)]
pub(crate) struct Allocated {
    bytes: AtomicUsize,
    /// Pieces that were ever handed out.
    pieces: AtomicUsize,
}

/// What a GPU is, as far as times can be predicted from it.
#[derive(Clone, PartialEq, Debug, Default, serde::Serialize)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Compute capability, `(9, 0)` for Hopper; `(0, 0)` for the emulator.
    pub capability: (u32, u32),
    /// The driver's CUDA version, `(13, 0)`.
    pub driver: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of device memory.
    pub memory: u64,
    /// Bytes of the second-level cache.
    pub l2: u64,
    /// Registers of one multiprocessor.
    pub registers: u32,
    /// Shared memory of one multiprocessor, bytes.
    pub shared: u32,
    /// Threads that one multiprocessor keeps at a time.
    pub threads: u32,
    /// Highest clock of the multiprocessors, in kHz.
    pub clock: u32,
}

/// A kernel of a GPU.
#[derive(Clone, PartialEq, Debug)]
pub struct Function {
    /// The end's own number for it.
    pub(crate) handle: u64,
    /// Its name.
    pub name: Arc<str>,
    /// Bytes of each parameter, where the end knows them.
    pub(crate) parameters: Option<Vec<u32>>,
    /// Registers of one thread; 0 where the end knows no registers.
    pub registers: u32,
    /// Statically declared shared memory of a block, bytes.
    pub shared: u32,
    /// Local memory of a thread (spills and stack), bytes.
    pub local: u32,
    /// Most threads of a block; 0 where the end does not know.
    pub max_threads: u32,
}

/// Blocks from which a convolution goes by `wgmma` where that is asked for: two on each multiprocessor, about.
#[cfg(any(feature = "cuda", feature = "emulator"))]
const WGMMA_BLOCKS: usize = 256;

/// A device that runs kernels, and the number of blocks from which its convolutions go by `wgmma`, if they do. Clones
/// are the same device and stream.
#[derive(Clone)]
pub struct Gpu(Arc<dyn End>, Option<usize>);

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Gpu")
            .field(&self.0.description().name)
            .finish()
    }
}

impl Gpu {
    /// A device with what the environment asks for.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn new(end: impl End + 'static) -> Result<Self> {
        let gpu = Self(Arc::new(end), None);
        let asked = std::env::var_os("ECHOGRAD_WGMMA").unwrap_or_default();
        match asked.to_str() {
            Some("" | "0") => Ok(gpu),
            Some("1") => gpu.with_wgmma(WGMMA_BLOCKS),
            _ => Err(Error::argument(
                "ECHOGRAD_WGMMA",
                format!("expected 0 or 1, found {asked:?}"),
            )),
        }
    }

    /// The same device, on which products of convolutions in bf16 go by the instruction `wgmma` where they make at
    /// least `blocks` blocks, of tiles that it has. Their sums may differ from those of `mma.sync` in the last bits.
    ///
    /// # Errors
    /// [`crate::Error::Argument`], of `ECHOGRAD_WGMMA`, if the device has no such instruction, or this build no
    /// kernels with it.
    pub fn with_wgmma(self, blocks: usize) -> Result<Self> {
        match self.lacks_wgmma() {
            None => Ok(Self(self.0, Some(blocks))),
            Some(problem) => Err(Error::argument("ECHOGRAD_WGMMA", problem)),
        }
    }

    /// The number of [`Gpu::with_wgmma`].
    pub(crate) fn wgmma(&self) -> Option<usize> {
        self.1
    }

    /// Why there is no `wgmma`, if there is none: it is an instruction of compute capability 9.0 alone, which the
    /// emulator has too.
    pub(crate) fn lacks_wgmma(&self) -> Option<String> {
        let Description {
            name, capability, ..
        } = self.description();
        if ![(9, 0), (0, 0)].contains(&capability) {
            let (major, minor) = capability;
            return Some(format!(
                "expected a GPU of compute capability 9.0, found {name} of {major}.{minor}"
            ));
        }
        #[cfg(feature = "cuda")]
        if let Some(compiler) = crate::device::code::COMPILER
            && capability == (9, 0)
            && !compiler.architectures.contains(&"90a")
        {
            let known = compiler.architectures.join(", sm_");
            return Some(format!(
                "expected kernels for sm_90a in this build, found those for sm_{known}"
            ));
        }
        None
    }

    /// Its name, and whether convolutions go by `wgmma`: what results depend on.
    pub fn name(&self) -> String {
        let name = self.description().name;
        match self.wgmma() {
            None => name,
            Some(_) => format!("{name} with wgmma"),
        }
    }

    /// The emulator.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if this build has none, [`crate::Error::Argument`] if `ECHOGRAD_WGMMA` is neither 0
    /// nor 1.
    pub fn emulator() -> Result<Self> {
        #[cfg(feature = "emulator")]
        {
            crate::device::emulator::available()?;
            Self::new(emulated::Emulator::default())
        }
        #[cfg(not(feature = "emulator"))]
        Err(Error::device(
            "emulator",
            "not in this build, which lacks the feature `emulator`",
        ))
    }

    /// The NVIDIA GPU that `ECHOGRAD_GPU` names by its number, or the first.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if this build serves none, if there is no driver or GPU or an old one, or if
    /// it is in use; [`crate::Error::Argument`] if there is no GPU of that number, or for `ECHOGRAD_WGMMA` as
    /// [`Gpu::with_wgmma`] and [`Gpu::emulator`].
    pub fn cuda() -> Result<Self> {
        #[cfg(feature = "cuda")]
        return Self::new(driver::Driver::open()?);
        #[cfg(not(feature = "cuda"))]
        Err(Error::device(
            "cuda",
            "not in this build, which lacks the feature `cuda`",
        ))
    }

    /// No device at all: sessions on it can be made, to see what they would launch, but not run.
    pub(crate) fn outline() -> Self {
        Self(Arc::new(outline::Outline::default()), None)
    }

    /// What it is.
    pub fn description(&self) -> Description {
        self.0.description()
    }

    /// Blocks of a launch that fit on one multiprocessor at a time; 0 on the emulator.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if its blocks fit on none.
    pub fn occupancy(&self, launch: &launch::Launch) -> Result<u32> {
        self.0.occupancy(&launch.function, &launch.grid)
    }

    /// Loads a kernel, compiling it if this build has sources: whether kernels can be had at all.
    ///
    /// # Errors
    /// [`crate::Error::Device`] with the reason if not.
    pub fn ready(&self) -> Result<()> {
        self.0.function("copy_f32").map(|_| ())
    }

    /// Whether activations can be stored as bf16, which takes compute capability 8.0.
    pub fn has_bf16(&self) -> bool {
        let (major, _) = self.0.description().capability;
        major == 0 || major >= 8
    }

    /// Has the emulator draw the order of its threads from `seed` from now on. A GPU has an order of
    /// its own.
    pub fn reorder(&self, seed: u64) {
        self.0.reorder(seed);
    }

    /// Waits for the work queued so far.
    ///
    /// # Errors
    /// [`crate::Error::Device`] with whatever a kernel did wrong since the last wait.
    pub fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }

    /// Runs `f` inside a named range of the profiler's timeline.
    pub fn range<R>(&self, name: &str, f: impl FnOnce() -> R) -> R {
        self.0.range_push(name);
        let result = f();
        self.0.range_pop();
        result
    }

    /// Queues a kernel `times` times and returns the milliseconds that one of them took.
    ///
    /// # Errors
    /// As [`launch::Launches::launch`], or [`crate::Error::Device`] if the kernel failed.
    ///
    /// # Safety
    /// The pointers among the arguments point to as much memory as the kernel touches.
    pub(crate) unsafe fn time<A: launch::Arguments>(
        &self,
        grid: launch::Grid,
        arguments: &A,
        times: u32,
    ) -> Result<f64> {
        let launch = launch::prepare(self, 0, grid, arguments)?;
        let (begin, end) = (Event::new(self)?, Event::new(self)?);
        begin.record()?;
        for _ in 0..times {
            if let Some(launch) = &launch {
                // SAFETY: as this function's contract.
                unsafe {
                    self.0
                        .launch(&launch.function, &launch.grid, &launch.arguments)
                }?;
            }
        }
        end.record()?;
        self.synchronize()?;
        Ok(f64::from(begin.until(&end)?) / f64::from(times))
    }

    /// Bytes of device memory in use through this value and its clones.
    pub fn allocated(&self) -> usize {
        self.0.allocated().bytes.load(Ordering::Relaxed)
    }

    /// How often device memory was allocated through this value and its clones, what was given back included.
    pub fn allocations(&self) -> usize {
        self.0.allocated().pieces.load(Ordering::Relaxed)
    }

    /// What was asked of it so far, through this value and its clones; zeros of a GPU, where nobody counts.
    pub fn traffic(&self) -> Traffic {
        self.0.traffic()
    }

    /// Queues a kernel behind the work queued so far.
    ///
    /// # Errors
    /// As [`launch::Launches::launch`].
    ///
    /// # Safety
    /// The pointers among the arguments point to as much memory of this device as the kernel touches.
    pub(crate) unsafe fn queue<A: launch::Arguments>(
        &self,
        grid: launch::Grid,
        arguments: &A,
    ) -> Result<()> {
        match launch::prepare(self, 0, grid, arguments)? {
            // SAFETY: as this function's contract.
            Some(launch) => unsafe {
                self.0
                    .launch(&launch.function, &launch.grid, &launch.arguments)
            },
            None => Ok(()),
        }
    }

    /// Whether both are the same device, whose kernels can use each other's memory.
    pub(crate) fn is(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Device memory with zeros in it.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is not as much.
    pub fn memory(&self, bytes: usize) -> Result<Memory> {
        // No device hands out empty pieces.
        let size = bytes.max(1);
        let memory = Memory {
            address: self.0.allocate(size)?,
            bytes,
            gpu: self.clone(),
        };
        let allocated = self.0.allocated();
        allocated.bytes.fetch_add(bytes, Ordering::Relaxed);
        allocated.pieces.fetch_add(1, Ordering::Relaxed);
        self.0.clear(memory.address, size)?;
        Ok(memory)
    }
}

/// A piece of device memory.
#[derive(Debug)]
pub struct Memory {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its beginning, as a kernel's argument.
    pub(crate) fn pointer(&self) -> launch::Pointer {
        launch::Pointer::to(self.address, false)
    }

    /// Fills it with zeros, behind the work queued so far.
    ///
    /// # Errors
    /// As [`Memory::write`].
    pub fn clear(&self) -> Result<()> {
        self.gpu.0.clear(self.address, self.bytes)
    }

    /// Writes `from` at `offset` bytes, behind the work queued so far.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses, or an earlier kernel failed.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.within(offset, from.len());
        if from.is_empty() {
            return Ok(());
        }
        self.gpu.0.write(self.address + offset as u64, from)
    }

    /// Reads from `offset` bytes on, once the work queued so far is done.
    ///
    /// # Errors
    /// As [`Memory::write`].
    ///
    /// # Panics
    /// If there is not as much.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        self.within(offset, to.len());
        if to.is_empty() {
            return Ok(());
        }
        self.gpu.0.read(self.address + offset as u64, to)
    }

    /// Reads all of it, once the work queued so far is done, for another thread than the one that queues: what is queued
    /// meanwhile does not wait for it.
    ///
    /// # Errors
    /// As [`Memory::write`].
    ///
    /// # Panics
    /// If `to` is of another size.
    pub fn read_aside(&self, to: &mut [u8]) -> Result<()> {
        assert_eq!(to.len(), self.bytes, "bytes to be read");
        if to.is_empty() {
            return Ok(());
        }
        self.gpu.0.read_aside(self.address, to)
    }

    /// Copies the beginning of it over all of `to`, memory of the same device, behind the work queued so far.
    ///
    /// # Errors
    /// As [`Memory::write`].
    ///
    /// # Panics
    /// If there is not as much.
    pub(crate) fn copy(&self, to: &Memory) -> Result<()> {
        self.within(0, to.bytes);
        if to.bytes == 0 {
            return Ok(());
        }
        self.gpu.0.copy(self.address, to.address, to.bytes)
    }

    fn within(&self, offset: usize, len: usize) {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{len} bytes at {offset} of {}", self.bytes);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.0.free(self.address);
        let allocated = self.gpu.0.allocated();
        allocated.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// An event of the queue.
struct Event<'a> {
    gpu: &'a Gpu,
    handle: u64,
}

impl<'a> Event<'a> {
    fn new(gpu: &'a Gpu) -> Result<Self> {
        let handle = gpu.0.event()?;
        Ok(Self { gpu, handle })
    }

    fn record(&self) -> Result<()> {
        self.gpu.0.record(self.handle)
    }

    /// Milliseconds from this event to a later one.
    fn until(&self, later: &Event<'_>) -> Result<f32> {
        self.gpu.0.elapsed(self.handle, later.handle)
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        self.gpu.0.free_event(self.handle);
    }
}
