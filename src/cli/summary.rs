//! `echograd summary`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::SIZE_RANGE;
use crate::tape::{Kind, Options, Plan, Tape};
use crate::train::Config;
use crate::train::config::{Arm, Preset};
use crate::train::model::CONFIG;
use crate::train::step::{Evaluation, TrainingStep};

/// Show a network's layers, parameters, arithmetic and memory
///
/// One line per operation of the network in evaluation, then what a training step needs. Nothing is computed.
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
    /// Print every step of the training step's plan: operation, output, shape, bytes moved, memory alive, FLOPs
    #[arg(long)]
    plan: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// One operation of the network.
#[derive(Debug, Serialize)]
struct Layer {
    name: String,
    operation: &'static str,
    output: [usize; 4],
    parameters: usize,
    flops: u64,
}

#[derive(Debug, Serialize)]
struct Summary {
    layers: Vec<Layer>,
    parameters: usize,
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
        let layers = layers(&network.tape);
        let parameters = network
            .tape
            .of_kind(Kind::Parameter)
            .map(|v| network.tape.shape(v).len());
        let summary = Summary {
            parameters: parameters.sum(),
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
            print(&summary)?;
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
fn layers(tape: &Tape) -> Vec<Layer> {
    let layer = |step: &crate::tape::Step| {
        let shapes =
            |vars: &[crate::tape::Var]| vars.iter().map(|&v| tape.shape(v)).collect::<Vec<_>>();
        let values = || {
            step.inputs
                .iter()
                .map(|v| (&tape.values()[v.index()], tape.shape(*v)))
        };
        let learned = || values().filter(|(value, _)| value.kind == Kind::Parameter);
        // The layer's name is that of its parameters without their own last part.
        let name = learned()
            .next()
            .and_then(|(value, _)| value.name.rsplit_once('.'));
        let output = shapes(&step.outputs)[0];
        Layer {
            name: name.map_or_else(String::new, |(layer, _)| layer.to_owned()),
            operation: step.op.name(),
            output: [output.n, output.h, output.w, output.c],
            parameters: learned().map(|(_, shape)| shape.len()).sum(),
            flops: step.op.flops(&shapes(&step.inputs), &shapes(&step.outputs)),
        }
    };
    tape.steps().iter().map(layer).collect()
}

fn print(summary: &Summary) -> crate::Result<()> {
    outln!(
        "{:<22} {:<16} {:<16} {:>11} {:>10}",
        "layer",
        "operation",
        "output N×H×W×C",
        "parameters",
        "MFLOP"
    );
    for layer in &summary.layers {
        let [n, h, w, c] = layer.output;
        let parameters = match layer.parameters {
            0 => String::new(),
            count => count.to_string(),
        };
        outln!(
            "{:<22} {:<16} {:<16} {parameters:>11} {:>10.2}",
            layer.name,
            layer.operation,
            format!("{n}×{h}×{w}×{c}"),
            layer.flops as f64 / 1e6
        );
    }
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    outln!("parameters          {:>12}", summary.parameters);
    outln!(
        "forward             {:>12.3} GFLOP for a batch of {}",
        summary.forward_flops as f64 / 1e9,
        summary.batch
    );
    outln!(
        "training step       {:>12.3} GFLOP",
        summary.step_flops as f64 / 1e9
    );
    outln!(
        "memory of the step  {:>12.1} MiB, {:.1} of it parameters, optimizer, inputs",
        mib(summary.step_bytes),
        mib(summary.persistent_bytes)
    );
    Ok(())
}
