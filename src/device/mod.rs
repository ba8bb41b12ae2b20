//! What a tape runs on.

pub mod cpu;
