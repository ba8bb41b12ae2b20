//! Cross-validation folds.

use std::collections::HashMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{Case, Label};
use crate::error::{Error, Result};

/// Indices into a data set's cases, in case order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fold {
    /// Cases to train on.
    pub train: Vec<usize>,
    /// Cases held out.
    pub validation: Vec<usize>,
}

/// Splits the cases listed in `subset` into `k` folds, stratified by label; all images of a patient,
/// and all copies of the same image, fall in one fold. The same arguments give the same folds
/// anywhere.
///
/// Groups of images that belong together are shuffled by `seed`, then dealt from the largest down,
/// each to the fold that has the smallest share of the group's labels so far. Single images are thus
/// spread to within one per label.
///
/// ```
/// use echograd::data::{Case, Label, split::folds};
///
/// let case = |i: usize| Case {
///     image: format!("{i}.png"),
///     patient: Some(format!("patient {}", i / 2)), // two images each
///     label: if i % 4 < 2 { Label::Benign } else { Label::Malignant },
///     pixel_mm: None,
///     width: 800,
///     height: 600,
///     sha256: i.to_string(),
/// };
/// let cases: Vec<Case> = (0..20).map(case).collect();
/// let everyone: Vec<usize> = (0..cases.len()).collect();
/// for fold in folds(&cases, &everyone, 5, 0)? {
///     assert_eq!((fold.train.len(), fold.validation.len()), (16, 4));
///     for i in fold.validation {
///         assert!(!fold.train.contains(&(i ^ 1))); // the patient's other image
///     }
/// }
/// # Ok::<(), echograd::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] if `k < 2`, or if there are benign or malignant cases but the label that more
/// groups have comes from fewer than `k`. Of the rarer label a fold may then hold none: enough to
/// segment, and for whoever classifies to refuse.
pub fn folds(cases: &[Case], subset: &[usize], k: usize, seed: u64) -> Result<Vec<Fold>> {
    if k < 2 {
        return Err(Error::argument(
            "folds",
            format!("expected at least 2, found {k}"),
        ));
    }
    let mut subset = subset.to_vec();
    subset.sort_unstable();
    subset.dedup();
    let mut groups = groups(cases, &subset);
    let carriers = |label: Label| {
        let carries = |group: &&Vec<usize>| group.iter().any(|&i| cases[i].label == label);
        groups.iter().filter(carries).count()
    };
    let [benign, malignant] =
        [Label::Benign, Label::Malignant].map(|label| (carriers(label), label));
    let (most, label) = if malignant.0 > benign.0 {
        malignant
    } else {
        benign
    };
    if (1..k).contains(&most) {
        let problem =
            format!("expected at least {k} {label} patients or images for {k} folds, found {most}");
        return Err(Error::argument("folds", problem));
    }
    let total = Label::ALL.map(|l| subset.iter().filter(|&&i| cases[i].label == l).count());

    groups.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    let mut held = vec![[0usize; 3]; k];
    let mut fold_of = HashMap::new();
    for group in &groups {
        let share = |counts: &[usize; 3]| -> f64 {
            group
                .iter()
                .map(|&i| cases[i].label as usize)
                .map(|label| counts[label] as f64 / total[label] as f64)
                .sum()
        };
        let best = (0..k)
            .min_by(|&a, &b| {
                share(&held[a])
                    .total_cmp(&share(&held[b]))
                    .then_with(|| held[a].iter().sum::<usize>().cmp(&held[b].iter().sum()))
            })
            .expect("k ≥ 2");
        for &i in group {
            held[best][cases[i].label as usize] += 1;
            fold_of.insert(i, best);
        }
    }

    Ok((0..k)
        .map(|fold| {
            let (validation, train) = subset.iter().partition(|i| fold_of[i] == fold);
            Fold { train, validation }
        })
        .collect())
}

/// Fold `index` of [`folds`].
///
/// # Errors
/// As [`folds`], and if `index ≥ k`.
pub fn fold(cases: &[Case], subset: &[usize], k: usize, index: usize, seed: u64) -> Result<Fold> {
    let mut folds = folds(cases, subset, k, seed)?;
    if index >= k {
        return Err(Error::argument(
            "fold",
            format!("expected 0 to {}, found {index}", k - 1),
        ));
    }
    Ok(folds.swap_remove(index))
}

/// The (sorted) subset in groups that share a patient or an image's bytes, each sorted, ordered by
/// their first case.
fn groups(cases: &[Case], subset: &[usize]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut by_patient: HashMap<&str, usize> = HashMap::new();
    let mut by_image: HashMap<&str, usize> = HashMap::new();
    for &i in subset {
        let patient = cases[i].patient.as_deref();
        let known = patient.and_then(|p| by_patient.get(p).copied());
        let copy = by_image.get(cases[i].sha256.as_str()).copied();
        let target = match (known, copy) {
            (Some(a), Some(b)) if a != b => {
                // One image under two patients: they are one.
                let moved = std::mem::take(&mut groups[b]);
                groups[a].extend(moved);
                for group in by_patient.values_mut().chain(by_image.values_mut()) {
                    if *group == b {
                        *group = a;
                    }
                }
                a
            }
            (Some(a), _) | (None, Some(a)) => a,
            (None, None) => {
                groups.push(Vec::new());
                groups.len() - 1
            }
        };
        groups[target].push(i);
        if let Some(patient) = patient {
            by_patient.insert(patient, target);
        }
        by_image.insert(&cases[i].sha256, target);
    }
    groups.retain(|group| !group.is_empty());
    for group in &mut groups {
        group.sort_unstable();
    }
    groups.sort();
    groups
}
