//! Any runs side by side: what they were told otherwise, and what they did on data that they share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Missing;
use super::statistics::{Comparison, Images, Strata, averaged};
use crate::error::{Error, Result};
use crate::metrics::{DatasetMetrics, PerImage, read_csv};
use crate::train::Config;
use crate::train::evaluate::IMAGES;
use crate::train::model::distinct;
use crate::train::run::{Image, MANIFEST, Manifest, VALIDATION};

/// The file that makes a folder one of results.
const ROWS: &str = "per_image.csv";

/// What came out.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Compared {
    /// The runs, by their folders.
    pub runs: Vec<String>,
    /// Keys that the runs do not agree in, with each run's value.
    pub settings: BTreeMap<String, Vec<String>>,
    /// Results by their folders in the runs: `validation`, and whatever was evaluated into them.
    pub results: BTreeMap<String, Results>,
}

/// What several runs did on one data set.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Results {
    /// Each run's metrics, in the order of the runs; absent for a run without this result.
    pub metrics: Vec<Option<DatasetMetrics>>,
    /// Each later run against the first, on the images that both have: those of the same bytes, whatever their names.
    pub comparisons: Vec<Comparison>,
    /// Runs that cannot be compared with the first, and why.
    pub not_compared: Vec<Missing>,
}

/// Compares runs by the results in their folders.
///
/// # Errors
/// [`Error::Argument`] for fewer than two runs, or one given twice; [`Error::File`] for a folder that is no run, or results that cannot be
/// read.
pub fn compare(runs: &[PathBuf]) -> Result<Compared> {
    if runs.len() < 2 {
        let problem = format!("expected two runs or more to compare, found {}", runs.len());
        return Err(Error::argument("RUN", problem));
    }
    let mut configs = Vec::new();
    for run in runs {
        configs.push(Config::of_run(run)?);
    }
    let names: Vec<String> = runs.iter().map(|run| run.display().to_string()).collect();
    distinct(runs)?;
    let mut folders = BTreeSet::new();
    for run in runs {
        folders.extend(results_in(run)?);
    }
    let mut results = BTreeMap::new();
    for folder in folders {
        let (mut metrics, mut images) = (Vec::new(), Vec::new());
        for run in runs {
            let rows: Option<Vec<PerImage>> = match run.join(&folder).join(ROWS) {
                path if path.is_file() => Some(read_csv(&path)?),
                _ => None,
            };
            metrics.push(rows.as_deref().map(DatasetMetrics::of));
            images.push(match rows {
                Some(rows) => Some(identified(run, &folder, rows)?),
                None => None,
            });
        }
        let (mut comparisons, mut not_compared) = (Vec::new(), Vec::new());
        for (name, a) in names.iter().zip(&images).skip(1) {
            let (Some(a), Some(b)) = (a, &images[0]) else {
                continue;
            };
            let compared = match (a, b) {
                (Some(a), Some(b)) => between([name.clone(), names[0].clone()], a, b),
                _ => Err(
                    "results of an earlier version do not say what images they are of; evaluate again",
                ),
            };
            match compared {
                Ok(comparison) => comparisons.push(comparison),
                Err(reason) => not_compared.push(Missing {
                    what: name.clone(),
                    reason: reason.to_owned(),
                }),
            }
        }
        let found = Results {
            metrics,
            comparisons,
            not_compared,
        };
        results.insert(folder, found);
    }
    Ok(Compared {
        results,
        settings: disagreements(&configs),
        runs: names,
    })
}

/// The rows of a run's results by their images' SHA-256 and diagnosis, since names are no proof and one image may be
/// there twice; `None` if the files do not tell.
fn identified(run: &Path, folder: &str, mut rows: Vec<PerImage>) -> Result<Option<Images>> {
    let (own, manifest) = (run.join(folder).join(IMAGES), run.join(MANIFEST));
    let images: Vec<Image> = match () {
        () if own.is_file() => read_csv(&own)?,
        // Runs of earlier versions say it of their validation part alone.
        () if folder == VALIDATION && manifest.is_file() => {
            let validation = Manifest::read(&manifest)?.validation;
            validation.into_iter().map(|sample| sample.image).collect()
        }
        () => return Ok(None),
    };
    let hashes: HashMap<&str, &str> = images
        .iter()
        .map(|image| (image.image.as_str(), image.sha256.as_str()))
        .collect();
    for row in &mut rows {
        let Some(hash) = hashes.get(row.image.as_str()) else {
            return Ok(None);
        };
        row.image = format!("{hash} {:?}", row.label);
    }
    Ok(Some(averaged(&rows)))
}

/// Compares two runs on the images that both have, or says why that cannot be done.
fn between(names: [String; 2], a: &Images, b: &Images) -> Result<Comparison, &'static str> {
    if !a.keys().any(|image| b.contains_key(image)) {
        return Err("no images in common");
    }
    let compared = Comparison::between(names, a, b, 1, &Strata::default());
    compared.ok_or("neither masks nor diagnoses in common")
}

/// Folders of results in a run's folder, by name.
fn results_in(run: &Path) -> Result<Vec<String>> {
    let unreadable = |e| Error::caused(run, "cannot be read", e);
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(run).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        if entry.path().join(ROWS).is_file() {
            folders.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    folders.sort();
    Ok(folders)
}

fn disagreements(configs: &[Config]) -> BTreeMap<String, Vec<String>> {
    let settings: Vec<Vec<(String, String)>> = configs.iter().map(Config::settings).collect();
    let mut differing = BTreeMap::new();
    for (i, (key, value)) in settings[0].iter().enumerate() {
        let values: Vec<String> = settings.iter().map(|all| all[i].1.clone()).collect();
        if values.iter().any(|other| other != value) {
            differing.insert(key.clone(), values);
        }
    }
    differing
}
