//! The consistency of predicted malignancy with the prior of the predicted mask.

use super::{Kernel, Op, control};
use crate::device::cpu::Io;
use crate::device::gpu::launch::{Full, Grid, Launches, Stored, kernel};
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::Backward;
use crate::tensor::{Real, Shape};

/// `ramp · Σᵢ weightᵢ·confidenceᵢ·(p̂ᵢ − φᵢ)² / max(1, n)`, a scalar, with `n` the number of measurable
/// images of positive weight.
///
/// Inputs, all but the last `N×1×1×1`: `p̂`, `φ`, measurable (1 or 0) and confidence of
/// [`super::shape_features::ShapeFeatures`], weight, and the [`control`] vector, whose
/// [`control::RAMP`] it reads. Only `p̂` and `φ` receive gradients.
#[derive(Clone, Copy, Debug, Default)]
pub struct Consistency {
    /// No gradient into `p̂`: the classifier is not moved by the mask.
    pub stop_p: bool,
    /// No gradient into `φ`: neither the mask nor the prior's weights are moved by the classifier.
    pub stop_phi: bool,
}

/// Threads of the one block in `kernels/features.cu`.
const THREADS: u32 = 256;

kernel! {
    struct ConsistencyKernel = "consistency" {
        p: Stored, phi: Full, measurable: Full, confidences: Full, weight: Full, control: Full,
        y: Full, n: i32
    }
}
kernel! {
    struct ConsistencyGradientKernel = "consistency_gradient" {
        dy: Full, p: Stored, phi: Full, measurable: Full, confidences: Full, weight: Full,
        control: Full, dp: Stored, dphi: Full, n: i32
    }
}

/// For each image the factor `ramp·weight·confidence / max(1, n)`, 0 where nothing is measurable, and
/// the difference `p̂ − φ`. `first` is the position of `p̂` among the inputs.
fn images<'a, T: Real>(io: &Io<'a, T>, first: usize) -> impl Iterator<Item = (f64, f64)> + 'a {
    let [p, phi, measurable, confidence, weight] = std::array::from_fn(|i| io.input(first + i));
    let ramp = io.input(first + 5)[control::RAMP].wide();
    let counts = |i: usize| measurable[i] > T::zero() && weight[i] > T::zero();
    let n = (0..p.len()).filter(|&i| counts(i)).count().max(1);
    (0..p.len()).map(move |i| {
        let factor = if counts(i) {
            ramp * weight[i].wide() * confidence[i].wide() / n as f64
        } else {
            0.0
        };
        (factor, p[i].wide() - phi[i].wide())
    })
}

impl<T: Real> Kernel<T> for Consistency {
    fn run(&self, io: &mut Io<'_, T>) {
        let term: f64 = images(io, 0)
            .map(|(factor, difference)| factor * difference * difference)
            .sum();
        io.output(0)[0] = T::of(term);
    }
}

impl Op for Consistency {
    fn name(&self) -> &'static str {
        "consistency"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        let image = Shape::per_image(inputs[0].n, 1);
        let expected = [
            image,
            image,
            image,
            image,
            image,
            Shape::per_channel(control::LEN),
        ];
        if inputs != expected {
            let problem = format!(
                "expected p, φ, measurable, confidence, weight and control {expected:?}, found {inputs:?}"
            );
            return Err(Error::shape(self.name(), problem));
        }
        Ok(vec![Shape::SCALAR])
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        6 * inputs[0].n as u64
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dterm) = at.gradient(0) else {
            return Ok(());
        };
        let inputs = [
            dterm,
            at.input(0),
            at.input(1),
            at.input(2),
            at.input(3),
            at.input(4),
            at.input(5),
        ];
        let gradients = at.push_all(ConsistencyGradient, &inputs)?;
        for (i, stop) in [self.stop_p, self.stop_phi].into_iter().enumerate() {
            if !stop {
                at.set(i, gradients[i])?;
            }
        }
        Ok(())
    }
    fn narrow(&self, _: usize, _: &[bool]) -> bool {
        false
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let arguments = ConsistencyKernel {
            p: at.input(0).into(),
            phi: at.input(1).into(),
            measurable: at.input(2).into(),
            confidences: at.input(3).into(),
            weight: at.input(4).into(),
            control: at.input(5).into(),
            y: at.output(0).into(),
            n: at.int(at.input_shape(0).n)?,
        };
        at.launch(Grid::new(1, THREADS), &arguments)
    }
}

/// Gradients of [`Consistency`] with respect to `p̂` and `φ`; inputs `dterm` and those of
/// [`Consistency`].
#[derive(Clone, Copy, Debug)]
pub struct ConsistencyGradient;

impl<T: Real> Kernel<T> for ConsistencyGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        let dterm = io.input(0)[0].wide();
        let (dp, dphi) = (io.output(0), io.output(1));
        for ((dp, dphi), (factor, difference)) in dp.iter_mut().zip(dphi).zip(images(io, 1)) {
            let gradient = 2.0 * dterm * factor * difference;
            *dp = T::of(gradient);
            *dphi = T::of(-gradient);
        }
    }
}

impl Op for ConsistencyGradient {
    fn name(&self) -> &'static str {
        "consistency_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs[1..3].to_vec())
    }
    fn flops(&self, inputs: &[Shape], _: &[Shape]) -> u64 {
        6 * inputs[1].n as u64
    }
    fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
        output == 0 && inputs[1]
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let arguments = ConsistencyGradientKernel {
            dy: at.input(0).into(),
            p: at.input(1).into(),
            phi: at.input(2).into(),
            measurable: at.input(3).into(),
            confidences: at.input(4).into(),
            weight: at.input(5).into(),
            control: at.input(6).into(),
            dp: at.output(0).into(),
            dphi: at.output(1).into(),
            n: at.int(at.input_shape(1).n)?,
        };
        at.launch(Grid::new(1, THREADS), &arguments)
    }
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let n = s.size(1, 5);
    let image = Shape::per_image(n, 1);
    let flags = |s: &mut Sampler| {
        (0..n)
            .map(|_| f64::from(u8::from(s.chance(0.8))))
            .collect::<Vec<_>>()
    };
    let (measurable, present) = (flags(s), flags(s));
    let weight = s
        .values(n, 0.5, 2.0)
        .iter()
        .zip(present)
        .map(|(w, present)| w * present)
        .collect();
    Case::new(format!("{n} images"), |t, v| {
        Ok(vec![t.push(Consistency::default(), v)?])
    })
    .with("p", image, s.values(n, 0.0, 1.0))
    .narrow()
    .with("φ", image, s.values(n, 0.0, 1.0))
    .with_constant("measurable", image, measurable)
    .with_constant("confidence", image, s.values(n, 0.0, 1.0))
    .with_constant("weight", image, weight)
    .with_constant(
        "control",
        Shape::per_channel(control::LEN),
        s.values(control::LEN, 0.1, 1.0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Session;
    use crate::tape::{Plan, Tape};

    /// The term, and its gradients with respect to `p̂` and `φ` where there are any.
    fn term(op: Consistency, images: &[[f64; 5]]) -> (f64, [Option<Vec<f64>>; 2]) {
        let mut tape = Tape::new();
        let shape = Shape::per_image(images.len(), 1);
        let mut inputs: Vec<_> = (0..5).map(|_| tape.input("image", shape)).collect();
        inputs.push(tape.input("control", Shape::per_channel(control::LEN)));
        let term = tape.push(op, &inputs).unwrap();
        let gradients = tape.backward(term, &inputs[..2]).unwrap();
        tape.keep(term);
        gradients.iter().flatten().for_each(|&g| tape.keep(g));
        let mut session =
            Session::<f64>::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
        for (k, &input) in inputs[..5].iter().enumerate() {
            session.write(
                input,
                &images.iter().map(|image| image[k]).collect::<Vec<_>>(),
            );
        }
        session.values_mut(inputs[5])[control::RAMP] = 0.8;
        session.run();
        let gradient = |i: usize| gradients[i].map(|g: crate::tape::Var| session.read(g).to_vec());
        (session.read(term)[0], [gradient(0), gradient(1)])
    }

    /// `p̂`, `φ`, measurable, confidence, weight: the last two are not measurable and padding.
    const IMAGES: [[f64; 5]; 4] = [
        [0.9, 0.2, 1.0, 0.5, 1.0],
        [0.1, 0.4, 1.0, 0.5, 2.0],
        [0.5, 0.9, 0.0, 0.5, 1.0],
        [0.5, 0.9, 1.0, 0.5, 0.0],
    ];

    #[test]
    fn only_measurable_images_of_positive_weight_count() {
        let (value, [dp, dphi]) = term(Consistency::default(), &IMAGES);
        let expected = 0.8 * 0.5 * (0.7f64.powi(2) + 2.0 * 0.3f64.powi(2)) / 2.0;
        assert!((value - expected).abs() < 1e-15);
        let (dp, dphi) = (dp.unwrap(), dphi.unwrap());
        assert!((dp[0] - 0.8 * 0.5 * 0.7).abs() < 1e-15);
        assert!((dp[1] + 0.8 * 0.5 * 2.0 * 0.3).abs() < 1e-15);
        assert_eq!(dp[2..], [0.0, 0.0]);
        assert!(dp.iter().zip(&dphi).all(|(p, phi)| *p == -phi));

        let (value, [dp, _]) = term(Consistency::default(), &IMAGES[2..]);
        assert_eq!((value, dp), (0.0, Some(vec![0.0, 0.0])));
    }

    #[test]
    fn either_side_can_be_held_still() {
        let stop_p = Consistency {
            stop_p: true,
            stop_phi: false,
        };
        let stop_phi = Consistency {
            stop_p: false,
            stop_phi: true,
        };
        assert!(matches!(term(stop_p, &IMAGES).1, [None, Some(_)]));
        assert!(matches!(term(stop_phi, &IMAGES).1, [Some(_), None]));
    }
}
