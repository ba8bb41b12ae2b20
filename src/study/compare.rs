//! Any runs side by side: what they were told otherwise, and what they did on data that they share.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::statistics::{Comparison, Images, Strata, averaged};
use crate::error::{Error, Result};
use crate::metrics::{DatasetMetrics, PerImage, read_csv};
use crate::train::Config;
use crate::train::model::CONFIG;

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
    /// Each later run against the first, on the images that both have.
    pub comparisons: Vec<Comparison>,
}

/// Compares runs by the results in their folders.
///
/// # Errors
/// [`Error::Argument`] for fewer than two runs; [`Error::File`] for a folder that is no run, or results that cannot be
/// read.
pub fn compare(runs: &[PathBuf]) -> Result<Compared> {
    if runs.len() < 2 {
        let problem = format!("expected two runs or more to compare, found {}", runs.len());
        return Err(Error::argument("RUN", problem));
    }
    let mut configs = Vec::new();
    for run in runs {
        let path = run.join(CONFIG);
        if !path.is_file() {
            let problem = "expected the folder of a run, found no config.toml in it";
            return Err(Error::file(run, problem));
        }
        configs.push(Config::load(Some(&path), &[])?);
    }
    let names: Vec<String> = runs.iter().map(|run| run.display().to_string()).collect();
    let mut found: BTreeMap<String, Vec<Option<Vec<PerImage>>>> = BTreeMap::new();
    for (i, run) in runs.iter().enumerate() {
        for folder in results_in(run)? {
            let rows = read_csv(&run.join(&folder).join(ROWS))?;
            found
                .entry(folder)
                .or_insert_with(|| vec![None; runs.len()])[i] = Some(rows);
        }
    }
    let results = found.into_iter().map(|(folder, rows)| {
        let images: Vec<Option<Images>> = rows
            .iter()
            .map(|rows| rows.as_ref().map(averaged))
            .collect();
        let against_first = (1..runs.len()).filter_map(|i| {
            let (a, b) = (images[i].as_ref()?, images[0].as_ref()?);
            let names = [names[i].clone(), names[0].clone()];
            Comparison::between(names, a, b, 1, &Strata::default())
        });
        let results = Results {
            comparisons: against_first.collect(),
            metrics: rows
                .iter()
                .map(|rows| rows.as_deref().map(DatasetMetrics::of))
                .collect(),
        };
        (folder, results)
    });
    Ok(Compared {
        results: results.collect(),
        settings: disagreements(&configs),
        runs: names,
    })
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
