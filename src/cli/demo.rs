//! `echograd demo`: the whole story on synthetic data.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use rayon::prelude::*;

use super::progress::Console;
use crate::data::image::{self, write_atomically};
use crate::data::phantom::{self, Site};
use crate::data::{self, Label, Source};
use crate::error::{Error, Result};
use crate::metrics::{DatasetMetrics, Mask, PerImage};
use crate::report::number::{figure, rounded};
use crate::report::{PREDICTION, Page, Series, TRUTH, curves, overlay};
use crate::train::config::{Arm, Device};
use crate::train::evaluate::{EvaluateArgs, evaluate};
use crate::train::predict::{PredictArgs, predict};
use crate::train::run::{METRICS, TrainArgs, train};
use crate::train::{Report as _, stop};

/// The hospital that trains.
const SOURCE: Site = Site::A;
/// The hospitals that were never seen.
const TARGETS: [Site; 3] = [Site::B, Site::C, Site::D];
/// Without and with the consistency term.
const ARMS: [Arm; 2] = [Arm::Multitask, Arm::Consistency];
/// Images of each unseen hospital that the page shows.
const SHOWN: usize = 4;

/// Train with and without consistency on phantoms of one hospital, test on three others
///
/// Makes phantoms of sites A to D, trains on A, tests on B, C and D, and writes the data, both runs with their checkpoints,
/// metrics, overlays and a page, DIR/index.html. The phantoms are no patients: the figures show that the machinery works, not how
/// well it would do in a clinic.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// New or empty folder for everything
    #[arg(long, value_name = "DIR", default_value = "demo")]
    out: PathBuf,
    /// Same seed, same demo
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(super::SEED_RANGE))]
    seed: u64,
    /// A few images and epochs only, to see that everything runs
    #[arg(long)]
    quick: bool,
}

/// How much is made and trained.
struct Extent {
    train: usize,
    test: usize,
    size: usize,
    epochs: u64,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If the folder is not empty or cannot be written, or on Ctrl-C.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let extent = match self.quick {
            true => Extent {
                train: 30,
                test: 8,
                size: 64,
                epochs: 3,
            },
            false => Extent {
                train: 200,
                test: 60,
                size: 128,
                epochs: 30,
            },
        };
        let (console, interrupt) = (Console::default(), super::interrupt()?);
        let demo = Demo {
            out: &self.out,
            seed: self.seed,
            extent,
            console: &console,
            interrupt,
        };
        let rows = demo.run()?;
        drop(console);
        outln!(
            "mean Dice (AUC of p) on the held-out part of site {SOURCE} and on the unseen sites"
        );
        outln!("{:<18} {}", "", heads(&rows).join(" "));
        for row in &rows {
            let cells: Vec<String> = row
                .cells
                .iter()
                .map(|c| format!("{:>14}", c.text()))
                .collect();
            outln!("{:<18} {}", row.name, cells.join(" "));
        }
        outln!("page: {}", self.out.join("index.html").display());
        Ok(ExitCode::SUCCESS)
    }
}

fn heads(rows: &[Row]) -> Vec<String> {
    rows[0]
        .cells
        .iter()
        .map(|cell| format!("{:>14}", cell.data))
        .collect()
}

/// A line of the result: one method on every site.
struct Row {
    name: String,
    cells: Vec<Cell>,
}

/// One method on one site.
struct Cell {
    data: String,
    dice: Option<f64>,
    auc: Option<f64>,
}

impl Cell {
    fn new(data: String, metrics: &DatasetMetrics) -> Self {
        let auc = metrics.classification.as_ref().and_then(|c| c.auc);
        Self {
            data,
            dice: metrics.segmentation.as_ref().map(|s| s.dice.mean),
            auc: auc.map(|auc| auc.value),
        }
    }

    fn text(&self) -> String {
        match self.auc {
            None => figure(self.dice),
            auc => format!("{} ({})", figure(self.dice), figure(auc)),
        }
    }
}

struct Demo<'a> {
    out: &'a Path,
    seed: u64,
    extent: Extent,
    console: &'a Console,
    interrupt: &'a AtomicBool,
}

impl Demo<'_> {
    fn run(&self) -> Result<Vec<Row>> {
        self.claim_folder()?;
        self.phantoms()?;
        let mut rows = vec![self.baseline()?];
        for arm in ARMS {
            rows.push(self.arm(arm)?);
        }
        let gallery = self.gallery()?;
        write_atomically(
            &self.out.join("index.html"),
            self.page(&rows, &gallery)?.as_bytes(),
        )?;
        Ok(rows)
    }

    /// What is there already is somebody's work.
    fn claim_folder(&self) -> Result<()> {
        let problem = |e: std::io::Error| Error::caused(self.out, "cannot be used", e);
        std::fs::create_dir_all(self.out).map_err(problem)?;
        if std::fs::read_dir(self.out)
            .map_err(problem)?
            .next()
            .is_some()
        {
            let problem =
                "expected a new or empty folder, found files in it; choose another with --out";
            return Err(Error::file(self.out, problem));
        }
        Ok(())
    }

    fn folder(&self, site: Site) -> PathBuf {
        self.out.join("data").join(site.to_string())
    }

    fn spec(&self, site: Site) -> String {
        format!("busi:{}", self.folder(site).display())
    }

    fn run_folder(&self, arm: Arm) -> PathBuf {
        self.out.join("runs").join(super::name_of(&arm))
    }

    fn phantoms(&self) -> Result<()> {
        for site in Site::ALL {
            let count = if site == SOURCE {
                self.extent.train
            } else {
                self.extent.test
            };
            let what = format!("phantoms of site {site}");
            let done = |n: usize| {
                self.console.progress(&what, n as u64, count as u64, "");
                stop(self.interrupt)
            };
            phantom::write(&[site], count, self.seed, &self.folder(site), &done)?;
            self.console.line(&format!("site {site}: {count} phantoms"));
        }
        Ok(())
    }

    /// What any method must beat: the same mask for every image, the pixels that are lesion in at least
    /// a certain share of the training site's masks. The share is the one best on those masks.
    fn baseline(&self) -> Result<Row> {
        let size = self.extent.size;
        let source = data::open(&self.spec(SOURCE))?;
        let lesions = (0..source.cases().len()).filter(|&i| source.cases()[i].label.is_lesion());
        let masks: Vec<Vec<f32>> = lesions
            .map(|i| data::soft_mask(&*source, i, size))
            .collect::<Result<_>>()?;
        let mean: Vec<f32> = (0..size * size)
            .map(|p| masks.iter().map(|mask| mask[p]).sum::<f32>() / masks.len() as f32)
            .collect();
        // Scaled such that the threshold, one half as for the networks, falls on the share.
        let at_share = |share: f32| -> Vec<f32> { mean.iter().map(|m| m * 0.5 / share).collect() };
        let dice = |share: f32| -> Result<f64> {
            Ok(constant(&*source, &at_share(share))?
                .segmentation
                .map_or(0.0, |s| s.dice.mean))
        };
        let mut best = (0.0, 0.5);
        for k in 1..20 {
            let share = k as f32 * 0.05;
            self.console.progress("trivial baseline", k, 20, "");
            stop(self.interrupt)?;
            let dice = dice(share)?;
            if dice > best.0 {
                best = (dice, share);
            }
        }
        let map = at_share(best.1);
        // It was made from all of the site's masks: none is held out to test it on.
        let mut cells = vec![Cell {
            data: SOURCE.to_string(),
            dice: None,
            auc: None,
        }];
        for site in TARGETS {
            let target = data::open(&self.spec(site))?;
            cells.push(Cell::new(site.to_string(), &constant(&*target, &map)?));
        }
        Ok(Row {
            name: "one mask for all".into(),
            cells,
        })
    }

    fn arm(&self, arm: Arm) -> Result<Row> {
        let name = super::name_of(&arm);
        self.console
            .line(&format!("training on site {SOURCE}, arm {name}"));
        let run = self.run_folder(arm);
        let settings = [
            ("preset", "tiny".to_owned()),
            ("data", self.spec(SOURCE)),
            ("arm", name.clone()),
            ("seed", self.seed.to_string()),
            ("size", self.extent.size.to_string()),
            ("epochs", self.extent.epochs.to_string()),
            ("folds", "5".to_owned()),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value));
        let args = TrainArgs {
            out: &run,
            config: None,
            settings: &settings,
            resume: false,
        };
        let trained = train(&args, self.console, self.interrupt)?;
        let mut cells = vec![Cell::new(SOURCE.to_string(), &trained.validation)];
        for site in TARGETS {
            let out = self.out.join("results").join(&name).join(site.to_string());
            let args = EvaluateArgs {
                runs: std::slice::from_ref(&run),
                data: &self.spec(site),
                out: &out,
                drop_duplicates: false,
                include_training: false,
                device: Device::Cpu,
            };
            let evaluated = evaluate(&args, self.console, self.interrupt)?;
            cells.push(Cell::new(site.to_string(), &evaluated.metrics));
        }
        Ok(Row { name, cells })
    }

    /// The first lesions of every unseen site with their true outline and that of the consistency run.
    fn gallery(&self) -> Result<Vec<(Vec<u8>, String)>> {
        let run = self.run_folder(Arm::Consistency);
        let mut images = Vec::new();
        for site in TARGETS {
            let source = data::open(&self.spec(site))?;
            let cases = source.cases();
            let of = |label: Label| (0..cases.len()).filter(move |&i| cases[i].label == label);
            let shown: Vec<usize> = of(Label::Benign)
                .take(SHOWN / 2)
                .chain(of(Label::Malignant).take(SHOWN / 2))
                .collect();
            let file = |&i: &usize| {
                self.folder(site)
                    .join(cases[i].label.as_str())
                    .join(&cases[i].image)
            };
            let files: Vec<PathBuf> = shown.iter().map(file).collect();
            let out = self.out.join("overlays").join(site.to_string());
            let args = PredictArgs {
                runs: std::slice::from_ref(&run),
                files: &files,
                out: &out,
                device: Device::Cpu,
            };
            let predictions = predict(&args, self.console, self.interrupt)?;
            for (&i, prediction) in shown.iter().zip(predictions) {
                let Some(name) = &prediction.mask else {
                    continue;
                };
                let predicted = Mask::from(&image::read_mask(&out.join(name))?);
                let truth = Mask::from(&source.mask(i)?);
                let picture = source.image(i)?;
                let rgb = overlay(&picture, &[(&truth, TRUTH), (&predicted, PREDICTION)]);
                let png = image::png_rgb_bytes(picture.width, picture.height, &rgb);
                let mut row = PerImage::new(source.name(), &cases[i].image, None, cases[i].label);
                row.compare(&predicted, &truth, None)?;
                let caption = format!(
                    "site {site}, {}: Dice {}, p {}, φ {}",
                    cases[i].id(),
                    rounded(row.dice, 2),
                    rounded(prediction.p, 2),
                    rounded(prediction.phi, 2)
                );
                images.push((png, caption));
            }
        }
        Ok(images)
    }

    fn page(&self, rows: &[Row], gallery: &[(Vec<u8>, String)]) -> Result<String> {
        let Extent {
            train,
            test,
            size,
            epochs,
        } = self.extent;
        let mut page = Page::new("echograd: trained at one hospital, tested at three others");
        page.paragraph(&format!(
            "Two networks learned from {train} synthetic ultrasound images of site {SOURCE}, letterboxed to {size}×{size}, \
             for {epochs} epochs: one to outline the lesion and call it benign or malignant, the other with the \
             consistency term on top, which ties the call to the shape of the outline. Sites B, C and D ({test} images each) \
             differ in frequency, grain, gain, dynamic range and artefacts, and were not seen in training. Phantoms are no \
             patients: the figures show that everything works together, not how it would do in a clinic."
        ));
        page.section("What came out");
        let head: Vec<String> = std::iter::once("method".to_owned())
            .chain(TARGETS.map(|site| format!("site {site}")))
            .collect();
        let head: Vec<&str> = head.iter().map(String::as_str).collect();
        let table = |of: &dyn Fn(&Cell) -> Option<f64>| -> Vec<Vec<String>> {
            rows.iter()
                .filter(|row| row.cells.iter().any(|cell| of(cell).is_some()))
                .map(|row| {
                    let cells = row.cells[1..].iter().map(|cell| figure(of(cell)));
                    std::iter::once(row.name.clone()).chain(cells).collect()
                })
                .collect()
        };
        page.table(
            "Mean Dice at original resolution. The first line is the trivial baseline: one mask for every image, made \
             from all masks of the training site.",
            &head,
            &table(&|cell| cell.dice),
        );
        page.table(
            "AUC of the probability of malignancy.",
            &head,
            &table(&|cell| cell.auc),
        );
        page.paragraph(&format!(
            "One seed and {test} images a site: small differences between the two networks mean nothing."
        ));
        page.section("How they learned");
        for (column, label, caption) in [
            ("val_dice", "Dice, held-out part of site A", ""),
            (
                "loss",
                "training loss",
                "The consistency network's loss has one term more.",
            ),
        ] {
            let series: Vec<Series> = ARMS
                .into_iter()
                .map(|arm| {
                    let points = history(&self.run_folder(arm).join(METRICS), column)?;
                    Ok(Series {
                        name: super::name_of(&arm),
                        points,
                    })
                })
                .collect::<Result<_>>()?;
            page.figure(&curves("epoch", label, &series)?, caption);
        }
        page.section("What was drawn");
        page.paragraph(
            "The consistency run on the first lesions of each unseen site: its outline in yellow, the true one in blue. \
             p is the probability of malignancy, φ what the outline's shape alone suggests.",
        );
        page.gallery(gallery);
        Ok(page.finish())
    }
}

/// The same probability map for every image of a data set, evaluated as a network's would be.
fn constant(source: &dyn Source, map: &[f32]) -> Result<DatasetMetrics> {
    let size = map.len().isqrt();
    let rows: Vec<Result<PerImage>> = (0..source.cases().len())
        .into_par_iter()
        .map(|i| {
            let case = &source.cases()[i];
            let full = case.letterbox(size).inverse(map);
            let mask = Mask::new(
                case.width,
                case.height,
                full.iter().map(|&p| p >= 0.5).collect(),
            )?;
            let mut row =
                PerImage::new(source.name(), &case.image, case.patient.clone(), case.label);
            row.compare(&mask, &Mask::from(&source.mask(i)?), case.pixel_mm)?;
            Ok(row)
        })
        .collect();
    Ok(DatasetMetrics::of(
        &rows.into_iter().collect::<Result<Vec<_>>>()?,
    ))
}

/// A column of a run's metrics.csv over the epochs.
fn history(path: &Path, column: &str) -> Result<Vec<(f64, f64)>> {
    let failed = |e: csv::Error| Error::caused(path, "cannot be read as CSV", e);
    let mut reader = csv::Reader::from_path(path).map_err(failed)?;
    let header = reader.headers().map_err(failed)?.clone();
    let find = |name: &str| header.iter().position(|h| h == name);
    let (Some(x), Some(y)) = (find("epoch"), find(column)) else {
        return Err(Error::file(
            path,
            format!("expected columns epoch and {column}"),
        ));
    };
    let mut points = Vec::new();
    for record in reader.records() {
        let record = record.map_err(failed)?;
        if let (Ok(x), Ok(y)) = (record[x].parse(), record[y].parse()) {
            points.push((x, y));
        }
    }
    Ok(points)
}
