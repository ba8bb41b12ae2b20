//! A whole training step of a network: forward, loss of the multi-task arm, backward, clipping, AdamW.
//!
//! `cargo bench --bench training_step` runs criterion on the `unet` preset. `-- --table PRESET SIZE BATCH
//! WIDTHS...` prints where the time of one step goes, by operation. `benches/peers/training_step.py` compares with
//! PyTorch: it starts this program with `--serve` and asks for steps between its own, so that both see
//! the same state of a shared machine.

mod support;

use std::io::BufRead;
use std::time::Instant;

use criterion::Criterion;
use echograd::device::cpu::Session;
use echograd::tape::Var;
use echograd::train::config::{Arm, Config, Preset};
use echograd::train::step::TrainingStep;
use support::print_table;

/// What a step is recorded for.
struct Settings {
    preset: Preset,
    size: usize,
    batch: usize,
    widths: Vec<usize>,
}

impl Settings {
    /// From the words `PRESET SIZE BATCH WIDTHS...`; what is missing is that of the `unet` preset.
    fn parse<'a>(mut words: impl Iterator<Item = &'a str>) -> Self {
        let preset = match words.next() {
            None | Some("unet") => Preset::Unet,
            Some("efficientnet-b1") => Preset::EfficientnetB1,
            Some(other) => panic!("expected unet or efficientnet-b1, found {other}"),
        };
        let mut numbers = words.map(|w| w.parse().expect("a number"));
        let [size, batch] = [128, 16].map(|default| numbers.next().unwrap_or(default));
        let mut widths: Vec<usize> = numbers.collect();
        if widths.is_empty() {
            widths = Config::preset(preset).model.widths;
        }
        Self {
            preset,
            size,
            batch,
            widths,
        }
    }
}

/// A step with a batch in place: discs over noise.
fn step(settings: Settings) -> Session<f32> {
    let Settings {
        preset,
        size,
        batch,
        widths,
    } = settings;
    let mut config = Config::preset(preset);
    config.arm = Arm::Multitask;
    config.size = size;
    config.batch = batch;
    config.model.widths = widths;
    config.optimizer.ema = 0.0;
    config.validate().expect("a valid configuration");
    let step = TrainingStep::record(&config, false).expect("a valid step");
    let mut session = step.session(0, None).expect("enough memory");
    let noise = |i: usize| (i.wrapping_mul(2_654_435_761) % 1009) as f32 / 1009.0;
    let centre = |i: usize| {
        (i % size).abs_diff(size / 2).pow(2) + (i / size % size).abs_diff(size / 2).pow(2)
    };
    let disc = |i: usize| f32::from(u8::from(centre(i) < (size / 4).pow(2)));
    fill(&mut session, step.images, noise);
    fill(&mut session, step.targets.masks, disc);
    fill(&mut session, step.targets.labels, |i| (i % 2) as f32);
    fill(&mut session, step.targets.weights, |_| 1.0);
    fill(&mut session, step.targets.class_weights, |_| 1.0);
    session.write(step.targets.control, &[1.0, 1e-3, 1.0, 0.0]);
    session
}

fn fill(session: &mut Session<f32>, var: Var, f: impl Fn(usize) -> f32) {
    let values = session.values_mut(var).iter_mut().enumerate();
    values.for_each(|(i, v)| *v = f(i));
}

/// Milliseconds, calls, GFLOP/s and GB/s of each operation; the least of five replays for each step.
fn table(settings: Settings) {
    let mut session = step(settings);
    println!(
        "{}",
        session
            .plan()
            .to_string()
            .lines()
            .last()
            .unwrap_or_default()
    );
    session.run();
    print_table(&mut session, 5);
}

/// Builds the step that the first line describes (`preset size batch widths...`), then answers every further
/// line, a number of repeats, with the least milliseconds of that many steps.
fn serve() {
    let lines = std::io::stdin().lock().lines();
    let mut lines = lines.map(|line| line.expect("standard input"));
    let first = lines.next().unwrap_or_default();
    let mut session = step(Settings::parse(first.split_whitespace()));
    session.run();
    println!("ready");
    for line in lines {
        let time = |_| {
            let start = Instant::now();
            session.run();
            start.elapsed()
        };
        let repeats: usize = line.trim().parse().expect("a number of repeats");
        let least = (0..repeats).map(time).min().unwrap_or_default();
        println!("{:.3}", least.as_secs_f64() * 1e3);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.iter().any(|a| a == "--serve") {
        serve();
    } else if let Some(at) = arguments.iter().position(|a| a == "--table") {
        // Cargo adds an argument of its own.
        let words = arguments[at + 1..].iter().map(String::as_str);
        table(Settings::parse(words.filter(|word| *word != "--bench")));
    } else {
        let mut criterion = Criterion::default().configure_from_args().sample_size(10);
        let mut session = step(Settings::parse(std::iter::empty()));
        criterion.bench_function("U-Net 16–256, 128², batch 16, step", |b| {
            b.iter(|| session.run())
        });
        criterion.final_summary();
    }
}
