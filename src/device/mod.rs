//! What a tape runs on.

pub mod cpu;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod philox;
pub mod simd;
