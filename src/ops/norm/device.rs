//! What GPUs launch for batch and group normalisation: `kernels/norm.cu`.

use super::{Norm, Statistics};
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::error::Result;
use crate::ops::pointwise::{extent, gcd, steps, width};
use crate::tensor::Shape;

/// Threads of a block, and of one that adds up pieces.
pub(in crate::ops) const THREADS: usize = 256;
pub(in crate::ops) const FINISH_THREADS: u32 = 128;
/// Most vectors of a block along a row: together with the number of rows that are left for a block, this
/// decides how many partial sums there are.
const ACROSS: usize = 32;
/// Vectors of a line of the caches: blocks beside one another are cut between lines.
const LINE: usize = 8;
/// Steps of a block of an elementwise pass.
const VECTORS: usize = 4;

/// How a kernel walks down a matrix of the channels of all pixels of each segment.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Walk {
    segments: usize,
    /// Elements of a segment.
    len: usize,
    channels: usize,
    /// Elements of a row as it is walked: as many rows as make whole vectors, if they are few.
    period: usize,
    /// Vectors of a block along a period, and blocks beside one another.
    across: usize,
    strips: usize,
    /// Blocks down a segment, and steps of each.
    pieces: usize,
    steps: usize,
}

impl Walk {
    /// One that reduces, in vectors of `n` elements.
    pub fn reducing(segments: usize, shape: Shape, n: usize) -> Self {
        let walk = Self::elementwise(segments, shape, n);
        let work = walk.total() * walk.segments * walk.strips;
        walk.cut(steps(work))
    }

    fn elementwise(segments: usize, shape: Shape, n: usize) -> Self {
        let c = shape.c;
        let vectors = c / gcd(c, n);
        let (period, strips) = if c.is_multiple_of(n) {
            (c, vectors.div_ceil(ACROSS))
        } else if vectors <= THREADS {
            (vectors * n, 1)
        } else {
            (c, c.div_ceil(n).div_ceil(ACROSS))
        };
        let across = match strips {
            1 => period.div_ceil(n),
            _ => c.div_ceil(n).div_ceil(strips).next_multiple_of(LINE),
        };
        let walk = Self {
            segments,
            len: shape.len() / segments.max(1),
            channels: c,
            period,
            across,
            strips,
            pieces: 0,
            steps: 0,
        };
        walk.cut(VECTORS)
    }

    /// Elements that all blocks beside one another take at a step.
    fn step(&self) -> usize {
        THREADS / self.across * self.period
    }

    /// Steps down a segment.
    fn total(&self) -> usize {
        self.len.div_ceil(self.step())
    }

    fn cut(self, steps: usize) -> Self {
        let pieces = self.total().div_ceil(steps);
        Self {
            pieces,
            steps,
            ..self
        }
    }

    pub fn grid(&self) -> Grid {
        let blocks = self.segments * self.pieces * self.strips;
        Grid::new(blocks, THREADS as u32)
    }

    /// Bytes of a pair of numbers for each channel of each piece.
    pub fn partials(&self) -> usize {
        PAIR * self.segments * self.pieces * self.channels
    }

    /// As the kernel of that name is told.
    pub fn sizes(&self, kernel: &str) -> Result<Sizes> {
        let int = |n| extent(kernel, n);
        Ok(Sizes {
            len: self.len as u64,
            channels: int(self.channels)?,
            period: int(self.period)?,
            across: int(self.across)?,
            strips: int(self.strips)?,
            pieces: int(self.pieces)?,
            steps: int(self.steps)?,
        })
    }
}

/// The sizes that kernels are told.
pub(in crate::ops) struct Sizes {
    pub len: u64,
    pub channels: u32,
    pub period: u32,
    pub across: u32,
    pub strips: u32,
    pub pieces: u32,
    pub steps: u32,
}

const PAIR: usize = 2 * size_of::<f32>();

kernel! {
    struct NormStatistics = "norm_statistics" {
        x: Stored, partials: Full,
        len: u64, channels: u32, period: u32, across: u32, strips: u32, pieces: u32, steps: u32,
    }
}
kernel! {
    struct NormStatisticsFinish = "norm_statistics_finish" {
        partials: Full, counts: Full, mean: Full, var: Full, rows: u64, rows_of_piece: u64,
        channels: u32, width: u32, pieces: u32,
    }
}
kernel! {
    struct NormalizeKernel = "normalize" {
        x: Stored, y: Stored,
        mean: Full, var: Full, gamma: Full, beta: Full, eps: f32, width: u32, activation: i32,
        len: u64, channels: u32, period: u32, across: u32, strips: u32, pieces: u32, steps: u32,
    }
}
kernel! {
    struct NormGradientSums = "norm_gradient_sums" {
        x: Stored, dy: u64, dy_narrow: i32, partials: Full,
        mean: Full, var: Full, gamma: Full, beta: Full, eps: f32, width: u32, activation: i32,
        len: u64, channels: u32, period: u32, across: u32, strips: u32, pieces: u32, steps: u32,
    }
}
kernel! {
    struct NormGradientFinish = "norm_gradient_finish" {
        partials: Full, var: Full, gamma: Full, eps: f32,
        dgamma: Full, dbeta: Full, coefficients: Full,
        count: u64, channels: u32, width: u32, segments: u32, pieces: u32,
    }
}
kernel! {
    struct NormGradientKernel = "norm_gradient" {
        x: Stored, dy: u64, dy_narrow: i32, coefficients: Full, dx: Stored,
        mean: Full, var: Full, gamma: Full, beta: Full, eps: f32, width: u32, activation: i32,
        len: u64, channels: u32, period: u32, across: u32, strips: u32, pieces: u32, steps: u32,
    }
}
kernel! {
    struct RunningStatisticsKernel = "running_statistics" { layers: Full, keep: f32 }
}

/// Mean and sum of squared deviations of each channel of the pieces of a segment, `segments × pieces × channels`
/// pairs of f32 that a kernel has left.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Partials {
    pub partials: Pointer,
    /// Rows of each piece as f32, null where all have `rows_of_piece` but the last.
    pub counts: Pointer,
    /// Rows of a segment.
    pub rows: usize,
    pub rows_of_piece: usize,
    pub channels: usize,
    /// Channels of a group.
    pub width: usize,
    pub pieces: usize,
}

impl Partials {
    /// Launches what makes mean and variance of each segment and group of them.
    pub fn finish(
        &self,
        at: &mut Launches<'_>,
        segments: usize,
        [mean, var]: [Pointer; 2],
    ) -> Result<()> {
        let int = |n| extent("norm_statistics_finish", n);
        let arguments = NormStatisticsFinish {
            partials: self.partials.into(),
            counts: self.counts.into(),
            mean: mean.into(),
            var: var.into(),
            rows: self.rows as u64,
            rows_of_piece: self.rows_of_piece as u64,
            channels: int(self.channels)?,
            width: int(self.width)?,
            pieces: int(self.pieces)?,
        };
        let groups = segments * (self.channels / self.width);
        at.launch(Grid::new(groups, FINISH_THREADS), &arguments)
    }
}

impl Norm {
    fn segments(&self, x: Shape) -> usize {
        match self.statistics {
            Statistics::Batch | Statistics::Constant => 1,
            Statistics::Groups(_) => x.n,
        }
    }

    /// Channels of a group.
    fn width(&self, x: Shape) -> usize {
        x.c / self.statistics.groups(x)
    }

    fn reducing(&self, x: Shape, narrow: bool) -> Walk {
        Walk::reducing(self.segments(x), x, width(narrow))
    }

    /// Bytes of working memory of [`Norm::launch_statistics`].
    pub fn statistics_scratch(&self, x: Shape) -> usize {
        match x.is_empty() {
            true => 0,
            false => {
                let [wide, narrow] = [false, true].map(|n| self.reducing(x, n).partials());
                wide.max(narrow)
            }
        }
    }

    /// Mean and variance of input 0, to `mean` and `var`.
    pub fn launch_statistics(
        &self,
        at: &mut Launches<'_>,
        mean: Pointer,
        var: Pointer,
    ) -> Result<()> {
        let (x, shape, partials) = (at.input(0), at.input_shape(0), at.scratch());
        if shape.is_empty() {
            return Ok(());
        }
        let walk = self.reducing(shape, x.is_narrow());
        let sizes = walk.sizes("norm_statistics")?;
        let reduction = NormStatistics {
            x: x.into(),
            partials: partials.into(),
            len: sizes.len,
            channels: sizes.channels,
            period: sizes.period,
            across: sizes.across,
            strips: sizes.strips,
            pieces: sizes.pieces,
            steps: sizes.steps,
        };
        at.launch(walk.grid(), &reduction)?;
        Partials {
            partials,
            counts: Pointer::NULL,
            rows: walk.len / walk.channels,
            rows_of_piece: walk.steps * walk.step() / walk.channels,
            channels: walk.channels,
            width: self.width(shape),
            pieces: walk.pieces,
        }
        .finish(at, walk.segments, [mean, var])
    }

    /// Normalises input 0 with inputs 1 and 2, `gamma` and `beta`, and the given statistics into output 0.
    pub fn launch_normalise(
        &self,
        at: &mut Launches<'_>,
        mean: Pointer,
        var: Pointer,
    ) -> Result<()> {
        let (x, shape) = (at.input(0), at.input_shape(0));
        if shape.is_empty() {
            return Ok(());
        }
        let walk = Walk::elementwise(self.segments(shape), shape, width(x.is_narrow()));
        let sizes = walk.sizes("normalize")?;
        let arguments = NormalizeKernel {
            x: x.into(),
            y: at.output(0).into(),
            mean: mean.into(),
            var: var.into(),
            gamma: at.input(1).into(),
            beta: at.input(2).into(),
            eps: self.eps as f32,
            width: extent("normalize", self.width(shape))?,
            activation: self.activation.number(),
            len: sizes.len,
            channels: sizes.channels,
            period: sizes.period,
            across: sizes.across,
            strips: sizes.strips,
            pieces: sizes.pieces,
            steps: sizes.steps,
        };
        at.launch(walk.grid(), &arguments)
    }

    /// Bytes of the two coefficients of each group, which lie before the partial sums.
    fn coefficients(&self, x: Shape) -> usize {
        (PAIR * self.statistics.shape(x).len()).next_multiple_of(16)
    }

    /// Bytes of working memory of [`Norm::launch_gradient`].
    pub fn gradient_scratch(&self, x: Shape) -> usize {
        self.coefficients(x) + self.statistics_scratch(x)
    }

    /// The launches of [`super::NormGradient`].
    pub fn launch_gradient(&self, at: &mut Launches<'_>) -> Result<()> {
        let (x, shape, dy) = (at.input(0), at.input_shape(0), at.input(5));
        if shape.c == 0 {
            return Ok(());
        }
        let segments = self.segments(shape);
        let walk = self.reducing(shape, x.is_narrow());
        let reducing = walk.sizes("norm_gradient_sums")?;
        let (gamma, beta, mean, var) = (at.input(1), at.input(2), at.input(3), at.input(4));
        let (eps, activation) = (self.eps as f32, self.activation.number());
        let width_of_group = extent("norm_gradient", self.width(shape))?;
        let partials = at.scratch().after(self.coefficients(shape));
        let sums = NormGradientSums {
            x: x.into(),
            dy: dy.address(),
            dy_narrow: dy.is_narrow().into(),
            partials: partials.into(),
            mean: mean.into(),
            var: var.into(),
            gamma: gamma.into(),
            beta: beta.into(),
            eps,
            width: width_of_group,
            activation,
            len: reducing.len,
            channels: reducing.channels,
            period: reducing.period,
            across: reducing.across,
            strips: reducing.strips,
            pieces: reducing.pieces,
            steps: reducing.steps,
        };
        at.launch(walk.grid(), &sums)?;

        let groups = self.statistics.shape(shape).len();
        let coefficients = match self.statistics {
            Statistics::Constant => Pointer::NULL,
            Statistics::Batch | Statistics::Groups(_) => at.scratch(),
        };
        // Blocks of groups that are more than one channel of one segment.
        let more = match self.statistics {
            Statistics::Groups(_) if segments * self.width(shape) != 1 => groups,
            _ => 0,
        };
        let finish = NormGradientFinish {
            partials: partials.into(),
            var: var.into(),
            gamma: gamma.into(),
            eps,
            dgamma: at.output(1).into(),
            dbeta: at.output(2).into(),
            coefficients: coefficients.into(),
            count: (walk.len / walk.channels * self.width(shape)) as u64,
            channels: reducing.channels,
            width: width_of_group,
            segments: extent("norm_gradient_finish", segments)?,
            pieces: reducing.pieces,
        };
        at.launch(Grid::new(shape.c + more, FINISH_THREADS), &finish)?;

        let walk = Walk::elementwise(segments, shape, width(x.is_narrow()));
        let sizes = walk.sizes("norm_gradient")?;
        let arguments = NormGradientKernel {
            x: x.into(),
            dy: dy.address(),
            dy_narrow: dy.is_narrow().into(),
            coefficients: coefficients.into(),
            dx: at.output(0).into(),
            mean: mean.into(),
            var: var.into(),
            gamma: gamma.into(),
            beta: beta.into(),
            eps,
            width: width_of_group,
            activation,
            len: sizes.len,
            channels: sizes.channels,
            period: sizes.period,
            across: sizes.across,
            strips: sizes.strips,
            pieces: sizes.pieces,
            steps: sizes.steps,
        };
        at.launch(walk.grid(), &arguments)
    }
}

/// Moves outputs towards inputs, pair by pair: mean and variance of a layer, which weigh `weights`; what is there
/// weighs `keep`.
pub(in crate::ops) fn launch_running_statistics(
    at: &mut Launches<'_>,
    keep: f64,
    weights: &[[f64; 2]],
) -> Result<()> {
    let (mut table, mut most) = (Vec::new(), 0);
    for (layer, weights) in weights.iter().enumerate() {
        let channels = at.input_shape(2 * layer).len();
        most = most.max(channels);
        let pair = [2 * layer, 2 * layer + 1];
        table.extend(pair.map(|i| at.input(i).address()));
        table.extend(pair.map(|i| at.output(i).address()));
        let [mean, var] = weights.map(|w| u64::from((w as f32).to_bits()));
        let channels = extent("running_statistics", channels)?;
        table.extend([mean | var << 32, u64::from(channels)]);
    }
    let arguments = RunningStatisticsKernel {
        layers: at.constant(&table)?.into(),
        keep: keep as f32,
    };
    let mut grid = Grid::cover(most, THREADS as u32);
    grid.blocks[1] = extent("running_statistics", weights.len())?;
    at.launch(grid, &arguments)
}
