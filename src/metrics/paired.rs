//! Two methods measured on the same images: is one better, and by how much.
//!
//! The differences of a pair are one sample: [`Wilcoxon`] asks whether it is symmetric about 0,
//! [`rank_biserial`] how far it is from that, [`HodgesLehmann`] where its centre lies. [`holm`] corrects
//! for several such questions.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, Normal};

use super::statistics::Z95;

/// Largest sample whose p-value is exact, as in SciPy and R.
pub const EXACT: usize = 50;

/// The Wilcoxon signed-rank test of a sample of differences, two-sided (Wilcoxon 1945).
///
/// Differences of 0 are left out, as Wilcoxon did; equal absolute differences share their mean rank.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Wilcoxon {
    /// Number of differences other than 0.
    pub n: usize,
    /// Sum of the ranks of the positive ones.
    pub positive: f64,
    /// Sum of the ranks of the negative ones.
    pub negative: f64,
    /// Probability, if signs were coin tosses, of sums at least as far apart. Exact up to [`EXACT`]
    /// differences, ties or not: all `2ⁿ` signs of the ranks at hand are counted. Beyond, by the normal
    /// approximation with the variance corrected for ties, without correction for continuity. 1 if no
    /// difference is left.
    pub p_value: f64,
    /// Whether it is exact.
    pub exact: bool,
}

impl Wilcoxon {
    /// Tests the differences, which must be finite.
    ///
    /// ```
    /// use echograd::metrics::paired::Wilcoxon;
    /// let test = Wilcoxon::of(&[0.3, -0.1, 0.4, 0.2]);
    /// assert_eq!((test.positive, test.negative), (9.0, 1.0));
    /// assert_eq!(test.p_value, 4.0 / 16.0); // the sums 0, 1, 9 and 10 of 16 equally likely ones
    /// ```
    pub fn of(differences: &[f64]) -> Self {
        let ranks = Ranks::of(differences);
        let n = ranks.doubled.len();
        let (positive, negative) = ranks.sums();
        let exact = n <= EXACT;
        let p_value = if exact {
            ranks.exact_p_value()
        } else {
            let (count, less) = (n as f64, ranks.tied);
            let mean = count * (count + 1.0) / 4.0;
            let variance = (count * (count + 1.0) * (2.0 * count + 1.0) - less / 2.0) / 24.0;
            2.0 * Normal::standard().sf((positive - mean).abs() / variance.sqrt())
        };
        Self {
            n,
            positive,
            negative,
            p_value,
            exact,
        }
    }
}

/// Matched-pairs rank-biserial correlation, `(W⁺ − W⁻)/(W⁺ + W⁻)`: 1 if every difference is positive, −1
/// if every one is negative (Kerby 2014, *Comprehensive Psychology* 3:1). `None` if all are 0.
pub fn rank_biserial(differences: &[f64]) -> Option<f64> {
    let (positive, negative) = Ranks::of(differences).sums();
    let all = positive + negative;
    (all > 0.0).then(|| (positive - negative) / all)
}

/// The ranks of the absolute differences other than 0.
struct Ranks {
    /// Twice each rank, an integer in spite of ties, with the sign of the difference; in order of rank.
    doubled: Vec<(usize, bool)>,
    /// `Σ(t³ − t)` over groups of `t` equal absolute differences.
    tied: f64,
}

impl Ranks {
    fn of(differences: &[f64]) -> Self {
        let mut sorted: Vec<f64> = differences.iter().copied().filter(|d| *d != 0.0).collect();
        sorted.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
        let mut ranks = Self {
            doubled: Vec::with_capacity(sorted.len()),
            tied: 0.0,
        };
        for group in sorted.chunk_by(|a, b| a.abs() == b.abs()) {
            let before = ranks.doubled.len();
            let doubled = 2 * before + group.len() + 1;
            ranks
                .doubled
                .extend(group.iter().map(|d| (doubled, *d > 0.0)));
            let t = group.len() as f64;
            ranks.tied += t * t * t - t;
        }
        ranks
    }

    fn sums(&self) -> (f64, f64) {
        let sum = |sign: bool| -> f64 {
            let of_sign = self
                .doubled
                .iter()
                .filter(|(_, positive)| *positive == sign);
            of_sign.map(|(doubled, _)| *doubled as f64 / 2.0).sum()
        };
        (sum(true), sum(false))
    }

    /// Counts the choices of signs by their sum of positive ranks: at most 2⁵⁰ of them, exact in `f64`.
    fn exact_p_value(&self) -> f64 {
        let counts = sign_counts(self.doubled.iter().map(|(doubled, _)| *doubled));
        let positive = self.doubled.iter().filter(|(_, positive)| *positive);
        let observed: usize = positive.map(|(doubled, _)| doubled).sum();
        // The distribution is symmetric: both tails are twice the smaller one.
        let tail = observed.min(counts.len() - 1 - observed);
        let beyond: f64 = counts[..=tail].iter().sum();
        (2.0 * beyond / counts.iter().sum::<f64>()).min(1.0)
    }
}

/// For every sum, the number of subsets of `ranks` that have it.
fn sign_counts(ranks: impl Iterator<Item = usize>) -> Vec<f64> {
    let mut counts = vec![1.0];
    for rank in ranks {
        let with_it = counts.clone();
        counts.resize(with_it.len() + rank, 0.0);
        for (sum, count) in with_it.into_iter().enumerate() {
            counts[sum + rank] += count;
        }
    }
    counts
}

/// The Hodges–Lehmann estimate of a sample's centre (Hodges and Lehmann 1963).
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct HodgesLehmann {
    /// Median of the means of all pairs of values, each paired with itself too.
    pub value: f64,
    /// 95% interval: the centres that [`Wilcoxon`] would not reject at 5%, from the distribution of
    /// its sum without ties, exact up to [`EXACT`] values. `None` where so few values reject nothing.
    pub ci95: Option<[f64; 2]>,
}

impl HodgesLehmann {
    /// The centre of the values, those that are 0 included; `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        let mut means = Vec::with_capacity(n * (n + 1) / 2);
        for (i, a) in values.iter().enumerate() {
            means.extend(values[i..].iter().map(|b| (a + b) / 2.0));
        }
        means.sort_unstable_by(f64::total_cmp);
        let last = means.len().checked_sub(1)?;
        // As many means as this lie outside the interval at either end.
        let outside = if n <= EXACT {
            let counts = sign_counts(1..=n);
            let all: f64 = counts.iter().sum();
            let mut below = 0.0;
            let tail = counts.iter().take_while(|count| {
                below += *count;
                below / all <= 0.025
            });
            tail.count()
        } else {
            let n = n as f64;
            let sd = (n * (n + 1.0) * (2.0 * n + 1.0) / 24.0).sqrt();
            (n * (n + 1.0) / 4.0 - Z95 * sd).floor() as usize
        };
        Some(Self {
            value: (means[last / 2] + means[last.div_ceil(2)]) / 2.0,
            ci95: (outside > 0).then(|| [means[outside - 1], means[last + 1 - outside]]),
        })
    }
}

/// Holm's correction (1979): the p-values, in their order, such that each may be held against one level for
/// all. Where there is none there is none.
///
/// ```
/// use echograd::metrics::paired::holm;
/// assert_eq!(holm(&[Some(0.02), None, Some(0.01)]), [Some(0.02), None, Some(0.02)]);
/// ```
pub fn holm(p_values: &[Option<f64>]) -> Vec<Option<f64>> {
    let mut order: Vec<(usize, f64)> = p_values
        .iter()
        .enumerate()
        .filter_map(|(i, p)| Some((i, (*p)?)))
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut corrected = vec![None; p_values.len()];
    let mut largest: f64 = 0.0;
    for (step, (i, p)) in order.iter().enumerate() {
        largest = largest.max((order.len() - step) as f64 * p).min(1.0);
        corrected[*i] = Some(largest);
    }
    corrected
}
