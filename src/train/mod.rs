//! Training, evaluation and prediction: what the commands of those names do.
//!
//! [`run::train`] writes a folder RUN: `config.toml`, `manifest.json` (data, split, machine),
//! `metrics.csv` (a row per epoch), `best.safetensors` and `last.safetensors` (all of the run's state),
//! and the best weights' metrics on the validation fold in `validation/`. [`evaluate::evaluate`] and
//! [`predict::predict`] read it.

pub mod checkpoint;
pub mod config;
pub mod evaluate;
pub mod model;
pub mod predict;
pub mod pretrained;
pub mod run;
mod saver;
pub mod schedule;
pub mod step;
mod validation;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::data::{self, Source};
use crate::error::{Error, Result};

pub use config::Config;
pub use model::Model;

/// Where long work tells how it goes.
pub trait Report: Sync {
    /// A line worth keeping.
    fn line(&self, text: &str) {
        let _ = text;
    }

    /// An epoch of `epochs` is over; `best` if it is the best so far.
    fn epoch(&self, epoch: &run::Epoch, epochs: u64, best: bool) {
        let show = |name: &str, value: Option<f64>| {
            value.map_or(String::new(), |value| format!("  {name} {value:.3}"))
        };
        self.line(&format!(
            "epoch {:>3}/{epochs}  loss {:.4}{}{}  {:.1} s{}",
            epoch.epoch,
            epoch.loss,
            show("validation Dice", epoch.val_dice),
            show("AUC", epoch.val_auc),
            epoch.seconds,
            if best { "  best" } else { "" },
        ));
    }

    /// `done` of `total` pieces of `what` are finished; `message` says how it goes.
    fn progress(&self, what: &str, done: u64, total: u64, message: &str) {
        let _ = (what, done, total, message);
    }
}

/// Whether to stop: [`Error::Interrupted`] once the flag is set.
pub(crate) fn stop(interrupt: &AtomicBool) -> Result<()> {
    if interrupt.load(Ordering::SeqCst) {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

/// Silence.
impl Report for () {}

/// The cases to work with, and all images left out: by the reader, and exact duplicates if asked for.
/// Both, and every group of duplicates, are reported by name.
pub(crate) fn select(
    source: &dyn Source,
    drop_duplicates: bool,
    report: &dyn Report,
) -> (Vec<usize>, Vec<data::Drop>) {
    let cases = source.cases();
    for group in data::duplicates(cases) {
        let names: Vec<_> = group.iter().map(|&i| cases[i].image.as_str()).collect();
        report.line(&format!("the same bytes: {}", names.join(", ")));
    }
    let (subset, duplicates) = match drop_duplicates {
        true => data::without_duplicates(cases),
        false => ((0..cases.len()).collect(), Vec::new()),
    };
    let drops = [source.drops(), &duplicates].concat();
    for drop in &drops {
        report.line(&format!("left out {}: {}", drop.file, drop.reason));
    }
    (subset, drops)
}
