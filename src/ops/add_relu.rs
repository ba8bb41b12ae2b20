//! The sum of two tensors and ReLU in one pass, as an attention gate takes it.

use std::sync::Arc;

use super::pointwise::{self, Add, Binary, Named, Relu, Slope, Unary};
use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::device::simd::Lanes;
use crate::error::Result;
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// `y = max(a + b, 0)`, inputs and output of one shape; the derivative at 0 is taken as 0.
///
/// Passes over memory: reads `a` and `b`, writes `y` (over `a` where it can). The gradient, the same for both,
/// reads `y` and `dy` and writes over `dy` where it can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddRelu;

impl<T: Real> Binary<T> for AddRelu {
    #[inline(always)]
    fn at<L: Lanes<Elem = T>>(self, a: L, b: L) -> L {
        Relu.at(Add.at(a, b))
    }
}

impl<T: Real> Kernel<T> for AddRelu {
    fn run(&self, io: &mut Io<'_, T>) {
        pointwise::zip(io, *self);
    }
}

impl Op for AddRelu {
    fn name(&self) -> &'static str {
        "add_relu"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        pointwise::same(self.name(), inputs)
    }
    fn flops(&self, _: &[Shape], outputs: &[Shape]) -> u64 {
        2 * outputs[0].len() as u64
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        let gradient = at.push(Slope(Relu), &[dy, at.output(0)])?;
        (0..2).try_for_each(|i| at.set(i, gradient))
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        pointwise::launch_zip::<Self>(at, &[])
    }
}

impl Named for AddRelu {
    const KERNEL: &'static str = "add_relu";
}

pub(super) fn case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    let a = s.values(shape.len(), -2.0, 2.0);
    let sums = s.values_off_zero(shape.len(), 1e-3, 2.0);
    let b = sums.iter().zip(&a).map(|(sum, a)| sum - a).collect();
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(AddRelu, v)?]))
        .with("a", shape, a)
        .narrow()
        .with("b", shape, b)
        .narrow()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::apply;

    #[test]
    fn equals_sum_and_relu_and_lets_nan_pass() {
        let shape = Shape::new(2, 61, 67, 5);
        let mut s = Sampler::new(3);
        let [a, b] = [0, 1].map(|_| {
            let values = s.values(shape.len(), -2.0, 2.0);
            values.into_iter().map(|v| v as f32).collect::<Vec<f32>>()
        });
        let sum = apply(Add, &[(shape, &a), (shape, &b)]);
        let expected = apply(Relu, &[(shape, &sum)]);
        assert_eq!(apply(AddRelu, &[(shape, &a), (shape, &b)]), expected);
        let one = Shape::SCALAR;
        assert!(apply(AddRelu, &[(one, &[f32::NAN][..]), (one, &[-1.0])])[0].is_nan());
    }
}
