//! Agreement of a malignancy score with the diagnosis: discrimination, decisions at a threshold, calibration.
//!
//! A case is `(score, positive)`, or a [`Case`] where patients or folds are known. What one class alone cannot tell is
//! `None`, never NaN.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, Normal};

use super::statistics::{Z95, mean, wilson_ci95};

/// A probability at or above this is a positive decision.
pub const THRESHOLD: f64 = 0.5;

/// Number of equal-width bins of the expected calibration error.
pub const CALIBRATION_BINS: usize = 15;

/// Counts of binary decisions against the truth, over cases or over pixels.
///
/// [`f1`](Self::f1), [`jaccard`](Self::jaccard) and [`recall`](Self::recall) speak about the positives and
/// are `None` where the truth has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Confusion {
    /// Predicted and true.
    pub true_positives: usize,
    /// Predicted but not true.
    pub false_positives: usize,
    /// True but not predicted.
    pub false_negatives: usize,
    /// Neither.
    pub true_negatives: usize,
}

impl Confusion {
    /// Counts `(predicted, actual)` pairs.
    pub fn count(pairs: impl IntoIterator<Item = (bool, bool)>) -> Self {
        let mut counts = Self::default();
        for pair in pairs {
            *match pair {
                (true, true) => &mut counts.true_positives,
                (true, false) => &mut counts.false_positives,
                (false, true) => &mut counts.false_negatives,
                (false, false) => &mut counts.true_negatives,
            } += 1;
        }
        counts
    }

    /// Counts the decisions `score ≥ threshold`.
    pub fn at(threshold: f64, cases: &[(f64, bool)]) -> Self {
        Self::count(
            cases
                .iter()
                .map(|&(s, positive)| (s >= threshold, positive)),
        )
    }

    /// Recall or sensitivity, `TP / (TP + FN)`.
    pub fn recall(&self) -> Option<f64> {
        ratio(self.true_positives, self.positives())
    }

    /// `TN / (TN + FP)`; `None` without negatives.
    pub fn specificity(&self) -> Option<f64> {
        ratio(
            self.true_negatives,
            self.true_negatives + self.false_positives,
        )
    }

    /// `TP / (TP + FP)`; `None` if nothing was predicted.
    pub fn precision(&self) -> Option<f64> {
        ratio(
            self.true_positives,
            self.true_positives + self.false_positives,
        )
    }

    /// F1 score, over pixels the Dice coefficient: `2TP / (2TP + FP + FN)`.
    pub fn f1(&self) -> Option<f64> {
        let (both, wrong) = (2 * self.true_positives, self.errors());
        (self.positives() > 0).then(|| both as f64 / (both + wrong) as f64)
    }

    /// Jaccard index, over pixels the intersection over union: `TP / (TP + FP + FN)`.
    pub fn jaccard(&self) -> Option<f64> {
        let (both, wrong) = (self.true_positives, self.errors());
        (self.positives() > 0).then(|| both as f64 / (both + wrong) as f64)
    }

    fn positives(&self) -> usize {
        self.true_positives + self.false_negatives
    }

    fn errors(&self) -> usize {
        self.false_positives + self.false_negatives
    }
}

fn ratio(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// A scored case, and which others it belongs to.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Case<'a, S = f64> {
    /// Its score, or the scores of two methods.
    pub score: S,
    /// Whether it is positive.
    pub positive: bool,
    /// Its patient, if known: cases of one are not independent. A case without one is a cluster of its own.
    pub patient: Option<&'a str>,
    /// The part of the data whose network scored it. Scores of different networks have no scale in common, so only cases
    /// of one fold are compared. A patient is in one fold.
    pub fold: usize,
}

impl<S> From<(S, bool)> for Case<'_, S> {
    fn from((score, positive): (S, bool)) -> Self {
        Self {
            score,
            positive,
            patient: None,
            fold: 0,
        }
    }
}

/// Area under the ROC curve with its uncertainty.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Auc {
    /// The probability that a positive case scores higher than a negative one of its fold, a tie counting one half.
    pub value: f64,
    /// DeLong standard error, with cases clustered by patient (Obuchowski 1997, *Biometrics* 53:567); `None` with fewer
    /// than two clusters that hold a class in a fold.
    pub standard_error: Option<f64>,
    /// Number of clusters that hold a case of a class, of the class that has fewer.
    pub clusters: usize,
    /// 95% interval, `value ± 1.96 · standard_error` on the logit scale (Pepe 2003, *The Statistical Evaluation of
    /// Medical Tests*), which stays between 0 and 1. (pROC and SAS have the plain scale unless told otherwise; of many
    /// cases the two differ little.) A complete separation of the classes shows no variance: then Wilson's interval of a
    /// proportion of [`Auc::clusters`].
    pub ci95: Option<[f64; 2]>,
}

impl Auc {
    /// The AUC of a score; `None` unless a fold has both classes.
    ///
    /// ```
    /// use echograd::metrics::classification::Auc;
    /// let auc = Auc::of(&[(0.2, false), (0.7, false), (0.7, true), (0.9, true)]).unwrap();
    /// assert_eq!(auc.value, 3.5 / 4.0);
    /// ```
    pub fn of<'a, C: Copy + Into<Case<'a>>>(cases: &[C]) -> Option<Self> {
        let cases: Vec<Case<'_>> = cases.iter().map(|&case| case.into()).collect();
        let placements = Placements::of(&cases)?;
        let (value, clusters) = (placements.value(), placements.clusters());
        let standard_error = placements.standard_error();
        let interval = |se: f64| {
            if se == 0.0 {
                return wilson_ci95(value, clusters as f64);
            }
            let slope = value * (1.0 - value);
            let logit = (value / (1.0 - value)).ln();
            [-Z95, Z95].map(|z| 1.0 / (1.0 + (-(logit + z * se / slope)).exp()))
        };
        Some(Self {
            value,
            standard_error,
            clusters,
            ci95: standard_error.map(interval),
        })
    }
}

/// The difference of two AUCs measured on the same cases.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct AucDifference {
    /// First AUC less the second.
    pub value: f64,
    /// DeLong standard error of the difference, clustered as in [`Auc`], the correlation of the two scores taken into
    /// account.
    pub standard_error: f64,
    /// [`Auc::clusters`].
    pub clusters: usize,
    /// `value / standard_error`; 0 if the two scores order the cases alike.
    pub z: f64,
    /// Two-sided p-value of `z` under the standard normal distribution.
    pub p_value: f64,
}

impl AucDifference {
    /// DeLong's paired test of two scores. `None` with fewer than two clusters that hold a class in a fold, or if the
    /// AUCs differ without any variance, as where one score separates the classes and the other does so the wrong way.
    pub fn of<'a, C: Copy + Into<Case<'a, [f64; 2]>>>(cases: &[C]) -> Option<Self> {
        let score = |k: usize| -> Option<Placements> {
            let cases: Vec<Case<'_>> = cases
                .iter()
                .map(|&case| {
                    let case: Case<'_, [f64; 2]> = case.into();
                    Case {
                        score: case.score[k],
                        positive: case.positive,
                        patient: case.patient,
                        fold: case.fold,
                    }
                })
                .collect();
            Placements::of(&cases)
        };
        let (first, second) = (score(0)?, score(1)?);
        let difference = first.less(&second);
        let value = first.value() - second.value();
        let standard_error = difference.standard_error()?;
        let z = match (value, standard_error) {
            (0.0, 0.0) => 0.0,
            (_, 0.0) => return None,
            (value, standard_error) => value / standard_error,
        };
        Some(Self {
            value,
            standard_error,
            clusters: difference.clusters(),
            z,
            p_value: 2.0 * Normal::standard().sf(z.abs()),
        })
    }

    /// 95% interval of the difference, `value ± 1.96 · standard_error`; `None` without variance.
    pub fn ci95(&self) -> Option<[f64; 2]> {
        let end = |z: f64| self.value + z * self.standard_error;
        (self.standard_error > 0.0).then(|| [-Z95, Z95].map(end))
    }
}

/// The structural components of an AUC, or of the difference of two.
struct Placements {
    /// Of each fold that has both classes.
    folds: Vec<FoldPlacements>,
}

/// The structural components within a fold (DeLong, DeLong and Clarke-Pearson 1988, *Biometrics* 44:837), in the order of
/// its cases; ties count one half. The mean over either class is the fold's AUC.
struct FoldPlacements {
    /// For each positive case the fraction of negative cases that score lower, for each negative one the fraction of
    /// positive cases that score higher.
    components: Vec<f64>,
    /// The class of each case: 1 if it is positive.
    classes: Vec<usize>,
    /// The cluster of each case.
    clusters: Vec<usize>,
    /// Number of cases of each class.
    sizes: [usize; 2],
}

/// A variance of components below this, which no real ones have, is rounding.
const ROUNDING: f64 = 1e-24;

impl Placements {
    fn of(cases: &[Case<'_>]) -> Option<Self> {
        let mut of_patient: HashMap<&str, usize> = HashMap::new();
        let mut folds: BTreeMap<usize, Vec<(&Case<'_>, usize)>> = BTreeMap::new();
        for (i, case) in cases.iter().enumerate() {
            let cluster = case
                .patient
                .map_or(i, |p| *of_patient.entry(p).or_insert(i));
            folds.entry(case.fold).or_default().push((case, cluster));
        }
        let folds: Vec<FoldPlacements> = folds
            .into_values()
            .filter_map(|cases| FoldPlacements::of(&cases))
            .collect();
        (!folds.is_empty()).then_some(Self { folds })
    }

    /// Folds weigh as many pairs as they have: the fraction of all pairs within folds that are in order.
    fn value(&self) -> f64 {
        let won: f64 = self.folds.iter().map(|f| f.pairs() * f.mean()).sum();
        won / self.pairs()
    }

    fn pairs(&self) -> f64 {
        self.folds.iter().map(FoldPlacements::pairs).sum()
    }

    /// The components of the difference of two AUCs of the same cases.
    fn less(&self, other: &Self) -> Self {
        let folds = self.folds.iter().zip(&other.folds);
        Self {
            folds: folds.map(|(a, b)| a.less(b)).collect(),
        }
    }

    /// Number of clusters that hold a case of a class, of the class that has fewer.
    fn clusters(&self) -> usize {
        let of_class = |class: usize| {
            let cases = self.folds.iter();
            let cases = cases.flat_map(|f| f.classes.iter().zip(&f.clusters));
            let own = cases.filter(|(of, _)| **of == class);
            own.map(|(_, cluster)| cluster)
                .collect::<BTreeSet<_>>()
                .len()
        };
        of_class(0).min(of_class(1))
    }

    /// Folds are independent of each other.
    fn standard_error(&self) -> Option<f64> {
        let pairs = self.pairs();
        let mut variance = 0.0;
        for fold in &self.folds {
            variance += (fold.pairs() / pairs).powi(2) * fold.variance()?;
        }
        Some(if variance < ROUNDING {
            0.0
        } else {
            variance.sqrt()
        })
    }
}

impl FoldPlacements {
    /// Ranks every case within the other class by bisection, in O(n log n).
    fn of(cases: &[(&Case<'_>, usize)]) -> Option<Self> {
        let sorted = |class: bool| -> Vec<f64> {
            let members = cases.iter().filter(|(case, _)| case.positive == class);
            let mut scores: Vec<f64> = members.map(|(case, _)| case.score).collect();
            scores.sort_unstable_by(f64::total_cmp);
            scores
        };
        let (high, low) = (sorted(true), sorted(false));
        if high.is_empty() || low.is_empty() {
            return None;
        }
        let fraction_below = |others: &[f64], score: f64| {
            let lower = others.partition_point(|&x| x < score);
            let not_higher = others.partition_point(|&x| x <= score);
            (lower + not_higher) as f64 / (2 * others.len()) as f64
        };
        let component = |(case, _): &(&Case<'_>, usize)| match case.positive {
            true => fraction_below(&low, case.score),
            false => 1.0 - fraction_below(&high, case.score),
        };
        Some(Self {
            components: cases.iter().map(component).collect(),
            classes: cases.iter().map(|(c, _)| usize::from(c.positive)).collect(),
            clusters: cases.iter().map(|(_, cluster)| *cluster).collect(),
            sizes: [low.len(), high.len()],
        })
    }

    fn pairs(&self) -> f64 {
        (self.sizes[0] * self.sizes[1]) as f64
    }

    fn mean(&self) -> f64 {
        let positives = self.components.iter().zip(&self.classes);
        let positives = positives.filter(|(_, class)| **class == 1);
        positives.map(|(x, _)| x).sum::<f64>() / self.sizes[1] as f64
    }

    fn less(&self, other: &Self) -> Self {
        let both = self.components.iter().zip(&other.components);
        Self {
            components: both.map(|(a, b)| a - b).collect(),
            classes: self.classes.clone(),
            clusters: self.clusters.clone(),
            sizes: self.sizes,
        }
    }

    /// Obuchowski's variance of the mean: the centred components of a cluster are summed by class, and the sums' squares
    /// and products over clusters scaled as in a sample variance. DeLong's variance where each cluster is one case.
    fn variance(&self) -> Option<f64> {
        let mean = self.mean();
        let mut sums: BTreeMap<usize, [Option<f64>; 2]> = BTreeMap::new();
        let classes = self.components.iter().zip(&self.classes);
        for ((component, &class), &cluster) in classes.zip(&self.clusters) {
            let sum = &mut sums.entry(cluster).or_default()[class];
            *sum = Some(sum.unwrap_or(0.0) + (component - mean) / self.sizes[class] as f64);
        }
        let scaled = |terms: Vec<f64>| {
            let n = terms.len() as f64;
            (n > 1.0).then(|| terms.iter().sum::<f64>() * n / (n - 1.0))
        };
        let squares = |class: usize| {
            let of_class = sums.values().filter_map(|sum| sum[class]);
            scaled(of_class.map(|sum| sum * sum).collect())
        };
        let product = |sum: &[Option<f64>; 2]| sum[0].unwrap_or(0.0) * sum[1].unwrap_or(0.0);
        let products = scaled(sums.values().map(product).collect())?;
        Some(squares(0)? + squares(1)? + 2.0 * products)
    }
}

/// The Brier score, the mean of `(p − positive)²`; `None` without cases.
pub fn brier(cases: &[(f64, bool)]) -> Option<f64> {
    let square = |&(p, positive): &(f64, bool)| (p - f64::from(u8::from(positive))).powi(2);
    mean(&cases.iter().map(square).collect::<Vec<_>>())
}

/// Expected calibration error of the probability `p` of the positive class; `None` without cases.
///
/// The cases fall into [`CALIBRATION_BINS`] bins of equal width, open below and closed above; the absolute
/// difference of mean `p` and fraction of positives is averaged over the cases. Naeini, Cooper and Hauskrecht
/// 2015, with the bins of Guo et al. 2017, but on `p` itself and not on the confidence in the likelier class,
/// since a malignancy of 10% and one of 90% are not the same statement.
pub fn expected_calibration_error(cases: &[(f64, bool)]) -> Option<f64> {
    let total: f64 = bins(cases)
        .iter()
        .map(|bin| (bin.p - bin.positives).abs())
        .sum();
    (!cases.is_empty()).then(|| total / cases.len() as f64)
}

/// Sums over the cases of one bin.
#[derive(Clone, Copy, Default)]
struct Bin {
    n: usize,
    p: f64,
    positives: f64,
}

fn bins(cases: &[(f64, bool)]) -> [Bin; CALIBRATION_BINS] {
    let mut bins = [Bin::default(); CALIBRATION_BINS];
    for &(p, positive) in cases {
        let bin = (p * CALIBRATION_BINS as f64).ceil() as usize;
        let bin = &mut bins[bin.clamp(1, CALIBRATION_BINS) - 1];
        bin.n += 1;
        bin.p += p;
        bin.positives += f64::from(u8::from(positive));
    }
    bins
}

/// A point of a reliability diagram: the cases of one bin of [`expected_calibration_error`].
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Reliability {
    /// Number of cases.
    pub n: usize,
    /// Mean probability.
    pub p: f64,
    /// Fraction of positives.
    pub positives: f64,
}

/// The bins that hold cases, from low to high probability.
pub fn reliability(cases: &[(f64, bool)]) -> Vec<Reliability> {
    let filled = bins(cases).into_iter().filter(|bin| bin.n > 0);
    filled
        .map(|Bin { n, p, positives }| Reliability {
            n,
            p: p / n as f64,
            positives: positives / n as f64,
        })
        .collect()
}

/// The corners of the ROC curve, `[1 − specificity, sensitivity]` from `[0, 0]` to `[1, 1]`; `None` unless a fold has
/// both classes. Of several folds it is the mean curve, in sensitivity at each specificity, each fold weighing as many
/// pairs as it has. The area under it is [`Auc::value`].
pub fn roc<'a, C: Copy + Into<Case<'a>>>(cases: &[C]) -> Option<Vec<[f64; 2]>> {
    let mut folds: BTreeMap<usize, Vec<Case<'a>>> = BTreeMap::new();
    for &case in cases {
        let case: Case<'a> = case.into();
        folds.entry(case.fold).or_default().push(case);
    }
    let curves: Vec<(f64, Vec<[f64; 2]>)> = folds.into_values().filter_map(corners).collect();
    let pairs: f64 = curves.iter().map(|(pairs, _)| pairs).sum();
    let mut places: Vec<f64> = curves
        .iter()
        .flat_map(|(_, corners)| corners.iter().map(|corner| corner[0]))
        .collect();
    places.sort_unstable_by(f64::total_cmp);
    places.dedup();
    let mut mean: Vec<[f64; 2]> = Vec::new();
    for x in places {
        for end in [0, 1] {
            let heights = curves.iter();
            let heights = heights.map(|(pairs, corners)| pairs * ends(corners, x)[end]);
            let corner = [x, heights.sum::<f64>() / pairs];
            if mean.last() != Some(&corner) {
                mean.push(corner);
            }
        }
    }
    (!curves.is_empty()).then_some(mean)
}

/// The ROC curve of one fold, a corner for each distinct score, and its number of pairs.
fn corners(mut cases: Vec<Case<'_>>) -> Option<(f64, Vec<[f64; 2]>)> {
    let positives = cases.iter().filter(|case| case.positive).count();
    let negatives = cases.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    cases.sort_by(|a, b| b.score.total_cmp(&a.score));
    let (mut corners, mut counts) = (vec![[0.0; 2]], [0usize; 2]);
    for group in cases.chunk_by(|a, b| a.score == b.score) {
        for case in group {
            counts[usize::from(case.positive)] += 1;
        }
        corners.push([
            counts[0] as f64 / negatives as f64,
            counts[1] as f64 / positives as f64,
        ]);
    }
    Some(((positives * negatives) as f64, corners))
}

/// The lowest and the highest point of a curve over `x`.
fn ends(corners: &[[f64; 2]], x: f64) -> [f64; 2] {
    let first = corners.partition_point(|corner| corner[0] < x);
    let behind = corners.partition_point(|corner| corner[0] <= x);
    if first < behind {
        return [corners[first][1], corners[behind - 1][1]];
    }
    let ([x0, y0], [x1, y1]) = (corners[first - 1], corners[first]);
    [y0 + (x - x0) / (x1 - x0) * (y1 - y0); 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(patient: &str, score: f64, positive: bool) -> Case<'_> {
        Case {
            score,
            positive,
            patient: Some(patient),
            fold: 0,
        }
    }

    /// Two positive and one mixed and two negative patients, worked out by hand.
    #[test]
    fn clusters_are_summed_as_by_hand() {
        let cases = [
            case("a", 0.9, true),
            case("a", 0.6, true),
            case("b", 0.85, true),
            case("b", 0.4, false),
            case("c", 0.65, false),
            case("d", 0.2, false),
            case("d", 0.8, false),
        ];
        let auc = Auc::of(&cases).unwrap();
        // Components 1, 1/2, 1 of the positives and 1, 2/3, 1, 2/3 of the negatives, about 5/6. Sums over patients: −1/18
        // and 1/18 of the two with positives, 1/24, −1/24 and 0 of the three with negatives.
        let variance: f64 = 2.0 / 1.0 * (2.0 / 324.0)
            + 3.0 / 2.0 * (2.0 / 576.0)
            + 2.0 * (4.0 / 3.0) * (1.0 / 18.0 / 24.0);
        assert!((auc.value - 5.0 / 6.0).abs() < 1e-15);
        assert!((auc.standard_error.unwrap() - variance.sqrt()).abs() < 1e-15);
        assert_eq!(auc.clusters, 2);
    }

    const PATIENTS: [&str; 11] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"];

    /// Two scores with ties, of patients with one image or more, in two folds.
    fn many() -> Vec<Case<'static, [f64; 2]>> {
        let case = |i: usize| {
            let patient = (i * i + i / 4) % PATIENTS.len();
            let positive = i.is_multiple_of(3);
            let lift = if positive { 0.25 } else { 0.0 };
            let score = |k: usize| ((i * (7 + 4 * k) + k) % 17) as f64 / 17.0;
            Case {
                score: [score(0) + lift, score(1) + 0.5 * lift],
                positive,
                patient: Some(PATIENTS[patient]),
                fold: patient % 2,
            }
        };
        (0..60).map(case).collect()
    }

    fn first<'a>(cases: &[Case<'a, [f64; 2]>]) -> Vec<Case<'a>> {
        let of = |case: &Case<'a, [f64; 2]>| Case {
            score: case.score[0],
            positive: case.positive,
            patient: case.patient,
            fold: case.fold,
        };
        cases.iter().map(of).collect()
    }

    /// AUC and difference with their standard errors.
    fn figures(cases: &[Case<'_, [f64; 2]>]) -> [f64; 4] {
        let auc = Auc::of(&first(cases)).unwrap();
        let difference = AucDifference::of(cases).unwrap();
        [
            auc.value,
            auc.standard_error.unwrap(),
            difference.value,
            difference.standard_error,
        ]
    }

    fn close(a: [f64; 4], b: [f64; 4]) {
        for (a, b) in a.into_iter().zip(b) {
            assert!((a - b).abs() < 1e-12, "{a} {b}");
        }
    }

    #[test]
    fn patients_of_one_image_are_no_clusters() {
        let names: Vec<String> = (0..60).map(|i| i.to_string()).collect();
        let (mut alone, mut named) = (many(), many());
        for ((alone, named), name) in alone.iter_mut().zip(&mut named).zip(&names) {
            alone.patient = None;
            named.patient = Some(name);
        }
        assert_eq!(figures(&alone), figures(&named));
        assert!(figures(&alone)[1] != figures(&many())[1]);
    }

    /// What is seen twice is not known better.
    #[test]
    fn images_repeated_within_their_patients_change_nothing() {
        let twice = |cases: Vec<Case<'static, [f64; 2]>>| [cases.clone(), cases].concat();
        close(figures(&many()), figures(&twice(many())));
        let mut alone = many();
        alone.iter_mut().for_each(|case| case.patient = None);
        let shrunk = figures(&twice(alone.clone()))[1] / figures(&alone)[1];
        assert!(shrunk < 0.75, "{shrunk}");
    }

    /// Only the order within a fold counts, in the AUC and under the ROC curve.
    #[test]
    fn folds_need_no_scale_in_common() {
        let mut shifted = many();
        for case in shifted.iter_mut().filter(|case| case.fold == 1) {
            case.score = case.score.map(|score| 3.0 * score + 1.0);
        }
        close(figures(&many()), figures(&shifted));
        assert_eq!(roc(&first(&many())), roc(&first(&shifted)));
        let mut pooled = shifted.clone();
        pooled.iter_mut().for_each(|case| case.fold = 0);
        assert!((figures(&pooled)[0] - figures(&shifted)[0]).abs() > 0.01);
        let corners = roc(&first(&shifted)).unwrap();
        let trapezoid = |w: &[[f64; 2]]| (w[1][0] - w[0][0]) * (w[0][1] + w[1][1]) / 2.0;
        let area: f64 = corners.windows(2).map(trapezoid).sum();
        assert!((area - figures(&shifted)[0]).abs() < 1e-12);
        assert_eq!(
            [corners[0], corners[corners.len() - 1]],
            [[0.0; 2], [1.0; 2]]
        );
        // Pairs within folds, counted one by one.
        let (mut won, mut pairs) = (0.0, 0.0);
        for (i, a) in many().iter().enumerate() {
            for b in &many()[..i] {
                if a.fold == b.fold && a.positive != b.positive {
                    let (high, low) = if a.positive { (a, b) } else { (b, a) };
                    pairs += 1.0;
                    won += match high.score[0].total_cmp(&low.score[0]) {
                        std::cmp::Ordering::Greater => 1.0,
                        std::cmp::Ordering::Equal => 0.5,
                        std::cmp::Ordering::Less => 0.0,
                    };
                }
            }
        }
        assert!((won / pairs - figures(&many())[0]).abs() < 1e-12);
    }
}
