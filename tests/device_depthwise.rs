//! The kernels of depthwise.cu, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

#[path = "support/device.rs"]
mod support;

use echograd::device::cpu;
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{Case, Sampler};
use echograd::ops::Op;
use echograd::ops::activation::Activation;
use echograd::ops::depthwise_conv2d::{DepthwiseConv2d, DepthwiseConv2dBias};
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use half::bf16;
use rayon::prelude::*;
use support::{check, check_random};

const OPERATIONS: [&str; 2] = ["depthwise_conv2d", "depthwise_conv2d_norm"];

#[test]
fn random_problems_agree_with_the_cpu() {
    check_random(&OPERATIONS, 60, Sampler::new);
    check_random(&OPERATIONS, 2, Sampler::large);
}

/// Kernel and stride that have fast kernels, and extents around what a thread and a block take: images smaller
/// than the kernel, last pixels of a row that are fewer, several blocks, several strips, the last of them
/// narrower.
fn shapes() -> Vec<(DepthwiseConv2d, Shape, Shape)> {
    let extents = [
        (1, 1, 1, 8),
        (2, 2, 3, 16),
        (1, 7, 5, 24),
        (2, 12, 17, 72),
        (1, 4, 6, 136),
        (3, 33, 35, 8),
    ];
    let layers = [(3, 1), (3, 2), (5, 1), (5, 2)];
    layers
        .into_iter()
        .flat_map(|(kernel, stride)| {
            extents.map(|(n, h, w, c)| {
                let op = DepthwiseConv2d::new(stride, kernel / 2);
                let weights = Shape::new(c, kernel, kernel, 1);
                (op, Shape::new(n, h, w, c), weights)
            })
        })
        .collect()
}

#[test]
fn layers_with_kernels_of_their_own_agree_with_the_cpu() {
    shapes().into_par_iter().for_each(|(op, x, w)| {
        let mut s = Sampler::new(x.len() as u64);
        let case = Case::new(format!("{x} ∗ {w}, {op:?}"), move |t, v| {
            Ok(vec![t.push(op, v)?])
        })
        .with("x", x, s.values(x.len(), -1.0, 1.0))
        .narrow()
        .with("w", w, s.values(w.len(), -1.0, 1.0));
        check(&case, 3);
    });
}

/// The outputs of `op` on the emulator, and on the CPU in f64.
fn apply(
    op: impl Op + 'static,
    inputs: &[(Shape, Vec<f32>)],
    narrow: bool,
) -> (Vec<Vec<f32>>, Vec<Vec<f64>>) {
    let mut tape = Tape::new();
    let vars: Vec<Var> = inputs.iter().map(|i| tape.input("input", i.0)).collect();
    if narrow {
        tape.narrow(vars[0]);
    }
    let outputs = tape.push_all(op, &vars).unwrap();
    outputs.iter().for_each(|&v| tape.keep(v));
    let plan = |options| Plan::new(&tape, options).unwrap();
    let gpu = Gpu::emulator().unwrap();
    let mut device = gpu::Session::new(&gpu, plan(Options::gpu(true))).unwrap();
    let mut cpu = cpu::Session::<f64>::new(plan(Options::default())).unwrap();
    for (&var, input) in vars.iter().zip(inputs) {
        device.write(var, &input.1).unwrap();
        let wide: Vec<f64> = input.1.iter().map(|&x| x.into()).collect();
        cpu.write(var, &wide);
    }
    device.run().unwrap();
    cpu.run();
    let found = outputs.iter().map(|&v| device.read(v).unwrap());
    let exact = outputs.iter().map(|&v| cpu.read(v).to_vec());
    (found.collect(), exact.collect())
}

/// Largest distance, as a share of the largest element.
fn distance(found: &[f32], expected: &[f64]) -> f64 {
    let largest = expected
        .iter()
        .fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let errors = found.iter().zip(expected);
    errors.fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs())) / largest
}

/// Inputs that bf16 holds, `x` about `mean`.
fn inputs(x: Shape, w: Shape, mean: f64) -> Vec<(Shape, Vec<f32>)> {
    let mut s = Sampler::new(11);
    let mut values = |shape: Shape, mean: f64| {
        let values = s.values(shape.len(), mean - 1.0, mean + 1.0);
        values.iter().map(|&x| bf16::from_f64(x).to_f32()).collect()
    };
    vec![
        (x, values(x, mean)),
        (w, values(w, 0.5)),
        (
            Shape::per_channel(x.c),
            values(Shape::per_channel(x.c), 0.0),
        ),
    ]
}

/// Statistics are those of the sums before they are rounded, by fast and by simple kernels, whatever the mean.
#[test]
fn statistics_are_those_of_the_output() {
    let odd = Shape::new(2, 23, 21, 37);
    let simple = (DepthwiseConv2d::new(1, 1), odd, Shape::new(37, 3, 3, 1));
    let layers = shapes().into_iter().chain([simple]);
    let layers: Vec<_> = layers.filter(|l| l.1.rows() > 1).collect();
    layers.into_par_iter().for_each(|(op, x, w)| {
        let op = op.with_statistics();
        if op.outputs(&[x, w]).is_err() {
            return; // a single pixel
        }
        for (mean, narrow) in [(0.0, false), (0.0, true), (100.0, false)] {
            let (found, exact) = apply(op, &inputs(x, w, mean)[..2], narrow);
            let rounding = if narrow { 1.0 / 256.0 } else { 0.0 };
            assert!(
                distance(&found[0], &exact[0]) <= 1e-5 + rounding,
                "{x} {op:?}: y"
            );
            for (found, exact) in found.iter().zip(&exact).skip(1) {
                assert!(
                    distance(found, exact) <= 1e-5,
                    "{x} {op:?}, about {mean}, bf16: {narrow}"
                );
            }
        }
    });
}

#[test]
fn bias_and_activation_follow_the_sums() {
    let odd = Shape::new(1, 5, 6, 7);
    let simple = (DepthwiseConv2d::new(1, 1), odd, Shape::new(7, 3, 3, 1));
    let layers: Vec<_> = shapes().into_iter().chain([simple]).collect();
    layers.into_par_iter().for_each(|(conv, x, w)| {
        for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
            let op = DepthwiseConv2dBias { conv, activation };
            for narrow in [false, true] {
                let (found, exact) = apply(op, &inputs(x, w, 0.0), narrow);
                let rounding = if narrow { 1.0 / 256.0 } else { 0.0 };
                assert!(
                    distance(&found[0], &exact[0]) <= 1e-5 + rounding,
                    "{x} {op:?}"
                );
            }
        }
    });
}

#[test]
fn nan_reaches_what_sees_it() {
    let (x, w) = (Shape::new(1, 6, 9, 8), Shape::new(8, 3, 3, 1));
    let mut values = inputs(x, w, 0.0);
    values.pop();
    let (row, column, channel) = (2, 5, 3);
    values[0].1[(row * x.w + column) * x.c + channel] = f32::NAN;
    for narrow in [false, true] {
        let (found, _) = apply(DepthwiseConv2d::new(1, 1), &values, narrow);
        for (i, y) in found[0].iter().enumerate() {
            let (r, s, c) = (i / x.c / x.w, i / x.c % x.w, i % x.c);
            let sees = r.abs_diff(row) <= 1 && s.abs_diff(column) <= 1 && c == channel;
            assert_eq!(y.is_nan(), sees, "{r}, {s}, {c}");
        }
    }
}
