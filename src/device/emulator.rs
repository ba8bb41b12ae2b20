//! The CUDA kernels on the CPU: the unmodified `kernels/*.cu`, built by the C++ compiler and run with
//! one fiber per CUDA thread, for tests.
//!
//! Device memory is host memory, held in [`Buffer`]s so that accesses outside of them are found. What
//! else is found (races on shared memory, missing barriers, divergence, uninitialised or misaligned
//! access, integer overflow) and what cannot be is told in `kernels/README.md`.
//!
//! A launch is a function of its arguments and a seed, which draws the order in which warps and lanes
//! run and when asynchronous copies end. The seed is that of [`with_seed`], or else the environment
//! variable `ECHOGRAD_EMULATOR_SEED`, or else 0.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_void};
use std::ptr::NonNull;
use std::sync::{LazyLock, RwLock};

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Seeds under which tests run every kernel.
pub const SEEDS: [u64; 4] = [0, 1, 2, 3];

// The layout of these is that of kernels/emulator/{emulator.h,runtime.cpp}.
#[repr(C)]
struct Entry {
    name: *const c_char,
    run: unsafe extern "C" fn(*const *mut c_void),
    max_threads: u32,
    parameters: u32,
    sizes: *const u32,
}
// SAFETY: points to constants.
unsafe impl Sync for Entry {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    begin: usize,
    end: usize,
}

#[repr(C)]
struct LaunchSpec {
    entry: *const Entry,
    arguments: *const *mut c_void,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
    seed: u64,
    memory: *const Range,
    ranges: usize,
}
// SAFETY: read only, while the launching thread waits.
unsafe impl Sync for LaunchSpec {}

#[repr(C)]
struct Report {
    message: [u8; 640],
    block: [u32; 3],
    thread: [u32; 3],
    at: *mut c_void,
    other: *mut c_void,
}

#[cfg(echograd_emulator)]
mod linked {
    use super::{Entry, LaunchSpec, Report};

    unsafe extern "C" {
        pub(super) safe fn echograd_emulator_begin();
        pub(super) safe fn echograd_emulator_end();
        pub(super) fn echograd_emulator_block(
            launch: *const LaunchSpec,
            index: u64,
            report: *mut Report,
        ) -> bool;
        pub(super) fn echograd_emulator_guard(start: *mut u8, bytes: usize, closed: bool);
    }

    include!(concat!(env!("OUT_DIR"), "/emulator/kernels.rs"));

    pub(super) fn kernels() -> Vec<&'static Entry> {
        entries().to_vec()
    }
}

#[cfg(not(echograd_emulator))]
mod linked {
    use super::{Entry, LaunchSpec, Report};

    pub(super) fn echograd_emulator_begin() {}
    pub(super) fn echograd_emulator_end() {}
    pub(super) unsafe fn echograd_emulator_block(
        _: *const LaunchSpec,
        _: u64,
        _: *mut Report,
    ) -> bool {
        false
    }
    pub(super) unsafe fn echograd_emulator_guard(_: *mut u8, _: usize, _: bool) {}
    pub(super) fn kernels() -> Vec<&'static Entry> {
        Vec::new()
    }
}

static KERNELS: LazyLock<BTreeMap<&'static str, &'static Entry>> = LazyLock::new(|| {
    let name = |entry: &'static Entry| {
        // SAFETY: a string constant of the generated list.
        let name = unsafe { CStr::from_ptr(entry.name) };
        name.to_str().expect("kernel names are ASCII")
    };
    linked::kernels()
        .into_iter()
        .map(|e| (name(e), e))
        .collect()
});

/// Says whether the build found a C++ compiler and so contains the kernels.
///
/// # Errors
/// [`Error::Device`] with what the build was missing.
pub fn available() -> Result<()> {
    match option_env!("ECHOGRAD_NO_EMULATOR") {
        None => Ok(()),
        Some(problem) => Err(Error::device("emulator", problem)),
    }
}

/// Names of all kernels, sorted.
pub fn kernels() -> impl Iterator<Item = &'static str> {
    KERNELS.keys().copied()
}

fn find(name: &str) -> Result<&'static Entry> {
    available()?;
    let found = KERNELS.get(name).copied();
    found.ok_or_else(|| Error::device(name, "no kernel of this name in kernels/*.cu"))
}

/// Sizes in bytes of a kernel's parameters, against which a launch wrapper can be checked.
///
/// # Errors
/// [`Error::Device`] if there is no such kernel, or no emulator.
pub fn parameters(name: &str) -> Result<&'static [u32]> {
    let entry = find(name)?;
    // SAFETY: an array of `parameters` elements in the generated list.
    Ok(unsafe { std::slice::from_raw_parts(entry.sizes, entry.parameters as usize) })
}

thread_local! {
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs `f`, whose launches from this thread use `seed`.
pub fn with_seed<R>(seed: u64, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<u64>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SEED.set(self.0);
        }
    }
    let _restore = Restore(SEED.replace(Some(seed)));
    f()
}

fn seed() -> Result<u64> {
    const VARIABLE: &str = "ECHOGRAD_EMULATOR_SEED";
    match (SEED.get(), std::env::var(VARIABLE)) {
        (Some(seed), _) => Ok(seed),
        (None, Err(_)) => Ok(0),
        (None, Ok(text)) => text
            .parse()
            .map_err(|_| Error::argument(VARIABLE, format!("expected an integer, found {text:?}"))),
    }
}

/// Runs a kernel to its end, as `cuLaunchKernel` and a synchronisation would.
///
/// `arguments` point to the values of the parameters in order; `shared_bytes` is the dynamic shared
/// memory of each block. Blocks run in parallel, and the first faulty one is reported.
///
/// # Errors
/// [`Error::Device`] if the driver would refuse the launch (no such kernel, another number of
/// parameters, sizes beyond the limits or the kernel's launch bounds, too much shared memory), or if
/// a thread did something wrong: which one, where, and what.
///
/// # Safety
/// Each argument must point to a value of the parameter's type. What the kernel does with pointers is
/// checked before it happens, unless the build chose other checks by `ECHOGRAD_EMULATOR_SANITIZE`;
/// memory that it reads or writes must not be in use by another thread.
pub unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
    arguments: &mut [*mut c_void],
) -> Result<()> {
    let entry = find(name)?;
    check_launch(entry, grid, block, arguments.len()).map_err(|e| Error::device(name, e))?;
    let memory: Vec<Range> = {
        let buffers = BUFFERS.read().expect("no panic while held");
        let range = |(&begin, &end): (&usize, &usize)| Range { begin, end };
        buffers.iter().map(range).collect()
    };
    let spec = LaunchSpec {
        entry,
        arguments: arguments.as_ptr(),
        grid,
        block,
        shared_bytes,
        seed: seed()?,
        memory: memory.as_ptr(),
        ranges: memory.len(),
    };
    linked::echograd_emulator_begin();
    let blocks: u64 = grid.iter().map(|&n| u64::from(n)).product();
    let problem = (0..blocks).into_par_iter().find_map_first(|index| {
        let mut report = Report {
            message: [0; 640],
            block: [0; 3],
            thread: [0; 3],
            at: std::ptr::null_mut(),
            other: std::ptr::null_mut(),
        };
        let spec = &spec;
        // SAFETY: the specification outlives the call, and `launch` requires what it asks of the
        // arguments.
        let fine = unsafe { linked::echograd_emulator_block(spec, index, &mut report) };
        (!fine).then(|| report.describe())
    });
    linked::echograd_emulator_end();
    problem.map_or(Ok(()), |problem| Err(Error::device(name, problem)))
}

/// What the driver would refuse.
fn check_launch(
    entry: &Entry,
    grid: [u32; 3],
    block: [u32; 3],
    arguments: usize,
) -> Result<(), String> {
    let limits = [
        (grid, [0x7fff_ffff, 65_535, 65_535], "grid"),
        (block, [1024, 1024, 64], "block"),
    ];
    for (sizes, most, what) in limits {
        if (0..3).any(|i| !(1..=most[i]).contains(&sizes[i])) {
            return Err(format!("{what} of {sizes:?}, expected 1 to {most:?}"));
        }
    }
    let threads: u32 = block.iter().product();
    if threads > entry.max_threads {
        return Err(format!(
            "{threads} threads per block, but the kernel is bound to {}",
            entry.max_threads
        ));
    }
    if arguments != entry.parameters as usize {
        return Err(format!(
            "{arguments} arguments for {} parameters",
            entry.parameters
        ));
    }
    Ok(())
}

impl Report {
    fn describe(&self) -> String {
        let [bx, by, bz] = self.block;
        let [tx, ty, tz] = self.thread;
        let length = self
            .message
            .iter()
            .position(|&b| b == 0)
            .unwrap_or(self.message.len());
        let message = String::from_utf8_lossy(&self.message[..length]);
        let at = source_line(self.at).map_or(String::new(), |line| format!("{line}: "));
        let other =
            source_line(self.other).map_or(String::new(), |line| format!(" (the other at {line})"));
        format!("block ({bx},{by},{bz}), thread ({tx},{ty},{tz}): {at}{message}{other}")
    }
}

/// `file:line` of the call that returns to `address`: where a kernel file made it, although helpers
/// of device.cuh and emulator.h may have been inlined in between.
fn source_line(address: *mut c_void) -> Option<String> {
    if address.is_null() {
        return None;
    }
    let mut lines = Vec::new();
    backtrace::resolve(address.wrapping_byte_sub(1), |symbol| {
        if let (Some(file), Some(line)) = (symbol.filename(), symbol.lineno()) {
            lines.push((file.display().to_string(), line));
        }
    });
    let in_kernel = |(file, _): &&(String, u32)| file.ends_with(".cu");
    let (file, line) = lines.iter().find(in_kernel).or(lines.first())?;
    Some(format!(
        "{}:{line}",
        &file[file.find("kernels/").unwrap_or(0)..]
    ))
}

/// Ranges of all living buffers, by their beginning.
static BUFFERS: RwLock<BTreeMap<usize, usize>> = RwLock::new(BTreeMap::new());

/// Device memory: aligned to 256 bytes as the driver's, and filled with 0xFF (NaN) until written.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory; launches say what they require.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

impl Buffer {
    const ALIGNMENT: usize = 256;
    /// Bytes after each buffer that belong to nobody: the next one must not begin where it ends.
    const GUARD: usize = 256;

    /// Memory of `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Device`] if there is not as much.
    pub fn new(bytes: usize) -> Result<Self> {
        let full = || {
            Error::device(
                "emulator",
                format!("no memory for a buffer of {bytes} bytes"),
            )
        };
        let layout = Self::layout(bytes).ok_or_else(full)?;
        // SAFETY: the layout has a size above 0.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or_else(full)?;
        // SAFETY: within the allocation.
        unsafe {
            start.write_bytes(0xff, bytes);
            linked::echograd_emulator_guard(start.as_ptr().add(bytes), Self::GUARD, true);
        }
        let begin = start.as_ptr() as usize;
        let mut buffers = BUFFERS.write().expect("no panic while held");
        buffers.insert(begin, begin + bytes);
        Ok(Self { start, bytes })
    }

    /// A copy of host memory.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn from_slice<T: bytemuck::NoUninit>(values: &[T]) -> Result<Self> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Self::new(bytes.len())?;
        // SAFETY: as many bytes as were allocated, just now.
        unsafe {
            buffer
                .start
                .as_ptr()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
        Ok(buffer)
    }

    /// The contents, as whole elements of `T`.
    pub fn to_vec<T: bytemuck::AnyBitPattern>(&self) -> Vec<T> {
        // SAFETY: initialised by `new`, and no launch runs while it is read (see `launch`).
        let bytes = unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) };
        bytemuck::cast_slice(bytes).to_vec()
    }

    /// The contents, to be written. No launch may be running.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised by `new`; borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// The address that kernels are given.
    pub fn address(&self) -> *mut c_void {
        self.start.as_ptr().cast()
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes.checked_add(Self::GUARD)?, Self::ALIGNMENT).ok()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut buffers = BUFFERS.write().expect("no panic while held");
        buffers.remove(&(self.start.as_ptr() as usize));
        let layout = Self::layout(self.bytes).expect("was a layout in `new`");
        // SAFETY: allocated in `new` with the same layout.
        unsafe {
            let end = self.start.as_ptr().add(self.bytes);
            linked::echograd_emulator_guard(end, Self::GUARD, false);
            dealloc(self.start.as_ptr(), layout);
        }
    }
}

#[cfg(all(test, not(echograd_emulator)))]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_compiler_says_so_at_every_launch() {
        // SAFETY: there is nothing that could run.
        let launched = unsafe { launch("any", [1; 3], [1; 3], 0, &mut []) };
        let problem = launched.unwrap_err().to_string();
        assert!(problem.contains("a C++20 compiler is needed"), "{problem}");
    }
}
