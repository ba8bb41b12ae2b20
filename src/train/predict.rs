//! A run's best network, or those of several together, on images of one's own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use rayon::prelude::*;
use serde::Serialize;

use super::config::Device;
use super::evaluate::make_folder;
use super::{Model, Report, stop};
use crate::data::image::{self, Gray};
use crate::data::letterbox::{Letterbox, quantise};
use crate::error::{Error, Result};
use crate::metrics::Disagreement;
use crate::report::{PREDICTION, overlay};

/// What to predict.
#[derive(Clone, Copy, Debug)]
pub struct PredictArgs<'a> {
    /// The run's folder; of several, the networks are averaged ([`Model::ensemble`]).
    pub runs: &'a [PathBuf],
    /// Image files.
    pub files: &'a [PathBuf],
    /// Folder for the results.
    pub out: &'a Path,
    /// Where to compute.
    pub device: Device,
}

/// One entry of `predictions.json`. What is absent is `null`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Prediction {
    /// The image file.
    pub image: PathBuf,
    /// Name of the mask's file in the same folder: white is lesion, at the image's size.
    pub mask: Option<String>,
    /// Name of the overlay's file: the image with the lesion's outline.
    pub overlay: Option<String>,
    /// Pixels of the lesion at the image's size.
    pub area_px: Option<usize>,
    /// Probability of malignancy.
    pub p: Option<f64>,
    /// Malignancy that the mask's shape suggests.
    pub phi: Option<f64>,
    /// Irregularity of the soft mask. This and the next three as in [`crate::features`].
    pub irregularity: Option<f64>,
    /// Orientation of the soft mask.
    pub orientation: Option<f64>,
    /// Margin of the soft mask.
    pub margin: Option<f64>,
    /// Roundness of the soft mask.
    pub roundness: Option<f64>,
    /// How far several networks are apart; not in the file for one.
    #[serde(flatten, skip_serializing_if = "Disagreement::is_none")]
    pub disagreement: Disagreement,
}

/// Predicts, and writes `STEM_mask.png`, `STEM_overlay.png` and `predictions.json`.
///
/// # Errors
/// [`Error::Argument`] if there are no files, two of one stem, whose results would overwrite each other,
/// or `out` is a folder that holds one of them, where data sets keep true masks under the names that
/// the results would have; [`Error::File`] if a run, an image or the results cannot be read or written;
/// as [`Model::ensemble`]; [`Error::Interrupted`].
pub fn predict(
    args: &PredictArgs<'_>,
    report: &dyn Report,
    interrupt: &AtomicBool,
) -> Result<Vec<Prediction>> {
    let stems = stems(args.files)?;
    apart(args.files, args.out)?;
    let mut model = Model::ensemble(args.runs, args.device, args.files.len())?;
    let size = model.config().size;
    // An image that cannot be read should stop the work before results of others are replaced.
    let readable: Vec<Result<()>> = args
        .files
        .par_iter()
        .map(|file| image::read(file).map(drop))
        .collect();
    readable.into_iter().collect::<Result<()>>()?;
    make_folder(args.out)?;
    let files = args.files;
    let load = |i: usize| -> Result<Vec<u8>> {
        let image = image::read(&files[i])?;
        Ok(quantise(
            &Letterbox::new(image.width, image.height, size).forward(&image),
        ))
    };
    let each = |model: &Model, i: usize, inference| -> Result<Prediction> {
        let image = image::read(&files[i])?;
        let letterbox = Letterbox::new(image.width, image.height, size);
        let finding = model.finding(&inference, &letterbox);
        let mut prediction = Prediction {
            image: files[i].clone(),
            mask: None,
            overlay: None,
            area_px: None,
            p: finding.p,
            phi: finding.phi,
            irregularity: finding.features.map(|f| f.irregularity),
            orientation: finding.features.map(|f| f.orientation),
            margin: finding.features.map(|f| f.margin),
            roundness: finding.features.map(|f| f.roundness),
            disagreement: finding.disagreement,
        };
        if let Some(mask) = finding.mask {
            let (width, height) = (image.width, image.height);
            let white = |&inside: &bool| if inside { 255 } else { 0 };
            let pixels = mask.pixels().iter().map(white).collect();
            let name = format!("{}_mask.png", stems[i]);
            let gray = Gray {
                width,
                height,
                pixels,
            };
            image::write_png(&args.out.join(&name), &gray)?;
            prediction.mask = Some(name);
            let name = format!("{}_overlay.png", stems[i]);
            let rgb = overlay(&image, &[(&mask, PREDICTION)]);
            image::write_png_rgb(&args.out.join(&name), width, height, &rgb)?;
            prediction.overlay = Some(name);
            prediction.area_px = Some(mask.area());
        }
        Ok(prediction)
    };
    let done = |done: usize| {
        report.progress("predicting", done as u64, files.len() as u64, "");
        stop(interrupt)
    };
    let predictions = model.map(files.len(), load, each, done)?;
    let path = args.out.join("predictions.json");
    let mut json = serde_json::to_vec_pretty(&predictions)
        .map_err(|e| Error::caused(&path, "cannot be written as JSON", e))?;
    json.push(b'\n');
    image::write_atomically(&path, &json)?;
    Ok(predictions)
}

/// Refuses to write results beside the images.
fn apart(files: &[PathBuf], out: &Path) -> Result<()> {
    let Ok(folder) = out.canonicalize() else {
        return Ok(()); // It does not exist yet.
    };
    let beside = |file: &&PathBuf| {
        let file = file.canonicalize().ok();
        file.is_some_and(|file| file.parent() == Some(&folder))
    };
    match files.iter().find(beside) {
        None => Ok(()),
        Some(file) => {
            let problem = format!(
                "expected a folder apart from the images, found {} in {}",
                file.display(),
                out.display()
            );
            Err(Error::argument("--out", problem))
        }
    }
}

fn stems(files: &[PathBuf]) -> Result<Vec<String>> {
    if files.is_empty() {
        return Err(Error::argument("FILE", "expected image files, found none"));
    }
    let mut known: HashMap<String, &Path> = HashMap::new();
    let mut stems = Vec::new();
    for file in files {
        let stem = file.file_stem().unwrap_or_default();
        let stem = stem.to_string_lossy().into_owned();
        if let Some(other) = known.insert(stem.clone(), file) {
            let problem = format!(
                "expected files of different names, found {} and {}: {stem}_mask.png would be both's",
                other.display(),
                file.display()
            );
            return Err(Error::argument("FILE", problem));
        }
        stems.push(stem);
    }
    Ok(stems)
}
