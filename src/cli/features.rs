//! `echograd features`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::SIZE_RANGE;
use super::progress::Console;
use crate::data::letterbox::Letterbox;
use crate::data::{self, Label, image};
use crate::error::Result;
use crate::features::{MaskSums, ShapeFeatures};
use crate::metrics;
use crate::metrics::classification::{Auc, Case};
use crate::train::{Report as _, stop};

/// Measure the four BI-RADS-like shape features of ground-truth masks
///
/// Each mask is letterboxed (centred, zero padding) with antialiased bilinear resampling and kept soft. Area and perimeter are
/// in pixels of the letterboxed mask. A mask of less than 32 px has no measurable lesion: its features are left empty.
/// No image is left out: a mask that does not fit its image, unfit for training, is measured at its own size.
/// Prints how well each feature alone tells malignant from benign (AUC with its DeLong 95% interval, clustered by patient
/// where patients are known).
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    input: Input,
    /// Side of the square that masks are letterboxed to, in pixels
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(SIZE_RANGE))]
    size: u16,
    /// File to write the table to
    #[arg(long, value_name = "FILE", default_value = "features.csv")]
    csv: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct Input {
    /// Data set whose masks are measured
    #[arg(long, value_name = "NAME:PATH")]
    data: Option<String>,
    /// Mask images to measure; anything above half intensity is lesion
    #[arg(long, value_name = "FILE", num_args = 1..)]
    mask: Vec<PathBuf>,
}

/// A line of features.csv.
#[derive(Clone, Debug, Serialize)]
struct Row {
    image: String,
    label: Option<Label>,
    /// Whose it is, if known: not a column.
    #[serde(skip)]
    patient: Option<String>,
    area: f64,
    perimeter: f64,
    irregularity: Option<f64>,
    orientation: Option<f64>,
    margin: Option<f64>,
    roundness: Option<f64>,
}

impl Row {
    fn new(image: &str, label: Option<Label>, mask: &[f32], size: usize) -> Self {
        let sums = MaskSums::of(mask, size);
        let features = sums.features();
        Self {
            image: image.to_owned(),
            label,
            patient: None,
            area: sums.moments.area,
            perimeter: sums.perimeter,
            irregularity: features.map(|f| f.irregularity),
            orientation: features.map(|f| f.orientation),
            margin: features.map(|f| f.margin),
            roundness: features.map(|f| f.roundness),
        }
    }

    fn of_patient(self, patient: Option<String>) -> Self {
        Self { patient, ..self }
    }

    fn features(&self) -> [Option<f64>; 4] {
        [
            self.irregularity,
            self.orientation,
            self.margin,
            self.roundness,
        ]
    }
}

#[derive(Debug, Serialize)]
struct Discrimination {
    feature: &'static str,
    n: usize,
    auc: Option<Auc>,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    csv: &'a Path,
    size: u16,
    rows: &'a [Row],
    auc: &'a [Discrimination],
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If the data cannot be read or the table cannot be written, or on Ctrl-C.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let interrupt = super::interrupt()?;
        let rows = match &self.input.data {
            Some(spec) => rows_of_data(spec, self.size.into(), interrupt)?,
            None => rows_of_files(&self.input.mask, self.size.into(), interrupt)?,
        };
        metrics::write_csv(&self.csv, &rows)?;
        let aucs: Vec<Discrimination> = (0..4).map(|k| discrimination(&rows, k)).collect();
        if self.json {
            let report = Report {
                csv: &self.csv,
                size: self.size,
                rows: &rows,
                auc: &aucs,
            };
            super::print_json(&report)?;
        } else if self.input.data.is_some() {
            outln!("{:<14} {:>5} {:>8}   95% interval", "feature", "n", "AUC");
            for Discrimination { feature, n, auc } in &aucs {
                let figures = match auc {
                    Some(Auc {
                        value,
                        ci95: Some([low, high]),
                        ..
                    }) => {
                        format!("{value:>8.3}   {low:.3}–{high:.3}")
                    }
                    Some(Auc { value, .. }) => format!("{value:>8.3}   –"),
                    None => "       –   both classes are needed".to_owned(),
                };
                outln!("{feature:<14} {n:>5} {figures}");
            }
        } else {
            print_rows(&rows)?;
        }
        note!("{} rows in {}", rows.len(), self.csv.display());
        Ok(ExitCode::SUCCESS)
    }
}

fn rows_of_data(spec: &str, size: usize, interrupt: &AtomicBool) -> Result<Vec<Row>> {
    let source = super::data::open(spec)?;
    let cases = source.cases();
    let console = Console::default();
    let done = AtomicU64::new(0);
    let rows: Vec<Result<Row>> = cases
        .par_iter()
        .enumerate()
        .map(|(i, case)| {
            stop(interrupt)?;
            let mask = data::soft_mask(&*source, i, size)?;
            let row = Row::new(&case.image, Some(case.label), &mask, size);
            let row = row.of_patient(case.patient.clone());
            let n = done.fetch_add(1, Ordering::Relaxed) + 1;
            console.progress("measuring", n, cases.len() as u64, "");
            Ok(row)
        })
        .collect();
    let mut rows = rows.into_iter().collect::<Result<Vec<_>>>()?;
    // A shape needs no image that fits it.
    for (k, drop) in source.drops().iter().enumerate() {
        let Some(data::Dropped {
            label,
            patient,
            mask,
        }) = source.dropped_mask(k)?
        else {
            continue;
        };
        let soft = Letterbox::new(mask.width, mask.height, size).forward(&mask);
        let row = Row::new(&drop.file, Some(label), &soft, size);
        rows.push(row.of_patient(patient));
        console.line(&format!(
            "{}: measured all the same: {}, at its mask's own size",
            source.name(),
            drop.file
        ));
    }
    Ok(rows)
}

fn rows_of_files(files: &[PathBuf], size: usize, interrupt: &AtomicBool) -> Result<Vec<Row>> {
    let measure = |path: &PathBuf| {
        stop(interrupt)?;
        let mask = image::read_mask(path)?;
        let soft = Letterbox::new(mask.width, mask.height, size).forward(&mask);
        let name = path.file_name().unwrap_or(path.as_os_str());
        Ok(Row::new(&name.to_string_lossy(), None, &soft, size))
    };
    files.iter().map(measure).collect()
}

/// How well feature `k` alone tells malignant from benign where it could be measured.
fn discrimination(rows: &[Row], k: usize) -> Discrimination {
    let cases = rows.iter().filter_map(|row| {
        let label = row.label.filter(|label| label.is_lesion())?;
        Some(Case {
            score: row.features()[k]?,
            positive: label == Label::Malignant,
            patient: row.patient.as_deref(),
            fold: 0,
        })
    });
    let cases: Vec<Case<'_>> = cases.collect();
    Discrimination {
        feature: ShapeFeatures::NAMES[k],
        n: cases.len(),
        auc: Auc::of(&cases),
    }
}

/// The names come last, since nobody knows how long they are.
fn print_rows(rows: &[Row]) -> Result<()> {
    let names = ShapeFeatures::NAMES
        .map(|name| format!("{name:>12}"))
        .join(" ");
    outln!("{:>9} {:>9} {names}  image", "area", "perimeter");
    for row in rows {
        let features = row.features().map(|f| match f {
            Some(f) => format!("{f:>12.4}"),
            None => format!("{:>12}", "–"),
        });
        outln!(
            "{:>9.1} {:>9.2} {}  {}",
            row.area,
            row.perimeter,
            features.join(" "),
            row.image
        );
    }
    Ok(())
}
