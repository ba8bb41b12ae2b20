//! The kernels of conv.cu and conv_direct.cu, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

use echograd::device::gpu::Gpu;
use echograd::gradcheck::{self, Case, Sampler};
use echograd::ops::registry;
use rayon::prelude::*;

const OPERATIONS: [&str; 3] = ["conv2d", "linear", "conv_transpose2d"];

/// Outputs and gradients of a case, in both storages, agree with the CPU's.
fn check(case: &Case, seed: u64) {
    let gpu = Gpu::emulator().unwrap();
    for narrow in [false, true] {
        let outcome = gradcheck::check_on(&gpu, case, seed, narrow).unwrap();
        let worst = outcome.mismatch;
        assert!(
            worst.is_none(),
            "{}, bf16: {narrow}: {worst:?}",
            case.description
        );
    }
}

#[test]
fn random_problems_agree_with_the_cpu() {
    for entry in registry().iter().filter(|e| OPERATIONS.contains(&e.name)) {
        (0..60).into_par_iter().for_each(|seed| {
            check(&(entry.case)(&mut Sampler::new(seed)), seed);
        });
        (0..4).into_par_iter().for_each(|seed| {
            check(&(entry.case)(&mut Sampler::large(seed)), seed);
        });
    }
}
