//! The optimizer's kernels, run by the emulator, against the CPU.
#![cfg(echograd_emulator)]

use echograd::device::cpu;
use echograd::device::emulator::SEEDS;
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::Sampler;
use echograd::ops::control;
use echograd::optim::{AdamW, Rule};
use echograd::tape::{Kind, Options, Plan, Tape, Var};
use echograd::tensor::Shape;

/// Sizes of 1, odd sizes, and several chunks with a tail.
const SIZES: [usize; 5] = [1, 7, 4096, 9001, 20_003];

struct Problem {
    tape: Tape,
    control: Var,
    loss: Var,
    norm: Var,
    gradients: Vec<Var>,
    /// What is updated: parameters, then states.
    persistent: Vec<Var>,
}

fn problem(averaged: bool, clip: f64) -> Problem {
    let mut tape = Tape::new();
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let loss = tape.input("loss", Shape::SCALAR);
    let mut parameters = Vec::new();
    let mut gradients = Vec::new();
    for (i, len) in SIZES.into_iter().enumerate() {
        parameters.push(tape.parameter(&format!("p{i}"), Shape::per_channel(len)));
        gradients.push(tape.input(&format!("g{i}"), Shape::per_channel(len)));
    }
    let statistics = [5, 4099].map(|len| tape.state(&format!("s{len}"), Shape::per_channel(len)));
    let rule = |i: usize| Rule {
        decay: i.is_multiple_of(2),
        nonnegative: i % 3 == 1,
    };
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.05,
        clip,
        rules: (0..SIZES.len()).map(rule).collect(),
    };
    let norm = adamw
        .record(
            &mut tape,
            control,
            loss,
            &parameters,
            &gradients,
            averaged.then_some(&statistics),
        )
        .unwrap();
    tape.keep(norm);
    let persistent = [Kind::Parameter, Kind::State].map(|kind| tape.of_kind(kind));
    Problem {
        control,
        loss,
        norm,
        gradients,
        persistent: persistent.into_iter().flatten().collect(),
        tape: tape.clone(),
    }
}

/// What is written before a step.
fn inputs(problem: &Problem, step: u64) -> Vec<(Var, Vec<f32>)> {
    let mut sampler = Sampler::new(step);
    let mut written = vec![(problem.control, vec![step as f32, 0.01, 0.0, 0.9])];
    // Norms from far below the limit to far above it.
    let size = [1e-4, 3e-3, 1.0, 40.0][step as usize % 4];
    for &g in &problem.gradients {
        let len = problem.tape.shape(g).len();
        let values = sampler.values(len, -size, size);
        written.push((g, values.into_iter().map(|x| x as f32).collect()));
    }
    let mut loss = 0.7;
    match step {
        3 => written[3].1[4000] = f32::NAN,
        5 => loss = f32::INFINITY,
        6 => written[1].1[0] = f32::NEG_INFINITY,
        _ => {}
    }
    written.push((problem.loss, vec![loss]));
    written
}

const STEPS: u64 = 8;

/// All persistent values and the norm after each step.
type History = Vec<Vec<Vec<f32>>>;

fn start(problem: &Problem, mut write: impl FnMut(Var, &[f32])) {
    let mut sampler = Sampler::new(99);
    for &var in &problem.persistent {
        let name = problem.tape.name(var);
        if name.starts_with('p') || name.starts_with('s') {
            let values = sampler.values(problem.tape.shape(var).len(), -0.5, 1.0);
            let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
            write(var, &values);
        }
    }
}

fn on_cpu(problem: &Problem) -> History {
    let plan = Plan::new(&problem.tape, Options::default()).unwrap();
    let mut session = cpu::Session::<f32>::new(plan).unwrap();
    start(problem, |var, values| session.write(var, values));
    (1..=STEPS)
        .map(|step| {
            for (var, values) in inputs(problem, step) {
                session.write(var, &values);
            }
            session.run();
            let read = problem.persistent.iter().chain([&problem.norm]);
            read.map(|&var| session.read(var).to_vec()).collect()
        })
        .collect()
}

/// Under each seed, and once more by a captured graph.
fn on_emulator(problem: &Problem, seed: u64, captured: bool) -> History {
    let gpu = Gpu::emulator().unwrap();
    gpu.reorder(seed);
    let plan = Plan::new(&problem.tape, Options::gpu(true)).unwrap();
    let mut session = gpu::Session::new(&gpu, plan).unwrap();
    start(problem, |var, values| session.write(var, values).unwrap());
    let graph = session.capture().unwrap();
    (1..=STEPS)
        .map(|step| {
            for (var, values) in inputs(problem, step) {
                session.write(var, &values).unwrap();
            }
            if captured {
                graph.replay().unwrap();
            } else {
                session.run().unwrap();
            }
            let read = problem.persistent.iter().chain([&problem.norm]);
            read.map(|&var| session.read(var).unwrap()).collect()
        })
        .collect()
}

fn bits(history: &History) -> Vec<u32> {
    let all = history.iter().flatten().flatten();
    all.map(|x| x.to_bits()).collect()
}

#[test]
fn steps_agree_with_the_cpu_and_have_one_result() {
    for (averaged, clip) in [(true, 1.0), (false, 1.0), (true, f64::INFINITY)] {
        let problem = problem(averaged, clip);
        let expected = on_cpu(&problem);
        let found = on_emulator(&problem, SEEDS[0], false);
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let names = problem.persistent.iter().map(|&v| problem.tape.name(v));
            for ((name, found), expected) in names.chain(["norm"]).zip(found).zip(expected) {
                let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                    let same = found.to_bits() == expected.to_bits();
                    assert!(
                        same || (found - expected).abs() <= 2e-6 * largest
                            || found.is_nan() && expected.is_nan(),
                        "step {}: {name}[{i}] is {found}, on the CPU {expected}",
                        step + 1
                    );
                }
            }
        }
        // What is not finite changed nothing, and everything else did.
        for step in 1..STEPS as usize {
            let (before, after) = (&found[step - 1][..], &found[step][..]);
            let skipped = [3, 5, 6].contains(&(step + 1));
            let persistent = ..problem.persistent.len();
            assert_eq!(
                before[persistent] == after[persistent],
                skipped,
                "step {}",
                step + 1
            );
        }
        let first = bits(&found);
        for &seed in &SEEDS[1..] {
            assert!(
                bits(&on_emulator(&problem, seed, false)) == first,
                "seed {seed}"
            );
        }
        assert!(
            bits(&on_emulator(&problem, SEEDS[0], true)) == first,
            "a graph"
        );
    }
}

#[test]
fn corrections_of_the_moments_are_exact_from_the_first_step_to_the_hundred_thousandth() {
    let (beta1, beta2) = (0.9, 0.999);
    let mut tape = Tape::new();
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let loss = tape.input("loss", Shape::SCALAR);
    let parameter = tape.parameter("p", Shape::SCALAR);
    let gradient = tape.input("g", Shape::SCALAR);
    let adamw = AdamW {
        beta1,
        beta2,
        eps: 0.0,
        weight_decay: 0.0,
        clip: f64::INFINITY,
        rules: vec![Rule::default()],
    };
    adamw
        .record(&mut tape, control, loss, &[parameter], &[gradient], None)
        .unwrap();
    let moments: Vec<Var> = tape.of_kind(Kind::State).collect();
    let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
    let mut session = gpu::Session::new(&Gpu::emulator().unwrap(), plan).unwrap();
    session.write(gradient, &[1.0]).unwrap();
    let near = (1..100)
        .chain((100..100_000).step_by(1009))
        .chain([100_000]);
    for step in near {
        session
            .write(control, &[step as f32, 1.0, 0.0, 0.0])
            .unwrap();
        for var in [parameter, moments[0], moments[1]] {
            session.write(var, &[0.0]).unwrap();
        }
        session.run().unwrap();
        let t = f64::from(step);
        let (m, v) = (1.0 - beta1, 1.0f64 - beta2);
        let corrected = (v / (1.0 - beta2.powf(t))).sqrt();
        let expected = -m / (1.0 - beta1.powf(t)) / corrected;
        let found = f64::from(session.read(parameter).unwrap()[0]);
        assert!(
            (found / expected - 1.0).abs() < 1e-6,
            "step {step}: {found} for {expected}"
        );
    }
}

#[test]
fn norms_neither_overflow_nor_vanish() {
    let mut tape = Tape::new();
    let shape = Shape::per_channel(10_000);
    let x = tape.input("x", shape);
    let norm = tape.push(echograd::optim::GlobalNorm, &[x]).unwrap();
    tape.keep(norm);
    let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
    let mut session = gpu::Session::new(&Gpu::emulator().unwrap(), plan).unwrap();
    for size in [1e-38f32, 1e-30, 1.0, 1e30, 3e36] {
        session.write(x, &vec![size; shape.len()]).unwrap();
        session.run().unwrap();
        assert_eq!(session.read(norm).unwrap(), [size * 100.0]);
    }
}

#[test]
fn gradients_in_bf16_are_refused() {
    let mut tape = Tape::new();
    let x = tape.input("x", Shape::per_channel(3));
    tape.narrow(x);
    let norm = tape.push(echograd::optim::GlobalNorm, &[x]).unwrap();
    tape.keep(norm);
    let gpu = Gpu::emulator().unwrap();
    let session = |narrow| gpu::Session::new(&gpu, Plan::new(&tape, Options::gpu(narrow)).unwrap());
    assert!(session(false).is_ok());
    let error = session(true).err().unwrap().to_string();
    assert!(
        error.contains("global_norm") && error.contains("bf16"),
        "{error}"
    );
}
