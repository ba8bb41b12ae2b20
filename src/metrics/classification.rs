//! Agreement of a malignancy score with the diagnosis: discrimination, decisions at a threshold, calibration.
//!
//! A case is `(score, positive)`. What one class alone cannot tell is `None`, never NaN.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, Normal};

use super::statistics::{Z95, mean, sample_variance};

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

/// Area under the ROC curve with its uncertainty.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Auc {
    /// The probability that a positive case scores higher than a negative one, a tie counting one half.
    pub value: f64,
    /// DeLong standard error; `None` with fewer than two cases in a class.
    pub standard_error: Option<f64>,
    /// 95% interval, `value ± 1.96 · standard_error`, cut to 0 and 1.
    ///
    /// On the plain scale, as in pROC and SAS, so that figures compare with published ones. A complete
    /// separation of the classes shows no variance, and its interval is a point.
    pub ci95: Option<[f64; 2]>,
}

impl Auc {
    /// The AUC of a score; `None` unless both classes are present.
    ///
    /// ```
    /// use echograd::metrics::classification::Auc;
    /// let auc = Auc::of(&[(0.2, false), (0.7, false), (0.7, true), (0.9, true)]).unwrap();
    /// assert_eq!(auc.value, 3.5 / 4.0);
    /// ```
    pub fn of(cases: &[(f64, bool)]) -> Option<Self> {
        let placements = Placements::of(cases)?;
        let value = placements.auc();
        let standard_error = placements.standard_error();
        let interval = |se: f64| [value - Z95 * se, value + Z95 * se].map(|x| x.clamp(0.0, 1.0));
        Some(Self {
            value,
            standard_error,
            ci95: standard_error.map(interval),
        })
    }
}

/// The difference of two AUCs measured on the same cases.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct AucDifference {
    /// First AUC less the second.
    pub value: f64,
    /// DeLong standard error of the difference, the correlation of the two scores taken into account.
    pub standard_error: f64,
    /// `value / standard_error`.
    pub z: f64,
    /// Two-sided p-value of `z` under the standard normal distribution.
    pub p_value: f64,
}

impl AucDifference {
    /// DeLong's paired test of two scores. `None` with fewer than two cases in a class, or if the two scores
    /// order the cases so alike that their difference has no estimated variance.
    pub fn of(cases: &[([f64; 2], bool)]) -> Option<Self> {
        let score = |k: usize| -> Vec<(f64, bool)> {
            cases
                .iter()
                .map(|&(s, positive)| (s[k], positive))
                .collect()
        };
        let (first, second) = (Placements::of(&score(0))?, Placements::of(&score(1))?);
        let value = first.auc() - second.auc();
        let standard_error = first.less(&second).standard_error()?;
        if standard_error == 0.0 {
            return None;
        }
        let z = value / standard_error;
        Some(Self {
            value,
            standard_error,
            z,
            p_value: 2.0 * Normal::standard().sf(z.abs()),
        })
    }
}

/// The structural components of an AUC (DeLong, DeLong and Clarke-Pearson 1988, *Biometrics* 44:837), in the
/// order of the cases; ties count one half. The mean over either class is the AUC.
struct Placements {
    /// For each positive case, the fraction of negative cases that score lower.
    positives: Vec<f64>,
    /// For each negative case, the fraction of positive cases that score higher.
    negatives: Vec<f64>,
}

impl Placements {
    /// Ranks every case within the other class by bisection, in O(n log n).
    fn of(cases: &[(f64, bool)]) -> Option<Self> {
        let sorted = |class: bool| -> Vec<f64> {
            let members = cases.iter().filter(|&&(_, positive)| positive == class);
            let mut scores: Vec<f64> = members.map(|&(score, _)| score).collect();
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
        let (mut positives, mut negatives) = (vec![], vec![]);
        for &(score, positive) in cases {
            if positive {
                positives.push(fraction_below(&low, score));
            } else {
                negatives.push(1.0 - fraction_below(&high, score));
            }
        }
        Some(Self {
            positives,
            negatives,
        })
    }

    fn auc(&self) -> f64 {
        self.positives.iter().sum::<f64>() / self.positives.len() as f64
    }

    /// The components of the difference of two AUCs.
    fn less(&self, other: &Self) -> Self {
        let subtract = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect();
        Self {
            positives: subtract(&self.positives, &other.positives),
            negatives: subtract(&self.negatives, &other.negatives),
        }
    }

    fn standard_error(&self) -> Option<f64> {
        let variance_of_mean = |x: &[f64]| Some(sample_variance(x)? / x.len() as f64);
        let variance = variance_of_mean(&self.positives)? + variance_of_mean(&self.negatives)?;
        Some(variance.sqrt())
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

/// The corners of the ROC curve, `[1 − specificity, sensitivity]` from `[0, 0]` to `[1, 1]`, a corner for each
/// distinct score; `None` unless both classes are present. The area under it is [`Auc::value`].
pub fn roc(cases: &[(f64, bool)]) -> Option<Vec<[f64; 2]>> {
    let positives = cases.iter().filter(|case| case.1).count();
    let negatives = cases.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let mut sorted = cases.to_vec();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut corners, mut counts) = (vec![[0.0; 2]], [0usize; 2]);
    for group in sorted.chunk_by(|a, b| a.0 == b.0) {
        for case in group {
            counts[usize::from(case.1)] += 1;
        }
        corners.push([
            counts[0] as f64 / negatives as f64,
            counts[1] as f64 / positives as f64,
        ]);
    }
    Some(corners)
}
