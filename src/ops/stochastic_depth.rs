//! Stochastic depth (Huang et al. 2016): residual branches that are left out at random.

use rayon::prelude::*;

use super::pointwise::{PIECE, THREADS, grid, same};
use super::{Kernel, Op, control, dropout};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Pointer, Stored, kernel};
use crate::device::philox::Philox;
use crate::device::simd::{self, Lanes};
use crate::error::Result;
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// `y = residual + f·x`, where for each image `f = 1 / (1 − rate)` with probability `1 − rate`, else 0; inputs
/// `x` (the branch), `residual` (of the same shape) and the control vector, from which the number of the step is
/// taken. With the addition in it, dropping costs no pass over memory. In evaluation there is
/// [`Add`](super::pointwise::Add).
///
/// Image `n` keeps its branch if word `n mod 4` of the Philox block `⌊n/4⌋` under key `seed` and stream
/// `(layer, step)` is at least `rate·2³²`. A branch that is left out is not read. The gradient draws again.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StochasticDepth {
    /// Probability that an image's branch is left out, in 0..1.
    pub rate: f64,
    /// Seed of the run.
    pub seed: u64,
    /// Tells the random layers of one network apart, dropouts included.
    pub layer: u32,
}

impl StochasticDepth {
    /// The factor of image `n`, `None` for 0, given the control vector.
    fn factor<T: Real>(&self, n: usize, control: &[T]) -> Option<T> {
        let step = control[control::STEP].wide() as u64;
        let philox = Philox::new(self.seed, u64::from(self.layer) << 32 | step);
        let word = philox.block(n as u64 / 4)[n % 4];
        let kept = word >= dropout::threshold(self.rate);
        kept.then(|| T::of(1.0 / (1.0 - self.rate)))
    }

    /// Launches `y = residual + f·x`, without a residual where that is null.
    fn launch_branch(
        &self,
        at: &mut Launches<'_>,
        [x, residual, control, y]: [Pointer; 4],
    ) -> Result<()> {
        let shape = at.output_shape(0);
        let image = shape.pixels() * shape.c;
        let blocks = grid(image, y).blocks[0];
        let arguments = StochasticDepthKernel {
            x: x.into(),
            residual: residual.address(),
            residual_storage: match residual == Pointer::NULL {
                true => 0,
                false => 1 + i32::from(residual.is_narrow()),
            },
            control: control.into(),
            y: y.into(),
            image: image as u64,
            blocks,
            seed: self.seed,
            layer: self.layer,
            threshold: dropout::threshold(self.rate),
            factor: (1.0 / (1.0 - self.rate)) as f32,
        };
        at.launch(
            Grid::new(shape.n * blocks as usize, THREADS as u32),
            &arguments,
        )
    }
}

kernel! {
    struct StochasticDepthKernel = "stochastic_depth" {
        x: Stored,
        residual: u64,
        residual_storage: i32,
        control: Full,
        y: Stored,
        image: u64,
        blocks: u32,
        seed: u64,
        layer: u32,
        threshold: u32,
        factor: f32,
    }
}

impl<T: Real> Kernel<T> for StochasticDepth {
    fn run(&self, io: &mut Io<'_, T>) {
        let (residual, control, shape) = (io.input(1), io.input(2), io.output_shape(0));
        let x = (!io.in_place()).then(|| io.input(0));
        for_each_piece(io.output(0), shape, |n, start, y| {
            let residual = &residual[start..][..y.len()];
            match self.factor(n, control) {
                None => y.copy_from_slice(residual),
                Some(factor) => {
                    let x = x.map(|x| &x[start..][..y.len()]);
                    simd::dispatch(Branch {
                        factor,
                        x,
                        residual: Some(residual),
                        y,
                    });
                }
            }
        });
    }
}

/// Calls `f(image, start, piece)` for the pieces of each image, in parallel.
fn for_each_piece<T: Real>(y: &mut [T], shape: Shape, f: impl Fn(usize, usize, &mut [T]) + Sync) {
    let len = shape.len() / shape.n;
    y.par_chunks_mut(len).enumerate().for_each(|(n, y)| {
        y.par_chunks_mut(PIECE)
            .enumerate()
            .for_each(|(i, y)| f(n, n * len + i * PIECE, y));
    });
}

/// `y = factor·x`, plus `residual` if there is one; where there is no `x`, `y` holds it.
struct Branch<'a, T> {
    factor: T,
    x: Option<&'a [T]>,
    residual: Option<&'a [T]>,
    y: &'a mut [T],
}

impl<T: Real> simd::Kernel<T> for Branch<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let factor = L::splat(self.factor);
        for (i, y) in self.y.chunks_mut(L::N).enumerate() {
            let x = L::load_first(self.x.map_or(&*y, |x| &x[i * L::N..][..y.len()]));
            let result = match self.residual {
                Some(residual) => {
                    x.mul_add(factor, L::load_first(&residual[i * L::N..][..y.len()]))
                }
                None => x * factor,
            };
            result.store_first(y);
        }
    }
}

impl Op for StochasticDepth {
    fn name(&self) -> &'static str {
        "stochastic_depth"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        dropout::check(self.name(), self.rate, inputs[2])?;
        same(self.name(), &inputs[..2])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        2 * inputs[0].len() as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        at.set(1, dy)?;
        if at.wants(0) {
            let dx = at.push(StochasticDepthGradient(*self), &[dy, at.input(2)])?;
            at.set(0, dx)?;
        }
        Ok(())
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let pointers = [at.input(0), at.input(1), at.input(2), at.output(0)];
        self.launch_branch(at, pointers)
    }
}

/// The gradient of [`StochasticDepth`] for `x`, `f·dy`; inputs `dy` and the control vector.
#[derive(Clone, Copy, PartialEq, Debug)]
struct StochasticDepthGradient(StochasticDepth);

impl<T: Real> Kernel<T> for StochasticDepthGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (control, shape) = (io.input(1), io.output_shape(0));
        let dy = (!io.in_place()).then(|| io.input(0));
        for_each_piece(io.output(0), shape, |n, start, dx| {
            match self.0.factor(n, control) {
                None => dx.fill(T::zero()),
                Some(factor) => {
                    let x = dy.map(|dy| &dy[start..][..dx.len()]);
                    simd::dispatch(Branch {
                        factor,
                        x,
                        residual: None,
                        y: dx,
                    });
                }
            }
        });
    }
}

impl Op for StochasticDepthGradient {
    fn name(&self) -> &'static str {
        "stochastic_depth_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0]])
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let pointers = [at.input(0), Pointer::NULL, at.input(1), at.output(0)];
        self.0.launch_branch(at, pointers)
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let op = StochasticDepth {
        rate: s.uniform(0.0, 0.9),
        seed: s.size(0, 1 << 20) as u64,
        layer: s.size(0, 9) as u32,
    };
    let mut settings = vec![0.0; control::LEN];
    settings[control::STEP] = s.size(1, 1000) as f64;
    Case::new(format!("{op:?} {shape}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", shape, s.values(shape.len(), -2.0, 2.0))
    .narrow()
    .with("residual", shape, s.values(shape.len(), -2.0, 2.0))
    .narrow()
    .with_constant("control", Shape::per_channel(control::LEN), settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;

    const OP: StochasticDepth = StochasticDepth {
        rate: 0.3,
        seed: 11,
        layer: 2,
    };

    /// `residual + f·x` for ones and twos.
    fn run(op: StochasticDepth, shape: Shape, step: u64) -> Vec<f32> {
        let mut settings = [0.0; control::LEN];
        settings[control::STEP] = step as f32;
        let (x, residual) = (vec![1.0; shape.len()], vec![2.0; shape.len()]);
        let control = (Shape::per_channel(control::LEN), &settings[..]);
        apply(op, &[(shape, &x), (shape, &residual), control])
    }

    #[test]
    fn whole_images_lose_their_branch_and_the_rest_is_scaled() {
        let shape = Shape::new(4000, 2, 3, 1);
        let y = run(OP, shape, 1);
        let kept = (2.0 + 1.0 / 0.7) as f32;
        let mut dropped = 0;
        for image in y.chunks_exact(6) {
            assert!(image == [2.0; 6] || image == [kept; 6], "{image:?}");
            dropped += usize::from(image[0] == 2.0);
        }
        // Five standard deviations of a binomial count.
        let bound = 5.0 * (4000.0 * 0.3 * 0.7f64).sqrt();
        assert!((dropped as f64 - 1200.0).abs() < bound, "{dropped}");
    }

    #[test]
    fn every_part_of_the_key_matters_and_images_are_drawn_by_position() {
        let shape = Shape::new(64, 1, 1, 1);
        let first = run(OP, shape, 1);
        assert_eq!(first, run(OP, shape, 1));
        assert_ne!(first, run(OP, shape, 2));
        assert_ne!(first, run(StochasticDepth { seed: 12, ..OP }, shape, 1));
        assert_ne!(first, run(StochasticDepth { layer: 3, ..OP }, shape, 1));
        let larger = run(OP, Shape::new(99, 130, 131, 1), 1);
        let images: Vec<f32> = larger.iter().step_by(130 * 131).copied().collect();
        assert_eq!(first, images[..64]);
    }

    #[test]
    fn a_branch_that_is_left_out_is_not_read() {
        let op = StochasticDepth {
            rate: 1.0 - 1e-9,
            ..OP
        };
        let control = (Shape::per_channel(control::LEN), &[1.0; control::LEN][..]);
        let one = Shape::SCALAR;
        assert_eq!(
            apply(op, &[(one, &[f32::NAN][..]), (one, &[2.0]), control]),
            [2.0]
        );
    }

    #[test]
    fn impossible_settings_are_refused() {
        let (x, control) = (Shape::new(2, 3, 3, 4), Shape::per_channel(control::LEN));
        assert!(OP.outputs(&[x, x, control]).is_ok());
        assert!(OP.outputs(&[x, Shape::per_image(2, 4), control]).is_err());
        assert!(OP.outputs(&[x, x, x]).is_err());
        let always = StochasticDepth { rate: 1.0, ..OP };
        let error = always.outputs(&[x, x, control]).unwrap_err().to_string();
        assert!(error.contains("rate"), "{error}");
    }
}
