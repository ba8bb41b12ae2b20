//! `echograd summary`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::SIZE_RANGE;
use crate::tape::{self, Kind, Options, Plan, Step, Tape, Var};
use crate::tensor::Shape;
use crate::train::Config;
use crate::train::config::{Arm, Preset};
use crate::train::model::CONFIG;
use crate::train::step::{Evaluation, TrainingStep};

/// Show a network's layers, parameters, arithmetic and memory
///
/// A tree of the network's layers in evaluation: output, kernel, parameters, and multiplications with addition (mult-adds) of
/// convolutions; those of a branch are sums. Below, totals as torchinfo gives them (MB are 10^6 bytes; forward/backward counts
/// every operation's result twice) and what a training step here needs. Nothing is computed.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A run's folder; without it, a preset
    #[arg(value_name = "RUN", conflicts_with = "preset")]
    run: Option<PathBuf>,
    /// Named defaults [default: unet]
    #[arg(long)]
    preset: Option<Preset>,
    /// What is trained [default: consistency]
    #[arg(long)]
    arm: Option<Arm>,
    /// Side of the images in pixels [default: the preset's; tiny 64, unet 128, efficientnet-b1 256]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u16).range(SIZE_RANGE))]
    size: Option<u16>,
    /// Images per step [default: 16]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Overlay one value, e.g. --set model.widths=[32,64,128,256,512]
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::key_value)]
    set: Vec<(String, String)>,
    /// Show the tree to this depth [default: all of it]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    depth: Option<u16>,
    /// Print every step of the training step's plan: operation, output, shape, bytes moved, memory alive, FLOPs
    #[arg(long)]
    plan: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// One operation of the network.
#[derive(Debug, Serialize)]
struct Operation {
    /// Dotted path of the layer that it belongs to.
    name: String,
    operation: &'static str,
    output: [usize; 4],
    /// Rows and columns of a convolution's kernel.
    kernel: Option<[usize; 2]>,
    parameters: usize,
    /// Of a convolution or linear map.
    multiply_adds: u64,
    flops: u64,
}

#[derive(Debug, Serialize)]
struct Summary {
    layers: Vec<Operation>,
    parameters: usize,
    trainable_parameters: usize,
    /// Running means and variances.
    statistics: usize,
    multiply_adds: u64,
    /// Of the images.
    input_bytes: usize,
    /// Of every operation's result, and of as many gradients.
    forward_backward_bytes: usize,
    parameter_bytes: usize,
    forward_flops: u64,
    step_flops: u64,
    /// Memory of the training step in bytes, parameters and optimizer included.
    step_bytes: usize,
    /// The part of it that persists: inputs, parameters, optimizer, averages.
    persistent_bytes: usize,
    batch: usize,
    size: usize,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If a flag or the run's configuration is wrong.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let config = self.config()?;
        let network = Evaluation::record(&config)?;
        let step = TrainingStep::record(&config, config.arm == Arm::Consistency)?;
        let plan = Plan::new(&step.tape, Options::default())?;
        if self.plan {
            super::print(format_args!("{plan}"))?;
            return Ok(ExitCode::SUCCESS);
        }
        let count = |tape: &Tape, kind| -> usize {
            let own = tape.of_kind(kind).filter(|&v| {
                // The prior and the optimizer are no part of the network.
                network.tape.find(kind, tape.name(v)).is_some()
            });
            own.map(|v| tape.shape(v).len()).sum()
        };
        let layers = operations(&network.tape);
        let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
        let outputs: usize = layers.iter().map(|layer| elements(layer.output)).sum();
        let parameters = count(&network.tape, Kind::Parameter);
        let summary = Summary {
            parameters,
            trainable_parameters: count(&step.tape, Kind::Parameter),
            statistics: count(&network.tape, Kind::State),
            multiply_adds: layers.iter().map(|layer| layer.multiply_adds).sum(),
            input_bytes: network.tape.shape(network.images).len() * size_of::<f32>(),
            forward_backward_bytes: 2 * outputs * size_of::<f32>(),
            parameter_bytes: parameters * size_of::<f32>(),
            forward_flops: layers.iter().map(|layer| layer.flops).sum(),
            step_flops: plan.flops(),
            step_bytes: plan.len() * size_of::<f32>(),
            persistent_bytes: plan.persistent() * size_of::<f32>(),
            batch: config.batch,
            size: config.size,
            layers,
        };
        if self.json {
            super::print_json(&summary)?;
        } else {
            let depth = self.depth.map_or(usize::MAX, usize::from);
            print(&summary, &super::name_of(&config.preset), depth)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn config(&self) -> crate::Result<Config> {
        let given = [
            ("preset", self.preset.map(|v| super::name_of(&v))),
            ("arm", self.arm.map(|v| super::name_of(&v))),
            ("size", self.size.map(|v| v.to_string())),
            ("batch", self.batch.map(|v| v.to_string())),
        ];
        let settings = super::settings(given, &self.set);
        let file = self.run.as_deref().map(|run: &Path| run.join(CONFIG));
        Config::load(file.as_deref(), &settings)
    }
}

/// The steps of a network's tape with the parameters that each reads.
fn operations(tape: &Tape) -> Vec<Operation> {
    let operation = |step: &Step| {
        let shapes = |vars: &[Var]| vars.iter().map(|&v| tape.shape(v)).collect::<Vec<_>>();
        let output = shapes(&step.outputs)[0];
        let learned: Vec<Shape> = (step.inputs.iter())
            .filter(|v| tape.values()[v.index()].kind == Kind::Parameter)
            .map(|&v| tape.shape(v))
            .collect();
        // Linear maps are convolutions too.
        let convolves = step.op.name().contains("conv");
        let weight = learned.first().filter(|_| convolves);
        let flops = step.op.flops(&shapes(&step.inputs), &shapes(&step.outputs));
        Operation {
            name: tape::layer(tape.name(step.outputs[0]))
                .unwrap_or_default()
                .to_owned(),
            operation: step.op.name(),
            output: [output.n, output.h, output.w, output.c],
            kernel: weight.map(|w| [w.h, w.w]),
            parameters: learned.iter().map(Shape::len).sum(),
            // Every output takes all weights of its channel, biases and statistics left out.
            multiply_adds: weight.map_or(0, |w| (output.len() * (w.len() / w.n)) as u64),
            flops,
        }
    };
    tape.steps().iter().map(operation).collect()
}

/// A layer in the tree.
#[derive(Default)]
struct Layer<'a> {
    name: String,
    parts: Vec<Part<'a>>,
}

enum Part<'a> {
    Layer(Layer<'a>),
    Operation(&'a Operation),
}

impl<'a> Layer<'a> {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            parts: Vec::new(),
        }
    }

    fn add(&mut self, path: &[&str], operation: &'a Operation) {
        let Some((first, rest)) = path.split_first() else {
            return self.parts.push(Part::Operation(operation));
        };
        let known = self
            .parts
            .iter()
            .position(|part| matches!(part, Part::Layer(layer) if layer.name == *first));
        let at = known.unwrap_or_else(|| {
            self.parts.push(Part::Layer(Layer::new(first)));
            self.parts.len() - 1
        });
        if let Part::Layer(layer) = &mut self.parts[at] {
            layer.add(rest, operation);
        }
    }

    /// All operations in it, in order.
    fn operations(&self) -> Vec<&'a Operation> {
        let each = self.parts.iter().flat_map(|part| match part {
            Part::Layer(layer) => layer.operations(),
            Part::Operation(operation) => vec![*operation],
        });
        each.collect()
    }

    /// Appends the rows of this layer, which stands behind `indent` and `branch`, and of `depth` levels below it.
    fn rows(&self, indent: &str, branch: &str, depth: usize, rows: &mut Vec<(String, Figures)>) {
        // A layer that only holds another is one with it.
        let (mut layer, mut name) = (self, self.name.clone());
        while let [Part::Layer(only)] = &layer.parts[..] {
            name = format!("{name}.{}", only.name);
            layer = only;
        }
        let operations = layer.operations();
        let leaf = |part: &Part| matches!(part, Part::Operation(_));
        // Parameters and what follows them directly are one row.
        let learns = operations.len() == 1 || operations[0].parameters > 0;
        let only_operations = learns && layer.parts.iter().all(leaf);
        if only_operations {
            let names: Vec<&str> = operations.iter().map(|o| o.operation).collect();
            name = format!("{name}: {}", names.join("+"));
        }
        rows.push((
            format!("{indent}{branch}{name}"),
            Figures::of(&operations, only_operations),
        ));
        if only_operations || depth == 0 {
            return;
        }
        let indent = match branch {
            "" => indent.to_owned(),
            "└─" => format!("{indent}  "),
            _ => format!("{indent}│ "),
        };
        for (i, part) in layer.parts.iter().enumerate() {
            let branch = if i + 1 == layer.parts.len() {
                "└─"
            } else {
                "├─"
            };
            match part {
                Part::Layer(layer) => layer.rows(&indent, branch, depth - 1, rows),
                Part::Operation(operation) => rows.push((
                    format!("{indent}{branch}{}", operation.operation),
                    Figures::of(&[operation], true),
                )),
            }
        }
    }
}

/// What stands behind a layer's name.
struct Figures {
    output: String,
    kernel: String,
    parameters: usize,
    multiply_adds: u64,
}

impl Figures {
    fn of(operations: &[&Operation], leaf: bool) -> Self {
        let last = operations.last();
        let [n, h, w, c] = last.map_or([0; 4], |last| last.output);
        let kernel = operations.iter().find_map(|o| o.kernel);
        Self {
            output: format!("{n}×{h}×{w}×{c}"),
            kernel: match kernel.filter(|_| leaf) {
                Some([rows, columns]) => format!("{rows}×{columns}"),
                None => String::new(),
            },
            parameters: operations.iter().map(|o| o.parameters).sum(),
            multiply_adds: operations.iter().map(|o| o.multiply_adds).sum(),
        }
    }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let group = |(i, digit): (usize, char)| {
        let comma = i > 0 && (digits.len() - i).is_multiple_of(3);
        [comma.then_some(','), Some(digit)].into_iter().flatten()
    };
    digits.chars().enumerate().flat_map(group).collect()
}

fn print(summary: &Summary, name: &str, depth: usize) -> crate::Result<()> {
    let mut network = Layer::new(name);
    for operation in &summary.layers {
        let path: Vec<&str> = operation.name.split('.').collect();
        network.add(&path, operation);
    }
    let mut rows = Vec::new();
    network.rows("", "", depth, &mut rows);
    let widths = rows.iter().map(|(name, _)| name.chars().count());
    let width = widths.max().unwrap_or(0).max(24);
    let rule = "─".repeat(width + 43);
    outln!(
        "{:<width$} {:<14} {:>6} {:>9} {:>10}",
        "layer",
        "output N×H×W×C",
        "kernel",
        "params",
        "mult-adds"
    );
    outln!("{rule}");
    let or_dash = |zero: bool, text: String| if zero { "–".to_owned() } else { text };
    for (name, figures) in rows {
        let Figures {
            output,
            kernel,
            parameters,
            multiply_adds,
        } = figures;
        outln!(
            "{name:<width$} {output:<14} {kernel:>6} {:>9} {:>10}",
            or_dash(parameters == 0, grouped(parameters as u64)),
            or_dash(
                multiply_adds == 0,
                format!("{:.2} M", multiply_adds as f64 / 1e6)
            )
        );
    }
    outln!("{rule}");
    let count = |what: &str, number: usize| {
        outln!("{what:<34} {:>12}", grouped(number as u64));
        crate::Result::Ok(())
    };
    let figure = |what: &str, number: f64| {
        outln!("{what:<34} {number:>12.2}");
        crate::Result::Ok(())
    };
    let mb = |bytes: usize| bytes as f64 / 1e6;
    let trainable = summary.trainable_parameters;
    count("Total params", summary.parameters)?;
    count("Trainable params", trainable)?;
    count("Non-trainable params", summary.parameters - trainable)?;
    count("Running statistics", summary.statistics)?;
    figure("Total mult-adds (G)", summary.multiply_adds as f64 / 1e9)?;
    let total = summary.input_bytes + summary.forward_backward_bytes + summary.parameter_bytes;
    figure("Input size (MB)", mb(summary.input_bytes))?;
    figure(
        "Forward/backward pass size (MB)",
        mb(summary.forward_backward_bytes),
    )?;
    figure("Params size (MB)", mb(summary.parameter_bytes))?;
    figure("Estimated total size (MB)", mb(total))?;
    outln!("{rule}");
    let size = format!("{} images of {}²", summary.batch, summary.size);
    outln!("a training step here, {size}, by its plan");
    figure(
        "  arithmetic, forward alone (GFLOP)",
        summary.forward_flops as f64 / 1e9,
    )?;
    figure("  arithmetic (GFLOP)", summary.step_flops as f64 / 1e9)?;
    figure(
        "  parameters, optimizer, input (MB)",
        mb(summary.persistent_bytes),
    )?;
    figure("  memory in all (MB)", mb(summary.step_bytes))
}
