//! Weights of a network from where it is trained or stored to where it is evaluated, by name.

use std::borrow::Cow;

use super::BATCH_NORM_EPS;
use crate::device::Session;
use crate::device::gpu::launch::{Full, Grid, kernel};
use crate::device::gpu::{self, Gpu, Hold, Memory};
use crate::error::Result;
use crate::tape::{Kind, Tape, Var};
use crate::tensor::{Real, Shape};

/// A convolution of [`super::Mode::Infer`] that stands for one with a batch normalisation behind it.
#[derive(Clone, PartialEq, Debug)]
pub struct Fold {
    pub(super) weight: Var,
    pub(super) bias: Var,
    /// Full name of the normalisation's layer.
    pub(super) norm: String,
}

/// A parameter or state of a tape and the values that it is made of, each given as an `S`.
#[derive(Clone, Debug)]
pub struct Part<S> {
    /// What is made.
    pub to: Var,
    /// The value of the same name.
    pub from: S,
    /// The normalisation that is folded into it.
    pub norm: Option<Norm<S>>,
}

/// A batch normalisation that a convolution's weights and bias take in.
#[derive(Clone, Debug)]
pub struct Norm<S> {
    /// The bias of the convolution, made of the normalisation alone.
    pub bias: Var,
    /// γ, β, running mean and running variance.
    pub values: [S; 4],
}

impl<S> Part<S> {
    /// The same of other values.
    ///
    /// # Errors
    /// The first of `value`.
    pub fn map<'a, R>(&'a self, mut value: impl FnMut(&'a S) -> Result<R>) -> Result<Part<R>> {
        let from = value(&self.from)?;
        let norm = self.norm.as_ref().map(|norm| -> Result<Norm<R>> {
            let [gamma, beta, mean, variance] = &norm.values;
            Ok(Norm {
                bias: norm.bias,
                values: [value(gamma)?, value(beta)?, value(mean)?, value(variance)?],
            })
        });
        Ok(Part {
            to: self.to,
            from,
            norm: norm.transpose()?,
        })
    }
}

/// All parameters and states of `tape`, made of those of the same network in training or evaluation, which `source`
/// gives by name and extent; `folds` are those of a tape that was recorded in [`super::Mode::Infer`].
///
/// # Errors
/// The first of `source`.
pub fn parts<S>(
    tape: &Tape,
    folds: &[Fold],
    mut source: impl FnMut(&str, Shape) -> Result<S>,
) -> Result<Vec<Part<S>>> {
    let values = [Kind::Parameter, Kind::State].map(|kind| tape.of_kind(kind));
    let values = values.into_iter().flatten();
    let values = values.filter(|&var| !folds.iter().any(|fold| fold.bias == var));
    let part = |to: Var| {
        let shape = tape.shape(to);
        let from = source(tape.name(to), shape)?;
        let fold = folds.iter().find(|fold| fold.weight == to);
        let norm = fold.map(|fold| -> Result<Norm<S>> {
            let channels = Shape::per_channel(shape.n);
            let mut value = |name: &str| source(&format!("{}.{name}", fold.norm), channels);
            Ok(Norm {
                bias: fold.bias,
                values: [
                    value("weight")?,
                    value("bias")?,
                    value("running_mean")?,
                    value("running_var")?,
                ],
            })
        });
        Ok(Part {
            to,
            from,
            norm: norm.transpose()?,
        })
    };
    values.map(part).collect()
}

/// Writes a part of `session`.
///
/// # Errors
/// As [`Session::write`].
pub fn load<T: Real>(session: &mut dyn Session<T>, part: Part<Cow<'_, [T]>>) -> Result<()> {
    let Part { to, mut from, norm } = part;
    if let Some(Norm { bias, values }) = norm {
        let [gamma, beta, mean, variance] = values;
        let channels = gamma.len();
        let factor = |o: usize| gamma[o].wide() / (variance[o].wide() + BATCH_NORM_EPS).sqrt();
        let filters = from.len() / channels;
        for (o, filter) in from.to_mut().chunks_mut(filters).enumerate() {
            let factor = factor(o);
            filter
                .iter_mut()
                .for_each(|w| *w = T::of(factor * w.wide()));
        }
        let of_norm = |o: usize| T::of(beta[o].wide() - factor(o) * mean[o].wide());
        session.write(bias, &(0..channels).map(of_norm).collect::<Vec<_>>())?;
    }
    session.write(to, &from)
}

/// Elements of a part of the table of `fold_norm` in `kernels/norm.cu`, and threads of its blocks.
const CHUNK: usize = 4096;
const THREADS: u32 = 256;

kernel! {
    struct FoldNorm = "fold_norm" { parts: Full, eps: f64 }
}

/// [`load`] of all parts of one session from another's values, without their way over the host: one launch, with the
/// same bits.
pub struct Transfer {
    gpu: Gpu,
    table: Memory,
    chunks: usize,
    /// What the table points to.
    _held: [Hold; 2],
}

impl Transfer {
    /// From `from` to `to`, sessions of one GPU, by values of `from` that nobody computes.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is no memory for its table.
    ///
    /// # Panics
    /// If they are of different devices.
    pub fn new(from: &gpu::Session, to: &gpu::Session, parts: &[Part<Var>]) -> Result<Self> {
        assert!(from.gpu().is(to.gpu()), "sessions of different devices");
        let source = |var: Var| from.input(var).address();
        let mut table: Vec<u64> = Vec::new();
        for part in parts {
            let shape = to.plan().values()[part.to.index()].shape;
            let (values, bias) = match &part.norm {
                Some(norm) => (norm.values.map(source), to.input(norm.bias).address()),
                None => ([0; 4], 0),
            };
            let filter = shape.pixels() * shape.c;
            for first in (0..shape.len()).step_by(CHUNK) {
                let len = CHUNK.min(shape.len() - first);
                table.extend([source(part.from), to.input(part.to).address()]);
                table.extend(values);
                table.extend([bias, (first | len << 32) as u64, filter as u64]);
            }
        }
        let memory = from.gpu().memory(size_of_val(&table[..]))?;
        memory.write(0, bytemuck::cast_slice(&table))?;
        Ok(Self {
            gpu: from.gpu().clone(),
            table: memory,
            chunks: table.len() / WORDS,
            _held: [from.hold(), to.hold()],
        })
    }

    /// Queues it behind the work queued so far.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses.
    pub fn queue(&self) -> Result<()> {
        let arguments = FoldNorm {
            parts: self.table.pointer().into(),
            eps: BATCH_NORM_EPS,
        };
        // SAFETY: the table's addresses are those of values of their extents in two sessions, whose memory is held.
        unsafe { self.gpu.queue(Grid::new(self.chunks, THREADS), &arguments) }
    }
}

/// Words of an entry of the table.
const WORDS: usize = 9;
