//! The kernels of conv.cu and conv_direct.cu, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

#[path = "support/device.rs"]
mod support;

use echograd::device::cpu;
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{Case, DEVICE_TOLERANCE, Sampler};
use echograd::ops::Op;
use echograd::ops::activation::Activation;
use echograd::ops::conv2d::{Conv2d, Conv2dBias};
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use rayon::prelude::*;
use support::{check, check_random, check_stored};

const OPERATIONS: [&str; 4] = ["conv2d", "conv2d_bias", "linear", "conv_transpose2d"];

/// A convolution of `n` images of `h`×`w` pixels from `c` to `o` channels.
fn conv(
    [n, h, w]: [usize; 3],
    [c, o]: [usize; 2],
    [kh, kw]: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
) -> Case {
    let op = Conv2d {
        stride,
        padding,
        statistics: false,
    };
    let mut s = Sampler::new((h * w + c * o) as u64);
    let (x, w) = (Shape::new(n, h, w, c), Shape::new(o, kh, kw, c));
    Case::new(format!("{x} ∗ {w}, {op:?}"), move |t, v| {
        Ok(vec![t.push(op, v)?])
    })
    .with("x", x, s.values(x.len(), -1.0, 1.0))
    .narrow()
    .with("w", w, s.narrow_values(w.len(), -1.0, 1.0))
}

/// The same image for a 1×1 kernel.
fn pointwise(image: [usize; 3], channels: [usize; 2]) -> Case {
    conv(image, channels, [1, 1], [1, 1], [0, 0])
}

fn check_all(cases: Vec<Case>) {
    let cases = cases.into_par_iter().enumerate();
    cases.for_each(|(seed, case)| check(&case, seed as u64));
}

#[test]
fn random_problems_agree_with_the_cpu() {
    check_random(&OPERATIONS, 60, Sampler::new);
    check_random(&OPERATIONS, 4, Sampler::large);
}

/// Pixels just below, at and above a tile's rows; channels that fill vectors, stages and tiles, and not.
#[test]
fn pointwise_convolutions_of_any_extent_agree_with_the_cpu() {
    let mut cases = Vec::new();
    for (pixels, channels) in [
        (65, [8, 8]),
        (127, [1, 33]),
        (128, [24, 1]),
        (129, [40, 24]),
        (66, [7, 65]),
        (191, [64, 31]),
        (193, [33, 64]),
        (257, [96, 130]),
        (70, [136, 20]),
        (600, [16, 8]),
    ] {
        cases.push(pointwise([1, 1, pixels], channels));
        cases.push(pointwise([pixels, 1, 1], channels));
    }
    check_all(cases);
}

#[test]
fn kernels_strides_and_paddings_agree_with_the_cpu() {
    check_all(vec![
        conv([2, 9, 11], [8, 8], [3, 3], [1, 1], [1, 1]),
        conv([3, 16, 16], [16, 40], [3, 3], [1, 1], [1, 1]),
        conv([1, 12, 13], [1, 64], [3, 3], [1, 1], [1, 1]),
        conv([2, 17, 19], [3, 32], [3, 3], [2, 2], [1, 1]),
        conv([1, 15, 14], [24, 9], [5, 5], [2, 2], [2, 2]),
        conv([1, 23, 22], [8, 16], [7, 7], [3, 2], [3, 3]),
        conv([1, 20, 21], [4, 12], [1, 3], [2, 1], [0, 1]),
        conv([2, 9, 10], [48, 72], [2, 2], [2, 2], [0, 0]),
        conv([1, 9, 17], [3, 2], [11, 16], [1, 1], [7, 9]),
        conv([1, 30, 11], [8, 8], [12, 1], [1, 1], [3, 0]),
        conv([2, 18, 18], [16, 16], [1, 1], [2, 2], [0, 0]),
        conv([1, 24, 24], [8, 8], [2, 1], [3, 3], [0, 2]),
    ]);
}

/// Few tiles of many stages, which are cut into pieces: of phases with 1, 2 and 4 taps some pieces have no stage.
#[test]
fn deep_products_of_few_pixels_agree_with_the_cpu() {
    check_all(vec![
        pointwise([1, 9, 10], [1152, 40]),
        conv([2, 8, 8], [136, 72], [3, 3], [1, 1], [1, 1]),
        conv([2, 12, 12], [16, 272], [3, 3], [2, 2], [1, 1]),
        conv([1, 15, 14], [48, 72], [5, 5], [2, 2], [2, 2]),
    ]);
}

/// The outputs of an operation, once as the CPU computes them in `f64` and once as a GPU does.
struct Both {
    expected: Vec<Vec<f64>>,
    found: Vec<Vec<f32>>,
}

/// Applies an operation to a feature map, stored as bf16 if `narrow`, and other inputs.
fn apply(op: impl Op + 'static, inputs: &[(Shape, &[f64])], narrow: bool) -> Both {
    let mut tape = Tape::new();
    let vars: Vec<Var> = inputs.iter().map(|i| tape.input("input", i.0)).collect();
    tape.narrow(vars[0]);
    let outputs = tape.push_all(op, &vars).unwrap();
    outputs.iter().for_each(|&y| tape.keep(y));
    let plan = |options| Plan::new(&tape, options).unwrap();
    let mut reference = cpu::Session::<f64>::new(plan(Options::default())).unwrap();
    let gpu = Gpu::emulator().unwrap();
    let mut device = gpu::Session::new(&gpu, plan(Options::gpu(narrow))).unwrap();
    for (&var, input) in vars.iter().zip(inputs) {
        let values: Vec<f32> = input.1.iter().map(|&x| x as f32).collect();
        device.write(var, &values).unwrap();
        reference.write(var, input.1);
    }
    reference.run();
    device.run().unwrap();
    Both {
        expected: outputs
            .iter()
            .map(|&y| reference.read(y).to_vec())
            .collect(),
        found: outputs.iter().map(|&y| device.read(y).unwrap()).collect(),
    }
}

/// Mean and variance, before the result is rounded, where the mean is large beside the deviation; and the same where
/// the first channel, and no other, is NaN.
#[test]
fn statistics_of_results_agree_with_the_cpu() {
    for (x, w, stride) in [
        (Shape::new(2, 1, 1, 8), Shape::new(3, 1, 1, 8), 1),
        (Shape::new(3, 9, 7, 5), Shape::new(33, 3, 3, 5), 1),
        (Shape::new(2, 31, 33, 1), Shape::new(24, 3, 3, 1), 2),
        (Shape::new(1, 65, 129, 8), Shape::new(72, 1, 1, 8), 1),
        (Shape::new(2, 9, 9, 40), Shape::new(24, 5, 5, 40), 1),
        (Shape::new(1, 30, 20, 3), Shape::new(5, 13, 1, 3), 1),
    ] {
        let mut s = Sampler::new(x.len() as u64);
        let op = Conv2d::new(stride, w.w / 2).with_statistics();
        let (values, mut weights) = (
            s.narrow_values(x.len(), 0.9, 1.1),
            s.narrow_values(w.len(), 0.4, 0.6),
        );
        for (nan, narrow) in [(false, false), (false, true), (true, false), (true, true)] {
            if nan {
                weights[0] = f64::NAN;
            }
            let both = apply(op, &[(x, &values), (w, &weights)], narrow);
            // A kernel of 13 rows goes by what is stored.
            let tolerance = if narrow && w.h > 11 {
                4e-3
            } else {
                DEVICE_TOLERANCE
            };
            let magnitude = both.expected[1].iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for (o, scale) in [(1, magnitude), (2, magnitude * magnitude)] {
                let values = both.found[o].iter().zip(&both.expected[o]);
                for (channel, (found, expected)) in values.enumerate() {
                    let agree = if nan && channel == 0 {
                        found.is_nan() && expected.is_nan()
                    } else {
                        (f64::from(*found) - expected).abs() <= tolerance * scale
                    };
                    assert!(
                        agree,
                        "{x} ∗ {w}, {narrow}, output {o}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn bias_and_activation_agree_with_the_cpu() {
    for (x, w) in [
        (Shape::new(2, 3, 5, 7), Shape::new(9, 1, 1, 7)),
        (Shape::new(1, 20, 13, 16), Shape::new(33, 3, 3, 16)),
        (Shape::new(3, 9, 11, 3), Shape::new(72, 1, 1, 3)),
    ] {
        let mut s = Sampler::new(x.len() as u64);
        let values = s.narrow_values(x.len(), -1.0, 1.0);
        let weights = s.narrow_values(w.len(), -1.0, 1.0);
        let b = Shape::per_channel(w.n);
        let bias: Vec<f64> = (0..w.n).map(|i| i as f64 / 8.0 - 1.0).collect();
        for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
            let conv = Conv2d::new(1, w.h / 2);
            for narrow in [false, true] {
                let op = Conv2dBias { conv, activation };
                let both = apply(op, &[(x, &values), (w, &weights), (b, &bias)], narrow);
                let largest = both.expected[0].iter().fold(0.0f64, |m, x| m.max(x.abs()));
                for (found, expected) in both.found[0].iter().zip(&both.expected[0]) {
                    let rounding = if narrow { expected.abs() / 256.0 } else { 0.0 };
                    let error = (f64::from(*found) - expected).abs();
                    assert!(
                        error <= DEVICE_TOLERANCE * largest + rounding,
                        "{x} ∗ {w}, {activation:?}, {narrow}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

/// The largest tiles are taken where they make enough blocks.
#[test]
fn large_maps_agree_with_the_cpu() {
    check_stored(&pointwise([1, 128, 129], [8, 64]), 1, &[true]);
    check_stored(&pointwise([2, 128, 129], [8, 128]), 2, &[true]);
}

/// A NaN reaches the results that its pixel and channel belong to, and no others.
#[test]
fn nan_passes() {
    for (x, w) in [
        (Shape::new(1, 9, 13, 3), Shape::new(5, 3, 3, 3)),
        (Shape::new(1, 9, 13, 16), Shape::new(40, 3, 3, 16)),
        (Shape::new(2, 1, 1, 9), Shape::new(5, 1, 1, 9)),
    ] {
        let weights: Vec<f64> = (0..w.len()).map(|i| (i % 5) as f64 - 1.5).collect();
        let b = Shape::per_channel(w.n);
        for at in [0, x.len() / 2, x.len() - 1] {
            let mut values = vec![0.5; x.len()];
            values[at] = f64::NAN;
            for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
                let conv = Conv2d::new(1, w.h / 2);
                let op = Conv2dBias { conv, activation };
                for narrow in [false, true] {
                    let inputs = [(x, &values[..]), (w, &weights), (b, &vec![0.25; w.n])];
                    let both = apply(op, &inputs, narrow);
                    let nan = |y: &[f64]| y.iter().map(|y| y.is_nan()).collect::<Vec<_>>();
                    let found: Vec<f64> = both.found[0].iter().map(|&y| y.into()).collect();
                    assert!(nan(&both.expected[0]).contains(&true));
                    assert_eq!(nan(&found), nan(&both.expected[0]), "{x} ∗ {w}, {at}");
                }
            }
        }
    }
}
