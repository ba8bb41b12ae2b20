//! Operations on single elements.
//!
//! Broadcasting is of one kind only: an operand with one value per channel (`1×1×1×C`) or per image
//! and channel (`N×1×1×C`) against a full tensor, see [`Mul`].

use std::sync::Arc;

use rayon::prelude::*;

use super::{Kernel, Op};
use crate::device::cpu::Io;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::{Real, Shape};

/// Elements of one piece of parallel work: a fixed size, so that results cannot depend on threads.
const PIECE: usize = 1 << 14;

/// `y = f(x)` for input 0, in place where the plan says so.
fn map<T: Real>(io: &mut Io<'_, T>, f: impl Fn(T) -> T + Sync) {
    let y = io.output(0);
    if io.in_place() {
        y.par_chunks_mut(PIECE)
            .for_each(|y| y.iter_mut().for_each(|y| *y = f(*y)));
    } else {
        let x = io.input(0);
        y.par_chunks_mut(PIECE)
            .zip(x.par_chunks(PIECE))
            .for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, &x)| *y = f(x)));
    }
}

/// `y = f(a, b)` for inputs 0 and 1, in place of input 0 where the plan says so.
fn zip<T: Real>(io: &mut Io<'_, T>, f: impl Fn(T, T) -> T + Sync) {
    let (y, b) = (io.output(0), io.input(1));
    if io.in_place() {
        y.par_chunks_mut(PIECE)
            .zip(b.par_chunks(PIECE))
            .for_each(|(y, b)| y.iter_mut().zip(b).for_each(|(y, &b)| *y = f(*y, b)));
    } else {
        let a = io.input(0);
        y.par_chunks_mut(PIECE)
            .zip(a.par_chunks(PIECE))
            .zip(b.par_chunks(PIECE))
            .for_each(|((y, a), b)| {
                y.iter_mut()
                    .zip(a)
                    .zip(b)
                    .for_each(|((y, &a), &b)| *y = f(a, b))
            });
    }
}

/// The shape rule of operations whose inputs all have one shape, which is the output's too.
fn same(op: &'static str, inputs: &[Shape]) -> Result<Vec<Shape>> {
    match inputs.iter().find(|&&s| s != inputs[0]) {
        Some(other) => Err(Error::shape(
            op,
            format!("expected {}, found {other}", inputs[0]),
        )),
        None => Ok(vec![inputs[0]]),
    }
}

/// A constant tensor.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Extent.
    pub shape: Shape,
    /// Value of every element.
    pub value: f64,
}

impl<T: Real> Kernel<T> for Fill {
    fn run(&self, io: &mut Io<'_, T>) {
        io.output(0).fill(T::of(self.value));
    }
}

impl Op for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }
    fn outputs(&self, _: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![self.shape])
    }
    fn flops(&self, _: &[Shape], _: &[Shape]) -> u64 {
        0
    }
    fn backward(&self, _: &mut Backward<'_>) -> Result<()> {
        Ok(())
    }
    fn rerun(&self, inputs: &[Var], _: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        Some((Arc::new(*self), inputs.to_vec()))
    }
}

/// `y = a + b`, equal shapes.
#[derive(Clone, Copy, Debug)]
pub struct Add;

impl<T: Real> Kernel<T> for Add {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, |a, b| a + b);
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        at.set(0, dy)?;
        at.set(1, dy)
    }
}

/// `y = a · b`, equal shapes.
#[derive(Clone, Copy, Debug)]
pub struct Mul;

impl<T: Real> Kernel<T> for Mul {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, |a, b| a * b);
    }
}

impl Op for Mul {
    fn name(&self) -> &'static str {
        "mul"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let Some(dy) = at.gradient(0) else {
            return Ok(());
        };
        for (this, other) in [(0, 1), (1, 0)] {
            if at.wants(this) {
                let gradient = at.push(Mul, &[dy, at.input(other)])?;
                at.set(this, gradient)?;
            }
        }
        Ok(())
    }
}

/// `y = max(x, 0)`; the derivative at 0 is taken as 0.
#[derive(Clone, Copy, Debug)]
pub struct Relu;

impl<T: Real> Kernel<T> for Relu {
    fn run(&self, io: &mut Io<'_, T>) {
        // Not `max`: a NaN must pass on to where it is noticed.
        map(io, |x| if x < T::zero() { T::zero() } else { x });
    }
}

impl Op for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
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
        let gradient = at.push(ReluGradient, &[dy, at.output(0)])?;
        at.set(0, gradient)
    }
}

/// `dx = dy` where `y > 0`, else 0; inputs `dy`, `y`.
#[derive(Clone, Copy, Debug)]
pub struct ReluGradient;

impl<T: Real> Kernel<T> for ReluGradient {
    fn run(&self, io: &mut Io<'_, T>) {
        zip(io, |dy, y| if y > T::zero() { dy } else { T::zero() });
    }
}

impl Op for ReluGradient {
    fn name(&self) -> &'static str {
        "relu_gradient"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        same(self.name(), inputs)
    }
    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}

pub(super) fn add_case(s: &mut Sampler) -> Case {
    binary_case(s, Add)
}

pub(super) fn mul_case(s: &mut Sampler) -> Case {
    binary_case(s, Mul)
}

fn binary_case(s: &mut Sampler, op: impl Op + Copy + 'static) -> Case {
    let shape = s.shape();
    Case::new(format!("{shape}"), move |t, v| Ok(vec![t.push(op, v)?]))
        .with("a", shape, s.values(shape.len(), -2.0, 2.0))
        .with("b", shape, s.values(shape.len(), -2.0, 2.0))
}

pub(super) fn relu_case(s: &mut Sampler) -> Case {
    let shape = s.shape();
    Case::new(format!("{shape}"), |t, v| Ok(vec![t.push(Relu, v)?])).with(
        "x",
        shape,
        s.values_off_zero(shape.len(), 1e-3, 2.0),
    )
}
