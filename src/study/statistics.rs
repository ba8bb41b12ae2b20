//! The figures of a study, `statistics.json`.
//!
//! Each method is trained several times, on folds and with seeds. An image's metrics are averaged over the runs that
//! were tested on it, which makes one number for each image and method; those are summarised and compared. Comparisons
//! take only runs that both methods have. How much single runs scatter is reported beside it: what is tested are the
//! networks at hand on new images, and not the methods in new trainings.
//!
//! Images of one patient are not independent. Where patients have several, tests of Dice and their effect sizes are of
//! patients' means, bootstraps draw whole patients, and variances of AUCs are of patients' sums. On the source each image
//! is scored by the networks of its own fold alone, whose scores have no scale in common with those of the other folds:
//! AUCs and ROC curves compare images within folds there.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use super::Missing;
use super::ensemble::Ensemble;
use super::protocol::{DataSet, Method, Protocol, Run};
use crate::metrics::classification::{
    Auc, AucDifference, Case, Reliability, THRESHOLD, reliability, roc,
};
use crate::metrics::paired::{HodgesLehmann, Wilcoxon, holm, rank_biserial};
use crate::metrics::statistics::{Summary, mean, quantile, sample_variance};
use crate::metrics::{DatasetMetrics, NormalMetrics, PerImage};
use crate::train::config::Arm;

/// Results of one run on one data set.
#[derive(Clone, PartialEq, Debug)]
pub struct Measured {
    /// The run.
    pub run: Run,
    /// The data set: 0 is the source.
    pub set: usize,
    /// A row for each image.
    pub rows: Vec<PerImage>,
}

/// The statistics of a study.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Statistics {
    /// The methods, in their order.
    pub arms: Vec<String>,
    /// The data sets; the first is the source, of whose images each was held out by the runs tested on it.
    pub datasets: Vec<DataSetStatistics>,
    /// What could not be computed, and why.
    pub not_computed: Vec<Missing>,
}

/// The statistics of one data set.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DataSetStatistics {
    /// Its name.
    pub dataset: String,
    /// `source` or `target`.
    pub role: &'static str,
    /// Number of images.
    pub n: usize,
    /// What is independent: what tests count, and intervals draw.
    pub unit: Unit,
    /// Number of patients, where any has several images, images without a known one counted each; else of images.
    pub units: usize,
    /// Each method alone.
    pub arms: BTreeMap<String, ArmStatistics>,
    /// Pairs of methods.
    pub comparisons: Vec<Comparison>,
    /// What training both tasks together costs, and what consistency wins back.
    pub interference: Option<Interference>,
    /// On a target, the networks of each method together.
    pub ensembles: BTreeMap<String, EnsembleStatistics>,
    /// Each ensemble against the mean of its networks, and pairs of ensembles; of Dice alone, since the probabilities
    /// are those of the methods.
    pub ensemble_comparisons: Vec<Comparison>,
}

/// What is independent in a data set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Images: no patient is known to have two.
    Image,
    /// Patients: some have several images.
    Patient,
}

/// One method on one data set.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ArmStatistics {
    /// Runs that were tested.
    pub runs: usize,
    /// Predictions of lesions by single networks that outline nothing.
    pub empty: Empty,
    /// Metrics of images, averaged over runs.
    pub metrics: DatasetMetrics,
    /// Dice within parts of the data: `benign`, `malignant`, and thirds by the lesion's share of the image, `small`,
    /// `medium`, `large`.
    pub strata: BTreeMap<&'static str, Summary>,
    /// Mean Dice of each run alone.
    pub dice_by_run: Option<Spread>,
    /// AUC of each run alone.
    pub auc_by_run: Option<Spread>,
    /// False positives on images without a lesion.
    pub normals: Option<Normals>,
    /// Reliability diagram of the probabilities of malignancy.
    pub reliability: Vec<Reliability>,
    /// ROC curve, `[1 − specificity, sensitivity]`; on the source the mean of the folds' curves.
    pub roc: Option<Vec<[f64; 2]>>,
    /// How well signals that a user could see tell wrong diagnoses.
    pub flags: Option<Flags>,
}

/// How many predicted masks of lesions are empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Empty {
    /// Number of empty masks, whose Dice is 0.
    pub empty: usize,
    /// Number of masks.
    pub of: usize,
}

impl Empty {
    fn among<'a>(rows: impl Iterator<Item = &'a PerImage>) -> Self {
        let (mut empty, mut of) = (0, 0);
        for nothing in rows.filter_map(PerImage::predicts_nothing) {
            empty += usize::from(nothing);
            of += 1;
        }
        Self { empty, of }
    }
}

/// The networks of one method together on one target.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct EnsembleStatistics {
    /// Number of networks.
    pub models: usize,
    /// Lesions in which they outline nothing.
    pub empty: Empty,
    /// Metrics of their averaged masks and probabilities. The probabilities are those of the method, whose images are
    /// averaged over the same runs.
    pub metrics: DatasetMetrics,
    /// Dice within the strata of [`ArmStatistics::strata`].
    pub strata: BTreeMap<&'static str, Summary>,
    /// How well signals that a user could see tell wrong diagnoses.
    pub wrong_diagnoses: Option<Flags>,
    /// How well they tell bad masks: those with a Dice coefficient below [`BAD_DICE`].
    pub bad_masks: Option<Flags>,
}

/// A mask with a smaller Dice coefficient is bad.
pub const BAD_DICE: f64 = 0.5;

/// How a figure scatters over runs.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Spread {
    /// Mean over runs.
    pub mean: f64,
    /// Standard deviation over runs; absent for one.
    pub sd: Option<f64>,
    /// Each run's.
    pub runs: Vec<f64>,
}

/// What was segmented where there is no lesion.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Normals {
    /// Number of images.
    pub n: usize,
    /// Share of runs that predict a lesion in an image, over images.
    pub false_positive_rate: Summary,
    /// Pixels predicted in an image, averaged over runs, over images.
    pub false_positive_area: Summary,
}

/// AUC with which a signal finds what is wrong, on the same images for all signals: where there are masks, those in
/// which a lesion large enough to have a shape is predicted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Flags {
    /// Number of wrong answers.
    pub wrong: usize,
    /// Number of images.
    pub n: usize,
    /// Number of further images, left out since no mask of theirs has a shape, and so no φ.
    pub without_shape: usize,
    /// `|p − φ|`: the mask's shape contradicts the diagnosis.
    pub disagreement_with_prior: Option<Auc>,
    /// `0.5 − |p − 0.5|`: the probability itself is undecided. What any other flag must beat.
    pub ambiguity: Option<Auc>,
    /// The AUC of the first less that of the second, on the same images.
    pub prior_less_ambiguity: Option<AucComparison>,
    /// Standard deviation of `p` over the networks of an ensemble.
    pub disagreement_of_probabilities: Option<Auc>,
    /// 1 less the mean Dice of each two masks of an ensemble.
    pub disagreement_of_masks: Option<Auc>,
}

/// Two methods on one data set: differences are `a − b`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Comparison {
    /// The one.
    pub a: String,
    /// The other.
    pub b: String,
    /// Runs that both have.
    pub runs: usize,
    /// Dice, image by image.
    pub dice: Option<DiceDifference>,
    /// AUC of the probability of malignancy.
    pub auc: Option<AucComparison>,
}

/// Difference of Dice of the same images.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DiceDifference {
    /// Mean and median over images, and bootstrap interval of the mean, clustered by patient where patients are known.
    pub difference: Summary,
    /// The centre of the differences, averaged by patient; like the next two.
    pub hodges_lehmann: HodgesLehmann,
    /// Effect size; absent if nothing differs.
    pub rank_biserial: Option<f64>,
    /// The test.
    pub wilcoxon: Wilcoxon,
    /// The test's p-value, corrected by Holm over the targets; absent on the source, which chose the epochs.
    pub holm: Option<f64>,
    /// Differences of the mean Dice of two runs of a fold and seed: how much trainings scatter, which no test here knows
    /// of. Absent where not runs but ensembles are compared.
    pub by_run: Option<Spread>,
    /// Mean differences within the strata of [`ArmStatistics::strata`].
    pub strata: BTreeMap<&'static str, Summary>,
}

/// Difference of AUCs on the same images.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct AucComparison {
    /// DeLong's test.
    pub delong: AucDifference,
    /// 95% interval of the difference; absent if the two order all images alike.
    pub ci95: Option<[f64; 2]>,
    /// The test's p-value, corrected by Holm over the targets; absent on the source, which chose the epochs.
    pub holm: Option<f64>,
    /// Differences of the AUC of two runs of a fold and seed, as in [`DiceDifference::by_run`].
    pub by_run: Option<Spread>,
}

impl AucComparison {
    fn of(cases: &[Case<'_, [f64; 2]>]) -> Option<Self> {
        let delong = AucDifference::of(cases)?;
        Some(Self {
            ci95: delong.ci95(),
            delong,
            holm: None,
            by_run: None,
        })
    }
}

/// Interference of the two tasks. Negative: training them together costs something.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Interference {
    /// On mean Dice.
    pub dice: Option<Effect>,
    /// On the AUC.
    pub auc: Option<Effect>,
}

/// One task's share of [`Interference`].
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Effect {
    /// Multi-task less the task alone.
    pub interference: Estimate,
    /// Multi-task with consistency less without; absent if there is no such arm.
    pub won_back: Option<Estimate>,
    /// `won_back / −interference`, 1 if consistency makes up for it; absent unless the interval of `interference` lies
    /// below 0, since where nothing is surely lost there is no share to win back.
    pub share: Option<f64>,
}

/// A difference of two methods, as [`Comparison`] has it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Estimate {
    /// The difference.
    pub value: f64,
    /// Its 95% interval: by bootstrap of Dice, DeLong's of an AUC.
    pub ci95: Option<[f64; 2]>,
    /// Number of patients or images behind the interval, as in [`Summary::clusters`] and [`Auc::clusters`].
    pub clusters: usize,
}

/// Images of one method on one data set, averaged over runs, by name.
pub(super) type Images = BTreeMap<String, PerImage>;

impl Statistics {
    /// Computes everything from the rows of all runs and ensembles on `sets`, the source first.
    pub fn of(
        plan: &Protocol,
        measured: &[Measured],
        ensembles: &[Ensemble],
        sets: &[&DataSet],
    ) -> Self {
        let arms: Vec<&Method> = plan.methods.iter().collect();
        let mut datasets: Vec<DataSetStatistics> = sets
            .iter()
            .enumerate()
            .map(|(index, set)| {
                let measured: Vec<&Measured> = measured.iter().filter(|m| m.set == index).collect();
                let ensembles = ensembles.iter().filter(|e| e.set == index);
                let ensembles: BTreeMap<&str, &Ensemble> =
                    ensembles.map(|e| (e.arm.as_str(), e)).collect();
                let strata = match index {
                    0 => Strata::of(set).in_folds(&measured),
                    _ => Strata::of(set),
                };
                let comparisons: Vec<Comparison> = pairs(&arms)
                    .filter_map(|(a, b)| Comparison::of(&measured, a, b, &strata))
                    .collect();
                let (unit, units) = unit(&measured);
                let of_arm = |method: &&Method| {
                    let runs: Vec<&Measured> = of(&measured, &method.name).collect();
                    let statistics = ArmStatistics::of(&runs, &strata)?;
                    Some((method.name.clone(), statistics))
                };
                DataSetStatistics {
                    dataset: set.name.clone(),
                    role: if index == 0 { "source" } else { "target" },
                    n: set.images.len(),
                    unit,
                    units,
                    arms: arms.iter().filter_map(of_arm).collect(),
                    interference: Interference::of(&comparisons),
                    comparisons,
                    ensemble_comparisons: Comparison::of_ensembles(
                        &measured, &ensembles, &arms, &strata,
                    ),
                    ensembles: ensembles
                        .into_iter()
                        .map(|(arm, e)| (arm.to_owned(), EnsembleStatistics::of(e, &strata)))
                        .collect(),
                }
            })
            .collect();
        correct(&mut datasets);
        let not_computed =
            sets.iter()
                .zip(&datasets)
                .enumerate()
                .flat_map(|(index, (set, found))| {
                    let of_set = measured.iter().filter(|m| m.set == index);
                    let mut missing = absent(set, found);
                    missing.extend(untested(set, found, &of_set.collect::<Vec<_>>(), &arms));
                    missing
                });
        let alone = arms.iter().filter(|method| {
            let runs: BTreeSet<&Run> = measured.iter().map(|m| &m.run).collect();
            let mut of_method = runs.iter().filter(|run| run.arm == method.name);
            of_method.next().is_some() && of_method.next().is_none()
        });
        let alone = alone.map(|method| Missing {
            what: format!("{}, ensemble", method.name),
            reason: "it has one run, and an ensemble needs two".to_owned(),
        });
        Self {
            arms: arms.iter().map(|method| method.name.clone()).collect(),
            not_computed: not_computed.chain(alone).collect(),
            datasets,
        }
    }
}

/// Runs of one method.
fn of<'a>(measured: &[&'a Measured], arm: &str) -> impl Iterator<Item = &'a Measured> {
    let of_arm = measured.iter().filter(move |m| m.run.arm == arm);
    of_arm.copied().collect::<Vec<_>>().into_iter()
}

/// What is compared: each arm of the paper with those before it, everything else with the arm it comes from.
fn pairs<'a>(methods: &'a [&Method]) -> impl Iterator<Item = (&'a Method, &'a Method)> {
    let is_arm = |method: &Method| method.name == arm_name(method.config.arm);
    let mut pairs = Vec::new();
    for (i, a) in methods.iter().enumerate() {
        for (j, b) in methods.iter().enumerate() {
            let arms = is_arm(a) && is_arm(b) && j < i;
            let variant = !is_arm(a) && b.name == arm_name(a.config.arm);
            if arms || variant {
                pairs.push((*a, *b));
            }
        }
    }
    pairs.into_iter()
}

/// What is independent among the images of some runs, and how many there are.
fn unit(measured: &[&Measured]) -> (Unit, usize) {
    let rows = measured.iter().flat_map(|m| &m.rows);
    let images: BTreeMap<&str, Option<&str>> = rows
        .map(|row| (row.image.as_str(), row.patient.as_deref()))
        .collect();
    let patients: BTreeSet<&str> = images.values().copied().flatten().collect();
    let unknown = images.values().filter(|patient| patient.is_none()).count();
    let units = patients.len() + unknown;
    match units < images.len() {
        true => (Unit::Patient, units),
        false => (Unit::Image, units),
    }
}

fn arm_name(arm: Arm) -> &'static str {
    let known = super::protocol::ARMS
        .iter()
        .find(|(_, known)| *known == arm);
    known.expect("every arm has its name").0
}

/// One row for each image, averaged over runs.
fn images<'a>(runs: impl IntoIterator<Item = &'a Measured>) -> Images {
    averaged(runs.into_iter().flat_map(|run| &run.rows))
}

/// One row for each image, the mean of its rows.
pub(super) fn averaged<'a>(all: impl IntoIterator<Item = &'a PerImage>) -> Images {
    let mut rows: BTreeMap<&str, Vec<&PerImage>> = BTreeMap::new();
    for row in all {
        rows.entry(&row.image).or_default().push(row);
    }
    rows.into_iter()
        .filter_map(|(name, rows)| Some((name.to_owned(), PerImage::mean(rows)?)))
        .collect()
}

/// The parts of a data set that an image belongs to.
#[derive(Default)]
pub(super) struct Strata {
    third: HashMap<String, &'static str>,
    /// The fold that held an image out; empty where every network is tested on every image.
    fold: HashMap<String, usize>,
}

impl Strata {
    fn of(set: &DataSet) -> Self {
        let lesions: Vec<(&str, f64)> = set
            .images
            .iter()
            .zip(&set.lesion)
            .filter(|(_, lesion)| **lesion > 0.0)
            .map(|(image, lesion)| (image.image.as_str(), *lesion))
            .collect();
        let shares: Vec<f64> = lesions.iter().map(|(_, share)| *share).collect();
        let ends = [1.0 / 3.0, 2.0 / 3.0].map(|q| quantile(&shares, q).unwrap_or_default());
        let third = |share: f64| match () {
            () if share <= ends[0] => "small",
            () if share <= ends[1] => "medium",
            () => "large",
        };
        let named = lesions
            .iter()
            .map(|(name, share)| ((*name).to_owned(), third(*share)));
        Self {
            third: named.collect(),
            fold: HashMap::new(),
        }
    }

    /// The same, on the source: each lesion was held out by the fold whose runs were tested on it.
    fn in_folds(self, measured: &[&Measured]) -> Self {
        let lesions = |m: &&Measured| {
            let fold = m.run.fold;
            let lesions = m.rows.iter().filter(|row| row.diagnosis().is_some());
            let lesions = lesions.map(move |row| (row.image.clone(), fold));
            lesions.collect::<Vec<_>>()
        };
        Self {
            fold: measured.iter().flat_map(lesions).collect(),
            ..self
        }
    }

    fn case<'a, S>(&self, row: &'a PerImage, score: S, positive: bool) -> Case<'a, S> {
        Case {
            score,
            positive,
            patient: row.patient.as_deref(),
            fold: self.fold(row),
        }
    }

    /// [`Case::fold`] of an image.
    fn fold(&self, row: &PerImage) -> usize {
        self.fold.get(&row.image).copied().unwrap_or_default()
    }

    fn summarise<'a>(
        &self,
        values: impl Iterator<Item = (&'a PerImage, f64)>,
    ) -> BTreeMap<&'static str, Summary> {
        let mut parts: BTreeMap<&'static str, Vec<(f64, Option<&str>)>> = BTreeMap::new();
        for (row, value) in values {
            let value = (value, row.patient.as_deref());
            if let Some(label) = row.label {
                parts.entry(label.as_str()).or_default().push(value);
            }
            if let Some(third) = self.third.get(&row.image) {
                parts.entry(third).or_default().push(value);
            }
        }
        parts
            .into_iter()
            .filter_map(|(name, values)| Some((name, Summary::of(&values)?)))
            .collect()
    }
}

impl ArmStatistics {
    fn of(runs: &[&Measured], strata: &Strata) -> Option<Self> {
        if runs.is_empty() {
            return None;
        }
        let images = images(runs.iter().copied());
        let rows: Vec<PerImage> = images.values().cloned().collect();
        let cases: Vec<(f64, bool)> = rows.iter().filter_map(PerImage::diagnosis).collect();
        let in_folds: Vec<Case<'_>> = rows
            .iter()
            .filter_map(|row| row.case(strata.fold(row)))
            .collect();
        let dice = rows.iter().filter_map(|row| Some((row, row.dice?)));
        let normals = Normals::of(runs);
        let mut metrics = DatasetMetrics::by_fold(&rows, |row| strata.fold(row));
        metrics.normals = normals.as_ref().map(|normals| NormalMetrics {
            n: normals.n,
            false_positive_rate: normals.false_positive_rate.mean,
            false_positive_area: normals.false_positive_area,
        });
        Some(Self {
            runs: runs.len(),
            empty: Empty::among(runs.iter().flat_map(|run| &run.rows)),
            strata: strata.summarise(dice),
            dice_by_run: Spread::of(runs.iter().filter_map(|run| run.dice()).collect()),
            auc_by_run: Spread::of(runs.iter().filter_map(|run| run.auc()).collect()),
            normals,
            reliability: reliability(&cases),
            roc: roc(&in_folds),
            flags: Flags::of(&rows, strata, wrong_diagnosis),
            metrics,
        })
    }
}

impl Measured {
    /// Mean Dice.
    fn dice(&self) -> Option<f64> {
        mean(
            &self
                .rows
                .iter()
                .filter_map(|row| row.dice)
                .collect::<Vec<_>>(),
        )
    }

    fn auc(&self) -> Option<f64> {
        let cases: Vec<_> = self.rows.iter().filter_map(PerImage::diagnosis).collect();
        Auc::of(&cases).map(|auc| auc.value)
    }
}

impl Spread {
    fn of(runs: Vec<f64>) -> Option<Self> {
        Some(Self {
            mean: mean(&runs)?,
            sd: sample_variance(&runs).map(f64::sqrt),
            runs,
        })
    }
}

impl Normals {
    fn of(runs: &[&Measured]) -> Option<Self> {
        let mut areas: BTreeMap<&str, (Option<&str>, Vec<f64>)> = BTreeMap::new();
        for row in runs.iter().flat_map(|run| &run.rows) {
            if let Some(area) = row.false_positive_area {
                let entry = areas.entry(&row.image).or_default();
                entry.0 = row.patient.as_deref();
                entry.1.push(area as f64);
            }
        }
        let over = |figure: &dyn Fn(&f64) -> f64| {
            let values = areas.values().filter_map(|(patient, areas)| {
                let figures: Vec<f64> = areas.iter().map(figure).collect();
                Some((mean(&figures)?, *patient))
            });
            Summary::of(&values.collect::<Vec<_>>())
        };
        Some(Self {
            n: areas.len(),
            false_positive_rate: over(&|area| f64::from(u8::from(*area > 0.0)))?,
            false_positive_area: over(&|area| *area)?,
        })
    }
}

impl EnsembleStatistics {
    fn of(ensemble: &Ensemble, strata: &Strata) -> Self {
        let rows = &ensemble.rows;
        let dice = rows.iter().filter_map(|row| Some((row, row.dice?)));
        Self {
            models: ensemble.members.len(),
            empty: Empty::among(rows.iter()),
            strata: strata.summarise(dice),
            wrong_diagnoses: Flags::of(rows, strata, wrong_diagnosis),
            bad_masks: Flags::of(rows, strata, |row| Some(row.dice? < BAD_DICE)),
            metrics: DatasetMetrics::of(rows),
        }
    }
}

/// Whether the diagnosis of an image is wrong, if there is one.
fn wrong_diagnosis(row: &PerImage) -> Option<bool> {
    let (p, malignant) = row.diagnosis()?;
    Some((p >= THRESHOLD) != malignant)
}

impl Flags {
    fn of(
        rows: &[PerImage],
        strata: &Strata,
        wrong: impl Fn(&PerImage) -> Option<bool>,
    ) -> Option<Self> {
        let masks = rows.iter().any(|row| row.irregularity.is_some());
        let answered: Vec<(&PerImage, bool)> = rows
            .iter()
            .filter_map(|row| Some((row, wrong(row)?)))
            .collect();
        let cases: Vec<(&PerImage, bool)> = answered
            .iter()
            .filter(|(row, _)| row.irregularity.is_some() || !masks)
            .copied()
            .collect();
        let auc = |signal: &dyn Fn(&PerImage) -> Option<f64>| {
            let signals = cases.iter();
            let signals =
                signals.filter_map(|&(row, wrong)| Some(strata.case(row, signal(row)?, wrong)));
            Auc::of(&signals.collect::<Vec<_>>())
        };
        let prior = |row: &PerImage| Some((row.p? - row.phi?).abs());
        let ambiguity = |row: &PerImage| Some(0.5 - (row.p? - 0.5).abs());
        let both = cases.iter().filter_map(|&(row, wrong)| {
            let signals = [prior(row)?, ambiguity(row)?];
            Some(strata.case(row, signals, wrong))
        });
        (!cases.is_empty()).then(|| Self {
            wrong: cases.iter().filter(|(_, wrong)| *wrong).count(),
            n: cases.len(),
            without_shape: answered.len() - cases.len(),
            disagreement_with_prior: auc(&prior),
            ambiguity: auc(&ambiguity),
            prior_less_ambiguity: AucComparison::of(&both.collect::<Vec<_>>()),
            disagreement_of_probabilities: auc(&|row| row.disagreement.p_sd),
            disagreement_of_masks: auc(&|row| Some(1.0 - row.disagreement.mask_agreement?)),
        })
    }
}

impl Comparison {
    fn of(measured: &[&Measured], a: &Method, b: &Method, strata: &Strata) -> Option<Self> {
        let runs = in_common(measured, &a.name, &b.name);
        if runs.is_empty() {
            return None;
        }
        let a_images = images(runs.iter().map(|(a, _)| *a));
        let b_images = images(runs.iter().map(|(_, b)| *b));
        let names = [&a.name, &b.name].map(String::clone);
        let mut found = Self::between(names, &a_images, &b_images, runs.len(), strata)?;
        let differences = |figure: fn(&Measured) -> Option<f64>| {
            let each = runs.iter();
            Spread::of(
                each.filter_map(|(a, b)| Some(figure(a)? - figure(b)?))
                    .collect(),
            )
        };
        if let Some(dice) = &mut found.dice {
            dice.by_run = differences(Measured::dice);
        }
        if let Some(auc) = &mut found.auc {
            auc.by_run = differences(Measured::auc);
        }
        Some(found)
    }

    /// Each ensemble against the mean of its networks, and the pairs of [`pairs`] whose ensembles are of the same
    /// folds and seeds.
    fn of_ensembles(
        measured: &[&Measured],
        ensembles: &BTreeMap<&str, &Ensemble>,
        methods: &[&Method],
        strata: &Strata,
    ) -> Vec<Self> {
        let name = |arm: &str| format!("{arm}, ensemble");
        let dice = |names: [String; 2], a: &Images, b: &Images, models: usize| {
            let both = Self::between(names, a, b, models, strata)?;
            both.dice.is_some().then_some(Self { auc: None, ..both })
        };
        let gains = methods.iter().filter_map(|method| {
            let ensemble = ensembles.get(method.name.as_str())?;
            let names = [name(&method.name), method.name.clone()];
            let alone = images(of(measured, &method.name));
            let models = ensemble.members.len();
            dice(names, &averaged(&ensemble.rows), &alone, models)
        });
        let pairs = pairs(methods).filter_map(|(a, b)| {
            let names = [name(&a.name), name(&b.name)];
            let [a, b] = [ensembles.get(&*a.name)?, ensembles.get(&*b.name)?];
            let same = a.members == b.members;
            let (rows, others) = (averaged(&a.rows), averaged(&b.rows));
            same.then(|| dice(names, &rows, &others, a.members.len()))?
        });
        gains.chain(pairs).collect()
    }

    /// Compares the images that both have; `None` if that says nothing.
    pub(super) fn between(
        [a, b]: [String; 2],
        a_images: &Images,
        b_images: &Images,
        runs: usize,
        strata: &Strata,
    ) -> Option<Self> {
        let both: Vec<(&PerImage, &PerImage)> = a_images
            .iter()
            .filter_map(|(name, a)| Some((a, b_images.get(name)?)))
            .collect();
        let cases: Vec<Case<'_, [f64; 2]>> = both
            .iter()
            .filter_map(|(a, b)| {
                let (p, malignant) = a.diagnosis()?;
                Some(strata.case(a, [p, b.p?], malignant))
            })
            .collect();
        let auc = AucComparison::of(&cases);
        let dice = DiceDifference::of(&both, strata);
        (dice.is_some() || auc.is_some()).then_some(Self {
            a,
            b,
            runs,
            dice,
            auc,
        })
    }
}

/// The runs of two methods, by fold and seed, that both have.
fn in_common<'a>(measured: &[&'a Measured], a: &str, b: &str) -> Vec<(&'a Measured, &'a Measured)> {
    let mut pairs = Vec::new();
    for one in of(measured, a) {
        let same = |m: &&Measured| (m.run.fold, m.run.seed) == (one.run.fold, one.run.seed);
        pairs.extend(of(measured, b).find(same).map(|other| (one, other)));
    }
    pairs
}

impl DiceDifference {
    fn of(both: &[(&PerImage, &PerImage)], strata: &Strata) -> Option<Self> {
        let paired: Vec<(&PerImage, f64)> = both
            .iter()
            .filter_map(|(a, b)| Some((*a, a.dice? - b.dice?)))
            .collect();
        let with_patient: Vec<(f64, Option<&str>)> = paired
            .iter()
            .map(|(row, d)| (*d, row.patient.as_deref()))
            .collect();
        let differences = by_patient(&with_patient);
        Some(Self {
            difference: Summary::of(&with_patient)?,
            hodges_lehmann: HodgesLehmann::of(&differences)?,
            rank_biserial: rank_biserial(&differences),
            wilcoxon: Wilcoxon::of(&differences),
            holm: None,
            by_run: None,
            strata: strata.summarise(paired.into_iter()),
        })
    }
}

/// Means by patient; values without a patient stand for themselves.
fn by_patient(values: &[(f64, Option<&str>)]) -> Vec<f64> {
    let mut patients: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut means = Vec::new();
    for (value, patient) in values {
        match patient {
            Some(patient) => patients.entry(patient).or_default().push(*value),
            None => means.push(*value),
        }
    }
    means.extend(patients.values().filter_map(|values| mean(values)));
    means
}

impl Interference {
    fn of(comparisons: &[Comparison]) -> Option<Self> {
        let found = Self {
            dice: Effect::of(Arm::Segmentation, |a, b| {
                difference(comparisons, a, b, Estimate::of_dice)
            }),
            auc: Effect::of(Arm::Classification, |a, b| {
                difference(comparisons, a, b, Estimate::of_auc)
            }),
        };
        (found.dice.is_some() || found.auc.is_some()).then_some(found)
    }
}

/// The difference of two arms, whichever of them is first in the comparison.
fn difference(
    comparisons: &[Comparison],
    a: Arm,
    b: Arm,
    of: fn(&Comparison) -> Option<Estimate>,
) -> Option<Estimate> {
    let find = |a: Arm, b: Arm| {
        let mut all = comparisons.iter();
        all.find(|c| (&*c.a, &*c.b) == (arm_name(a), arm_name(b)))
    };
    match find(a, b) {
        Some(there) => of(there),
        None => Some(of(find(b, a)?)?.turned()),
    }
}

impl Estimate {
    fn of_dice(comparison: &Comparison) -> Option<Self> {
        let Summary {
            mean,
            ci95,
            clusters,
            ..
        } = comparison.dice.as_ref()?.difference;
        Some(Self {
            value: mean,
            ci95,
            clusters,
        })
    }

    fn of_auc(comparison: &Comparison) -> Option<Self> {
        let AucComparison { delong, ci95, .. } = comparison.auc.as_ref()?;
        Some(Self {
            value: delong.value,
            ci95: *ci95,
            clusters: delong.clusters,
        })
    }

    /// The same with the two methods exchanged.
    fn turned(self) -> Self {
        Self {
            value: -self.value,
            ci95: self.ci95.map(|[low, high]| [-high, -low]),
            ..self
        }
    }
}

impl Effect {
    fn of(alone: Arm, difference: impl Fn(Arm, Arm) -> Option<Estimate>) -> Option<Self> {
        let interference = difference(Arm::Multitask, alone)?;
        let won_back = difference(Arm::Consistency, Arm::Multitask);
        let lost = interference.ci95.is_some_and(|[_, high]| high < 0.0);
        Some(Self {
            interference,
            won_back,
            share: won_back
                .filter(|_| lost)
                .map(|won| won.value / -interference.value),
        })
    }
}

/// Corrects each pair's tests over the targets. The source is none of the family: its held-out parts chose the epochs.
fn correct(datasets: &mut [DataSetStatistics]) {
    let mut pairs: BTreeMap<(String, String), Vec<&mut Comparison>> = BTreeMap::new();
    for set in datasets.iter_mut().filter(|set| set.role == "target") {
        let all = set.comparisons.iter_mut();
        for c in all.chain(&mut set.ensemble_comparisons) {
            pairs.entry((c.a.clone(), c.b.clone())).or_default().push(c);
        }
    }
    for same in pairs.values_mut() {
        let dice: Vec<_> = same
            .iter()
            .map(|c| c.dice.as_ref().map(|d| d.wilcoxon.p_value))
            .collect();
        let auc: Vec<_> = same
            .iter()
            .map(|c| c.auc.as_ref().map(|a| a.delong.p_value))
            .collect();
        for ((c, dice), auc) in same.iter_mut().zip(holm(&dice)).zip(holm(&auc)) {
            if let Some(difference) = &mut c.dice {
                difference.holm = dice;
            }
            if let Some(difference) = &mut c.auc {
                difference.holm = auc;
            }
        }
    }
}

/// Intervals and tests of AUCs that a data set cannot give.
fn untested(
    set: &DataSet,
    found: &DataSetStatistics,
    measured: &[&Measured],
    methods: &[&Method],
) -> Vec<Missing> {
    let auc = |arm: &str| found.arms.get(arm)?.metrics.classification.as_ref()?.auc;
    let missing = |what: String, reason: &str| Missing {
        what: format!("{}: {what}", found.dataset),
        reason: reason.to_owned(),
    };
    let [benign, malignant, _] = set.cases;
    let (unit, folds) = match (found.unit, found.role) {
        (Unit::Image, "source") => ("images", " in every fold"),
        (Unit::Image, _) => ("images", ""),
        (Unit::Patient, "source") => ("patients", " in every fold"),
        (Unit::Patient, _) => ("patients", ""),
    };
    let mut untested = Vec::new();
    let few = |arm: &str| auc(arm).is_some_and(|auc| auc.standard_error.is_none());
    let with_few = methods.iter().filter(|method| few(&method.name));
    let with_few: Vec<&str> = with_few.map(|method| method.name.as_str()).collect();
    if !with_few.is_empty() {
        let reason = format!(
            "{benign} benign and {malignant} malignant lesions, and it needs two {unit} of each{folds}"
        );
        let what = format!("interval and tests of the AUC of {}", with_few.join(", "));
        untested.push(missing(what, &reason));
    }
    for method in methods {
        if let Some(auc) = auc(&method.name).filter(|auc| auc.standard_error == Some(0.0)) {
            let reason = format!(
                "its scores separate the classes or are all alike, which shows no variance; Wilson's interval of {} {unit} \
                 stands in",
                auc.clusters
            );
            let what = format!("DeLong's interval of the AUC of {}", method.name);
            untested.push(missing(what, &reason));
        }
    }
    for (a, b) in pairs(methods) {
        let tested = |arm: &str| auc(arm).is_some_and(|auc| auc.standard_error.is_some());
        if !tested(&a.name) || !tested(&b.name) {
            continue;
        }
        let mut comparisons = found.comparisons.iter();
        let comparison = comparisons.find(|c| c.a == a.name && c.b == b.name);
        let pair = format!("{} − {}", a.name, b.name);
        match comparison.and_then(|c| c.auc.as_ref()) {
            Some(auc) if auc.ci95.is_none() => untested.push(missing(
                format!("interval of the difference of AUCs, {pair}"),
                "the two order all pairs of images alike; p is 1",
            )),
            Some(_) => {}
            None if in_common(measured, &a.name, &b.name).is_empty() => untested.push(missing(
                format!("tests of {pair}"),
                "they have no fold and seed in common",
            )),
            None => untested.push(missing(
                format!("test of the difference of AUCs, {pair}"),
                "the runs that both have show no variance of the difference",
            )),
        }
    }
    untested
}

/// What a data set cannot tell.
fn absent(set: &DataSet, found: &DataSetStatistics) -> Vec<Missing> {
    let [benign, malignant, normal] = set.cases;
    let missing = |what: &str, reason: String| Missing {
        what: format!("{}: {what}", found.dataset),
        reason,
    };
    let mut absent = Vec::new();
    if set.lacks.labels {
        let reason = "it has no labels.csv".to_owned();
        absent.push(missing("AUC, calibration, parts by diagnosis", reason));
    }
    if set.lacks.masks {
        let reason = "it has no masks".to_owned();
        absent.push(missing("Dice, distances, parts by size", reason));
    }
    if benign + malignant == 0 {
        let reason = format!("none of its {normal} images shows a lesion");
        absent.push(missing("Dice, AUC, calibration", reason));
    } else if !set.lacks.labels && (benign == 0 || malignant == 0) {
        let reason =
            format!("{benign} benign and {malignant} malignant lesions, and it needs both");
        absent.push(missing("AUC", reason));
    }
    if normal == 0 {
        let reason = "it has no images without a lesion".to_owned();
        absent.push(missing("false positives on normals", reason));
    }
    absent
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Label;

    /// An image of a patient, whose method has these figures.
    fn row(image: &str, patient: &str, malignant: bool, dice: f64, p: f64) -> PerImage {
        let label = if malignant {
            Label::Malignant
        } else {
            Label::Benign
        };
        let patient = Some(patient.to_owned()).filter(|patient| !patient.is_empty());
        let mut row = PerImage::new("set", image, patient, label);
        (row.dice, row.p) = (Some(dice), Some(p));
        row
    }

    fn compare(a: &[PerImage], b: &[PerImage], strata: &Strata) -> Comparison {
        let names = ["a", "b"].map(str::to_owned);
        Comparison::between(names, &averaged(a), &averaged(b), 1, strata).unwrap()
    }

    /// Seven patients; the images of each gain or lose together.
    fn images(repeats: usize, known: bool) -> [Vec<PerImage>; 2] {
        let gains = [2.0, 4.0, -1.0, 3.0, 6.0, 5.0, 1.0].map(|gain| gain / 16.0);
        let mut rows = [Vec::new(), Vec::new()];
        for (i, gain) in gains.into_iter().enumerate() {
            let patient = if known {
                format!("p{i}")
            } else {
                String::new()
            };
            for k in 0..repeats {
                let image = format!("{i}-{k}");
                let malignant = i % 2 == 1;
                let p = |step: usize| ((i * step) % 7) as f64 / 7.0 + 0.01 * k as f64;
                rows[0].push(row(&image, &patient, malignant, 0.5 + gain, p(3)));
                rows[1].push(row(&image, &patient, malignant, 0.5, p(2)));
            }
        }
        rows
    }

    #[test]
    fn patients_are_what_is_tested() {
        let strata = Strata::default();
        let of = |repeats: usize, known: bool| {
            let [a, b] = images(repeats, known);
            compare(&a, &b, &strata).dice.unwrap()
        };
        let (once, thrice, unknown) = (of(1, true), of(3, true), of(3, false));
        // Without repeats a patient is an image.
        assert_eq!(once, of(1, false));
        // Of 2⁷ choices of signs three have a sum of 0 or 1.5 of their negative ranks, and three of their positive ones.
        let test = once.wilcoxon;
        assert_eq!((test.n, test.positive, test.negative), (7, 26.5, 1.5));
        assert_eq!(test.p_value, 6.0 / 128.0);
        assert_eq!((thrice.wilcoxon.n, thrice.difference.n), (7, 21));
        assert!((thrice.wilcoxon.p_value - once.wilcoxon.p_value).abs() < 1e-12);
        assert!((thrice.hodges_lehmann.value - once.hodges_lehmann.value).abs() < 1e-12);
        let [ours, theirs] = [&thrice, &once].map(|d| d.hodges_lehmann.ci95.unwrap());
        assert!((ours[0] - theirs[0]).abs() + (ours[1] - theirs[1]).abs() < 1e-12);
        assert_eq!(thrice.difference.clusters, 7);
        assert!(unknown.wilcoxon.n == 21 && unknown.wilcoxon.p_value < once.wilcoxon.p_value);
    }

    /// Two networks that each separate the classes of their own fold, on scales of their own.
    #[test]
    fn folds_of_the_source_are_not_pooled() {
        let [mut rows, mut others] = [Vec::new(), Vec::new()];
        let mut strata = Strata::default();
        for i in 0..16_usize {
            let (fold, malignant) = (i % 2, i / 2 % 2 == 1);
            let p = 0.6 * fold as f64 + if malignant { 0.3 } else { 0.0 } + 0.005 * i as f64;
            let image = i.to_string();
            rows.push(row(&image, "", malignant, 0.5, p));
            others.push(row(&image, "", malignant, 0.5, (i * 5 % 16) as f64 / 16.0));
            strata.fold.insert(image, fold);
        }
        let within = DatasetMetrics::by_fold(&rows, |row| strata.fold(row));
        let within = within.classification.unwrap().auc.unwrap();
        let pooled = DatasetMetrics::of(&rows)
            .classification
            .unwrap()
            .auc
            .unwrap();
        assert_eq!((within.value, pooled.value), (1.0, 0.75));
        let both = compare(&rows, &others, &strata).auc.unwrap();
        let alone = DatasetMetrics::by_fold(&others, |row| strata.fold(row));
        let alone = alone.classification.unwrap().auc.unwrap();
        assert!((both.delong.value - (1.0 - alone.value)).abs() < 1e-12);
        assert!((both.delong.standard_error - alone.standard_error.unwrap()).abs() < 1e-12);
    }

    #[test]
    fn a_share_is_won_back_only_of_what_is_surely_lost() {
        let estimate = |value: f64, high: f64| Estimate {
            value,
            ci95: Some([2.0 * value - high, high]),
            clusters: 30,
        };
        let effect = |lost: Estimate| {
            let of = |a: Arm, _: Arm| match a {
                Arm::Multitask => Some(lost),
                _ => Some(estimate(0.02, 0.05)),
            };
            Effect::of(Arm::Segmentation, of).unwrap()
        };
        assert_eq!(effect(estimate(-0.04, -0.01)).share, Some(0.5));
        assert_eq!(effect(estimate(-0.04, 0.01)).share, None);
        assert_eq!(effect(estimate(0.04, 0.06)).share, None);
    }
}
