//! The kernels of pools, upsampling, gates and stochastic depth, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

#[path = "support/device.rs"]
mod support;

use echograd::device::cpu;
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{Case, Sampler};
use echograd::ops::gate::Gate;
use echograd::ops::pool::{AvgPool2d, GlobalAvgPool, MaxPool2d};
use echograd::ops::stochastic_depth::StochasticDepth;
use echograd::ops::upsample::Upsample2x;
use echograd::ops::{Op, control};
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use half::bf16;
use rayon::prelude::*;
use support::{check, check_random};

const OPERATIONS: [&str; 6] = [
    "max_pool2d",
    "avg_pool2d",
    "global_avg_pool",
    "upsample2x",
    "gate",
    "stochastic_depth",
];

/// 2×2 windows that tile the image; and such as overlap, with padding.
const HALVES: MaxPool2d = MaxPool2d {
    kernel: [2, 2],
    stride: [2, 2],
    padding: [0, 0],
};
const OVERLAPPING: MaxPool2d = MaxPool2d {
    kernel: [3, 3],
    stride: [2, 1],
    padding: [1, 1],
};

#[test]
fn random_problems_agree_with_the_cpu() {
    check_random(&OPERATIONS, 40, Sampler::new);
}

#[test]
fn random_problems_of_several_blocks_agree_with_the_cpu() {
    check_random(&OPERATIONS, 3, Sampler::large);
}

/// Few and many channels, multiples of a vector and not; one piece and several, one unit of a lane and several.
#[test]
fn any_number_of_channels_agrees_with_the_cpu() {
    let shapes = [
        Shape::new(1, 150, 151, 1),
        Shape::new(2, 21, 23, 24),
        Shape::new(2, 9, 11, 150),
        Shape::new(1, 3, 5, 257),
        Shape::new(2, 2, 3, 2056),
        Shape::new(100, 1, 1, 7),
    ];
    shapes.into_par_iter().for_each(|x| {
        let mut s = Sampler::new(x.c as u64);
        let values = s.values(x.len(), -1.0, 2.0);
        let mean = Case::new(format!("mean of {x}"), |t, v| {
            Ok(vec![t.push(GlobalAvgPool, v)?])
        });
        check(&mean.with("x", x, values.clone()).narrow(), 7);
        for z in [Shape::per_image(x.n, x.c), Shape { c: 1, ..x }] {
            let gate = Case::new(format!("gate of {x} with {z}"), |t, v| {
                Ok(vec![t.push(Gate, v)?])
            });
            let gate = gate.with("x", x, values.clone()).narrow();
            check(&gate.with("z", z, s.values(z.len(), -4.0, 4.0)).narrow(), 7);
        }
    });
}

/// Vectors on both sides of the skip connection, on one or on none; maps of one row, and of several blocks.
#[test]
fn any_skip_connection_agrees_with_the_cpu() {
    let sizes = [(8, 16), (16, 8), (8, 4), (3, 8), (5, 1), (264, 24)];
    sizes.into_par_iter().for_each(|(c, skip)| {
        for [h, w] in [[1, 3], [9, 11]] {
            let mut s = Sampler::new(c as u64);
            let (x, skip) = (Shape::new(2, h, w, c), Shape::new(2, 2 * h, 2 * w, skip));
            let case = Case::new(format!("{x} beside {skip}"), |t, v| {
                Ok(vec![t.push(Upsample2x, v)?])
            });
            let case = case.with("x", x, s.values(x.len(), -1.0, 2.0)).narrow();
            let case = case.with("skip", skip, s.values(skip.len(), -1.0, 2.0));
            check(&case.narrow(), 7);
        }
    });
}

/// Pushes an operation on its inputs, and the gradients for all of them from `dy`; on the CPU or the emulator.
/// `narrow` says which of inputs and `dy` are bf16. Returns `y` and the gradients.
fn replay(
    op: impl Op + Clone + 'static,
    inputs: &[(Shape, &[f32])],
    wanted: usize,
    dy: &[f32],
    narrow: Option<&[bool]>,
) -> Vec<Vec<f32>> {
    let mut tape = Tape::new();
    let input = |tape: &mut Tape, i: usize, shape| {
        let var = tape.input("input", shape);
        if narrow.is_some_and(|narrow| narrow[i]) {
            tape.narrow(var);
        }
        var
    };
    let given = inputs.iter().enumerate();
    let vars: Vec<Var> = given.map(|(i, of)| input(&mut tape, i, of.0)).collect();
    let y = tape.push(op, &vars).unwrap();
    let shape = tape.shape(y);
    let seed = input(&mut tape, inputs.len(), shape);
    let written: Vec<Var> = vars.iter().copied().chain([seed]).collect();
    let gradients = tape.backward_from(&[(y, seed)], &vars[..wanted]).unwrap();
    let results: Vec<Var> = [y]
        .into_iter()
        .chain(gradients.into_iter().flatten())
        .collect();
    results.iter().for_each(|&v| tape.keep(v));
    let elements = inputs.iter().map(|i| i.1).chain([dy]);
    match narrow {
        None => {
            let plan = Plan::new(&tape, Options::default()).unwrap();
            let mut session = cpu::Session::<f32>::new(plan).unwrap();
            written
                .iter()
                .zip(elements)
                .for_each(|(&v, x)| session.write(v, x));
            session.run();
            results.iter().map(|&v| session.read(v).to_vec()).collect()
        }
        Some(_) => {
            let plan = Plan::new(&tape, Options::gpu(true)).unwrap();
            let mut session = gpu::Session::new(&Gpu::emulator().unwrap(), plan).unwrap();
            for (&var, x) in written.iter().zip(elements) {
                session.write(var, x).unwrap();
            }
            session.run().unwrap();
            results.iter().map(|&v| session.read(v).unwrap()).collect()
        }
    }
}

/// Small whole numbers, which bf16 holds.
fn whole(len: usize, seed: u64, below: usize) -> Vec<f32> {
    let mut s = Sampler::new(seed);
    (0..len).map(|_| s.size(0, below) as f32).collect()
}

#[test]
fn of_equal_maxima_the_first_takes_the_gradient() {
    for op in [HALVES, OVERLAPPING] {
        for x in [Shape::new(2, 9, 7, 8), Shape::new(1, 6, 5, 3)] {
            let to = op.outputs(&[x]).unwrap()[0];
            let (values, dy) = (whole(x.len(), 1, 2), whole(to.len(), 2, 9));
            let run = |narrow: Option<&[bool]>| replay(op, &[(x, &values)], 1, &dy, narrow);
            let expected = run(None);
            for narrow in [[false; 2], [true; 2], [true, false], [false, true]] {
                assert_eq!(run(Some(&narrow)), expected, "{op:?}, {narrow:?}");
            }
        }
    }
}

/// NaN and infinity arrive where they do on the CPU, and nowhere else.
#[test]
fn nan_passes() {
    fn compare(op: impl Op + Clone + 'static, x: Shape, z: Option<Shape>) {
        let y = op
            .outputs(&[x].into_iter().chain(z).collect::<Vec<_>>())
            .unwrap()[0];
        for bad in [f32::NAN, f32::INFINITY] {
            for at in (0..x.len()).step_by(7) {
                let mut values = whole(x.len(), 3, 5);
                values[at] = bad;
                let mut dy = whole(y.len(), 4, 5);
                dy[at % y.len()] = bad;
                let logits = z.map(|z| (z, whole(z.len(), 5, 3)));
                let mut inputs = vec![(x, &values[..])];
                inputs.extend(logits.as_ref().map(|(z, values)| (*z, &values[..])));
                let run = |narrow: Option<&[bool]>| {
                    let results = replay(op.clone(), &inputs, inputs.len(), &dy, narrow);
                    let kind = |v: &f32| (v.is_nan(), v.is_infinite());
                    results.iter().flatten().map(kind).collect::<Vec<_>>()
                };
                let expected = run(None);
                let full = run(Some(&[false; 3]));
                let narrow = run(Some(&[true; 3]));
                assert_eq!(full, expected, "{op:?} with {bad} at {at}");
                assert_eq!(narrow, expected, "{op:?} with {bad} at {at}, bf16");
            }
        }
    }
    let x = Shape::new(2, 3, 3, 8);
    compare(HALVES, x, None);
    compare(OVERLAPPING, x, None);
    let MaxPool2d {
        kernel,
        stride,
        padding,
    } = OVERLAPPING;
    compare(
        AvgPool2d {
            kernel,
            stride,
            padding,
        },
        x,
        None,
    );
    compare(GlobalAvgPool, x, None);
    compare(Upsample2x, x, None);
    compare(Upsample2x, x, Some(Shape::new(2, 6, 6, 8)));
    compare(Gate, x, Some(Shape::per_image(2, 8)));
    compare(Gate, x, Some(Shape { c: 1, ..x }));
}

/// An input and what belongs to it may be stored unlike the others: the results are those of rounded numbers.
#[test]
fn any_storage_meets_any_other() {
    let x = Shape::new(2, 7, 5, 12);
    let values = whole(x.len(), 6, 100);
    let dy = whole(x.len(), 7, 100);
    for z in [Shape::per_image(2, 12), Shape { c: 1, ..x }] {
        let logits = whole(z.len(), 8, 3);
        let inputs = [(x, &values[..]), (z, &logits[..])];
        let expected = replay(Gate, &inputs, 2, &dy, None);
        for bits in 0..8 {
            let narrow = [0, 1, 2].map(|i| bits >> i & 1 == 1);
            let found = replay(Gate, &inputs, 2, &dy, Some(&narrow));
            for (found, expected) in found.iter().zip(&expected) {
                for (found, expected) in found.iter().zip(expected) {
                    let error = (found - expected).abs();
                    assert!(
                        error <= expected.abs() / 128.0,
                        "{narrow:?}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_branch_that_is_left_out_is_not_read() {
    let op = |rate| StochasticDepth {
        rate,
        seed: 0x1234_5678_9abc,
        layer: 5,
    };
    let settings = (Shape::per_channel(control::LEN), &[3.0, 0.0, 0.0, 0.0][..]);
    // Images whose ends are no multiples of a vector, and many of them.
    for x in [
        Shape::new(3, 37, 29, 5),
        Shape::new(97, 1, 1, 3),
        Shape::new(2, 16, 16, 8),
    ] {
        let (branch, dy) = (vec![1.0; x.len()], vec![2.0; x.len()]);
        let residual = whole(x.len(), 9, 5);
        let run = |rate, branch: &[f32], narrow: Option<&[bool]>| {
            let inputs = [(x, branch), (x, &residual[..]), settings];
            replay(op(rate), &inputs, 1, &dy, narrow)
        };
        let missing = vec![f32::NAN; x.len()];
        for bits in 0..8 {
            let [x_narrow, residual_narrow, dy_narrow] = [0, 1, 2].map(|i| bits >> i & 1 == 1);
            let narrow = [x_narrow, residual_narrow, false, dy_narrow];
            // A factor of 2, so that bf16 is exact.
            let expected = run(0.5, &branch, None);
            assert_eq!(
                run(0.5, &branch, Some(&narrow)),
                expected,
                "{x}, {narrow:?}"
            );
            let found = run(1.0 - 1e-9, &missing, Some(&narrow));
            assert_eq!(
                found,
                [residual.clone(), vec![0.0; x.len()]],
                "{x}, {narrow:?}"
            );
        }
        assert!(residual.iter().all(|&r| bf16::from_f32(r).to_f32() == r));
    }
}
