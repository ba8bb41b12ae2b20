//! Layers and networks: functions that record operations on a tape under the names of their
//! parameters.
//!
//! A [`Network`] wraps the tape while a model is recorded. The same model recorded in
//! [`Mode::Train`] and in [`Mode::Evaluate`] has the same parameters by the same names, so weights
//! move between the two by name; in [`Mode::Infer`] normalisations are folded into the convolutions
//! before them ([`weights`]). Random starting values are keyed by seed and name: models that share
//! a layer start from the same weights in it, whatever else they have.
//!
//! ```
//! use echograd::nn::{Heads, Mode, Network, UNet};
//! use echograd::tape::{Kind, Tape};
//! use echograd::tensor::Shape;
//!
//! let mut tape = Tape::new();
//! let images = tape.input("images", Shape::new(2, 32, 32, 1));
//! let unet = UNet { widths: vec![4, 8, 16], dropout: 0.0 };
//! let mut network = Network::new(&mut tape, Mode::Evaluate);
//! let logits = unet.record(&mut network, images, Heads { mask: true, malignancy: true })?;
//! assert_eq!(tape.shape(logits.mask.unwrap()), Shape::new(2, 32, 32, 1));
//! assert_eq!(tape.shape(logits.malignancy.unwrap()), Shape::per_image(2, 1));
//! assert!(tape.find(Kind::Parameter, "encoder.0.conv1.weight").is_some());
//! # Ok::<(), echograd::Error>(())
//! ```

mod attention_unet;
mod efficientnet;
mod unet;
pub mod weights;

pub use attention_unet::AttentionUNet;
pub use efficientnet::{EfficientNet, Stage};
pub use unet::UNet;
pub use weights::Fold;

use crate::device::Session;
use crate::device::philox::Philox;
use crate::error::Result;
use crate::ops::Op;
use crate::ops::activation::Activation;
use crate::ops::batch_norm::{Normalize, RunningStatistics};
use crate::ops::conv2d::{Conv2d, Conv2dBias};
use crate::ops::depthwise_conv2d::{DepthwiseConv2d, DepthwiseConv2dBias};
use crate::ops::dropout::Dropout;
use crate::ops::pointwise::{Add, Relu, Silu};
use crate::ops::stochastic_depth::StochasticDepth;
use crate::tape::{Tape, Var};
use crate::tensor::{Real, Shape};

/// Added to the variance by batch normalisation.
pub const BATCH_NORM_EPS: f64 = 1e-5;
/// Weight of a new batch in the running statistics.
pub const BATCH_NORM_MOMENTUM: f64 = 0.1;

/// Which behaviour of a network is recorded.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    /// Batch statistics, running statistics updated, dropout and stochastic depth.
    Train {
        /// The control vector, from which random layers take the number of the step.
        control: Var,
        /// Seed of random layers.
        seed: u64,
    },
    /// Running statistics, nothing random.
    Evaluate,
    /// As [`Mode::Evaluate`], faster: each convolution takes its bias and activation along, and a batch
    /// normalisation behind it is part of its weights and bias. Without gradients.
    Infer,
}

/// Which outputs of a model are recorded; branches that lead to none are left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heads {
    /// The lesion's mask.
    pub mask: bool,
    /// The lesion's malignancy.
    pub malignancy: bool,
}

/// Outputs of a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Logits {
    /// N×H×W×1 at the images' resolution.
    pub mask: Option<Var>,
    /// N×1×1×1.
    pub malignancy: Option<Var>,
}

/// How a value starts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Start {
    /// Normal with variance `2 / fan-in`, for a layer followed by a ReLU (He et al. 2015).
    HeNormal,
    /// Uniform with variance `1 / (3 fan-in)`, for a last layer, whose outputs should start small.
    Uniform,
    /// The same number everywhere.
    Constant(f64),
}

/// The statistics of the batch normalisations recorded so far.
#[derive(Default)]
struct Moved {
    counts: Vec<usize>,
    /// Mean and variance of each, of the batch and running.
    batch: Vec<Var>,
    running: Vec<Var>,
}

/// A tape while a model is recorded on it.
pub struct Network<'a> {
    tape: &'a mut Tape,
    mode: Mode,
    random_layers: u32,
    starts: Vec<(Var, Start)>,
    folds: Vec<Fold>,
    moved: Moved,
}

impl<'a> Network<'a> {
    /// Records onto `tape`.
    pub fn new(tape: &'a mut Tape, mode: Mode) -> Self {
        Self {
            tape,
            mode,
            random_layers: 0,
            starts: Vec::new(),
            folds: Vec::new(),
            moved: Moved::default(),
        }
    }

    /// Moves the running statistics of all batch normalisations recorded so far, by one operation: what a model in
    /// [`Mode::Train`] ends with. In other modes there is nothing to move.
    ///
    /// # Errors
    /// Never.
    pub fn move_statistics(&mut self) -> Result<()> {
        let moved = std::mem::take(&mut self.moved);
        if moved.counts.is_empty() {
            return Ok(());
        }
        let op = RunningStatistics {
            momentum: BATCH_NORM_MOMENTUM,
            counts: moved.counts,
        };
        self.tape.update(op, &moved.batch, &moved.running)
    }

    /// The tape.
    pub fn tape(&mut self) -> &mut Tape {
        self.tape
    }

    /// All parameters and states recorded so far, in order, and how they start.
    pub fn starts(&self) -> &[(Var, Start)] {
        &self.starts
    }

    /// The convolutions into which a normalisation was folded.
    pub fn folds(&self) -> &[Fold] {
        &self.folds
    }

    /// Extent of a value.
    pub fn shape(&self, var: Var) -> Shape {
        self.tape.shape(var)
    }

    fn parameter(&mut self, layer: &str, name: &str, shape: Shape, start: Start) -> Var {
        let var = self.tape.scope(layer, |tape| tape.parameter(name, shape));
        self.starts.push((var, start));
        var
    }

    fn state(&mut self, layer: &str, name: &str, shape: Shape, start: Start) -> Var {
        let var = self.tape.scope(layer, |tape| tape.state(name, shape));
        self.starts.push((var, start));
        var
    }

    /// A square convolution to `channels`, stride 1, zero-padded so that the extent stays; parameter
    /// `LAYER.weight`. `kernel` is odd.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] never for an odd `kernel`.
    pub fn conv(
        &mut self,
        layer: &str,
        x: Var,
        channels: usize,
        kernel: usize,
        start: Start,
    ) -> Result<Var> {
        let shape = Shape::new(channels, kernel, kernel, self.shape(x).c);
        let weight = self.parameter(layer, "weight", shape, start);
        let op = Conv2d::new(1, kernel / 2);
        self.tape.scope(layer, |tape| tape.push(op, &[x, weight]))
    }

    /// A square convolution to `channels`, zero-padded so that the extent is divided by `stride`, rounded up,
    /// then batch normalisation and `activation`; parameters `CONV.weight`, `NORM.weight` and `NORM.bias`, states
    /// `NORM.running_mean` and `NORM.running_var`. In [`Mode::Infer`] there are `CONV.weight` and `CONV.bias`.
    /// `kernel` is odd.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] in training if there is a single value per channel, else never for an odd `kernel`.
    pub fn conv_norm(
        &mut self,
        [conv, norm]: [&str; 2],
        x: Var,
        channels: usize,
        [kernel, stride]: [usize; 2],
        activation: Activation,
    ) -> Result<Var> {
        let shape = Shape::new(channels, kernel, kernel, self.shape(x).c);
        let weight = self.parameter(conv, "weight", shape, Start::HeNormal);
        let op = Conv2d::new(stride, kernel / 2);
        match self.mode {
            Mode::Train { .. } => {
                self.normed([conv, norm], op.with_statistics(), x, weight, activation)
            }
            Mode::Evaluate => self.normed([conv, norm], op, x, weight, activation),
            Mode::Infer => {
                let op = Conv2dBias {
                    conv: op,
                    activation,
                };
                self.folded([conv, norm], op, x, weight)
            }
        }
    }

    /// As [`Network::conv_norm`] with a convolution of each channel by itself.
    ///
    /// # Errors
    /// As [`Network::conv_norm`].
    pub fn depthwise_conv_norm(
        &mut self,
        [conv, norm]: [&str; 2],
        x: Var,
        [kernel, stride]: [usize; 2],
        activation: Activation,
    ) -> Result<Var> {
        let shape = Shape::new(self.shape(x).c, kernel, kernel, 1);
        let weight = self.parameter(conv, "weight", shape, Start::HeNormal);
        let op = DepthwiseConv2d::new(stride, kernel / 2);
        match self.mode {
            Mode::Train { .. } => {
                self.normed([conv, norm], op.with_statistics(), x, weight, activation)
            }
            Mode::Evaluate => self.normed([conv, norm], op, x, weight, activation),
            Mode::Infer => {
                let op = DepthwiseConv2dBias {
                    conv: op,
                    activation,
                };
                self.folded([conv, norm], op, x, weight)
            }
        }
    }

    /// A convolution and its normalisation: with the statistics that `op` takes, or with running ones.
    fn normed(
        &mut self,
        [conv, norm]: [&str; 2],
        op: impl Op + 'static,
        x: Var,
        weight: Var,
        activation: Activation,
    ) -> Result<Var> {
        let y = (self.tape).scope(conv, |tape| tape.push_all(op, &[x, weight]))?;
        let (shape, count) = (
            Shape::per_channel(self.shape(y[0]).c),
            self.shape(y[0]).rows(),
        );
        let (zero, one) = (Start::Constant(0.0), Start::Constant(1.0));
        let weight = self.parameter(norm, "weight", shape, one);
        let bias = self.parameter(norm, "bias", shape, zero);
        let running = [
            self.state(norm, "running_mean", shape, zero),
            self.state(norm, "running_var", shape, one),
        ];
        let (statistics, of_batch) = match y[1..] {
            [mean, var] => ([mean, var], true),
            _ => (running, false),
        };
        if of_batch {
            self.moved.counts.push(count);
            self.moved.batch.extend(statistics);
            self.moved.running.extend(running);
        }
        self.tape.scope(norm, |tape| {
            let op = Normalize {
                eps: BATCH_NORM_EPS,
                activation,
                of_batch,
            };
            tape.push(op, &[&[y[0], weight, bias], &statistics[..]].concat())
        })
    }

    fn folded(
        &mut self,
        [conv, norm]: [&str; 2],
        op: impl Op + 'static,
        x: Var,
        weight: Var,
    ) -> Result<Var> {
        let shape = Shape::per_channel(self.shape(weight).n);
        let bias = self.parameter(conv, "bias", shape, Start::Constant(0.0));
        let norm = self.tape.scope(norm, |tape| tape.path());
        self.folds.push(Fold { weight, bias, norm });
        self.tape
            .scope(conv, |tape| tape.push(op, &[x, weight, bias]))
    }

    /// A linear map of the channels, with bias, then `activation`; parameters `LAYER.weight` and `LAYER.bias`.
    ///
    /// # Errors
    /// Never for a value of the tape.
    pub fn linear(
        &mut self,
        layer: &str,
        x: Var,
        channels: usize,
        start: Start,
        activation: Activation,
    ) -> Result<Var> {
        let shape = Shape::new(channels, 1, 1, self.shape(x).c);
        let weight = self.parameter(layer, "weight", shape, start);
        let shape = Shape::per_channel(channels);
        let bias = self.parameter(layer, "bias", shape, Start::Constant(0.0));
        let conv = Conv2d::linear();
        // Only without one there is a gradient.
        let (inner, outer) = match self.mode {
            Mode::Infer => (activation, Activation::Identity),
            Mode::Train { .. } | Mode::Evaluate => (Activation::Identity, activation),
        };
        self.tape.scope(layer, |tape| {
            let op = Conv2dBias {
                conv,
                activation: inner,
            };
            let y = tape.push(op, &[x, weight, bias])?;
            match outer {
                Activation::Identity => Ok(y),
                Activation::Relu => tape.push(Relu, &[y]),
                Activation::Silu => tape.push(Silu, &[y]),
            }
        })
    }

    /// A linear map of the channels to one logit, with bias.
    ///
    /// # Errors
    /// Never for a value of the tape.
    pub fn logit(&mut self, layer: &str, x: Var) -> Result<Var> {
        self.linear(layer, x, 1, Start::Uniform, Activation::Identity)
    }

    /// Drops each element with probability `rate` in training.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `rate` is not in [0, 1).
    pub fn dropout(&mut self, x: Var, rate: f64) -> Result<Var> {
        let layer = self.random_layers;
        self.random_layers += 1;
        match self.mode {
            Mode::Train { control, seed } if rate > 0.0 => {
                let op = Dropout { rate, seed, layer };
                self.tape.push(op, &[x, control])
            }
            _ => Ok(x),
        }
    }

    /// Adds `branch` to `x`; in training, each image does without it with probability `rate`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if their shapes differ or `rate` is not in [0, 1).
    pub fn stochastic_depth(&mut self, branch: Var, x: Var, rate: f64) -> Result<Var> {
        let layer = self.random_layers;
        self.random_layers += 1;
        match self.mode {
            Mode::Train { control, seed } if rate > 0.0 => {
                let op = StochasticDepth { rate, seed, layer };
                self.tape.push(op, &[branch, x, control])
            }
            _ => self.tape.push(Add, &[branch, x]),
        }
    }

    /// Records inside a scope of the tape.
    pub fn scope<R>(&mut self, name: &str, body: impl FnOnce(&mut Network<'_>) -> R) -> R {
        let Self {
            tape,
            mode,
            random_layers,
            starts,
            folds,
            moved,
        } = self;
        tape.scope(name, |tape| {
            let mut inner = Network {
                tape,
                mode: *mode,
                random_layers: *random_layers,
                starts: std::mem::take(starts),
                folds: std::mem::take(folds),
                moved: std::mem::take(moved),
            };
            let result = body(&mut inner);
            *random_layers = inner.random_layers;
            *starts = inner.starts;
            *folds = inner.folds;
            *moved = inner.moved;
            result
        })
    }
}

/// Writes the starting values that `seed` gives.
///
/// # Errors
/// As [`Session::write`].
pub fn initialise<T: Real>(
    session: &mut dyn Session<T>,
    starts: &[(Var, Start)],
    seed: u64,
) -> Result<()> {
    for &(var, start) in starts {
        let value = &session.plan().values()[var.index()];
        let (shape, noise) = (value.shape, Philox::new(seed, hash(&value.name)));
        let fan_in = shape.pixels() * shape.c;
        let mut values = vec![T::zero(); shape.len()];
        match start {
            Start::Constant(constant) => values.fill(T::of(constant)),
            Start::HeNormal => {
                let sd = (2.0 / fan_in as f64).sqrt();
                for (block, values) in values.chunks_mut(4).enumerate() {
                    for (value, z) in values.iter_mut().zip(noise.normal4(block as u64)) {
                        *value = T::of(sd * f64::from(z));
                    }
                }
            }
            Start::Uniform => {
                let limit = 1.0 / (fan_in as f64).sqrt();
                for (block, values) in values.chunks_mut(4).enumerate() {
                    for (value, u) in values.iter_mut().zip(noise.uniform4(block as u64)) {
                        *value = T::of(limit * (2.0 * f64::from(u) - 1.0));
                    }
                }
            }
        }
        session.write(var, &values)?;
    }
    Ok(())
}

/// FNV-1a, 64 bits: the same on every machine and in every version, unlike the standard library's.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
