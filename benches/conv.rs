//! Convolution and its gradients.
//!
//! `cargo bench --bench conv` runs criterion over the layers of a U-Net. `benches/peers/conv.py` compares with
//! PyTorch: it starts this program with `--serve` and asks for timings between its own, so that both see the
//! same state of a shared machine.

use std::io::BufRead;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use echograd::device::simd::Level;
use echograd::ops::conv2d::{Geometry, forward, input_gradient, weight_gradient};
use echograd::tensor::Shape;

/// One layer with everything its three functions need.
struct Layer {
    geometry: Geometry,
    x: Aligned,
    w: Aligned,
    y: Aligned,
    scratch: Aligned,
}

/// Elements that begin with a cache line, as those of a session do.
struct Aligned {
    elements: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let elements: Vec<f32> = (0..len + 16)
            .map(|i| (i % 251) as f32 / 251.0 - 0.5)
            .collect();
        let start = elements.as_ptr().align_offset(64);
        Self {
            elements,
            start,
            len,
        }
    }
}

type Function = fn(&mut Layer);

/// The functions, in the order of the columns that are printed.
const FUNCTIONS: [(&str, Function); 3] = [
    ("forward", Layer::forward),
    ("input gradient", Layer::input_gradient),
    ("weight gradient", Layer::weight_gradient),
];

impl Layer {
    fn new(geometry: Geometry, x: Shape, w: Shape) -> Self {
        let scratch = geometry
            .forward_scratch()
            .max(geometry.input_gradient_scratch())
            .max(geometry.weight_gradient_scratch());
        Self {
            geometry,
            x: Aligned::new(x.len()),
            w: Aligned::new(w.len()),
            y: Aligned::new(geometry.output().len()),
            scratch: Aligned::new(scratch),
        }
    }

    /// Geometry, input, weights, output and scratch.
    fn parts(&mut self) -> (&Geometry, [&mut [f32]; 4]) {
        let Self {
            geometry,
            x,
            w,
            y,
            scratch,
        } = self;
        let parts = [x, w, y, scratch].map(|a| &mut a.elements[a.start..][..a.len]);
        (geometry, parts)
    }

    fn forward(&mut self) {
        let (geometry, [x, w, y, scratch]) = self.parts();
        forward(Level::current(), geometry, x, w, y, scratch);
    }

    fn input_gradient(&mut self) {
        let (geometry, [x, w, y, scratch]) = self.parts();
        input_gradient(Level::current(), geometry, w, y, x, scratch);
    }

    fn weight_gradient(&mut self) {
        let (geometry, [x, w, y, scratch]) = self.parts();
        weight_gradient(Level::current(), geometry, x, y, w, scratch);
    }
}

fn square(
    n: usize,
    size: usize,
    c: usize,
    out: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Layer {
    let x = Shape::new(n, size, size, c);
    let w = Shape::new(out, kernel, kernel, c);
    let geometry = Geometry::new(x, w, [stride; 2], [padding; 2]).expect("a valid layer");
    Layer::new(geometry, x, w)
}

fn criterion_layers() {
    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    for (size, c, out) in [
        (256, 32, 32),
        (128, 64, 64),
        (64, 128, 128),
        (32, 256, 256),
        (16, 512, 512),
        (256, 96, 32),
    ] {
        let mut layer = square(1, size, c, out, 3, 1, 1);
        let mut group = criterion.benchmark_group(format!("conv 3×3, {c}→{out}, {size}²"));
        group.throughput(Throughput::Elements(layer.geometry.flops()));
        for (name, function) in FUNCTIONS {
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| function(&mut layer));
            });
        }
    }
    criterion.final_summary();
}

/// Answers `layer batch size in out kernel stride padding` with `ready`, and `run function repeats` with the least
/// milliseconds of that function (a number) on the last layer.
fn serve() {
    let mut layer = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("standard input");
        let mut words = line.split_whitespace();
        let command = words.next();
        let numbers: Vec<usize> = words.map(|word| word.parse().expect("a number")).collect();
        match (command, &numbers[..], &mut layer) {
            (Some("layer"), &[n, size, c, out, kernel, stride, padding], layer) => {
                let layer = layer.insert(square(n, size, c, out, kernel, stride, padding));
                FUNCTIONS.iter().for_each(|(_, function)| function(layer));
                println!("ready");
            }
            (Some("run"), &[function, repeats], Some(layer)) => {
                let time = |_| {
                    let start = Instant::now();
                    FUNCTIONS[function].1(layer);
                    start.elapsed()
                };
                let least: Duration = (0..repeats).map(time).min().expect("a repeat");
                println!("{}", least.as_secs_f64() * 1e3);
            }
            _ => panic!("unknown command {line:?}"),
        }
    }
}

fn main() {
    if std::env::args().any(|argument| argument == "--serve") {
        serve();
    } else {
        criterion_layers();
    }
}
