//! Where the time goes: each step of a plan, measured, beside the bytes and the arithmetic that it cannot do
//! without and what the machine does at best.
//!
//! Bytes are compulsory traffic: every input read once, every output written once, in the type that they
//! are stored in. A step's share of the roofline (Williams, Waterman, Patterson 2009) is the time in which
//! the machine could move those bytes or do that arithmetic, whichever is longer, over the time it took.

mod features;
mod roof;

use std::time::Instant;

use serde::Serialize;

use crate::device::cpu;
use crate::device::gpu::{self, Gpu};
use crate::error::{Error, Result};
use crate::ops::control;
use crate::tape::{self, Kind, Options, Plan, Slot, Tape, Value, Var};
use crate::tensor::Shape;

pub use features::{Block, fused, unfused};
pub use roof::{Roof, Sheet};

/// How a plan is profiled.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Replays that are timed, after one that is not. Each step's time is the median.
    pub iterations: usize,
    /// Activations are stored as bf16 (GPUs).
    pub narrow: bool,
    /// Results of a GPU are compared with the processor's first, which may take it long.
    pub compare: bool,
}

/// One launch of a step.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// Its name in `kernels/` and in other profilers.
    pub name: String,
    /// Blocks of the grid.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: [u32; 3],
    /// Registers of a thread; 0 where there are none.
    pub registers: u32,
    /// Shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Local memory of a thread (spills, stack), bytes.
    pub local_bytes: u32,
    /// Share of a multiprocessor's threads that can be resident at a time.
    pub occupancy: Option<f64>,
    /// Seconds, the median.
    pub seconds: Option<f64>,
    /// In the last replay.
    #[serde(skip)]
    last: Option<Span>,
}

/// A stretch of a replay, in seconds from its beginning.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: f64,
    seconds: f64,
}

/// One step.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Number in the plan.
    pub step: usize,
    /// The operation's name.
    pub operation: &'static str,
    /// Name of its first output.
    pub output: String,
    /// Dotted path of the layer that it belongs to; empty for the optimizer and whatever is in no layer.
    pub layer: String,
    /// Whether it belongs to the backward pass.
    pub backward: bool,
    /// N, H, W, C of its largest input or output.
    pub shape: [usize; 4],
    /// N, H, W, C of each input.
    pub inputs: Vec<[usize; 4]>,
    /// N, H, W, C of each output.
    pub outputs: Vec<[usize; 4]>,
    /// Compulsory traffic.
    pub bytes: u64,
    /// Arithmetic; a fused multiply-add counts two.
    pub flops: u64,
    /// Seconds, the median; none where time means nothing (the emulator).
    pub seconds: Option<f64>,
    /// Share of the roofline, 0 to 1; more where data stays in caches.
    pub roofline: Option<f64>,
    /// What was launched (GPUs).
    pub kernels: Vec<Kernel>,
    /// In the last replay (processor).
    #[serde(skip)]
    last: Option<Span>,
}

/// Sums over steps.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize)]
pub struct Sum {
    /// Number of steps.
    pub steps: usize,
    /// Compulsory traffic.
    pub bytes: u64,
    /// Arithmetic; a fused multiply-add counts two.
    pub flops: u64,
    /// Seconds; none if a step has none.
    pub seconds: Option<f64>,
    /// Share of the roofline: seconds in which the machine could do all steps, one after the other, over those
    /// that they took.
    pub roofline: Option<f64>,
}

impl Sum {
    /// Over `rows`.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let mut sum = Self {
            seconds: Some(0.0),
            ..Self::default()
        };
        let mut least = Some(0.0);
        for row in rows {
            sum.steps += 1;
            sum.bytes += row.bytes;
            sum.flops += row.flops;
            let both = row.seconds.zip(row.roofline);
            least = least.zip(both).map(|(sum, (s, share))| sum + s * share);
            sum.seconds = sum.seconds.zip(row.seconds).map(|(sum, s)| sum + s);
        }
        let share = least.zip(sum.seconds).filter(|&(_, seconds)| seconds > 0.0);
        sum.roofline = share.map(|(least, seconds)| least / seconds);
        sum
    }
}

/// A layer of a network in a training step.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Layer {
    /// Dotted path; empty for the optimizer and whatever is in no layer.
    pub layer: String,
    /// N, H, W, C of its result.
    pub shape: [usize; 4],
    /// Its forward pass.
    pub forward: Sum,
    /// Its backward pass, forward steps that are run again included.
    pub backward: Sum,
}

/// A measured plan.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// What was measured.
    pub title: String,
    /// The steps in order.
    pub rows: Vec<Row>,
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Seconds of one replay as a captured graph, from its first launch to its last, the median (GPUs).
    pub graph_seconds: Option<f64>,
    /// Largest distance of a kept result from the processor's, as a share of the largest element of its tensor
    /// (GPUs and the emulator), where they were compared.
    pub deviation: Option<f64>,
}

impl Profile {
    /// Seconds of one replay: the sum over the steps.
    pub fn seconds(&self) -> Option<f64> {
        self.rows.iter().map(|row| row.seconds).sum()
    }

    /// Launches of one replay (GPUs).
    pub fn launches(&self) -> usize {
        self.rows.iter().map(|row| row.kernels.len()).sum()
    }

    /// Compulsory traffic of one replay, step by step.
    pub fn bytes(&self) -> u64 {
        self.rows.iter().map(|row| row.bytes).sum()
    }

    /// Arithmetic of one replay.
    pub fn flops(&self) -> u64 {
        self.rows.iter().map(|row| row.flops).sum()
    }

    /// Sums over the steps of each layer, in the order in which layers first appear.
    pub fn layers(&self) -> Vec<Layer> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !names.contains(&row.layer.as_str()) {
                names.push(&row.layer);
            }
        }
        let layer = |name: &str| {
            let rows = || self.rows.iter().filter(|row| row.layer == name);
            let result = rows().rfind(|row| !row.backward);
            Layer {
                layer: name.to_owned(),
                shape: result.map_or([0; 4], |row| row.outputs[0]),
                forward: Sum::of(rows().filter(|row| !row.backward)),
                backward: Sum::of(rows().filter(|row| row.backward)),
            }
        };
        names.into_iter().map(layer).collect()
    }

    /// The last replay as events of a Chrome trace, for Perfetto and `chrome://tracing`: one a step or, on
    /// a GPU, one a kernel. `process` tells several profiles of one trace apart.
    pub fn trace(&self, process: usize) -> Vec<serde_json::Value> {
        let event = |name: &str, row: &Row, span: Span| {
            serde_json::json!({
                "name": name, "cat": row.operation, "ph": "X", "pid": process, "tid": 0,
                "ts": span.start * 1e6, "dur": span.seconds * 1e6,
                "args": {
                    "step": row.step, "output": row.output, "shape": row.shape, "bytes": row.bytes,
                    "flops": row.flops, "roofline": row.roofline,
                },
            })
        };
        let title = serde_json::json!({
            "name": "process_name", "ph": "M", "pid": process, "args": { "name": self.title },
        });
        let mut events = vec![title];
        for row in &self.rows {
            events.extend(row.last.map(|span| event(row.operation, row, span)));
            let kernels = row.kernels.iter();
            events.extend(kernels.filter_map(|k| Some(event(&k.name, row, k.last?))));
        }
        events
    }
}

/// Steps without their times.
fn rows(plan: &Plan) -> Vec<Row> {
    let steps = plan.steps().iter().enumerate();
    steps
        .map(|(index, step)| {
            let values = || step.read.iter().chain(&step.write);
            let narrow = values().filter(|(slot, _)| slot.narrow);
            let saved: usize = narrow.map(|(slot, _)| 2 * slot.len).sum();
            let shape = values().map(|&(_, shape)| shape).max_by_key(|s| s.len());
            let output = step.outputs.first().map(|v| &plan.values()[v.index()]);
            // The optimizer writes the parameters of all layers.
            let layer = output.filter(|value| value.kind != Kind::Parameter);
            let extents = |s: Shape| [s.n, s.h, s.w, s.c];
            let all = |of: &[(Slot, Shape)]| of.iter().map(|&(_, s)| extents(s)).collect();
            Row {
                step: index,
                operation: step.op.name(),
                output: output.map_or_else(String::new, |value| value.name.clone()),
                layer: layer
                    .and_then(|value| tape::layer(&value.name))
                    .unwrap_or_default()
                    .to_owned(),
                backward: step.backward,
                shape: shape.map_or([0; 4], extents),
                inputs: all(&step.read),
                outputs: all(&step.write),
                bytes: (4 * step.cost.elements).saturating_sub(saved as u64),
                flops: step.cost.flops,
                seconds: None,
                roofline: None,
                kernels: Vec::new(),
                last: None,
            }
        })
        .collect()
}

/// Numbers that suit a value: a lesion for logits and masks, plausible settings for the control vector,
/// uniform in 0.05..0.95 otherwise.
fn fill(value: &Value) -> Vec<f32> {
    let shape = value.shape;
    if value.name == "control" {
        let mut settings = vec![0.0; shape.len()];
        settings[control::STEP] = 1.0;
        settings[control::LEARNING_RATE] = 1e-3;
        settings[control::RAMP] = 1.0;
        settings[control::EMA_DECAY] = 0.99;
        return settings;
    }
    let centred = |i: usize, n: usize| (i % n) as f32 - (n as f32 - 1.0) / 2.0;
    let radius = shape.h.min(shape.w) as f32 / 4.0;
    let inside = |i: usize| radius - centred(i, shape.w).hypot(centred(i / shape.w, shape.h));
    let uniform = |i: usize| {
        let hash = (i as u32).wrapping_mul(0x9e37_79b9) >> 8;
        0.05 + 0.9 * hash as f32 / (1 << 24) as f32
    };
    let element = |i: usize| match value.name.as_str() {
        "logits" => inside(i) / 4.0,
        "truth" => f32::from(u8::from(inside(i) > -5.0)),
        _ => uniform(i),
    };
    (0..shape.len()).map(element).collect()
}

/// What is written before a replay, one value after the other.
fn persistent(tape: &Tape) -> impl Iterator<Item = (Var, Vec<f32>)> {
    let kinds = [Kind::Input, Kind::Parameter, Kind::State];
    let vars = kinds.into_iter().flat_map(|kind| tape.of_kind(kind));
    vars.map(|v| (v, fill(&tape.values()[v.index()])))
}

/// Largest distance of the kept results from those of the processor, where all that the device stores as bf16 is
/// rounded likewise, as a share of the tensor's largest element.
fn deviation(session: &gpu::Session, tape: &Tape) -> Result<f64> {
    // All values are the tape's own, by which the device's plan knows them too.
    let options = Options {
        recompute: false,
        ..Options::default()
    };
    let mut reference = cpu::Session::<f32>::new(Plan::new(tape, options)?)?;
    let round = |var: Var, values: &mut [f32]| {
        if session.plan().slot(var).narrow {
            let round = |x: &mut f32| *x = half::bf16::from_f32(*x).to_f32();
            values.iter_mut().for_each(round);
        }
    };
    for (var, mut values) in persistent(tape) {
        round(var, &mut values);
        reference.write(var, &values);
    }
    reference.run_rounded(round);
    let mut worst = 0.0f64;
    for var in tape.of_kind(Kind::Computed) {
        if !tape.values()[var.index()].kept {
            continue;
        }
        let (found, expected) = (session.read(var)?, reference.read(var));
        let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (a, b) in found.iter().zip(expected) {
            let error = if a == b {
                0.0
            } else {
                f64::from((a - b).abs() / largest)
            };
            // Keeps a NaN.
            worst = if error <= worst { worst } else { error };
        }
    }
    Ok(worst)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What each step launches, without times.
fn list_kernels(rows: &mut [Row], gpu: &Gpu, session: &gpu::Session) -> Result<()> {
    let device = gpu.description();
    for launch in session.launches() {
        let (function, grid) = (&launch.function, launch.grid);
        let blocks = gpu.occupancy(launch)?;
        let threads: u32 = grid.threads.iter().product();
        let resident = f64::from(blocks * threads) / f64::from(device.threads);
        rows[launch.step].kernels.push(Kernel {
            name: function.name.to_string(),
            blocks: grid.blocks,
            threads: grid.threads,
            registers: function.registers,
            shared_bytes: function.shared + grid.shared,
            local_bytes: function.local,
            occupancy: (device.threads > 0).then_some(resident),
            seconds: None,
            last: None,
        });
    }
    Ok(())
}

/// Share of the roofline of each measured row.
fn compare(rows: &mut [Row], roof: &Roof) {
    for row in rows {
        row.roofline = row.seconds.map(|s| roof.seconds(row.bytes, row.flops) / s);
    }
}

/// Seconds that a kernel of a graph takes at least, however little it does: its launch and its first and last
/// accesses to memory.
pub const LEAST: f64 = 2e-6;

/// Predicts a tape's times on a GPU that is not there: of each step the time at the roof, at least [`LEAST`], and as
/// much again for each launch of it but the first. Kernels that do not reach the roof take longer.
///
/// # Errors
/// If the plan cannot be addressed, or an operation has no kernel.
pub fn predict(title: &str, tape: &Tape, narrow: bool, roof: &Roof) -> Result<Profile> {
    let plan = Plan::new(tape, Options::gpu(narrow))?;
    let mut rows = rows(&plan);
    let gpu = Gpu::outline();
    let session = gpu::Session::new(&gpu, plan)?;
    list_kernels(&mut rows, &gpu, &session)?;
    for row in &mut rows {
        let more = row.kernels.len().saturating_sub(1) as f64;
        row.seconds = Some(roof.seconds(row.bytes, row.flops).max(LEAST) + more * LEAST);
    }
    compare(&mut rows, roof);
    Ok(Profile {
        title: title.to_owned(),
        rows,
        arena_bytes: session.bytes(),
        graph_seconds: None,
        deviation: None,
    })
}

/// Measures a tape on the processor.
///
/// # Errors
/// If the plan does not fit into memory.
pub fn on_cpu(title: &str, tape: &Tape, settings: Settings, roof: &Roof) -> Result<Profile> {
    let plan = Plan::new(tape, Options::default())?;
    let mut rows = rows(&plan);
    let arena_bytes = plan.len() * size_of::<f32>();
    let mut session = cpu::Session::<f32>::new(plan)?;
    persistent(tape).for_each(|(var, values)| session.write(var, &values));
    session.run();
    let mut times = vec![Vec::new(); rows.len()];
    for _ in 0..settings.iterations {
        let start = Instant::now();
        let mut before = 0.0;
        session.run_observed(|step| {
            let now = start.elapsed().as_secs_f64();
            let seconds = now - before;
            times[step].push(seconds);
            rows[step].last = Some(Span {
                start: before,
                seconds,
            });
            before = now;
        });
    }
    for (row, times) in rows.iter_mut().zip(times) {
        row.seconds = Some(median(times));
    }
    compare(&mut rows, roof);
    Ok(Profile {
        title: title.to_owned(),
        rows,
        arena_bytes,
        graph_seconds: None,
        deviation: None,
    })
}

/// Measures a tape on a GPU, its caches emptied before each replay. On the emulator one replay shows what
/// would be launched, without times (`roof` is none).
///
/// # Errors
/// [`Error::NoKernel`] if an operation has no kernel, [`Error::Device`] if there is not enough memory, a
/// kernel did something wrong, or results differ.
pub fn on_gpu(
    title: &str,
    tape: &Tape,
    gpu: &Gpu,
    settings: Settings,
    roof: Option<&Roof>,
) -> Result<Profile> {
    let plan = Plan::new(tape, Options::gpu(settings.narrow))?;
    let mut rows = rows(&plan);
    let mut session = gpu::Session::new(gpu, plan)?;
    for (var, values) in persistent(tape) {
        session.write(var, &values)?;
    }
    session.run()?;
    let compared = settings.compare.then(|| deviation(&session, tape));
    let deviation = compared.transpose()?;
    let most = if settings.narrow { 0.03 } else { 1e-3 };
    if let Some(found) = deviation
        && (found.is_nan() || found > most)
    {
        let problem = format!(
            "results off the processor's by {found:.1e} of the largest, expected at most {most:.0e}"
        );
        return Err(Error::device(title, problem));
    }
    let mut graph_seconds = None;
    list_kernels(&mut rows, gpu, &session)?;
    if let Some(roof) = roof {
        let device = gpu.description();
        let flush = gpu.memory(2 * device.l2 as usize)?;
        let launches = session.launches().len();
        let mut times = vec![Vec::new(); launches];
        let mut last = vec![None; launches];
        // The host queues a launch in less time than a clear takes.
        let ahead = || (0..4 + launches / 4).try_for_each(|_| flush.clear());
        for _ in 0..settings.iterations {
            let timed = session.run_timed(ahead)?;
            for ((times, last), timed) in times.iter_mut().zip(&mut last).zip(timed) {
                let (start, seconds) =
                    (1e-3 * f64::from(timed.start), 1e-3 * f64::from(timed.time));
                times.push(seconds);
                *last = Some(Span { start, seconds });
            }
        }
        let mut measured = times.into_iter().map(median).zip(last);
        for row in &mut rows {
            for (kernel, (seconds, last)) in row.kernels.iter_mut().zip(&mut measured) {
                (kernel.seconds, kernel.last) = (Some(seconds), last);
            }
            row.seconds = row.kernels.iter().map(|kernel| kernel.seconds).sum();
        }
        compare(&mut rows, roof);
        let graph = session.capture()?;
        let times: Result<Vec<f64>> = (0..settings.iterations)
            .map(|_| Ok(1e-3 * f64::from(graph.time(ahead)?)))
            .collect();
        graph_seconds = Some(median(times?));
    }
    Ok(Profile {
        title: title.to_owned(),
        rows,
        arena_bytes: session.bytes(),
        graph_seconds,
        deviation,
    })
}
