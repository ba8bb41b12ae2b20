//! `echograd export`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use crate::train::pretrained::{self, Naming};

/// Write a run's encoder for PyTorch: a safetensors file with the names of torchvision or timm
///
/// For runs of efficientnet-b1; the best network, its moving averages if the run kept them. There is no head behind the last
/// stage and no classifier, so load with strict=False. The whole network, in the names of echograd, is
/// RUN/best.safetensors, a safetensors file too. With --channels 3 the stem expects grey images as three equal channels,
/// normalised as torchvision's and timm's weights want it; with 1 intensities from 0 to 1, as in training.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's folder
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Whose names the tensors get
    #[arg(long, value_enum, default_value_t = Naming::Torchvision)]
    format: Naming,
    /// Channels of the stem: 3 or 1
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = channels)]
    channels: usize,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What was written.
#[derive(Serialize)]
struct Written {
    file: PathBuf,
    format: Naming,
    channels: usize,
    tensors: usize,
}

fn channels(text: &str) -> Result<usize, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        _ => Err("expected 1 or 3".to_owned()),
    }
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`pretrained::export`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let tensors = pretrained::export(&self.run, self.format, self.channels, &self.out)?;
        if self.json {
            super::print_json(&Written {
                file: self.out,
                format: self.format,
                channels: self.channels,
                tensors,
            })?;
        } else {
            outln!("{tensors} tensors in {}", self.out.display());
        }
        Ok(ExitCode::SUCCESS)
    }
}
