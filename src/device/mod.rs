//! What a tape runs on.

#[cfg(feature = "cuda")]
pub mod code;
pub mod cpu;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod gpu;
pub mod philox;
pub mod simd;
