//! What a GPU launches for a convolution and its gradients: `kernels/conv_direct.cu`.

use super::Geometry;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::error::Result;

/// Threads of a block of `conv_direct.cu`.
const THREADS: usize = 256;
/// Output pixels of a piece of the weight gradient, at least.
const PIECE: usize = 64;
/// Blocks that a weight gradient is cut into, about: enough for any GPU, and fixed, as the pieces decide how sums
/// are rounded.
const BLOCKS: usize = 2048;

macro_rules! direct {
    ($(#[$meta:meta])* struct $name:ident = $kernel:literal { $($field:ident: $type:ty),* }) => {
        kernel! {
            $(#[$meta])*
            struct $name = $kernel {
                $($field: $type,)*
                h: i32, w: i32, c: i32, oh: i32, ow: i32, o: i32, kh: i32, kw: i32,
                sh: i32, sw: i32, ph: i32, pw: i32,
            }
        }
    };
}
direct! { struct Direct = "conv_direct" { x: Stored, weights: Full, y: Stored, len: u64 } }
direct! {
    struct DirectInputGradient = "conv_direct_input_gradient" {
        dy: Stored, weights: Full, dx: Stored, len: u64
    }
}
direct! {
    struct DirectWeightGradient = "conv_direct_weight_gradient" {
        x: Stored, dy: u64, dy_narrow: i32, dw: Full, len: u64, pixels: u64, piece: u64
    }
}

kernel! {
    struct AddPieces = "conv_add_pieces" { partials: Full, dw: Full, len: u64, pieces: i32 }
}

/// One of the above with the extents of a geometry behind its own fields.
macro_rules! with_extents {
    ($at:expr, $geometry:expr, $name:ident { $($field:ident: $value:expr),* $(,)? }) => {{
        let (x, w, y) = ($geometry.x, $geometry.w, $geometry.output());
        let int = |x: usize| $at.int(x);
        let [sh, sw] = $geometry.stride;
        let [ph, pw] = $geometry.padding;
        $name {
            $($field: $value,)*
            h: int(x.h)?, w: int(x.w)?, c: int(x.c)?, oh: int(y.h)?, ow: int(y.w)?, o: int(y.c)?,
            kh: int(w.h)?, kw: int(w.w)?, sh: int(sh)?, sw: int(sw)?, ph: int(ph)?, pw: int(pw)?,
        }
    }};
}

/// Launches `y = x ∗ w`.
pub(in crate::ops) fn forward(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [x, w, y]: [Pointer; 3],
) -> Result<()> {
    let len = geometry.output().len();
    let arguments = with_extents!(
        at,
        geometry,
        Direct {
            x: x.into(),
            weights: w.into(),
            y: y.into(),
            len: len as u64,
        }
    );
    at.launch(Grid::cover(len, THREADS as u32), &arguments)
}

/// Launches the gradient for `x`.
pub(in crate::ops) fn input_gradient(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [w, dy, dx]: [Pointer; 3],
) -> Result<()> {
    let len = geometry.x.len();
    let arguments = with_extents!(
        at,
        geometry,
        DirectInputGradient {
            dy: dy.into(),
            weights: w.into(),
            dx: dx.into(),
            len: len as u64,
        }
    );
    at.launch(Grid::cover(len, THREADS as u32), &arguments)
}

/// Output pixels of a piece of the direct weight gradient, and the number of pieces.
fn pieces(geometry: &Geometry) -> (usize, usize) {
    let pixels = geometry.output().rows();
    let most = BLOCKS.div_ceil(geometry.w.len().div_ceil(THREADS));
    super::pieces(pixels, pixels.div_ceil(most).max(PIECE))
}

/// Launches the gradient for `w`.
pub(in crate::ops) fn weight_gradient(
    at: &mut Launches<'_>,
    geometry: &Geometry,
    [x, dy, dw]: [Pointer; 3],
) -> Result<()> {
    let len = geometry.w.len();
    let (piece, count) = pieces(geometry);
    let partials = if count == 1 { dw } else { at.scratch() };
    let arguments = with_extents!(
        at,
        geometry,
        DirectWeightGradient {
            x: x.into(),
            dy: dy.address(),
            dy_narrow: i32::from(dy.is_narrow()),
            dw: partials.into(),
            len: len as u64,
            pixels: geometry.output().rows() as u64,
            piece: piece as u64,
        }
    );
    let mut grid = Grid::cover(len, THREADS as u32);
    grid.blocks[1] = u32::try_from(count).unwrap_or(u32::MAX);
    at.launch(grid, &arguments)?;
    if count == 1 {
        return Ok(());
    }
    let arguments = AddPieces {
        partials: partials.into(),
        dw: dw.into(),
        len: len as u64,
        pieces: at.int(count)?,
    };
    at.launch(Grid::new(len.div_ceil(32), THREADS as u32), &arguments)
}

/// Bytes of scratch that [`weight_gradient`] needs.
pub(super) fn weight_gradient_scratch(geometry: &Geometry) -> usize {
    match pieces(geometry).1 {
        1 => 0,
        count => count * geometry.w.len() * size_of::<f32>(),
    }
}
