//! Location, quantiles and bootstrap intervals.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

/// The 0.975 quantile of the standard normal distribution.
pub const Z95: f64 = 1.959_963_984_540_054;

/// Number of bootstrap resamples behind every reported interval.
pub const RESAMPLES: u64 = 2000;

/// The arithmetic mean; `None` without values.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The unbiased sample variance (divisor `n − 1`); `None` with fewer than two values.
pub fn sample_variance(values: &[f64]) -> Option<f64> {
    let mean = mean(values)?;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (values.len() > 1).then(|| squares / (values.len() - 1) as f64)
}

/// The quantile at `q` of 0 to 1, interpolated linearly between order statistics as NumPy does by default
/// (Hyndman and Fan's type 7); `None` without values.
///
/// ```
/// use echograd::metrics::statistics::quantile;
/// assert_eq!(quantile(&[4.0, 1.0, 2.0], 0.75), Some(3.0));
/// ```
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let position = q.clamp(0.0, 1.0) * last as f64;
    let below = sorted[position.floor() as usize];
    let above = sorted[position.ceil() as usize];
    Some(below + (above - below) * position.fract())
}

/// The median; `None` without values.
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// Bootstrap percentile interval (95%) of the mean. `None` with fewer than two clusters.
///
/// Each value comes with the patient it belongs to, if known. Images of one patient are not independent, so
/// whole patients are drawn with replacement, as many as there are; a value without a patient is a cluster of
/// its own. Every resample has its own random stream of `seed`: the result does not depend on threads.
pub fn bootstrap_ci95(
    values: &[(f64, Option<&str>)],
    resamples: u64,
    seed: u64,
) -> Option<[f64; 2]> {
    let clusters = clusters(values);
    if clusters.len() < 2 {
        return None;
    }
    let means: Vec<f64> = (0..resamples)
        .into_par_iter()
        .map(|resample| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(resample);
            let (mut sum, mut count) = (0.0, 0);
            for _ in 0..clusters.len() {
                let (cluster_sum, size) = clusters[random.random_range(0..clusters.len())];
                sum += cluster_sum;
                count += size;
            }
            sum / count as f64
        })
        .collect();
    Some([quantile(&means, 0.025)?, quantile(&means, 0.975)?])
}

/// Sum and size of each cluster, in order of first appearance.
fn clusters(values: &[(f64, Option<&str>)]) -> Vec<(f64, usize)> {
    let mut clusters = vec![];
    let mut of_patient = HashMap::new();
    for &(value, patient) in values {
        let fresh = clusters.len();
        let index = patient.map_or(fresh, |name| *of_patient.entry(name).or_insert(fresh));
        if index == fresh {
            clusters.push((0.0, 0));
        }
        clusters[index].0 += value;
        clusters[index].1 += 1;
    }
    clusters
}

/// Wilson's 95% interval (1927) of a proportion that was found among `n`.
pub fn wilson_ci95(proportion: f64, n: f64) -> [f64; 2] {
    let square = Z95 * Z95 / n;
    let centre = proportion + square / 2.0;
    let spread = (square * (proportion * (1.0 - proportion) + square / 4.0)).sqrt();
    [centre - spread, centre + spread].map(|end| (end / (1.0 + square)).clamp(0.0, 1.0))
}

/// Wilson's interval of the share of values that are `true`, each with its patient if known; `None` without values.
///
/// Images of one patient count for as many independent ones as give the variance between patients, for all of them
/// where they are not alike, and for one where all values are the same.
pub fn share_ci95(values: &[(bool, Option<&str>)]) -> Option<[f64; 2]> {
    let plain: Vec<(f64, Option<&str>)> = values
        .iter()
        .map(|&(value, patient)| (f64::from(u8::from(value)), patient))
        .collect();
    let share = mean(&plain.iter().map(|v| v.0).collect::<Vec<_>>())?;
    let (clusters, n) = (clusters(&plain), values.len() as f64);
    let groups = clusters.len() as f64;
    let deviation = |(sum, size): &(f64, usize)| ((sum - share * *size as f64) / n).powi(2);
    let variance = clusters.iter().map(deviation).sum::<f64>() * groups / (groups - 1.0);
    let effective = match variance > 0.0 {
        true => (1.0 + share * (1.0 - share) / variance).min(n),
        false => groups,
    };
    Some(wilson_ci95(share, effective))
}

/// With fewer clusters than this behind it an interval is a rough one.
pub const FEW: usize = 20;

/// A metric over images.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Summary {
    /// Number of images that have the metric.
    pub n: usize,
    /// Number of patients among them, images without a known one counted each.
    pub clusters: usize,
    /// Mean over images.
    pub mean: f64,
    /// Median over images.
    pub median: f64,
    /// Interval of the mean: [`bootstrap_ci95`] with [`RESAMPLES`] resamples.
    pub ci95: Option<[f64; 2]>,
}

impl Summary {
    /// Summarises the values of a metric, each with its patient if known; `None` without values.
    pub fn of(values: &[(f64, Option<&str>)]) -> Option<Self> {
        let plain: Vec<f64> = values.iter().map(|v| v.0).collect();
        Some(Self {
            n: plain.len(),
            clusters: clusters(values).len(),
            mean: mean(&plain)?,
            median: median(&plain)?,
            ci95: bootstrap_ci95(values, RESAMPLES, 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_is_as_by_hand_and_patients_count_once() {
        // 8 of 10: (0.8 + z²/20 ± z √(0.16/10 + z²/400)) / (1 + z²/10) of z = 1.959964.
        let [low, high] = wilson_ci95(0.8, 10.0);
        assert!((low - 0.490_162).abs() < 1e-6 && (high - 0.943_318).abs() < 1e-6);
        assert!((wilson_ci95(1.0, 10.0)[1] - 1.0).abs() < 1e-15);

        let alone: Vec<(bool, Option<&str>)> = (0..10).map(|i| (i < 8, None)).collect();
        let near = |a: Option<[f64; 2]>, b: [f64; 2]| {
            let a = a.unwrap();
            assert!(
                (a[0] - b[0]).abs() + (a[1] - b[1]).abs() < 1e-12,
                "{a:?} {b:?}"
            );
        };
        near(share_ci95(&alone), [low, high]);
        let names: Vec<String> = (0..10).map(|i| i.to_string()).collect();
        let twice: Vec<_> = (0..20)
            .map(|i| (i % 10 < 8, Some(names[i % 10].as_str())))
            .collect();
        near(share_ci95(&twice), [low, high]);
        let sure: Vec<_> = twice.iter().map(|&(_, patient)| (true, patient)).collect();
        near(share_ci95(&sure), wilson_ci95(1.0, 10.0));
        assert_eq!(share_ci95(&[]), None);
    }
}
