//! The kernels as they are in this program: machine code if the build found nvcc, else sources.

/// One file of `kernels/`.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its name without `.cu`.
    pub name: &'static str,
    /// What to load.
    pub code: Code,
}

/// What a module is loaded from.
#[derive(Clone, Copy, Debug)]
pub enum Code {
    /// Machine code of several GPU generations, and PTX for those to come.
    Fatbin(&'static [u8]),
    /// CUDA C++ that includes [`HEADER`] as `device.cuh`, for NVRTC.
    Source(&'static str),
}

/// `kernels/device.cuh`, the only header of the kernels.
pub const HEADER: &str = include_str!("../../kernels/device.cuh");

/// All modules, by name.
pub static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));
