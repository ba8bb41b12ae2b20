//! What a tape runs on.

pub mod cpu;
pub mod philox;
pub mod simd;
