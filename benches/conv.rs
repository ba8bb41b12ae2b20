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
use echograd::tensor::{Shape, Tensor};

/// One layer with everything its three functions need.
struct Layer {
    geometry: Geometry,
    x: Vec<f32>,
    w: Vec<f32>,
    y: Vec<f32>,
    scratch: Vec<f32>,
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
        let values = |shape: Shape| {
            let value = |i: usize| (i % 251) as f32 / 251.0 - 0.5;
            Tensor::from_fn(shape, value).data().to_vec()
        };
        let scratch = geometry
            .forward_scratch()
            .max(geometry.input_gradient_scratch())
            .max(geometry.weight_gradient_scratch());
        Self {
            geometry,
            x: values(x),
            w: values(w),
            y: values(geometry.output()),
            scratch: vec![0.0; scratch],
        }
    }

    fn forward(&mut self) {
        let Self {
            geometry,
            x,
            w,
            y,
            scratch,
        } = self;
        forward(Level::current(), geometry, x, w, y, scratch);
    }

    fn input_gradient(&mut self) {
        let Self {
            geometry,
            x,
            w,
            y,
            scratch,
        } = self;
        input_gradient(Level::current(), geometry, w, y, x, scratch);
    }

    fn weight_gradient(&mut self) {
        let Self {
            geometry,
            x,
            w,
            y,
            scratch,
        } = self;
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

/// Answers lines of `batch size in out kernel stride padding repeats` with the least milliseconds of each function.
fn serve() {
    for line in std::io::stdin().lock().lines() {
        let numbers: Vec<usize> = line
            .expect("standard input")
            .split_whitespace()
            .map(|word| word.parse().expect("a number"))
            .collect();
        let [n, size, c, out, kernel, stride, padding, repeats] = numbers[..] else {
            panic!("expected eight numbers, found {numbers:?}");
        };
        let mut layer = square(n, size, c, out, kernel, stride, padding);
        let least = FUNCTIONS.map(|(_, function)| {
            function(&mut layer);
            let time = |_| {
                let start = Instant::now();
                function(&mut layer);
                start.elapsed()
            };
            (0..repeats).map(time).min().unwrap_or(Duration::ZERO)
        });
        println!(
            "{}",
            least
                .map(|t| format!("{:.4}", t.as_secs_f64() * 1e3))
                .join(" ")
        );
    }
}

fn main() {
    if std::env::args().any(|argument| argument == "--serve") {
        serve();
    } else {
        criterion_layers();
    }
}
