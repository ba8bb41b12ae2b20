//! The commands of the program, one file each.
//!
//! Results go to stdout, progress and logs to stderr. Every command returns its exit code or an
//! error that `main` prints as one line with its causes below.

pub mod data;
pub mod features;
pub mod gradcheck;
pub mod pack;
pub mod progress;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand};

/// Sides of letterboxed images that are accepted, in pixels.
const SIZE_RANGE: std::ops::RangeInclusive<i64> = 16..=4096;

/// The command line.
#[derive(Parser, Debug)]
#[command(
    name = "echograd",
    version,
    about = "Breast-ultrasound segmentation and classification, tied together by differentiable BI-RADS features",
    long_about = "Trains a network that outlines a breast tumour and calls it benign or malignant, with the two tasks \
        tied together by four shape features computed from the soft mask; tests it on data from other \
        hospitals. No Python, no GPU needed. Research software, no medical device.",
    after_help = "First steps:\n  \
        echograd demo                                       train and test on synthetic phantoms, open demo/index.html\n  \
        echograd features --data breast:PATH                shape features of every ground-truth mask, AUC of each\n  \
        echograd train --data breast:PATH --arm consistency --out runs/a\n  \
        echograd evaluate runs/a --data busi:PATH --out runs/a/busi\n\n\
        Data sets are named NAME:PATH, NAME being breast, busi, uclm, udiat, busbra, folder (your own images) or pack.",
    propagate_version = true
)]
pub struct Cli {
    /// Threads to use; results do not depend on it [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Features(features::Args),
    Gradcheck(gradcheck::Args),
    Pack(pack::Args),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// Whatever the command meets.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads.into())
                .build_global()?;
        }
        match self.command {
            Command::Features(args) => args.run(),
            Command::Gradcheck(args) => args.run(),
            Command::Pack(args) => args.run(),
        }
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The flag that Ctrl-C and termination signals set from now on. A second signal ends the program at
/// once: whoever presses twice does not want to wait.
///
/// # Errors
/// If the signal handler cannot be installed.
pub fn interrupt() -> anyhow::Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; press Ctrl-C again to stop at once without saving");
    })?;
    Ok(&INTERRUPTED)
}
