//! A run's best network, or those of several together, against a data set, at every image's own resolution.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::config::Device;
use super::run::{Image, MANIFEST, Manifest};
use super::{Model, Report, select, stop};
use crate::data::{self, Case, Source};
use crate::error::{Error, Result};
use crate::metrics::{DatasetMetrics, Mask, PerImage, write_csv, write_json};

/// Name of the file that says by their hashes what images the rows of `per_image.csv` are of.
pub(crate) const IMAGES: &str = "images.csv";

/// Name of the metrics, the last file that is written of the results on a data set.
pub(crate) const RESULTS: &str = "metrics.json";

/// What to evaluate.
#[derive(Clone, Copy, Debug)]
pub struct EvaluateArgs<'a> {
    /// The run's folder; of several, the networks are averaged ([`Model::ensemble`]).
    pub runs: &'a [PathBuf],
    /// The data set, `NAME:PATH`.
    pub data: &'a str,
    /// Folder for `metrics.json`, `per_image.csv` and `images.csv`.
    pub out: &'a Path,
    /// Leave out all but one of identical images.
    pub drop_duplicates: bool,
    /// Count images that a run was trained on as well.
    pub include_training: bool,
    /// Where to compute.
    pub device: Device,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Evaluated {
    /// Metrics, as in `metrics.json`.
    pub metrics: DatasetMetrics,
    /// Rows, as in `per_image.csv`.
    pub rows: Vec<PerImage>,
    /// Images left out because a run was trained on them: the same bytes, whatever their name.
    pub trained_on: usize,
}

/// Evaluates, and writes `metrics.json`, `per_image.csv` and, with the SHA-256 of every image, `images.csv`.
///
/// # Errors
/// [`Error::File`] if a run, the data or the results cannot be read or written;
/// [`Error::Argument`] if no image is left; as [`Model::ensemble`]; [`Error::Interrupted`].
pub fn evaluate(
    args: &EvaluateArgs<'_>,
    report: &dyn Report,
    interrupt: &AtomicBool,
) -> Result<Evaluated> {
    let mut model = Model::ensemble(args.runs, args.device, usize::MAX)?;
    let manifests = args
        .runs
        .iter()
        .map(|run| Manifest::read(&run.join(MANIFEST)));
    let manifests = manifests.collect::<Result<Vec<_>>>()?;
    let source = data::open_to_test(args.data)?;
    let (mut subset, _) = select(&*source, args.drop_duplicates, report);
    let before = subset.len();
    if !args.include_training {
        let seen = manifests.iter().flat_map(|manifest| &manifest.train);
        let seen: HashSet<&str> = seen.map(|sample| sample.image.sha256.as_str()).collect();
        subset.retain(|&i| !seen.contains(source.cases()[i].sha256.as_str()));
    }
    let trained_on = before - subset.len();
    if trained_on > 0 {
        report.line(&format!(
            "left out {trained_on} of {before} images of {}: the {} trained on them",
            args.data,
            if args.runs.len() > 1 {
                "runs were"
            } else {
                "run was"
            }
        ));
    }
    if subset.is_empty() {
        let problem = format!("expected images to evaluate, found none left of {before}");
        return Err(Error::argument(args.data, problem));
    }
    make_folder(args.out)?;
    let rows = examine(&mut model, &*source, &subset, report, interrupt)?;
    let metrics = write(args.out, source.name(), source.cases(), &rows)?;
    Ok(Evaluated {
        metrics,
        rows,
        trained_on,
    })
}

/// One row for each of the cases listed.
pub(crate) fn examine(
    model: &mut Model,
    source: &dyn Source,
    subset: &[usize],
    report: &dyn Report,
    interrupt: &AtomicBool,
) -> Result<Vec<PerImage>> {
    let size = model.config().size;
    let lacks = source.lacks();
    let row = |model: &Model, k: usize, inference| -> Result<PerImage> {
        let case = &source.cases()[subset[k]];
        let finding = model.finding(&inference, &case.letterbox(size));
        let lesion = case.label.is_lesion();
        let label = (!lacks.labels || !lesion).then_some(case.label);
        let mut row = PerImage::new(source.name(), &case.image, case.patient.clone(), label);
        if let Some(mask) = finding.mask.as_ref().filter(|_| !lacks.masks || !lesion) {
            let truth = Mask::from(&source.mask(subset[k])?);
            row.compare(mask, &truth, case.pixel_mm)?;
        }
        row.p = finding.p;
        row.phi = finding.phi;
        row.disagreement = finding.disagreement;
        if let Some(features) = finding.features {
            row.irregularity = Some(features.irregularity);
            row.orientation = Some(features.orientation);
            row.margin = Some(features.margin);
            row.roundness = Some(features.roundness);
        }
        Ok(row)
    };
    let what = format!("evaluating {}", source.name());
    model.map(
        subset.len(),
        |k| data::letterboxed_image(source, subset[k], size),
        row,
        |done| {
            report.progress(&what, done as u64, subset.len() as u64, "");
            stop(interrupt)
        },
    )
}

/// Writes `metrics.json`, `per_image.csv` and `images.csv` into `out`, a folder that exists; `cases` are those that the
/// rows are of, and perhaps more. The rows of an ensemble have its [`crate::metrics::Disagreement`] as last columns.
pub(crate) fn write(
    out: &Path,
    name: &str,
    cases: &[Case],
    rows: &[PerImage],
) -> Result<DatasetMetrics> {
    let metrics = DatasetMetrics::of(rows);
    let hashes: HashMap<&str, &str> = cases
        .iter()
        .map(|case| (case.image.as_str(), case.sha256.as_str()))
        .collect();
    let image = |row: &PerImage| Image {
        image: row.image.clone(),
        sha256: hashes.get(&*row.image).copied().unwrap_or_default().into(),
    };
    let images: Vec<Image> = rows.iter().map(image).collect();
    write_csv(&out.join(IMAGES), &images)?;
    let path = out.join("per_image.csv");
    match rows.iter().all(|row| row.disagreement.is_none()) {
        true => write_csv(&path, rows)?,
        false => {
            let apart = rows.iter().map(|row| (row, row.disagreement));
            write_csv(&path, &apart.collect::<Vec<_>>())?;
        }
    }
    let datasets = BTreeMap::from([(name.to_owned(), metrics.clone())]);
    write_json(&out.join(RESULTS), &datasets)?;
    Ok(metrics)
}

pub(crate) fn make_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::caused(path, "cannot be created", e))
}
