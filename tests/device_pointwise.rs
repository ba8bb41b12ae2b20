//! The kernels of pointwise.cu and reduce.cu, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

#[path = "support/device.rs"]
mod support;

use std::ffi::c_void;

use echograd::Result;
use echograd::device::cpu;
use echograd::device::emulator::{self, Buffer, SEEDS};
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{Case, Sampler};
use echograd::ops::concat::SliceChannels;
use echograd::ops::dropout::Dropout;
use echograd::ops::pointwise::{Add, Fill, Mul, Relu, Scale, Sigmoid, Silu, Slope, StopGradient};
use echograd::ops::{Op, control};
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use half::bf16;
use rayon::prelude::*;
use support::{check, check_random};

const OPERATIONS: [&str; 10] = [
    "add", "add_relu", "mul", "scale", "bias_add", "relu", "silu", "sigmoid", "dropout", "concat",
];

#[test]
fn random_problems_agree_with_the_cpu() {
    check_random(&OPERATIONS, 100, Sampler::new);
}

#[test]
fn random_problems_of_several_blocks_agree_with_the_cpu() {
    check_random(&OPERATIONS, 4, Sampler::large);
}

/// Few and many channels, multiples of a vector and not; one piece and several; the sums of `dy` and of
/// `dy·a`.
#[test]
fn sums_over_rows_of_any_width_agree_with_the_cpu() {
    let shapes = [
        (1, 300, 301, 1),
        (3, 91, 101, 1),
        (2, 64, 64, 3),
        (1, 40, 41, 24),
        (2, 17, 19, 150),
        (1, 70, 3, 257),
        (3, 5, 5, 1001),
        (1, 9, 11, 2056),
        (2, 3, 5, 4104),
        (2, 1, 1, 5000),
        (300, 1, 1, 7),
    ];
    shapes.into_par_iter().for_each(|(n, h, w, c)| {
        let a = Shape::new(n, h, w, c);
        for b in [Shape::per_channel(c), Shape::per_image(n, c)] {
            let mut s = Sampler::new(c as u64);
            let (x, y) = (s.values(a.len(), -1.0, 2.0), s.values(b.len(), -2.0, 2.0));
            let add = Case::new(format!("{a} + {b}"), |t, v| Ok(vec![t.push(Add, v)?]));
            let mul = Case::new(format!("{a} · {b}"), |t, v| Ok(vec![t.push(Mul, v)?]));
            for case in [add, mul] {
                let case = case.with("a", a, x.clone()).narrow();
                check(&case.with("b", b, y.clone()), 7);
            }
        }
    });
}

/// Applies an operation once on the emulator; `narrow` says which inputs are bf16.
fn apply(op: impl Op + 'static, inputs: &[(Shape, &[f32], bool)]) -> Vec<f32> {
    let mut tape = Tape::new();
    let vars: Vec<Var> = inputs.iter().map(|i| tape.input("input", i.0)).collect();
    for (&var, input) in vars.iter().zip(inputs) {
        if input.2 {
            tape.narrow(var);
        }
    }
    let y = tape.push(op, &vars).unwrap();
    tape.keep(y);
    let plan = Plan::new(&tape, Options::gpu(true)).unwrap();
    let mut session = gpu::Session::new(&Gpu::emulator().unwrap(), plan).unwrap();
    for (&var, input) in vars.iter().zip(inputs) {
        session.write(var, input.1).unwrap();
    }
    session.run().unwrap();
    session.read(y).unwrap()
}

#[test]
fn nan_and_infinity_pass() {
    let shape = Shape::per_channel(21);
    for at in 0..21 {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [0.5; 21];
            x[at] = bad;
            let good = [0.5; 21];
            for narrow in [false, true] {
                let (x, good) = ((shape, &x[..], narrow), (shape, &good[..], narrow));
                let row = (shape, good.1, false);
                let found = [
                    apply(StopGradient, &[x]),
                    apply(Scale { factor: 2.0 }, &[x]),
                    apply(Relu, &[x]),
                    apply(Silu, &[x]),
                    apply(Add, &[x, good]),
                    apply(Add, &[good, x]),
                    apply(Mul, &[x, row]),
                    apply(Slope(Relu), &[x, good]),
                    apply(Slope(Silu), &[x, good]),
                    apply(Slope(Sigmoid), &[x, good]),
                ];
                for (i, y) in found.iter().enumerate() {
                    for (j, y) in y.iter().enumerate() {
                        let expected = if j == at { bad.is_nan() } else { false };
                        assert_eq!(y.is_nan(), expected, "{i} at {j}");
                        assert_eq!(y.is_finite(), j != at, "{i} at {j}");
                    }
                }
            }
        }
        let mut x = [0.5; 21];
        x[at] = f32::NAN;
        assert!(apply(Sigmoid, &[(shape, &x, false)])[at].is_nan());
    }
    let extremes = [f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY];
    let y = apply(Sigmoid, &[(Shape::per_channel(4), &extremes, false)]);
    assert_eq!(y, [0.0, 0.0, 1.0, 1.0]);
}

#[test]
fn constants_fill_every_element() {
    for shape in [Shape::SCALAR, Shape::new(2, 33, 31, 5)] {
        assert_eq!(
            apply(Fill { shape, value: 0.3 }, &[]),
            vec![0.3; shape.len()]
        );
    }
}

#[test]
fn gradients_may_be_stored_unlike_what_they_belong_to() {
    let shape = Shape::new(1, 43, 17, 7);
    let mut s = Sampler::new(5);
    let mut values = || -> Vec<f32> {
        let values = s.values(shape.len(), -3.0, 3.0);
        values.iter().map(|&x| bf16::from_f64(x).to_f32()).collect()
    };
    let (dy, x) = (values(), values());
    for (dy_narrow, x_narrow) in [(false, true), (true, false)] {
        let inputs = [(shape, &dy[..], dy_narrow), (shape, &x[..], x_narrow)];
        let same = inputs.map(|(shape, x, _)| (shape, x, dy_narrow));
        assert_eq!(apply(Slope(Silu), &inputs), apply(Slope(Silu), &same));
        assert_eq!(apply(Slope(Relu), &inputs), apply(Slope(Relu), &same));
        assert_eq!(apply(Add, &inputs), apply(Add, &same));
    }
}

#[test]
fn dropout_draws_what_the_cpu_draws() {
    let op = Dropout {
        rate: 0.3,
        seed: 0x1234_5678_9abc,
        layer: 5,
    };
    for shape in [Shape::per_channel(3), Shape::new(2, 37, 29, 5)] {
        let mut tape = Tape::new();
        let x = tape.input("x", shape);
        tape.narrow(x);
        let control = tape.input("control", Shape::per_channel(control::LEN));
        let y = tape.push(op, &[x, control]).unwrap();
        tape.keep(y);
        let plan = |options| Plan::new(&tape, options).unwrap();
        let mut expected = cpu::Session::<f32>::new(plan(Options::default())).unwrap();
        let ones = vec![1.0; shape.len()];
        expected.write(x, &ones);
        for narrow in [false, true] {
            let gpu = Gpu::emulator().unwrap();
            let mut found = gpu::Session::new(&gpu, plan(Options::gpu(narrow))).unwrap();
            found.write(x, &ones).unwrap();
            // The captured step draws anew when the number of the step changes.
            let graph = found.capture().unwrap();
            for step in [1.0, 2.0, 16_777_216.0] {
                expected.write(control, &[step, 0.0, 0.0, 0.0]);
                expected.run();
                found.write(control, &[step, 0.0, 0.0, 0.0]).unwrap();
                graph.replay().unwrap();
                let stored = |&y: &f32| {
                    if narrow {
                        bf16::from_f32(y).to_f32()
                    } else {
                        y
                    }
                };
                let expected: Vec<f32> = expected.read(y).iter().map(stored).collect();
                assert!(found.read(y).unwrap() == expected, "{shape}, step {step}");
            }
        }
    }
}

#[test]
fn channels_are_cut_out_in_units_of_any_size() {
    let rows = 37;
    for (c, start, channels) in [(16, 8, 8), (12, 4, 4), (10, 2, 6), (9, 3, 5), (5, 0, 1)] {
        let shape = Shape::new(1, 1, rows, c);
        let x: Vec<f32> = (0..shape.len()).map(|i| (i % 251) as f32).collect();
        let expected: Vec<f32> = x
            .chunks(c)
            .flat_map(|row| row[start..start + channels].to_vec())
            .collect();
        for narrow in [false, true] {
            let found = apply(SliceChannels { start, channels }, &[(shape, &x, narrow)]);
            assert_eq!(
                found, expected,
                "{channels} from {start} of {c}, bf16: {narrow}"
            );
        }
    }
}

/// Launches with a list of arguments, each a variable that outlives the launch.
macro_rules! launch {
    ($name:expr, $blocks:expr $(, $argument:expr)* $(,)?) => {{
        let mut arguments: Vec<*mut c_void> = vec![$((&raw const $argument).cast_mut().cast()),*];
        // SAFETY: the tests pass what the kernels declare.
        unsafe { emulator::launch($name, [$blocks, 1, 1], [256, 1, 1], 0, &mut arguments) }
    }};
}

/// An arena aligns all tensors; kernels take any address.
#[test]
fn addresses_that_are_no_multiples_of_a_vector_are_served() -> Result<()> {
    let len = 2500_usize;
    let numbers: Vec<f32> = (0..2 * len).map(|i| (i % 97) as f32 - 48.0).collect();
    let (a, b) = numbers.split_at(len);
    let narrow = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<bf16>>();
    for seed in SEEDS {
        emulator::with_seed(seed, || -> Result<()> {
            for (shift_a, shift_b, shift_y) in [(0, 1, 0), (1, 0, 0), (0, 0, 3), (3, 2, 1)] {
                let at = |buffer: &Buffer, shift: usize, size: usize| {
                    buffer.address() as u64 + (shift * size) as u64
                };
                let shifted = |x: &[f32], shift| [&vec![9.0; shift], x].concat();
                let (x, z) = (shifted(a, shift_a), shifted(b, shift_b));
                let sums: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
                let rows = 100_u64;
                let (channels, count, wide, narrow_b) = (5_u32, len as u64, 0_i32, 1_i32);
                let row = |i: usize| b[i / 500 * 5 + i % 5];
                let products: Vec<f32> = (0..len).map(|i| a[i] * row(i)).collect();

                let (px, pz) = (Buffer::from_slice(&x)?, Buffer::from_slice(&z)?);
                let py = Buffer::from_slice(&vec![9.0f32; len + 8])?;
                let (pa, pb, to) = (
                    at(&px, shift_a, 4),
                    at(&pz, shift_b, 4),
                    at(&py, shift_y, 4),
                );
                launch!("add_f32", 2, pa, pb, wide, to, count)?;
                let y = py.to_vec::<f32>();
                assert_eq!(y[shift_y..][..len], sums);
                assert!(
                    y[..shift_y]
                        .iter()
                        .chain(&y[shift_y + len..])
                        .all(|&y| y == 9.0)
                );
                launch!("mul_rows_f32", 2, pa, pb, wide, to, count, channels, rows)?;
                assert_eq!(py.to_vec::<f32>()[shift_y..][..len], products);

                let (px, pz) = (
                    Buffer::from_slice(&narrow(&x))?,
                    Buffer::from_slice(&narrow(&z))?,
                );
                let py = Buffer::from_slice(&narrow(&vec![9.0; len + 8]))?;
                let (pa, pb, to) = (
                    at(&px, shift_a, 2),
                    at(&pz, shift_b, 2),
                    at(&py, shift_y, 2),
                );
                launch!("add_bf16", 1, pa, pb, narrow_b, to, count)?;
                let y: Vec<bf16> = py.to_vec();
                assert_eq!(y[shift_y..][..len], narrow(&sums));
                assert!(
                    y[..shift_y]
                        .iter()
                        .chain(&y[shift_y + len..])
                        .all(|&y| y.to_f32() == 9.0)
                );
                launch!(
                    "mul_rows_bf16",
                    1,
                    pa,
                    pb,
                    narrow_b,
                    to,
                    count,
                    channels,
                    rows
                )?;
                assert_eq!(py.to_vec::<bf16>()[shift_y..][..len], narrow(&products));
            }
            Ok(())
        })?;
    }
    Ok(())
}
