//! The one micro-kernel under every convolution: a small matrix product held in registers.
//!
//! `c[p][j] (+)= Σ a[p]·b[j]`, where each term of the sum takes one scalar of `a` for each of a few rows `p` and
//! a few vectors of consecutive elements `j` of `b`. The sum runs over two nested loops with strides of their
//! own ([`Walk`]), which is all it takes to serve
//! - the convolution: rows are pixels, columns output channels, the sum runs over kernel rows and over the
//!   contiguous (kernel column, input channel);
//! - its input gradient, which is a convolution of the output gradient with the turned kernel;
//! - its weight gradient: rows are output channels, columns the contiguous (kernel column, input channel), the
//!   sum runs over image rows and pixels.

use crate::device::simd::{self, Lanes};

/// Most columns, in vectors, that one tile covers with lanes of this kind.
pub(super) const fn widest<L: Lanes>() -> usize {
    if L::REGISTERS >= 32 { 4 } else { 2 }
}

/// Turns of the inner loop by which vectors are fetched ahead.
const AHEAD: usize = 8;

/// How the operands of a tile are walked; all strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    /// Turns of the outer loop and what each adds to `a` and `b`.
    pub outer: usize,
    pub a_outer: usize,
    pub b_outer: usize,
    /// Turns of the inner loop and what each adds to `a` and `b`.
    pub inner: usize,
    pub a_inner: usize,
    pub b_inner: usize,
    /// From one row to the next.
    pub a_row: usize,
    pub c_row: usize,
    /// Whether `c` is added to, or overwritten.
    pub accumulate: bool,
}

/// Computes `rows` × `columns` of `c`, `columns` at most [`widest`] vectors.
///
/// # Safety
/// With `vectors = ⌈columns/N⌉`: `a` must be readable at every `row·a_row + outer·a_outer + inner·a_inner`,
/// `b` for `vectors·N` elements from every `outer·b_outer + inner·b_inner`, and `c` readable and writable for
/// `columns` elements from every `row·c_row`, with no other access to those meanwhile.
#[inline(always)]
pub(super) unsafe fn strip<L: Lanes>(
    walk: &Walk,
    a: *const L::Elem,
    b: *const L::Elem,
    c: *mut L::Elem,
    rows: usize,
    columns: usize,
) {
    // Accumulators, one row of vectors of `b` and one broadcast scalar fill the registers.
    macro_rules! tiles {
        ($vectors:literal, $most:literal: $($rows:literal)*) => {{
            // Tiles of nearly one height: the arithmetic units want eight sums at least.
            let tiles = rows.div_ceil($most);
            let mut row = 0;
            for tile_index in 0..tiles {
                let height = (rows - row) / (tiles - tile_index);
                // SAFETY: the caller's.
                unsafe {
                    let (a, c) = (a.add(row * walk.a_row), c.add(row * walk.c_row));
                    match height {
                        $($rows => tile::<L, $rows, $vectors>(walk, a, b, c, columns),)*
                        _ => tile::<L, $most, $vectors>(walk, a, b, c, columns),
                    }
                }
                row += height;
            }
        }};
    }
    if L::REGISTERS >= 32 {
        match columns.div_ceil(L::N) {
            1 => tiles!(1, 12: 1 2 3 4 5 6 7 8 9 10 11),
            2 => tiles!(2, 8: 1 2 3 4 5 6 7),
            3 => tiles!(3, 8: 1 2 3 4 5 6 7),
            _ => tiles!(4, 6: 1 2 3 4 5),
        }
    } else {
        match columns.div_ceil(L::N) {
            1 => tiles!(1, 8: 1 2 3 4 5 6 7),
            _ => tiles!(2, 6: 1 2 3 4 5),
        }
    }
}

/// One tile of `P` rows and `V` vectors.
#[inline(always)]
unsafe fn tile<L: Lanes, const P: usize, const V: usize>(
    walk: &Walk,
    mut a: *const L::Elem,
    mut b: *const L::Elem,
    c: *mut L::Elem,
    columns: usize,
) {
    let mut sums = [[L::zero(); V]; P];
    // SAFETY, here and below: the caller's.
    let row = |p: usize| unsafe { std::slice::from_raw_parts_mut(c.add(p * walk.c_row), columns) };
    if walk.accumulate {
        for (p, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = L::load_first(&row(p)[v * L::N..]);
            }
        }
    }
    unsafe {
        for _ in 0..walk.outer {
            let (mut a_now, mut b_now) = (a, b);
            for _ in 0..walk.inner {
                let vectors: [L; V] = std::array::from_fn(|v| L::load_ptr(b_now.add(v * L::N)));
                for v in 0..V {
                    simd::prefetch(b_now.wrapping_add(AHEAD * walk.b_inner + v * L::N));
                }
                for (p, sums) in sums.iter_mut().enumerate() {
                    let scalar = L::splat(*a_now.add(p * walk.a_row));
                    for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                        *sum = scalar.mul_add(vector, *sum);
                    }
                }
                a_now = a_now.wrapping_add(walk.a_inner);
                b_now = b_now.wrapping_add(walk.b_inner);
            }
            a = a.wrapping_add(walk.a_outer);
            b = b.wrapping_add(walk.b_outer);
        }
    }
    for (p, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            sum.store_first(&mut row(p)[v * L::N..]);
        }
    }
}
