//! The networks of one method together: those of all its folds and seeds, whose masks and probabilities are averaged
//! before the threshold ([`Model::ensemble`]), and how far they are apart, which may tell where they are wrong.
//!
//! On targets only: of the source, each image was held out from the networks of one fold and trained the others.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::protocol::{Protocol, Run};
use super::{Missing, NORMALS, Opened, Watch, normals, or_missing, remove};
use crate::error::Result;
use crate::metrics::{Disagreement, PerImage, read_csv, write_csv};
use crate::train::evaluate::{RESULTS, examine, make_folder, write};
use crate::train::{Model, stop};

/// Name of the file with a row for each image and ensemble.
pub const ENSEMBLES: &str = "ensembles.csv";

/// Results of the networks of one method on one target.
#[derive(Clone, PartialEq, Debug)]
pub struct Ensemble {
    /// The method.
    pub arm: String,
    /// The data set: 0 is the source.
    pub set: usize,
    /// Folds and seeds of its networks.
    pub members: BTreeSet<(usize, u64)>,
    /// A row for each image.
    pub rows: Vec<PerImage>,
}

/// First columns of `ensembles.csv`; behind them stand those of [`PerImage`] and [`Disagreement`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Members {
    /// The method.
    pub arm: String,
    /// Number of networks.
    pub models: usize,
}

/// The folder of a method's ensemble, in which each target has its own.
pub(super) fn folder(study: &Path, arm: &str) -> PathBuf {
    study.join("runs").join(arm).join("ensemble")
}

/// Name of the file with the columns of [`Members`] and [`Disagreement`] in the folder of a target.
const DISAGREEMENT: &str = "disagreement.csv";

/// The ensembles of all methods, tested as far as they are not yet, and what could not be tested; `done` are the runs
/// that there are.
pub(super) fn all(
    plan: &Protocol,
    done: &[Run],
    out: &Path,
    sets: &[Opened],
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<(Vec<Ensemble>, Vec<Missing>)> {
    let (mut ensembles, mut missing) = (Vec::new(), Vec::new());
    for method in &plan.methods {
        let runs: Vec<&Run> = done.iter().filter(|run| run.arm == method.name).collect();
        if runs.len() < 2 {
            continue;
        }
        let members = Members {
            arm: method.name.clone(),
            models: runs.len(),
        };
        let runs_at: Vec<PathBuf> = runs.iter().map(|run| run.folder(out)).collect();
        let own = folder(out, &method.name);
        let mut model = None;
        for (set, opened) in sets.iter().enumerate().skip(1) {
            let folder = own.join(&opened.name);
            if !is_tested(&folder, &members)? {
                stop(interrupt)?;
                watch.ensemble(&method.name, &opened.name);
                let model = match &mut model {
                    Some(model) => model,
                    none => {
                        none.insert(Model::ensemble(&runs_at, method.config.device, usize::MAX)?)
                    }
                };
                let rows = examine(model, &*opened.source, &opened.subset, watch, interrupt);
                let what = format!("{}, ensemble", method.name);
                let Some(rows) = or_missing(rows, &what, set, opened, watch, &mut missing)? else {
                    continue;
                };
                make_folder(&folder)?;
                remove(&folder.join(RESULTS))?;
                write_csv(&folder.join(NORMALS), &normals(&rows))?;
                let apart = |row: &PerImage| (members.clone(), row.disagreement);
                let apart: Vec<_> = rows.iter().map(apart).collect();
                write_csv(&folder.join(DISAGREEMENT), &apart)?;
                write(&folder, &opened.name, opened.source.cases(), &rows)?;
            }
            let mut rows = super::rows(&own, &opened.name)?;
            let apart: Vec<Disagreement> = read_csv(&folder.join(DISAGREEMENT))?;
            for (row, disagreement) in rows.iter_mut().zip(apart) {
                row.disagreement = disagreement;
            }
            ensembles.push(Ensemble {
                arm: method.name.clone(),
                set,
                members: runs.iter().map(|run| (run.fold, run.seed)).collect(),
                rows,
            });
        }
    }
    Ok((ensembles, missing))
}

/// Whether the folder of a target holds the results of these networks: a run that failed may have succeeded since.
fn is_tested(folder: &Path, members: &Members) -> Result<bool> {
    if !folder.join(RESULTS).is_file() {
        return Ok(false);
    }
    let found: Vec<Members> = read_csv(&folder.join(DISAGREEMENT))?;
    Ok(found.first() == Some(members))
}

/// The rows of `ensembles.csv`.
pub(super) fn rows(ensembles: &[Ensemble]) -> Vec<(Members, PerImage, Disagreement)> {
    let of = |ensemble: &Ensemble| -> Vec<_> {
        let members = Members {
            arm: ensemble.arm.clone(),
            models: ensemble.members.len(),
        };
        let rows = ensemble.rows.iter();
        rows.map(|row| (members.clone(), row.clone(), row.disagreement))
            .collect()
    };
    ensembles.iter().flat_map(of).collect()
}
