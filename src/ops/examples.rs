//! A typical application of each operation at a given extent, for profiles.

use super::Op;
use super::activation::Activation;
use super::add_relu::AddRelu;
use super::batch_norm::{BatchNorm, Normalize};
use super::concat::Concat;
use super::consistency::Consistency;
use super::control;
use super::conv_transpose2d::ConvTranspose2d;
use super::conv2d::{Conv2d, Conv2dBias};
use super::depthwise_conv2d::DepthwiseConv2d;
use super::dropout::Dropout;
use super::gate::Gate;
use super::group_norm::GroupNorm;
use super::layer_norm::LayerNorm;
use super::losses::{BceWithLogits, Mse, SoftDice, WeightedMean};
use super::mask_head::MaskHead;
use super::moments::Moments;
use super::multitask_loss::{MultitaskLoss, Tie};
use super::perimeter::Perimeter;
use super::pointwise::{Add, BiasAdd, Mul, Relu, Scale, Sigmoid, Silu};
use super::pool::{AvgPool2d, GlobalAvgPool, MaxPool2d};
use super::prior::Prior;
use super::shape_features::ShapeFeatures;
use super::stochastic_depth::StochasticDepth;
use super::upsample::Upsample2x;
use crate::error::{Error, Result};
use crate::features;
use crate::tape::{Tape, Var};
use crate::tensor::Shape;

/// Records operation `name` of the registry on activations of `shape` and returns the output that is
/// differentiated and the inputs that receive gradients. Convolutions are 3×3 from `C` to `C` channels,
/// windows 2×2, other parameters the networks' own; operations on values per image take `N` images.
///
/// # Errors
/// [`Error::Shape`] if the operation does not apply to such a shape, [`Error::Argument`] if there is no
/// example of that name.
pub fn record(tape: &mut Tape, name: &str, shape: Shape) -> Result<(Var, Vec<Var>)> {
    let Shape { n, c, .. } = shape;
    let data = |tape: &mut Tape, name: &str| {
        let input = tape.input(name, shape);
        tape.narrow(input);
        input
    };
    let channels = |tape: &mut Tape, name: &str| tape.input(name, Shape::per_channel(c));
    let images = |tape: &mut Tape, name: &str, c| tape.input(name, Shape::per_image(n, c));
    let controls = |tape: &mut Tape| tape.input("control", Shape::per_channel(control::LEN));
    let x = match name {
        "weighted_mean" | "consistency" | "multitask_loss" => images(tape, "x", 1),
        "shape_features" => images(tape, "moments", features::Moments::COUNT),
        "prior" => images(tape, "features", 4),
        "linear" => images(tape, "x", c),
        _ => data(tape, "x"),
    };
    let (eps, activation) = (1e-5, Activation::Relu);
    let window = [2, 2];
    let (y, others) = match name {
        "add" => {
            let b = data(tape, "b");
            (tape.push(Add, &[x, b])?, vec![b])
        }
        "mul" => {
            let b = data(tape, "b");
            (tape.push(Mul, &[x, b])?, vec![b])
        }
        "scale" => (tape.push(Scale { factor: 0.5 }, &[x])?, vec![]),
        "bias_add" => {
            let b = channels(tape, "b");
            (tape.push(BiasAdd, &[x, b])?, vec![b])
        }
        "relu" => (tape.push(Relu, &[x])?, vec![]),
        "silu" => (tape.push(Silu, &[x])?, vec![]),
        "sigmoid" => (tape.push(Sigmoid, &[x])?, vec![]),
        "conv2d" => {
            let w = tape.input("weight", Shape::new(c, 3, 3, c));
            (tape.push(Conv2d::new(1, 1), &[x, w])?, vec![w])
        }
        "linear" => {
            let w = tape.input("weight", Shape::new(c, 1, 1, c));
            (tape.push(Conv2d::linear(), &[x, w])?, vec![w])
        }
        "conv2d_bias" => {
            let w = tape.input("weight", Shape::new(c, 1, 1, c));
            let b = channels(tape, "bias");
            let (conv, activation) = (Conv2d::linear(), Activation::Identity);
            let op = Conv2dBias { conv, activation };
            (tape.push(op, &[x, w, b])?, vec![w, b])
        }
        "depthwise_conv2d" => {
            let w = tape.input("weight", Shape::new(c, 3, 3, 1));
            (tape.push(DepthwiseConv2d::new(1, 1), &[x, w])?, vec![w])
        }
        "conv2d_norm" => {
            let w = tape.input("weight", Shape::new(c, 3, 3, c));
            conv_norm(tape, Conv2d::new(1, 1).with_statistics(), x, w)?
        }
        "depthwise_conv2d_norm" => {
            let w = tape.input("weight", Shape::new(c, 3, 3, 1));
            conv_norm(tape, DepthwiseConv2d::new(1, 1).with_statistics(), x, w)?
        }
        "conv_transpose2d" => {
            let w = tape.input("weight", Shape::new(c, 2, 2, c));
            (tape.push(ConvTranspose2d::DOUBLE, &[x, w])?, vec![w])
        }
        "add_relu" => {
            let b = data(tape, "b");
            (tape.push(AddRelu, &[x, b])?, vec![b])
        }
        "gate" => {
            let z = images(tape, "z", c);
            (tape.push(Gate, &[x, z])?, vec![z])
        }
        "stochastic_depth" => {
            let (rate, seed, layer) = (0.2, 0, 0);
            let op = StochasticDepth { rate, seed, layer };
            let residual = data(tape, "residual");
            let control = controls(tape);
            (tape.push(op, &[x, residual, control])?, vec![residual])
        }
        "layer_norm" => {
            let affine = ["gamma", "beta"].map(|name| channels(tape, name));
            let y = tape.push(LayerNorm { eps }, &[x, affine[0], affine[1]])?;
            (y, affine.to_vec())
        }
        "dropout" => {
            let (rate, seed, layer) = (0.2, 0, 0);
            let control = controls(tape);
            (
                tape.push(Dropout { rate, seed, layer }, &[x, control])?,
                vec![],
            )
        }
        "concat" => {
            let b = data(tape, "b");
            (tape.push(Concat, &[x, b])?, vec![b])
        }
        "bce_with_logits" => {
            let truth = data(tape, "truth");
            (tape.push(BceWithLogits, &[x, truth])?, vec![])
        }
        "soft_dice" => {
            let truth = data(tape, "truth");
            (tape.push(SoftDice, &[x, truth])?, vec![])
        }
        "mse" => {
            let b = data(tape, "b");
            (tape.push(Mse, &[x, b])?, vec![b])
        }
        "weighted_mean" => {
            let weight = images(tape, "weight", 1);
            (tape.push(WeightedMean, &[x, weight])?, vec![])
        }
        "moments" => (tape.push(Moments, &[x])?, vec![]),
        "perimeter" => (tape.push(Perimeter, &[x])?, vec![]),
        "shape_features" => {
            let perimeter = images(tape, "perimeter", 1);
            (
                tape.push_all(ShapeFeatures, &[x, perimeter])?[0],
                vec![perimeter],
            )
        }
        "prior" => {
            let vector = Shape::per_channel(4);
            let (weight, bias) = (
                tape.input("weight", vector),
                tape.input("bias", Shape::SCALAR),
            );
            let (mean, sd) = (tape.input("mean", vector), tape.input("sd", vector));
            (
                tape.push(Prior, &[x, weight, bias, mean, sd])?,
                vec![weight, bias],
            )
        }
        "consistency" => {
            let names = ["phi", "measurable", "confidence", "weight"];
            let others = names.map(|name| images(tape, name, 1));
            let control = controls(tape);
            let inputs = [&[x], &others[..], &[control]].concat();
            (tape.push(Consistency::default(), &inputs)?, vec![others[0]])
        }
        "multitask_loss" => {
            let op = MultitaskLoss {
                mask: true,
                classification: Some(0.2),
                consistency: Some(Tie {
                    weight: 1.0,
                    stop_classifier: false,
                    stop_mask: false,
                    unweighted: false,
                }),
            };
            let dice = images(tape, "dice", 1);
            let moments = images(tape, "moments", features::Moments::COUNT);
            let names = ["perimeter", "weight", "logit", "label", "class_weight"];
            let [perimeter, weight, logit, label, class_weight] =
                names.map(|name| images(tape, name, 1));
            let vector = Shape::per_channel(4);
            let [w, bias, mean, sd] = [
                ("prior", vector),
                ("bias", Shape::SCALAR),
                ("mean", vector),
                ("sd", vector),
            ]
            .map(|(name, shape)| tape.input(name, shape));
            let control = controls(tape);
            let inputs = [
                x,
                dice,
                moments,
                perimeter,
                weight,
                logit,
                label,
                class_weight,
                w,
                bias,
                mean,
                sd,
                control,
            ];
            let total = tape.push_all(op, &inputs)?[0];
            (total, vec![dice, moments, perimeter, logit, w, bias])
        }
        "mask_head" => {
            let truth = data(tape, "truth");
            let outputs = tape.push_all(MaskHead::default(), &[x, truth])?;
            (outputs[4], vec![])
        }
        "batch_norm" => {
            let affine = ["gamma", "beta"].map(|name| channels(tape, name));
            let op = BatchNorm { eps, activation };
            (
                tape.push_all(op, &[x, affine[0], affine[1]])?[0],
                affine.to_vec(),
            )
        }
        "normalize" => {
            let vectors = ["gamma", "beta", "mean", "var"].map(|name| channels(tape, name));
            let op = Normalize {
                eps,
                activation,
                of_batch: false,
            };
            let y = tape.push(op, &[&[x], &vectors[..]].concat())?;
            (y, vectors[..2].to_vec())
        }
        "group_norm" => {
            let affine = ["gamma", "beta"].map(|name| channels(tape, name));
            let groups = [8, 4, 2, 1].into_iter().find(|g| c % g == 0).unwrap_or(1);
            let op = GroupNorm {
                groups,
                eps,
                activation,
            };
            (
                tape.push_all(op, &[x, affine[0], affine[1]])?[0],
                affine.to_vec(),
            )
        }
        "max_pool2d" => {
            let op = MaxPool2d {
                kernel: window,
                stride: window,
                padding: [0, 0],
            };
            (tape.push(op, &[x])?, vec![])
        }
        "avg_pool2d" => {
            let op = AvgPool2d {
                kernel: window,
                stride: window,
                padding: [0, 0],
            };
            (tape.push(op, &[x])?, vec![])
        }
        "global_avg_pool" => (tape.push(GlobalAvgPool, &[x])?, vec![]),
        "upsample2x" => (tape.push(Upsample2x, &[x])?, vec![]),
        other => return Err(Error::argument("--op", format!("no example of {other}"))),
    };
    Ok((y, [&[x], &others[..]].concat()))
}

/// A convolution with statistics, normalised, and its inputs but for `x`.
fn conv_norm(tape: &mut Tape, op: impl Op + 'static, x: Var, w: Var) -> Result<(Var, Vec<Var>)> {
    let y = tape.push_all(op, &[x, w])?;
    let vector = Shape::per_channel(tape.shape(y[0]).c);
    let affine = ["gamma", "beta"].map(|name| tape.input(name, vector));
    let norm = Normalize {
        eps: 1e-5,
        activation: Activation::Relu,
        of_batch: true,
    };
    let y = tape.push(norm, &[y[0], affine[0], affine[1], y[1], y[2]])?;
    Ok((y, vec![w, affine[0], affine[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_one() {
        for entry in crate::ops::registry() {
            let mut tape = Tape::new();
            let masks = ["moments", "perimeter", "mask_head"].contains(&entry.name);
            let shape = Shape::new(2, 6, 6, if masks { 1 } else { 4 });
            let (y, wrt) = record(&mut tape, entry.name, shape).unwrap();
            let name = tape.steps().last().unwrap().op.name();
            assert!(
                name == entry.name || entry.name == "linear" || entry.name.ends_with("conv2d_norm"),
                "{}: {name}",
                entry.name
            );
            let dy = tape.input("dy", tape.shape(y));
            let gradients = tape.backward_from(&[(y, dy)], &wrt).unwrap();
            assert!(gradients.iter().all(Option::is_some), "{}", entry.name);
        }
    }
}
