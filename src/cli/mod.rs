//! The commands of the program, one file each.
//!
//! Results go to stdout, progress and logs to stderr. Every command returns its exit code or an
//! error that `main` prints as one line with its causes below.

pub mod data;
pub mod demo;
pub mod evaluate;
pub mod features;
pub mod gradcheck;
pub mod pack;
pub mod phantom;
pub mod predict;
pub mod progress;
pub mod summary;
pub mod train;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand, ValueEnum};

use crate::metrics::DatasetMetrics;

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
    Demo(demo::Args),
    Train(train::Args),
    Evaluate(evaluate::Args),
    Predict(predict::Args),
    Features(features::Args),
    Phantom(phantom::Args),
    Pack(pack::Args),
    Summary(summary::Args),
    Gradcheck(gradcheck::Args),
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
            Command::Demo(args) => args.run(),
            Command::Train(args) => args.run(),
            Command::Evaluate(args) => args.run(),
            Command::Predict(args) => args.run(),
            Command::Features(args) => args.run(),
            Command::Phantom(args) => args.run(),
            Command::Pack(args) => args.run(),
            Command::Summary(args) => args.run(),
            Command::Gradcheck(args) => args.run(),
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

/// `KEY=VALUE`, split at the first equals sign.
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// The name of a flag's value, as the configuration spells it too.
fn name_of(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |v| v.get_name().to_owned())
}

/// Results as lines of text: a row per data set.
fn metrics_table(rows: &[(&str, &DatasetMetrics)]) -> String {
    let mut text = format!(
        "{:<12} {:>5}  {:<21} {:>6} {:>8}  {:<21} {:>6} {:>6} {:>7}\n",
        "data set", "n", "Dice", "IoU", "HD95 px", "AUC", "sens.", "spec.", "FP rate"
    );
    let figure = |value: Option<f64>| value.map_or("–".into(), |v| format!("{v:.3}"));
    let interval = |value: Option<f64>, ci: Option<[f64; 2]>| match (value, ci) {
        (Some(value), Some([low, high])) => format!("{value:.3} ({low:.3}–{high:.3})"),
        (value, _) => figure(value),
    };
    for (name, m) in rows {
        let (s, c) = (m.segmentation.as_ref(), m.classification.as_ref());
        let dice = s.map(|s| &s.dice);
        let auc = c.and_then(|c| c.auc.as_ref());
        text += &format!(
            "{name:<12} {:>5}  {:<21} {:>6} {:>8}  {:<21} {:>6} {:>6} {:>7}\n",
            m.n,
            interval(dice.map(|d| d.mean), dice.and_then(|d| d.ci95)),
            figure(s.map(|s| s.iou.mean)),
            s.map_or("–".into(), |s| format!("{:.1}", s.hd95_px.mean)),
            interval(auc.map(|a| a.value), auc.and_then(|a| a.ci95)),
            figure(c.and_then(|c| c.sensitivity)),
            figure(c.and_then(|c| c.specificity)),
            figure(m.normals.as_ref().map(|n| n.false_positive_rate)),
        );
    }
    text
}
