//! The operations, one room each.
//!
//! A room holds what an operation is (its shape rule and cost), its CPU kernel, how its gradient is
//! recorded, and its random test cases. To add one: write a struct that implements [`Op`] and
//! [`Kernel`], give it a `cases` function, and add its line to [`registry`]; the gradient checks,
//! the benchmarks and the program's `gradcheck` find it there.
//!
//! The rule for a kernel: it reads its inputs, writes *every* element of its outputs (the arena is
//! not cleared between steps), allocates nothing, and gives the same bits at any number of threads:
//! work is split into pieces of fixed size and partial sums are added in a fixed order.

pub mod activation;
pub mod add_relu;
pub mod batch_norm;
pub mod concat;
pub mod consistency;
pub mod conv2d;
pub mod conv_transpose2d;
pub mod depthwise_conv2d;
pub mod dropout;
pub mod examples;
pub mod gate;
pub mod group_norm;
pub mod layer_norm;
pub mod losses;
pub mod mask_head;
pub mod moments;
pub mod multitask_loss;
mod norm;
pub mod overlap;
pub mod perimeter;
pub mod pointwise;
pub mod pool;
pub mod prior;
mod rows;
pub mod shape_features;
mod statistics;
pub mod stochastic_depth;
pub mod upsample;

use std::fmt::Debug;
use std::sync::Arc;

use crate::device::cpu::Io;
use crate::device::gpu::launch::Launches;
use crate::error::{Error, Result};
use crate::gradcheck::{Case, Sampler};
use crate::tape::{Backward, Var};
use crate::tensor::Shape;

/// What changes from step to step reaches the operations through one small input, `1×1×1×LEN`, so
/// that a recorded (or captured) step never has to be recorded again.
pub mod control {
    /// Elements of the control vector.
    pub const LEN: usize = 4;
    /// Number of the training step, counted from 1; exact in `f32` up to 2²⁴.
    pub const STEP: usize = 0;
    /// Learning rate of this step.
    pub const LEARNING_RATE: usize = 1;
    /// Ramp of the consistency term, 0 to 1.
    pub const RAMP: usize = 2;
    /// Decay of the exponential moving average of the parameters in this step.
    pub const EMA_DECAY: usize = 3;
}

/// The CPU code of an operation for elements of type `T`.
pub trait Kernel<T> {
    /// Computes the outputs from the inputs.
    fn run(&self, io: &mut Io<'_, T>);
}

/// Work of one step, from which time can be predicted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cost {
    /// Floating-point operations; a fused multiply-add counts two.
    pub flops: u64,
    /// Elements that must be read or written at least once.
    pub elements: u64,
}

/// An operation of the tape.
pub trait Op: Kernel<f32> + Kernel<f64> + Debug + Send + Sync {
    /// Its name in the registry, plans and profiles.
    fn name(&self) -> &'static str;

    /// The shape rule.
    ///
    /// # Errors
    /// [`Error::Shape`] if the inputs do not fit together.
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>>;

    /// Arithmetic of one application, from the shapes. A fused multiply-add counts two.
    fn flops(&self, inputs: &[Shape], outputs: &[Shape]) -> u64 {
        let _ = inputs;
        outputs.iter().map(|s| s.len() as u64).sum()
    }

    /// Arithmetic and compulsory traffic of one application.
    fn cost(&self, inputs: &[Shape], outputs: &[Shape]) -> Cost {
        let elements = inputs.iter().chain(outputs).map(|s| s.len() as u64).sum();
        Cost {
            flops: self.flops(inputs, outputs),
            elements,
        }
    }

    /// Records the gradient of one application.
    ///
    /// # Errors
    /// [`Error::Shape`] if the operation has no derivative (the gradient operations themselves).
    fn backward(&self, at: &mut Backward<'_>) -> Result<()> {
        let _ = at;
        Err(Error::shape(self.name(), "has no derivative"))
    }

    /// The input that output 0 may overwrite, if the kernel can work in place. The kernel then asks
    /// [`Io::in_place`] and, if so, finds the input's elements in its output.
    fn in_place(&self) -> Option<usize> {
        None
    }

    /// An operation, with its inputs, that gives output 0 again at less cost than keeping it until the
    /// backward pass: often the operation itself, or a cheaper one that reads its other outputs.
    fn rerun(&self, inputs: &[Var], outputs: &[Var]) -> Option<(Arc<dyn Op>, Vec<Var>)> {
        let _ = (inputs, outputs);
        None
    }

    /// Elements of working memory that the kernel wants.
    fn scratch(&self, inputs: &[Shape], outputs: &[Shape]) -> usize {
        let _ = (inputs, outputs);
        0
    }

    /// Whether output `output` is stored as bf16 on a GPU that stores activations so, given which inputs
    /// are. By default output 0 is stored as input 0, and everything else (statistics, sums, gradients
    /// of parameters) in full.
    fn narrow(&self, output: usize, inputs: &[bool]) -> bool {
        output == 0 && inputs.first() == Some(&true)
    }

    /// The value of every element of output 0, if that is known when the operation is recorded.
    fn constant(&self) -> Option<f64> {
        None
    }

    /// Records what a GPU launches for one application.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if there is none; else as [`Launches::launch`].
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let _ = at;
        Err(Error::NoKernel { op: self.name() })
    }

    /// A copy of an input that [`Op::launch`] wants to be laid out in another way ([`Launches::copy`]). Of inputs that
    /// nothing has written, all steps' copies are made by one launch at the beginning of a replay.
    fn device_copy(&self, inputs: &[Shape], outputs: &[Shape]) -> Option<Copied> {
        let _ = (inputs, outputs);
        None
    }

    /// Bytes of working memory that [`Op::launch`] wants.
    fn device_scratch(&self, inputs: &[Shape], outputs: &[Shape]) -> usize {
        let _ = (inputs, outputs);
        0
    }
}

/// A copy that an operation wants on a GPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copied {
    /// Number of the input.
    pub input: usize,
    /// Size of the copy.
    pub bytes: usize,
}

/// A line of the registry.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The operation's [`Op::name`].
    pub name: &'static str,
    /// What it computes, in a few words.
    pub summary: &'static str,
    /// Draws a random problem for the gradient check: sizes of 1, odd sizes, every parameter of the
    /// operation, values near its kinks but not on them.
    pub case: fn(&mut Sampler) -> Case,
}

/// All differentiable operations.
pub fn registry() -> Vec<Entry> {
    let entry = |name, summary, case| Entry {
        name,
        summary,
        case,
    };
    vec![
        entry("add", "a + b", pointwise::add_case),
        entry("mul", "a · b", pointwise::mul_case),
        entry("scale", "factor · x", pointwise::scale_case),
        entry("bias_add", "x + b", pointwise::bias_add_case),
        entry("relu", "max(x, 0)", pointwise::relu_case),
        entry("conv2d", "x ∗ w", conv2d::conv2d_case),
        entry("linear", "x·wᵀ", conv2d::linear_case),
        entry("conv2d_bias", "x ∗ w + b", conv2d::conv2d_bias_case),
        entry(
            "depthwise_conv2d",
            "x ∗ w, each channel by itself",
            depthwise_conv2d::case,
        ),
        entry(
            "conv2d_norm",
            "activation of x ∗ w normalised over the batch",
            conv2d::conv2d_norm_case,
        ),
        entry(
            "depthwise_conv2d_norm",
            "as conv2d_norm, each channel by itself",
            depthwise_conv2d::norm_case,
        ),
        entry(
            "conv_transpose2d",
            "the transpose of x ∗ w",
            conv_transpose2d::case,
        ),
        entry("add_relu", "max(a + b, 0)", add_relu::case),
        entry("gate", "x·σ(z), z per channel or per pixel", gate::case),
        entry("silu", "x·σ(x)", pointwise::silu_case),
        entry("sigmoid", "σ(x)", pointwise::sigmoid_case),
        entry("dropout", "x or 0, at random", dropout::case),
        entry(
            "stochastic_depth",
            "residual + x or 0, at random for each image",
            stochastic_depth::case,
        ),
        entry("concat", "channels of several tensors", concat::case),
        entry(
            "bce_with_logits",
            "cross-entropy per image",
            losses::bce_case,
        ),
        entry("soft_dice", "1 − Dice per image", losses::soft_dice_case),
        entry("mse", "mean (a − b)² per image", losses::mse_case),
        entry("weighted_mean", "Σwv / Σw", losses::weighted_mean_case),
        entry(
            "moments",
            "area, Σm², first and central second moments",
            moments::case,
        ),
        entry("perimeter", "Σ √(|∇m|² + ε²) − ε, Sobel", perimeter::case),
        entry(
            "shape_features",
            "irregularity, orientation, margin, roundness",
            shape_features::case,
        ),
        entry("prior", "σ(b + Σ w(f − μ)/s)", prior::case),
        entry("consistency", "Σ confidence·(p − φ)²", consistency::case),
        entry(
            "mask_head",
            "cross-entropy, Dice, moments, perimeter of a mask's logits",
            mask_head::case,
        ),
        entry(
            "multitask_loss",
            "all terms of the loss from each image's values",
            multitask_loss::case,
        ),
        entry(
            "batch_norm",
            "activation of x normalised over the batch",
            batch_norm::batch_norm_case,
        ),
        entry(
            "normalize",
            "activation of x normalised with given statistics",
            batch_norm::normalize_case,
        ),
        entry(
            "group_norm",
            "activation of x normalised over groups of channels",
            group_norm::group_norm_case,
        ),
        entry(
            "layer_norm",
            "x normalised over the channels of each pixel",
            layer_norm::case,
        ),
        entry("max_pool2d", "maximum over windows", pool::max_pool2d_case),
        entry("avg_pool2d", "average over windows", pool::avg_pool2d_case),
        entry(
            "global_avg_pool",
            "average over images",
            pool::global_avg_pool_case,
        ),
        entry(
            "upsample2x",
            "bilinear, twice the rows and columns",
            upsample::upsample2x_case,
        ),
    ]
}

/// What is checked on devices beside [`registry`]: operations of inference and validation, which have no gradient, and
/// sizes at which finite differences would take too long.
pub fn device_registry() -> Vec<Entry> {
    let entry = |name, summary, case| Entry {
        name,
        summary,
        case,
    };
    vec![
        entry(
            "conv2d_wide",
            "x ∗ w of many channels",
            conv2d::conv2d_wide_case,
        ),
        entry(
            "conv2d_inference",
            "activation of x ∗ w + b",
            conv2d::conv2d_inference_case,
        ),
        entry(
            "depthwise_conv2d_inference",
            "as conv2d_inference, each channel by itself",
            depthwise_conv2d::inference_case,
        ),
        entry(
            "overlap",
            "pixels of two masks, in both and in either",
            overlap::case,
        ),
    ]
}

/// Applies an operation with one output once.
#[cfg(test)]
pub(crate) fn apply<T: crate::device::cpu::Element>(
    op: impl Op + 'static,
    inputs: &[(Shape, &[T])],
) -> Vec<T> {
    apply_all(op, inputs).swap_remove(0)
}

/// Applies an operation once and returns all its outputs.
#[cfg(test)]
pub(crate) fn apply_all<T: crate::device::cpu::Element>(
    op: impl Op + 'static,
    inputs: &[(Shape, &[T])],
) -> Vec<Vec<T>> {
    use crate::device::cpu::Session;
    use crate::tape::{Plan, Tape};
    let mut tape = Tape::new();
    let vars: Vec<Var> = inputs.iter().map(|i| tape.input("input", i.0)).collect();
    let outputs = tape.push_all(op, &vars).unwrap();
    outputs.iter().for_each(|&y| tape.keep(y));
    let mut session = Session::<T>::new(Plan::new(&tape, Default::default()).unwrap()).unwrap();
    for (&var, input) in vars.iter().zip(inputs) {
        session.write(var, input.1);
    }
    session.run();
    outputs.iter().map(|&y| session.read(y).to_vec()).collect()
}
