//! Operations that memory bounds: normalisation, pooling, upsampling, depthwise convolution, gates, forward and
//! backward.
//!
//! `cargo bench --bench memory_bound` prints milliseconds and the bandwidth that the counted passes over memory
//! amount to. `benches/peers/memory_bound.py` compares with PyTorch: it starts this program with `--serve` and
//! asks for timings between its own, so that both see the same state of a shared machine.

use std::io::BufRead;
use std::time::{Duration, Instant};

use echograd::Result;
use echograd::device::cpu::Session;
use echograd::ops::activation::Activation;
use echograd::ops::batch_norm::BatchNorm;
use echograd::ops::depthwise_conv2d::DepthwiseConv2d;
use echograd::ops::gate::Gate;
use echograd::ops::group_norm::GroupNorm;
use echograd::ops::layer_norm::LayerNorm;
use echograd::ops::pointwise::Fill;
use echograd::ops::pool::{AvgPool2d, GlobalAvgPool, MaxPool2d};
use echograd::ops::upsample::Upsample2x;
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;

/// Names that `--serve` takes, and the cases of a plain run: size and channels of a U-Net 32–512 at 256², and of
/// EfficientNet-B1's blocks.
const OPERATIONS: [(&str, &[(usize, usize)]); 15] = [
    ("batch_norm", &LEVELS),
    ("batch_norm_relu", &LEVELS),
    ("batch_norm_silu", &LEVELS),
    ("group_norm_relu", &LEVELS),
    ("max_pool2d", &[(256, 32), (128, 64), (64, 128), (32, 256)]),
    ("avg_pool2d", &[(256, 32), (128, 64)]),
    ("global_avg_pool", &[(16, 512)]),
    ("upsample2x", &[(128, 64), (64, 128), (32, 256), (16, 512)]),
    ("depthwise_3_1", &[(128, 32), (64, 144), (16, 480)]),
    ("depthwise_3_2", &[(128, 96), (32, 240), (16, 672)]),
    ("depthwise_5_1", &[(32, 240), (16, 672), (8, 1152)]),
    ("depthwise_5_2", &[(64, 144), (16, 672)]),
    ("gate_channel", &[(128, 32), (64, 144), (16, 672)]),
    ("gate_pixel", &[(128, 16), (64, 24), (16, 112)]),
    ("layer_norm", &[(64, 96), (16, 384)]),
];
const LEVELS: [(usize, usize); 5] = [(256, 32), (128, 64), (64, 128), (32, 256), (16, 512)];

fn record(tape: &mut Tape, name: &str, x: Var) -> Result<Var> {
    let c = tape.shape(x).c;
    let vector = |tape: &mut Tape, name| tape.parameter(name, Shape::per_channel(c));
    let activation = match name.rsplit('_').next() {
        Some("relu") => Activation::Relu,
        Some("silu") => Activation::Silu,
        _ => Activation::Identity,
    };
    let (kernel, stride, padding) = ([2; 2], [2; 2], [0; 2]);
    match name {
        "max_pool2d" => tape.push(
            MaxPool2d {
                kernel,
                stride,
                padding,
            },
            &[x],
        ),
        "avg_pool2d" => tape.push(
            AvgPool2d {
                kernel,
                stride,
                padding,
            },
            &[x],
        ),
        "global_avg_pool" => tape.push(GlobalAvgPool, &[x]),
        "upsample2x" => tape.push(Upsample2x, &[x]),
        "layer_norm" => {
            let inputs = [x, vector(tape, "gamma"), vector(tape, "beta")];
            tape.push(LayerNorm { eps: 1e-5 }, &inputs)
        }
        "gate_channel" | "gate_pixel" => {
            let shape = tape.shape(x);
            let logits = if name == "gate_channel" {
                Shape::per_image(shape.n, c)
            } else {
                Shape { c: 1, ..shape }
            };
            let logits = tape.parameter("logits", logits);
            tape.push(Gate, &[x, logits])
        }
        _ if name.starts_with("depthwise") => {
            // depthwise_KERNEL_STRIDE
            let mut numbers = name
                .split('_')
                .skip(1)
                .map(|n| n.parse().expect("a number"));
            let [kernel, stride] = [(); 2].map(|()| numbers.next().expect("two numbers"));
            let weight = tape.parameter("weight", Shape::new(c, kernel, kernel, 1));
            tape.push(DepthwiseConv2d::new(stride, kernel / 2), &[x, weight])
        }
        _ => {
            let inputs = [x, vector(tape, "gamma"), vector(tape, "beta")];
            let outputs = if name.starts_with("batch") {
                tape.push_all(
                    BatchNorm {
                        eps: 1e-5,
                        activation,
                    },
                    &inputs,
                )
            } else {
                tape.push_all(
                    GroupNorm {
                        groups: 8,
                        eps: 1e-5,
                        activation,
                    },
                    &inputs,
                )
            };
            Ok(outputs?[0])
        }
    }
}

/// One operation and its gradient, which may overwrite `dy` as it does in a network.
struct Bench {
    session: Session<f32>,
    /// Elements that the forward step, and the backward steps together, move.
    elements: [u64; 2],
}

impl Bench {
    fn new(name: &str, shape: Shape) -> Result<Self> {
        let mut tape = Tape::new();
        let x = tape.input("x", shape);
        let y = record(&mut tape, name, x)?;
        let seed = Fill {
            shape: tape.shape(y),
            value: 0.5,
        };
        let dy = tape.push(seed, &[])?;
        let parameters: Vec<Var> = tape.of_kind(echograd::tape::Kind::Parameter).collect();
        let wanted = [&[x], &parameters[..]].concat();
        for gradient in tape
            .backward_from(&[(y, dy)], &wanted)?
            .into_iter()
            .flatten()
        {
            tape.keep(gradient);
        }
        tape.keep(y);
        let options = Options {
            recompute: false,
            ..Options::default()
        };
        let mut session = Session::new(Plan::new(&tape, options)?)?;
        let values = session.values_mut(x).iter_mut().enumerate();
        values.for_each(|(i, x)| *x = (i % 251) as f32 / 251.0 - 0.5);
        parameters
            .iter()
            .for_each(|&p| session.values_mut(p).fill(1.0));
        let steps = session.plan().steps();
        let backward = steps[2..].iter().map(|step| step.cost.elements).sum();
        let elements = [steps[0].cost.elements, backward];
        Ok(Self { session, elements })
    }

    /// The least durations of the forward step, and of the backward steps together, in some replays.
    fn least(&mut self, repeats: usize) -> [Duration; 2] {
        let mut least = [Duration::MAX; 2];
        for _ in 0..=repeats {
            let mut took = [Duration::ZERO; 2];
            let mut last = Instant::now();
            self.session.run_observed(|step| {
                // Step 1 makes dy.
                if step != 1 {
                    took[usize::from(step > 1)] += last.elapsed();
                }
                last = Instant::now();
            });
            for (least, took) in least.iter_mut().zip(took) {
                *least = took.min(*least);
            }
        }
        least
    }
}

/// Answers lines of `operation batch size channels repeats` with milliseconds of forward and backward.
fn serve() -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("standard input");
        let (name, numbers) = line.split_once(' ').expect("an operation and four numbers");
        let numbers: Vec<usize> = numbers
            .split(' ')
            .map(|word| word.parse().expect("a number"))
            .collect();
        let [n, size, c, repeats] = numbers[..] else {
            panic!("expected four numbers, found {numbers:?}");
        };
        let least = Bench::new(name, Shape::new(n, size, size, c))?.least(repeats);
        let [forward, backward] = least.map(|t| t.as_secs_f64() * 1e3);
        println!("{forward:.4} {backward:.4}");
    }
    Ok(())
}

fn main() -> Result<()> {
    if std::env::args().any(|argument| argument == "--serve") {
        return serve();
    }
    println!(
        "{:<18} {:>16}  {:>20}  {:>20}",
        "operation", "x", "forward", "backward"
    );
    for (name, cases) in OPERATIONS {
        for &(size, c) in cases {
            let shape = Shape::new(4, size, size, c);
            let mut bench = Bench::new(name, shape)?;
            let least = bench.least(10);
            print!("{name:<18} {shape:>16}");
            for (elements, time) in bench.elements.into_iter().zip(least) {
                let seconds = time.as_secs_f64();
                print!(
                    "  {:>8.3} ms {:>4.1} GB/s",
                    seconds * 1e3,
                    4e-9 * elements as f64 / seconds
                );
            }
            println!();
        }
    }
    Ok(())
}
