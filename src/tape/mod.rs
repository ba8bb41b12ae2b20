//! Record, differentiate, plan, replay.
//!
//! A [`Tape`] is a list of [`Step`]s over [`Value`]s. Recording infers shapes and computes nothing.
//! [`Tape::backward`] appends the gradient steps to the same list, the optimizer appends its update,
//! and so a whole training step is one list. A [`Plan`] gives every value its place in one arena;
//! a session of [`crate::device`] owns that arena and replays the list as often as asked, without
//! shape work or allocation.
//!
//! ```
//! use echograd::device::cpu::Session;
//! use echograd::ops::pointwise::{Mul, Relu};
//! use echograd::tape::{Plan, Tape};
//! use echograd::tensor::Shape;
//!
//! let mut tape = Tape::new();
//! let x = tape.input("x", Shape::per_channel(3));
//! let w = tape.parameter("w", Shape::per_channel(3));
//! let y = tape.push(Relu, &[x])?;
//! let y = tape.push(Mul, &[y, w])?;
//! let one = tape.input("dy", Shape::per_channel(3));
//! let dw = tape.backward_from(&[(y, one)], &[w])?[0].unwrap();
//! tape.keep(dw);
//!
//! let mut session = Session::<f64>::new(Plan::new(&tape, Default::default())?)?;
//! session.write(x, &[-1.0, 2.0, 3.0]);
//! session.write(w, &[4.0, 5.0, 6.0]);
//! session.write(one, &[1.0, 1.0, 1.0]);
//! session.run();
//! assert_eq!(session.read(dw), [0.0, 2.0, 3.0]);
//! # Ok::<(), echograd::Error>(())
//! ```

mod plan;

use std::sync::Arc;

pub use plan::{Options, Plan, PlannedStep, Slot, Target};

use crate::error::{Error, Result};
use crate::ops::Op;
use crate::ops::pointwise::{Add, Fill};
use crate::tensor::Shape;

/// A value of the tape that recorded it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Var(u32);

impl Var {
    /// Position in the tape's list of values.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Who writes a value, and how long it lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Written by the caller before a replay; persists between replays.
    Input,
    /// Learned: persists, is saved in checkpoints and updated by the optimizer's step.
    Parameter,
    /// Persists and is updated by the tape itself: running statistics, optimizer moments.
    State,
    /// Produced by a step; lives in the arena from there to its last use.
    Computed,
}

/// One tensor of the tape.
#[derive(Clone, Debug)]
pub struct Value {
    /// Dotted path of scopes and name, unique for parameters and states.
    pub name: String,
    /// Extent.
    pub shape: Shape,
    /// Who writes it.
    pub kind: Kind,
    /// Whether it can be read after a replay.
    pub kept: bool,
    /// Whether it is stored as bf16 where a GPU stores activations so ([`Op::narrow`]).
    pub narrow: bool,
}

/// The part of a value's name that says which layer it belongs to.
pub(crate) fn layer(name: &str) -> Option<&str> {
    name.rsplit_once('.').map(|(layer, _)| layer)
}

/// One operation applied to values.
#[derive(Clone, Debug)]
pub struct Step {
    /// What is done.
    pub op: Arc<dyn Op>,
    /// Values read.
    pub inputs: Vec<Var>,
    /// Values written. Persistent ones are updated in place.
    pub outputs: Vec<Var>,
    /// For a gradient step, the forward step that it belongs to.
    pub origin: Option<usize>,
}

/// A recorded computation.
#[derive(Clone, Default, Debug)]
pub struct Tape {
    values: Vec<Value>,
    steps: Vec<Step>,
    scopes: Vec<String>,
    origin: Option<usize>,
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        Self::default()
    }

    /// All values, by [`Var::index`].
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// All steps in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Extent of a value.
    pub fn shape(&self, var: Var) -> Shape {
        self.values[var.index()].shape
    }

    /// Name of a value.
    pub fn name(&self, var: Var) -> &str {
        &self.values[var.index()].name
    }

    /// All values of a kind, in the order of recording.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = Var> + '_ {
        (0..self.values.len() as u32)
            .map(Var)
            .filter(move |v| self.values[v.index()].kind == kind)
    }

    /// The value of a kind with that full name.
    pub fn find(&self, kind: Kind, name: &str) -> Option<Var> {
        self.of_kind(kind).find(|&v| self.name(v) == name)
    }

    /// Names recorded inside `body` are prefixed with `name.`.
    pub fn scope<R>(&mut self, name: impl Into<String>, body: impl FnOnce(&mut Self) -> R) -> R {
        self.scopes.push(name.into());
        let result = body(self);
        self.scopes.pop();
        result
    }

    /// The names of the scopes that it is in, joined by dots.
    pub fn path(&self) -> String {
        self.scopes.join(".")
    }

    fn value(&mut self, name: &str, shape: Shape, kind: Kind) -> Var {
        let mut full = self.path();
        if !full.is_empty() {
            full.push('.');
        }
        full.push_str(name);
        let kept = kind != Kind::Computed;
        self.values.push(Value {
            name: full,
            shape,
            kind,
            kept,
            narrow: false,
        });
        Var(self.values.len() as u32 - 1)
    }

    /// A value that the caller writes before a replay.
    pub fn input(&mut self, name: &str, shape: Shape) -> Var {
        self.value(name, shape, Kind::Input)
    }

    /// A learned value.
    pub fn parameter(&mut self, name: &str, shape: Shape) -> Var {
        self.value(name, shape, Kind::Parameter)
    }

    /// A persistent value that steps of the tape update.
    pub fn state(&mut self, name: &str, shape: Shape) -> Var {
        self.value(name, shape, Kind::State)
    }

    /// Makes a computed value readable after a replay.
    pub fn keep(&mut self, var: Var) {
        self.values[var.index()].kept = true;
    }

    /// Marks an input as an activation: it is stored as bf16 on a GPU that stores activations so, and
    /// so is whatever is computed from it, as far as the operations' [`Op::narrow`] says so.
    pub fn narrow(&mut self, input: Var) {
        self.values[input.index()].narrow = true;
    }

    /// Records an operation with one output.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operation cannot combine these inputs.
    pub fn push(&mut self, op: impl Op + 'static, inputs: &[Var]) -> Result<Var> {
        let outputs = self.push_all(op, inputs)?;
        debug_assert_eq!(
            outputs.len(),
            1,
            "{} has several outputs",
            self.steps.last().unwrap().op.name()
        );
        Ok(outputs[0])
    }

    /// Records an operation and returns all its outputs.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operation cannot combine these inputs.
    pub fn push_all(&mut self, op: impl Op + 'static, inputs: &[Var]) -> Result<Vec<Var>> {
        let shapes = self.shapes(inputs);
        let outputs = op.outputs(&shapes)?;
        let narrow: Vec<bool> = inputs
            .iter()
            .map(|v| self.values[v.index()].narrow)
            .collect();
        let outputs = outputs
            .iter()
            .enumerate()
            .map(|(o, &shape)| {
                let output = self.value(op.name(), shape, Kind::Computed);
                self.values[output.index()].narrow = op.narrow(o, &narrow);
                output
            })
            .collect();
        let step = Step {
            op: Arc::new(op),
            inputs: inputs.to_vec(),
            outputs,
            origin: self.origin,
        };
        self.steps.push(step);
        Ok(self.steps.last().unwrap().outputs.clone())
    }

    /// Records an operation that updates persistent values (`targets`) in place.
    ///
    /// # Errors
    /// [`Error::Shape`] if the targets do not have the shapes the operation writes, are not
    /// persistent, are read by the same step, or name one value twice.
    pub fn update(&mut self, op: impl Op + 'static, inputs: &[Var], targets: &[Var]) -> Result<()> {
        let name = op.name();
        let expected = op.outputs(&self.shapes(inputs))?;
        let found = self.shapes(targets);
        if expected != found {
            return Err(Error::shape(
                name,
                format!("updates {expected:?}, found targets {found:?}"),
            ));
        }
        for (i, &target) in targets.iter().enumerate() {
            let computed = self.values[target.index()].kind == Kind::Computed;
            if computed || inputs.contains(&target) || targets[..i].contains(&target) {
                return Err(Error::shape(
                    name,
                    format!("cannot update {} in place", self.name(target)),
                ));
            }
        }
        let step = Step {
            op: Arc::new(op),
            inputs: inputs.to_vec(),
            outputs: targets.to_vec(),
            origin: self.origin,
        };
        self.steps.push(step);
        Ok(())
    }

    /// Makes a step read another value of the same shape: how tests break a recorded gradient.
    #[doc(hidden)]
    pub fn rewire(&mut self, step: usize, input: usize, to: Var) {
        let old = std::mem::replace(&mut self.steps[step].inputs[input], to);
        assert_eq!(self.shape(old), self.shape(to));
    }

    /// Appends the gradient of the scalar `loss` with respect to each of `wrt`; `None` for a value
    /// that the loss does not depend on.
    ///
    /// # Errors
    /// [`Error::Shape`] if `loss` is no scalar or an operation on the way has no derivative.
    pub fn backward(&mut self, loss: Var, wrt: &[Var]) -> Result<Vec<Option<Var>>> {
        let shape = self.shape(loss);
        if shape != Shape::SCALAR {
            return Err(Error::shape(
                "backward",
                format!("expected a scalar loss, found {shape}"),
            ));
        }
        let one = self.push(Fill { shape, value: 1.0 }, &[])?;
        self.backward_from(&[(loss, one)], wrt)
    }

    /// Appends the vector–Jacobian product: `seeds` pairs values with the gradient that reaches
    /// them, each of the same shape. Reverse-mode differentiation in the order of the tape.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    pub fn backward_from(&mut self, seeds: &[(Var, Var)], wrt: &[Var]) -> Result<Vec<Option<Var>>> {
        let forward = self.steps.len();
        let mut needed = vec![false; self.values.len()];
        wrt.iter().for_each(|v| needed[v.index()] = true);
        for step in &self.steps {
            if step.inputs.iter().any(|v| needed[v.index()]) {
                step.outputs.iter().for_each(|v| needed[v.index()] = true);
            }
        }
        let mut gradients: Vec<Option<Var>> = vec![None; self.values.len()];
        for &(value, gradient) in seeds {
            if self.shape(value) != self.shape(gradient) {
                let (v, g) = (self.shape(value), self.shape(gradient));
                return Err(Error::shape(
                    "backward",
                    format!("value {v} with gradient {g}"),
                ));
            }
            gradients[value.index()] = Some(gradient);
        }
        for index in (0..forward).rev() {
            let step = self.steps[index].clone();
            let reached = step.outputs.iter().any(|v| gradients[v.index()].is_some());
            if !reached || !step.inputs.iter().any(|v| needed[v.index()]) {
                continue;
            }
            self.origin = Some(index);
            // Gradients are named after the layer that they belong to.
            let layer = layer(self.name(step.outputs[0])).map(str::to_owned);
            let scopes = std::mem::replace(&mut self.scopes, layer.into_iter().collect());
            let mut backward = Backward {
                output_gradients: step.outputs.iter().map(|v| gradients[v.index()]).collect(),
                wanted: step.inputs.iter().map(|v| needed[v.index()]).collect(),
                pending: step.inputs.iter().map(|v| gradients[v.index()]).collect(),
                input_gradients: vec![None; step.inputs.len()],
                summed: vec![false; step.inputs.len()],
                tape: self,
                step: &step,
            };
            let result = step.op.backward(&mut backward);
            let (found, summed) = (backward.input_gradients, backward.summed);
            let found = found.into_iter().zip(summed);
            let added = result.and_then(|()| {
                found
                    .zip(&step.inputs)
                    .try_for_each(|((gradient, summed), input)| {
                        let sum = match (gradient, gradients[input.index()]) {
                            (None, _) => return Ok(()),
                            (Some(gradient), Some(other)) if !summed => {
                                self.push(Add, &[other, gradient])?
                            }
                            (Some(gradient), _) => gradient,
                        };
                        gradients[input.index()] = Some(sum);
                        Ok(())
                    })
            });
            self.scopes = scopes;
            added?;
            self.origin = None;
        }
        Ok(wrt.iter().map(|v| gradients[v.index()]).collect())
    }

    fn shapes(&self, vars: &[Var]) -> Vec<Shape> {
        vars.iter().map(|&v| self.shape(v)).collect()
    }
}

/// What an operation sees while it records its gradient: one forward step, the gradients that
/// reached its outputs, and which of its inputs want one.
pub struct Backward<'a> {
    tape: &'a mut Tape,
    step: &'a Step,
    output_gradients: Vec<Option<Var>>,
    wanted: Vec<bool>,
    pending: Vec<Option<Var>>,
    input_gradients: Vec<Option<Var>>,
    summed: Vec<bool>,
}

impl Backward<'_> {
    /// The forward step's input `i`.
    pub fn input(&self, i: usize) -> Var {
        self.step.inputs[i]
    }

    /// The number of inputs.
    pub fn inputs(&self) -> usize {
        self.step.inputs.len()
    }

    /// The forward step's output `o`.
    pub fn output(&self, o: usize) -> Var {
        self.step.outputs[o]
    }

    /// Extent of a value.
    pub fn shape(&self, var: Var) -> Shape {
        self.tape.shape(var)
    }

    /// The gradient that reached output `o`; `None` if nothing depends on that output.
    pub fn gradient(&self, o: usize) -> Option<Var> {
        self.output_gradients[o]
    }

    /// The gradient that reached output `o`, zeros if nothing depends on that output.
    ///
    /// # Errors
    /// Never for a valid tape.
    pub fn gradient_or_zeros(&mut self, o: usize) -> Result<Var> {
        let shape = self.shape(self.output(o));
        match self.output_gradients[o] {
            Some(gradient) => Ok(gradient),
            None => self.push(Fill { shape, value: 0.0 }, &[]),
        }
    }

    /// Whether a value is 1 throughout, as the gradient that reaches the loss itself is.
    pub fn is_one(&self, var: Var) -> bool {
        let mut steps = self.tape.steps.iter().rev();
        let writer = steps.find(|step| step.outputs.contains(&var));
        writer.is_some_and(|step| step.op.constant() == Some(1.0))
    }

    /// Whether input `i` leads to something that is differentiated.
    pub fn wants(&self, i: usize) -> bool {
        self.wanted[i]
    }

    /// Records a gradient step with one output.
    ///
    /// # Errors
    /// As [`Tape::push`].
    pub fn push(&mut self, op: impl Op + 'static, inputs: &[Var]) -> Result<Var> {
        self.tape.push(op, inputs)
    }

    /// Records a gradient step and returns all its outputs.
    ///
    /// # Errors
    /// As [`Tape::push_all`].
    pub fn push_all(&mut self, op: impl Op + 'static, inputs: &[Var]) -> Result<Vec<Var>> {
        self.tape.push_all(op, inputs)
    }

    /// The gradient that reached input `i` from later uses of the same value, if there are any. An operation
    /// that can add to it at less cost than [`Add`] does so, and declares the result with
    /// [`Backward::set_sum`].
    pub fn pending(&self, i: usize) -> Option<Var> {
        let input = self.step.inputs[i];
        let uses = self.step.inputs.iter().filter(|&&v| v == input).count();
        // A value that the step reads twice also gets a gradient by its other use.
        self.pending[i].filter(|_| uses == 1)
    }

    /// Declares the gradient of input `i` together with what was [`Backward::pending`].
    ///
    /// # Errors
    /// As [`Backward::set`].
    pub fn set_sum(&mut self, i: usize, sum: Var) -> Result<()> {
        self.set(i, sum)?;
        self.summed[i] = true;
        Ok(())
    }

    /// Declares the gradient of input `i`, which must have that input's shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if it has another.
    pub fn set(&mut self, i: usize, gradient: Var) -> Result<()> {
        let (expected, found) = (self.shape(self.input(i)), self.shape(gradient));
        if expected != found {
            return Err(Error::shape(
                self.step.op.name(),
                format!("gradient of input {i}: expected {expected}, found {found}"),
            ));
        }
        self.input_gradients[i] = Some(gradient);
        Ok(())
    }
}
