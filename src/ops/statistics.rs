//! Mean and variance of each channel of a feature map, taken block by block while the convolution that writes
//! it has the block in cache.
//!
//! A block is looked at twice: for its mean `k`, then for `Σ (x − k)` and `Σ (x − k)²`. These three numbers per
//! channel determine mean and variance whatever `k` is; that it is close to the mean avoids the cancellation of
//! `E x² − (E x)²`.

use rayon::prelude::*;

use crate::device::simd::{Kernel, Lanes, MAX_LANES};
use crate::tensor::Real;

/// Floating-point operations for one element.
pub(super) const FLOPS: u64 = 4;
/// Sums per block and channel.
const SUMS: usize = 3;
/// Vectors of channels that are summed together, to hide the latency of an addition.
const TOGETHER: usize = 4;

/// Elements that the sums of a block take.
pub(super) fn len(channels: usize) -> usize {
    SUMS * channels
}

/// Where a block lies in a feature map: `rows` × `columns` pixels, and the distances between them in elements.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub rows: usize,
    pub columns: usize,
    pub row: usize,
    pub column: usize,
}

/// Takes the sums of `channels` channels from `y` on. Sum `m` of channel `c` goes to `sums[m·stride + c]`.
///
/// # Safety
/// `y` must be readable for `channels` elements at every pixel of the block, `sums` writable for as many from every
/// `m·stride` on, with no other access to those meanwhile.
#[inline(always)]
pub(super) unsafe fn take<L: Lanes>(
    block: Block,
    y: *const L::Elem,
    channels: usize,
    sums: *mut L::Elem,
    stride: usize,
) {
    let whole = channels - channels % (TOGETHER * L::N);
    // SAFETY: the caller's.
    unsafe {
        for first in (0..whole).step_by(TOGETHER * L::N) {
            vectors::<L, TOGETHER>(block, y.add(first), L::N, sums.add(first), stride);
        }
        for first in (whole..channels).step_by(L::N) {
            let lanes = L::N.min(channels - first);
            vectors::<L, 1>(block, y.add(first), lanes, sums.add(first), stride);
        }
    }
}

/// [`take`] for a block that is contiguous.
pub(super) struct Taken<'a, T> {
    pub y: &'a [T],
    pub channels: usize,
    pub sums: &'a mut [T],
}

impl<T: Real> Kernel<T> for Taken<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let channels = self.channels;
        assert!(self.y.len().is_multiple_of(channels) && self.sums.len() == len(channels));
        let block = Block {
            rows: 1,
            columns: self.y.len() / channels,
            row: 0,
            column: channels,
        };
        let (y, sums) = (self.y.as_ptr(), self.sums.as_mut_ptr());
        // SAFETY: the lengths were checked.
        unsafe { take::<L>(block, y, channels, sums, channels) };
    }
}

/// [`take`] for `V` vectors, of which the last has `lanes` channels.
#[inline(always)]
unsafe fn vectors<L: Lanes, const V: usize>(
    block: Block,
    y: *const L::Elem,
    lanes: usize,
    sums: *mut L::Elem,
    stride: usize,
) {
    let lanes = |v: usize| if v + 1 < V { L::N } else { lanes };
    // SAFETY, here and below: the caller's.
    let load = |pixel: *const L::Elem, v: usize| unsafe {
        L::load_first(std::slice::from_raw_parts(pixel.add(v * L::N), lanes(v)))
    };
    let pixel =
        |row: usize, column: usize| unsafe { y.add(row * block.row + column * block.column) };
    let mut mean = [L::zero(); V];
    for row in 0..block.rows {
        for column in 0..block.columns {
            let pixel = pixel(row, column);
            for (v, mean) in mean.iter_mut().enumerate() {
                *mean = *mean + load(pixel, v);
            }
        }
    }
    let share = L::splat(L::Elem::of(1.0 / (block.rows * block.columns) as f64));
    let mean = mean.map(|sum| sum * share);
    let mut first = [L::zero(); V];
    let mut second = [L::zero(); V];
    for row in 0..block.rows {
        for column in 0..block.columns {
            let pixel = pixel(row, column);
            for v in 0..V {
                let d = load(pixel, v) - mean[v];
                first[v] = first[v] + d;
                second[v] = d.mul_add(d, second[v]);
            }
        }
    }
    for (m, sum) in [mean, first, second].into_iter().enumerate() {
        for (v, sum) in sum.into_iter().enumerate() {
            let to = unsafe { sums.add(m * stride + v * L::N) };
            sum.store_first(unsafe { std::slice::from_raw_parts_mut(to, lanes(v)) });
        }
    }
}

/// Mean and biased variance of each channel, from the sums of all blocks; block `b` has `pixels(b)` pixels.
/// Blocks are added in `f64` and in order.
pub(super) fn finish<T: Real>(
    sums: &[T],
    blocks: usize,
    pixels: impl Fn(usize) -> usize + Sync,
    mean: &mut [T],
    var: &mut [T],
) {
    let channels = mean.len();
    let count: usize = (0..blocks).map(&pixels).sum();
    mean.par_chunks_mut(MAX_LANES)
        .zip(var.par_chunks_mut(MAX_LANES))
        .enumerate()
        .for_each(|(group, (mean, var))| {
            let of = |block: usize, m: usize| {
                let start = block * len(channels) + m * channels + group * MAX_LANES;
                &sums[start..][..mean.len()]
            };
            let mut sum = [0.0; MAX_LANES];
            for block in 0..blocks {
                let n = pixels(block) as f64;
                for ((sum, k), first) in sum.iter_mut().zip(of(block, 0)).zip(of(block, 1)) {
                    *sum += n * k.wide() + first.wide();
                }
            }
            let centre = sum.map(|sum| sum / count as f64);
            let mut squares = [0.0; MAX_LANES];
            for block in 0..blocks {
                let n = pixels(block) as f64;
                let sums = of(block, 0).iter().zip(of(block, 1)).zip(of(block, 2));
                for ((squares, centre), ((k, first), second)) in
                    squares.iter_mut().zip(centre).zip(sums)
                {
                    let d = k.wide() - centre;
                    *squares += second.wide() + d * (2.0 * first.wide() + n * d);
                }
            }
            for (i, (mean, var)) in mean.iter_mut().zip(var).enumerate() {
                *mean = T::of(centre[i]);
                // Rounding may leave a constant channel with a variance of −1e-20. NaN stays, as it would not in `max`.
                let squares = if squares[i] < 0.0 { 0.0 } else { squares[i] };
                *var = T::of(squares / count as f64);
            }
        });
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Whether `mean` and `var` are those of `y` by their definition, as well as sums of `T` can tell.
    pub(in super::super) fn check<T: Real>(y: &[T], [mean, var]: [&[T]; 2]) -> Result<(), String> {
        let (c, eps) = (mean.len(), T::epsilon().wide());
        for channel in 0..c {
            let y: Vec<f64> = y[channel..].iter().step_by(c).map(|y| y.wide()).collect();
            let n = y.len() as f64;
            let exact = y.iter().sum::<f64>() / n;
            let square = y.iter().map(|y| (y - exact).powi(2)).sum::<f64>() / n;
            let largest = y.iter().fold(0.0f64, |m, y| m.max(y.abs()));
            let (mean, var) = (mean[channel].wide(), var[channel].wide());
            // Deviations are rounded once, and sums of them like a random walk.
            let steps = eps * (4.0 + n.sqrt());
            // Written so that a NaN fails.
            let close = (mean - exact).abs() <= 2.0 * eps * largest + steps * square.sqrt()
                && (var - square).abs() <= 4.0 * steps * square + 1e-300;
            if !close {
                return Err(format!(
                    "channel {channel}: {mean}, {var} for {exact}, {square}"
                ));
            }
        }
        Ok(())
    }

    /// Values far from zero, one of them far from the others, and a constant channel.
    #[test]
    fn nothing_cancels() {
        let (pixels, channels, block) = (1000, 21, 128);
        let value = |i: usize| {
            let (pixel, channel) = (i / channels, i % channels);
            let noise = i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
            let outlier = if pixel == 0 && channel == 1 { 3e3 } else { 0.0 };
            match channel {
                0 => 7.1,
                _ => 1e4 + outlier + noise as f32 / 65536.0,
            }
        };
        let y: Vec<f32> = (0..pixels * channels).map(value).collect();
        let blocks = pixels.div_ceil(block);
        let mut sums = vec![f32::NAN; blocks * len(channels)];
        for (y, sums) in y
            .chunks(block * channels)
            .zip(sums.chunks_mut(len(channels)))
        {
            crate::device::simd::dispatch(Taken { y, channels, sums });
        }
        let (mut mean, mut var) = ([0.0; 21], [0.0; 21]);
        let pixels_of = |b| block.min(pixels - b * block);
        finish(&sums, blocks, pixels_of, &mut mean, &mut var);
        check(&y, [&mean, &var]).unwrap();
        assert!(
            (mean[0] - 7.1).abs() < 1e-6 && var[0] < 1e-12,
            "{mean:?} {var:?}"
        );
    }
}
