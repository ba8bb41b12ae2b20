use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::device::gpu::Gpu;
use crate::device::gpu::launch::{Full, Grid, Stored, kernel};
use crate::device::simd::{self, Lanes};
use crate::error::Result;
use crate::ops::pointwise;

/// A GPU whose times can be predicted, by its data sheet: bytes per second of its memory, and arithmetic without
/// sparsity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Sheet {
    /// A100 SXM, 80 GB.
    A100,
    /// H100 SXM.
    H100,
    /// H200 SXM.
    H200,
}

/// What a machine does at best: measured, or by its data sheet.
#[derive(Clone, Debug, Serialize)]
pub struct Roof {
    /// Bytes per second of a copy far larger than the caches, read and written counted.
    pub copy_bytes_per_second: f64,
    /// Multiplications and additions per second on registers: of f32 by fused multiply-adds.
    pub f32_flops_per_second: f64,
    /// As above, of bf16 by matrix instructions (`mma.sync`), where there are any.
    pub bf16_flops_per_second: Option<f64>,
    /// The best rate that the profiled element type can reach.
    #[serde(skip)]
    arithmetic: f64,
}

/// Repetitions of which the fastest counts.
const REPEATS: usize = 5;

fn fastest(mut seconds: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        best = best.min(seconds()?);
    }
    Ok(best)
}

impl Roof {
    /// Seconds that a step cannot beat.
    pub fn seconds(&self, bytes: u64, flops: u64) -> f64 {
        (bytes as f64 / self.copy_bytes_per_second).max(flops as f64 / self.arithmetic)
    }

    /// Of a GPU's data sheet; `narrow` says which of its rates steps are compared with.
    pub fn of_sheet(sheet: Sheet, narrow: bool) -> Self {
        let (memory, f32, bf16) = match sheet {
            Sheet::A100 => (2.039e12, 19.5e12, 312e12),
            Sheet::H100 => (3.35e12, 66.9e12, 989.4e12),
            Sheet::H200 => (4.8e12, 66.9e12, 989.4e12),
        };
        Self {
            copy_bytes_per_second: memory,
            f32_flops_per_second: f32,
            bf16_flops_per_second: Some(bf16),
            arithmetic: if narrow { bf16 } else { f32 },
        }
    }

    /// Of the processor, with all threads of the pool.
    pub fn of_cpu() -> Self {
        const PIECE: usize = 1 << 20;
        let from = vec![1.0f32; 64 * PIECE];
        let mut to = vec![0.0f32; from.len()];
        let copy = fastest(|| {
            let start = Instant::now();
            let pieces = to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
            black_box(&mut to);
            Ok(start.elapsed().as_secs_f64())
        });
        let threads = rayon::current_num_threads();
        let fma = fastest(|| {
            let start = Instant::now();
            let flops: usize = (0..threads)
                .into_par_iter()
                .map(|i| simd::dispatch::<f32, _>(Fma { start: i as f32 }))
                .sum();
            Ok(start.elapsed().as_secs_f64() / flops as f64)
        });
        let rate = 1.0 / fma.expect("nothing fails");
        Self {
            copy_bytes_per_second: 8.0 * from.len() as f64 / copy.expect("nothing fails"),
            f32_flops_per_second: rate,
            bf16_flops_per_second: None,
            arithmetic: rate,
        }
    }

    /// Of a GPU; `narrow` says which of its rates steps are compared with.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is no memory for the measurement or the driver refuses.
    pub fn of_gpu(gpu: &Gpu, narrow: bool) -> Result<Self> {
        const BYTES: usize = 512 << 20;
        const TIMES: u32 = 10;
        let (from, to) = (gpu.memory(BYTES)?, gpu.memory(BYTES)?);
        let elements = BYTES / size_of::<f32>();
        let copy = Copy {
            x: from.pointer().into(),
            y: to.pointer().into(),
            len: elements as u64,
        };
        let grid = pointwise::grid(elements, from.pointer());
        // SAFETY: both buffers hold `elements`.
        let copy = fastest(|| unsafe { gpu.time(grid, &copy, TIMES) })?;
        let blocks = 16 * gpu.description().multiprocessors.max(1);
        let grid = Grid::new(blocks as usize, 256);
        let (rounds, chains) = (4096, 8.0);
        let out = to.pointer().into();
        // SAFETY: a float a thread is written, far fewer than `to` holds.
        let fma = fastest(|| unsafe { gpu.time(grid, &RateFma { out, rounds }, 1) })?;
        let threads = f64::from(blocks) * 256.0;
        let fma = 2.0 * threads * chains * f64::from(rounds) / (fma * 1e-3);
        let mma = if gpu.has_bf16() {
            // SAFETY: as above.
            let time = fastest(|| unsafe { gpu.time(grid, &RateMma { out, rounds }, 1) })?;
            let products = threads / 32.0 * chains * f64::from(rounds);
            Some(2.0 * 16.0 * 8.0 * 16.0 * products / (time * 1e-3))
        } else {
            None
        };
        Ok(Self {
            copy_bytes_per_second: 2.0 * BYTES as f64 / (copy * 1e-3),
            f32_flops_per_second: fma,
            bf16_flops_per_second: mma,
            arithmetic: mma.filter(|_| narrow).unwrap_or(fma),
        })
    }
}

kernel! {
    struct Copy = "copy" { x: Stored, y: Stored, len: u64 }
}
kernel! {
    struct RateFma = "rate_fma" { out: Full, rounds: i32 }
}
kernel! {
    struct RateMma = "rate_mma" { out: Full, rounds: i32 }
}

/// Fused multiply-adds in as many chains as hide their latency; returns how many operations they were.
struct Fma {
    start: f32,
}

impl simd::Kernel<f32> for Fma {
    type Out = usize;
    #[inline(always)]
    fn run<L: Lanes<Elem = f32>>(self) -> usize {
        const CHAINS: usize = 16;
        const ROUNDS: usize = 1 << 18;
        let (factor, addend) = (L::splat(0.5), L::splat(0.25));
        let mut sums = [L::splat(self.start); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = sum.mul_add(factor, addend);
            }
        }
        let mut out = [0.0; simd::MAX_LANES];
        for sum in sums {
            sum.store(&mut out);
            black_box(&out);
        }
        2 * L::N * CHAINS * ROUNDS
    }
}
