//! The figures of a study, `statistics.json`.
//!
//! Each method is trained several times, on folds and with seeds. An image's metrics are averaged over the runs that
//! were tested on it, which makes one number for each image and method; those are summarised and compared. Comparisons
//! take only runs that both methods have. How much single runs scatter is reported beside it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use super::Missing;
use super::ensemble::Ensemble;
use super::protocol::{DataSet, Method, Protocol, Run};
use crate::data::Label;
use crate::metrics::classification::{
    Auc, AucDifference, Reliability, THRESHOLD, reliability, roc,
};
use crate::metrics::paired::{HodgesLehmann, Wilcoxon, holm, rank_biserial};
use crate::metrics::statistics::{Summary, Z95, mean, quantile, sample_variance};
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

/// One method on one data set.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ArmStatistics {
    /// Runs that were tested.
    pub runs: usize,
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
    /// ROC curve, `[1 − specificity, sensitivity]`.
    pub roc: Option<Vec<[f64; 2]>>,
    /// How well signals that a user could see tell wrong diagnoses.
    pub flags: Option<Flags>,
}

/// The networks of one method together on one target.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct EnsembleStatistics {
    /// Number of networks.
    pub models: usize,
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
    /// `|p − φ|`: the mask's shape contradicts the diagnosis.
    pub disagreement_with_prior: Option<Auc>,
    /// `0.5 − |p − 0.5|`: the probability itself is undecided. What any other flag must beat.
    pub ambiguity: Option<Auc>,
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
    /// Mean, median and bootstrap interval of the mean, clustered by patient where patients are known.
    pub difference: Summary,
    /// The centre of the differences.
    pub hodges_lehmann: HodgesLehmann,
    /// Effect size; absent if no image differs.
    pub rank_biserial: Option<f64>,
    /// The test.
    pub wilcoxon: Wilcoxon,
    /// The test's p-value, corrected by Holm over the data sets.
    pub holm: Option<f64>,
    /// The test of differences averaged by patient, since images of one patient are not independent; absent
    /// where every image has a patient of its own, or none is known.
    pub by_patient: Option<Wilcoxon>,
    /// Mean differences within the strata of [`ArmStatistics::strata`].
    pub strata: BTreeMap<&'static str, Summary>,
}

/// Difference of AUCs on the same images.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct AucComparison {
    /// DeLong's test.
    pub delong: AucDifference,
    /// 95% interval of the difference.
    pub ci95: [f64; 2],
    /// The test's p-value, corrected by Holm over the data sets.
    pub holm: Option<f64>,
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
    pub interference: f64,
    /// Multi-task with consistency less without; absent if there is no such arm.
    pub won_back: Option<f64>,
    /// `won_back / −interference` where there is something to win back: 1 if consistency makes up for it.
    pub share: Option<f64>,
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
                let strata = Strata::of(set);
                let of_arm = |method: &&Method| {
                    let runs: Vec<&Measured> = of(&measured, &method.name).collect();
                    let statistics = ArmStatistics::of(&runs, &strata)?;
                    Some((method.name.clone(), statistics))
                };
                DataSetStatistics {
                    dataset: set.name.clone(),
                    role: if index == 0 { "source" } else { "target" },
                    n: set.images.len(),
                    arms: arms.iter().filter_map(of_arm).collect(),
                    comparisons: pairs(&arms)
                        .filter_map(|(a, b)| Comparison::of(&measured, a, b, &strata))
                        .collect(),
                    interference: Interference::of(&measured, &arms),
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
        let not_computed = sets
            .iter()
            .zip(&datasets)
            .flat_map(|(set, found)| absent(set, found));
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
        }
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
        let dice = rows.iter().filter_map(|row| Some((row, row.dice?)));
        let of_run = |run: &Measured| {
            let dice: Vec<f64> = run.rows.iter().filter_map(|row| row.dice).collect();
            mean(&dice)
        };
        let auc_of_run = |run: &Measured| {
            let cases: Vec<_> = run.rows.iter().filter_map(PerImage::diagnosis).collect();
            Auc::of(&cases).map(|auc| auc.value)
        };
        let normals = Normals::of(runs);
        let mut metrics = DatasetMetrics::of(&rows);
        metrics.normals = normals.as_ref().map(|normals| NormalMetrics {
            n: normals.n,
            false_positive_rate: normals.false_positive_rate.mean,
            false_positive_area: normals.false_positive_area,
        });
        Some(Self {
            runs: runs.len(),
            strata: strata.summarise(dice),
            dice_by_run: Spread::of(runs.iter().filter_map(|run| of_run(run)).collect()),
            auc_by_run: Spread::of(runs.iter().filter_map(|run| auc_of_run(run)).collect()),
            normals,
            reliability: reliability(&cases),
            roc: roc(&cases),
            flags: Flags::of(&rows, wrong_diagnosis),
            metrics,
        })
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
            strata: strata.summarise(dice),
            wrong_diagnoses: Flags::of(rows, wrong_diagnosis),
            bad_masks: Flags::of(rows, |row| Some(row.dice? < BAD_DICE)),
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
    fn of(rows: &[PerImage], wrong: impl Fn(&PerImage) -> Option<bool>) -> Option<Self> {
        let masks = rows.iter().any(|row| row.irregularity.is_some());
        let measurable = |row: &&PerImage| row.irregularity.is_some() || !masks;
        let cases: Vec<(&PerImage, bool)> = rows
            .iter()
            .filter(measurable)
            .filter_map(|row| Some((row, wrong(row)?)))
            .collect();
        let auc = |signal: &dyn Fn(&PerImage) -> Option<f64>| {
            let signals = cases.iter();
            let signals: Vec<_> = signals
                .filter_map(|&(row, wrong)| Some((signal(row)?, wrong)))
                .collect();
            Auc::of(&signals)
        };
        (!cases.is_empty()).then(|| Self {
            wrong: cases.iter().filter(|(_, wrong)| *wrong).count(),
            n: cases.len(),
            disagreement_with_prior: auc(&|row| Some((row.p? - row.phi?).abs())),
            ambiguity: auc(&|row| Some(0.5 - (row.p? - 0.5).abs())),
            disagreement_of_probabilities: auc(&|row| row.disagreement.p_sd),
            disagreement_of_masks: auc(&|row| Some(1.0 - row.disagreement.mask_agreement?)),
        })
    }
}

impl Comparison {
    fn of(measured: &[&Measured], a: &Method, b: &Method, strata: &Strata) -> Option<Self> {
        let (a_images, b_images, runs) = in_common(measured, &a.name, &b.name)?;
        let names = [&a.name, &b.name].map(String::clone);
        Self::between(names, &a_images, &b_images, runs, strata)
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
        let cases: Vec<([f64; 2], bool)> = both
            .iter()
            .filter_map(|(a, b)| {
                Some(([a.diagnosis()?.0, b.p?], a.label == Some(Label::Malignant)))
            })
            .collect();
        let auc = AucDifference::of(&cases).map(|delong| AucComparison {
            ci95: [-Z95, Z95].map(|z| delong.value + z * delong.standard_error),
            delong,
            holm: None,
        });
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

/// The images of two methods over the runs, by fold and seed, that both have, and the number of those.
fn in_common(measured: &[&Measured], a: &str, b: &str) -> Option<(Images, Images, usize)> {
    let keys = |arm: &str| -> BTreeSet<(usize, u64)> {
        of(measured, arm)
            .map(|m| (m.run.fold, m.run.seed))
            .collect()
    };
    let common: BTreeSet<_> = keys(a).intersection(&keys(b)).copied().collect();
    let images = |arm: &str| {
        let runs = of(measured, arm);
        images(runs.filter(|m| common.contains(&(m.run.fold, m.run.seed))))
    };
    (!common.is_empty()).then(|| (images(a), images(b), common.len()))
}

impl DiceDifference {
    fn of(both: &[(&PerImage, &PerImage)], strata: &Strata) -> Option<Self> {
        let paired: Vec<(&PerImage, f64)> = both
            .iter()
            .filter_map(|(a, b)| Some((*a, a.dice? - b.dice?)))
            .collect();
        let differences: Vec<f64> = paired.iter().map(|(_, d)| *d).collect();
        let with_patient: Vec<(f64, Option<&str>)> = paired
            .iter()
            .map(|(row, d)| (*d, row.patient.as_deref()))
            .collect();
        Some(Self {
            difference: Summary::of(&with_patient)?,
            hodges_lehmann: HodgesLehmann::of(&differences)?,
            rank_biserial: rank_biserial(&differences),
            wilcoxon: Wilcoxon::of(&differences),
            holm: None,
            by_patient: by_patient(&with_patient).map(|means| Wilcoxon::of(&means)),
            strata: strata.summarise(paired.into_iter()),
        })
    }
}

/// Means by patient; values without a patient stand for themselves. `None` if that changes nothing.
fn by_patient(values: &[(f64, Option<&str>)]) -> Option<Vec<f64>> {
    let mut patients: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut means = Vec::new();
    for (value, patient) in values {
        match patient {
            Some(patient) => patients.entry(patient).or_default().push(*value),
            None => means.push(*value),
        }
    }
    means.extend(patients.values().filter_map(|values| mean(values)));
    (means.len() < values.len()).then_some(means)
}

impl Interference {
    fn of(measured: &[&Measured], methods: &[&Method]) -> Option<Self> {
        let has = |arm: Arm| methods.iter().any(|m| m.name == arm_name(arm));
        if !has(Arm::Multitask) {
            return None;
        }
        let difference = |a: Arm, b: Arm, figure: &dyn Fn(&[&PerImage]) -> Option<f64>| {
            let (a, b, _) = in_common(measured, arm_name(a), arm_name(b))?;
            let of = |images: &Images, others: &Images| {
                let rows = images.iter().filter(|(name, _)| others.contains_key(*name));
                figure(&rows.map(|(_, row)| row).collect::<Vec<_>>())
            };
            Some(of(&a, &b)? - of(&b, &a)?)
        };
        let dice =
            |rows: &[&PerImage]| mean(&rows.iter().filter_map(|row| row.dice).collect::<Vec<_>>());
        let auc = |rows: &[&PerImage]| {
            let cases: Vec<_> = rows.iter().filter_map(|row| row.diagnosis()).collect();
            Auc::of(&cases).map(|auc| auc.value)
        };
        let effect = |alone: Arm, figure: &dyn Fn(&[&PerImage]) -> Option<f64>| {
            let interference = difference(Arm::Multitask, alone, figure)?;
            let won_back = difference(Arm::Consistency, Arm::Multitask, figure);
            Some(Effect {
                interference,
                won_back,
                share: won_back
                    .filter(|_| interference < 0.0)
                    .map(|won| won / -interference),
            })
        };
        let found = Self {
            dice: effect(Arm::Segmentation, &dice),
            auc: effect(Arm::Classification, &auc),
        };
        (found.dice.is_some() || found.auc.is_some()).then_some(found)
    }
}

/// Corrects each pair's tests over the data sets.
fn correct(datasets: &mut [DataSetStatistics]) {
    let mut pairs: BTreeMap<(String, String), Vec<&mut Comparison>> = BTreeMap::new();
    for set in datasets {
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
