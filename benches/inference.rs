//! The network of a preset on one image, as `predict` runs it: batch normalisations folded into convolutions.
//!
//! `cargo bench --bench inference` runs criterion on `unet` and `efficientnet-b1`. `-- --table PRESET SIZE BATCH`
//! prints where the time goes, by operation. `benches/peers/inference.py` compares with PyTorch: it starts this
//! program with `--serve` and asks for runs between its own, so that both see the same state of a shared machine.

mod support;

use std::io::BufRead;
use std::time::Instant;

use criterion::Criterion;
use echograd::device::cpu::Session;
use echograd::nn;
use echograd::tape::{Kind, Options, Plan};
use echograd::train::config::Config;
use echograd::train::step::Evaluation;
use support::print_table;

/// The network with random weights and a batch of noise in place.
fn network(preset: &str, size: &str, batch: &str) -> Session<f32> {
    let settings = [("preset", preset), ("size", size), ("batch", batch)];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = Config::load(None, &settings).expect("a valid configuration");
    let evaluation = Evaluation::folded(&config).expect("a valid network");
    let plan = Plan::new(&evaluation.tape, Options::default()).expect("addressable memory");
    let mut session = Session::new(plan).expect("enough memory");
    nn::initialise(&mut session, &evaluation.starts, 0).expect("the processor");
    assert_eq!(evaluation.tape.of_kind(Kind::State).count(), 0);
    let noise = |i: usize| (i.wrapping_mul(2_654_435_761) % 1009) as f32 / 1009.0;
    let images = session.values_mut(evaluation.images).iter_mut().enumerate();
    images.for_each(|(i, x)| *x = noise(i));
    session
}

/// Milliseconds, calls, GFLOP/s and GB/s of each operation; the least of twenty replays for each step.
fn table(preset: &str, size: &str, batch: &str) {
    let mut session = network(preset, size, batch);
    session.run();
    print_table(&mut session, 20);
}

/// Builds the network that the first line describes (`preset size batch`), then answers every further line, a
/// number of repeats, with the least milliseconds of that many runs.
fn serve() {
    let mut lines = std::io::stdin().lock().lines();
    let mut line = || Some(lines.next()?.expect("standard input"));
    let shape = line().unwrap_or_default();
    let words: Vec<&str> = shape.split_whitespace().collect();
    let [preset, size, batch] = words[..] else {
        panic!("expected preset, size and batch, found {shape:?}");
    };
    let mut session = network(preset, size, batch);
    session.run();
    println!("ready");
    while let Some(line) = line() {
        let time = |_| {
            let start = Instant::now();
            session.run();
            start.elapsed()
        };
        let repeats: usize = line.trim().parse().expect("a number");
        let least = (0..repeats).map(time).min().unwrap_or_default();
        println!("{:.3}", least.as_secs_f64() * 1e3);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.iter().any(|a| a == "--serve") {
        serve();
    } else if let Some(at) = arguments.iter().position(|a| a == "--table") {
        let words: Vec<&str> = arguments[at + 1..].iter().map(String::as_str).collect();
        match words[..] {
            [preset, size, batch, ..] => table(preset, size, batch),
            _ => table("efficientnet-b1", "256", "1"),
        }
    } else {
        let mut criterion = Criterion::default().configure_from_args();
        for preset in ["unet", "efficientnet-b1"] {
            let mut session = network(preset, "256", "1");
            criterion.bench_function(&format!("{preset}, one image of 256²"), |b| {
                b.iter(|| session.run())
            });
        }
        criterion.final_summary();
    }
}
