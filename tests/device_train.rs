//! Training on devices, here the emulator: the same answers as the processor's, the same bits however a step is
//! replayed, checkpoints that go on anywhere, memory that stays as planned.
#![cfg(echograd_emulator)]

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use echograd::device::gpu::{self, Gpu};
use echograd::device::{self, Backend, Session as _};
use echograd::features::Prior;
use echograd::nn::{AttentionUNet, EfficientNet, Heads, Logits, Stage};
use echograd::ops::activation::Activation;
use echograd::ops::pool::GlobalAvgPool;
use echograd::tape::{Kind, Options, Plan, Var};
use echograd::train::Report;
use echograd::train::checkpoint::{self, Checkpoint};
use echograd::train::config::{Config, Device, Precision};
use echograd::train::evaluate::{EvaluateArgs, evaluate};
use echograd::train::run::{TrainArgs, Trained, train};
use echograd::train::step::TrainingStep;
use echograd::{Error, Result};

const PRIOR: Prior = Prior {
    weights: [0.1, 0.3, 1.2, 0.4],
    bias: -0.4,
    mean: [0.2, -0.3, 0.05, 0.8],
    sd: [0.1, 0.3, 0.05, 0.1],
};

fn owned(settings: &[(&str, &str)]) -> Vec<(String, String)> {
    let pair = |&(k, v): &(&str, &str)| (k.to_owned(), v.to_owned());
    settings.iter().map(pair).collect()
}

/// A large ε keeps AdamW's first step from turning a gradient's rounding errors into its sign.
fn config(widths: &str) -> Config {
    let settings = [
        ("preset", "tiny"),
        ("size", "16"),
        ("batch", "4"),
        ("model.widths", widths),
        ("optimizer.eps", "0.1"),
        ("optimizer.clip", "2"),
    ];
    Config::load(None, &owned(&settings)).unwrap()
}

fn unet() -> (Config, TrainingStep) {
    let config = config("[3, 5, 8]");
    let step = TrainingStep::record(&config, true).unwrap();
    (config, step)
}

/// Every kind of block of the larger network: with and without expansion, strides 1 and 2, kernels of 3 and 5,
/// residual and not, gates.
fn attention() -> (Config, TrainingStep) {
    let config = config("[3, 5]");
    let stage = |(expansion, kernel, stride, channels, blocks)| Stage {
        expansion,
        kernel,
        stride,
        channels,
        blocks,
    };
    let network = AttentionUNet {
        encoder: EfficientNet {
            stem: 4,
            stages: [(1, 3, 1, 4, 1), (3, 5, 2, 6, 2), (2, 3, 1, 8, 1)]
                .map(stage)
                .to_vec(),
            head: None,
            stochastic_depth: 0.2,
        },
        widths: vec![4, 6],
        dropout: 0.2,
    };
    let heads = Heads {
        mask: true,
        malignancy: true,
    };
    let step = TrainingStep::of(&config, true, |n, images| network.record(n, images, heads));
    (config, step.unwrap())
}

/// The inputs of step `number`: blobs of several sizes over a texture; the last image is padding.
fn inputs(config: &Config, step: &TrainingStep, number: usize) -> Vec<(Var, Vec<f32>)> {
    let (size, n) = (config.size, config.batch);
    let inside = |i: usize| {
        let (image, x, y) = (i / (size * size), i % size, i / size % size);
        let (dx, dy) = (
            x as f32 - 7.5,
            (y as f32 - 7.5) * (1.0 + 0.3 * image as f32),
        );
        dx.hypot(dy) < 4.0 + image as f32 * 0.7
    };
    let texture = |i: usize| ((i + 31 * number) * 2_654_435_761 % 1009) as f32 / 1009.0;
    let mask = |i| f32::from(u8::from(inside(i)));
    let weight = |i: usize| f32::from(u8::from(i + 1 < n));
    let targets = &step.targets;
    // As bf16 holds them, so that every storage starts from the same numbers.
    let rounded = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    let pixels = 0..n * size * size;
    vec![
        (
            step.images,
            pixels
                .clone()
                .map(|i| rounded(0.3 * texture(i) + 0.5 * (1.0 - mask(i))))
                .collect(),
        ),
        (targets.masks, pixels.map(mask).collect()),
        (targets.labels, (0..n).map(|i| (i % 2) as f32).collect()),
        (targets.weights, (0..n).map(weight).collect()),
        (
            targets.class_weights,
            (0..n)
                .map(|i| weight(i) * (0.7 + 0.6 * (i % 2) as f32))
                .collect(),
        ),
        (targets.control, vec![number as f32, 1e-2, 0.8, 0.5]),
    ]
}

fn emulator(narrow: bool) -> Backend {
    let gpu = Gpu::emulator().unwrap();
    Backend::Gpu { gpu, narrow }
}

/// All parameters and states by name, then the report.
type State = Vec<(String, Vec<f32>)>;

fn state(step: &TrainingStep, session: &dyn device::Session<f32>) -> State {
    let vars = [Kind::Parameter, Kind::State].map(|kind| step.tape.of_kind(kind));
    let vars = vars.into_iter().flatten().chain([step.report]);
    let read = |var| {
        let name = step.tape.name(var).to_owned();
        (name, session.read(var).unwrap().into_owned())
    };
    vars.map(read).collect()
}

/// Replays `steps` steps.
fn replayed(config: &Config, step: &TrainingStep, backend: &Backend, steps: usize) -> Vec<State> {
    let mut session = backend.session(&step.tape).unwrap();
    step.start(&mut *session, config.seed, Some(&PRIOR))
        .unwrap();
    (1..=steps)
        .map(|number| {
            for (var, values) in inputs(config, step, number) {
                session.write(var, &values).unwrap();
            }
            session.replay().unwrap();
            state(step, &*session)
        })
        .collect()
}

/// One step in f64 on the processor, from weights as they are or rounded to bf16.
fn exact(config: &Config, step: &TrainingStep, rounded: bool) -> Vec<(String, Vec<f64>)> {
    let mut session = step.session::<f64>(config.seed, Some(&PRIOR)).unwrap();
    // The weights that the others start from.
    let start = step.session::<f32>(config.seed, Some(&PRIOR)).unwrap();
    for var in [Kind::Parameter, Kind::State]
        .into_iter()
        .flat_map(|kind| step.tape.of_kind(kind))
    {
        let of = |&x: &f32| match rounded {
            true => half::bf16::from_f32(x).into(),
            false => f64::from(x),
        };
        let values: Vec<f64> = start.read(var).iter().map(of).collect();
        session.write(var, &values);
    }
    for (var, values) in inputs(config, step, 1) {
        let values: Vec<f64> = values.into_iter().map(f64::from).collect();
        session.write(var, &values);
    }
    session.run();
    let vars = [Kind::Parameter, Kind::State].map(|kind| step.tape.of_kind(kind));
    let vars = vars.into_iter().flatten().chain([step.report]);
    let read = |var| (step.tape.name(var).to_owned(), session.read(var).to_vec());
    vars.map(read).collect()
}

/// √Σx².
fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}

/// √Σ(found − expected)².
fn error(found: &[f32], expected: &[f64]) -> f64 {
    let difference = found.iter().zip(expected).map(|(&a, b)| f64::from(a) - b);
    norm(&difference.collect::<Vec<f64>>())
}

const FIRST: &str = "adam.first.";
const SECOND: &str = "adam.second.";

/// All values whose names begin with `prefix`, one after the other.
fn all(state: &[(String, Vec<f64>)], prefix: &str) -> Vec<f64> {
    let of = state.iter().filter(|(name, _)| name.starts_with(prefix));
    of.flat_map(|(_, values)| values.clone()).collect()
}

/// Compares all that a step leaves: losses and the gradient's norm, every gradient (in AdamW's first moments), every
/// updated parameter, moment, running statistic and average. Each must be within `gradients` of its size; what follows
/// from gradients also of a fifth of the whole gradient's, since a sum over all pixels in which most cancels is as good
/// as its terms. A parameter is off by no more than its first moment, by ε = 0.1, a learning rate of 0.01 and β₁ = 0.9.
/// `others` is for what is no gradient. Returns the largest error as a share of what is allowed, and of what.
fn compare<'a>(
    found: &'a State,
    expected: &[(String, Vec<f64>)],
    [gradients, others]: [f64; 2],
) -> (f64, &'a str) {
    let whole = [FIRST, SECOND].map(|prefix| norm(&all(expected, prefix)));
    let mut worst = (0.0, "");
    for ((name, found), (_, values)) in found.iter().zip(expected) {
        let size = norm(values);
        let plain = name.trim_start_matches(FIRST).trim_start_matches("ema.");
        let moment = format!("{FIRST}{plain}");
        let moment = expected.iter().find(|(name, _)| *name == moment);
        let allowed = match moment {
            _ if name.starts_with(SECOND) => gradients * (2.0 * size + 0.2 * whole[1]),
            Some((_, moment)) => gradients * (norm(moment) + 0.2 * whole[0]) + 1e-6 * size,
            None if plain.ends_with("running_mean") => {
                // Behind a normalisation without activation a mean is 0 but for rounding: its channels' spread counts.
                let variance = plain.replace("running_mean", "running_var");
                let variance = expected.iter().find(|(name, _)| *name == variance);
                let batch = |&v: &f64| ((v - 0.9) / 0.1).max(0.0).sqrt();
                let spread: Vec<f64> = variance.expect("beside it").1.iter().map(batch).collect();
                others * (size + 0.1 * norm(&spread))
            }
            None => others * size,
        };
        let share = error(found, values) / allowed;
        if share > worst.0 || share.is_nan() {
            worst = (share, name);
        }
    }
    worst
}

fn agrees(config: &Config, step: &TrainingStep) {
    let expected = exact(config, step, false);
    for (what, backend) in [("processor", Backend::Cpu), ("device", emulator(false))] {
        let found = replayed(config, step, &backend, 1).remove(0);
        let (share, name) = compare(&found, &expected, [2e-5, 2e-5]);
        println!("{what}, f32: {share:.2} of what is allowed, {name}");
        assert!(
            share <= 1.0,
            "{what}, f32: {name} is {share:.2} of what is allowed off"
        );
    }
    // How much gradients mean in bf16: ReLU and max pooling have kinks, and a rounding that carries some pixels over one
    // changes gradients by far more than itself. Rounded weights show by how much.
    let gradient = all(&expected, FIRST);
    let rounded = all(&exact(config, step, true), FIRST);
    let difference = rounded.iter().zip(&gradient).map(|(a, b)| a - b);
    let sensitivity = norm(&difference.collect::<Vec<f64>>()) / norm(&gradient);
    let found = replayed(config, step, &emulator(true), 1).remove(0);
    let (share, name) = compare(&found, &expected, [4.0 * sensitivity, 0.02]);
    println!(
        "bf16: rounded weights change the gradient by {sensitivity:.1e}; {share:.2} of what is allowed, {name}"
    );
    assert!(
        sensitivity < 0.1 && share <= 1.0,
        "{name} is {share:.2} of what is allowed off"
    );
}

#[test]
fn a_step_of_the_unet_gives_the_processors_results() {
    let (config, step) = unet();
    agrees(&config, &step);
}

#[test]
fn a_step_of_the_attention_unet_gives_the_processors_results() {
    let (config, step) = attention();
    agrees(&config, &step);
}

fn bits(states: &[State]) -> Vec<u32> {
    let values = states.iter().flatten().flat_map(|(_, values)| values);
    values.map(|x| x.to_bits()).collect()
}

#[test]
fn a_captured_step_a_launched_one_and_a_second_run_have_the_same_bits() {
    let (config, step) = unet();
    for narrow in [false, true] {
        let graph = replayed(&config, &step, &emulator(narrow), 2);
        let Backend::Gpu { gpu, .. } = emulator(narrow) else {
            unreachable!()
        };
        // Launch by launch, and the threads in another order.
        gpu.reorder(5);
        let plan = Plan::new(&step.tape, Options::gpu(narrow)).unwrap();
        let mut session = gpu::Session::new(&gpu, plan).unwrap();
        step.start(&mut session, config.seed, Some(&PRIOR)).unwrap();
        let mut launched = Vec::new();
        for number in 1..=2 {
            for (var, values) in inputs(&config, &step, number) {
                session.write(var, &values).unwrap();
            }
            session.run().unwrap();
            launched.push(state(&step, &session));
        }
        assert!(bits(&graph) == bits(&launched), "narrow: {narrow}");
    }
}

#[test]
fn the_loss_in_bf16_follows_that_in_f32() {
    let (config, step) = unet();
    let losses = |backend| -> Vec<f32> {
        let states = replayed(&config, &step, &backend, 12);
        states
            .iter()
            .map(|state| state.last().unwrap().1[0])
            .collect()
    };
    let (wide, narrow) = (losses(emulator(false)), losses(emulator(true)));
    assert!(wide[11] < 0.9 * wide[0], "nothing is learned: {wide:?}");
    for (a, b) in wide.iter().zip(&narrow) {
        assert!((a - b).abs() < 0.03 * a, "{wide:?}\n{narrow:?}");
    }
}

#[test]
fn what_is_fetched_is_what_the_replays_before_left() {
    let (config, step) = unet();
    let Backend::Gpu { gpu, .. } = emulator(false) else {
        unreachable!()
    };
    let before = gpu.allocated();
    let plan = Plan::new(&step.tape, Options::gpu(false)).unwrap();
    let arena = 4 * plan.len();
    let mut session = gpu::Session::new(&gpu, plan).unwrap();
    step.start(&mut session, config.seed, Some(&PRIOR)).unwrap();
    let planned = gpu.allocated() - before;
    assert_eq!(planned, session.bytes());
    // Beside the arena there are but tables: of tensors' addresses, one for a few thousand elements.
    assert!(
        planned >= arena && planned < arena + (64 << 10),
        "{planned} for {arena}"
    );
    let mut reports = Vec::new();
    for number in 1..=8 {
        for (var, values) in inputs(&config, &step, number) {
            session.write(var, &values).unwrap();
        }
        session.replay().unwrap();
        session.fetch(step.report).unwrap();
        reports.push(session.read(step.report).unwrap());
        assert_eq!(gpu.allocated() - before, planned, "step {number}");
    }
    for report in reports {
        assert_eq!(session.fetched().unwrap(), Some(report));
    }
    assert_eq!(session.fetched().unwrap(), None);
    drop(session);
    assert_eq!(gpu.allocated(), before);
}

/// A classifier whose step the emulator makes in milliseconds.
fn classifier() -> (Config, TrainingStep) {
    let settings = [
        ("preset", "tiny"),
        ("arm", "classification"),
        ("size", "16"),
        ("batch", "2"),
    ];
    let config = Config::load(None, &owned(&settings)).unwrap();
    let step = TrainingStep::of(&config, false, |n, images| {
        let x = n.depthwise_conv_norm(["conv", "norm"], images, [3, 2], Activation::Relu)?;
        let pooled = n.tape().push(GlobalAvgPool, &[x])?;
        let malignancy = Some(n.logit("malignancy", pooled)?);
        Ok(Logits {
            mask: None,
            malignancy,
        })
    });
    (config, step.unwrap())
}

/// Steps as a run queues them, each report fetched one step late: nothing is allocated once the session is made, and
/// all that is allocated is the plan's arena and the operations' tables.
#[test]
fn memory_stays_as_planned_over_a_thousand_steps() {
    let (config, step) = classifier();
    for narrow in [false, true] {
        let Backend::Gpu { gpu, .. } = emulator(narrow) else {
            unreachable!()
        };
        let plan = Plan::new(&step.tape, Options::gpu(narrow)).unwrap();
        let arena = 4 * plan.len();
        let mut session = gpu::Session::new(&gpu, plan).unwrap();
        let planned = (gpu.allocated(), gpu.allocations());
        assert_eq!(planned.0, session.bytes());
        // The arena is one piece, each table another.
        assert!(planned.0 > arena && planned.1 > 1, "{planned:?}, {arena}");
        step.start(&mut session, config.seed, None).unwrap();
        for number in 1..=1000 {
            for (var, values) in inputs(&config, &step, number) {
                session.write(var, &values).unwrap();
            }
            session.replay().unwrap();
            session.fetch(step.report).unwrap();
            if number > 1 {
                let report = session.fetched().unwrap().unwrap();
                assert!(report.iter().all(|x| x.is_finite()), "step {number}");
            }
            let found = (gpu.allocated(), gpu.allocations());
            assert_eq!(found, planned, "step {number}");
        }
        drop(session);
        assert_eq!(gpu.allocated(), 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Whole runs

/// Bright (malignant) and dark (benign) blobs, as `folder:` reads them.
fn data(folder: &Path) -> String {
    use echograd::data::image::{Gray, write_png};
    let (width, height) = (20, 16);
    for sub in ["images", "masks"] {
        fs::create_dir_all(folder.join(sub)).unwrap();
    }
    let mut labels = "image,label\n".to_owned();
    for i in 0..9usize {
        let malignant = i % 2 == 0;
        let (mut image, mut mask) = (Gray::zeros(width, height), Gray::zeros(width, height));
        for (p, (pixel, inside)) in image.pixels.iter_mut().zip(&mut mask.pixels).enumerate() {
            let (x, y) = ((p % width) as f64, (p / width) as f64);
            let lesion =
                (x - 8.0 - (i % 3) as f64).hypot((y - 7.0) * 1.2) < 4.5 + (i % 4) as f64 / 2.0;
            let level = if lesion {
                40 + 60 * usize::from(malignant)
            } else {
                150
            };
            *pixel = (level + (p * 7919 + i * 1_299_709) % 61) as u8;
            *inside = if lesion { 255 } else { 0 };
        }
        let name = format!("{i}.png");
        write_png(&folder.join("images").join(&name), &image).unwrap();
        write_png(&folder.join("masks").join(&name), &mask).unwrap();
        labels += &format!(
            "{name},{}\n",
            if malignant { "malignant" } else { "benign" }
        );
    }
    fs::write(folder.join("labels.csv"), labels).unwrap();
    format!("folder:{}", folder.display())
}

fn settings(data: &str, device: &str) -> Vec<(String, String)> {
    let settings = [
        ("preset", "tiny"),
        ("data", data),
        ("device", device),
        ("size", "16"),
        ("batch", "3"),
        ("model.widths", "[3, 5]"),
        ("epochs", "2"),
        ("folds", "3"),
    ];
    owned(&settings)
}

/// Interrupts a run after a number of steps, and keeps its lines.
struct Watch {
    steps: u64,
    stop: AtomicBool,
    lines: Mutex<Vec<String>>,
}

impl Report for Watch {
    fn line(&self, text: &str) {
        self.lines.lock().unwrap().push(text.to_owned());
    }
    fn progress(&self, what: &str, done: u64, _: u64, _: &str) {
        if what == "training" && done >= self.steps {
            self.stop.store(true, Ordering::SeqCst);
        }
    }
}

fn run_until(
    out: &Path,
    settings: &[(String, String)],
    resume: bool,
    steps: u64,
) -> (Result<Trained>, Vec<String>) {
    let watch = Watch {
        steps,
        stop: AtomicBool::new(false),
        lines: Mutex::default(),
    };
    let args = TrainArgs {
        out,
        config: None,
        settings,
        resume,
    };
    let trained = train(&args, &watch, &watch.stop);
    (trained, watch.lines.into_inner().unwrap())
}

fn run(out: &Path, settings: &[(String, String)], resume: bool) -> Result<Trained> {
    run_until(out, settings, resume, u64::MAX).0
}

/// The tensors and the metrics that a run leaves behind.
fn traces(run: &Path) -> (Vec<u8>, Vec<String>) {
    let csv = fs::read_to_string(run.join("metrics.csv")).unwrap();
    let rows = csv
        .lines()
        .map(|line| line.rsplitn(3, ',').last().unwrap().to_owned());
    (
        fs::read(run.join("last.safetensors")).unwrap(),
        rows.collect(),
    )
}

#[test]
fn a_run_on_a_device_is_repeatable_resumable_and_goes_on_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let at = |name: &str| folder.path().join(name);
    let settings = settings(&data, "emulator");
    let trained = run(&at("whole"), &settings, false).unwrap();
    assert_eq!(trained.epochs, 2);
    let manifest = fs::read_to_string(at("whole").join("manifest.json")).unwrap();
    assert!(manifest.contains("\"device\": \"emulator\""), "{manifest}");

    // Two steps an epoch: stopped within the second.
    let (stopped, lines) = run_until(&at("parts"), &settings, false, 3);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(
        lines
            .iter()
            .any(|l| l.starts_with("training on emulator, activations in bf16, ")),
        "{lines:?}"
    );
    let copy = |to: &str| {
        fs::create_dir(at(to)).unwrap();
        for file in [
            "config.toml",
            "manifest.json",
            "metrics.csv",
            "last.safetensors",
            "best.safetensors",
        ] {
            fs::copy(at("parts").join(file), at(to).join(file)).unwrap();
        }
    };
    copy("elsewhere");
    run(&at("parts"), &[], true).unwrap();
    assert!(
        traces(&at("parts")) == traces(&at("whole")),
        "the files differ"
    );

    // The rest on the processor, which is said; and, from there, back.
    let (resumed, lines) = run_until(
        &at("elsewhere"),
        &owned(&[("device", "cpu")]),
        true,
        u64::MAX,
    );
    resumed.unwrap();
    let line = "resumed on cpu, begun on emulator: results may differ in their last bits";
    assert!(lines.iter().any(|l| l == line), "{lines:?}");
    let read = |run: &str| Checkpoint::read(&at(run).join("last.safetensors")).unwrap();
    let (there, here) = (read("elsewhere"), read("whole"));
    assert_eq!(there.position.epoch, here.position.epoch);
    let weight = |c: &Checkpoint| c.tensor("encoder.1.conv2.weight").unwrap().data().to_vec();
    let wide: Vec<f64> = weight(&here).iter().map(|&x| x.into()).collect();
    let distance = error(&weight(&there), &wide) / norm(&wide);
    assert!(distance < 0.05, "{distance}");
    run(&at("elsewhere"), &owned(&[("device", "emulator")]), true).unwrap();

    // What decides about results is no other device's business.
    let text = run(&at("parts"), &owned(&[("precision", "f32")]), true)
        .err()
        .unwrap()
        .to_string();
    assert!(text.starts_with("precision: expected \"bf16\""), "{text}");

    // The network sees the same on both.
    let probabilities = |device| {
        let out = at("evaluation");
        let args = EvaluateArgs {
            runs: &[at("whole")],
            data: &data,
            out: &out,
            drop_duplicates: false,
            include_training: true,
            device,
        };
        let evaluated = evaluate(&args, &(), &AtomicBool::new(false)).unwrap();
        evaluated
            .rows
            .iter()
            .map(|row| row.p.unwrap())
            .collect::<Vec<_>>()
    };
    let (cpu, emulator) = (probabilities(Device::Cpu), probabilities(Device::Emulator));
    for (a, b) in cpu.iter().zip(&emulator) {
        assert!((a - b).abs() < 0.02, "{cpu:?}\n{emulator:?}");
    }
}

#[test]
fn what_is_not_finite_is_named_one_step_late_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(&folder.path().join("data"));
    let out = folder.path().join("run");
    let settings = settings(&data, "emulator");
    let (stopped, _) = run_until(&out, &settings, false, 1);
    assert!(matches!(stopped, Err(Error::Interrupted)));
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
            assert_eq!((step, tensor.as_str()), (2, "decoder.0.conv2.conv2d"));
            assert_eq!(images.len(), 3);
        }
        other => panic!("expected a stop, found {other:?}"),
    }
    assert!(fs::read(&path).unwrap() == poisoned);
}

/// A step with an infinite image, and one queued behind it before anybody looks.
#[test]
fn a_step_behind_one_that_is_not_finite_changes_nothing() {
    let (config, step) = unet();
    for backend in [Backend::Cpu, emulator(false), emulator(true)] {
        let mut session = backend.session(&step.tape).unwrap();
        step.start(&mut *session, config.seed, Some(&PRIOR))
            .unwrap();
        let feed = |session: &mut dyn device::Session<f32>, number, spoil: bool| {
            for (var, mut values) in inputs(&config, &step, number) {
                if spoil && var == step.images {
                    values[7] = f32::INFINITY;
                }
                session.write(var, &values).unwrap();
            }
        };
        // Running statistics aside, which nothing reads in training.
        let learned = |session: &dyn device::Session<f32>| -> State {
            let mut all = state(&step, session);
            all.retain(|(name, _)| {
                !name.contains("running_") && step.tape.name(step.report) != name
            });
            all
        };
        feed(&mut *session, 1, false);
        assert_eq!(session.replay_checked().unwrap(), None);
        let before = learned(&*session);
        for (number, spoil) in [(2, true), (3, false)] {
            feed(&mut *session, number, spoil);
            session.replay().unwrap();
            session.fetch(step.report).unwrap();
        }
        assert!(
            bits(&[learned(&*session)]) == bits(&[before]),
            "{backend:?}"
        );
        let first = session.fetched().unwrap().unwrap();
        assert!(!first[0].is_finite() || !first[first.len() - 1].is_finite());
        let second = session.fetched().unwrap().unwrap();
        assert!(second[0].is_finite() && !second[second.len() - 1].is_finite());
        session.write(step.halt, &[0.0]).unwrap();
        feed(&mut *session, 2, true);
        let name = session.replay_checked().unwrap().unwrap();
        assert!(name.starts_with("encoder.0.conv1"), "{name}");
    }
}

#[test]
fn activations_are_stored_as_the_configuration_says() {
    let mut config = config("[3, 5]");
    let narrow = |config: &Config| match config.backend(Device::Emulator).unwrap() {
        Backend::Gpu { narrow, .. } => narrow,
        Backend::Cpu => panic!("the emulator was asked for"),
    };
    assert!(narrow(&config));
    config.precision = Precision::F32;
    assert!(!narrow(&config));
}
