//! The four shape features from a mask's sums ([`crate::features::ShapeFeatures`]).

use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, kernel};
use crate::error::{Error, Result};
use crate::features::{self, MaskSums, Moments};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// Threads of a block in `kernels/features.cu`, one for each image.
const THREADS: u32 = 256;

kernel! {
    struct ShapeFeaturesKernel = "shape_features" {
        moments: Full, perimeters: Full, features: Full, measurable: Full, confidences: Full, n: i32
    }
}
kernel! {
    struct ShapeFeaturesGradientKernel = "shape_features_gradient" {
        dfeatures: Full, moments: Full, perimeters: Full, dmoments: Full, dperimeters: Full, n: i32
    }
}

/// Moments `N×1×1×7` and perimeter `N×1×1×1` to three outputs:
///
/// 0. the features, `N×1×1×4` in the order of [`features::ShapeFeatures::NAMES`], zeros where there is
///    no measurable lesion;
/// 1. whether there is one, `N×1×1×1`, 1 or 0;
/// 2. how decided the mask is, `N×1×1×1` ([`MaskSums::confidence`]).
///
/// Only the features pass a gradient on, and none below the gate.
#[derive(Clone, Copy, Debug)]
pub struct ShapeFeatures;

impl<T: Real> Kernel<T> for ShapeFeatures {
    fn run(&self, io: &mut Io<'_, T>) {
        let (features, measurable, confidence) = (io.output(0), io.output(1), io.output(2));
        let sums = sums(io.input(0), io.input(1));
        for (image, sums) in sums.enumerate() {
            let found = sums.features();
            let values = found.unwrap_or_default().to_array().map(T::of);
            features[4 * image..][..4].copy_from_slice(&values);
            measurable[image] = T::of(f64::from(u8::from(found.is_some())));
            confidence[image] = T::of(sums.confidence());
        }
    }
}

/// The sums of each image.
fn sums<T: Real>(moments: &[T], perimeters: &[T]) -> impl Iterator<Item = MaskSums> {
    moments
        .chunks_exact(Moments::COUNT)
        .zip(perimeters)
        .map(|(moments, perimeter)| MaskSums {
            moments: Moments::read(moments),
            perimeter: perimeter.wide(),
        })
}

impl Op for ShapeFeatures {
    fn name(&self) -> &'static str {
        "shape_features"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let n = inputs[0].n;
        let expected = [Shape::per_image(n, Moments::COUNT), Shape::per_image(n, 1)];
        if inputs != expected {
            let problem = format!("expected moments and perimeters {expected:?}, found {inputs:?}");
            return Err(Error::shape(self.name(), problem));
        }
        Ok(vec![
            Shape::per_image(n, 4),
            Shape::per_image(n, 1),
            Shape::per_image(n, 1),
        ])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        60 * inputs[0].n as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dfeatures) = at.gradient(0) else {
            return Ok(());
        };
        let inputs = [dfeatures, at.input(0), at.input(1)];
        let gradients = at.push_all(ShapeFeaturesGradient, &inputs)?;
        at.set(0, gradients[0])?;
        at.set(1, gradients[1])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let n = at.input_shape(0).n;
        let arguments = ShapeFeaturesKernel {
            moments: at.input(0).into(),
            perimeters: at.input(1).into(),
            features: at.output(0).into(),
            measurable: at.output(1).into(),
            confidences: at.output(2).into(),
            n: at.int(n)?,
        };
        at.launch(Grid::cover(n, THREADS), &arguments)
    }
}

/// Gradient of [`ShapeFeatures`] with respect to moments and perimeter; inputs `dfeatures`,
/// `moments`, `perimeter`.
#[derive(Clone, Copy, Debug)]
pub struct ShapeFeaturesGradient;

impl<T: Real> Kernel<T> for ShapeFeaturesGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let (dmoments, dperimeters) = (io.output(0), io.output(1));
        let images = dmoments.chunks_exact_mut(Moments::COUNT).zip(dperimeters);
        let known = io
            .input(0)
            .chunks_exact(4)
            .zip(sums(io.input(1), io.input(2)));
        for ((dmoments, dperimeter), (grad, sums)) in images.zip(known) {
            let grad = features::ShapeFeatures::from(std::array::from_fn(|k| grad[k].wide()));
            let gradient = sums.features_backward(&grad);
            gradient.moments.write(dmoments);
            *dperimeter = T::of(gradient.perimeter);
        }
    }
}

impl Op for ShapeFeaturesGradient {
    fn name(&self) -> &'static str {
        "shape_features_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs[1..].to_vec())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        120 * inputs[0].n as u64
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let n = at.input_shape(0).n;
        let arguments = ShapeFeaturesGradientKernel {
            dfeatures: at.input(0).into(),
            moments: at.input(1).into(),
            perimeters: at.input(2).into(),
            dmoments: at.output(0).into(),
            dperimeters: at.output(1).into(),
            n: at.int(n)?,
        };
        at.launch(Grid::cover(n, THREADS), &arguments)
    }
}

/// Moments and perimeters of `n` images, one in four below the gate, none near it.
pub(super) fn draw_sums(s: &mut Sampler, n: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut moments, mut perimeters) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let area = if s.chance(0.25) {
            s.uniform(1.0, 31.0)
        } else {
            s.uniform(33.0, 200.0)
        };
        let (xx, yy) = (area * s.uniform(2.0, 30.0), area * s.uniform(2.0, 30.0));
        let xy = s.uniform(-0.9, 0.9) * (xx * yy).sqrt();
        let (x, y) = (area * s.uniform(-9.0, 9.0), area * s.uniform(-9.0, 9.0));
        moments.extend([area, area * s.uniform(0.3, 1.0), x, y, xx, yy, xy]);
        perimeters.push(s.uniform(10.0, 90.0));
    }
    (moments, perimeters)
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let n = s.size(1, 4);
    let (moments, perimeters) = draw_sums(s, n);
    let mut case = Case::new(format!("{n} images"), |t, v| {
        Ok(vec![t.push_all(ShapeFeatures, v)?[0]])
    })
    .with("moments", Shape::per_image(n, Moments::COUNT), moments)
    .with("perimeter", Shape::per_image(n, 1), perimeters);
    // The sums are of the order of 100 and more, the features of 1.
    case.step = 1e-2;
    case
}
