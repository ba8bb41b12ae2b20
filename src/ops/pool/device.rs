//! What GPUs launch for pooling over windows (`kernels/pool.cu`).

use super::Windows;
use crate::device::gpu::launch::{Arguments, Grid, Launches, Stored, kernel};
use crate::error::Result;
use crate::ops::pointwise::{THREADS, Units, extent};

/// A kernel with parameters of its own, and behind them those that all of them have.
macro_rules! over_windows {
    (struct $name:ident = $kernel:literal { $($field:ident: $type:ty),* }) => {
        kernel! {
            struct $name = $kernel {
                $($field: $type,)*
                count: u64, units: u32, vector: i32, h: i32, w: i32, oh: i32, ow: i32,
                kernel_h: i32, kernel_w: i32, stride_h: i32, stride_w: i32, padding_h: i32, padding_w: i32,
            }
        }
    };
}
over_windows! { struct Max = "max_pool2d" { x: Stored, y: Stored } }
over_windows! {
    struct MaxGradient = "max_pool2d_gradient" { x: Stored, dy: u64, dy_narrow: i32, dx: Stored }
}
over_windows! { struct Average = "avg_pool2d" { x: Stored, y: Stored, gradient: i32 } }

/// The kernel `$name` with its own fields set, launched with a thread for each of the units of `$pixels` pixels;
/// the map of extent `$from` is read in windows, and `$to` is the map of the windows.
macro_rules! launch {
    ($at:expr, $windows:expr, [$from:expr, $to:expr], $pixels:expr, [$($pointer:expr),*],
     $name:ident { $($field:ident: $value:expr),* $(,)? }) => {{
        let Windows { kernel: [kh, kw], stride: [sh, sw], padding: [ph, pw] } = $windows;
        let (from, to) = ($from, $to);
        let units = Units::new(from.c, &[$($pointer),*]);
        let count = $pixels * units.each;
        let int = |x: usize| $at.int(x);
        // Sums that the kernel forms of positions.
        int(from.h.max(to.h) + 2 * ph + kh + sh)?;
        int(from.w.max(to.w) + 2 * pw + kw + sw)?;
        let arguments = $name {
            $($field: $value,)*
            count: count as u64,
            units: extent($name::KERNEL, units.each)?,
            vector: units.vector.into(),
            h: int(from.h)?, w: int(from.w)?, oh: int(to.h)?, ow: int(to.w)?,
            kernel_h: int(kh)?, kernel_w: int(kw)?, stride_h: int(sh)?, stride_w: int(sw)?,
            padding_h: int(ph)?, padding_w: int(pw)?,
        };
        $at.launch(Grid::cover(count, THREADS as u32), &arguments)
    }};
}

pub(super) fn max_pool2d(at: &mut Launches<'_>, windows: Windows) -> Result<()> {
    let (x, y) = (at.input(0), at.output(0));
    let (from, to) = (at.input_shape(0), at.output_shape(0));
    launch!(
        at,
        windows,
        [from, to],
        to.rows(),
        [y, x],
        Max {
            x: x.into(),
            y: y.into()
        }
    )
}

pub(super) fn max_pool2d_gradient(at: &mut Launches<'_>, windows: Windows) -> Result<()> {
    let (x, dy, dx) = (at.input(0), at.input(1), at.output(0));
    let (from, to) = (at.input_shape(0), at.input_shape(1));
    let pixels = match windows == Windows::HALVES {
        true => from.n * from.h.div_ceil(2) * from.w.div_ceil(2),
        false => from.rows(),
    };
    launch!(
        at,
        windows,
        [from, to],
        pixels,
        [dx, x, dy],
        MaxGradient {
            x: x.into(),
            dy: dy.address(),
            dy_narrow: dy.is_narrow().into(),
            dx: dx.into(),
        }
    )
}

/// The average, or its gradient: an average of `dy` over the windows that each element lies in.
pub(super) fn avg_pool2d(at: &mut Launches<'_>, windows: Windows, gradient: bool) -> Result<()> {
    let (x, y) = (at.input(0), at.output(0));
    let (from, to) = (at.input_shape(0), at.output_shape(0));
    launch!(
        at,
        windows,
        [from, to],
        to.rows(),
        [y, x],
        Average {
            x: x.into(),
            y: y.into(),
            gradient: gradient.into(),
        }
    )
}
