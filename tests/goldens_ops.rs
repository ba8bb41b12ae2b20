//! Operations against PyTorch: outputs and gradients in `f32`, from `goldens/make_ops.py`.

use echograd::Result;
use echograd::device::cpu::Session;
use echograd::ops::activation::Activation;
use echograd::ops::batch_norm::{BatchNorm, Normalize, RunningStatistics};
use echograd::ops::concat::Concat;
use echograd::ops::conv2d::Conv2d;
use echograd::ops::group_norm::GroupNorm;
use echograd::ops::losses::{BceWithLogits, Mse};
use echograd::ops::pointwise::{Add, BiasAdd, Mul, Relu, Sigmoid, Silu};
use echograd::ops::pool::{AvgPool2d, GlobalAvgPool, MaxPool2d};
use echograd::ops::upsample::Upsample2x;
use echograd::tape::{Plan, Tape, Var};
use echograd::tensor::Shape;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    op: String,
    params: Params,
    seed: u64,
    inputs: Vec<Input>,
    outputs: Vec<Vec<f64>>,
    gradients: Vec<Option<Vec<f64>>>,
}

#[derive(Deserialize, Default, Debug)]
#[serde(default, deny_unknown_fields)]
struct Params {
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    groups: usize,
    eps: f64,
    momentum: f64,
    activation: String,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    shape: [usize; 4],
    low: f64,
    high: f64,
    gradient: bool,
}

/// The numbers that `make_ops.py` draws.
fn numbers(seed: u64, len: usize, low: f64, high: f64) -> Vec<f32> {
    let number = |i: u64| {
        let mut x = (i * 2_654_435_761 + seed * 40503) as u32;
        for (shift, factor) in [(15, 2_246_822_519), (13, 3_266_489_917)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        (low + (high - low) * (f64::from(x >> 8) / f64::from(1 << 24))) as f32
    };
    (0..len as u64).map(number).collect()
}

fn record(golden: &Golden, tape: &mut Tape, inputs: &[Var]) -> Result<Vec<Var>> {
    let &Params {
        kernel,
        stride,
        padding,
        groups,
        eps,
        momentum,
        ..
    } = &golden.params;
    let activation = match golden.params.activation.as_str() {
        "relu" => Activation::Relu,
        "silu" => Activation::Silu,
        _ => Activation::Identity,
    };
    let y = match golden.op.as_str() {
        "conv2d" => tape.push(
            Conv2d {
                stride,
                padding,
                statistics: false,
            },
            inputs,
        )?,
        "linear" => tape.push(Conv2d::linear(), inputs)?,
        "bias_add" => tape.push(BiasAdd, inputs)?,
        "batch_norm" => tape.push_all(BatchNorm { eps, activation }, inputs)?[0],
        "normalize" => tape.push(
            Normalize {
                eps,
                activation,
                of_batch: false,
            },
            inputs,
        )?,
        "group_norm" => {
            let op = GroupNorm {
                groups,
                eps,
                activation,
            };
            tape.push_all(op, inputs)?[0]
        }
        "running_statistics" => return running_statistics(tape, inputs[0], momentum),
        "max_pool2d" => {
            let op = MaxPool2d {
                kernel,
                stride,
                padding,
            };
            tape.push(op, inputs)?
        }
        "avg_pool2d" => {
            let op = AvgPool2d {
                kernel,
                stride,
                padding,
            };
            tape.push(op, inputs)?
        }
        "global_avg_pool" => tape.push(GlobalAvgPool, inputs)?,
        "upsample2x" => tape.push(Upsample2x, inputs)?,
        "concat" => tape.push(Concat, inputs)?,
        "add" => tape.push(Add, inputs)?,
        "mul" => tape.push(Mul, inputs)?,
        "relu" => tape.push(Relu, inputs)?,
        "silu" => tape.push(Silu, inputs)?,
        "sigmoid" => tape.push(Sigmoid, inputs)?,
        "bce_with_logits" => tape.push(BceWithLogits, inputs)?,
        "mse" => tape.push(Mse, inputs)?,
        other => panic!("no operation {other}"),
    };
    Ok(vec![y])
}

/// Running mean and variance, both 0 at first, after one batch.
fn running_statistics(tape: &mut Tape, x: Var, momentum: f64) -> Result<Vec<Var>> {
    let shape = tape.shape(x);
    let vector = Shape::per_channel(shape.c);
    let [gamma, beta] = ["gamma", "beta"].map(|name| tape.input(name, vector));
    let running = ["mean", "var"].map(|name| tape.state(name, vector));
    let norm = BatchNorm {
        eps: 1e-5,
        activation: Activation::Identity,
    };
    let found = tape.push_all(norm, &[x, gamma, beta])?;
    let count = shape.rows();
    let counts = vec![count];
    tape.update(
        RunningStatistics { momentum, counts },
        &found[1..],
        &running,
    )?;
    Ok(running.to_vec())
}

fn assert_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= 1e-5 * scale,
            "{what}[{i}]: {found}, PyTorch {expected}"
        );
    }
}

#[test]
fn outputs_and_gradients_are_those_of_pytorch() {
    let goldens: Vec<Golden> = serde_json::from_str(include_str!("goldens/ops.json")).unwrap();
    for golden in &goldens {
        let what = format!("{} {:?}", golden.op, golden.params);
        let mut tape = Tape::new();
        let mut written = Vec::new();
        for (i, input) in golden.inputs.iter().enumerate() {
            let [n, h, w, c] = input.shape;
            let var = tape.input(&input.name, Shape::new(n, h, w, c));
            let len = n * h * w * c;
            let values = numbers(golden.seed + i as u64, len, input.low, input.high);
            written.push((var, values));
        }
        let inputs: Vec<Var> = written.iter().map(|w| w.0).collect();
        let outputs = record(golden, &mut tape, &inputs).unwrap();
        outputs.iter().for_each(|&y| tape.keep(y));

        let differentiable = golden
            .inputs
            .iter()
            .zip(&inputs)
            .filter(|(i, _)| i.gradient);
        let wrt: Vec<Var> = differentiable.map(|(_, &var)| var).collect();
        let mut pairs = Vec::new();
        for (o, &y) in outputs.iter().enumerate() {
            let dy = tape.input("dy", tape.shape(y));
            let values = numbers(golden.seed + 50 + o as u64, tape.shape(y).len(), -1.0, 1.0);
            written.push((dy, values));
            pairs.push((y, dy));
        }
        let gradients = tape.backward_from(&pairs, &wrt).unwrap();
        gradients.iter().flatten().for_each(|&g| tape.keep(g));

        let plan = Plan::new(&tape, Default::default()).unwrap();
        let mut session = Session::<f32>::new(plan).unwrap();
        written
            .iter()
            .for_each(|(var, values)| session.write(*var, values));
        session.run();
        assert_eq!(outputs.len(), golden.outputs.len(), "{what}");
        for (&y, expected) in outputs.iter().zip(&golden.outputs) {
            assert_close(session.read(y), expected, &what);
        }
        let expected: Vec<_> = golden.gradients.iter().flatten().collect();
        assert_eq!(gradients.len(), expected.len(), "{what}");
        for ((&var, gradient), expected) in wrt.iter().zip(gradients).zip(expected) {
            let what = format!("{what}, gradient of {}", tape.name(var));
            assert_close(session.read(gradient.unwrap()), expected, &what);
        }
    }
}
