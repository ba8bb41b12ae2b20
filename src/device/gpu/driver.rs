//! The NVIDIA driver as a device: one context, one stream, and another for what is read beside its work.
//!
//! It stands on the driver's own functions, since what the layers above them do (panics where a library
//! or symbol is missing, events around every access, buffers that belong to types) is in the way here.
//!
//! - Memory comes from `cuMemAlloc`: a session allocates its arena once and keeps it, so that a pool
//!   would only hold on to what nobody uses.
//! - Copies go through pieces of pinned memory in turn, so that the copying of one overlaps the filling of the
//!   next, and the caller's memory is free as soon as a call returns. There are enough of them for the inputs of
//!   two large training steps: those of the next are on their way before the one that runs is done.
//! - A kernel's failure shows at whatever waits for it, and ends all work of the process on the GPU; from
//!   then on every call returns the first failure.
//! - While a thread captures a graph, the stream takes that thread's launches and nothing else: other
//!   calls are refused, and memory that is given back is freed when the capture has ended.

pub(crate) mod compile;
pub(crate) mod library;
mod nvtx;

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::thread::{self, ThreadId};

use cudarc::driver::sys;
use sys::CUfunction_attribute as Attribute;
use sys::CUresult as Answer;

use self::compile::Nvrtc;
use self::library::{Refusal, check, problem};
use super::launch::Grid;
use super::{Allocated, Description, End, FETCH, Function};
use crate::device::code::{self, COMPILER, Code, Module};
use crate::error::{Error, Result};

/// Bytes of a piece of pinned memory: large enough that a copy's own cost does not count.
const PIECE: usize = 4 << 20;

/// Pieces in all, made when they are first used.
const PIECES: usize = 16;

/// Events that only order work.
const UNTIMED: u32 = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;

/// Shared memory of a block that needs no leave.
const SHARED: u32 = 48 << 10;

type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> Answer;
type Parameter = unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> c_int;

pub(super) struct Driver {
    description: Description,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// For reading beside the work of the other, and where in that it begins.
    aside: sys::CUstream,
    begin: sys::CUevent,
    /// Bytes of shared memory that a block can have.
    shared_per_block: u32,
    elapsed: Elapsed,
    /// Drivers before CUDA 12.4 tell no parameters.
    parameter: Option<Parameter>,
    allocated: Allocated,
    staging: Mutex<Staging>,
    /// For reading aside, which takes its time.
    staging_aside: Mutex<Staging>,
    fetches: Mutex<Fetches>,
    kernels: Mutex<Kernels>,
    /// The thread that captures a graph. Calls hold it as long as they use the stream, so that a capture
    /// begins between them.
    capturing: RwLock<Option<ThreadId>>,
    /// Memory that was given back during a capture.
    given_back: Mutex<Vec<u64>>,
    /// Whether a launch returns when the kernel is done, and with its error.
    blocking: bool,
    last: Mutex<Option<Arc<str>>>,
    /// What the first kernel that failed did.
    failure: OnceLock<String>,
}

// SAFETY: the driver's handles belong to no thread; each call makes the context current first.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver's functions may be called by several threads.
unsafe impl Sync for Driver {}

/// Pieces of pinned memory, used in turn.
struct Staging {
    pieces: [Piece; PIECES],
    /// The piece in use, and how many of its bytes are taken.
    at: usize,
    taken: usize,
}

struct Piece {
    host: *mut u8,
    /// Behind the last copy from or to it.
    copied: sys::CUevent,
}

/// Pieces of pinned memory for copies that are waited for one by one.
#[derive(Default)]
struct Fetches {
    pieces: Vec<Piece>,
    /// Those that no fetch holds.
    free: Vec<usize>,
}

/// What was loaded so far.
#[derive(Default)]
struct Kernels {
    nvrtc: Option<(Nvrtc, String)>,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<String, Function>,
    /// Shared memory that a function has leave for, where that is more than usual.
    shared: HashMap<u64, u32>,
}

/// Leave to use the stream; what it holds is `Driver::capturing`.
type Turn<'a> = RwLockReadGuard<'a, Option<ThreadId>>;

fn captured(doing: &str) -> Error {
    problem(format!("{doing}: not while a graph is captured"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes as MiB, none of them lost.
fn mib(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20)
}

impl Driver {
    /// Opens the GPU that `ECHOGRAD_GPU` names, or the first.
    ///
    /// # Errors
    /// As [`library::choose`]; [`Error::Device`] if somebody else has the GPU for himself or its memory
    /// is full.
    pub(super) fn open() -> Result<Self> {
        let gpu = library::choose()?;
        let name = gpu.description.name.clone();
        let fails = |refusal: Refusal| problem(format!("{name} cannot be opened: {refusal}"));
        // SAFETY: `library::load` found it; the type is that of the driver before CUDA 12.8, which
        // later ones keep.
        let elapsed = unsafe { library::symbol::<Elapsed>("cuEventElapsedTime") };
        let elapsed =
            elapsed.ok_or_else(|| problem("the driver's library has no cuEventElapsedTime"))?;
        let mut context = ptr::null_mut();
        // SAFETY: the library is started; the device is one of its own.
        unsafe { check(sys::cuDevicePrimaryCtxRetain(&raw mut context, gpu.device)) }
            .map_err(fails)?;
        // From here on its own `drop` releases what there is.
        let mut driver = Self {
            description: gpu.description,
            device: gpu.device,
            context,
            stream: ptr::null_mut(),
            aside: ptr::null_mut(),
            begin: ptr::null_mut(),
            shared_per_block: gpu.shared_per_block,
            elapsed,
            // SAFETY: the type is that of the documentation.
            parameter: unsafe { library::symbol("cuFuncGetParamInfo") },
            allocated: Allocated::default(),
            staging: Mutex::new(Staging::new()),
            staging_aside: Mutex::new(Staging::new()),
            fetches: Mutex::default(),
            kernels: Mutex::default(),
            capturing: RwLock::default(),
            given_back: Mutex::default(),
            blocking: std::env::var("CUDA_LAUNCH_BLOCKING").is_ok_and(|value| value == "1"),
            last: Mutex::default(),
            failure: OnceLock::new(),
        };
        let stream = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is retained; each call writes to a variable of its type.
        unsafe {
            check(sys::cuCtxSetCurrent(driver.context)).map_err(fails)?;
            check(sys::cuStreamCreate(&raw mut driver.stream, stream)).map_err(fails)?;
            check(sys::cuStreamCreate(&raw mut driver.aside, stream)).map_err(fails)?;
            check(sys::cuEventCreate(&raw mut driver.begin, UNTIMED)).map_err(fails)?;
        }
        Ok(driver)
    }

    /// Makes the context current; as long as the guard lives, no capture begins.
    fn enter(&self, doing: &str) -> Result<Turn<'_>> {
        let turn = self.turn();
        if turn.is_some() {
            return Err(captured(doing));
        }
        self.bind(doing)?;
        Ok(turn)
    }

    /// As [`Driver::enter`], for what a graph can hold: the thread that captures may do it too.
    fn enter_or_capture(&self, doing: &str) -> Result<Turn<'_>> {
        let turn = self.turn();
        if turn.is_some_and(|capturing| capturing != thread::current().id()) {
            return Err(captured(doing));
        }
        self.bind(doing)?;
        Ok(turn)
    }

    fn turn(&self) -> Turn<'_> {
        let guard = self.capturing.read();
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// The same for whoever begins or ends a capture: nobody else uses the stream.
    fn whole_turn(&self) -> RwLockWriteGuard<'_, Option<ThreadId>> {
        let guard = self.capturing.write();
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    fn bind(&self, doing: &str) -> Result<()> {
        if let Some(failure) = self.failure.get() {
            return Err(problem(failure));
        }
        // SAFETY: retained until `drop`.
        self.call(doing, unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Frees memory once the work that uses it is done. The stream is not captured.
    fn release(&self, addresses: &[u64]) {
        // Nobody could do anything about a failure; after a kernel's, all of these fail.
        // SAFETY: what `allocate` returned; the work that uses it is waited for.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuStreamSynchronize(self.stream);
            for &address in addresses {
                let _ = sys::cuMemFree_v2(address);
            }
        }
    }

    /// An answer of the driver as a result; `doing` says what was asked of it.
    fn call(&self, doing: &str, answer: Answer) -> Result<()> {
        check(answer).map_err(|refusal| self.error(doing, refusal))
    }

    fn error(&self, doing: &str, refusal: Refusal) -> Error {
        if !refusal.is_fatal() {
            // What is refused after a failure, in a call that was under way, is its consequence.
            let failure = self.failure.get().cloned();
            return problem(failure.unwrap_or_else(|| format!("{doing}: {refusal}")));
        }
        let text = self.failure.get_or_init(|| match &*lock(&self.last) {
            Some(last) if self.blocking => format!("the kernel {last} failed: {refusal}"),
            Some(last) => format!(
                "a kernel failed, {last} or an earlier one: {refusal}; CUDA_LAUNCH_BLOCKING=1 tells which"
            ),
            None => format!("the GPU failed: {refusal}"),
        });
        problem(text)
    }

    /// Copies to the host on a stream, through its own pieces, of which the one is emptied while the next is filled.
    fn copy_out(
        &self,
        stream: sys::CUstream,
        staging: &mut Staging,
        address: u64,
        to: &mut [u8],
    ) -> Result<()> {
        let mut pending: Option<(usize, &mut [u8])> = None;
        for (from, to) in (address..).step_by(PIECE).zip(to.chunks_mut(PIECE)) {
            // A whole piece, whose beginning `deliver` reads.
            let (at, host) = staging.take(self, PIECE, READING)?;
            // SAFETY: as in `write`.
            let answer = unsafe { sys::cuMemcpyDtoHAsync_v2(host.cast(), from, to.len(), stream) };
            self.call(READING, answer)?;
            staging.record(self, stream, at, READING)?;
            if let Some((at, to)) = pending.replace((at, to)) {
                staging.deliver(self, at, to)?;
            }
        }
        match pending {
            Some((at, to)) => staging.deliver(self, at, to),
            None => Ok(()),
        }
    }

    fn load(&self, kernels: &mut Kernels, module: &'static Module) -> Result<sys::CUmodule> {
        if let Some(&loaded) = kernels.modules.get(module.name) {
            return Ok(loaded);
        }
        let code = match module.code {
            Code::Fatbin(code) => aligned(code),
            Code::Source(text) => {
                let (nvrtc, architecture) = match &mut kernels.nvrtc {
                    Some(found) => found,
                    none => {
                        let nvrtc = Nvrtc::find(Some(self.description.driver))?;
                        let architecture = nvrtc.architecture(self.description.capability)?;
                        none.insert((nvrtc, architecture))
                    }
                };
                let source = compile::Source {
                    name: module.name,
                    text,
                };
                let cache = compile::cache();
                aligned(&compile::compiled(
                    nvrtc,
                    source,
                    architecture,
                    cache.as_deref(),
                )?)
            }
        };
        let mut loaded = ptr::null_mut();
        // SAFETY: a fatbin, cubin or PTX, which say themselves how long they are; PTX ends with a zero.
        let answer = unsafe { sys::cuModuleLoadData(&raw mut loaded, code.as_ptr().cast()) };
        check(answer).map_err(|refusal| self.not_loaded(module, refusal))?;
        kernels.modules.insert(module.name, loaded);
        Ok(loaded)
    }

    fn not_loaded(&self, module: &Module, refusal: Refusal) -> Error {
        let (major, minor) = self.description.capability;
        let foreign = [
            Answer::CUDA_ERROR_NO_BINARY_FOR_GPU,
            Answer::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
            Answer::CUDA_ERROR_INVALID_IMAGE,
        ];
        match COMPILER {
            Some(compiler) if foreign.into_iter().any(|answer| refusal.is(answer)) => {
                problem(format!(
                    "the kernels in this build are for sm_{} and, as PTX of CUDA {}.{}, for what follows \
                     sm_{}; the driver can run none of them on {} (sm_{major}{minor}): {refusal}",
                    compiler.architectures.join(", sm_"),
                    compiler.version.0,
                    compiler.version.1,
                    compiler.ptx,
                    self.description.name,
                ))
            }
            _ => self.error(
                &format!("loading the kernels of {}.cu", module.name),
                refusal,
            ),
        }
    }

    /// Finds a kernel in the modules, loading as many of them as it takes.
    fn find(&self, kernels: &mut Kernels, name: &str) -> Result<sys::CUfunction> {
        let symbol = CString::new(name).expect("a kernel's name");
        for module in code::candidates(name) {
            let module = self.load(kernels, module)?;
            let mut function = ptr::null_mut();
            // SAFETY: the module is loaded.
            let answer =
                unsafe { sys::cuModuleGetFunction(&raw mut function, module, symbol.as_ptr()) };
            match check(answer) {
                Ok(()) => return Ok(function),
                Err(refusal) if refusal.is(Answer::CUDA_ERROR_NOT_FOUND) => {}
                Err(refusal) => return Err(self.error(&format!("loading {name}"), refusal)),
            }
        }
        Err(Error::device(name, "no kernel of this name in this build"))
    }

    /// Bytes of each parameter.
    fn parameters(&self, function: sys::CUfunction) -> Option<Vec<u32>> {
        let ask = self.parameter?;
        let mut sizes = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the function is loaded; two integers are written.
            let answer = unsafe { ask(function, sizes.len(), &raw mut offset, &raw mut size) };
            if answer == Answer::CUDA_ERROR_INVALID_VALUE as c_int {
                return Some(sizes);
            }
            if answer != 0 {
                return None;
            }
            sizes.push(size as u32);
        }
    }

    /// Gets leave for more shared memory than usual.
    fn permit(&self, function: &Function, shared: u32) -> Result<()> {
        let whole = shared.saturating_add(function.shared);
        if whole <= SHARED {
            return Ok(());
        }
        if whole > self.shared_per_block {
            return Err(Error::device(
                &*function.name,
                format!(
                    "wants {whole} bytes of shared memory for a block, a block of {} can have {}",
                    self.description.name, self.shared_per_block
                ),
            ));
        }
        let mut kernels = lock(&self.kernels);
        let permitted = kernels.shared.entry(function.handle).or_insert(0);
        if shared > *permitted {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let answer =
                unsafe { sys::cuFuncSetAttribute(raw(function), attribute, shared as c_int) };
            self.call(&function.name, answer)?;
            *permitted = shared;
        }
        Ok(())
    }
}

/// The handle of a function that this end made.
fn raw(function: &Function) -> sys::CUfunction {
    function.handle as sys::CUfunction
}

/// A copy at an address that is a multiple of 8, as the driver's own loaders give it; a zero follows.
fn aligned(code: &[u8]) -> Vec<u64> {
    let mut copy = vec![0; code.len() / 8 + 1];
    bytemuck::cast_slice_mut(&mut copy)[..code.len()].copy_from_slice(code);
    copy
}

impl Piece {
    fn none() -> Self {
        Self {
            host: ptr::null_mut(),
            copied: ptr::null_mut(),
        }
    }

    /// Gives it memory and an event. The context is current.
    fn make(&mut self, bytes: usize) -> Result<(), Refusal> {
        let host: *mut *mut u8 = &raw mut self.host;
        // SAFETY: each call writes to a variable of its type. Pinned memory with flags 0 is cached, and so can
        // be read as well as written.
        unsafe {
            if self.copied.is_null() {
                check(sys::cuEventCreate(&raw mut self.copied, UNTIMED))?;
            }
            check(sys::cuMemHostAlloc(host.cast(), bytes, 0))
        }
    }

    /// Releases what was made. The context is current and nothing uses it any more.
    fn release(&self) {
        // Errors are nobody's business, as for memory.
        // SAFETY: what `make` made, once, or null.
        unsafe {
            if !self.copied.is_null() {
                let _ = sys::cuEventDestroy_v2(self.copied);
            }
            if !self.host.is_null() {
                let _ = sys::cuMemFreeHost(self.host.cast());
            }
        }
    }
}

impl Staging {
    /// Pieces without memory yet.
    fn new() -> Self {
        Self {
            pieces: [(); PIECES].map(|()| Piece::none()),
            at: PIECES - 1,
            taken: PIECE,
        }
    }

    /// Room for `bytes`, at most a piece: which piece, and where. The next piece is taken once its last copy is
    /// done.
    fn take(&mut self, driver: &Driver, bytes: usize, doing: &str) -> Result<(usize, *mut u8)> {
        if self.taken + bytes > PIECE {
            let next = (self.at + 1) % PIECES;
            if self.pieces[next].host.is_null() {
                let made = self.pieces[next].make(PIECE);
                made.map_err(|refusal| driver.error(doing, refusal))?;
            }
            self.wait(driver, next, doing)?;
            (self.at, self.taken) = (next, 0);
        }
        // SAFETY: inside the piece.
        let host = unsafe { self.pieces[self.at].host.add(self.taken) };
        self.taken = (self.taken + bytes).next_multiple_of(256);
        Ok((self.at, host))
    }

    fn wait(&self, driver: &Driver, at: usize, doing: &str) -> Result<()> {
        // SAFETY: an event of this context; one that was never recorded is done.
        driver.call(doing, unsafe {
            sys::cuEventSynchronize(self.pieces[at].copied)
        })
    }

    fn record(&self, driver: &Driver, stream: sys::CUstream, at: usize, doing: &str) -> Result<()> {
        // SAFETY: an event and a stream of this context.
        let answer = unsafe { sys::cuEventRecord(self.pieces[at].copied, stream) };
        driver.call(doing, answer)
    }

    /// Hands over what was copied to a piece.
    fn deliver(&self, driver: &Driver, at: usize, to: &mut [u8]) -> Result<()> {
        self.wait(driver, at, READING)?;
        // SAFETY: the piece is PIECE bytes long, `to` no longer than that, and the copy is done.
        unsafe { ptr::copy_nonoverlapping(self.pieces[at].host, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}

const READING: &str = "reading from the GPU";
const WRITING: &str = "writing to the GPU";

impl End for Driver {
    fn description(&self) -> Description {
        self.description.clone()
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let doing = "allocating memory";
        let _turn = self.enter(doing)?;
        let mut address = 0;
        // SAFETY: an address to be written.
        match check(unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }) {
            Ok(()) => Ok(address),
            Err(refusal) if refusal.is(Answer::CUDA_ERROR_OUT_OF_MEMORY) => {
                let (mut free, mut total) = (0, 0);
                // SAFETY: two sizes to be written.
                let known = unsafe { check(sys::cuMemGetInfo_v2(&raw mut free, &raw mut total)) };
                let left = match known {
                    Ok(()) => format!("{} MiB free of {} MiB", free >> 20, total >> 20),
                    Err(_) => format!("{} MiB in all", self.description.memory >> 20),
                };
                Err(problem(format!(
                    "{} is out of memory: {} MiB wanted, {left}",
                    self.description.name,
                    mib(bytes)
                )))
            }
            Err(refusal) => Err(self.error(doing, refusal)),
        }
    }

    fn free(&self, address: u64) {
        match *self.turn() {
            Some(_) => lock(&self.given_back).push(address),
            None => self.release(&[address]),
        }
    }

    fn allocated(&self) -> &Allocated {
        &self.allocated
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        let doing = "clearing memory of the GPU";
        let _turn = self.enter(doing)?;
        // SAFETY: memory of this end, as the trait demands.
        self.call(doing, unsafe {
            sys::cuMemsetD8Async(address, 0, bytes, self.stream)
        })
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<()> {
        let _turn = self.enter(WRITING)?;
        let mut staging = lock(&self.staging);
        for (to, from) in (address..).step_by(PIECE).zip(from.chunks(PIECE)) {
            let (at, host) = staging.take(self, from.len(), WRITING)?;
            // SAFETY: there are as many bytes and no copy uses them any more; the device's memory is this
            // end's.
            let answer = unsafe {
                ptr::copy_nonoverlapping(from.as_ptr(), host, from.len());
                sys::cuMemcpyHtoDAsync_v2(to, host.cast(), from.len(), self.stream)
            };
            self.call(WRITING, answer)?;
            staging.record(self, self.stream, at, WRITING)?;
        }
        Ok(())
    }

    fn read(&self, address: u64, to: &mut [u8]) -> Result<()> {
        let _turn = self.enter(READING)?;
        self.copy_out(self.stream, &mut lock(&self.staging), address, to)
    }

    fn read_aside(&self, address: u64, to: &mut [u8]) -> Result<()> {
        let mut staging = lock(&self.staging_aside);
        {
            let _turn = self.enter(READING)?;
            // SAFETY: an event and streams of this context.
            let answer = unsafe {
                match sys::cuEventRecord(self.begin, self.stream) {
                    Answer::CUDA_SUCCESS => sys::cuStreamWaitEvent(self.aside, self.begin, 0),
                    refused => refused,
                }
            };
            self.call(READING, answer)?;
        }
        // Without a turn: nobody captures this stream.
        self.copy_out(self.aside, &mut staging, address, to)
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let doing = "copying within the GPU";
        let _turn = self.enter(doing)?;
        // SAFETY: memory of this end, as the trait demands.
        self.call(doing, unsafe {
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream)
        })
    }

    fn fetch(&self, address: u64, bytes: usize) -> Result<u64> {
        assert!(bytes <= FETCH, "{bytes} bytes fetched");
        let _turn = self.enter(READING)?;
        let mut fetches = lock(&self.fetches);
        let at = match fetches.free.pop() {
            Some(at) => at,
            None => {
                let mut piece = Piece::none();
                let made = piece.make(FETCH);
                fetches.pieces.push(piece);
                made.map_err(|refusal| self.error(READING, refusal))?;
                fetches.pieces.len() - 1
            }
        };
        let piece = &fetches.pieces[at];
        // SAFETY: the piece is long enough and no copy uses it any more; the device's memory is this end's; an
        // event and a stream of this context.
        let answer = unsafe {
            match sys::cuMemcpyDtoHAsync_v2(piece.host.cast(), address, bytes, self.stream) {
                Answer::CUDA_SUCCESS => sys::cuEventRecord(piece.copied, self.stream),
                refused => refused,
            }
        };
        self.call(READING, answer)?;
        Ok(at as u64)
    }

    fn fetched(&self, fetch: u64, to: &mut [u8]) -> Result<()> {
        let _turn = self.enter(READING)?;
        let (host, copied) = {
            let piece = &lock(&self.fetches).pieces[fetch as usize];
            (piece.host, piece.copied)
        };
        // SAFETY: an event of this context; the piece stays its fetch's until `free_fetch`.
        self.call(READING, unsafe { sys::cuEventSynchronize(copied) })?;
        // SAFETY: the copy is done, of as many bytes as were fetched.
        unsafe { ptr::copy_nonoverlapping(host, to.as_mut_ptr(), to.len().min(FETCH)) };
        Ok(())
    }

    fn free_fetch(&self, fetch: u64) {
        // A copy that nobody waited for may be under way; the next into the same piece is queued behind it.
        lock(&self.fetches).free.push(fetch as usize);
    }

    fn function(&self, name: &str) -> Result<Function> {
        if let Some(found) = lock(&self.kernels).functions.get(name) {
            return Ok(found.clone());
        }
        // In the order in which `launch` locks them.
        let _turn = self.enter(name)?;
        let mut kernels = lock(&self.kernels);
        let (major, minor) = self.description.capability;
        if name.ends_with("_bf16") && (major, minor) < library::BF16 {
            let problem = format!(
                "bf16 needs compute capability {}.{}, {} has {major}.{minor}; train in f32",
                library::BF16.0,
                library::BF16.1,
                self.description.name
            );
            return Err(Error::device(name, problem));
        }
        let loaded = self.find(&mut kernels, name)?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the function is loaded.
            let answer = unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, loaded) };
            self.call(name, answer)?;
            Ok::<u32, Error>(value.max(0) as u32)
        };
        let function = Function {
            handle: loaded as u64,
            name: name.into(),
            parameters: self.parameters(loaded),
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            shared: attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            local: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            max_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        };
        kernels.functions.insert(name.to_owned(), function.clone());
        Ok(function)
    }

    unsafe fn launch(&self, function: &Function, grid: &Grid, arguments: &[u64]) -> Result<()> {
        let _turn = self.enter_or_capture(&function.name)?;
        let threads = grid.threads.iter().map(|&t| u64::from(t)).product::<u64>();
        if threads > function.max_threads.into() {
            let most = function.max_threads;
            let problem = format!("a block of {threads} threads, expected at most {most}");
            return Err(Error::device(&*function.name, problem));
        }
        self.permit(function, grid.shared)?;
        let pointers = arguments.iter().map(|a| ptr::from_ref(a).cast_mut());
        let mut pointers: Vec<*mut c_void> = pointers.map(<*mut u64>::cast).collect();
        let ([x, y, z], [bx, by, bz]) = (grid.blocks, grid.threads);
        *lock(&self.last) = Some(function.name.clone());
        // SAFETY: as this function's contract; the driver copies the arguments before it returns, each
        // from the beginning of its word, since processors with GPUs are little-endian.
        let answer = unsafe {
            sys::cuLaunchKernel(
                raw(function),
                x,
                y,
                z,
                bx,
                by,
                bz,
                grid.shared,
                self.stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.call(&format!("launching {}", function.name), answer)
    }

    fn occupancy(&self, function: &Function, grid: &Grid) -> Result<u32> {
        let doing = &*function.name;
        self.bind(doing)?;
        self.permit(function, grid.shared)?;
        let threads = grid.threads.iter().product::<u32>() as c_int;
        let (mut blocks, shared) = (0, grid.shared as usize);
        // SAFETY: the function is loaded; an integer is written.
        let answer = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                raw(function),
                threads,
                shared,
            )
        };
        self.call(doing, answer)?;
        Ok(blocks.max(0) as u32)
    }

    fn synchronize(&self) -> Result<()> {
        let doing = "waiting for the GPU";
        let _turn = self.enter(doing)?;
        // SAFETY: a stream of this context.
        self.call(doing, unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn event(&self) -> Result<u64> {
        let doing = "making an event";
        let _turn = self.enter(doing)?;
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: a handle to be written.
        self.call(doing, unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(event as u64)
    }

    fn record(&self, event: u64) -> Result<()> {
        let doing = "recording an event";
        let _turn = self.enter(doing)?;
        // SAFETY: an event that `event` made.
        let answer = unsafe { sys::cuEventRecord(event as sys::CUevent, self.stream) };
        self.call(doing, answer)
    }

    fn elapsed(&self, from: u64, to: u64) -> Result<f32> {
        let doing = "reading an event's time";
        let _turn = self.enter(doing)?;
        let mut time = 0.0;
        // SAFETY: events that `event` made; a float to be written.
        let answer =
            unsafe { (self.elapsed)(&raw mut time, from as sys::CUevent, to as sys::CUevent) };
        self.call(doing, answer)?;
        Ok(time)
    }

    fn free_event(&self, event: u64) {
        // As for memory, failures are nobody's business.
        // SAFETY: an event that `event` made.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuEventDestroy_v2(event as sys::CUevent);
        }
    }

    fn capture(&self, queue: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        let capture = Capture::begin(self)?;
        queue()?;
        let graph = capture.end()?;
        let mut replayable = ptr::null_mut();
        // SAFETY: a graph that was captured; it is a template of what is made here.
        let answer = unsafe {
            let answer = sys::cuGraphInstantiateWithFlags(&raw mut replayable, graph, 0);
            let _ = sys::cuGraphDestroy(graph);
            answer
        };
        self.call(CAPTURING, answer)?;
        Ok(replayable as u64)
    }

    fn replay(&self, graph: u64) -> Result<()> {
        let doing = "replaying a graph";
        let _turn = self.enter(doing)?;
        *lock(&self.last) = Some("one of a graph".into());
        // SAFETY: what `capture` returned.
        let answer = unsafe { sys::cuGraphLaunch(graph as sys::CUgraphExec, self.stream) };
        self.call(doing, answer)
    }

    fn free_graph(&self, graph: u64) {
        // The driver keeps a graph that still runs until it is done.
        // SAFETY: what `capture` returned.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuGraphExecDestroy(graph as sys::CUgraphExec);
        }
    }

    fn range_push(&self, name: &str) {
        nvtx::push(name);
    }

    fn range_pop(&self) {
        nvtx::pop();
    }
}

const CAPTURING: &str = "capturing a graph";

/// A capture that is under way. However it ends, the stream can be used again.
struct Capture<'a> {
    driver: &'a Driver,
}

impl<'a> Capture<'a> {
    fn begin(driver: &'a Driver) -> Result<Self> {
        let mut capturing = driver.whole_turn();
        if capturing.is_some() {
            return Err(captured(CAPTURING));
        }
        driver.bind(CAPTURING)?;
        // What other threads do outside the stream does not disturb it.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of this context.
        let answer = unsafe { sys::cuStreamBeginCapture_v2(driver.stream, mode) };
        driver.call(CAPTURING, answer)?;
        *capturing = Some(thread::current().id());
        Ok(Self { driver })
    }

    fn finish(&self) -> Result<sys::CUgraph> {
        let mut capturing = self.driver.whole_turn();
        let mut graph = ptr::null_mut();
        // SAFETY: the stream that is captured; a handle to be written.
        let answer = unsafe { sys::cuStreamEndCapture(self.driver.stream, &raw mut graph) };
        *capturing = None;
        let given_back = std::mem::take(&mut *lock(&self.driver.given_back));
        if !given_back.is_empty() {
            self.driver.release(&given_back);
        }
        self.driver.call(CAPTURING, answer)?;
        Ok(graph)
    }

    fn end(self) -> Result<sys::CUgraph> {
        let graph = self.finish();
        std::mem::forget(self);
        graph
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // What failed before this is the error to be told.
        if let Ok(graph) = self.finish() {
            // SAFETY: a graph that nobody else knows.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let staging = [&mut self.staging, &mut self.staging_aside]
            .map(|staging| staging.get_mut().unwrap_or_else(PoisonError::into_inner));
        let fetches = self
            .fetches
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let kernels = self
            .kernels
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // Errors are ignored: after a kernel's failure all of these fail, and the process takes
        // everything with it when it ends.
        // SAFETY: handles that `open` or `load` made, each once, or none; memory, events and graphs
        // hold on to this value, so that none is left.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            if !self.stream.is_null() {
                let _ = sys::cuStreamSynchronize(self.stream);
            }
            let pieces = staging.iter().flat_map(|staging| &staging.pieces);
            pieces.chain(&fetches.pieces).for_each(Piece::release);
            for module in kernels.modules.values() {
                let _ = sys::cuModuleUnload(*module);
            }
            if !self.begin.is_null() {
                let _ = sys::cuEventDestroy_v2(self.begin);
            }
            for stream in [self.aside, self.stream] {
                if !stream.is_null() {
                    let _ = sys::cuStreamDestroy_v2(stream);
                }
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
