//! Transposed convolution: what the input gradient of a convolution computes, as a layer.

use super::conv2d::{Conv2d, Conv2dWeightGradient, Geometry, copied, device, input_gradient};
use super::{Copied, Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::device::simd::Level;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// `y[n, i·sh + r − ph, j·sw + s − pw, o] = Σ x[n, i, j, c] · w[c, r, s, o]`, inputs `x` (N×H×W×C) and `w`
/// (C×kh×kw×out): the weights of the convolution that it transposes, which leads from `out` channels to `C`.
/// The output has `(H − 1)·sh + kh − 2·ph` rows. With 2×2 kernels and stride 2, each pixel becomes 2×2.
///
/// Its gradients are that convolution, of `dy`, and that convolution's weight gradient.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConvTranspose2d {
    /// Output pixels from one input pixel to the next, rows first.
    pub stride: [usize; 2],
    /// Rows and columns cut off on every side.
    pub padding: [usize; 2],
}

impl ConvTranspose2d {
    /// Each pixel becomes 2×2, with 2×2 kernels.
    pub const DOUBLE: Self = Self {
        stride: [2, 2],
        padding: [0, 0],
    };

    /// The convolution that is transposed.
    fn geometry(&self, x: Shape, w: Shape) -> Result<Geometry> {
        let fail = |problem: String| Err(Error::shape("conv_transpose2d", problem));
        if w.n != x.c {
            return fail(format!(
                "expected weights {}×kh×kw×out for input {x}, found {w}",
                x.c
            ));
        }
        if x.is_empty() || w.is_empty() || self.stride.contains(&0) {
            return fail(format!(
                "nothing to do for {self:?}, input {x}, weights {w}"
            ));
        }
        let extent = |axis: usize, count: usize, kernel: usize| {
            let whole = (count - 1) * self.stride[axis] + kernel;
            whole.checked_sub(2 * self.padding[axis])
        };
        match (extent(0, x.h, w.h), extent(1, x.w, w.w)) {
            (Some(rows @ 1..), Some(columns @ 1..)) => {
                let y = Shape::new(x.n, rows, columns, w.c);
                Geometry::new(y, w, self.stride, self.padding)
            }
            _ => fail(format!("{self:?} leaves nothing of input {x}, weights {w}")),
        }
    }

    /// The geometry of shapes that [`Op::outputs`] has accepted.
    fn accepted(&self, x: Shape, w: Shape) -> Geometry {
        self.geometry(x, w)
            .expect("the shape rule accepts only what has a geometry")
    }
}

impl<T: Real> Kernel<T> for ConvTranspose2d {
    fn run(&self, io: &mut Io<'_, T>) {
        let geometry = self.accepted(io.input_shape(0), io.input_shape(1));
        let (x, w) = (io.input(0), io.input(1));
        let (y, scratch) = (io.output(0), io.scratch());
        input_gradient(Level::current(), &geometry, w, x, y, scratch);
    }
}

impl Op for ConvTranspose2d {
    fn name(&self) -> &'static str {
        "conv_transpose2d"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.geometry(inputs[0], inputs[1])?.input()])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        self.accepted(inputs[0], inputs[1]).flops()
    }
    fn scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        self.accepted(inputs[0], inputs[1]).input_gradient_scratch()
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let geometry = self.geometry(at.input_shape(0), at.input_shape(1))?;
        let pointers = [at.input(1), at.input(0), at.output(0)];
        device::input_gradient(at, &geometry, pointers)
    }
    fn device_copy(&self, inputs: &[Shape], _: &[Shape]) -> Option<Copied> {
        let geometry = self.accepted(inputs[0], inputs[1]);
        copied(1, device::input_gradient_copy(&geometry))
    }
    fn device_scratch(&self, inputs: &[Shape], _: &[Shape]) -> usize {
        device::input_gradient_scratch(&self.accepted(inputs[0], inputs[1]))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let (x, w) = (at.input(0), at.input(1));
        let geometry = self.geometry(at.shape(x), at.shape(w))?;
        if at.wants(0) {
            let convolution = Conv2d {
                stride: self.stride,
                padding: self.padding,
                statistics: false,
            };
            let dx = at.push(convolution, &[dy, w])?;
            at.set(0, dx)?;
        }
        if at.wants(1) {
            let bias = false;
            let dw = at.push(Conv2dWeightGradient { geometry, bias }, &[dy, x])?;
            at.set(1, dw)?;
        }
        Ok(())
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let mut axis = || {
        let (kernel, stride) = (s.size(1, 4), s.size(1, 3));
        let padding = s.size(0, (kernel - 1) / 2);
        (kernel, stride, padding, s.extent(1, 5))
    };
    let (kh, sh, ph, h) = axis();
    let (kw, sw, pw, w) = axis();
    let (n, c, out) = (s.size(1, 3), s.size(1, 4), s.size(1, 4));
    let op = ConvTranspose2d {
        stride: [sh, sw],
        padding: [ph, pw],
    };
    let (x, mut w) = (Shape::new(n, h, w, c), Shape::new(c, kh, kw, out));
    let op = if s.chance(0.3) {
        (w.h, w.w) = (2, 2);
        ConvTranspose2d::DOUBLE
    } else {
        op
    };
    let description = format!("{x} with {w}, {op:?}");
    Case::new(description, move |t, v| Ok(vec![t.push(op, v)?]))
        .with("x", x, s.values(x.len(), -1.0, 1.0))
        .narrow()
        .with("w", w, s.narrow_values(w.len(), -1.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ops::apply;

    proptest! {
        #[test]
        fn every_pixel_is_spread_by_its_kernel(
            (n, c, out) in (1..3usize, 1..20usize, 1..20usize),
            (h, kh, sh) in (1..7usize, 1..5usize, 1..4usize),
            (w, kw, sw) in (1..7usize, 1..5usize, 1..4usize),
            seed in any::<u64>()
        ) {
            let padding = [(kh - 1) / 2, (kw - 1) / 2];
            let op = ConvTranspose2d { stride: [sh, sw], padding };
            let (x, w) = (Shape::new(n, h, w, c), Shape::new(c, kh, kw, out));
            let mut s = Sampler::new(seed);
            let (values, weights) = (s.values(x.len(), -1.0, 1.0), s.values(w.len(), -1.0, 1.0));
            let y = op.outputs(&[x, w]).unwrap()[0];
            prop_assert_eq!(y.h, (h - 1) * sh + kh - 2 * padding[0]);
            let mut expected = vec![0.0; y.len()];
            for (i, value) in values.iter().enumerate() {
                let (channel, pixel) = (i % c, i / c);
                let (column, row, image) = (pixel % x.w, pixel / x.w % x.h, pixel / x.pixels());
                for (k, weight) in weights[channel * w.len() / c..][..w.len() / c].iter().enumerate() {
                    let (o, s, r) = (k % out, k / out % kw, k / out / kw);
                    let row = (row * sh + r).wrapping_sub(padding[0]);
                    let column = (column * sw + s).wrapping_sub(padding[1]);
                    if row < y.h && column < y.w {
                        expected[((image * y.h + row) * y.w + column) * out + o] += value * weight;
                    }
                }
            }
            for (found, expected) in apply(op, &[(x, &values), (w, &weights)]).iter().zip(&expected) {
                prop_assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
            }
        }
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let x = Shape::new(1, 1, 4, 3);
        let refused = |w: Shape, padding| {
            let op = ConvTranspose2d {
                stride: [2, 2],
                padding,
            };
            op.outputs(&[x, w]).is_err()
        };
        assert!(!refused(Shape::new(3, 2, 2, 5), [0, 0]));
        assert!(refused(Shape::new(2, 2, 2, 5), [0, 0]));
        assert!(refused(Shape::new(3, 2, 2, 5), [1, 0]));
        assert!(refused(Shape::new(3, 0, 2, 5), [0, 0]));
    }
}
