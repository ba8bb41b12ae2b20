//! Passes over feature maps with coefficients, or sums, per channel.
//!
//! An NHWC tensor is a matrix with a row per pixel and a column per channel. Several pixels make a
//! *period*: a row long enough for full vectors however few channels there are. Coefficients are
//! laid out once per period, sums are taken per column of a period and then folded into channels.
//! A *segment* (the whole batch, or one image) has its own coefficients and sums; it is cut into
//! *pieces* of a fixed number of periods, the unit of parallel work.

use std::ops::Range;

use rayon::prelude::*;

use crate::device::simd::{self, Lanes, MAX_LANES};
use crate::tensor::{Real, Shape};

/// Least elements of a period: enough vectors in flight to hide the latency of an addition.
const PERIOD: usize = 256;
/// Periods of a piece: with few channels 64 KiB of `f32`, so that a second look finds it in cache.
const PIECE: usize = 64;

/// `S` vectors of the feature maps and `K` of the coefficients to `M` vectors of results.
pub(super) trait Lanewise<const S: usize, const K: usize, const M: usize>:
    Copy + Send + Sync
{
    /// The results. Implementations must be `#[inline(always)]`.
    fn at<L: Lanes>(self, x: [L; S], coefficients: [L; K]) -> [L; M];
}

/// How a feature map is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    channels: usize,
    segments: usize,
    /// Elements of a segment.
    segment: usize,
    /// Elements of a period.
    period: usize,
}

impl Rows {
    /// The whole batch as one segment.
    pub fn of_batch(shape: Shape) -> Self {
        Self::new(shape, 1)
    }

    /// Each image a segment.
    pub fn of_images(shape: Shape) -> Self {
        Self::new(shape, shape.n)
    }

    fn new(shape: Shape, segments: usize) -> Self {
        let c = shape.c;
        let full_vectors = (1..)
            .map(|k| k * c)
            .find(|p| p % MAX_LANES == 0)
            .unwrap_or(c);
        // With an odd and large number of channels, a partial vector per period is the lesser evil.
        let unit = if full_vectors <= 2 * PERIOD {
            full_vectors
        } else {
            c
        };
        Self {
            channels: c,
            segments,
            segment: shape.len() / segments,
            period: unit * PERIOD.div_ceil(unit),
        }
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.segments
    }

    /// Pixels of a segment.
    pub fn pixels(&self) -> usize {
        self.segment / self.channels
    }

    fn piece(&self) -> usize {
        PIECE * self.period
    }

    fn pieces(&self) -> usize {
        self.segment.div_ceil(self.piece())
    }

    /// The part of the tensor that piece `p` of segment `s` covers.
    fn range(&self, s: usize, p: usize) -> Range<usize> {
        let start = p * self.piece();
        let end = (start + self.piece()).min(self.segment);
        s * self.segment + start..s * self.segment + end
    }

    /// Elements that [`Rows::tables`] needs for `k` coefficients.
    pub fn tables_len(&self, k: usize) -> usize {
        self.segments * k * self.period
    }

    /// Lays out the coefficients `f(segment, channel)`.
    pub fn tables<T: Real, const K: usize>(
        &self,
        tables: &mut [T],
        f: impl Fn(usize, usize) -> [T; K],
    ) {
        for (s, tables) in tables
            .chunks_exact_mut(K * self.period)
            .take(self.segments)
            .enumerate()
        {
            for c in 0..self.channels {
                for (k, value) in f(s, c).into_iter().enumerate() {
                    tables[k * self.period + c] = value;
                }
            }
            for table in tables.chunks_exact_mut(self.period) {
                tile(table, self.channels);
            }
        }
    }

    fn tables_of<'a, T, const K: usize>(&self, tables: &'a [T], s: usize) -> [&'a [T]; K] {
        std::array::from_fn(|k| &tables[(s * K + k) * self.period..][..self.period])
    }

    /// `y = f(x, coefficients)`; an `x` that is `None` stands for what `y` holds.
    pub fn map<T: Real, const S: usize, const K: usize>(
        &self,
        f: impl Lanewise<S, K, 1>,
        x: [Option<&[T]>; S],
        tables: &[T],
        y: &mut [T],
    ) {
        y.par_chunks_mut(self.segment)
            .enumerate()
            .for_each(|(s, y)| {
                let tables = self.tables_of(tables, s);
                y.par_chunks_mut(self.piece())
                    .enumerate()
                    .for_each(|(p, y)| {
                        let x = x.map(|x| x.map(|x| &x[self.range(s, p)]));
                        simd::dispatch(Map { f, x, tables, y });
                    });
            });
    }

    /// Elements that [`Rows::sum`] needs for `m` sums.
    pub fn sums_len(&self, m: usize) -> usize {
        self.segments * self.pieces() * m * self.period
    }

    /// `Σ f(x, coefficients)` over the pixels of each segment: sum `m` of channel `c` in segment `s`
    /// then lies at [`Rows::total`]. Pieces are summed in `T`, and their sums in `f64`.
    pub fn sum<T: Real, const S: usize, const K: usize, const M: usize>(
        &self,
        f: impl Lanewise<S, K, M>,
        x: [&[T]; S],
        tables: &[T],
        sums: &mut [T],
    ) {
        let (period, pieces) = (self.period, self.pieces());
        sums[..self.sums_len(M)]
            .par_chunks_mut(M * period)
            .enumerate()
            .for_each(|(i, sums)| {
                let (s, p) = (i / pieces, i % pieces);
                let x = x.map(|x| &x[self.range(s, p)]);
                let tables = self.tables_of(tables, s);
                let mut sums = split::<T, M>(sums, period);
                simd::dispatch(Sum {
                    f,
                    x,
                    tables,
                    sums: sums.each_mut().map(|s| &mut **s),
                });
                sums.iter_mut().for_each(|sums| fold(sums, self.channels));
            });
        self.add_pieces::<T, M>(sums);
    }

    /// [`Rows::map`] and [`Rows::sum`] in one pass: the first result goes to `y`, the second is summed.
    pub fn map_sum<T: Real, const S: usize, const K: usize>(
        &self,
        f: impl Lanewise<S, K, 2>,
        x: [Option<&[T]>; S],
        tables: &[T],
        y: &mut [T],
        sums: &mut [T],
    ) {
        let period = self.period;
        y.par_chunks_mut(self.segment)
            .zip(sums.par_chunks_mut(self.pieces() * period))
            .enumerate()
            .for_each(|(s, (y, sums))| {
                let tables = self.tables_of(tables, s);
                y.par_chunks_mut(self.piece())
                    .zip(sums.par_chunks_mut(period))
                    .enumerate()
                    .for_each(|(p, (y, sums))| {
                        let x = x.map(|x| x.map(|x| &x[self.range(s, p)]));
                        simd::dispatch(MapSum {
                            f,
                            x,
                            tables,
                            y,
                            sums: &mut *sums,
                        });
                        fold(sums, self.channels);
                    });
            });
        self.add_pieces::<T, 1>(sums);
    }

    /// Adds the folded sums of all pieces of a segment to those of its first.
    fn add_pieces<T: Real, const M: usize>(&self, sums: &mut [T]) {
        let (period, pieces) = (self.period, self.pieces());
        for sums in sums[..self.sums_len(M)].chunks_exact_mut(pieces * M * period) {
            for m in 0..M {
                for first in (0..self.channels).step_by(MAX_LANES) {
                    let mut total = [0.0; MAX_LANES];
                    let columns = MAX_LANES.min(self.channels - first);
                    for p in 0..pieces {
                        let sums = &sums[(p * M + m) * period + first..][..columns];
                        for (total, sum) in total.iter_mut().zip(sums) {
                            *total += sum.wide();
                        }
                    }
                    for (sum, total) in sums[m * period + first..][..columns].iter_mut().zip(total)
                    {
                        *sum = T::of(total);
                    }
                }
            }
        }
    }

    /// Where [`Rows::sum`] puts sum `m` of `M` of channel `c` in segment `s`.
    pub fn total<const M: usize>(&self, s: usize, m: usize, c: usize) -> usize {
        (s * self.pieces() * M + m) * self.period + c
    }

    /// Prepares [`Rows::moments`] in one pass over `x`, with `sums_len(3)` elements for the sums.
    ///
    /// Each piece is looked at twice while it is in cache: for its mean `k`, then for the sums of
    /// `x − k` and of `(x − k)²`. These determine mean and variance whatever `k` is; that it is close to
    /// the mean avoids the cancellation of `E x² − (E x)²`.
    pub fn deviations<T: Real>(&self, x: &[T], sums: &mut [T]) {
        let (period, pieces) = (self.period, self.pieces());
        sums[..self.sums_len(3)]
            .par_chunks_mut(3 * period)
            .enumerate()
            .for_each(|(i, sums)| {
                let x = &x[self.range(i / pieces, i % pieces)];
                let [mean, first, second] = split(sums, period);
                simd::dispatch(Sum {
                    f: Identity,
                    x: [x],
                    tables: [],
                    sums: [mean],
                });
                fold(mean, self.channels);
                let count = T::of((x.len() / self.channels) as f64);
                mean[..self.channels]
                    .iter_mut()
                    .for_each(|mean| *mean /= count);
                tile(mean, self.channels);
                simd::dispatch(Sum {
                    f: Deviation,
                    x: [x],
                    tables: [mean],
                    sums: [first, second],
                });
                fold(first, self.channels);
                fold(second, self.channels);
            });
    }

    /// Mean and biased variance of each group of `width` neighbouring channels in each segment, from the
    /// sums of [`Rows::deviations`].
    pub fn moments<T: Real>(&self, sums: &[T], width: usize, mean: &mut [T], var: &mut [T]) {
        let groups = self.channels / width;
        mean.par_iter_mut()
            .zip(var)
            .enumerate()
            .for_each(|(i, (mean, var))| {
                let (s, first) = (i / groups, i % groups * width);
                let moments = self.moments_of(sums, s, first..first + width);
                [*mean, *var] = moments.map(T::of);
            });
    }

    fn moments_of<T: Real>(&self, sums: &[T], s: usize, channels: Range<usize>) -> [f64; 2] {
        let count = (self.pixels() * channels.len()) as f64;
        let mut mean = 0.0;
        for (n, [k, first, _]) in self.partial(sums, s, channels.clone()) {
            mean += (n * k + first) / count;
        }
        let mut squares = 0.0;
        for (n, [k, first, second]) in self.partial(sums, s, channels) {
            let d = k - mean;
            squares += second + d * (2.0 * first + n * d);
        }
        // Rounding may leave a constant channel with a variance of −1e-20. Not by `max`, which would take a NaN for 0.
        let squares = if squares < 0.0 { 0.0 } else { squares };
        [mean, squares / count]
    }

    /// Pixels, shift and the two sums of deviations from it, piece by piece.
    fn partial<T: Real>(
        &self,
        sums: &[T],
        s: usize,
        channels: Range<usize>,
    ) -> impl Iterator<Item = (f64, [f64; 3])> {
        (0..self.pieces()).flat_map(move |p| {
            let pixels = (self.range(s, p).len() / self.channels) as f64;
            let piece = (s * self.pieces() + p) * 3;
            channels.clone().map(move |c| {
                (
                    pixels,
                    [0, 1, 2].map(|m| sums[(piece + m) * self.period + c].wide()),
                )
            })
        })
    }
}

/// The first `M` periods.
fn split<T, const M: usize>(sums: &mut [T], period: usize) -> [&mut [T]; M] {
    let mut periods = sums.chunks_exact_mut(period);
    std::array::from_fn(|_| periods.next().expect("room for M periods"))
}

/// Repeats the first `c` elements.
fn tile<T: Copy>(table: &mut [T], c: usize) {
    for start in (c..table.len()).step_by(c) {
        table.copy_within(..c, start);
    }
}

/// Adds all groups of `c` elements into the first.
fn fold<T: Real>(sums: &mut [T], c: usize) {
    let (first, rest) = sums.split_at_mut(c);
    for group in rest.chunks_exact(c) {
        first.iter_mut().zip(group).for_each(|(a, &b)| *a += b);
    }
}

#[derive(Clone, Copy)]
pub(super) struct Identity;

impl Lanewise<1, 0, 1> for Identity {
    #[inline(always)]
    fn at<L: Lanes>(self, x: [L; 1], _: [L; 0]) -> [L; 1] {
        x
    }
}

#[derive(Clone, Copy)]
struct Deviation;

impl Lanewise<1, 1, 2> for Deviation {
    #[inline(always)]
    fn at<L: Lanes>(self, [x]: [L; 1], [k]: [L; 1]) -> [L; 2] {
        let d = x - k;
        [d, d * d]
    }
}

/// The lanes of each slice from `column` on: all of them where `full`, else as many as there are.
#[inline(always)]
fn load<L: Lanes, const S: usize>(from: [&[L::Elem]; S], column: usize, full: bool) -> [L; S] {
    let mut lanes = [L::zero(); S];
    for (lanes, from) in lanes.iter_mut().zip(from) {
        *lanes = if full {
            L::load(&from[column..])
        } else {
            L::load_first(&from[column..])
        };
    }
    lanes
}

/// [`Rows::map`] of one piece.
struct Map<'a, T, F, const S: usize, const K: usize> {
    f: F,
    x: [Option<&'a [T]>; S],
    tables: [&'a [T]; K],
    y: &'a mut [T],
}

impl<T: Real, F: Lanewise<S, K, 1>, const S: usize, const K: usize> simd::Kernel<T>
    for Map<'_, T, F, S, K>
{
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let period = self.tables[0].len();
        for (row, y) in self.y.chunks_mut(period).enumerate() {
            let mut x = self.x;
            for x in x.iter_mut().flatten() {
                *x = &x[row * period..][..y.len()];
            }
            let full = y.len() - y.len() % L::N;
            for column in (0..full).step_by(L::N) {
                let [result] = self.f.at(
                    load_or::<L, S>(x, y, column, true),
                    load(self.tables, column, true),
                );
                result.store(&mut y[column..]);
            }
            if full < y.len() {
                let [result] = self.f.at(
                    load_or::<L, S>(x, y, full, false),
                    load(self.tables, full, false),
                );
                result.store_first(&mut y[full..]);
            }
        }
    }
}

/// As [`load`], from `y` where there is no slice.
#[inline(always)]
fn load_or<L: Lanes, const S: usize>(
    from: [Option<&[L::Elem]>; S],
    y: &[L::Elem],
    column: usize,
    full: bool,
) -> [L; S] {
    let mut slices = [y; S];
    for (slice, from) in slices.iter_mut().zip(from) {
        *slice = from.unwrap_or(y);
    }
    load(slices, column, full)
}

/// [`Rows::map_sum`] of one piece, not yet folded.
struct MapSum<'a, T, F, const S: usize, const K: usize> {
    f: F,
    x: [Option<&'a [T]>; S],
    tables: [&'a [T]; K],
    y: &'a mut [T],
    sums: &'a mut [T],
}

impl<T: Real, F: Lanewise<S, K, 2>, const S: usize, const K: usize> simd::Kernel<T>
    for MapSum<'_, T, F, S, K>
{
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let period = self.sums.len();
        self.sums.fill(T::zero());
        for (row, y) in self.y.chunks_mut(period).enumerate() {
            let mut x = self.x;
            for x in x.iter_mut().flatten() {
                *x = &x[row * period..][..y.len()];
            }
            let full = y.len() - y.len() % L::N;
            for column in (0..full).step_by(L::N) {
                let [result, term] = self.f.at(
                    load_or::<L, S>(x, y, column, true),
                    load(self.tables, column, true),
                );
                result.store(&mut y[column..]);
                let sums = &mut self.sums[column..];
                (L::load(sums) + term).store(sums);
            }
            if full < y.len() {
                let [result, term] = self.f.at(
                    load_or::<L, S>(x, y, full, false),
                    load(self.tables.map(|table| &table[..y.len()]), full, false),
                );
                result.store_first(&mut y[full..]);
                let sums = &mut self.sums[full..y.len()];
                (L::load_first(sums) + term).store_first(sums);
            }
        }
    }
}

/// [`Rows::sum`] of one piece, not yet folded.
struct Sum<'a, T, F, const S: usize, const K: usize, const M: usize> {
    f: F,
    x: [&'a [T]; S],
    tables: [&'a [T]; K],
    sums: [&'a mut [T]; M],
}

impl<T: Real, F: Lanewise<S, K, M>, const S: usize, const K: usize, const M: usize> simd::Kernel<T>
    for Sum<'_, T, F, S, K, M>
{
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(mut self) {
        let (len, period) = (self.x[0].len(), self.sums[0].len());
        self.sums.iter_mut().for_each(|sums| sums.fill(T::zero()));
        for start in (0..len).step_by(period) {
            let width = period.min(len - start);
            let mut x = self.x;
            for x in &mut x {
                *x = &x[start..][..width];
            }
            let full = width - width % L::N;
            for column in (0..full).step_by(L::N) {
                let terms = self.f.at(
                    load::<L, S>(x, column, true),
                    load(self.tables, column, true),
                );
                for (sums, term) in self.sums.iter_mut().zip(terms) {
                    let sums = &mut sums[column..];
                    (L::load(sums) + term).store(sums);
                }
            }
            if full < width {
                let terms = self
                    .f
                    .at(load::<L, S>(x, full, false), load(self.tables, full, false));
                for (sums, term) in self.sums.iter_mut().zip(terms) {
                    let sums = &mut sums[full..width];
                    (L::load_first(sums) + term).store_first(sums);
                }
            }
        }
    }
}
