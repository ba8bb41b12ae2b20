//! What a study found on its targets, in sentences.

use super::page::interval;
use super::statistics::{Comparison, DataSetStatistics, Statistics};
use crate::report::number::p_value;

/// A corrected p below this, with an interval beside 0, makes a difference.
const LEVEL: f64 = 0.05;

/// The figures that methods are compared by.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Figure {
    Dice,
    Auc,
}

/// A figure, the method in question, and the one that it is held against.
const QUESTIONS: [(Figure, &str, &str); 4] = [
    (Figure::Dice, "consistency", "multitask"),
    (Figure::Auc, "consistency", "multitask"),
    (Figure::Dice, "multitask", "segmentation"),
    (Figure::Auc, "multitask", "classification"),
];

/// How the sentences come about.
pub(super) const RULE: &str = "On targets alone. Better or worse: p, corrected by Holm over the targets, is below 0.05, and \
    the 95% interval of the difference holds no 0. Where no difference is found, there may be one all the same.";

/// A sentence for each question that the study asks, and one for what its targets cannot tell.
pub(super) fn sentences(statistics: &Statistics) -> Vec<String> {
    let targets = statistics
        .datasets
        .iter()
        .filter(|set| set.role == "target");
    let targets: Vec<&DataSetStatistics> = targets.collect();
    let sentence = |(figure, a, b): (Figure, &str, &str)| {
        let found = targets.iter().filter_map(|set| {
            let found = Found::of(&set.comparisons, figure, a, b)?;
            Some(found.outcome(&set.dataset))
        });
        let found: Vec<String> = found.collect();
        let name = match figure {
            Figure::Dice => "Dice",
            Figure::Auc => "AUC",
        };
        (!found.is_empty()).then(|| format!("{name}, {a} − {b}: {}.", found.join("; ")))
    };
    let mut sentences: Vec<String> = QUESTIONS.into_iter().filter_map(sentence).collect();
    if let ([only], false) = (&targets[..], sentences.is_empty()) {
        sentences.push(format!(
            "{} is the only target: nothing here says whether another would show the same.",
            only.dataset
        ));
    }
    sentences
}

/// The difference of two methods on one target.
struct Found {
    value: f64,
    ci95: Option<[f64; 2]>,
    clusters: usize,
    /// Corrected.
    p: Option<f64>,
    /// Of single runs.
    runs: Vec<f64>,
}

impl Found {
    /// `a − b`, whichever of them is first in the comparison.
    fn of(comparisons: &[Comparison], figure: Figure, a: &str, b: &str) -> Option<Self> {
        let find = |a: &str, b: &str| comparisons.iter().find(|c| (&*c.a, &*c.b) == (a, b));
        let (found, turned) = match find(a, b) {
            Some(found) => (found, false),
            None => (find(b, a)?, true),
        };
        let (found, by_run) = match figure {
            Figure::Dice => {
                let dice = found.dice.as_ref()?;
                let difference = dice.difference;
                let found = Self {
                    value: difference.mean,
                    ci95: difference.ci95,
                    clusters: difference.clusters,
                    p: dice.holm,
                    runs: Vec::new(),
                };
                (found, &dice.by_run)
            }
            Figure::Auc => {
                let auc = found.auc.as_ref()?;
                let found = Self {
                    value: auc.delong.value,
                    ci95: auc.ci95,
                    clusters: auc.delong.clusters,
                    p: auc.holm,
                    runs: Vec::new(),
                };
                (found, &auc.by_run)
            }
        };
        let sign = if turned { -1.0 } else { 1.0 };
        let runs = by_run.iter().flat_map(|spread| &spread.runs);
        Some(Self {
            value: sign * found.value,
            ci95: found.ci95.map(|[low, high]| match turned {
                true => [-high, -low],
                false => [low, high],
            }),
            runs: runs.map(|run| sign * run).collect(),
            ..found
        })
    }

    /// What it is on the data set of that name.
    fn outcome(&self, set: &str) -> String {
        let figures = format!(
            "{}, p {}",
            interval(Some(self.value), self.ci95, self.clusters),
            p_value(self.p)
        );
        let sure = self.p.is_some_and(|p| p < LEVEL);
        let sides = self.ci95.map(|[low, high]| (low > 0.0, high < 0.0));
        let verdict = match sides.filter(|_| sure) {
            Some((true, _)) => "better",
            Some((_, true)) => "worse",
            _ => return format!("no difference found on {set}, {figures}"),
        };
        let alike = |run: &&f64| **run * self.value > 0.0;
        let repeated = match self.runs.len() {
            0 | 1 => String::new(),
            n => format!(
                ", in {} of {n} pairs of runs",
                self.runs.iter().filter(alike).count()
            ),
        };
        format!("{verdict} on {set}, {figures}{repeated}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Label;
    use crate::metrics::PerImage;
    use crate::study::statistics::{Spread, Strata, Unit, averaged};
    use std::collections::BTreeMap;

    /// `a − b` on 40 images: Dice differs by `gain`, a little more or less, and p of malignant ones by four times that.
    fn comparison(a: &str, b: &str, gain: f64, runs: &[f64]) -> Comparison {
        let images = |scale: f64| {
            let row = |i: usize| {
                let malignant = i % 2 == 1;
                let label = [Label::Benign, Label::Malignant][usize::from(malignant)];
                let mut row = PerImage::new("set", i.to_string(), None, label);
                let scatter = 0.005 * ((i * 7 % 5) as f64 - 2.0);
                row.dice = Some(0.5 + scale * (gain + scatter));
                let shift = if malignant { 4.0 * scale * gain } else { 0.0 };
                row.p = Some((i * 13 % 40) as f64 / 40.0 + shift);
                row
            };
            averaged(&(0..40).map(row).collect::<Vec<_>>())
        };
        let names = [a, b].map(str::to_owned);
        let strata = Strata::default();
        let mut found =
            Comparison::between(names, &images(1.0), &images(0.0), runs.len(), &strata).unwrap();
        let by_run = Some(Spread {
            mean: gain,
            sd: None,
            runs: runs.to_vec(),
        });
        let (dice, auc) = (found.dice.as_mut().unwrap(), found.auc.as_mut().unwrap());
        dice.holm = Some(dice.wilcoxon.p_value);
        auc.holm = Some(auc.delong.p_value);
        (dice.by_run, auc.by_run) = (by_run.clone(), by_run);
        found
    }

    fn target(name: &str, comparisons: Vec<Comparison>) -> DataSetStatistics {
        DataSetStatistics {
            dataset: name.to_owned(),
            role: "target",
            n: 40,
            unit: Unit::Image,
            units: 40,
            arms: BTreeMap::new(),
            comparisons,
            interference: None,
            ensembles: BTreeMap::new(),
            ensemble_comparisons: Vec::new(),
        }
    }

    fn said(datasets: Vec<DataSetStatistics>) -> Vec<String> {
        sentences(&Statistics {
            arms: Vec::new(),
            datasets,
            not_computed: Vec::new(),
        })
    }

    fn consistency(name: &str, gain: f64, runs: &[f64]) -> DataSetStatistics {
        target(
            name,
            vec![comparison("consistency", "multitask", gain, runs)],
        )
    }

    /// The text with each interval left out.
    fn plain(text: &str) -> String {
        let mut parts = text.split(" (").map(str::to_owned);
        let first = parts.next().unwrap_or_default();
        parts.fold(first, |text, part| text + part.split_once(')').unwrap().1)
    }

    #[test]
    fn better_worse_and_no_difference_are_told_apart() {
        let sets = vec![
            consistency("x", 0.05, &[0.06, 0.05, -0.01]),
            consistency("y", -0.05, &[-0.05]),
            consistency("z", 0.0, &[0.2, 0.1]),
        ];
        let found = said(sets);
        let [dice, auc] = &found[..] else {
            panic!("expected two sentences: {found:?}");
        };
        assert_eq!(
            plain(dice),
            "Dice, consistency − multitask: better on x, 0.050, p < 0.0001, in 2 of 3 pairs of runs; \
             worse on y, −0.050, p < 0.0001; no difference found on z, 0.000, p 1.0000."
        );
        let [x, y, z] = auc.split("; ").collect::<Vec<_>>()[..] else {
            panic!("expected three targets: {auc}");
        };
        assert!(
            x.starts_with("AUC, consistency − multitask: better on x, 0."),
            "{x}"
        );
        assert!(y.starts_with("worse on y, −0."), "{y}");
        assert_eq!(z, "no difference found on z, 0.000, p 1.0000.");
    }

    #[test]
    fn a_difference_needs_its_corrected_p_and_its_interval() {
        let mut sets = vec![consistency("x", 0.05, &[]), consistency("y", 0.05, &[])];
        sets[0].comparisons[0].dice.as_mut().unwrap().holm = Some(0.0501);
        let of_y = sets[1].comparisons[0].dice.as_mut().unwrap();
        of_y.difference.ci95 = Some([-0.001, 0.101]);
        let dice = &said(sets)[0];
        for part in [
            "no difference found on x, 0.050",
            "no difference found on y, 0.050",
        ] {
            assert!(dice.contains(part), "{dice}");
        }
    }

    #[test]
    fn one_target_is_said_to_be_one_and_what_the_source_shows_is_not_said() {
        let one = said(vec![consistency("x", 0.05, &[])]);
        let last = "x is the only target: nothing here says whether another would show the same.";
        assert_eq!((one.len(), one[2].as_str()), (3, last));
        let mut source = consistency("s", -0.05, &[]);
        source.role = "source";
        assert_eq!(said(vec![source, consistency("x", 0.05, &[])]), one);
        // Without the arms there is nothing to say, of one target either.
        assert!(said(vec![target("x", Vec::new())]).is_empty());
    }

    #[test]
    fn learning_both_tasks_is_held_against_each_alone_in_either_order() {
        let costs = vec![
            comparison("multitask", "segmentation", -0.05, &[]),
            // As where the plan names the arms in another order.
            comparison("classification", "multitask", 0.05, &[0.1, 0.2]),
        ];
        let found = said(vec![target("x", costs)]);
        assert!(
            found[0].starts_with("Dice, multitask − segmentation: worse on x, −0.050 (−0."),
            "{found:?}"
        );
        assert!(
            found[1].starts_with("AUC, multitask − classification: worse on x, −0."),
            "{found:?}"
        );
        assert!(found[1].ends_with("in 2 of 2 pairs of runs."), "{found:?}");
    }
}
