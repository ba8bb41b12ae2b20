//! Metrics of segmentation and classification, and the files that report them.
//!
//! [`segmentation`] and [`classification`] measure, [`statistics`] summarises, [`paired`] compares two methods. A [`PerImage`] row holds what
//! was measured on one image and is a line of `per_image.csv`; [`DatasetMetrics`] is computed from the rows
//! alone and is an entry of `metrics.json`.
//!
//! ```
//! use echograd::data::Label;
//! use echograd::metrics::{DatasetMetrics, Mask, PerImage};
//!
//! let truth = Mask::new(3, 2, vec![true, true, false, false, false, false])?;
//! let predicted = Mask::new(3, 2, vec![true, false, false, false, false, false])?;
//! let mut row = PerImage::new("ours", "001.png", None, Label::Malignant);
//! row.compare(&predicted, &truth, Some(0.1))?;
//! row.p = Some(0.8);
//!
//! let metrics = DatasetMetrics::of(&[row]);
//! assert_eq!(metrics.segmentation.unwrap().dice.mean, 2.0 / 3.0);
//! assert_eq!(metrics.classification.unwrap().sensitivity, Some(1.0));
//! # Ok::<(), echograd::Error>(())
//! ```

pub mod classification;
pub mod paired;
pub mod segmentation;
pub mod statistics;

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::Label;
use crate::data::image::write_atomically;
use crate::error::{Error, Result};
use classification::{Auc, Case, Confusion, THRESHOLD, brier, expected_calibration_error};
use segmentation::Agreement;
pub use segmentation::Mask;
use statistics::{Summary, share_ci95};

/// What was measured on one image: a row of `per_image.csv`, in the order of its columns. What is absent is an
/// empty field.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PerImage {
    /// Name of the data set.
    pub dataset: String,
    /// File name with extension.
    pub image: String,
    /// Patient, where the data set tells.
    pub patient: Option<String>,
    /// The diagnosis; absent for a lesion of a data set without labels.
    pub label: Option<Label>,
    /// Dice coefficient. This and the next seven as in [`Agreement::Lesion`]; absent without a lesion.
    pub dice: Option<f64>,
    /// Intersection over union.
    pub iou: Option<f64>,
    /// Precision over pixels.
    pub precision: Option<f64>,
    /// Recall over pixels.
    pub recall: Option<f64>,
    /// 95th percentile of the Hausdorff distance in pixels.
    pub hd95_px: Option<f64>,
    /// Average symmetric surface distance in pixels.
    pub assd_px: Option<f64>,
    /// 95th percentile of the Hausdorff distance in millimetres, where the size of a pixel is known.
    pub hd95_mm: Option<f64>,
    /// Average symmetric surface distance in millimetres, where the size of a pixel is known.
    pub assd_mm: Option<f64>,
    /// Predicted probability of malignancy.
    pub p: Option<f64>,
    /// Malignancy that the features of the predicted mask suggest.
    pub phi: Option<f64>,
    /// Irregularity of the predicted mask. This and the next three as in [`crate::features`].
    pub irregularity: Option<f64>,
    /// Orientation of the predicted mask.
    pub orientation: Option<f64>,
    /// Margin of the predicted mask.
    pub margin: Option<f64>,
    /// Roundness of the predicted mask.
    pub roundness: Option<f64>,
    /// Number of pixels predicted where there is no lesion; absent with a lesion. Not a column of the file.
    #[serde(skip)]
    pub false_positive_area: Option<usize>,
    /// How far the networks of an ensemble are apart. Columns of an ensemble's file alone, behind the others.
    #[serde(skip)]
    pub disagreement: Disagreement,
}

/// How far the networks of an ensemble are apart in one image; all absent for one network alone.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct Disagreement {
    /// Standard deviation of their probabilities of malignancy.
    pub p_sd: Option<f64>,
    /// Mean Dice coefficient of each two of their masks, at the networks' resolution; two empty masks agree.
    pub mask_agreement: Option<f64>,
}

impl Disagreement {
    /// Whether there is nothing that could disagree.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl PerImage {
    /// A row with nothing measured yet.
    pub fn new(
        dataset: impl Into<String>,
        image: impl Into<String>,
        patient: Option<String>,
        label: impl Into<Option<Label>>,
    ) -> Self {
        Self {
            dataset: dataset.into(),
            image: image.into(),
            patient,
            label: label.into(),
            dice: None,
            iou: None,
            precision: None,
            recall: None,
            hd95_px: None,
            assd_px: None,
            hd95_mm: None,
            assd_mm: None,
            p: None,
            phi: None,
            irregularity: None,
            orientation: None,
            margin: None,
            roundness: None,
            false_positive_area: None,
            disagreement: Disagreement::default(),
        }
    }

    /// The mean of rows of one image, each metric over the rows that have it; `None` without rows. The area of
    /// false positives, a count, is not averaged, nor is what an ensemble disagrees in.
    pub fn mean<'a>(rows: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut rows = rows.into_iter();
        let mut mean = rows.next()?.clone();
        mean.false_positive_area = None;
        mean.disagreement = Disagreement::default();
        let mut counts = mean
            .metrics()
            .map(|value| f64::from(u8::from(value.is_some())));
        for row in rows {
            let mut row = row.clone();
            for ((sum, value), n) in mean
                .metrics()
                .into_iter()
                .zip(row.metrics())
                .zip(&mut counts)
            {
                if let Some(value) = *value {
                    *sum = Some(sum.unwrap_or(0.0) + value);
                    *n += 1.0;
                }
            }
        }
        for (sum, n) in mean.metrics().into_iter().zip(counts) {
            *sum = sum.map(|sum| sum / n);
        }
        Some(mean)
    }

    fn metrics(&mut self) -> [&mut Option<f64>; 14] {
        [
            &mut self.dice,
            &mut self.iou,
            &mut self.precision,
            &mut self.recall,
            &mut self.hd95_px,
            &mut self.assd_px,
            &mut self.hd95_mm,
            &mut self.assd_mm,
            &mut self.p,
            &mut self.phi,
            &mut self.irregularity,
            &mut self.orientation,
            &mut self.margin,
            &mut self.roundness,
        ]
    }

    /// `(p, malignant)`, if there is a lesion of known diagnosis and it was classified.
    pub fn diagnosis(&self) -> Option<(f64, bool)> {
        let label = self.label.filter(|label| label.is_lesion())?;
        Some((self.p?, label == Label::Malignant))
    }

    /// The [`diagnosis`](Self::diagnosis) with its patient, and with the fold whose networks made it.
    pub fn case(&self, fold: usize) -> Option<Case<'_>> {
        let (score, positive) = self.diagnosis()?;
        Some(Case {
            score,
            positive,
            patient: self.patient.as_deref(),
            fold,
        })
    }

    /// Whether nothing at all was predicted where there is a lesion; `None` without a lesion or a mask. Both distances are
    /// the image's diagonal then, and otherwise alike only between lone pixels. Of one prediction, not a mean of several.
    pub fn predicts_nothing(&self) -> Option<bool> {
        Some(self.dice? == 0.0 && self.hd95_px? == self.assd_px?)
    }

    /// Fills in what the predicted mask, the true mask and the width of a (square) pixel in millimetres tell.
    ///
    /// # Errors
    /// [`Error::Argument`] if the masks differ in size.
    pub fn compare(
        &mut self,
        prediction: &Mask,
        truth: &Mask,
        pixel_mm: Option<f64>,
    ) -> Result<()> {
        match Agreement::between(prediction, truth)? {
            Agreement::Normal {
                false_positive_area: area,
            } => self.false_positive_area = Some(area),
            Agreement::Lesion {
                dice,
                iou,
                precision,
                recall,
                hd95_px,
                assd_px,
            } => {
                self.dice = Some(dice);
                self.iou = Some(iou);
                self.precision = Some(precision);
                self.recall = Some(recall);
                self.hd95_px = Some(hd95_px);
                self.assd_px = Some(assd_px);
                self.hd95_mm = pixel_mm.map(|mm| hd95_px * mm);
                self.assd_mm = pixel_mm.map(|mm| assd_px * mm);
            }
        }
        Ok(())
    }
}

/// Everything reported about one data set: an entry of `metrics.json`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DatasetMetrics {
    /// Number of images.
    pub n: usize,
    /// Segmentation of the images that show a lesion; absent if none was segmented.
    pub segmentation: Option<SegmentationMetrics>,
    /// Classification of the images that show a lesion; absent if none was classified.
    pub classification: Option<ClassificationMetrics>,
    /// What was segmented in images without a lesion; absent if there are none.
    pub normals: Option<NormalMetrics>,
    /// The segmentation of benign and of malignant lesions apart. (Classification within one class is the
    /// specificity or the sensitivity.)
    pub by_label: BTreeMap<Label, LabelMetrics>,
}

/// Segmentation metrics over images.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct SegmentationMetrics {
    /// Dice coefficient.
    pub dice: Summary,
    /// Intersection over union.
    pub iou: Summary,
    /// Precision over pixels.
    pub precision: Summary,
    /// Recall over pixels.
    pub recall: Summary,
    /// 95th percentile of the Hausdorff distance in pixels.
    pub hd95_px: Summary,
    /// Average symmetric surface distance in pixels.
    pub assd_px: Summary,
    /// 95th percentile of the Hausdorff distance in millimetres, over images with known pixel size.
    pub hd95_mm: Option<Summary>,
    /// Average symmetric surface distance in millimetres, over images with known pixel size.
    pub assd_mm: Option<Summary>,
}

/// Classification metrics over the benign and malignant images; malignant is the positive class.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ClassificationMetrics {
    /// Number of classified images.
    pub n: usize,
    /// Area under the ROC curve.
    pub auc: Option<Auc>,
    /// Sensitivity at [`THRESHOLD`].
    pub sensitivity: Option<f64>,
    /// Its 95% interval: [`share_ci95`].
    pub sensitivity_ci95: Option<[f64; 2]>,
    /// Specificity at [`THRESHOLD`].
    pub specificity: Option<f64>,
    /// Its 95% interval: [`share_ci95`].
    pub specificity_ci95: Option<[f64; 2]>,
    /// Precision (positive predictive value) at [`THRESHOLD`].
    pub precision: Option<f64>,
    /// F1 score at [`THRESHOLD`].
    pub f1: Option<f64>,
    /// Brier score.
    pub brier: Option<f64>,
    /// Expected calibration error.
    pub ece: Option<f64>,
    /// Counts at [`THRESHOLD`].
    pub confusion: Confusion,
}

/// What was segmented in images that show no lesion.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct NormalMetrics {
    /// Number of images.
    pub n: usize,
    /// Fraction of images in which any pixel was predicted.
    pub false_positive_rate: f64,
    /// Number of predicted pixels per image, at the image's own resolution.
    pub false_positive_area: Summary,
}

/// Metrics within one diagnosis.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LabelMetrics {
    /// Number of images.
    pub n: usize,
    /// Segmentation of these images; absent if none was segmented.
    pub segmentation: Option<SegmentationMetrics>,
}

impl DatasetMetrics {
    /// Summarises the rows of one data set, all of one network or of the same ones.
    pub fn of(rows: &[PerImage]) -> Self {
        Self::by_fold(rows, |_| 0)
    }

    /// Summarises the rows of one data set, each of the networks of its fold ([`Case::fold`]).
    pub fn by_fold(rows: &[PerImage], fold: impl Fn(&PerImage) -> usize) -> Self {
        let all: Vec<&PerImage> = rows.iter().collect();
        let by_label = [Label::Benign, Label::Malignant]
            .into_iter()
            .filter_map(|label| {
                let rows: Vec<&PerImage> = rows.iter().filter(|r| r.label == Some(label)).collect();
                let metrics = LabelMetrics {
                    n: rows.len(),
                    segmentation: SegmentationMetrics::of(&rows),
                };
                (!rows.is_empty()).then_some((label, metrics))
            });
        Self {
            n: rows.len(),
            segmentation: SegmentationMetrics::of(&all),
            classification: ClassificationMetrics::of(rows, fold),
            normals: NormalMetrics::of(&all),
            by_label: by_label.collect(),
        }
    }
}

impl SegmentationMetrics {
    fn of(rows: &[&PerImage]) -> Option<Self> {
        let over = |metric: fn(&PerImage) -> Option<f64>| summarise(rows, metric);
        Some(Self {
            dice: over(|r| r.dice)?,
            iou: over(|r| r.iou)?,
            precision: over(|r| r.precision)?,
            recall: over(|r| r.recall)?,
            hd95_px: over(|r| r.hd95_px)?,
            assd_px: over(|r| r.assd_px)?,
            hd95_mm: over(|r| r.hd95_mm),
            assd_mm: over(|r| r.assd_mm),
        })
    }
}

impl ClassificationMetrics {
    fn of(rows: &[PerImage], fold: impl Fn(&PerImage) -> usize) -> Option<Self> {
        let in_folds = rows.iter().filter_map(|row| row.case(fold(row)));
        let in_folds: Vec<Case<'_>> = in_folds.collect();
        let cases: Vec<(f64, bool)> = rows.iter().filter_map(PerImage::diagnosis).collect();
        // Of each class, the share that is decided rightly.
        let right = |class: bool| {
            let of_class = in_folds.iter().filter(|case| case.positive == class);
            let decided = of_class.map(|c| ((c.score >= THRESHOLD) == class, c.patient));
            share_ci95(&decided.collect::<Vec<_>>())
        };
        let confusion = Confusion::at(THRESHOLD, &cases);
        (!cases.is_empty()).then(|| Self {
            n: cases.len(),
            auc: Auc::of(&in_folds),
            sensitivity: confusion.recall(),
            sensitivity_ci95: right(true),
            specificity: confusion.specificity(),
            specificity_ci95: right(false),
            precision: confusion.precision(),
            f1: confusion.f1(),
            brier: brier(&cases),
            ece: expected_calibration_error(&cases),
            confusion,
        })
    }
}

impl NormalMetrics {
    fn of(rows: &[&PerImage]) -> Option<Self> {
        let area = summarise(rows, |r| r.false_positive_area.map(|pixels| pixels as f64))?;
        let fired = rows
            .iter()
            .filter(|r| r.false_positive_area > Some(0))
            .count();
        Some(Self {
            n: area.n,
            false_positive_rate: fired as f64 / area.n as f64,
            false_positive_area: area,
        })
    }
}

fn summarise(rows: &[&PerImage], metric: fn(&PerImage) -> Option<f64>) -> Option<Summary> {
    let values: Vec<_> = rows
        .iter()
        .filter_map(|&row| Some((metric(row)?, row.patient.as_deref())))
        .collect();
    Summary::of(&values)
}

/// Writes rows as a CSV file, the names of their fields first. The file appears complete or not at all.
///
/// A row is a [`PerImage`], or a tuple of a struct with further columns and a [`PerImage`].
///
/// # Errors
/// [`Error::File`] if the file cannot be written.
pub fn write_csv<R: Serialize>(path: &Path, rows: &[R]) -> Result<()> {
    let mut bytes = vec![];
    let mut csv = csv::Writer::from_writer(&mut bytes);
    rows.iter()
        .try_for_each(|row| csv.serialize(row))
        .and_then(|()| Ok(csv.flush()?))
        .map_err(|e| Error::caused(path, "rows cannot be written as CSV", e))?;
    drop(csv);
    write_atomically(path, &bytes)
}

/// Reads rows that [`write_csv`] wrote, of one struct each; columns that it does not have are ignored.
///
/// # Errors
/// [`Error::File`] if the file is missing or has other columns.
pub fn read_csv<R: DeserializeOwned>(path: &Path) -> Result<Vec<R>> {
    let unreadable = |e: csv::Error| Error::caused(path, "cannot be read", e);
    let mut reader = csv::Reader::from_path(path).map_err(unreadable)?;
    let rows = reader.deserialize().collect::<Result<Vec<R>, _>>();
    rows.map_err(unreadable)
}

/// Writes `metrics.json`: metrics by name of data set; what could not be measured is `null`. The file appears
/// complete or not at all.
///
/// # Errors
/// [`Error::File`] if the file cannot be written.
pub fn write_json(path: &Path, datasets: &BTreeMap<String, DatasetMetrics>) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(datasets)
        .map_err(|e| Error::caused(path, "metrics cannot be written as JSON", e))?;
    bytes.push(b'\n');
    write_atomically(path, &bytes)
}
