//! The kernels of norm.cu, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

#[path = "support/device.rs"]
mod support;

use std::ffi::c_void;

use echograd::Result;
use echograd::device::cpu;
use echograd::device::emulator::{self, Buffer, SEEDS};
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{Case, Sampler};
use echograd::ops::Op;
use echograd::ops::activation::Activation;
use echograd::ops::batch_norm::{BatchNorm, Normalize, RunningStatistics};
use echograd::ops::group_norm::GroupNorm;
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use half::bf16;
use rayon::prelude::*;
use support::{check, check_random};

const OPERATIONS: [&str; 4] = ["batch_norm", "normalize", "group_norm", "layer_norm"];

#[test]
fn random_problems_agree_with_the_cpu() {
    check_random(&OPERATIONS, 60, Sampler::new);
}

#[test]
fn random_problems_of_several_blocks_agree_with_the_cpu() {
    check_random(&OPERATIONS, 3, Sampler::large);
}

/// A case of `op` with random inputs, the first of `shape` and the others per channel.
fn case(op: impl Op + Copy + 'static, shape: Shape, seed: u64) -> Case {
    let (mut s, vector) = (Sampler::new(seed), Shape::per_channel(shape.c));
    let x = s.values(shape.len(), -1.0, 2.0);
    let (gamma, beta) = (s.values(shape.c, -1.5, 1.5), s.values(shape.c, -1.0, 1.0));
    Case::new(format!("{op:?} of {shape}"), move |t, v| {
        Ok(vec![t.push_all(op, v)?[0]])
    })
    .with("x", shape, x)
    .narrow()
    .with("gamma", vector, gamma)
    .with("beta", vector, beta)
}

/// Few and many channels; multiples of a vector, fractions that make whole ones when taken several at a time,
/// and such that do not; one piece and several, one strip and several.
#[test]
fn rows_of_any_width_agree_with_the_cpu() {
    let shapes = [
        (1, 150, 151, 1),
        (2, 91, 61, 3),
        (2, 64, 64, 16),
        (1, 40, 41, 24),
        (2, 17, 19, 150),
        (3, 14, 13, 264),
        (1, 70, 3, 257),
        (3, 5, 5, 1001),
        (2, 3, 5, 2048),
        (300, 1, 1, 7),
    ];
    shapes.into_par_iter().for_each(|(n, h, w, c)| {
        let (shape, eps) = (Shape::new(n, h, w, c), 1e-3);
        let batch = BatchNorm {
            eps,
            activation: Activation::Silu,
        };
        check(&case(batch, shape, c as u64), 7);
        let groups = (1..=8).rev().find(|&g| c % g == 0).unwrap();
        let group = GroupNorm {
            groups,
            eps,
            activation: Activation::Identity,
        };
        if h * w * c > groups {
            check(&case(group, shape, c as u64), 7);
        }
    });
}

/// Outputs of `op`, and the gradients for its first three inputs, at the output gradient `dy`.
struct Results {
    outputs: Vec<Vec<f32>>,
    gradients: Vec<Vec<f32>>,
    /// The same in f64 on the CPU.
    exact: [Vec<Vec<f64>>; 2],
}

/// Replays `op` on inputs of whom the first is stored as bf16 if `narrow`, as `dy` is if `dy_narrow`.
fn replay(
    op: impl Op + 'static,
    inputs: &[(Shape, Vec<f32>)],
    dy: &[f32],
    [narrow, dy_narrow]: [bool; 2],
) -> Results {
    let mut tape = Tape::new();
    let vars: Vec<Var> = inputs.iter().map(|i| tape.input("input", i.0)).collect();
    let seed = tape.input("dy", inputs[0].0);
    for (var, is_narrow) in [(vars[0], narrow), (seed, dy_narrow)] {
        if is_narrow {
            tape.narrow(var);
        }
    }
    let outputs = tape.push_all(op, &vars).unwrap();
    let gradients = tape
        .backward_from(&[(outputs[0], seed)], &vars[..3])
        .unwrap();
    let gradients: Vec<Var> = gradients.into_iter().flatten().collect();
    outputs.iter().chain(&gradients).for_each(|&v| tape.keep(v));
    let plan = |options| Plan::new(&tape, options).unwrap();
    let mut device =
        gpu::Session::new(&Gpu::emulator().unwrap(), plan(Options::gpu(true))).unwrap();
    let mut cpu = cpu::Session::<f64>::new(plan(Options::default())).unwrap();
    let values = inputs.iter().map(|i| &i.1[..]).chain([dy]);
    for (&var, values) in vars.iter().chain([&seed]).zip(values) {
        device.write(var, values).unwrap();
        let wide: Vec<f64> = values.iter().map(|&x| x.into()).collect();
        cpu.write(var, &wide);
    }
    device.run().unwrap();
    cpu.run();
    let read = |vars: &[Var]| vars.iter().map(|&v| device.read(v).unwrap()).collect();
    let exact = [&outputs, &gradients].map(|vars| {
        let read = |&v: &Var| cpu.read(v).to_vec();
        vars.iter().map(read).collect::<Vec<_>>()
    });
    Results {
        outputs: read(&outputs),
        gradients: read(&gradients),
        exact,
    }
}

fn distance(found: &[f32], expected: &[f64]) -> f64 {
    let largest = expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    let errors = found.iter().zip(expected);
    errors.fold(0.0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs())) / largest
}

#[test]
fn a_mean_far_from_zero_costs_no_accuracy() {
    let (eps, activation) = (1e-5, Activation::Identity);
    // Several pieces of several steps.
    for (c, seed) in [(24, 1), (5, 2), (1, 3)] {
        let shape = Shape::new(2, 75, 75, c);
        let mut s = Sampler::new(seed);
        let x: Vec<f32> = (s.values(shape.len(), -1.7, 1.7).iter())
            .map(|v| (1e3 + v) as f32)
            .collect();
        let dy: Vec<f32> = (s.values(shape.len(), -1.0, 1.0).iter())
            .map(|&v| v as f32)
            .collect();
        let vector = Shape::per_channel(c);
        let inputs = [(shape, x), (vector, vec![1.0; c]), (vector, vec![0.0; c])];
        let results = [
            replay(BatchNorm { eps, activation }, &inputs, &dy, [false; 2]),
            replay(
                GroupNorm {
                    groups: 1,
                    eps,
                    activation,
                },
                &inputs,
                &dy,
                [false; 2],
            ),
        ];
        for r in results {
            assert!(distance(&r.outputs[1], &r.exact[0][1]) < 1e-7, "mean");
            // Means of pieces are rounded to multiples of 6e-5; a rounded E[x²] alone is off by 0.03.
            let variance = distance(&r.outputs[2], &r.exact[0][2]);
            assert!(variance < 5e-6, "variance: {variance:e}");
            // The mean itself is rounded to a multiple of 6e-5.
            assert!(distance(&r.outputs[0], &r.exact[0][0]) < 5e-5, "y");
            for (i, (found, exact)) in r.gradients.iter().zip(&r.exact[1]).enumerate() {
                let error = distance(found, exact);
                assert!(error < 1e-4, "gradient of input {i}: {error:e}");
            }
        }
    }
}

#[test]
fn a_channel_of_one_value_has_no_variance() {
    let (shape, vector) = (Shape::new(2, 30, 31, 9), Shape::per_channel(9));
    let x = (0..shape.len()).map(|i| (i % 9) as f32 * 123.456).collect();
    let inputs = [(shape, x), (vector, vec![2.0; 9]), (vector, vec![0.5; 9])];
    let op = BatchNorm {
        eps: 1e-5,
        activation: Activation::Relu,
    };
    let r = replay(op, &inputs, &vec![1.0; shape.len()], [false; 2]);
    for (c, (mean, var)) in r.outputs[1].iter().zip(&r.outputs[2]).enumerate() {
        assert_eq!(*mean, c as f32 * 123.456);
        // Pieces are added up in f64.
        assert!(*var < 1e-20);
    }
    assert!(r.outputs[0].iter().all(|&y| y == 0.5));
    assert!(r.gradients[0].iter().all(|&dx| dx.abs() < 1e-4));
    assert!(r.gradients[2].iter().all(|&d| d == shape.rows() as f32));
}

#[test]
fn nan_reaches_its_channel_and_no_other() {
    let (shape, vector) = (Shape::new(1, 20, 23, 10), Shape::per_channel(10));
    let mut s = Sampler::new(3);
    let values = |s: &mut Sampler, len| -> Vec<f32> {
        let values = s.values(len, 0.5, 1.5);
        values.iter().map(|&v| v as f32).collect()
    };
    for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
        for at in [0, 1234, shape.len() - 1] {
            let mut x = values(&mut s, shape.len());
            x[at] = f32::NAN;
            let dy = values(&mut s, shape.len());
            let inputs = [
                (shape, x),
                (vector, values(&mut s, 10)),
                (vector, values(&mut s, 10)),
            ];
            let op = BatchNorm {
                eps: 1e-5,
                activation,
            };
            let r = replay(op, &inputs, &dy, [at == 0; 2]);
            for y in r.outputs.iter().chain(&r.gradients[..1]) {
                for (i, y) in y.iter().enumerate() {
                    assert_eq!(y.is_nan(), i % 10 == at % 10, "{activation:?}, {i}");
                }
            }
        }
    }
}

#[test]
fn gradients_may_be_stored_unlike_what_they_belong_to() {
    let (shape, vector) = (Shape::new(2, 13, 17, 24), Shape::per_channel(24));
    let mut s = Sampler::new(5);
    let mut values = |shape: Shape| -> Vec<f32> {
        let values = s.values(shape.len(), 0.1, 1.1);
        values.iter().map(|&x| bf16::from_f64(x).to_f32()).collect()
    };
    let dy = values(shape);
    let inputs = [shape, vector, vector, vector, vector].map(|shape| (shape, values(shape)));
    let op = Normalize {
        eps: 1e-5,
        activation: Activation::Silu,
        of_batch: false,
    };
    for narrow in [false, true] {
        let [same, other] =
            [narrow, !narrow].map(|dy_narrow| replay(op, &inputs, &dy, [narrow, dy_narrow]));
        assert_eq!(same.gradients, other.gradients);
    }
}

#[test]
fn running_statistics_follow_the_cpu() {
    for channels in [&[1][..], &[300, 7, 256]] {
        let mut tape = Tape::new();
        let extents = channels.iter().flat_map(|&c| [Shape::per_channel(c); 2]);
        let new: Vec<Var> = extents.clone().map(|s| tape.input("new", s)).collect();
        let running: Vec<Var> = extents
            .enumerate()
            .map(|(i, s)| tape.state(&format!("{i}"), s))
            .collect();
        let op = RunningStatistics {
            momentum: 0.1,
            counts: vec![37, 5, 1000][..channels.len()].to_vec(),
        };
        tape.update(op, &new, &running).unwrap();
        let plan = |options| Plan::new(&tape, options).unwrap();
        let mut cpu = cpu::Session::<f64>::new(plan(Options::default())).unwrap();
        let gpu = Gpu::emulator().unwrap();
        let mut device = gpu::Session::new(&gpu, plan(Options::gpu(true))).unwrap();
        let mut s = Sampler::new(channels.len() as u64);
        for &var in new.iter().chain(&running) {
            let drawn = s.values(tape.shape(var).len(), 0.1, 4.0);
            let values: Vec<f32> = drawn.iter().map(|&v| v as f32).collect();
            device.write(var, &values).unwrap();
            let wide: Vec<f64> = values.iter().map(|&x| x.into()).collect();
            cpu.write(var, &wide);
        }
        for _ in 0..3 {
            device.run().unwrap();
            cpu.run();
        }
        for var in running {
            assert!(distance(&device.read(var).unwrap(), cpu.read(var)) < 1e-6);
        }
    }
}

/// Launches with a list of arguments, each a variable that outlives the launch.
macro_rules! launch {
    ($name:expr, $blocks:expr, $($argument:expr),* $(,)?) => {{
        let mut arguments: Vec<*mut c_void> = vec![$((&raw const $argument).cast_mut().cast()),*];
        // SAFETY: the tests pass what the kernels declare.
        unsafe { emulator::launch($name, [$blocks, 1, 1], [256, 1, 1], 0, &mut arguments) }
    }};
}

/// An arena aligns all tensors; kernels take any address.
#[test]
fn addresses_that_are_no_multiples_of_a_vector_are_served() -> Result<()> {
    let (rows, channels) = (300_usize, 8_u32);
    let c = channels as usize;
    let len = rows * c;
    let x: Vec<f32> = (0..len).map(|i| (i % 89) as f32 - 44.0).collect();
    let (gamma, beta) = (vec![1.0f32; c], vec![0.5f32; c]);
    let (mean, var) = (vec![2.0f32; c], vec![0.25f32; c]);
    let [pg, pb, pm, pv] = [&gamma, &beta, &mean, &var].map(|v| Buffer::from_slice(v).unwrap());
    let expected: Vec<f32> = x.iter().map(|x| 2.0 * (x - 2.0) + 0.5).collect();
    for (seed, (shift_x, shift_y)) in SEEDS.into_iter().zip([(0, 1), (1, 0), (3, 3), (0, 0)]) {
        emulator::with_seed(seed, || -> Result<()> {
            let px = Buffer::from_slice(&[&vec![9.0; shift_x], &x[..]].concat())?;
            let py = Buffer::from_slice(&vec![9.0f32; len + 4])?;
            let (from, to) = (
                px.address() as u64 + 4 * shift_x as u64,
                py.address() as u64 + 4 * shift_y as u64,
            );
            let [g, b, m, v] = [&pg, &pb, &pm, &pv].map(|p| p.address() as u64);
            let (eps, width, activation, elements) = (0.0f32, 1_u32, 0_i32, len as u64);
            // Two vectors across, 128 rows down, one piece of three steps.
            let (across, strips, pieces, steps) = (2_u32, 1_u32, 1_u32, 3_u32);
            launch!(
                "normalize_f32",
                1,
                from,
                to,
                m,
                v,
                g,
                b,
                eps,
                width,
                activation,
                elements,
                channels,
                channels,
                across,
                strips,
                pieces,
                steps
            )?;
            let y = py.to_vec::<f32>();
            assert_eq!(y[shift_y..][..len], expected);
            let around = y[..shift_y].iter().chain(&y[shift_y + len..]);
            assert!(around.copied().all(|y| y == 9.0));

            let sums = Buffer::from_slice(&vec![0.0f32; 2 * c])?;
            let partials = sums.address() as u64;
            launch!(
                "norm_statistics_f32",
                1,
                from,
                partials,
                elements,
                channels,
                channels,
                across,
                strips,
                pieces,
                steps
            )?;
            for (channel, found) in sums.to_vec::<f32>().chunks(2).enumerate() {
                let column = || x[channel..].iter().step_by(c).map(|&x| f64::from(x));
                let mean = column().sum::<f64>() / rows as f64;
                let squares: f64 = column().map(|x| (x - mean).powi(2)).sum();
                assert!((f64::from(found[0]) - mean).abs() < 1e-5);
                assert!((f64::from(found[1]) / squares - 1.0).abs() < 1e-6);
            }
            Ok(())
        })?;
    }
    Ok(())
}
