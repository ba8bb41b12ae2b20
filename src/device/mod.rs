//! What a tape runs on.

#[cfg(feature = "cuda")]
pub mod code;
pub mod cpu;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod gpu;
#[cfg(feature = "cuda")]
pub(crate) mod nvcc;
pub mod philox;
pub mod simd;
