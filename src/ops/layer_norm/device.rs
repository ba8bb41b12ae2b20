//! What GPUs launch for layer normalisation: the end of `kernels/norm.cu`.

use crate::device::gpu::launch::{Full, Grid, Launches, Stored, kernel};
use crate::error::Result;
use crate::ops::norm::{FINISH_THREADS, THREADS, Walk};
use crate::ops::pointwise::{extent, width};
use crate::tensor::Shape;

/// Bytes of the four numbers that the gradient keeps of each row.
const MOMENTS: usize = 4 * size_of::<f32>();

kernel! {
    struct LayerNormKernel = "layer_norm" {
        x: Stored, y: Stored, gamma: Full, beta: Full, eps: f32, rows: u64, channels: u32, lanes: u32,
    }
}
kernel! {
    struct LayerNormRows = "layer_norm_rows" {
        x: Stored, dy: u64, dy_narrow: i32, gamma: Full, moments: Full, eps: f32,
        rows: u64, channels: u32, lanes: u32,
    }
}
kernel! {
    struct LayerNormGradientSums = "layer_norm_gradient_sums" {
        x: Stored, dy: u64, dy_narrow: i32, moments: Full, partials: Full,
        len: u64, channels: u32, period: u32, across: u32, strips: u32, pieces: u32, steps: u32,
    }
}
kernel! {
    struct LayerNormGradientFinish = "layer_norm_gradient_finish" {
        partials: Full, dgamma: Full, dbeta: Full, channels: u32, pieces: u32,
    }
}
kernel! {
    struct LayerNormGradientKernel = "layer_norm_gradient" {
        x: Stored, dy: u64, dy_narrow: i32, gamma: Full, moments: Full, dx: Stored,
        rows: u64, channels: u32, lanes: u32,
    }
}

/// Lanes that share a row, and the grid in which each row has so many.
fn lanes(shape: Shape, n: usize) -> (u32, Grid) {
    let moves = match shape.c.is_multiple_of(n) {
        true => shape.c / n,
        false => shape.c,
    };
    let lanes = moves.next_power_of_two().min(32);
    let grid = Grid::new(shape.rows().div_ceil(THREADS / lanes), THREADS as u32);
    (lanes as u32, grid)
}

/// Launches `y = γ·x̂ + β`.
pub(super) fn forward(at: &mut Launches<'_>, eps: f64) -> Result<()> {
    let (x, shape) = (at.input(0), at.input_shape(0));
    if shape.is_empty() {
        return Ok(());
    }
    let (lanes, grid) = lanes(shape, width(x.is_narrow()));
    let arguments = LayerNormKernel {
        x: x.into(),
        y: at.output(0).into(),
        gamma: at.input(1).into(),
        beta: at.input(2).into(),
        eps: eps as f32,
        rows: shape.rows() as u64,
        channels: extent("layer_norm", shape.c)?,
        lanes,
    };
    at.launch(grid, &arguments)
}

/// Bytes of working memory of [`gradient`].
pub(super) fn gradient_scratch(x: Shape) -> usize {
    if x.is_empty() {
        return 0;
    }
    let walks = [false, true].map(|narrow| Walk::reducing(1, x, width(narrow)).partials());
    MOMENTS * x.rows() + walks[0].max(walks[1])
}

/// Launches the gradient; inputs `dy`, `x`, `gamma`, outputs `dx`, `dgamma`, `dbeta`.
pub(super) fn gradient(at: &mut Launches<'_>, eps: f64) -> Result<()> {
    let (dy, x, gamma, shape) = (at.input(0), at.input(1), at.input(2), at.input_shape(1));
    if shape.c == 0 {
        return Ok(());
    }
    let (moments, partials) = (at.scratch(), at.scratch().after(MOMENTS * shape.rows()));
    let (rows, channels) = (shape.rows() as u64, extent("layer_norm", shape.c)?);
    let (lanes, grid) = lanes(shape, width(x.is_narrow()));
    let arguments = LayerNormRows {
        x: x.into(),
        dy: dy.address(),
        dy_narrow: dy.is_narrow().into(),
        gamma: gamma.into(),
        moments: moments.into(),
        eps: eps as f32,
        rows,
        channels,
        lanes,
    };
    at.launch(grid, &arguments)?;

    let walk = Walk::reducing(1, shape, width(x.is_narrow()));
    let sizes = walk.sizes("layer_norm_gradient_sums")?;
    let arguments = LayerNormGradientSums {
        x: x.into(),
        dy: dy.address(),
        dy_narrow: dy.is_narrow().into(),
        moments: moments.into(),
        partials: partials.into(),
        len: sizes.len,
        channels: sizes.channels,
        period: sizes.period,
        across: sizes.across,
        strips: sizes.strips,
        pieces: sizes.pieces,
        steps: sizes.steps,
    };
    at.launch(walk.grid(), &arguments)?;
    let arguments = LayerNormGradientFinish {
        partials: partials.into(),
        dgamma: at.output(1).into(),
        dbeta: at.output(2).into(),
        channels,
        pieces: sizes.pieces,
    };
    at.launch(Grid::new(shape.c, FINISH_THREADS), &arguments)?;

    let arguments = LayerNormGradientKernel {
        x: x.into(),
        dy: dy.address(),
        dy_narrow: dy.is_narrow().into(),
        gamma: gamma.into(),
        moments: moments.into(),
        dx: at.output(0).into(),
        rows,
        channels,
        lanes,
    };
    at.launch(grid, &arguments)
}
