//! `echograd profile`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::SIZE_RANGE;
use crate::device::gpu::{Description, Gpu};
use crate::error::{Error, Result};
use crate::ops::{examples, registry};
use crate::profile::{self, Layer, Profile, Roof, Row, Settings, Sheet, Sum};
use crate::tape::Tape;
use crate::tensor::Shape;
use crate::train::Config;
use crate::train::config::{Arm, Device, Preset};
use crate::train::step::TrainingStep;

/// Show where the time goes: each step's time, bytes and arithmetic against the roofline
///
/// Bytes are compulsory traffic, arithmetic counts a fused multiply-add twice. The roofline is what this machine does at
/// best, measured first: the bandwidth of a large copy and the rate of multiply-adds on registers. On a GPU each kernel
/// is timed between two events with empty caches, on the processor each step by the clock; times are medians. On the
/// emulator nothing is timed: kernels, grids, bytes and arithmetic are listed. With --predict nothing runs: each step gets
/// the time of its bytes or arithmetic, whichever is longer, by the data sheet of a GPU, at least 2 µs, and as much for each
/// further launch.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    what: What,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Extent of the activations of --op, or of the masks of --features [default: 8,64,64,32; masks 16,256,256,1, on a GPU
    /// 256,256,256,1]
    #[arg(long, value_name = "N,H,W,C", value_parser = shape)]
    shape: Option<Shape>,
    /// Storage of activations; bf16 needs a GPU or the emulator
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Predict instead of measuring: times by this GPU's data sheet, which real kernels do not reach
    #[arg(long, value_name = "GPU", conflicts_with_all = ["device", "iters", "trace"])]
    predict: Option<Sheet>,
    /// Replays that are timed
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    iters: u32,
    /// Network of --step [default: unet]
    #[arg(long, requires = "step")]
    preset: Option<Preset>,
    /// What --step trains [default: consistency]
    #[arg(long, requires = "step")]
    arm: Option<Arm>,
    /// Side of the images of --step in pixels
    #[arg(long, value_name = "S", requires = "step", value_parser = clap::value_parser!(u16).range(SIZE_RANGE))]
    size: Option<u16>,
    /// Images of --step
    #[arg(long, value_name = "N", requires = "step")]
    batch: Option<usize>,
    /// Overlay one value of the configuration of --step, e.g. --set model.widths=[32,64,128,256,512]
    #[arg(long, value_name = "KEY=VALUE", requires = "step", value_parser = super::key_value)]
    set: Vec<(String, String)>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Write a Chrome trace of the last replay, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct What {
    /// A whole training step
    #[arg(long)]
    step: bool,
    /// From mask logits through features and prior to the loss and back, fused and unfused
    #[arg(long)]
    features: bool,
    /// One operation, forward and backward
    #[arg(long, value_name = "NAME", value_parser = super::gradcheck::operation)]
    op: Option<super::gradcheck::Operation>,
    /// List the operations
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    F32,
    Bf16,
}

fn shape(text: &str) -> Result<Shape, String> {
    let numbers: Vec<usize> = text
        .split(',')
        .filter_map(|n| n.trim().parse().ok())
        .collect();
    match numbers[..] {
        [n, h, w, c] if text.split(',').count() == 4 && !numbers.contains(&0) => {
            let len = numbers
                .iter()
                .try_fold(1usize, |len, &n| len.checked_mul(n));
            match len.filter(|&len| len <= 1 << 33) {
                Some(_) => Ok(Shape::new(n, h, w, c)),
                None => Err("expected at most 2^33 elements".into()),
            }
        }
        _ => Err("expected four positive integers N,H,W,C".into()),
    }
}

/// A line of `--list`.
#[derive(Serialize)]
struct Listed {
    name: &'static str,
    summary: &'static str,
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
    /// The GPU for which times were predicted, none were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted: Option<Sheet>,
    /// Of a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<Description>,
    dtype: Dtype,
    threads: usize,
    iterations: u32,
    roof: Option<&'a Roof>,
    profiles: Vec<Measured<'a>>,
    /// Time unfused over time fused.
    #[serde(skip_serializing_if = "Option::is_none")]
    fusion: Option<f64>,
}

#[derive(Serialize)]
struct Measured<'a> {
    #[serde(flatten)]
    profile: &'a Profile,
    seconds: Option<f64>,
    bytes: u64,
    flops: u64,
    /// On a GPU.
    #[serde(skip_serializing_if = "is_zero")]
    launches: usize,
    /// Of a training step.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<Layer>,
}

fn is_zero(x: &usize) -> bool {
    *x == 0
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If the device is not there or lacks a kernel, if a flag does not fit, or if the trace cannot be
    /// written.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if self.what.list {
            list(self.json)?;
            return Ok(ExitCode::SUCCESS);
        }
        let narrow = self.dtype == Dtype::Bf16;
        let gpu = self.device.open()?;
        if narrow && self.predict.is_none() && !gpu.as_ref().is_some_and(Gpu::has_bf16) {
            let problem = "bf16 needs --device emulator, or a GPU of compute capability 8.0";
            return Err(Error::argument("--dtype", problem).into());
        }
        if self.trace.is_some() && self.device == Device::Emulator {
            let problem = "the emulator takes no times; expected --device cpu or cuda";
            return Err(Error::argument("--trace", problem).into());
        }
        let tapes = self.tapes()?;
        let roof = match (self.predict, &gpu, self.device) {
            (Some(sheet), ..) => Some(Roof::of_sheet(sheet, narrow)),
            (_, Some(gpu), Device::Cuda) => Some(Roof::of_gpu(gpu, narrow)?),
            (_, Some(_), _) => None,
            (_, None, _) => Some(Roof::of_cpu()),
        };
        let iterations = self.iters as usize;
        let settings = Settings {
            iterations,
            narrow,
            // The processor would take minutes for a GPU's batch.
            compare: !self.what.step,
        };
        let measure = |(title, tape): &(String, Tape)| match (&gpu, &roof) {
            (_, Some(roof)) if self.predict.is_some() => {
                profile::predict(title, tape, narrow, roof)
            }
            (Some(gpu), roof) => profile::on_gpu(title, tape, gpu, settings, roof.as_ref()),
            (None, Some(roof)) => profile::on_cpu(title, tape, settings, roof),
            (None, None) => unreachable!("the processor has a roof"),
        };
        let profiles: Vec<Profile> = tapes.iter().map(measure).collect::<Result<_>>()?;
        if let Some(path) = &self.trace {
            write_trace(path, &profiles)?;
        }
        let fusion = match &profiles[..] {
            [fused, unfused] => unfused.seconds().zip(fused.seconds()).map(|(u, f)| u / f),
            _ => None,
        };
        if self.json {
            let measured = |profile| Measured {
                seconds: Profile::seconds(profile),
                bytes: profile.bytes(),
                flops: profile.flops(),
                launches: profile.launches(),
                layers: if self.what.step {
                    profile.layers()
                } else {
                    Vec::new()
                },
                profile,
            };
            let document = Document {
                device: self.predict.is_none().then_some(self.device),
                predicted: self.predict,
                gpu: gpu.as_ref().map(Gpu::description),
                dtype: self.dtype,
                threads: rayon::current_num_threads(),
                iterations: self.iters,
                roof: roof.as_ref(),
                profiles: profiles.iter().map(measured).collect(),
                fusion,
            };
            super::print_json(&document)?;
        } else {
            let what = match (self.predict, &gpu) {
                (Some(sheet), _) => format!("predicted for {}", super::name_of(&sheet)),
                (_, Some(gpu)) => gpu.description().name,
                (_, None) => format!("CPU, {} threads", rayon::current_num_threads()),
            };
            print_roof(&what, roof.as_ref())?;
            for profile in &profiles {
                print(profile, roof.as_ref(), self.what.step)?;
            }
            if let Some(fusion) = fusion {
                outln!("unfused / fused {fusion:.1}");
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What is measured, with titles.
    fn tapes(&self) -> Result<Vec<(String, Tape)>> {
        if self.what.features {
            let images = if self.device == Device::Cuda { 256 } else { 16 };
            let masks = self.shape.unwrap_or(Shape::new(images, 256, 256, 1));
            return Ok(vec![
                (format!("fused, {masks}"), profile::fused(masks)?.tape),
                (format!("unfused, {masks}"), profile::unfused(masks)?.tape),
            ]);
        }
        if let Some(op) = &self.what.op {
            let name = op.name();
            let images = ["moments", "perimeter", "mask_head"].contains(&name);
            let usual = Shape::new(8, 64, 64, if images { 1 } else { 32 });
            let shape = self.shape.unwrap_or(usual);
            let mut tape = Tape::new();
            let (y, wrt) = examples::record(&mut tape, name, shape)?;
            let dy = tape.input("dy", tape.shape(y));
            if tape.values()[y.index()].narrow {
                tape.narrow(dy);
            }
            tape.keep(y);
            for gradient in tape.backward_from(&[(y, dy)], &wrt)?.into_iter().flatten() {
                tape.keep(gradient);
            }
            return Ok(vec![(format!("{name}, {shape}"), tape)]);
        }
        let given = [
            ("preset", self.preset.map(|v| super::name_of(&v))),
            ("arm", self.arm.map(|v| super::name_of(&v))),
            ("size", self.size.map(|v| v.to_string())),
            ("batch", self.batch.map(|v| v.to_string())),
        ];
        let config = Config::load(None, &super::settings(given, &self.set))?;
        let step = TrainingStep::record(&config, config.arm == Arm::Consistency)?;
        let title = format!(
            "training step, {}, {} images of {}²",
            super::name_of(&config.preset),
            config.batch,
            config.size
        );
        Ok(vec![(title, step.tape)])
    }
}

fn list(json: bool) -> anyhow::Result<()> {
    let entries = registry().into_iter();
    let listed: Vec<Listed> = entries
        .map(|entry| Listed {
            name: entry.name,
            summary: entry.summary,
        })
        .collect();
    if json {
        return super::print_json(&listed);
    }
    for Listed { name, summary } in listed {
        outln!("{name:<18} {summary}");
    }
    Ok(())
}

fn write_trace(path: &std::path::Path, profiles: &[Profile]) -> Result<()> {
    let profiles = profiles.iter().enumerate();
    let events: Vec<_> = profiles
        .flat_map(|(process, profile)| profile.trace(process))
        .collect();
    let text = serde_json::json!({ "traceEvents": events, "displayTimeUnit": "ns" }).to_string();
    std::fs::write(path, text).map_err(|e| Error::caused(path, "cannot be written", e))
}

fn print_roof(what: &str, roof: Option<&Roof>) -> Result<()> {
    let Some(roof) = roof else {
        outln!("{what}: not timed");
        return Ok(());
    };
    let matrix = roof.bf16_flops_per_second.map_or(String::new(), |rate| {
        format!(", bf16 matrices {:.1} TFLOP/s", rate * 1e-12)
    });
    outln!(
        "{what}: copy {:.1} GB/s, f32 {:.3} TFLOP/s{matrix}",
        roof.copy_bytes_per_second * 1e-9,
        roof.f32_flops_per_second * 1e-12
    );
    Ok(())
}

/// Steps that are listed of a training step; the others are in the sums, the JSON and the trace.
const SLOWEST: usize = 16;

fn print(profile: &Profile, roof: Option<&Roof>, step: bool) -> Result<()> {
    outln!("\n{}", profile.title);
    if step {
        print_layers(profile)?;
        print_operations(profile)?;
        print_kernels(profile)?;
        outln!("\nslowest steps");
    }
    let mut rows: Vec<&Row> = profile.rows.iter().collect();
    if step {
        rows.sort_by(|a, b| {
            b.seconds
                .unwrap_or(0.0)
                .total_cmp(&a.seconds.unwrap_or(0.0))
        });
        rows.truncate(SLOWEST);
    }
    header("step", "extent")?;
    for row in rows {
        let [n, h, w, c] = row.shape;
        let extent = format!("{n}×{h}×{w}×{c}");
        let line = Line {
            seconds: row.seconds,
            bytes: row.bytes,
            flops: row.flops,
            roofline: row.roofline,
        };
        line.print(row.operation, &extent)?;
        for kernel in &row.kernels {
            let product = |of: [u32; 3]| of.iter().map(|&n| u64::from(n)).product::<u64>();
            let mut text = format!(
                "{}×{} threads",
                product(kernel.blocks),
                product(kernel.threads)
            );
            if kernel.registers > 0 {
                text += &format!(", {} registers", kernel.registers);
            }
            if kernel.shared_bytes > 0 {
                text += &format!(", {} B shared", kernel.shared_bytes);
            }
            if kernel.local_bytes > 0 {
                text += &format!(", {} B local", kernel.local_bytes);
            }
            if let Some(occupancy) = kernel.occupancy {
                text += &format!(", occupancy {:.0} %", 100.0 * occupancy);
            }
            if let Some(seconds) = kernel.seconds {
                text += &format!(", {}", time(seconds));
            }
            outln!("  {}: {text}", kernel.name);
        }
    }
    let seconds = profile.seconds();
    let (bytes, flops) = (profile.bytes(), profile.flops());
    let roofline = seconds
        .zip(roof)
        .map(|(s, roof)| roof.seconds(bytes, flops) / s);
    let line = Line {
        seconds,
        bytes,
        flops,
        roofline,
    };
    if let Some(deviation) = profile.deviation {
        outln!(
            "results within {deviation:.0e} of the processor's, relative to each tensor's largest"
        );
    }
    if let Some(seconds) = profile.graph_seconds {
        outln!("as one graph {}", time(seconds));
    }
    line.print(
        "all",
        &format!("{:.1} MiB", profile.arena_bytes as f64 / f64::from(1 << 20)),
    )
}

/// Sums over the steps of each layer, forward and backward, in the order of the network.
fn print_layers(profile: &Profile) -> Result<()> {
    let layers = profile.layers();
    let name = |layer: &Layer| match layer.layer.as_str() {
        "" => "(no layer)".to_owned(),
        name => name.to_owned(),
    };
    let widths = layers.iter().map(|layer| name(layer).chars().count());
    let width = widths.max().unwrap_or(0).max(10);
    let columns =
        |[time, mb, mflop, roof]: [&str; 4]| format!("{time:>8} {mb:>7} {mflop:>7} {roof:>5}");
    outln!(
        "{:<width$} {:>4} {} {}",
        "layer",
        "%",
        columns(["forward", "MB", "MFLOP", "roof"]),
        columns(["backward", "MB", "MFLOP", "roof"])
    );
    let total = profile.seconds();
    let pass = |sum: &Sum| {
        if sum.steps == 0 {
            return columns(["–"; 4]);
        }
        columns([
            &sum.seconds.map_or("–".to_owned(), time),
            &format!("{:.1}", sum.bytes as f64 * 1e-6),
            &format!("{:.1}", sum.flops as f64 * 1e-6),
            &percent(sum.roofline),
        ])
    };
    for layer in &layers {
        let seconds = layer.forward.seconds.zip(layer.backward.seconds);
        let share = seconds.zip(total).map(|((f, b), total)| (f + b) / total);
        outln!(
            "{:<width$} {:>4} {} {}",
            name(layer),
            share.map_or("–".to_owned(), |share| format!("{:.1}", 100.0 * share)),
            pass(&layer.forward),
            pass(&layer.backward)
        );
    }
    outln!("");
    Ok(())
}

/// Sums over the steps of each operation, slowest first.
fn print_operations(profile: &Profile) -> Result<()> {
    let mut names: Vec<&str> = profile.rows.iter().map(|row| row.operation).collect();
    names.sort_unstable();
    names.dedup();
    let sum = |name: &str| Sum::of(profile.rows.iter().filter(|row| row.operation == name));
    let mut sums: Vec<(&str, Sum)> = names.into_iter().map(|name| (name, sum(name))).collect();
    let seconds = |sum: &Sum| sum.seconds.unwrap_or(0.0);
    sums.sort_by(|a, b| seconds(&b.1).total_cmp(&seconds(&a.1)));
    header("operation", "steps, share")?;
    let total = profile.seconds();
    for (name, sum) in sums {
        let share = sum.seconds.zip(total).map_or(String::new(), |(s, total)| {
            format!(", {:.1} %", 100.0 * s / total)
        });
        let line = Line {
            seconds: sum.seconds,
            bytes: sum.bytes,
            flops: sum.flops,
            roofline: sum.roofline,
        };
        line.print(name, &format!("{}{share}", sum.steps))?;
    }
    Ok(())
}

/// How often each kernel is launched, most often first.
fn print_kernels(profile: &Profile) -> Result<()> {
    let kernels = profile.rows.iter().flat_map(|row| &row.kernels);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for kernel in kernels {
        *counts.entry(&kernel.name).or_default() += 1;
    }
    if counts.is_empty() {
        return Ok(());
    }
    let mut counts: Vec<(&str, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, count)| Reverse(count));
    outln!("\n{:<34} {:>8}", "kernel", "launches");
    for (name, count) in counts {
        outln!("{name:<34} {count:>8}");
    }
    outln!("{:<34} {:>8}", "all", profile.launches());
    Ok(())
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".to_owned(), |share| format!("{:.0} %", 100.0 * share))
}

#[derive(Clone, Copy)]
struct Line {
    seconds: Option<f64>,
    bytes: u64,
    flops: u64,
    roofline: Option<f64>,
}

fn header(first: &str, second: &str) -> Result<()> {
    outln!(
        "{first:<26} {second:<16} {:>10} {:>9} {:>7} {:>8} {:>8} {:>5}",
        "time",
        "MB",
        "GB/s",
        "MFLOP",
        "GFLOP/s",
        "roof"
    );
    Ok(())
}

impl Line {
    fn print(&self, first: &str, second: &str) -> Result<()> {
        let rate = |amount: u64, digits: usize| {
            let rate = self.seconds.map(|s| amount as f64 / s * 1e-9);
            rate.map_or("–".to_owned(), |rate| format!("{rate:.digits$}"))
        };
        let roof = percent(self.roofline);
        outln!(
            "{first:<26} {second:<16} {:>10} {:>9.3} {:>7} {:>8.2} {:>8} {roof:>5}",
            self.seconds.map_or("–".to_owned(), time),
            self.bytes as f64 * 1e-6,
            rate(self.bytes, 1),
            self.flops as f64 * 1e-6,
            rate(self.flops, 1),
        );
        Ok(())
    }
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 {
        format!("{:.1} µs", seconds * 1e6)
    } else {
        format!("{:.2} ms", seconds * 1e3)
    }
}
