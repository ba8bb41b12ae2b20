//! The commands of the program, one file each.
//!
//! Results go to stdout, progress and logs to stderr. Every command returns its exit code or an
//! error that `main` prints as one line with its causes below.

/// A line of results on stdout; returns from the function if it cannot be written.
macro_rules! outln {
    ($($text:tt)*) => {
        $crate::cli::print(format_args!("{}\n", format_args!($($text)*)))?
    };
}

/// A line for whoever watches, on stderr. That nobody reads it any more stops no work.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

pub mod compare;
pub mod data;
pub mod demo;
pub mod doctor;
pub mod evaluate;
pub mod export;
pub mod features;
pub mod gradcheck;
pub mod overview;
pub mod pack;
pub mod phantom;
pub mod predict;
pub mod profile;
pub mod progress;
pub mod study;
pub mod summary;
pub mod train;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand, ValueEnum};

use crate::device::simd::Level;
use crate::error::Error;
use crate::metrics::DatasetMetrics;
use crate::report::number::{figure, rounded};

/// Sides of letterboxed images that are accepted, in pixels.
const SIZE_RANGE: std::ops::RangeInclusive<i64> = 16..=4096;

/// Seeds that are accepted: TOML's integers end here.
const SEED_RANGE: std::ops::RangeInclusive<u64> = 0..=i64::MAX as u64;

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
        echograd demo                          train and test on phantoms; open demo/index.html\n  \
        echograd features --data breast:PATH   shape features of all masks, AUC of each\n  \
        echograd train --data breast:PATH --arm consistency --out runs/a\n  \
        echograd evaluate runs/a --data busi:PATH --out runs/a/busi\n\n\
        Data sets are named NAME:PATH, NAME being breast, busi, uclm, udiat, busbra, \
        folder (your own images) or pack.",
    propagate_version = true
)]
pub struct Cli {
    /// Threads to use; results do not depend on it [default: all cores]
    #[arg(long, global = true, display_order = 100, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::Args),
    Train(train::Args),
    Evaluate(evaluate::Args),
    Predict(predict::Args),
    Export(export::Args),
    Study(study::Args),
    Search(study::SearchCommand),
    Compare(compare::Args),
    Features(features::Args),
    Phantom(phantom::Args),
    Pack(pack::Args),
    Summary(summary::Args),
    Doctor(doctor::Args),
    Gradcheck(gradcheck::Args),
    Profile(profile::Args),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// Whatever the command meets.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(wanted) = std::env::var_os("ECHOGRAD_ISA") {
            let known: Vec<&str> = Level::available().map(Level::name).collect();
            if !known.iter().any(|name| wanted == **name) {
                let problem = format!(
                    "expected an instruction set of this machine ({}), found {wanted:?}",
                    known.join(", ")
                );
                return Err(Error::argument("ECHOGRAD_ISA", problem).into());
            }
        }
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads.into())
                .build_global()?;
        }
        match self.command {
            Command::Demo(args) => args.run(),
            Command::Train(args) => args.run(),
            Command::Evaluate(args) => args.run(),
            Command::Predict(args) => args.run(),
            Command::Export(args) => args.run(),
            Command::Study(args) => args.run(),
            Command::Search(args) => args.run(),
            Command::Compare(args) => args.run(),
            Command::Features(args) => args.run(),
            Command::Phantom(args) => args.run(),
            Command::Pack(args) => args.run(),
            Command::Summary(args) => args.run(),
            Command::Doctor(args) => args.run(),
            Command::Gradcheck(args) => args.run(),
            Command::Profile(args) => args.run(),
        }
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The flag that Ctrl-C and termination signals set from now on; work looks at it between its pieces,
/// so that files are finished or never begun. A second signal ends the program at once: whoever
/// presses twice does not want to wait.
///
/// # Errors
/// If the signal handler cannot be installed.
pub fn interrupt() -> anyhow::Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        // On a terminal the cursor stands behind a progress bar.
        let clear = if std::io::stderr().is_terminal() {
            "\r\x1b[K"
        } else {
            ""
        };
        note!("{clear}stopping; Ctrl-C again stops at once, without saving");
    })?;
    Ok(&INTERRUPTED)
}

/// Prints results.
fn print(text: std::fmt::Arguments) -> crate::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_fmt(text)
        .and_then(|()| out.flush())
        .map_err(|e| Error::caused("standard output", "cannot be written", e))
}

/// Prints results as one JSON document.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(print(format_args!("{text}\n"))?)
}

/// `KEY=VALUE`, split at the first equals sign.
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// Settings of a configuration: the flags that were given, under the keys that they set, then `--set`, which
/// overlays them.
fn settings<const N: usize>(
    flags: [(&str, Option<String>); N],
    set: &[(String, String)],
) -> Vec<(String, String)> {
    let given = flags
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)));
    given.chain(set.iter().cloned()).collect()
}

/// The name of a flag's value, as the configuration spells it too.
fn name_of(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |v| v.get_name().to_owned())
}

/// Results as lines of text that fit 80 columns for names of 14 letters: a row per data set. HD95 is in pixels, FPR the share of
/// normal images in which a lesion is seen.
fn metrics_table(rows: &[(&str, &DatasetMetrics)]) -> String {
    let names = rows.iter().map(|(name, _)| name.chars().count());
    let width = names.max().unwrap_or(0).max(9) + 1;
    let mut text = format!(
        "{:<width$}{:>5} {:<17}{:>6} {:<17}{:>6}{:>6}{:>6}\n",
        "data set", "n", "Dice", "HD95", "AUC", "sens", "spec", "FPR"
    );
    let interval = |value: Option<f64>, ci: Option<[f64; 2]>| match (value, ci) {
        (Some(value), Some([low, high])) => format!("{value:.3} ({low:.2}–{high:.2})"),
        (value, _) => figure(value),
    };
    for (name, m) in rows {
        let (s, c) = (m.segmentation.as_ref(), m.classification.as_ref());
        let dice = s.map(|s| &s.dice);
        let auc = c.and_then(|c| c.auc.as_ref());
        text += &format!(
            "{name:<width$}{:>5} {:<17}{:>6} {:<17}{:>6}{:>6}{:>6}\n",
            m.n,
            interval(dice.map(|d| d.mean), dice.and_then(|d| d.ci95)),
            rounded(s.map(|s| s.hd95_px.mean), 1),
            interval(auc.map(|a| a.value), auc.and_then(|a| a.ci95)),
            figure(c.and_then(|c| c.sensitivity)),
            figure(c.and_then(|c| c.specificity)),
            figure(m.normals.as_ref().map(|n| n.false_positive_rate)),
        );
    }
    text
}
