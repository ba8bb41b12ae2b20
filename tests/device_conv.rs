//! The kernels of conv.cu and conv_direct.cu, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

#[path = "support/device.rs"]
mod support;

use echograd::device::cpu;
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{self, Case, DEVICE_TOLERANCE, Sampler};
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

/// The emulator without wgmma, and with it wherever there are one or two blocks of a tile: between them these take every
/// tile.
fn gpus() -> [Gpu; 3] {
    let gpu = || Gpu::emulator().unwrap();
    let with = |blocks| gpu().with_wgmma(blocks).unwrap();
    [gpu(), with(1), with(2)]
}

/// Convolutions, their gradients and transposed convolutions of more than 32 channels either way, by wgmma.
#[test]
fn products_of_warpgroups_agree_with_the_cpu() {
    let random = |seed: u64| {
        let mut s = Sampler::new(1000 + seed);
        let image = [s.size(1, 2), s.size(3, 21), s.size(3, 21)];
        let channels = [
            s.size(33, 72),
            [s.size(33, 72), 128][usize::from(s.chance(0.3))],
        ];
        let kernel = [s.size(1, 3), s.size(1, 3)];
        let stride = [s.size(1, 3), s.size(1, 3)];
        let padding = [s.size(0, kernel[0] - 1), s.size(0, kernel[1] - 1)];
        conv(image, channels, kernel, stride, padding)
    };
    let mut cases: Vec<Case> = (0..12).map(random).collect();
    cases.extend([
        // Just below, at and above the rows of a tile; stages that k fills, and not.
        pointwise([1, 1, 127], [40, 128]),
        pointwise([1, 1, 128], [64, 40]),
        pointwise([1, 1, 129], [8, 64]),
        pointwise([1, 16, 16], [96, 33]),
        pointwise([257, 1, 1], [33, 136]),
        pointwise([1, 1, 600], [16, 130]),
        conv([1, 17, 19], [40, 40], [3, 3], [2, 2], [1, 1]),
        conv([2, 9, 10], [48, 72], [2, 2], [2, 2], [0, 0]),
        conv([1, 24, 23], [33, 128], [5, 5], [1, 1], [2, 2]),
        // Weight gradients with tiles, rows and pieces that are filled, and not.
        conv([1, 17, 18], [65, 72], [1, 3], [1, 1], [0, 1]),
        conv([2, 13, 12], [130, 66], [2, 2], [2, 1], [1, 0]),
        pointwise([1, 30, 19], [248, 130]),
    ]);
    cases.into_par_iter().enumerate().for_each(|(seed, case)| {
        // Each case has emulators of its own, with queues of their own.
        let [_, one, two] = gpus();
        for gpu in [&one, &two] {
            let worst = gradcheck::check_on(gpu, &case, seed as u64, true).unwrap();
            let worst = worst.mismatch;
            assert!(worst.is_none(), "{}: {worst:?}", case.description);
        }
    });
}

/// The outputs of an operation, once as the CPU computes them in `f64` and once as a GPU does.
struct Both {
    expected: Vec<Vec<f64>>,
    found: Vec<Vec<f32>>,
}

/// Applies an operation to a feature map, stored as bf16 if `narrow`, and other inputs.
fn apply(gpu: &Gpu, op: impl Op + 'static, inputs: &[(Shape, &[f64])], narrow: bool) -> Both {
    let mut tape = Tape::new();
    let vars: Vec<Var> = inputs.iter().map(|i| tape.input("input", i.0)).collect();
    tape.narrow(vars[0]);
    let outputs = tape.push_all(op, &vars).unwrap();
    outputs.iter().for_each(|&y| tape.keep(y));
    let plan = |options| Plan::new(&tape, options).unwrap();
    let mut reference = cpu::Session::<f64>::new(plan(Options::default())).unwrap();
    let mut device = gpu::Session::new(gpu, plan(Options::gpu(narrow))).unwrap();
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
        (Shape::new(1, 19, 31, 3), Shape::new(128, 3, 3, 3), 1),
        (Shape::new(1, 1, 161, 8), Shape::new(128, 1, 1, 8), 1),
        (Shape::new(1, 30, 20, 3), Shape::new(5, 13, 1, 3), 1),
    ] {
        let mut s = Sampler::new(x.len() as u64);
        let op = Conv2d::new(stride, w.w / 2).with_statistics();
        let (values, mut weights) = (
            s.narrow_values(x.len(), 0.9, 1.1),
            s.narrow_values(w.len(), 0.4, 0.6),
        );
        let [none, one, two] = &gpus();
        let ways = [(none, false), (none, true), (one, true), (two, true)];
        for (nan, (gpu, narrow)) in [false, true].map(|nan| ways.map(|way| (nan, way))).concat() {
            if nan {
                weights[0] = f64::NAN;
            }
            let both = apply(gpu, op, &[(x, &values), (w, &weights)], narrow);
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
        (Shape::new(2, 9, 11, 3), Shape::new(128, 3, 3, 3)),
    ] {
        let mut s = Sampler::new(x.len() as u64);
        let values = s.narrow_values(x.len(), -1.0, 1.0);
        let weights = s.narrow_values(w.len(), -1.0, 1.0);
        let b = Shape::per_channel(w.n);
        let bias: Vec<f64> = (0..w.n).map(|i| i as f64 / 8.0 - 1.0).collect();
        for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
            let conv = Conv2d::new(1, w.h / 2);
            let [none, one, two] = &gpus();
            for (gpu, narrow) in [(none, false), (none, true), (one, true), (two, true)] {
                let op = Conv2dBias { conv, activation };
                let inputs = [(x, &values[..]), (w, &weights), (b, &bias)];
                let both = apply(gpu, op, &inputs, narrow);
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
                let [none, one, _] = &gpus();
                for (gpu, narrow) in [(none, false), (none, true), (one, true)] {
                    let inputs = [(x, &values[..]), (w, &weights), (b, &vec![0.25; w.n])];
                    let both = apply(gpu, op, &inputs, narrow);
                    let nan = |y: &[f64]| y.iter().map(|y| y.is_nan()).collect::<Vec<_>>();
                    let found: Vec<f64> = both.found[0].iter().map(|&y| y.into()).collect();
                    assert!(nan(&both.expected[0]).contains(&true));
                    assert_eq!(nan(&found), nan(&both.expected[0]), "{x} ∗ {w}, {at}");
                }
            }
        }
    }
}
