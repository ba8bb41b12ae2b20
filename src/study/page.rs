//! The report of a study: one page without references to anything outside of it, and its figures as files.

use std::collections::BTreeMap;
use std::path::Path;

use super::protocol::{Method, Run, Search};
use super::statistics::{
    ArmStatistics, AucComparison, Comparison, DataSetStatistics, Effect, Empty, EnsembleStatistics,
    Estimate, Flags, Measured, Spread, Statistics, Unit, averaged,
};
use super::{Histories, Manifest, Opened, PAGE, verdict};
use crate::data::image::{png_rgb_bytes, write_atomically};
use crate::data::letterbox::quantise;
use crate::data::{self, Label};
use crate::error::Result;
use crate::features::ShapeFeatures;
use crate::metrics::classification::Auc;
use crate::metrics::statistics::{FEW, Summary, mean, quantile};
use crate::metrics::{Mask, PerImage, SegmentationMetrics};
use crate::report::number::{self, ABSENT, figure, fixed, p_value, rounded};
use crate::report::plot::{Axis, Plot, rgb, standalone};
use crate::report::{Page, overlay};
use crate::train::evaluate::make_folder;
use crate::train::run::Epoch;
use crate::train::{Config, Model};

/// Dice on external data as the paper gives it (arXiv 2511.15968): data set, multi-task, with consistency.
const PAPER: [(&str, &str, f64, f64); 3] = [
    ("udiat", "UDIAT", 0.59, 0.81),
    ("busi", "BUSI", 0.56, 0.66),
    ("uclm", "BUS-UCLM", 0.49, 0.69),
];

/// Colour of true outlines.
const TRUTH: [u8; 3] = [255, 255, 255];

/// What the page is made from.
struct Material<'a> {
    manifest: &'a Manifest,
    statistics: &'a Statistics,
    measured: &'a [Measured],
    histories: &'a Histories,
}

/// Writes `report.html` and `figures/`.
///
/// # Errors
/// [`crate::Error::File`] if they cannot be written, or what the cases are drawn from cannot be read.
pub(super) fn write(
    out: &Path,
    manifest: &Manifest,
    statistics: &Statistics,
    measured: &[Measured],
    histories: &Histories,
    sets: &[Opened],
) -> Result<()> {
    let material = Material {
        manifest,
        statistics,
        measured,
        histories,
    };
    let sections = material.figures();
    let folder = out.join("figures");
    make_folder(&folder)?;
    for figure in sections.iter().flat_map(|(_, _, figures)| figures) {
        let path = folder.join(format!("{}.svg", figure.file));
        write_atomically(&path, standalone(&figure.svg).as_bytes())?;
    }
    let mut page = Page::new("Does consistency generalise?");
    material.opening(&mut page);
    material.tables(&mut page);
    for (heading, text, figures) in sections {
        if figures.is_empty() {
            continue;
        }
        page.section(heading).paragraph(text);
        let plots: Vec<_> = figures.into_iter().map(|f| (f.svg, f.caption)).collect();
        page.plots(&plots);
    }
    material.cases(&mut page, out, sets)?;
    material.closing(&mut page);
    write_atomically(&out.join(PAGE), page.finish().as_bytes())
}

/// A figure of the page.
struct Figure {
    file: String,
    svg: String,
    caption: String,
}

impl Figure {
    fn new(file: String, plot: &Plot, caption: String) -> Self {
        Self {
            svg: plot.finish(&caption),
            file,
            caption,
        }
    }
}

/// A heading, what there is to say, and the figures.
type Section = (&'static str, &'static str, Vec<Figure>);

/// A figure with its interval, and a mark where few patients or images are behind that.
pub(super) fn interval(value: Option<f64>, ci95: Option<[f64; 2]>, clusters: usize) -> String {
    let marked = value.and(ci95).is_some() && clusters < FEW;
    number::interval(value, ci95) + if marked { " †" } else { "" }
}

fn summary(summary: Option<&Summary>) -> String {
    summary.map_or(ABSENT.into(), |s| {
        interval(Some(s.mean), s.ci95, s.clusters)
    })
}

fn auc(auc: Option<Auc>) -> String {
    auc.map_or(ABSENT.into(), |auc| {
        interval(Some(auc.value), auc.ci95, auc.clusters)
    })
}

fn auc_difference(found: Option<&AucComparison>) -> String {
    found.map_or(ABSENT.into(), |found| {
        let delong = &found.delong;
        interval(Some(delong.value), found.ci95, delong.clusters)
    })
}

fn estimate(found: Option<Estimate>) -> String {
    found.map_or(ABSENT.into(), |e| {
        interval(Some(e.value), e.ci95, e.clusters)
    })
}

/// The number of images, and of patients where those are fewer.
fn counted(images: usize, clusters: usize) -> String {
    match clusters < images {
        true => format!("{clusters} patients, {images} images"),
        false => format!("{images} images"),
    }
}

impl Material<'_> {
    fn methods(&self) -> impl Iterator<Item = (usize, &Method)> {
        self.manifest.plan.methods.iter().enumerate()
    }

    fn segmenting(&self) -> impl Iterator<Item = (usize, &Method)> {
        self.methods().filter(|(_, m)| m.config.arm.segments())
    }

    /// The last method that has both a mask and a probability, else the last with a mask.
    fn main_method(&self) -> Option<(usize, &Method)> {
        let arms = |m: &Method| {
            super::protocol::ARMS
                .iter()
                .any(|(name, _)| *name == m.name)
        };
        let both = |m: &Method| m.config.arm.segments() && m.config.arm.classifies();
        let of =
            |wanted: &dyn Fn(&Method) -> bool| self.methods().filter(|(_, m)| wanted(m)).last();
        of(&|m| both(m) && arms(m))
            .or_else(|| of(&|m| both(m)))
            .or_else(|| self.segmenting().last())
    }

    fn arm<'a>(&self, set: &'a DataSetStatistics, method: &Method) -> Option<&'a ArmStatistics> {
        set.arms.get(&method.name)
    }

    /// Rows of one method on one data set, over all runs.
    fn rows<'a>(&'a self, set: usize, arm: &'a str) -> impl Iterator<Item = &'a PerImage> {
        let of_arm = self.measured.iter();
        let of_arm = of_arm.filter(move |m| m.set == set && m.run.arm == arm);
        of_arm.flat_map(|m| &m.rows)
    }

    /// One row for each image of one method on one data set.
    fn images(&self, set: usize, arm: &str) -> Vec<PerImage> {
        averaged(self.rows(set, arm)).into_values().collect()
    }

    fn opening(&self, page: &mut Page) {
        let plan = &self.manifest.plan;
        let [source, targets @ ..] = &self.manifest.data[..] else {
            return;
        };
        let describe = |set: &super::protocol::DataSet| {
            let [benign, malignant, normal] = set.cases;
            if set.lacks.labels {
                let lesions = benign + malignant;
                return format!("{} ({lesions} lesions, {normal} normal)", set.name);
            }
            format!(
                "{} ({benign} benign, {malignant} malignant, {normal} normal)",
                set.name
            )
        };
        let targets: Vec<String> = targets.iter().map(describe).collect();
        let count = |n: usize, what: &str| match n {
            1 => format!("1 {what}"),
            n => format!("{n} {what}s"),
        };
        page.paragraph(&format!(
            "{} trained on {}, in {} and {}, and tested on {} without any fine-tuning. {}; {}; the threshold is \
             0.5 throughout. Networks of preset {}, {}×{} pixels, {}.",
            count(plan.methods.len(), "method"),
            describe(source),
            count(plan.folds, "fold"),
            count(plan.seeds.len(), "seed"),
            targets.join(", "),
            alike(&plan.methods),
            chosen(plan.search.as_ref(), &source.sha256),
            toml_name(&plan.methods[0].config.preset),
            plan.methods[0].config.size,
            plan.methods[0].config.size,
            count(plan.methods[0].config.epochs as usize, "epoch"),
        ));
        let found = verdict::sentences(self.statistics);
        if !found.is_empty() {
            page.section("In short")
                .paragraph(verdict::RULE)
                .list(&found);
        }
        page.section("How to read it").paragraph(
            "An image's figures are averaged over the runs tested on it before anything is summarised or compared: \
             every run on a target, the runs that held the image out on the source. An ensemble is all networks of a method, \
             their masks and probabilities averaged before the threshold, on targets only; its probabilities are those \
             that the method has here anyway, its masks are not. An empty mask has Dice 0 and a distance of the image's \
             diagonal. Research software: nothing here is for decisions about patients.",
        );
        page.paragraph(
            "Brackets hold 95% intervals. The unit is the patient where some are known to have several images, else the image: \
             bootstraps of means draw whole patients, tests are of patients' means, DeLong's variances of AUCs are of \
             patients' sums (Obuchowski), on the logit scale, and Wilson's intervals of sensitivity and specificity count as \
             many images as are worth independent ones. A dagger (†) marks intervals with fewer than 20 patients or images \
             behind them, of AUCs of the rarer diagnosis: such intervals are rough, and more often too narrow than too wide. \
             On the source each image has its p from the networks of one fold; those of different folds have no scale in \
             common, so AUCs and ROC curves compare images of the same fold there.",
        );
    }

    fn tables(&self, page: &mut Page) {
        page.section("What came out");
        for set in &self.statistics.datasets {
            let arms: Vec<(&Method, &ArmStatistics)> = self
                .methods()
                .filter_map(|(_, method)| Some((method, self.arm(set, method)?)))
                .collect();
            let images = match set.unit {
                Unit::Patient => format!("{} images of {} patients", set.n, set.units),
                Unit::Image => format!("{} images", set.n),
            };
            let caption = match set.role {
                "source" => format!("{}, held out: {images}", set.dataset),
                _ => format!("{}, never seen: {images}", set.dataset),
            };
            let of_masks = format!(
                "{caption}. Dice and distances: of single networks, averaged; of an ensemble, of its one mask. Empty: masks of \
                 lesions that outline nothing, over all networks."
            );
            let masks = arms
                .iter()
                .filter_map(|(method, arm)| outlining(&method.name, Masks::of(arm)));
            let ensembles = arms.iter().filter_map(|(method, _)| {
                let ensemble = set.ensembles.get(&method.name)?;
                outlining(&together(&method.name), Masks::of_ensemble(ensemble))
            });
            let masks: Vec<_> = masks.chain(ensembles).collect();
            let diagnoses = arms
                .iter()
                .filter_map(|(method, arm)| diagnosing(method, arm));
            let head = [
                "outlining",
                "Dice",
                "median",
                "Dice of runs",
                "HD95 px",
                "ASSD px",
                "empty",
                "normals with a lesion",
            ];
            page.table(&of_masks, &head, &masks);
            let head = [
                "diagnosing",
                "AUC",
                "AUC of runs",
                "sens.",
                "spec.",
                "F1",
                "Brier",
                "ECE",
            ];
            let averaged = match set.role {
                "source" => "over the seeds of an image's fold, AUCs within folds",
                _ => "over folds and seeds, as of one system of all networks",
            };
            let of_p = format!(
                "{caption}. Figures are of p averaged {averaged}; only AUC of runs is of single networks, as Dice is."
            );
            page.table(&of_p, &head, &diagnoses.collect::<Vec<_>>());
        }
        self.paper(page);
        self.comparisons(page);
        self.interference(page);
        self.strata(page);
        self.flags(page);
    }

    fn paper(&self, page: &mut Page) {
        // What a reader takes for BUSI may be a part of it, or phantoms: the row says what it is.
        let target = |name: &str| {
            let sets = self.statistics.datasets.iter().zip(&self.manifest.data);
            let mut sets = sets.skip(1);
            sets.find(|(found, _)| found.dataset == name)
        };
        let rows: Vec<Vec<String>> = PAPER
            .into_iter()
            .map(|(set, name, multitask, consistency)| {
                let ours = |arm: &str| {
                    let (found, _) = target(set)?;
                    let arm = found.arms.get(arm)?;
                    arm.metrics.segmentation.as_ref().map(|s| s.dice)
                };
                let what = target(set).map_or(ABSENT.to_owned(), |(found, described)| {
                    let mut parts = described.data.rsplit(['/', '\\', ':']);
                    let last = parts.find(|part| !part.is_empty()).unwrap_or_default();
                    format!("{last} ({} images)", found.n)
                });
                vec![
                    name.to_owned(),
                    format!("{multitask:.2}"),
                    format!("{consistency:.2}"),
                    summary(ours("multitask").as_ref()),
                    summary(ours("consistency").as_ref()),
                    what,
                ]
            })
            .collect();
        page.section("Beside the paper").table(
            "Mean Dice on external data. The paper's columns are quoted from it (arXiv 2511.15968, trained on BrEaST) and were \
             not measured here; its formulas and schedule are not public, so these are two systems and not two runs of one.",
            &["data set", "paper, multi-task", "paper, consistency", "here, multi-task", "here, consistency", "here on"],
            &rows,
        );
    }

    fn comparisons(&self, page: &mut Page) {
        let each = |of: fn(&DataSetStatistics) -> &[Comparison]| {
            let sets = self.statistics.datasets.iter();
            sets.flat_map(move |set| of(set).iter().map(move |c| (set, c)))
        };
        let pair = |c: &Comparison| format!("{} − {}", c.a, c.b);
        let dice = |(set, c): (&DataSetStatistics, &Comparison)| {
            let d = c.dice.as_ref()?;
            Some(vec![
                pair(c),
                set.dataset.clone(),
                counted(d.difference.n, d.difference.clusters),
                summary(Some(&d.difference)),
                interval(
                    Some(d.hodges_lehmann.value),
                    d.hodges_lehmann.ci95,
                    d.difference.clusters,
                ),
                figure(d.rank_biserial),
                p_value(Some(d.wilcoxon.p_value)),
                p_value(d.holm),
                differences(d.by_run.as_ref()),
            ])
        };
        let auc = |(set, c): (&DataSetStatistics, &Comparison)| {
            let a = c.auc.as_ref()?;
            Some(vec![
                pair(c),
                set.dataset.clone(),
                auc_difference(Some(a)),
                p_value(Some(a.delong.p_value)),
                p_value(a.holm),
                differences(a.by_run.as_ref()),
            ])
        };
        let of_dice: Vec<_> = each(|set| &set.comparisons).filter_map(dice).collect();
        let of_auc: Vec<_> = each(|set| &set.comparisons).filter_map(auc).collect();
        let of_ensembles: Vec<_> = each(|set| &set.ensemble_comparisons)
            .filter_map(dice)
            .collect();
        if of_dice.is_empty() && of_auc.is_empty() {
            return;
        }
        let head = [
            "difference",
            "data set",
            "n",
            "mean",
            "centre",
            "r",
            "p",
            "p, Holm",
            "by runs",
        ];
        page.section("Is it chance?")
            .table(
                "Differences of Dice. Mean: of images. The others are of patients' means where patients have several images, else \
                 of images. Centre: Hodges–Lehmann. r: matched-pairs rank-biserial correlation, 1 if every one gains. p: Wilcoxon \
                 signed-rank. By runs: differences of the mean Dice of two runs of a fold and seed, their mean ± standard \
                 deviation and number.",
                &head,
                &of_dice,
            )
            .table(
                "The same for ensembles: what averaging a method's networks adds to them, and ensembles against each other.",
                &head,
                &of_ensembles,
            )
            .table(
                "Differences of the AUC of the averaged p, by DeLong's test for the same images, clustered by patient. By runs: \
                 differences of the AUC of two runs of a fold and seed.",
                &["difference", "data set", "AUC", "p", "p, Holm", "by runs"],
                &of_auc,
            )
            .paragraph(
                "A family of Holm's correction is one pair of methods and one figure over the targets; different pairs are \
                 not corrected for each other, and the source is outside, since its held-out parts chose the epochs. p and \
                 intervals hold for these trained networks and new images or patients, not for new trainings: how large that \
                 other part is, the spread by runs shows. A difference that single runs do not repeat says nothing about the methods, however small its p.",
            );
    }

    fn interference(&self, page: &mut Page) {
        let row = |set: &DataSetStatistics, what: &str, effect: Option<Effect>| {
            let effect = effect?;
            Some(vec![
                format!("{}, {what}", set.dataset),
                estimate(Some(effect.interference)),
                estimate(effect.won_back),
                effect
                    .share
                    .map_or(ABSENT.into(), |v| fixed(100.0 * v, 0) + "%"),
            ])
        };
        let rows: Vec<Vec<String>> = self
            .statistics
            .datasets
            .iter()
            .filter_map(|set| Some((set, set.interference.as_ref()?)))
            .flat_map(|(set, i)| [row(set, "Dice", i.dice), row(set, "AUC", i.auc)])
            .flatten()
            .collect();
        if !rows.is_empty() {
            page.section("Do the tasks disturb each other?").table(
                "Interference: multi-task less the task alone; below 0, learning both costs something. Won back: what \
                 consistency adds to multi-task, also as a share of the loss where the interval of that lies below 0.",
                &["figure", "interference", "won back", "share"],
                &rows,
            );
        }
    }

    fn strata(&self, page: &mut Page) {
        let parts = ["benign", "malignant", "small", "medium", "large"];
        let mut rows = Vec::new();
        for set in &self.statistics.datasets {
            for (_, method) in self.segmenting() {
                let Some(arm) = self.arm(set, method) else {
                    continue;
                };
                let dice = |part: &&str| summary(arm.strata.get(part));
                let cells = parts.iter().map(dice);
                rows.push(
                    std::iter::once(on(set, &method.name))
                        .chain(cells)
                        .collect(),
                );
            }
        }
        if !rows.is_empty() {
            page.section("Where does it work?").table(
                "Dice by diagnosis, and by thirds of the lesion's share of the image.",
                &[
                    "data set: method",
                    "benign",
                    "malignant",
                    "small",
                    "medium",
                    "large",
                ],
                &rows,
            );
        }
    }

    fn flags(&self, page: &mut Page) {
        let (mut diagnoses, mut masks) = (Vec::new(), Vec::new());
        for set in &self.statistics.datasets {
            for (_, method) in self.methods() {
                // An ensemble's probabilities are its method's, and it has signals of its own besides.
                let ensemble = set.ensembles.get(&method.name);
                let (name, of_diagnoses) = match ensemble {
                    Some(ensemble) => (together(&method.name), &ensemble.wrong_diagnoses),
                    None => match self.arm(set, method) {
                        Some(arm) => (method.name.clone(), &arm.flags),
                        None => continue,
                    },
                };
                let row = |flags: &Flags| {
                    vec![
                        on(set, &name),
                        format!("{} of {}", flags.wrong, flags.n),
                        flags.without_shape.to_string(),
                        auc(flags.disagreement_with_prior),
                        auc(flags.ambiguity),
                        auc_difference(flags.prior_less_ambiguity.as_ref()),
                        auc(flags.disagreement_of_probabilities),
                        auc(flags.disagreement_of_masks),
                    ]
                };
                diagnoses.extend(of_diagnoses.as_ref().map(row));
                masks.extend(ensemble.and_then(|e| e.bad_masks.as_ref()).map(row));
            }
        }
        if diagnoses.is_empty() && masks.is_empty() {
            return;
        }
        let head = [
            "data set: method",
            "wrong",
            "no φ",
            "|p − φ|",
            "ambiguity",
            "|p − φ| less ambiguity",
            "p differs",
            "masks differ",
        ];
        page.section("Can a wrong answer be told?")
            .table(
                "AUC with which a signal finds wrong diagnoses, among images in which a lesion was outlined: |p − φ|, that the \
                 mask's shape contradicts p; ambiguity, that p is near 0.5, which any other signal must beat, and by how much \
                 |p − φ| does on the same images (DeLong). No φ: further images, in which none was outlined. In ensembles, how \
                 far the networks' p are apart, and how little their masks overlap.",
                &head,
                &diagnoses,
            )
            .table(
                "The same for masks with a Dice below 0.5.",
                &head,
                &masks,
            );
    }

    fn figures(&self) -> Vec<Section> {
        let per_set = |make: &dyn Fn(usize, &DataSetStatistics) -> Option<Figure>| -> Vec<Figure> {
            let sets = self.statistics.datasets.iter().enumerate();
            sets.filter_map(|(i, set)| make(i, set)).collect()
        };
        vec![
            (
                "Dice by method",
                "Boxes from quartile to quartile with the median, lines from the 5th to the 95th percentile, the mean as a dot.",
                per_set(&|i, set| self.boxes(i, set)),
            ),
            (
                "Differences of Dice",
                "Mean differences of the same images with their 95% intervals, whole and by part of the data. Right of 0, the first \
                 method is better.",
                self.forests(),
            ),
            (
                "Telling malignant from benign",
                "ROC curves, on the source the mean of the folds' curves, and how often lesions given a probability are malignant; points right below the diagonal are overconfident.",
                [
                    per_set(&|_, set| self.roc(set)),
                    per_set(&|_, set| self.calibration(set)),
                ]
                .into_iter()
                .flatten()
                .collect(),
            ),
            (
                "Training",
                "Means over the runs that reach an epoch.",
                self.training(),
            ),
            (
                "The prior",
                "What the mask's shape suggests (φ) against what the classifier says (p), and the weights of φ under their BI-RADS names.",
                per_set(&|i, set| self.phi(i, set))
                    .into_iter()
                    .chain(self.weights())
                    .collect(),
            ),
            (
                "Features of the predicted masks",
                "By diagnosis and data set; boxes as above.",
                self.features(),
            ),
        ]
    }

    fn boxes(&self, index: usize, set: &DataSetStatistics) -> Option<Figure> {
        let methods: Vec<_> = self.segmenting().collect();
        let names: Vec<String> = methods.iter().map(|(_, m)| m.name.clone()).collect();
        let mut plot = Plot::new(Axis::places("", &names), Axis::unit("Dice"));
        let mut any = false;
        for (place, (colour, method)) in methods.iter().enumerate() {
            let images = self.images(index, &method.name);
            let dice: Vec<f64> = images.iter().filter_map(|row| row.dice).collect();
            if let Some(values) = five(&dice) {
                plot.bar(*colour, place as f64, 0.5, values);
                any = true;
            }
        }
        let caption = format!("Dice on {}", set.dataset);
        any.then(|| Figure::new(format!("dice-{}", set.dataset), &plot, caption))
    }

    fn forests(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for set in &self.statistics.datasets {
            for c in &set.comparisons {
                let Some(d) = &c.dice else {
                    continue;
                };
                let parts = ["all", "benign", "malignant", "small", "medium", "large"];
                let of = |part: &&str| match *part {
                    "all" => Some(&d.difference),
                    part => d.strata.get(part),
                };
                let range = |s: &Summary| {
                    let [low, high] = s.ci95.unwrap_or([s.mean; 2]);
                    [low, s.mean, high]
                };
                let found: Vec<(&str, [f64; 3])> = parts
                    .iter()
                    .rev()
                    .filter_map(|part| Some((*part, range(of(part)?))))
                    .collect();
                let ends = found.iter().flat_map(|(_, range)| *range).chain([0.0]);
                let Some(x) = Axis::around(&format!("Dice, {} − {}", c.a, c.b), ends) else {
                    continue;
                };
                let names: Vec<String> = found.iter().map(|(part, _)| (*part).to_owned()).collect();
                let mut plot = Plot::new(x, Axis::places("", &names));
                plot.guide(&[(0.0, -0.5), (0.0, names.len() as f64 - 0.5)]);
                let colour = self
                    .methods()
                    .find(|(_, m)| m.name == c.a)
                    .map_or(0, |(i, _)| i);
                for (place, (_, range)) in found.iter().enumerate() {
                    plot.range(colour, place as f64, *range);
                }
                let caption = format!("{} against {} on {}", c.a, c.b, set.dataset);
                let file = format!("difference-{}-{}-{}", c.a, c.b, set.dataset);
                figures.push(Figure::new(file, &plot, caption));
            }
        }
        figures
    }

    fn roc(&self, set: &DataSetStatistics) -> Option<Figure> {
        let mut plot = Plot::new(Axis::unit("1 − specificity"), Axis::unit("sensitivity"));
        plot.guide(&[(0.0, 0.0), (1.0, 1.0)]);
        let mut any = false;
        for (colour, method) in self.methods() {
            let Some(arm) = self.arm(set, method) else {
                continue;
            };
            let auc = arm.metrics.classification.as_ref().and_then(|c| c.auc);
            if let (Some(roc), Some(auc)) = (&arm.roc, auc) {
                let points: Vec<(f64, f64)> = roc.iter().map(|&[x, y]| (x, y)).collect();
                let name = format!("{} {:.3}", method.name, auc.value);
                plot.name(colour, &name).line(colour, &points);
                any = true;
            }
        }
        let caption = format!("ROC on {}, with the AUC", set.dataset);
        any.then(|| Figure::new(format!("roc-{}", set.dataset), &plot, caption))
    }

    fn calibration(&self, set: &DataSetStatistics) -> Option<Figure> {
        let mut plot = Plot::new(Axis::unit("mean p"), Axis::unit("share malignant"));
        plot.guide(&[(0.0, 0.0), (1.0, 1.0)]);
        let mut any = false;
        for (colour, method) in self.methods() {
            let Some(arm) = self
                .arm(set, method)
                .filter(|arm| !arm.reliability.is_empty())
            else {
                continue;
            };
            let points: Vec<_> = arm
                .reliability
                .iter()
                .map(|bin| (bin.p, bin.positives))
                .collect();
            plot.name(colour, &method.name)
                .line(colour, &points)
                .dots(colour, &points, 3.0);
            any = true;
        }
        let caption = format!("Calibration on {}", set.dataset);
        any.then(|| Figure::new(format!("calibration-{}", set.dataset), &plot, caption))
    }

    /// The mean over runs of a column of `metrics.csv`, by epoch.
    fn history(&self, arm: &str, column: Column<'_>) -> Vec<(f64, f64)> {
        let mut values: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (_, epochs) in self.histories.iter().filter(|(run, _)| run.arm == arm) {
            for epoch in epochs {
                values.entry(epoch.epoch).or_default().extend(column(epoch));
            }
        }
        let point = |(epoch, values): (u64, Vec<f64>)| Some((epoch as f64, mean(&values)?));
        values.into_iter().filter_map(point).collect()
    }

    fn curves(&self, file: &str, label: &str, caption: &str, column: Column<'_>) -> Option<Figure> {
        let plan = &self.manifest.plan;
        let lines: Vec<Line<'_>> = self
            .methods()
            .filter(|(_, method)| plan.trainer(method).name == method.name)
            .map(|(colour, method)| {
                (
                    colour,
                    method.name.as_str(),
                    self.history(&method.name, column),
                )
            })
            .filter(|(_, _, points)| !points.is_empty())
            .collect();
        lines_plot(label, &lines)
            .map(|plot| Figure::new(file.to_owned(), &plot, caption.to_owned()))
    }

    fn training(&self) -> Vec<Figure> {
        [
            self.curves(
                "training-dice",
                "Dice, held out",
                "Dice on the held-out part, at the network's size",
                &|e| e.val_dice,
            ),
            self.curves(
                "training-auc",
                "AUC, held out",
                "AUC on the held-out part",
                &|e| e.val_auc,
            ),
            self.curves(
                "training-loss",
                "loss",
                "The training loss; methods differ in its terms",
                &|e| Some(e.loss),
            ),
            self.curves(
                "training-consistency",
                "consistency term",
                "The consistency term with its ramp, before its weight",
                &|e| e.consistency,
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn phi(&self, index: usize, set: &DataSetStatistics) -> Option<Figure> {
        let (_, method) = self.main_method()?;
        let images = self.images(index, &method.name);
        let mut plot = Plot::new(Axis::unit("φ"), Axis::unit("p"));
        plot.guide(&[(0.0, 0.0), (1.0, 1.0)]);
        let mut any = false;
        for (colour, label) in [(0, Label::Benign), (1, Label::Malignant)] {
            let rows = images.iter().filter(|row| row.label == Some(label));
            let points: Vec<_> = rows.filter_map(|row| Some((row.phi?, row.p?))).collect();
            any |= !points.is_empty();
            plot.name(colour, label.as_str()).dots(colour, &points, 2.2);
        }
        let caption = format!("{} on {}: an image a point", method.name, set.dataset);
        any.then(|| Figure::new(format!("phi-{}", set.dataset), &plot, caption))
    }

    fn weights(&self) -> Option<Figure> {
        let (_, method) = self.main_method()?;
        let columns: [(&str, Column<'_>); 5] = [
            ("irregularity (shape)", &|e| e.prior_irregularity),
            ("orientation (not parallel)", &|e| e.prior_orientation),
            ("margin (not circumscribed)", &|e| e.prior_margin),
            ("roundness (oval to round)", &|e| e.prior_roundness),
            ("bias", &|e| e.prior_bias),
        ];
        let lines: Vec<Line<'_>> = columns
            .iter()
            .enumerate()
            .map(|(colour, (name, column))| (colour, *name, self.history(&method.name, column)))
            .filter(|(_, _, points)| !points.is_empty())
            .collect();
        let caption = format!("Weights of φ in {}", method.name);
        lines_plot("weight", &lines).map(|plot| Figure::new("prior-weights".into(), &plot, caption))
    }

    fn features(&self) -> Vec<Figure> {
        let Some((_, method)) = self.main_method() else {
            return Vec::new();
        };
        let names: Vec<String> = self
            .statistics
            .datasets
            .iter()
            .map(|s| s.dataset.clone())
            .collect();
        let images: Vec<Vec<PerImage>> = (0..names.len())
            .map(|set| self.images(set, &method.name))
            .collect();
        let of = |row: &PerImage, k: usize| {
            [row.irregularity, row.orientation, row.margin, row.roundness][k]
        };
        ShapeFeatures::NAMES
            .iter()
            .enumerate()
            .filter_map(|(k, name)| {
                let all = images.iter().flatten().filter_map(|row| of(row, k));
                let mut plot = Plot::new(Axis::places("", &names), Axis::around(name, all)?);
                for (colour, label) in [(0, Label::Benign), (1, Label::Malignant)] {
                    plot.name(colour, label.as_str());
                    for (set, rows) in images.iter().enumerate() {
                        let rows = rows.iter().filter(|row| row.label == Some(label));
                        let values: Vec<f64> = rows.filter_map(|row| of(row, k)).collect();
                        if let Some(values) = five(&values) {
                            let side = colour as f64 * 0.36 - 0.18;
                            plot.bar(colour, set as f64 + side, 0.28, values);
                        }
                    }
                }
                let caption = format!("{name}, {}", method.name);
                Some(Figure::new(format!("feature-{name}"), &plot, caption))
            })
            .collect()
    }

    /// The worst, the median and the best image of each data set by the main method, with every method's outline.
    fn cases(&self, page: &mut Page, out: &Path, sets: &[Opened]) -> Result<()> {
        let Some((_, main)) = self.main_method() else {
            return Ok(());
        };
        // One run of each method draws: the first that all have.
        let has = |run: &Run| {
            self.segmenting().all(|(_, method)| {
                let same = Run {
                    arm: method.name.clone(),
                    ..run.clone()
                };
                self.histories.contains_key(&same)
            })
        };
        let mut runs = self.histories.keys().filter(|run| run.arm == main.name);
        let Some(run) = runs.find(|run| has(run)) else {
            return Ok(());
        };
        let of = |set: usize, arm: &str| {
            let mut found = self.measured.iter();
            found.find(|m| {
                m.set == set && m.run.arm == arm && (m.run.fold, m.run.seed) == (run.fold, run.seed)
            })
        };
        let mut models = Vec::new();
        for (colour, method) in self.segmenting() {
            let own = Run {
                arm: method.name.clone(),
                ..run.clone()
            };
            let model = Model::open(&own.folder(out), method.config.device, 1)?;
            models.push((colour, method, model));
        }
        let mut shown = Vec::new();
        for (index, set) in sets.iter().enumerate() {
            let Some(measured) = of(index, &main.name) else {
                continue;
            };
            let mut ranked: Vec<&PerImage> = measured
                .rows
                .iter()
                .filter(|row| row.dice.is_some())
                .collect();
            ranked.sort_by(|a, b| {
                let dice = |row: &PerImage| row.dice.unwrap_or_default();
                dice(a)
                    .total_cmp(&dice(b))
                    .then_with(|| a.image.cmp(&b.image))
            });
            let Some(last) = ranked.len().checked_sub(1) else {
                continue;
            };
            let mut places = vec![("worst", 0), ("median", last / 2), ("best", last)];
            places.dedup_by_key(|place| place.1);
            for (what, place) in places {
                let row = ranked[place];
                let cases = set.source.cases();
                let Some(i) = set
                    .subset
                    .iter()
                    .copied()
                    .find(|&i| cases[i].image == row.image)
                else {
                    continue;
                };
                // It may have gone since it was tested.
                if set.source.image(i).and(set.source.mask(i)).is_err() {
                    continue;
                }
                let mut outlines = vec![(Mask::from(&set.source.mask(i)?), TRUTH)];
                let mut figures = Vec::new();
                for (colour, method, model) in &mut models {
                    let size = model.config().size;
                    let masks = model.map(
                        1,
                        |_| data::letterboxed_image(&*set.source, i, size),
                        |model, _, found| Ok(model.finding(&found, &cases[i].letterbox(size)).mask),
                        |_| Ok(()),
                    )?;
                    outlines.extend(masks.into_iter().flatten().map(|mask| (mask, rgb(*colour))));
                    let same = of(index, &method.name);
                    let same = same.and_then(|m| m.rows.iter().find(|r| r.image == row.image));
                    figures.push(format!(
                        "{} {}",
                        method.name,
                        rounded(same.and_then(|r| r.dice), 2)
                    ));
                }
                let picture = picture(set, i)?;
                let lines: Vec<(&Mask, [u8; 3])> = outlines.iter().map(|(m, c)| (m, *c)).collect();
                let pixels = overlay(&picture, &lines);
                let png = png_rgb_bytes(picture.width, picture.height, &pixels);
                let caption = format!(
                    "{}, {what}: {} ({}). Dice: {}; p {}, φ {}",
                    set.name,
                    cases[i].id(),
                    row.label.map_or("no diagnosis known", Label::as_str),
                    figures.join(", "),
                    rounded(row.p, 2),
                    rounded(row.phi, 2)
                );
                shown.push((png, caption));
            }
        }
        if shown.is_empty() {
            return Ok(());
        }
        page.section("Cases").paragraph(&format!(
            "The worst, the median and the best image by the Dice of {run}. White: the true outline; the methods in the \
             colours that they have in the plots, drawn by their runs of the same fold and seed."
        ));
        page.gallery(&shown);
        Ok(())
    }

    fn closing(&self, page: &mut Page) {
        if !self.statistics.not_computed.is_empty() {
            let missing = self.statistics.not_computed.iter();
            let missing: Vec<String> = missing
                .map(|m| format!("{}: {}", m.what, m.reason))
                .collect();
            page.section("Not computed").list(&missing);
        }
        page.section("Made from");
        let rows: Vec<Vec<String>> = self
            .manifest
            .data
            .iter()
            .map(|set| {
                let [benign, malignant, normal] = set.cases.map(|n| n.to_string());
                let [benign, malignant] = match set.lacks.labels {
                    true => [
                        format!("{} undiagnosed", set.cases[0] + set.cases[1]),
                        ABSENT.to_owned(),
                    ],
                    false => [benign, malignant],
                };
                let dropped = set.drops.len().to_string();
                vec![
                    set.name.clone(),
                    benign,
                    malignant,
                    normal,
                    dropped,
                    set.sha256[..16].to_owned(),
                ]
            })
            .collect();
        page.table(
            "Data as found; the hash is over images, labels, patients, pixel sizes and masks.",
            &[
                "data set",
                "benign",
                "malignant",
                "normal",
                "left out",
                "SHA-256",
            ],
            &rows,
        );
        let base = Config::preset(self.manifest.plan.methods[0].config.preset);
        let methods: Vec<String> = self
            .methods()
            .map(|(_, method)| format!("{}: {}", method.name, changes(&base, &method.config)))
            .collect();
        page.paragraph("What each method has otherwise than its preset; study.toml has the whole configuration.")
            .list(&methods);
        let resumed = self.manifest.resumed.iter();
        let by: Vec<String> = std::iter::once(&self.manifest.begun)
            .chain(resumed)
            .map(ToString::to_string)
            .collect();
        page.paragraph(&format!("By {}.", by.join("; resumed by ")));
    }
}

/// A method on a data set, as one name: of a table that is scrolled the first column stays.
fn on(set: &DataSetStatistics, method: &str) -> String {
    format!("{}: {method}", set.dataset)
}

/// The name of a method's ensemble.
fn together(method: &str) -> String {
    format!("{method}, ensemble")
}

/// What a table of masks shows.
struct Masks<'a> {
    found: Option<&'a SegmentationMetrics>,
    by_run: Option<&'a Spread>,
    empty: Empty,
    /// Share of images without a lesion in which one was outlined.
    false_positives: Option<f64>,
}

impl<'a> Masks<'a> {
    fn of(arm: &'a ArmStatistics) -> Self {
        let normals = arm.normals.as_ref();
        Self {
            found: arm.metrics.segmentation.as_ref(),
            by_run: arm.dice_by_run.as_ref(),
            empty: arm.empty,
            false_positives: normals.map(|n| n.false_positive_rate.mean),
        }
    }

    fn of_ensemble(ensemble: &'a EnsembleStatistics) -> Self {
        let normals = ensemble.metrics.normals.as_ref();
        Self {
            found: ensemble.metrics.segmentation.as_ref(),
            by_run: None,
            empty: ensemble.empty,
            false_positives: normals.map(|n| n.false_positive_rate),
        }
    }
}

/// The line of a table of masks.
fn outlining(name: &str, masks: Masks<'_>) -> Option<Vec<String>> {
    let found = masks.found;
    (found.is_some() || masks.false_positives.is_some()).then(|| {
        vec![
            name.to_owned(),
            summary(found.map(|s| &s.dice)),
            figure(found.map(|s| s.dice.median)),
            spread(masks.by_run),
            rounded(found.map(|s| s.hd95_px.mean), 1),
            rounded(found.map(|s| s.assd_px.mean), 1),
            format!("{} of {}", masks.empty.empty, masks.empty.of),
            figure(masks.false_positives),
        ]
    })
}

/// The line of a table of diagnoses.
fn diagnosing(method: &Method, arm: &ArmStatistics) -> Option<Vec<String>> {
    let found = arm.metrics.classification.as_ref()?;
    Some(vec![
        method.name.clone(),
        auc(found.auc),
        spread(arm.auc_by_run.as_ref()),
        share(found.sensitivity, found.sensitivity_ci95),
        share(found.specificity, found.specificity_ci95),
        figure(found.f1),
        figure(found.brier),
        figure(found.ece),
    ])
}

fn spread(runs: Option<&Spread>) -> String {
    runs.map_or(ABSENT.into(), |runs| match runs.sd {
        Some(sd) => format!("{} ± {}", fixed(runs.mean, 3), fixed(sd, 3)),
        None => fixed(runs.mean, 3),
    })
}

/// Paired differences of runs.
fn differences(runs: Option<&Spread>) -> String {
    runs.map_or(ABSENT.into(), |runs| {
        format!("{} ({})", spread(Some(runs)), runs.runs.len())
    })
}

/// A share with Wilson's interval, which holds for few images too.
fn share(value: Option<f64>, ci95: Option<[f64; 2]>) -> String {
    interval(value, ci95, usize::MAX)
}

/// Percentiles 5, 25, 50, 75, 95 and the mean.
fn five(values: &[f64]) -> Option<[f64; 6]> {
    let at = |q: f64| quantile(values, q);
    Some([
        at(0.05)?,
        at(0.25)?,
        at(0.5)?,
        at(0.75)?,
        at(0.95)?,
        mean(values)?,
    ])
}

/// A colour, a name, and points by epoch.
type Line<'a> = (usize, &'a str, Vec<(f64, f64)>);

/// A column of `metrics.csv`.
type Column<'a> = &'a dyn Fn(&Epoch) -> Option<f64>;

/// Named lines over epochs.
fn lines_plot(label: &str, lines: &[Line<'_>]) -> Option<Plot> {
    let points = || lines.iter().flat_map(|(_, _, points)| points);
    let x = Axis::around("epoch", points().map(|p| p.0))?;
    let mut plot = Plot::new(x, Axis::around(label, points().map(|p| p.1))?);
    for (colour, name, points) in lines {
        plot.name(*colour, name).line(*colour, points);
    }
    Some(plot)
}

/// The image at its own size, enlarged from the square of a pack.
fn picture(set: &Opened, i: usize) -> Result<data::image::Gray> {
    let image = set.source.image(i)?;
    let Some(size) = set.source.letterboxed() else {
        return Ok(image);
    };
    let case = &set.source.cases()[i];
    let unit: Vec<f32> = image.pixels.iter().map(|&v| f32::from(v) / 255.0).collect();
    let full = case.letterbox(size).inverse(&unit);
    Ok(data::image::Gray {
        width: case.width,
        height: case.height,
        pixels: quantise(&full),
    })
}

/// The name that a configuration's value has in TOML.
fn toml_name(value: &impl serde::Serialize) -> String {
    let value = toml::Value::try_from(value);
    value.map_or_else(
        |_| String::new(),
        |v| v.as_str().unwrap_or_default().to_owned(),
    )
}

/// `key = value` where a configuration differs from its preset, those aside that every run has its own of.
fn changes(base: &Config, config: &Config) -> String {
    let own = ["data", "seed", "fold", "folds", "preset"];
    let changed: Vec<String> = base
        .settings()
        .into_iter()
        .zip(config.settings())
        .filter(|((key, before), (_, after))| before != after && !own.contains(&key.as_str()))
        .map(|(_, (key, value))| format!("{key} = {value}"))
        .collect();
    changed.join(", ")
}

/// What the methods' training has in common, and where it differs beyond the loss.
fn alike(methods: &[Method]) -> String {
    let keys = [
        "preset",
        "init",
        "model.kind",
        "model.widths",
        "size",
        "batch",
        "epochs",
    ];
    let settings: Vec<(&str, Vec<(String, String)>)> = methods
        .iter()
        .map(|method| (method.name.as_str(), method.config.settings()))
        .collect();
    let mut differing = Vec::new();
    for key in keys {
        let values: Vec<(&str, &str)> = settings
            .iter()
            .flat_map(|(name, all)| all.iter().map(move |(key, value)| (*name, key, value)))
            .filter(|(_, own, _)| *own == key)
            .map(|(name, _, value)| (name, value.as_str()))
            .collect();
        if values.iter().any(|(_, value)| *value != values[0].1) {
            let values = values.iter().map(|(name, value)| match *value {
                "" => format!("{name} none"),
                value => format!("{name} {value}"),
            });
            differing.push(format!("{key} ({})", values.collect::<Vec<_>>().join(", ")));
        }
    }
    let early = methods
        .iter()
        .any(|method| method.config.early_stopping.patience > 0);
    let early = if early {
        ", each up to where early stopping ended it"
    } else {
        ""
    };
    match differing.is_empty() {
        true => format!("Every method saw the same folds, starting weights and steps{early}"),
        false => format!(
            "Every method saw the same folds, but they differ in {}, and steps or starting weights with them{early}",
            differing.join(", ")
        ),
    }
}

/// What the held-out parts chose.
fn chosen(search: Option<&Search>, source: &str) -> String {
    let epoch = "the held-out part of each fold chose the epoch";
    let Some(search) = search else {
        return format!(
            "{epoch}, and if settings were chosen by trials on the same images, figures on the source are optimistic"
        );
    };
    let trials: Vec<String> = search
        .trials
        .iter()
        .map(|(method, n)| format!("{method} {n}"))
        .collect();
    let trials = trials.join(", ");
    match search.sha256 == source {
        true => format!(
            "{epoch}, and a search on the same images chose settings before (trials: {trials}), so figures on the source \
             are optimistic"
        ),
        false => format!(
            "{epoch}; a search on other images, {}, chose settings before (trials: {trials})",
            search.source
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::protocol::Overlay;

    fn method(name: &str, settings: &[(&str, &str)]) -> Method {
        let mut method = Overlay::default().method(name).unwrap();
        let settings = settings.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        method.config = method.config.with(&settings.collect::<Vec<_>>()).unwrap();
        method
    }

    #[test]
    fn what_methods_have_in_common_is_said_as_it_is() {
        let never = [("early_stopping.patience", "0")];
        let one = method("multitask", &never);
        let same = [one.clone(), method("consistency", &never)];
        assert_eq!(
            alike(&same),
            "Every method saw the same folds, starting weights and steps"
        );
        let early = [
            one.clone(),
            method("consistency", &[("early_stopping.patience", "3")]),
        ];
        assert_eq!(
            alike(&early),
            "Every method saw the same folds, starting weights and steps, each up to where early stopping ended it"
        );
        let longer = [
            ("early_stopping.patience", "0"),
            ("epochs", "60"),
            ("init", "x"),
        ];
        assert_eq!(
            alike(&[one, method("consistency", &longer)]),
            "Every method saw the same folds, but they differ in init (multitask none, consistency x), epochs (multitask \
             50, consistency 60), and steps or starting weights with them"
        );
    }

    #[test]
    fn what_chose_the_settings_is_said_as_far_as_it_is_known() {
        let search = Search {
            source: "busi:a".to_owned(),
            sha256: "12".to_owned(),
            trials: BTreeMap::from([("consistency".to_owned(), 14), ("multitask".to_owned(), 3)]),
        };
        let epoch = "the held-out part of each fold chose the epoch";
        for (search, source, expected) in [
            (
                None,
                "12",
                ", and if settings were chosen by trials on the same images, figures on the source are optimistic",
            ),
            (
                Some(&search),
                "12",
                ", and a search on the same images chose settings before (trials: consistency 14, multitask 3), so figures \
                 on the source are optimistic",
            ),
            (
                Some(&search),
                "34",
                "; a search on other images, busi:a, chose settings before (trials: consistency 14, multitask 3)",
            ),
        ] {
            assert_eq!(chosen(search, source), format!("{epoch}{expected}"));
        }
    }
}
