//! How fast the emulator is at what kernels wait for: block barriers, shuffles, matrix products.

use std::ffi::c_void;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use echograd::device::emulator::{self, Buffer};

/// Blocks of each launch; they spread over the host's threads.
const BLOCKS: u32 = 8;
/// Operations of each thread.
const ROUNDS: u32 = 100;

fn operations(c: &mut Criterion) {
    let mut group = c.benchmark_group("emulator");
    let output = Buffer::new(4 * BLOCKS as usize).expect("32 bytes");
    let (address, rounds) = (output.address(), ROUNDS);
    // Kernel, its threads per block, and what one thread's call of it counts for.
    let cases = [
        ("selftest_barriers", 64, 1),
        ("selftest_barriers", 1024, 1),
        ("selftest_shuffles", 256, 1),
        ("selftest_mmas", 128, 16 * 8 * 16 / 32),
    ];
    for (kernel, threads, each) in cases {
        let mut arguments: Vec<*mut c_void> = vec![
            (&raw const address).cast_mut().cast(),
            (&raw const rounds).cast_mut().cast(),
        ];
        if kernel == "selftest_barriers" {
            arguments.remove(0);
        }
        group.throughput(Throughput::Elements(
            u64::from(BLOCKS) * u64::from(threads) * u64::from(ROUNDS) * each,
        ));
        group.bench_function(format!("{kernel}/{threads}"), |b| {
            b.iter(|| {
                // SAFETY: the kernels take an address, if any, and a number of rounds.
                unsafe {
                    emulator::launch(kernel, [BLOCKS, 1, 1], [threads, 1, 1], 0, &mut arguments)
                }
                .expect("the kernels are right");
            });
        });
    }
}

criterion_group!(benches, operations);
criterion_main!(benches);
