//! The driver's library: whether it is there and new enough, which GPUs it has, what its answers mean.
//!
//! The bindings load the library and its symbols at first use and panic where they find none, so
//! [`load`] looks for everything before anything is called.

use std::ffi::{CStr, c_char, c_int};
use std::sync::LazyLock;

use cudarc::driver::sys;
use serde::Serialize;
use sys::CUdevice_attribute as Attribute;

use super::super::Description;
use crate::device::code::COMPILER;
use crate::error::{Error, Result};

/// Oldest driver whose entry points suffice, by its CUDA version.
const OLDEST: (u32, u32) = (12, 0);

/// Lowest compute capability: Turing.
pub(super) const LOWEST: (u32, u32) = (7, 5);

/// Compute capability from which bf16 is stored: Ampere.
pub(super) const BF16: (u32, u32) = (8, 0);

/// Everything that is called.
const ENTRY_POINTS: [&str; 43] = [
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// An answer of the driver that is not success. Drivers know more of them than the bindings, so they
/// are only ever compared as numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal(sys::CUresult);

impl Refusal {
    pub(super) fn is(self, result: sys::CUresult) -> bool {
        self.0 as u32 == result as u32
    }

    /// Whether a kernel did something that ends all work of this process on the GPU, or its hardware did.
    pub(super) fn is_fatal(self) -> bool {
        matches!(
            self.0 as u32,
            214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | 721
        )
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        type Ask = unsafe fn(sys::CUresult, *mut *const c_char) -> sys::CUresult;
        let text = |ask: Ask| {
            let mut text = std::ptr::null();
            // SAFETY: the library is loaded, since it answered; the text is a constant of it.
            unsafe {
                let known = ask(self.0, &raw mut text) as u32 == 0 && !text.is_null();
                known.then(|| CStr::from_ptr(text).to_string_lossy())
            }
        };
        match (text(sys::cuGetErrorString), text(sys::cuGetErrorName)) {
            (Some(text), Some(name)) => write!(f, "{text} ({name})"),
            _ => write!(f, "error {} of the driver", self.0 as u32),
        }
    }
}

/// The driver's answer as a result.
pub(super) fn check(answer: sys::CUresult) -> Result<(), Refusal> {
    match answer as u32 {
        0 => Ok(()),
        _ => Err(Refusal(answer)),
    }
}

pub(super) fn problem(text: impl Into<String>) -> Error {
    Error::device("cuda", text)
}

/// Whether the library can be opened at all.
static PRESENT: LazyLock<bool> = LazyLock::new(|| {
    // SAFETY: opening it runs its initialisers, as any program that uses the GPU does.
    unsafe { sys::is_culib_present() }
});

/// A symbol that newer or older drivers may lack.
///
/// # Safety
/// `F` is the type of that function; the library is present.
pub(super) unsafe fn symbol<F: Copy>(name: &str) -> Option<F> {
    // SAFETY: as this function's contract.
    unsafe { sys::culib().get::<F>(name.as_bytes()).ok().map(|f| *f) }
}

/// The CUDA version that the driver serves.
///
/// # Errors
/// [`Error::Device`] if there is no driver.
pub fn version() -> Result<(u32, u32)> {
    if !*PRESENT {
        let library = if cfg!(windows) {
            "nvcuda.dll"
        } else {
            "libcuda.so.1"
        };
        return Err(problem(format!(
            "no NVIDIA driver: {library} was not found"
        )));
    }
    // SAFETY: the library is present, the type is that of the documentation.
    let ask = unsafe { symbol::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDriverGetVersion") };
    let ask = ask.ok_or_else(|| problem("libcuda has no cuDriverGetVersion: not a driver"))?;
    let mut version = 0;
    // SAFETY: an integer to be written.
    let answer = unsafe { ask(&raw mut version) };
    if answer == sys::CUresult::CUDA_ERROR_STUB_LIBRARY as c_int {
        return Err(problem(
            "found the toolkit's stub of libcuda in place of the driver; take its folder off \
             LD_LIBRARY_PATH",
        ));
    }
    let version = version.max(0) as u32;
    Ok((version / 1000, version % 1000 / 10))
}

/// Makes sure that everything can be called.
///
/// # Errors
/// [`Error::Device`] if there is no driver or it is too old for this program.
pub(super) fn load() -> Result<(u32, u32)> {
    let version = version()?;
    if version < OLDEST {
        return Err(too_old(version, OLDEST, "this program"));
    }
    for name in ENTRY_POINTS {
        // SAFETY: the library is present; the symbol is looked up, not called.
        if unsafe { symbol::<*const ()>(name) }.is_none() {
            return Err(problem(format!("the driver's library has no {name}")));
        }
    }
    Ok(version)
}

/// Makes sure that machine code in this program can be loaded: a driver loads what compilers of its
/// own generation or older ones made.
pub(super) fn loads_kernels(version: (u32, u32)) -> Result<()> {
    match COMPILER {
        Some(compiler) if version.0 < compiler.version.0 => {
            let (major, minor) = compiler.version;
            let what = format!("kernels compiled by CUDA {major}.{minor}, as in this build");
            Err(too_old(version, (major, 0), &what))
        }
        _ => Ok(()),
    }
}

fn too_old(found: (u32, u32), needed: (u32, u32), what: &str) -> Error {
    // The first Linux driver of each CUDA generation.
    let release = match needed.0 {
        12 => " (525 or newer)",
        13 => " (580 or newer)",
        _ => "",
    };
    problem(format!(
        "the NVIDIA driver is too old: for {what} it must be of CUDA {}.{}{release}, found one of CUDA {}.{}",
        needed.0, needed.1, found.0, found.1
    ))
}

/// A GPU as the driver lists it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// What it is.
    #[serde(flatten)]
    pub description: Description,
    /// Whether it is a part of a GPU that is shared (multi-instance GPU).
    pub mig: bool,
    /// Bytes of shared memory that one block can have.
    pub shared_per_block: u32,
    #[serde(skip)]
    pub(super) device: sys::CUdevice,
}

/// All GPUs, in the driver's order.
///
/// # Errors
/// [`Error::Device`] if there is no driver, if it is too old or does not start, or if it has no GPU.
pub fn list() -> Result<Vec<Listed>> {
    let driver = load()?;
    let visible = || match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(value) => format!(" (CUDA_VISIBLE_DEVICES is {value:?})"),
        Err(_) => String::new(),
    };
    let none = || problem(format!("no NVIDIA GPU{}", visible()));
    let mut count = 0;
    // SAFETY: `load` found the functions; they write to what they are given.
    let started = unsafe {
        check(sys::cuInit(0)).and_then(|()| check(sys::cuDeviceGetCount(&raw mut count)))
    };
    match started {
        Ok(()) => {}
        Err(refusal) if refusal.is(sys::CUresult::CUDA_ERROR_NO_DEVICE) => return Err(none()),
        Err(refusal) => {
            return Err(problem(format!(
                "the NVIDIA driver does not start: {refusal}"
            )));
        }
    }
    if count <= 0 {
        return Err(none());
    }
    (0..count).map(|index| describe(index, driver)).collect()
}

fn describe(index: c_int, driver: (u32, u32)) -> Result<Listed> {
    let fails = |refusal| problem(format!("GPU {index}: {refusal}"));
    let (mut device, mut memory, mut name) = (0, 0, [0; 256]);
    // SAFETY: the library is loaded and started; each call writes to a variable of its type, the name
    // no further than its length.
    unsafe {
        check(sys::cuDeviceGet(&raw mut device, index)).map_err(fails)?;
        check(sys::cuDeviceTotalMem_v2(&raw mut memory, device)).map_err(fails)?;
        let room = name.len() as c_int - 1;
        check(sys::cuDeviceGetName(name.as_mut_ptr(), room, device)).map_err(fails)?;
    }
    let attribute = |attribute| {
        let mut value = 0;
        // SAFETY: as above.
        unsafe { check(sys::cuDeviceGetAttribute(&raw mut value, attribute, device)) }
            .map_err(fails)?;
        Ok::<u32, Error>(value.max(0) as u32)
    };
    // SAFETY: the driver ends the name with a zero, and the last byte was left one.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy();
    let description = Description {
        name: name.trim().to_owned(),
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        driver,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory: memory as u64,
        l2: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        registers: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
        shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
        threads: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        clock: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
    };
    Ok(Listed {
        mig: description.name.contains(" MIG "),
        shared_per_block: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        device,
        description,
    })
}

/// The GPU that `ECHOGRAD_GPU` names, or the first, if its kernels can be had.
///
/// # Errors
/// [`Error::Device`] as [`list`] and if the GPU is too old, [`Error::Argument`] if there is none of
/// that number.
pub fn choose() -> Result<Listed> {
    let gpus = list()?;
    let index = match std::env::var_os("ECHOGRAD_GPU") {
        None => 0,
        Some(value) => {
            let index = value.to_str().and_then(|text| text.trim().parse().ok());
            index
                .filter(|&index: &usize| index < gpus.len())
                .ok_or_else(|| {
                    let expected = match gpus.len() {
                        1 => "0, the number of the only GPU".to_owned(),
                        n => format!("the number of a GPU, 0 to {}", n - 1),
                    };
                    Error::argument(
                        "ECHOGRAD_GPU",
                        format!("expected {expected}, found {value:?}"),
                    )
                })?
        }
    };
    let gpu = gpus[index].clone();
    let (capability, name) = (gpu.description.capability, &gpu.description.name);
    if capability < LOWEST {
        return Err(problem(format!(
            "{name} has compute capability {}.{}, {}.{} (Turing) or newer is needed",
            capability.0, capability.1, LOWEST.0, LOWEST.1
        )));
    }
    loads_kernels(gpu.description.driver)?;
    Ok(gpu)
}
