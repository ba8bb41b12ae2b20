//! The shape features of 16 masks of 256×256, from logits to features and back to logits.
//!
//! `cargo bench --bench features` runs criterion. `benches/peers/features.py` compares with PyTorch: it
//! starts this program with `--serve` and asks for timings between its own, so that both see the same
//! state of a shared machine.

use std::io::BufRead;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use echograd::Result;
use echograd::device::cpu::Session;
use echograd::ops::losses::{BceWithLogits, SoftDice};
use echograd::ops::mask_head::MaskHead;
use echograd::ops::moments::Moments;
use echograd::ops::perimeter::Perimeter;
use echograd::ops::pointwise::{Scale, Sigmoid};
use echograd::ops::shape_features::ShapeFeatures;
use echograd::tape::{Plan, Tape, Var};
use echograd::tensor::Shape;

const MASKS: Shape = Shape::new(16, 256, 256, 1);

/// What is computed: the features alone, or with cross-entropy and Dice loss, by the fused mask head
/// or by one operation each.
const BLOCKS: [(&str, bool, bool); 4] = [
    ("features", true, false),
    ("features, composed", false, false),
    ("features and losses", true, true),
    ("features and losses, composed", false, true),
];

/// Moments, perimeter, cross-entropy, Dice loss.
fn composed(tape: &mut Tape, inputs: &[Var]) -> Result<[Var; 4]> {
    let plain = tape.push(Sigmoid, &inputs[..1])?;
    let sharp = tape.push(Scale { factor: 3.0 }, &inputs[..1])?;
    let sharp = tape.push(Sigmoid, &[sharp])?;
    Ok([
        tape.push(Moments, &[sharp])?,
        tape.push(Perimeter, &[sharp])?,
        tape.push(BceWithLogits, inputs)?,
        tape.push(SoftDice, &[plain, inputs[1]])?,
    ])
}

/// A session whose replay is one forward and one backward pass.
fn session(fused: bool, losses: bool) -> Result<Session<f32>> {
    let mut tape = Tape::new();
    let inputs = [tape.input("logits", MASKS), tape.input("truth", MASKS)];
    let [moments, perimeter, cross_entropy, dice] = if fused {
        let head = tape.push_all(MaskHead::default(), &inputs)?;
        [head[3], head[4], head[0], head[1]]
    } else {
        composed(&mut tape, &inputs)?
    };
    let mut ends = vec![tape.push_all(ShapeFeatures, &[moments, perimeter])?[0]];
    if losses {
        ends.extend([cross_entropy, dice]);
    }
    let mut seeds = Vec::new();
    for end in ends {
        tape.keep(end);
        seeds.push((end, tape.input("seed", tape.shape(end))));
    }
    let gradient = tape.backward_from(&seeds, &inputs[..1])?[0].expect("depends on the logits");
    tape.keep(gradient);

    let mut session = Session::new(Plan::new(&tape, Default::default())?)?;
    let centred = |i: usize| (i % 256) as f32 - 127.5;
    for (i, z) in session.values_mut(inputs[0]).iter_mut().enumerate() {
        *z = (60.0 - centred(i).hypot(centred(i / 256))) / 4.0;
    }
    for (i, g) in session.values_mut(inputs[1]).iter_mut().enumerate() {
        *g = f32::from(u8::from(centred(i).hypot(centred(i / 256)) < 55.0));
    }
    for &(_, seed) in &seeds {
        session.values_mut(seed).fill(1.0);
    }
    Ok(session)
}

/// Answers `BLOCK REPEATS` on stdin with the least milliseconds of a replay.
fn serve() -> Result<()> {
    let mut sessions = Vec::new();
    for (_, fused, losses) in BLOCKS {
        sessions.push(session(fused, losses)?);
    }
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("the peer writes lines");
        let numbers: Vec<usize> = line
            .split(' ')
            .map(|word| word.parse().expect("a number"))
            .collect();
        let least = (0..numbers[1])
            .map(|_| {
                let start = Instant::now();
                sessions[numbers[0]].run();
                start.elapsed()
            })
            .min()
            .expect("at least one repeat");
        println!("{}", least.as_secs_f64() * 1e3);
    }
    Ok(())
}

fn main() -> Result<()> {
    if std::env::args().any(|arg| arg == "--serve") {
        return serve();
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("16 masks of 256²");
    group.throughput(Throughput::Elements(MASKS.len() as u64));
    for (name, fused, losses) in BLOCKS {
        let mut session = session(fused, losses)?;
        group.bench_function(name, |bencher| bencher.iter(|| session.run()));
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
