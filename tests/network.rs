//! Networks: EfficientNet against torchvision (from `goldens/make_network.py`), and the whole model of the
//! preset `efficientnet-b1`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use echograd::device::Backend;
use echograd::device::cpu::Session;
use echograd::nn::{AttentionUNet, EfficientNet, Heads, Mode, Network, Start};
use echograd::ops::control;
use echograd::tape::{Kind, Plan, Tape, Var};
use echograd::tensor::Shape;
use echograd::train::Config;
use echograd::train::config::Preset;
use echograd::train::pretrained::{self, Naming};
use echograd::train::step::{Evaluation, TrainingStep};
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    /// Number of parameters.
    parameters: usize,
    images: [usize; 4],
    /// Elements from one kept element of a feature map to the next.
    every: usize,
    /// The last map of each resolution, in evaluation.
    maps: Vec<Vec<f64>>,
    evaluation: Vec<f64>,
    training: Vec<f64>,
    /// Norm, and product with hashed numbers.
    gradients: BTreeMap<String, [f64; 2]>,
}

/// The numbers that `make_network.py` draws for a name.
fn named(name: &str, len: usize, low: f64, high: f64) -> Vec<f64> {
    let key = name.bytes().fold(0x811c_9dc5_u32, |key, byte| {
        (key ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let number = |i: u64| {
        let mut x = (i * 2_654_435_761 + u64::from(key) * 40503) as u32;
        for (shift, factor) in [(15, 2_246_822_519), (13, 3_266_489_917)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        f64::from((low + (high - low) * (f64::from(x >> 8) / f64::from(1 << 24))) as f32)
    };
    (0..len as u64).map(number).collect()
}

/// The value that `make_network.py` gives a parameter or state.
fn start(name: &str, start: Start, shape: Shape) -> Vec<f64> {
    let (low, high) = match (start, name.rsplit('.').next()) {
        (Start::HeNormal | Start::Uniform, _) => {
            let limit = (6.0 / (shape.pixels() * shape.c) as f64).sqrt();
            (-limit, limit)
        }
        (_, Some("weight" | "running_var")) => (0.5, 1.5),
        _ => (-0.5, 0.5),
    };
    named(name, shape.len(), low, high)
}

fn b1() -> EfficientNet {
    EfficientNet {
        head: Some(1280),
        stochastic_depth: 0.0,
        ..EfficientNet::b1()
    }
}

fn parameters(tape: &Tape) -> usize {
    tape.of_kind(Kind::Parameter)
        .map(|v| tape.shape(v).len())
        .sum()
}

/// A network on a tape, its last feature map, and how it starts.
fn record(golden: &Golden, train: bool) -> (Tape, Var, Vec<(Var, Start)>) {
    let mut tape = Tape::new();
    let [n, h, w, c] = golden.images;
    let images = tape.input("images", Shape::new(n, h, w, c));
    let control = tape.input("control", Shape::per_channel(control::LEN));
    let mode = if train {
        Mode::Train { control, seed: 0 }
    } else {
        Mode::Evaluate
    };
    let mut network = Network::new(&mut tape, mode);
    let maps = b1().record(&mut network, images).unwrap();
    network.move_statistics().unwrap();
    let starts = network.starts().to_vec();
    let extents: Vec<Shape> = maps.iter().map(|&map| tape.shape(map)).collect();
    let expected = [(2, 16), (4, 24), (8, 40), (16, 112), (32, 1280)]
        .map(|(stride, c)| Shape::new(n, h / stride, w / stride, c));
    assert_eq!(extents, expected);
    tape.keep(maps[4]);
    (tape, maps[4], starts)
}

fn write(session: &mut Session<f64>, tape: &Tape, starts: &[(Var, Start)]) {
    for &(var, kind) in starts {
        session.write(var, &start(tape.name(var), kind, tape.shape(var)));
    }
    let images = tape.find(Kind::Input, "images").unwrap();
    let values = named("images", tape.shape(images).len(), 0.0, 1.0);
    session.write(images, &values);
}

fn assert_close(found: f64, expected: f64, scale: f64, what: &str) {
    let error = (found - expected).abs();
    assert!(
        error <= 1e-9 * scale,
        "{what}: {found}, torchvision {expected}"
    );
}

fn assert_sampled(found: &[f64], golden: &Golden, expected: &[f64], what: &str) {
    let scale = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let kept: Vec<f64> = found.iter().step_by(golden.every).copied().collect();
    assert_eq!(kept.len(), expected.len());
    for (found, expected) in kept.iter().zip(expected) {
        assert_close(*found, *expected, scale, what);
    }
}

#[test]
fn efficientnet_b1_is_that_of_torchvision() {
    let golden: Golden = serde_json::from_str(include_str!("goldens/efficientnet.json")).unwrap();
    let (tape, map, starts) = record(&golden, false);
    assert_eq!(parameters(&tape), golden.parameters);
    assert_eq!(golden.parameters, 6_513_184);
    let plan = Plan::new(&tape, Default::default()).unwrap();
    let mut session = Session::<f64>::new(plan).unwrap();
    write(&mut session, &tape, &starts);
    session.run();
    assert_sampled(session.read(map), &golden, &golden.evaluation, "evaluation");

    let (mut tape, map, starts) = record(&golden, true);
    let dy = tape.input("dy", tape.shape(map));
    let parameters: Vec<Var> = tape.of_kind(Kind::Parameter).collect();
    let gradients = tape.backward_from(&[(map, dy)], &parameters).unwrap();
    let gradients: Vec<Var> = gradients.into_iter().flatten().collect();
    gradients.iter().for_each(|&g| tape.keep(g));
    assert_eq!(gradients.len(), golden.gradients.len());
    let plan = Plan::new(&tape, Default::default()).unwrap();
    let mut session = Session::<f64>::new(plan).unwrap();
    write(&mut session, &tape, &starts);
    session.write(dy, &named("gradient", tape.shape(map).len(), -1.0, 1.0));
    session.run();
    assert_sampled(session.read(map), &golden, &golden.training, "training");
    let largest = golden.gradients.values().map(|g| g[0]).fold(0.0, f64::max);
    for (&parameter, &gradient) in parameters.iter().zip(&gradients) {
        let name = tape.name(parameter);
        let [norm, product] = golden.gradients[name];
        // Some biases are followed by a normalisation that takes them out again: their gradients are rounding.
        let scale = norm.max(1e-6 * largest);
        let gradient = session.read(gradient);
        let probe = named(&format!("probe.{name}"), gradient.len(), -1.0, 1.0);
        let found = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_close(found, norm, scale, name);
        let found = gradient.iter().zip(&probe).map(|(g, p)| g * p).sum::<f64>();
        assert_close(found, product, scale, name);
    }
}

/// Weights from a file with either naming, in f32: the maps of every stride.
#[test]
fn weights_of_torchvision_and_timm_give_torchvisions_features() {
    let golden: Golden = serde_json::from_str(include_str!("goldens/efficientnet.json")).unwrap();
    let [n, h, w, c] = golden.images;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    for naming in [Naming::Torchvision, Naming::Timm] {
        let mut tape = Tape::new();
        let images = tape.input("images", Shape::new(n, h, w, c));
        let mut network = Network::new(&mut tape, Mode::Evaluate);
        let encoder = EfficientNet::b1();
        let maps = network.scope("encoder", |n| encoder.record(n, images));
        let (maps, starts) = (maps.unwrap(), network.starts().to_vec());
        maps.iter().for_each(|&map| tape.keep(map));

        // As PyTorch writes them: out-in-kh-kw.
        let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = starts
            .iter()
            .map(|&(var, kind)| {
                let shape = tape.shape(var);
                let name = tape.name(var).strip_prefix("encoder.").unwrap();
                let values = start(name, kind, shape);
                if shape == Shape::per_channel(shape.c) {
                    let values = values.iter().map(|&v| v as f32).collect();
                    return (naming.of(name), vec![shape.c], values);
                }
                let mut turned = Vec::with_capacity(values.len());
                for kernel in values.chunks_exact(shape.pixels() * shape.c) {
                    for c in 0..shape.c {
                        let taps = kernel[c..].iter().step_by(shape.c);
                        turned.extend(taps.map(|&v| v as f32));
                    }
                }
                (
                    naming.of(name),
                    vec![shape.n, shape.c, shape.h, shape.w],
                    turned,
                )
            })
            .collect();
        let views = tensors.iter().map(|(name, extents, values)| {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, extents.clone(), bytes);
            (name, view.unwrap())
        });
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();

        let plan = Plan::new(&tape, Default::default()).unwrap();
        let mut session = Session::<f32>::new(plan).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        pretrained::initialise(&path, &bytes, &tape, &mut session).unwrap();
        let values = named("images", tape.shape(images).len(), 0.0, 1.0);
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        session.write(images, &values);
        session.run();
        for (&map, expected) in maps.iter().zip(&golden.maps) {
            let shape = tape.shape(map);
            let found = session.read(map).iter().step_by(golden.every);
            let largest = expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
            assert_eq!(found.len(), expected.len(), "{shape}");
            for (&found, expected) in found.zip(expected) {
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= 1e-4 * largest,
                    "{naming:?}, {shape}: {found}, torchvision {expected}"
                );
            }
        }
    }
}

fn efficientnet(settings: &[(&str, &str)]) -> Config {
    let settings: Vec<(String, String)> = settings
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    Config::preset(Preset::EfficientnetB1)
        .with(&settings)
        .unwrap()
}

#[test]
fn the_preset_records_alike_in_training_and_evaluation() {
    let config = efficientnet(&[("size", "64"), ("batch", "2")]);
    let evaluation = Evaluation::record(&config).unwrap();
    let shape = |var: Option<Var>| evaluation.tape.shape(var.unwrap());
    assert_eq!(shape(evaluation.logits.mask), Shape::new(2, 64, 64, 1));
    assert_eq!(shape(evaluation.logits.malignancy), Shape::per_image(2, 1));
    let step = TrainingStep::record(&config, true).unwrap();
    for kind in [Kind::Parameter, Kind::State] {
        for var in evaluation.tape.of_kind(kind) {
            let name = evaluation.tape.name(var);
            let twin = step.tape.find(kind, name);
            let twin = twin.unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(step.tape.shape(twin), evaluation.tape.shape(var), "{name}");
        }
    }
    // The encoder without its head, for one channel.
    let encoder = evaluation.tape.of_kind(Kind::Parameter);
    let encoder = encoder.filter(|&v| evaluation.tape.name(v).starts_with("encoder."));
    let count: usize = encoder.map(|v| evaluation.tape.shape(v).len()).sum();
    assert_eq!(count, 6_513_184 - (320 * 1280 + 2 * 1280) - 2 * 9 * 32);
}

/// Random weights, and running statistics of about what the random weights give, as of a network in evaluation.
fn weights(tape: &Tape) -> BTreeMap<String, Vec<f32>> {
    let values = [Kind::Parameter, Kind::State]
        .into_iter()
        .flat_map(|kind| tape.of_kind(kind));
    let weights = values.map(|var| {
        let (name, shape) = (tape.name(var), tape.shape(var));
        let (low, high) = match name.rsplit('.').next() {
            Some("running_var") => (1.0, 2.0),
            Some("weight") if shape == Shape::per_channel(shape.c) && shape.c > 1 => (0.5, 1.5),
            Some("weight") => {
                let limit = (6.0 / (shape.pixels() * shape.c) as f64).sqrt();
                (-limit, limit)
            }
            _ => (-0.5, 0.5),
        };
        let values = named(name, shape.len(), low, high);
        (name.to_owned(), values.iter().map(|&v| v as f32).collect())
    });
    weights.collect()
}

/// Logits of the network on two images.
fn logits(evaluation: &Evaluation, weights: &BTreeMap<String, Vec<f32>>) -> [Vec<f32>; 2] {
    let mut session = evaluation.session(&Backend::Cpu).unwrap();
    let source = |name: &str, shape: Shape| {
        let values = &weights[name];
        assert_eq!(values.len(), shape.len(), "{name}");
        Ok(Cow::Borrowed(&values[..]))
    };
    evaluation.load(&mut *session, source).unwrap();
    let images = evaluation.images;
    let values = named("images", evaluation.tape.shape(images).len(), 0.0, 1.0);
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    session.write(images, &values).unwrap();
    session.replay().unwrap();
    let of = |var: Option<Var>| session.read(var.unwrap()).unwrap().into_owned();
    [of(evaluation.logits.mask), of(evaluation.logits.malignancy)]
}

#[test]
fn folded_normalisations_give_the_same_numbers() {
    for preset in [Preset::Unet, Preset::EfficientnetB1] {
        let settings = [("size", "96"), ("batch", "2")].map(|(k, v)| (k.into(), v.into()));
        let config = Config::preset(preset).with(&settings).unwrap();
        let unfolded = Evaluation::record(&config).unwrap();
        let folded = Evaluation::folded(&config).unwrap();
        let norms = |evaluation: &Evaluation| {
            let steps = evaluation.tape.steps().iter();
            steps.filter(|step| step.op.name() == "normalize").count()
        };
        assert!(norms(&unfolded) > 10);
        assert_eq!(norms(&folded), 0);
        let weights = weights(&unfolded.tape);
        let expected = logits(&unfolded, &weights);
        for (found, expected) in logits(&folded, &weights).iter().zip(&expected) {
            let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!((0.01..100.0).contains(&largest), "{preset:?}: {largest}");
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs();
                assert!(
                    error <= 1e-5 * largest.max(1.0),
                    "{preset:?}: {found} for {expected}, largest {largest}"
                );
            }
        }
    }
}

/// Twenty steps on two images that differ in one square: the network must fit them.
#[test]
fn the_preset_learns() {
    let config = efficientnet(&[("size", "64"), ("batch", "2"), ("optimizer.ema", "0")]);
    let step = TrainingStep::record(&config, false).unwrap_or_else(|e| panic!("{e}"));
    let mut session: Session<f32> = step.session(1, None).unwrap();
    let inside = |i: usize| (24..40).contains(&(i % 64)) && (20..44).contains(&(i / 64 % 64));
    let images = session.values_mut(step.images).iter_mut().enumerate();
    images.for_each(|(i, x)| *x = if inside(i) && i < 4096 { 0.1 } else { 0.6 });
    let masks = session
        .values_mut(step.targets.masks)
        .iter_mut()
        .enumerate();
    masks.for_each(|(i, x)| *x = f32::from(inside(i) && i < 4096));
    session.write(step.targets.labels, &[1.0, 0.0]);
    session.write(step.targets.weights, &[1.0; 2]);
    session.write(step.targets.class_weights, &[1.0; 2]);
    let mut losses = Vec::new();
    for n in 1..=20 {
        let mut settings = [0.0; control::LEN];
        settings[control::STEP] = n as f32;
        settings[control::LEARNING_RATE] = 2e-3;
        session.write(step.targets.control, &settings);
        session.run();
        losses.push(session.read(step.terms.total)[0]);
    }
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    assert!(losses[19] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn heads_that_are_not_asked_for_are_left_out() {
    let mut tape = Tape::new();
    let images = tape.input("images", Shape::new(1, 64, 64, 1));
    let model = AttentionUNet {
        encoder: EfficientNet::b1(),
        widths: vec![2, 3, 4, 5, 6],
        dropout: 0.0,
    };
    let mut network = Network::new(&mut tape, Mode::Evaluate);
    let heads = Heads {
        mask: false,
        malignancy: true,
    };
    let logits = model.record(&mut network, images, heads).unwrap();
    assert!(logits.mask.is_none());
    let decoder = |v: Var| tape.name(v).starts_with("decoder.");
    assert!(!tape.of_kind(Kind::Parameter).any(decoder));
}
