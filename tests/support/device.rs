//! What the tests of kernels on the emulator share.

use echograd::device::gpu::Gpu;
use echograd::gradcheck::{self, Case, Sampler};
use echograd::ops::registry;
use rayon::prelude::*;

/// Outputs and gradients of a case, in both storages, agree with the CPU's.
pub fn check(case: &Case, seed: u64) {
    check_stored(case, seed, &[false, true]);
}

/// The same with activations as f32 (false) or bf16.
pub fn check_stored(case: &Case, seed: u64, storages: &[bool]) {
    let gpu = Gpu::emulator().unwrap();
    for &narrow in storages {
        let outcome = gradcheck::check_on(&gpu, case, seed, narrow).unwrap();
        let worst = outcome.mismatch;
        assert!(
            worst.is_none(),
            "{}, bf16: {narrow}: {worst:?}",
            case.description
        );
    }
}

/// [`check`] of the problems that the first seeds draw for each of these operations with such a sampler.
pub fn check_random(operations: &[&str], seeds: u64, sampler: fn(u64) -> Sampler) {
    for entry in registry().iter().filter(|e| operations.contains(&e.name)) {
        (0..seeds).into_par_iter().for_each(|seed| {
            check(&(entry.case)(&mut sampler(seed)), seed);
        });
    }
}
