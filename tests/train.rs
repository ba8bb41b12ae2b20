//! Training as a whole: optimizer against PyTorch, gradient of the whole model, memory, determinism,
//! interruption, and what goes wrong.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use echograd::device::cpu::{Element, Session};
use echograd::device::philox::Philox;
use echograd::features::{MaskSums, Moments, Prior};
use echograd::ops::control;
use echograd::optim::{AdamW, Rule};
use echograd::tape::{Kind, Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use echograd::train::checkpoint::{self, Checkpoint, Position};
use echograd::train::config::{Arm, Config, Device, Preset};
use echograd::train::evaluate::{EvaluateArgs, evaluate};
use echograd::train::predict::{PredictArgs, predict};
use echograd::train::run::{TrainArgs, Trained, train};
use echograd::train::step::TrainingStep;
use echograd::train::{Model, Report};
use echograd::{Error, Result};

// ---------------------------------------------------------------------------------------------
// Memory

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

impl Counting {
    fn note(layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        LARGEST.set(LARGEST.get().max(layout.size()));
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note(layout);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn on_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(body)
}

#[test]
fn a_replay_allocates_nothing_and_the_arena_is_what_the_plan_says() {
    on_threads(1, || {
        let mut small = Small::<f32>::new(&config(&[]));
        small.session.run();
        let before = ALLOCATIONS.get();
        small.session.run();
        small.session.run();
        assert_eq!(ALLOCATIONS.get() - before, 0);

        let plan = Plan::new(&small.step.tape, Options::default()).unwrap();
        let bytes = plan.len() * size_of::<f32>();
        LARGEST.set(0);
        let session = Session::<f32>::new(plan).unwrap();
        assert_eq!(session.bytes(), bytes);
        // The arena is mapped; what comes from the heap beside it is bookkeeping.
        assert!(LARGEST.get() < bytes / 100, "{} bytes", LARGEST.get());
    });
}

// ---------------------------------------------------------------------------------------------
// The optimizer

#[test]
fn adamw_clipping_and_decay_agree_with_pytorch() {
    let bytes = fs::read("tests/goldens/optim.safetensors").unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let golden = |name: &str| -> Vec<f32> {
        bytemuck::pod_collect_to_vec(golden.tensor(name).unwrap().data())
    };
    let mut tape = Tape::new();
    let shapes = [Shape::new(3, 1, 1, 5), Shape::per_channel(4)];
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let parameters = ["p", "q"].map(|n| tape.parameter(n, shapes[usize::from(n == "q")]));
    let gradients = ["g", "h"].map(|n| tape.input(n, shapes[usize::from(n == "h")]));
    let loss = tape.input("loss", Shape::SCALAR);
    let rule = |decay| Rule {
        decay,
        nonnegative: false,
    };
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.05,
        clip: 1.0,
        rules: vec![rule(true), rule(false)],
    };
    let norm = adamw
        .record(&mut tape, control, loss, &parameters, &gradients, None)
        .unwrap();
    tape.keep(norm);
    let mut session = Session::<f32>::new(Plan::new(&tape, Options::default()).unwrap()).unwrap();
    session.write(parameters[0], &golden("p0"));
    session.write(parameters[1], &golden("q0"));
    let mut clipped = 0;
    for step in 1..=6 {
        session.write(gradients[0], &golden(&format!("g{step}")));
        session.write(gradients[1], &golden(&format!("h{step}")));
        session.write(control, &[step as f32, 0.01 * step as f32, 0.0, 0.0]);
        session.run();
        clipped += usize::from(session.read(norm)[0] > 1.0);
        for (name, var) in ["p", "q"].iter().zip(parameters) {
            for (found, expected) in session
                .read(var)
                .iter()
                .zip(golden(&format!("{name}{step}")))
            {
                assert!(
                    (found - expected).abs() <= 1e-5,
                    "{name}{step}: {found} for {expected}"
                );
            }
        }
    }
    assert!(
        (1..6).contains(&clipped),
        "both sides of the limit are tried"
    );
}

/// To the bit: the arithmetic, its order, and that averages follow the updated parameter.
#[test]
fn one_pass_gives_the_bits_of_an_update_and_an_average_after_it() {
    let len = 40_001;
    let mut tape = Tape::new();
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let loss = tape.input("loss", Shape::SCALAR);
    let names = ["p", "q"];
    let parameters = names.map(|n| tape.parameter(n, Shape::per_channel(len)));
    let gradients = ["g", "h"].map(|n| tape.input(n, Shape::per_channel(len)));
    let statistic = tape.state("s", Shape::per_channel(3));
    let rules =
        [(true, false), (false, true)].map(|(decay, nonnegative)| Rule { decay, nonnegative });
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.05,
        clip: 1.0,
        rules: rules.to_vec(),
    };
    adamw
        .record(
            &mut tape,
            control,
            loss,
            &parameters,
            &gradients,
            Some(&[statistic]),
        )
        .unwrap();
    let mut session = Session::<f32>::new(Plan::new(&tape, Options::default()).unwrap()).unwrap();
    let noise = |seed: u64| -> Vec<f32> {
        let noise = Philox::new(seed, 0);
        let blocks = (0..len as u64).map(|i| noise.normal4(i)[0]);
        blocks.collect()
    };
    let state = |name: &str| tape.find(Kind::State, name).unwrap();
    let zeros = vec![0.0f32; len];
    let mut expected: Vec<[Vec<f32>; 4]> = (0..2)
        .map(|i| [noise(i), zeros.clone(), zeros.clone(), zeros.clone()])
        .collect();
    for (parameter, values) in parameters.iter().zip(&expected) {
        session.write(*parameter, &values[0]);
    }
    session.write(statistic, &[1.0, -2.0, 3.0]);
    let mut followed = [0.0f32; 3];
    let (rate, fresh) = (0.01f32, 1.0 - 0.99f32);
    for step in 1..=3 {
        let drawn = [noise(10 + step), noise(20 + step)];
        for (var, values) in gradients.iter().zip(&drawn) {
            session.write(*var, values);
        }
        session.write(control, &[step as f32, rate, 0.0, 0.99]);
        session.run();

        let squares = drawn.iter().flatten().map(|&g| f64::from(g) * f64::from(g));
        let clip = (1.0 / f64::from(squares.sum::<f64>().sqrt() as f32)) as f32;
        let (rate, t) = (f64::from(rate), step as f64);
        let size = (rate / (1.0 - 0.9f64.powf(t))) as f32;
        let correction = (1.0 - 0.999f64.powf(t)).sqrt() as f32;
        for ((values, rule), drawn) in expected.iter_mut().zip(rules).zip(&drawn) {
            let keep = if rule.decay {
                (1.0 - rate * 0.05) as f32
            } else {
                1.0
            };
            let [p, m, v, a] = values;
            for i in 0..len {
                let g = drawn[i] * clip;
                m[i] = 0.9f32 * m[i] + (1.0f64 - 0.9) as f32 * g;
                v[i] = 0.999f32 * v[i] + (1.0f64 - 0.999) as f32 * g * g;
                p[i] = p[i] * keep - size * m[i] / (v[i].sqrt() / correction + 1e-8);
                if rule.nonnegative {
                    p[i] = p[i].max(0.0);
                }
                a[i] += fresh * (p[i] - a[i]);
            }
        }
        for (a, s) in followed.iter_mut().zip([1.0, -2.0, 3.0]) {
            *a += fresh * (s - *a);
        }
        for (name, (values, parameter)) in names.iter().zip(expected.iter().zip(parameters)) {
            let moments = ["adam.first", "adam.second", "ema"];
            let vars = moments.map(|prefix| state(&format!("{prefix}.{name}")));
            for (var, values) in [&[parameter], &vars[..]].concat().into_iter().zip(values) {
                assert!(
                    session.read(var) == values,
                    "{}, step {step}",
                    tape.name(var)
                );
            }
        }
        assert_eq!(session.read(state("ema.s")), followed);
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let mut tape = Tape::new();
    let shape = Shape::per_channel(3);
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let parameter = tape.parameter("p", shape);
    let gradient = tape.input("g", shape);
    let loss = tape.input("loss", Shape::SCALAR);
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        clip: 1.0,
        rules: vec![Rule {
            decay: true,
            nonnegative: true,
        }],
    };
    adamw
        .record(
            &mut tape,
            control,
            loss,
            &[parameter],
            &[gradient],
            Some(&[]),
        )
        .unwrap();
    let mut session = Session::<f64>::new(Plan::new(&tape, Options::default()).unwrap()).unwrap();
    session.write(control, &[1.0, 0.1, 0.0, 0.5]);
    session.write(parameter, &[1.0, 2.0, 0.05]);
    let state = |session: &Session<f64>| -> Vec<f64> {
        [Kind::Parameter, Kind::State]
            .into_iter()
            .flat_map(|kind| tape.of_kind(kind))
            .flat_map(|v| session.read(v).to_vec())
            .collect()
    };
    session.write(gradient, &[0.1, -0.1, 0.3]);
    session.run();
    let before = state(&session);
    assert_eq!(before[2], 0.0, "projected");
    assert!(before.iter().all(|x| x.is_finite()));
    for bad in [f64::NAN, f64::INFINITY] {
        session.write(gradient, &[0.1, bad, 0.3]);
        session.run();
        assert_eq!(state(&session), before);
        // A loss that is not finite can have a gradient that is.
        session.write(gradient, &[0.1, -0.1, 0.3]);
        session.write(loss, &[bad]);
        session.run();
        assert_eq!(state(&session), before);
        session.write(loss, &[0.0]);
    }
    session.write(gradient, &[0.1, -0.1, 0.3]);
    session.run();
    assert_ne!(state(&session), before);
}

// ---------------------------------------------------------------------------------------------
// The whole model

/// A small network with all terms of the loss.
fn config(settings: &[(&str, &str)]) -> Config {
    let mut all = vec![
        ("size", "16"),
        ("batch", "4"),
        ("model.widths", "[3, 5]"),
        ("epochs", "4"),
        ("folds", "3"),
        ("loss.ramp_start", "0"),
        ("loss.ramp_epochs", "1"),
        ("early_stopping.patience", "0"),
    ];
    all.extend(settings);
    Config::preset(Preset::Tiny).with(&owned(&all)).unwrap()
}

fn owned(settings: &[(&str, &str)]) -> Vec<(String, String)> {
    settings
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect()
}

const PRIOR: Prior = Prior {
    weights: [0.1, 0.3, 1.2, 0.4],
    bias: -0.4,
    mean: [0.2, -0.3, 0.05, 0.8],
    sd: [0.1, 0.3, 0.05, 0.1],
};

/// A training step with a batch in place.
struct Small<T> {
    step: TrainingStep,
    session: Session<T>,
}

impl<T: Element> Small<T> {
    fn new(config: &Config) -> Self {
        let step = TrainingStep::record(config, true).unwrap();
        Self::with(step, config)
    }

    fn with(step: TrainingStep, config: &Config) -> Self {
        let mut session = step.session::<T>(config.seed, Some(&PRIOR)).unwrap();
        let (size, n) = (config.size, config.batch);
        let pixels = size * size;
        // Blobs of several sizes over a texture.
        let inside = |i: usize| {
            let (image, x, y) = (i / pixels, i % size, i / size % size);
            let (dx, dy) = (
                x as f64 - 7.5,
                (y as f64 - 7.5) * (1.0 + 0.3 * image as f64),
            );
            dx.hypot(dy) < 4.0 + image as f64 * 0.7
        };
        let texture = |i: usize| ((i * 2_654_435_761) % 1009) as f64 / 1009.0;
        let set = |session: &mut Session<T>, var, f: &dyn Fn(usize) -> f64| {
            let values = session.values_mut(var).iter_mut();
            values.enumerate().for_each(|(i, v)| *v = T::of(f(i)));
        };
        let mask = |i| f64::from(u8::from(inside(i)));
        set(&mut session, step.images, &|i| {
            0.3 * texture(i) + 0.5 * (1.0 - mask(i))
        });
        set(&mut session, step.targets.masks, &mask);
        set(&mut session, step.targets.labels, &|i| (i % 2) as f64);
        // The last image is padding.
        let weight = |i: usize| f64::from(u8::from(i + 1 < n));
        set(&mut session, step.targets.weights, &weight);
        set(&mut session, step.targets.class_weights, &|i| {
            weight(i) * (0.7 + 0.6 * (i % 2) as f64)
        });
        let control = [1.0, 1e-2, 0.8, 0.5];
        set(&mut session, step.targets.control, &|i| control[i]);
        Self { step, session }
    }
}

/// The optimizer's first moments after one step from zero are `(1 − β₁)·g`: the gradient that it
/// follows is the one that is checked. With a learning rate of 0 the parameters stay where they are.
///
/// Two things in the loss are no plain function of the parameters. The confidences `c` are constants to the
/// gradient, so the differences hold them at their values in the centre. ReLU and max pooling have
/// kinks: a difference is compared only if no ReLU changes sides and no maximum changes places between its
/// points, which is exact where it holds; few are lost to it.
#[test]
fn the_gradient_of_the_whole_model_agrees_with_finite_differences() {
    let config = config(&[("optimizer.clip", "0"), ("optimizer.beta1", "0.5")]);
    let mut step = TrainingStep::record(&config, true).unwrap();
    let named = |name: &str| -> Vec<_> {
        let steps = step.tape.steps().iter();
        steps
            .filter(|s| s.origin.is_none() && s.op.name() == name)
            .cloned()
            .collect()
    };
    let relus: Vec<Var> = named("normalize").iter().map(|s| s.outputs[0]).collect();
    let pools: Vec<Var> = named("max_pool2d").iter().map(|s| s.inputs[0]).collect();
    let tie = named("multitask_loss")[0].inputs.clone();
    assert_eq!((relus.len(), pools.len()), (6, 1));
    let (moments, perimeter, logit) = (tie[2], tie[3], tie[5]);
    relus
        .iter()
        .chain(&pools)
        .chain(&[moments, perimeter, logit])
        .for_each(|&v| step.tape.keep(v));
    // Confidence, p̂ and φ of each measurable image.
    let place = step.prior.unwrap();
    let lesions = move |session: &Session<f64>| -> Vec<Option<[f64; 3]>> {
        let array = |var: Var| std::array::from_fn(|k| session.read(var)[k]);
        let prior = Prior {
            weights: array(place.weight),
            bias: session.read(place.bias)[0],
            mean: array(place.mean),
            sd: array(place.sd),
        };
        let moments = session.read(moments).chunks_exact(Moments::COUNT);
        let images = moments
            .zip(session.read(perimeter))
            .zip(session.read(logit));
        images
            .map(|((moments, &perimeter), l)| {
                let sums = MaskSums {
                    moments: bytemuck::pod_read_unaligned(bytemuck::cast_slice(moments)),
                    perimeter,
                };
                let phi = prior.phi(&sums.features()?);
                Some([sums.confidence(), 1.0 / (1.0 + (-l).exp()), phi])
            })
            .collect()
    };

    let mut small = Small::<f64>::with(step, &config);
    small.session.values_mut(small.step.targets.control)[control::LEARNING_RATE] = 0.0;
    // A random mask is undecided or empty; this one has the shapes that consistency is about.
    let head = small
        .step
        .tape
        .find(Kind::Parameter, "mask.weight")
        .unwrap();
    small.session.write(head, &[1.5, -2.0, 1.0]);
    let parameters: Vec<Var> = small.step.tape.of_kind(Kind::Parameter).collect();
    small.session.run();
    let Small { step, mut session } = small;
    let gradients: Vec<Vec<f64>> = parameters
        .iter()
        .map(|&v| {
            let name = format!("adam.first.{}", step.tape.name(v));
            let moment = step.tape.find(Kind::State, &name).unwrap();
            session.read(moment).iter().map(|m| m / 0.5).collect()
        })
        .collect();
    let frozen = lesions(&session);
    let counted = frozen[..3].iter().flatten().count() as f64;
    assert!(
        frozen[..3].iter().flatten().any(|lesion| lesion[0] > 0.01),
        "{frozen:?}"
    );

    let consistency = step.terms.consistency.unwrap();
    let loss = |session: &mut Session<f64>| -> (f64, Vec<bool>) {
        session.run();
        let mut term = 0.0;
        for (frozen, lesion) in frozen[..3].iter().zip(lesions(session)) {
            if let (Some([confidence, ..]), Some([_, p, phi])) = (frozen, lesion) {
                term += 0.8 * confidence * (p - phi).powi(2);
            }
        }
        let replaced = term / counted - session.read(consistency)[0];
        let loss = session.read(step.terms.total)[0] + config.loss.consistency * replaced;
        let mut pattern = Vec::new();
        for &v in &relus {
            pattern.extend(session.read(v).iter().map(|&y| y > 0.0));
        }
        for &v in &pools {
            pattern.extend(maxima(session.read(v), step.tape.shape(v)));
        }
        (loss, pattern)
    };

    let mut compared = 0;
    let mut lost = 0;
    for (&var, gradient) in parameters.iter().zip(&gradients) {
        let largest = gradient.iter().fold(0.0f64, |m, g| m.max(g.abs()));
        let probes = [0, gradient.len() / 3, gradient.len() - 1];
        for (k, &element) in probes.iter().enumerate() {
            if probes[..k].contains(&element) {
                continue;
            }
            let centre = session.read(var)[element];
            let h = 1e-5;
            let points = [-2.0, -1.0, 1.0, 2.0].map(|k| {
                session.values_mut(var)[element] = centre + k * h;
                loss(&mut session)
            });
            session.values_mut(var)[element] = centre;
            if points.iter().any(|point| point.1 != points[0].1) {
                lost += 1;
                continue;
            }
            let [a, b, c, d] = points.map(|point| point.0);
            let numeric = (8.0 * (c - b) - (d - a)) / (12.0 * h);
            let analytic = gradient[element];
            let scale = analytic.abs().max(numeric.abs()).max(1e-3 * largest);
            assert!(
                (analytic - numeric).abs() <= 1e-6 * scale.max(1e-6),
                "{}[{element}]: {analytic} for {numeric}",
                step.tape.name(var)
            );
            compared += 1;
        }
    }
    assert!(
        compared >= 40 && lost * 4 <= compared,
        "{compared} compared, {lost} lost"
    );
}

/// For each 2×2 window and channel, whether each of its first three elements is the largest.
fn maxima(x: &[f64], shape: Shape) -> Vec<bool> {
    let at = |n: usize, y: usize, column: usize, c: usize| {
        x[((n * shape.h + y) * shape.w + column) * shape.c + c]
    };
    let mut found = Vec::new();
    for n in 0..shape.n {
        for (y, column) in (0..shape.h / 2).flat_map(|y| (0..shape.w / 2).map(move |x| (y, x))) {
            for c in 0..shape.c {
                let window = [(0, 0), (0, 1), (1, 0), (1, 1)]
                    .map(|(dy, dx)| at(n, 2 * y + dy, 2 * column + dx, c));
                let largest = window.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                // Ties between zeros of the ReLU before are no kink: all of them stay zero.
                found.extend(window[..3].iter().map(|&v| v == largest && largest > 0.0));
            }
        }
    }
    found
}

#[test]
fn the_padding_of_a_short_batch_counts_in_no_loss() {
    let config = config(&[]);
    let mut small = Small::<f64>::new(&config);
    let terms: Vec<Var> = small.step.terms.each().into_iter().flatten().collect();
    assert_eq!(terms.len(), 5);
    small.session.run();
    let read = |small: &Small<f64>| -> Vec<f64> {
        terms.iter().map(|&v| small.session.read(v)[0]).collect()
    };
    let before = read(&small);
    let mut small = Small::<f64>::new(&config);
    let last = small.session.values_mut(small.step.targets.masks);
    let pixels = last.len() / 4;
    last[3 * pixels..].iter_mut().for_each(|g| *g = 1.0 - *g);
    small.session.values_mut(small.step.targets.labels)[3] = 0.0;
    small.session.run();
    assert_eq!(read(&small), before);
    // It does take part in batch statistics, as a real image.
    let mut small = Small::<f64>::new(&config);
    small.session.values_mut(small.step.images)[3 * pixels..].fill(0.0);
    small.session.run();
    assert_ne!(read(&small), before);
}

#[test]
fn arms_start_from_equal_weights() {
    let weights = |arm: &str, seed: &str| {
        let config = config(&[("arm", arm), ("seed", seed)]);
        let prior = config.arm != Arm::Classification;
        let step = TrainingStep::record(&config, prior).unwrap();
        let session = step.session::<f32>(config.seed, Some(&PRIOR)).unwrap();
        let find = |name: &str| step.tape.find(Kind::Parameter, name);
        let read = |name: &str| find(name).map(|v| session.read(v).to_vec());
        ["encoder.1.conv2.weight", "mask.weight", "malignancy.weight"].map(read)
    };
    let both = weights("consistency", "1");
    assert_eq!(weights("multitask", "1"), both);
    assert_eq!(
        weights("segmentation", "1"),
        [both[0].clone(), both[1].clone(), None]
    );
    assert_eq!(
        weights("classification", "1"),
        [both[0].clone(), None, both[2].clone()]
    );
    assert_ne!(weights("consistency", "2")[0], both[0]);
    // He: variance 2 / fan-in.
    let first = both[0].as_ref().unwrap();
    let variance = first.iter().map(|w| w * w).sum::<f32>() / first.len() as f32;
    assert!((variance * 45.0 / 2.0 - 1.0).abs() < 0.35, "{variance}");
}

/// Ablations of the method: what each changes in the first step, and that it changes nothing else.
#[test]
fn what_is_left_out_of_the_consistency_term_has_no_effect() {
    let step = |settings: &[(&str, &str)]| {
        // Clipping would scale every gradient by the norm of all.
        let config = config(&[&[("optimizer.clip", "0")][..], settings].concat());
        let mut small = Small::<f64>::new(&config);
        // A random mask is undecided or empty; this one has shapes.
        let head = small
            .step
            .tape
            .find(Kind::Parameter, "mask.weight")
            .unwrap();
        small.session.write(head, &[1.5, -2.0, 1.0]);
        small.session.run();
        let consistency = small.step.terms.consistency.unwrap();
        let read = |name: &str| -> Vec<f64> {
            let var = small.step.tape.find(Kind::State, name).unwrap();
            small.session.read(var).to_vec()
        };
        (
            small.session.read(consistency)[0],
            read("adam.first.prior.weight"),
            read("adam.first.encoder.0.conv1.weight"),
        )
    };
    let whole = step(&[]);
    let unweighted = step(&[("loss.confidence", "false")]);
    // Confidences are below 1.
    assert!(unweighted.0 > whole.0, "{} {}", unweighted.0, whole.0);
    let blunt = step(&[("loss.kappa", "1")]);
    assert_ne!(blunt.0, whole.0);
    assert!(whole.1.iter().all(|&d| d != 0.0));
    for stop in ["classifier", "mask"] {
        let stopped = step(&[("loss.stop_gradient", stop)]);
        assert_eq!(stopped.0, whole.0);
        assert_eq!(stopped.1, whole.1, "the prior learns all the same");
        assert_ne!(stopped.2, whole.2);
    }
}

#[test]
fn the_prior_learns_only_in_its_arm_and_never_decays() {
    let names = |settings: &[(&str, &str)]| -> Vec<String> {
        let step = TrainingStep::record(&config(settings), true).unwrap();
        let tape = &step.tape;
        let names = tape
            .of_kind(Kind::Parameter)
            .map(|v| tape.name(v).to_owned());
        names.filter(|n| n.starts_with("prior")).collect()
    };
    assert_eq!(names(&[]), ["prior.weight", "prior.bias"]);
    assert!(names(&[("prior.frozen", "true")]).is_empty());
    assert!(names(&[("arm", "multitask")]).is_empty());

    let config = config(&[("optimizer.weight_decay", "0.5")]);
    let step = TrainingStep::record(&config, true).unwrap();
    let update = step
        .tape
        .steps()
        .iter()
        .find(|s| s.op.name() == "adamw")
        .unwrap();
    let count = step.tape.of_kind(Kind::Parameter).count();
    // What decays shows in a step without a gradient of its own.
    let text = format!("{:?}", update.op);
    let decaying = text.matches("decay: true").count();
    // Six 3×3 convolutions, the mask's and the malignancy's weights.
    assert_eq!(
        (decaying, text.matches("decay: false").count()),
        (8, count - 8)
    );
    assert_eq!(text.matches("nonnegative: true").count(), 1);
}

// ---------------------------------------------------------------------------------------------
// Runs

/// Twelve images with bright (malignant) or dark (benign) blobs, as `folder:` reads them.
fn data(folder: &Path) -> String {
    use echograd::data::image::{Gray, write_png};
    let (width, height) = (40, 32);
    for sub in ["images", "masks"] {
        fs::create_dir_all(folder.join(sub)).unwrap();
    }
    let mut labels = "image,label,pixel_mm\n".to_owned();
    for i in 0..14usize {
        let malignant = i % 2 == 0;
        let normal = i >= 12;
        let mut image = Gray::zeros(width, height);
        let mut mask = Gray::zeros(width, height);
        for y in 0..height {
            for x in 0..width {
                let (dx, dy) = (
                    x as f64 - 15.0 - (i % 5) as f64,
                    y as f64 - 14.0 - (i % 3) as f64,
                );
                let angle = dy.atan2(dx);
                let wave = if malignant {
                    0.3 * (5.0 * angle).cos()
                } else {
                    0.0
                };
                let inside = !normal && dx.hypot(dy * 1.3) < 9.0 * (1.0 + wave) + (i % 4) as f64;
                let noise = (x * 7919 + y * 104_729 + i * 1_299_709) % 61;
                let level = if inside { 40 } else { 150 };
                image.pixels[y * width + x] = (level + noise) as u8;
                mask.pixels[y * width + x] = if inside { 255 } else { 0 };
            }
        }
        let name = format!("{i:02}.png");
        write_png(&folder.join("images").join(&name), &image).unwrap();
        write_png(&folder.join("masks").join(&name), &mask).unwrap();
        let label = match (normal, malignant) {
            (true, _) => "normal",
            (_, true) => "malignant",
            _ => "benign",
        };
        labels += &format!("{name},{label},0.1\n");
    }
    fs::write(folder.join("labels.csv"), labels).unwrap();
    format!("folder:{}", folder.display())
}

fn settings(data: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut all = vec![
        ("preset", "tiny"),
        ("data", data),
        ("size", "16"),
        ("batch", "4"),
        ("model.widths", "[3, 5]"),
        ("epochs", "4"),
        ("folds", "3"),
    ];
    all.extend(more);
    owned(&all)
}

fn run(out: &Path, settings: &[(String, String)], resume: bool) -> Result<Trained> {
    run_until(out, settings, resume, u64::MAX)
}

/// Interrupted after a number of steps.
fn run_until(
    out: &Path,
    settings: &[(String, String)],
    resume: bool,
    steps: u64,
) -> Result<Trained> {
    struct Until<'a>(&'a AtomicBool, u64);
    impl Report for Until<'_> {
        fn progress(&self, what: &str, done: u64, _: u64, _: &str) {
            if what == "training" && done >= self.1 {
                self.0.store(true, Ordering::SeqCst);
            }
        }
    }
    let interrupt = AtomicBool::new(false);
    let args = TrainArgs {
        out,
        config: None,
        settings,
        resume,
    };
    train(&args, &Until(&interrupt, steps), &interrupt)
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("this must fail").to_string()
}

/// What a run leaves behind: its checkpoints, and its metrics less the last two columns, the seconds.
fn traces(run: &Path) -> (Vec<u8>, Vec<u8>, Vec<String>) {
    let csv = fs::read_to_string(run.join("metrics.csv")).unwrap();
    let rows = csv
        .lines()
        .map(|line| line.rsplitn(3, ',').last().unwrap().to_owned());
    let read = |name: &str| fs::read(run.join(name)).unwrap();
    (
        read("last.safetensors"),
        read("best.safetensors"),
        rows.collect(),
    )
}

#[test]
fn a_run_has_the_same_bits_on_one_two_and_three_threads() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let found = [1, 2, 3].map(|threads| {
        let out = folder.path().join(threads.to_string());
        let settings = settings(&data, &[("workers", &threads.to_string())]);
        on_threads(threads, || run(&out, &settings, false)).unwrap();
        let checkpoint = Checkpoint::read(&out.join("last.safetensors")).unwrap();
        let names = ["encoder.0.conv1.weight", "ema.mask.weight", "prior.weight"];
        let tensors = names.map(|n| checkpoint.tensor(n).unwrap().data().to_vec());
        (tensors, traces(&out).2)
    });
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0], found[2]);
    assert_eq!(found[0].1.len(), 5);
}

#[test]
fn an_interrupted_run_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let settings = settings(&data, &[]);
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let trained = run(&whole, &settings, false).unwrap();
    assert_eq!(trained.epochs, 4);

    // Two steps an epoch: stopped within the first, after the second, within the third.
    let mut resume = false;
    for steps in [1, 4, 5] {
        let stopped = run_until(&parts, if resume { &[] } else { &settings }, resume, steps);
        assert!(matches!(stopped, Err(Error::Interrupted)));
        resume = true;
    }
    let position = Checkpoint::read(&parts.join("last.safetensors"))
        .unwrap()
        .position;
    assert_eq!((position.epoch, position.step), (2, 1));
    let resumed = run(&parts, &[], true).unwrap();
    assert_eq!(
        (resumed.best, resumed.best_epoch),
        (trained.best, trained.best_epoch)
    );
    assert!(traces(&parts) == traces(&whole), "the files differ");

    // A finished run resumes to itself.
    run(&parts, &[], true).unwrap();
    assert!(traces(&parts) == traces(&whole), "the files differ");
}

#[test]
fn masks_and_labels_that_changed_are_noticed_before_going_on() {
    use echograd::data::image::{read_mask, write_png};
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let at = |name: &str| folder.path().join("data").join(name);
    let out = folder.path().join("run");
    let stopped = run_until(&out, &settings(&data, &[]), false, 1);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    let last = fs::read(out.join("last.safetensors")).unwrap();
    let refused = |name: &str, bytes: &[u8], expected: &str| {
        let before = fs::read(at(name)).unwrap();
        fs::write(at(name), bytes).unwrap();
        let text = message(run(&out, &[], true));
        let expected = format!("expected the images that the run began with, found {expected}");
        assert!(text.ends_with(&expected), "{text}");
        fs::write(at(name), before).unwrap();
    };
    let mut mask = read_mask(&at("masks/05.png")).unwrap();
    mask.pixels[0] = 255 - mask.pixels[0];
    let other = folder.path().join("other.png");
    write_png(&other, &mask).unwrap();
    let other = fs::read(&other).unwrap();
    refused("masks/05.png", &other, "05.png with another mask");
    let labels = fs::read_to_string(at("labels.csv")).unwrap();
    let relabelled = labels.replace("05.png,benign", "05.png,malignant");
    refused(
        "labels.csv",
        relabelled.as_bytes(),
        "05.png with another label",
    );
    let image = fs::read(at("images/06.png")).unwrap();
    refused("images/05.png", &image, "05.png with other bytes");
    assert!(fs::read(out.join("last.safetensors")).unwrap() == last);

    // A manifest of an earlier version does not know them.
    let path = out.join("manifest.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for part in ["train", "validation"] {
        for sample in manifest[part].as_array_mut().unwrap() {
            let sample = sample.as_object_mut().unwrap();
            assert!(sample.remove("label").is_some() && sample.remove("mask_sha256").is_some());
            assert_eq!(sample.keys().collect::<Vec<_>>(), ["image", "sha256"]);
        }
    }
    fs::write(&path, manifest.to_string()).unwrap();
    fs::write(at("masks/05.png"), other).unwrap();
    run(&out, &[], true).unwrap();
}

/// Where the child of the next test is told what to do.
const CHILD: &str = "ECHOGRAD_TEST_RUN";

/// Trains in the folder that the environment names, from where it stands.
#[test]
#[ignore = "the process that the next test kills"]
fn child_that_is_killed() {
    let folder = PathBuf::from(std::env::var_os(CHILD).expect("started by the next test"));
    let out = folder.join("killed");
    let resume = out.join("config.toml").exists();
    let settings = settings(&format!("folder:{}/data", folder.display()), &[]);
    run(&out, if resume { &[] } else { &settings }, resume).unwrap();
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let whole = folder.path().join("whole");
    run(&whole, &settings(&data, &[]), false).unwrap();

    let mut kills = 0;
    for attempt in 1u64.. {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_is_killed", "--ignored"])
            .env(CHILD, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Later and later, at odd moments, so that it is hit everywhere and ends some time.
        let mut left = attempt * 5 + attempt * 7919 % 13;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if left == 0 {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                break None;
            }
            left -= 1;
            std::thread::sleep(Duration::from_millis(1));
        };
        if let Some(status) = status {
            assert!(status.success(), "attempt {attempt}: {status}");
            break;
        }
    }
    assert!(kills > 0);
    assert!(
        traces(&folder.path().join("killed")) == traces(&whole),
        "the files differ"
    );
}

/// A kill between the two checkpoints of the best epoch, of which the latter cannot be written here.
#[test]
fn a_best_checkpoint_that_is_missing_is_had_from_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let settings = settings(&data, &[]);
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    run(&whole, &settings, false).unwrap();

    let interrupted = run_until(&parts, &settings, false, 1);
    assert!(matches!(interrupted, Err(Error::Interrupted)));
    let [best, last] = ["best.safetensors", "last.safetensors"].map(|name| parts.join(name));
    fs::create_dir(&best).unwrap();
    let text = message(run(&parts, &[], true));
    assert!(
        text.contains("best.safetensors: cannot be written"),
        "{text}"
    );
    let Position {
        epoch, best_epoch, ..
    } = Checkpoint::read(&last).unwrap().position;
    assert!(epoch > 0 && epoch == best_epoch, "{epoch}, {best_epoch}");
    fs::remove_dir(&best).unwrap();
    let before = fs::read(&last).unwrap();
    // A step further.
    let _ = run_until(&parts, &[], true, 2 * epoch + 1);
    assert!(fs::read(&best).unwrap() == before);
    run(&parts, &[], true).unwrap();
    assert!(traces(&parts) == traces(&whole), "the files differ");
}

#[test]
fn every_arm_trains_evaluates_and_predicts() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    for arm in ["segmentation", "classification", "multitask", "consistency"] {
        let out = folder.path().join(arm);
        let trained = run(
            &out,
            &settings(&data, &[("arm", arm), ("epochs", "2")]),
            false,
        )
        .unwrap();
        let (segments, classifies) = (arm != "classification", arm != "segmentation");
        assert_eq!(trained.validation.segmentation.is_some(), segments, "{arm}");
        assert_eq!(
            trained.validation.classification.is_some(),
            classifies,
            "{arm}"
        );

        // The images that the run was trained on are left out: 4 of 12 lesions and 2 normals stay.
        let results = out.join("evaluation");
        let args = EvaluateArgs {
            runs: std::slice::from_ref(&out),
            data: &data,
            out: &results,
            drop_duplicates: false,
            include_training: false,
            device: Device::Cpu,
        };
        let no = AtomicBool::new(false);
        let evaluated = evaluate(&args, &(), &no).unwrap();
        assert_eq!(
            (evaluated.trained_on, evaluated.rows.len()),
            (8, 6),
            "{arm}"
        );
        assert_eq!(
            evaluated.metrics.segmentation,
            trained.validation.segmentation
        );
        assert_eq!(
            evaluated.metrics.normals.map(|n| n.n),
            segments.then_some(2)
        );
        let all = EvaluateArgs {
            include_training: true,
            ..args
        };
        assert_eq!(evaluate(&all, &(), &no).unwrap().rows.len(), 14);
        let csv = fs::read_to_string(results.join("per_image.csv")).unwrap();
        assert_eq!(csv.lines().count(), 15);

        let files = [folder.path().join("data/images/00.png")];
        let out = out.join("predictions");
        let args = PredictArgs {
            runs: &[folder.path().join(arm)],
            files: &files,
            out: &out,
            device: Device::Cpu,
        };
        let predictions = predict(&args, &(), &no).unwrap();
        assert_eq!(predictions[0].p.is_some(), classifies);
        assert_eq!(predictions[0].mask.is_some(), segments);
        if segments {
            let mask = echograd::data::image::read_mask(&out.join("00_mask.png")).unwrap();
            assert_eq!((mask.width, mask.height), (40, 32));
            let area = mask.pixels.iter().filter(|&&v| v > 0).count();
            assert_eq!(predictions[0].area_px, Some(area));
            assert!(out.join("00_overlay.png").is_file());
        }
        let json = fs::read_to_string(out.join("predictions.json")).unwrap();
        assert!(json.contains("\"irregularity\""));
    }
}

#[test]
fn flips_and_ensembles_average_before_the_threshold() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let make = |name: &str, more: &[(&str, &str)]| {
        let out = folder.path().join(name);
        let more = [&[("epochs", "2")], more].concat();
        run(&out, &settings(&data, &more), false).unwrap();
        out
    };
    let a = make("a", &[]);
    let b = make("b", &[("fold", "1"), ("seed", "1")]);
    let flip = make("flip", &[("test_flip", "true")]);

    // Flips have no part in training.
    let read = |run: &Path| Checkpoint::read(&run.join("best.safetensors")).unwrap();
    let (plain, mut flipped) = (read(&a), read(&flip));
    assert!(flipped.config.test_flip && !plain.config.test_flip);
    flipped.config = plain.config.clone();
    assert!(plain == flipped, "the weights differ");

    const SIZE: usize = 16;
    let mirrored = |map: &[f32]| -> Vec<f32> {
        let rows = map.chunks_exact(SIZE);
        rows.flat_map(|row| row.iter().rev().copied()).collect()
    };
    let image: Vec<u8> = (0..SIZE * SIZE).map(|i| (i * 7919 % 251) as u8).collect();
    let rows = image.chunks_exact(SIZE);
    let mirror: Vec<u8> = rows.flat_map(|row| row.iter().rev().copied()).collect();
    let say = |model: &mut Model, image: &[u8]| model.infer(&[image]).unwrap().remove(0);
    let alone = |run: &Path, image: &[u8]| {
        let mut model = Model::open(run, Device::Cpu, 1).unwrap();
        let said = say(&mut model, image);
        (said.logits.unwrap(), said.p.unwrap())
    };
    let sigmoid = |z: f32| 1.0 / (1.0 + (-f64::from(z)).exp());
    let check = |found: &[f32], [one, two]: [&[f32]; 2]| {
        for ((z, one), two) in found.iter().zip(one).zip(two) {
            let expected = (sigmoid(*one) + sigmoid(*two)) / 2.0;
            assert!((sigmoid(*z) - expected).abs() < 1e-7);
        }
        assert_eq!(found.len(), SIZE * SIZE);
    };
    let (of_image, p) = alone(&a, &image);
    let (of_mirror, p_mirror) = alone(&a, &mirror);
    assert_ne!(of_image, mirrored(&of_mirror));
    let (both, p_both) = alone(&flip, &image);
    check(&both, [&of_image, &mirrored(&of_mirror)]);
    assert_eq!(p_both, (p + p_mirror) / 2.0);
    // A mirror image has the mirror image of a lesion, and the same diagnosis.
    let (back, p_back) = alone(&flip, &mirror);
    assert!(mirrored(&back) == both && p_back == p_both);

    let mut one = Model::ensemble(&[&a], Device::Cpu, 1).unwrap();
    let said = say(&mut one, &image);
    assert_eq!(said.logits.as_ref(), Some(&of_image));
    assert_eq!(said.disagreement, Default::default());
    let mut ensemble = Model::ensemble(&[&a, &b], Device::Cpu, usize::MAX).unwrap();
    let (of_other, p_other) = alone(&b, &image);
    let said = say(&mut ensemble, &image);
    check(said.logits.as_ref().unwrap(), [&of_image, &of_other]);
    assert_eq!(said.p, Some((p + p_other) / 2.0));
    let sd = (p - p_other).abs() / f64::sqrt(2.0);
    assert!((said.disagreement.p_sd.unwrap() - sd).abs() < 1e-12);
    let inside = |map: &[f32]| map.iter().map(|&z| z >= 0.0).collect::<Vec<_>>();
    let (x, y) = (inside(&of_image), inside(&of_other));
    let both = x.iter().zip(&y).filter(|(x, y)| **x && **y).count();
    let areas = x.iter().chain(&y).filter(|inside| **inside).count();
    let dice = 2.0 * both as f64 / areas as f64;
    assert!((said.disagreement.mask_agreement.unwrap() - dice).abs() < 1e-12);
    // The averaged mask has the mean of what the networks' priors make of it.
    let letterbox = echograd::data::letterbox::Letterbox::new(40, 32, SIZE);
    let phi = |run: &Path| {
        let model = Model::open(run, Device::Cpu, 1).unwrap();
        model.finding(&said, &letterbox).phi.unwrap()
    };
    let found = ensemble.finding(&said, &letterbox).phi.unwrap();
    assert!((found - (phi(&a) + phi(&b)) / 2.0).abs() < 1e-12);

    let refused = |runs: &[&Path]| message(Model::ensemble(runs, Device::Cpu, 1).map(drop));
    assert!(refused(&[]).contains("expected a run, found none"));
    let text = refused(&[&a, &flip]);
    assert!(text.contains("flip: expected test_flip = false"), "{text}");
}

#[test]
fn several_runs_are_tested_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let make = |name: &str, more: &[(&str, &str)]| -> PathBuf {
        let out = folder.path().join(name);
        let more = [&[("epochs", "2")], more].concat();
        run(&out, &settings(&data, &more), false).unwrap();
        out
    };
    let runs = [make("a", &[]), make("b", &[("fold", "1"), ("seed", "1")])];
    let no = AtomicBool::new(false);
    let test = |runs: &[PathBuf], name: &str, include_training: bool| {
        let args = EvaluateArgs {
            runs,
            data: &data,
            out: &folder.path().join(name),
            drop_duplicates: false,
            include_training,
            device: Device::Cpu,
        };
        evaluate(&args, &(), &no)
    };
    let both = test(&runs, "both", true).unwrap().rows;
    let alone = runs.each_ref().map(|run| {
        let name = format!("{}-alone", run.display());
        test(std::slice::from_ref(run), &name, true).unwrap().rows
    });
    for ((both, a), b) in both.iter().zip(&alone[0]).zip(&alone[1]) {
        let (p, q) = (a.p.unwrap(), b.p.unwrap());
        assert_eq!(both.p, Some((p + q) / 2.0));
        let sd = (p - q).abs() / f64::sqrt(2.0);
        assert!((both.disagreement.p_sd.unwrap() - sd).abs() < 1e-12);
        assert!(a.disagreement.is_none() && b.disagreement.is_none());
    }
    // Apart they are told of in the file of both, and in no other.
    let header = |of: &Path| {
        let text = fs::read_to_string(of.join("per_image.csv")).unwrap();
        text.lines().next().unwrap().to_owned()
    };
    let of_one = header(&folder.path().join("a-alone"));
    assert!(of_one.ends_with(",margin,roundness"));
    assert_eq!(
        header(&folder.path().join("both")),
        of_one + ",p_sd,mask_agreement"
    );
    // Each lesion is one that a run was trained on; the two normals are not.
    let unseen = test(&runs, "unseen", false).unwrap();
    assert_eq!((unseen.trained_on, unseen.rows.len()), (12, 2));

    let files = [folder.path().join("data/images/00.png")];
    let look = |runs: &[PathBuf], name: &str| {
        let out = folder.path().join(name);
        let args = PredictArgs {
            runs,
            files: &files,
            out: &out,
            device: Device::Cpu,
        };
        let found = predict(&args, &(), &no).unwrap().remove(0);
        let text = fs::read(out.join("predictions.json")).unwrap();
        (
            found,
            serde_json::from_slice::<serde_json::Value>(&text).unwrap()[0].clone(),
        )
    };
    let (found, file) = look(&runs, "predictions");
    assert_eq!(
        (found.p, found.disagreement),
        (both[0].p, both[0].disagreement)
    );
    assert_eq!(file["p_sd"].as_f64(), both[0].disagreement.p_sd);
    assert_eq!(
        file["mask_agreement"].as_f64(),
        both[0].disagreement.mask_agreement
    );
    let (_, file) = look(&runs[..1], "prediction");
    let keys = file.as_object().unwrap();
    assert!(keys.len() == 10 && !keys.contains_key("p_sd"), "{file}");

    let refused = |other: PathBuf, expected: &str| {
        let text = message(test(&[runs[0].clone(), other], "refused", true));
        assert!(text.contains(expected), "{text}");
    };
    refused(
        make("large", &[("size", "32")]),
        "large: expected size = 16, as ",
    );
    refused(
        make("mask", &[("arm", "segmentation")]),
        "mask: expected arm = \"consistency\", as ",
    );
    refused(
        runs[0].join("../a"),
        "expected runs that differ, found this one twice",
    );
    refused(
        folder.path().join("data"),
        "expected the folder of a run, found no config.toml in it",
    );
    assert!(!folder.path().join("refused").exists());
}

#[test]
fn a_run_can_start_from_another_ones_weights() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let first = folder.path().join("first");
    run(
        &first,
        &settings(&data, &[("arm", "segmentation"), ("epochs", "1")]),
        false,
    )
    .unwrap();
    let init = first.join("best.safetensors").display().to_string();
    let more = [
        ("init", init.as_str()),
        ("epochs", "1"),
        ("optimizer.learning_rate", "0"),
    ];
    let second = folder.path().join("second");
    run(&second, &settings(&data, &more), false).unwrap();
    let read = |run: &Path| Checkpoint::read(&run.join("best.safetensors")).unwrap();
    let (first, second) = (read(&first), read(&second));
    let name = "encoder.1.conv2.weight";
    assert_eq!(second.tensor(name), first.tensor(&format!("ema.{name}")));

    // The prior is that of the run's own fold.
    let [own, afresh] = ["third", "fourth"].map(|name| folder.path().join(name));
    let other = [
        ("fold", "1"),
        ("epochs", "1"),
        ("optimizer.learning_rate", "0"),
    ];
    run(&afresh, &settings(&data, &other), false).unwrap();
    let with_init = [&other[..], &[("init", init.as_str())]].concat();
    run(&own, &settings(&data, &with_init), false).unwrap();
    let (own_read, afresh) = (read(&own), read(&afresh));
    for name in ["prior.weight", "prior.bias", "prior.mean", "prior.sd"] {
        assert!(own_read.tensor(name).is_some());
        assert_eq!(own_read.tensor(name), afresh.tensor(name), "{name}");
    }

    // Once it has a checkpoint of its own, a run needs the other's no more.
    std::fs::remove_dir_all(folder.path().join("first")).unwrap();
    run(&own, &[], true).unwrap();
}

/// Every twentieth image of BrEaST, as `folder:` reads them.
fn real_data(folder: &Path) -> String {
    use echograd::data::image::write_png;
    let root = std::env::var("ECHOGRAD_DATA").unwrap();
    let source = echograd::data::open(&format!("breast:{root}/BrEaST")).unwrap();
    for sub in ["images", "masks"] {
        fs::create_dir_all(folder.join(sub)).unwrap();
    }
    let mut labels = "image,label\n".to_owned();
    let lesions = (0..source.cases().len()).filter(|&i| source.cases()[i].label.is_lesion());
    for (k, i) in lesions.step_by(20).take(12).enumerate() {
        let (name, label) = (format!("{k:02}.png"), source.cases()[i].label);
        write_png(
            &folder.join("images").join(&name),
            &source.image(i).unwrap(),
        )
        .unwrap();
        write_png(&folder.join("masks").join(&name), &source.mask(i).unwrap()).unwrap();
        labels += &format!("{name},{label}\n");
    }
    fs::write(folder.join("labels.csv"), labels).unwrap();
    format!("folder:{}", folder.display())
}

/// The preset of the paper at its own extent, on eight real images, two a step: 52 steps.
#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn the_papers_network_trains_on_real_images_and_resumes_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let data = real_data(&folder.path().join("data"));
    // The same pictures again and again, but for flips: the loss of few steps is noisy enough.
    let plain = [
        "affine",
        "elastic",
        "gamma",
        "contrast",
        "speckle",
        "blur",
        "depth_gain",
    ];
    let plain = plain.map(|name| (format!("augment.p_{name}"), "0".to_owned()));
    let mut settings = owned(&[
        ("preset", "efficientnet-b1"),
        ("data", &data),
        ("batch", "2"),
        ("folds", "3"),
        ("epochs", "13"),
        ("optimizer.learning_rate", "2e-3"),
        ("optimizer.warmup", "0"),
        ("optimizer.schedule", "constant"),
    ]);
    settings.extend(plain);
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    run(&whole, &settings, false).unwrap();
    let interrupted = run_until(&parts, &settings, false, 13);
    assert!(matches!(interrupted, Err(Error::Interrupted)));
    run(&parts, &settings, true).unwrap();
    assert!(traces(&whole) == traces(&parts));

    let mut rows = csv::Reader::from_path(whole.join("metrics.csv")).unwrap();
    let header = rows.headers().unwrap().clone();
    let at = header.iter().position(|name| name == "loss").unwrap();
    let losses = rows.records().map(|row| row.unwrap()[at].parse().unwrap());
    let losses: Vec<f64> = losses.collect();
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    let [early, late] = [&losses[..2], &losses[losses.len() - 2..]].map(|l| l.iter().sum::<f64>());
    assert!(late < 0.93 * early, "{losses:?}");

    on_threads(1, || {
        let config = Config::load(Some(&whole.join("config.toml")), &[]).unwrap();
        let step = TrainingStep::record(&config, true).unwrap();
        let mut session = step.session::<f32>(0, None).unwrap();
        assert_eq!(session.bytes(), session.plan().len() * size_of::<f32>());
        session.run();
        let before = ALLOCATIONS.get();
        session.run();
        assert_eq!(ALLOCATIONS.get() - before, 0);
    });
}

#[test]
fn what_is_there_is_not_overwritten_and_another_run_is_not_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let out = folder.path().join("run");
    let one = settings(&data, &[("epochs", "1")]);
    run(&out, &one, false).unwrap();
    let before = traces(&out);
    assert!(message(run(&out, &one, false)).contains("already holds a run"));
    let text = message(run(&out, &owned(&[("optimizer.clip", "3")]), true));
    assert_eq!(
        text,
        "optimizer.clip: expected 1.0, as the run to resume has it, found 3.0"
    );
    assert!(traces(&out) == before);

    let text = message(run(&folder.path().join("data"), &one, false));
    assert!(text.contains("expected a new or empty folder"), "{text}");
    let text = message(run(&folder.path().join("none"), &[], true));
    assert!(text.contains("found no config.toml"), "{text}");
    let file = folder.path().join("data/labels.csv");
    assert!(message(run(&file, &one, false)).contains("labels.csv"));
    let text = message(run(
        &folder.path().join("new"),
        &owned(&[("epochs", "1")]),
        false,
    ));
    assert!(text.contains("expected NAME:PATH"), "{text}");
}

#[test]
fn a_checkpoint_that_is_not_this_runs_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let out = folder.path().join("run");
    run(&out, &settings(&data, &[("epochs", "1")]), false).unwrap();
    let path = out.join("best.safetensors");
    let good = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;

    let mut hostile = good.clone();
    hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut longer = good.clone();
    longer[..8].copy_from_slice(&(good.len() as u64).to_le_bytes());
    let text = String::from_utf8(good[8..8 + header].to_vec()).unwrap();
    // A tensor of 2⁶³ elements.
    let huge = text.replacen(
        "\"shape\":[3,3,3,1]",
        "\"shape\":[9223372036854775807,2,2,2]",
        1,
    );
    let mut huge_file = (huge.len() as u64).to_le_bytes().to_vec();
    huge_file.extend(huge.as_bytes());
    huge_file.extend(&good[8 + header..]);
    assert_ne!(huge, text);
    for (bytes, expected) in [
        (&good[..5], "expected a checkpoint, found a file of 5 bytes"),
        (&good[..4000], "expected a checkpoint"),
        (
            &good[..good.len() - 3],
            "expected a checkpoint of echograd, found: ",
        ),
        (
            &hostile[..],
            "a header of 18446744073709551615 bytes announced",
        ),
        (&longer[..], "bytes announced in a file of"),
        (&huge_file[..], "expected a checkpoint of echograd, found: "),
        (&[7; 64][..], "bytes announced in a file of 64"),
    ] {
        fs::write(&path, bytes).unwrap();
        let text = message(Model::open(&out, Device::Cpu, 1).map(drop));
        assert!(
            text.contains("best.safetensors") && text.contains(expected),
            "{text}"
        );
    }

    // Somebody else's safetensors.
    let other = safetensors::serialize(
        [(
            "x",
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4])
                .unwrap(),
        )],
        None,
    );
    fs::write(&path, other.unwrap()).unwrap();
    assert!(
        message(Model::open(&out, Device::Cpu, 1).map(drop))
            .contains("expected a checkpoint of echograd")
    );

    // Another network's.
    let wide = folder.path().join("wide");
    let more = [("epochs", "1"), ("model.widths", "[3, 6]")];
    run(&wide, &settings(&data, &more), false).unwrap();
    fs::copy(wide.join("best.safetensors"), &path).unwrap();
    assert_eq!(
        message(Model::open(&out, Device::Cpu, 1).map(drop))
            .split_once("safetensors: ")
            .unwrap()
            .1,
        "another model's checkpoint: encoder.1.conv1.weight: expected 5×3×3×3, found 6×3×3×3"
    );
    fs::copy(wide.join("last.safetensors"), out.join("last.safetensors")).unwrap();
    let text = message(run(&out, &[], true));
    assert!(
        text.contains("another run's checkpoint: model.widths"),
        "{text}"
    );
    let init = wide.join("last.safetensors").display().to_string();
    let more = [("init", init.as_str())];
    let text = message(run(
        &folder.path().join("new"),
        &settings(&data, &more),
        false,
    ));
    assert!(
        text.contains("encoder.1.conv1.weight: expected 5×3×3×3"),
        "{text}"
    );
}

#[test]
fn a_nan_stops_training_by_name_and_the_last_good_checkpoint_stays() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let out = folder.path().join("run");
    let settings = settings(&data, &[]);
    assert!(matches!(
        run_until(&out, &settings, false, 3),
        Err(Error::Interrupted)
    ));

    // Poison a weight in the middle of the decoder.
    let path = out.join("last.safetensors");
    let checkpoint = Checkpoint::read(&path).unwrap();
    let config = &checkpoint.config;
    let step = TrainingStep::record(config, true).unwrap();
    let mut session = step.session::<f32>(0, None).unwrap();
    checkpoint.restore(&path, &step.tape, &mut session).unwrap();
    let weight = step
        .tape
        .find(Kind::Parameter, "decoder.0.conv2.weight")
        .unwrap();
    session.values_mut(weight)[5] = f32::NAN;
    checkpoint::write(&path, &step.tape, &session, config, &checkpoint.position).unwrap();
    let poisoned = fs::read(&path).unwrap();

    match run(&out, &[], true) {
        Err(Error::NonFinite {
            step,
            tensor,
            images,
        }) => {
            assert_eq!((step, tensor.as_str()), (4, "decoder.0.conv2.conv2d"));
            assert_eq!(images.len(), 4);
            assert!(
                images.iter().all(|name| name.ends_with(".png")),
                "{images:?}"
            );
        }
        other => panic!("expected a stop, found {other:?}"),
    }
    assert!(fs::read(&path).unwrap() == poisoned);
}

#[test]
fn early_stopping_ends_a_run_that_no_longer_improves() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let more = [
        ("epochs", "30"),
        ("optimizer.learning_rate", "0"),
        ("early_stopping.patience", "2"),
    ];
    // Nothing is learned, so only the running statistics move, and soon they stand still.
    let trained = run(&folder.path().join("run"), &settings(&data, &more), false).unwrap();
    assert_eq!(trained.epochs, trained.best_epoch + 2);
}

#[test]
fn a_checkpoint_reads_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let config = config(&[]);
    let mut small = Small::<f32>::new(&config);
    small.session.run();
    let position = Position {
        epoch: 3,
        step: 1,
        sums: vec![0.1 + 0.2, 1e-300, -1.0 / 3.0],
        best: Some(0.7),
        best_epoch: 2,
    };
    checkpoint::write(&path, &small.step.tape, &small.session, &config, &position).unwrap();
    let read = Checkpoint::read(&path).unwrap();
    assert_eq!((&read.position, &read.config), (&position, &config));
    let mut other = small.step.session::<f32>(99, None).unwrap();
    read.restore(&path, &small.step.tape, &mut other).unwrap();
    for kind in [Kind::Parameter, Kind::State] {
        for var in small.step.tape.of_kind(kind) {
            assert_eq!(small.session.read(var), other.read(var));
        }
    }
}
