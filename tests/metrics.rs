//! Metrics against reference implementations, against their definitions, and in the files they are written to.

use std::collections::BTreeMap;

use approx::assert_relative_eq;
use echograd::data::Label;
use echograd::data::image::Gray;
use echograd::metrics::classification::{
    Auc, AucDifference, Confusion, THRESHOLD, brier, expected_calibration_error, reliability, roc,
};
use echograd::metrics::segmentation::{Agreement, Mask, SurfaceDistances};
use echograd::metrics::statistics::{
    bootstrap_ci95, mean, median, quantile, sample_variance, wilson_ci95,
};
use echograd::metrics::{DatasetMetrics, PerImage, write_csv, write_json};
use proptest::prelude::*;
use serde_json::{Value, json};

// ---------------------------------------------------------------- reference values

fn golden() -> Value {
    serde_json::from_str(include_str!("goldens/metrics.json")).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(number).collect()
}

/// The masks of `make_metrics.py`, from the same integers.
fn draw(width: usize, height: usize, shapes: &Value) -> Mask {
    let mut pixels = vec![false; width * height];
    for shape in shapes.as_array().unwrap() {
        let v: Vec<i64> = shape.as_array().unwrap()[1..]
            .iter()
            .map(|v| v.as_i64().unwrap())
            .collect();
        for (i, pixel) in pixels.iter_mut().enumerate() {
            let (x, y) = ((i % width) as i64, (i / width) as i64);
            let ellipse =
                || ((x - v[0]) * v[3]).pow(2) + ((y - v[1]) * v[2]).pow(2) <= (v[2] * v[3]).pow(2);
            match shape[0].as_str().unwrap() {
                "ellipse" => *pixel |= ellipse(),
                "hole" => *pixel &= !ellipse(),
                "box" => *pixel |= (v[0]..=v[2]).contains(&x) && (v[1]..=v[3]).contains(&y),
                "noise" => {
                    let hash = (x * 7919 + y * 104_729 + v[0]).pow(2) % 1_000_003;
                    *pixel |= hash % 1000 < v[1];
                }
                other => panic!("unknown shape {other}"),
            }
        }
    }
    Mask::new(width, height, pixels).unwrap()
}

#[test]
fn segmentation_agrees_with_scikit_learn_scikit_image_scipy_medpy_and_monai() {
    let golden = golden();
    let pixel_mm = number(&golden["pixel_mm"]);
    for case in golden["segmentation"].as_array().unwrap() {
        println!("{}", case["name"]);
        let (width, height) = (number(&case["width"]), number(&case["height"]));
        let draw = |shapes| draw(width as usize, height as usize, shapes);
        let (prediction, truth) = (draw(&case["prediction"]), draw(&case["truth"]));

        // SciPy: the outline and the distance transform.
        assert_eq!(json!(truth.area()), case["area"]);
        assert_eq!(json!(truth.surface().area()), case["outline"]);
        let squared = truth.squared_distances().unwrap();
        assert_eq!(
            json!(squared.iter().sum::<u64>()),
            case["squared_distances_sum"]
        );
        assert_eq!(json!(squared.iter().max()), case["squared_distances_max"]);

        let mut row = PerImage::new("golden", "", None, Label::Benign);
        row.compare(&prediction, &truth, Some(pixel_mm)).unwrap();
        let distances = SurfaceDistances::between(&prediction, &truth)
            .unwrap()
            .unwrap();
        // MONAI computes in single precision.
        for (ours, name, tolerance) in [
            (row.dice, "dice", 1e-12),
            (row.iou, "iou", 1e-12),
            (row.precision, "precision", 1e-12),
            (row.recall, "recall", 1e-12),
            (Some(distances.hausdorff(1.0)), "hd_px", 1e-12),
            (row.hd95_px, "hd95_px", 5e-7),
            (row.hd95_mm, "hd95_mm", 5e-7),
            (row.assd_px, "assd_px", 1e-12),
            (row.assd_mm, "assd_mm", 1e-12),
        ] {
            assert_relative_eq!(ours.unwrap(), number(&case[name]), max_relative = tolerance);
        }
    }
}

fn cases(scores: &Value, positive: &Value) -> Vec<(f64, bool)> {
    let positive = numbers(positive).into_iter().map(|y| y == 1.0);
    numbers(scores).into_iter().zip(positive).collect()
}

fn paired(first: &[(f64, bool)], second: &[(f64, bool)]) -> Vec<([f64; 2], bool)> {
    first
        .iter()
        .zip(second)
        .map(|(a, b)| ([a.0, b.0], a.1))
        .collect()
}

#[test]
fn classification_agrees_with_scikit_learn() {
    let golden = &golden()["classification"];
    let cases = cases(&golden["scores"][0], &golden["positive"]);
    let counts = Confusion::at(THRESHOLD, &cases);
    assert_eq!(
        json!([
            counts.true_positives,
            counts.false_positives,
            counts.false_negatives,
            counts.true_negatives
        ]),
        golden["confusion"]
    );
    for (ours, name) in [
        (counts.recall(), "sensitivity"),
        (counts.specificity(), "specificity"),
        (counts.precision(), "precision"),
        (counts.f1(), "f1"),
        (brier(&cases), "brier"),
        (expected_calibration_error(&cases), "ece"),
    ] {
        assert_relative_eq!(ours.unwrap(), number(&golden[name]), max_relative = 1e-12);
    }
}

#[test]
fn delong_agrees_with_its_definition_on_ties_and_on_the_data_of_the_paper() {
    let golden = &golden()["classification"];
    for set in [golden, &golden["ovarian"]] {
        let expected = &set["delong"];
        let scores: Vec<_> = set["scores"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| cases(s, &set["positive"]))
            .collect();
        for (k, cases) in scores.iter().enumerate() {
            let auc = Auc::of(cases).unwrap();
            let ci95 = auc.ci95.unwrap();
            let tolerance = 1e-12;
            assert_relative_eq!(
                auc.value,
                number(&expected["auc"][k]),
                max_relative = tolerance
            );
            assert_relative_eq!(
                auc.standard_error.unwrap(),
                number(&expected["standard_error"][k]),
                max_relative = tolerance
            );
            for (ours, theirs) in ci95.into_iter().zip(numbers(&expected["ci95"][k])) {
                assert_relative_eq!(ours, theirs, max_relative = tolerance);
            }
        }
        for (other, expected) in scores[1..]
            .iter()
            .zip(expected["first_against_others"].as_array().unwrap())
        {
            let test = AucDifference::of(&paired(&scores[0], other)).unwrap();
            let ours = [test.value, test.standard_error, test.z, test.p_value];
            for (ours, theirs) in ours.into_iter().zip(numbers(expected)) {
                assert_relative_eq!(ours, theirs, max_relative = 1e-9);
            }
        }
    }
}

#[test]
fn statistics_agree_with_numpy_and_scipy() {
    let golden = &golden()["statistics"];
    let values = numbers(&golden["values"]);
    for (ours, name) in [
        (mean(&values), "mean"),
        (median(&values), "median"),
        (sample_variance(&values), "variance"),
    ] {
        assert_relative_eq!(ours.unwrap(), number(&golden[name]), max_relative = 1e-12);
    }
    for pair in golden["quantiles"].as_array().unwrap() {
        let ours = quantile(&values, number(&pair[0])).unwrap();
        assert_relative_eq!(ours, number(&pair[1]), max_relative = 1e-12);
    }
    // SciPy's interval rests on 200 000 resamples; the ends of ours scatter by 0.06 standard errors.
    let standard_error = (sample_variance(&values).unwrap() / values.len() as f64).sqrt();
    let single: Vec<_> = values.iter().map(|&v| (v, None)).collect();
    let ours = bootstrap_ci95(&single, 2000, 0).unwrap();
    for (ours, scipy) in ours.into_iter().zip(numbers(&golden["bootstrap_ci95"])) {
        assert_relative_eq!(ours, scipy, epsilon = 0.2 * standard_error);
    }
}

// ---------------------------------------------------------------- definitions and symmetries

/// Rows of any size from 1×1, from sparse to full.
fn masks() -> impl Strategy<Value = (usize, usize, Vec<bool>, Vec<bool>)> {
    (1..=13_usize, 1..=13_usize, 0.02..=1.0, 0.02..=1.0).prop_flat_map(|(w, h, p, q)| {
        let bits = |density| prop::collection::vec(prop::bool::weighted(density), w * h);
        (Just(w), Just(h), bits(p), bits(q))
    })
}

fn scored() -> impl Strategy<Value = Vec<([f64; 2], bool)>> {
    let score = || (0..12).prop_map(|s| f64::from(s) / 11.0);
    prop::collection::vec(([score(), score()], any::<bool>()), 0..40)
}

fn column(cases: &[([f64; 2], bool)], k: usize) -> Vec<(f64, bool)> {
    cases
        .iter()
        .map(|&(s, positive)| (s[k], positive))
        .collect()
}

/// Hausdorff, HD95 and ASSD.
fn distances(prediction: &Mask, truth: &Mask) -> Option<[f64; 3]> {
    let found = SurfaceDistances::between(prediction, truth).unwrap()?;
    Some([found.hausdorff(1.0), found.hausdorff(0.95), found.assd()])
}

/// Moves the pixels of a mask into a frame of another size.
fn moved(
    (w, pixels): (usize, &[bool]),
    (width, height): (usize, usize),
    to: impl Fn(usize, usize) -> (usize, usize),
) -> Mask {
    let mut frame = vec![false; width * height];
    for (i, _) in pixels.iter().enumerate().filter(|(_, inside)| **inside) {
        let (x, y) = to(i % w, i / w);
        frame[y * width + x] = true;
    }
    Mask::new(width, height, frame).unwrap()
}

proptest! {
    #[test]
    fn distance_transform_is_the_nearest_pixel_by_search((w, h, pixels, _) in masks()) {
        let inside: Vec<usize> = (0..w * h).filter(|&i| pixels[i]).collect();
        let searched = |i: usize| {
            let squared = |&j: &usize| (i % w).abs_diff(j % w).pow(2) + (i / w).abs_diff(j / w).pow(2);
            inside.iter().map(squared).min().map(|d| d as u64)
        };
        let expected: Option<Vec<u64>> = (0..w * h).map(searched).collect();
        prop_assert_eq!(Mask::new(w, h, pixels).unwrap().squared_distances(), expected);
    }

    #[test]
    fn exchanging_prediction_and_truth_exchanges_precision_and_recall((w, h, p, t) in masks()) {
        let (p, t) = (Mask::new(w, h, p).unwrap(), Mask::new(w, h, t).unwrap());
        prop_assume!(p.area() > 0 && t.area() > 0);
        let (Agreement::Lesion { dice, iou, precision, recall, hd95_px, assd_px }, Agreement::Lesion {
            dice: d, iou: i, precision: pr, recall: re, hd95_px: hd, assd_px: sd,
        }) = (Agreement::between(&p, &t).unwrap(), Agreement::between(&t, &p).unwrap()) else {
            panic!("both masks hold a lesion");
        };
        prop_assert_eq!((dice, iou, precision, recall, hd95_px), (d, i, re, pr, hd));
        assert_relative_eq!(assd_px, sd, max_relative = 1e-12);
        assert_relative_eq!(iou, dice / (2.0 - dice), max_relative = 1e-12);
    }

    /// Together these fix the treatment of the border: what is beyond it is background.
    #[test]
    fn distances_survive_transposition_mirroring_and_a_frame((w, h, p, t) in masks()) {
        let both = |size, to: fn(usize, usize, usize) -> (usize, usize)| {
            let place = |pixels: &[bool]| moved((w, pixels), size, |x, y| to(w, x, y));
            distances(&place(&p), &place(&t))
        };
        let same = |a: Option<[f64; 3]>, b: Option<[f64; 3]>| {
            assert_eq!(a.is_some(), b.is_some());
            for (a, b) in a.into_iter().flatten().zip(b.into_iter().flatten()) {
                assert_relative_eq!(a, b, max_relative = 1e-12);
            }
        };
        let plain = both((w, h), |_, x, y| (x, y));
        same(plain, both((h, w), |_, x, y| (y, x)));
        same(plain, both((w, h), |w, x, y| (w - 1 - x, y)));
        same(plain, both((w + 5, h + 3), |_, x, y| (x + 2, y + 3)));
        prop_assert_eq!(plain.is_some(), p.contains(&true) && t.contains(&true));
    }

    #[test]
    fn auc_is_the_fraction_of_ordered_pairs(cases in scored()) {
        let cases = column(&cases, 0);
        let of = |class| cases.iter().filter(move |c| c.1 == class).map(|c| c.0);
        let pairs = of(true).flat_map(|a| of(false).map(move |b| (a, b)));
        let (won, all) = pairs.fold((0.0, 0), |(won, all), (a, b)| {
            (won + if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 }, all + 1)
        });
        match Auc::of(&cases) {
            Some(auc) => assert_relative_eq!(auc.value, won / f64::from(all), max_relative = 1e-12),
            None => prop_assert_eq!(all, 0),
        }
    }

    #[test]
    fn the_area_under_the_roc_curve_is_the_auc(cases in scored()) {
        let cases = column(&cases, 0);
        let (auc, corners) = (Auc::of(&cases), roc(&cases));
        prop_assert_eq!(auc.is_some(), corners.is_some());
        if let (Some(auc), Some(corners)) = (auc, corners) {
            prop_assert_eq!((corners[0], corners[corners.len() - 1]), ([0.0; 2], [1.0; 2]));
            let trapezoid = |w: &[[f64; 2]]| (w[1][0] - w[0][0]) * (w[0][1] + w[1][1]) / 2.0;
            let area: f64 = corners.windows(2).map(trapezoid).sum();
            prop_assert!((area - auc.value).abs() < 1e-12);
        }
    }

    #[test]
    fn the_reliability_diagram_is_what_the_calibration_error_averages(cases in scored()) {
        let cases = column(&cases, 1);
        let n: usize = reliability(&cases).iter().map(|bin| bin.n).sum();
        prop_assert_eq!(n, cases.len());
        let gap = |bin: &echograd::metrics::classification::Reliability| {
            bin.n as f64 * (bin.p - bin.positives).abs()
        };
        let total: f64 = reliability(&cases).iter().map(gap).sum();
        let ece = expected_calibration_error(&cases).unwrap_or(0.0);
        prop_assert!((total / n.max(1) as f64 - ece).abs() < 1e-12);
    }

    #[test]
    fn auc_depends_on_the_order_of_scores_alone(cases in scored(), shift in 0..40_usize) {
        let cases = column(&cases, 0);
        let close = |a: Option<Auc>, b: Option<Auc>, value: fn(f64) -> f64| {
            assert_eq!(a.is_some(), b.is_some());
            let Some((a, b)) = a.zip(b) else { return };
            assert_relative_eq!(value(a.value), b.value, epsilon = 1e-12);
            assert_eq!(a.standard_error.is_some(), b.standard_error.is_some());
            let Some((a, b)) = a.standard_error.zip(b.standard_error) else { return };
            assert_relative_eq!(a, b, epsilon = 1e-9);
        };
        let auc = Auc::of(&cases);
        let mapped = |f: fn(f64, bool) -> (f64, bool)| {
            Auc::of(&cases.iter().map(|&(s, y)| f(s, y)).collect::<Vec<_>>())
        };
        close(auc, mapped(|s, y| ((3.0 * s).exp() - 7.0, y)), |a| a);
        close(auc, mapped(|s, y| (-s, !y)), |a| a);
        close(auc, mapped(|s, y| (-s, y)), |a| 1.0 - a);
        let mut turned = cases.clone();
        turned.rotate_left(shift % cases.len().max(1));
        close(auc, Auc::of(&turned), |a| a);
    }

    #[test]
    fn paired_test_is_antisymmetric_and_bounded(cases in scored()) {
        let swapped: Vec<_> = cases.iter().map(|&([a, b], y)| ([b, a], y)).collect();
        let (there, back) = (AucDifference::of(&cases), AucDifference::of(&swapped));
        prop_assert_eq!(there.is_some(), back.is_some());
        if let Some((there, back)) = there.zip(back) {
            assert_relative_eq!(there.z, -back.z, max_relative = 1e-9, epsilon = 1e-12);
            assert_relative_eq!(there.p_value, back.p_value, max_relative = 1e-9);
            prop_assert!((0.0..=1.0).contains(&there.p_value));
            // |a − b| has at most the standard errors of both, fully anticorrelated.
            let se = |k| Auc::of(&column(&cases, k)).unwrap().standard_error.unwrap();
            prop_assert!(there.standard_error <= se(0) + se(1) + 1e-12);
        }
        let same: Vec<_> = cases.iter().map(|&([a, _], y)| ([a, 2.0 * a], y)).collect();
        if let Some(test) = AucDifference::of(&same) {
            prop_assert_eq!((test.value, test.standard_error, test.z, test.p_value), (0.0, 0.0, 0.0, 1.0));
            prop_assert_eq!(test.ci95(), None);
        }
    }
}

// ---------------------------------------------------------------- edges

#[test]
fn a_missed_lesion_scores_nothing_and_the_diagonal() {
    let mut truth = vec![false; 12];
    truth[5] = true;
    let (truth, nothing) = (
        Mask::new(4, 3, truth).unwrap(),
        Mask::new(4, 3, vec![false; 12]).unwrap(),
    );
    assert_eq!(
        Agreement::between(&nothing, &truth).unwrap(),
        Agreement::Lesion {
            dice: 0.0,
            iou: 0.0,
            precision: 0.0,
            recall: 0.0,
            hd95_px: 5.0,
            assd_px: 5.0
        }
    );
    for (prediction, area) in [(&truth, 1), (&nothing, 0)] {
        assert_eq!(
            Agreement::between(prediction, &nothing).unwrap(),
            Agreement::Normal {
                false_positive_area: area
            }
        );
    }
}

#[test]
fn masks_of_unequal_size_are_refused() {
    let message = Mask::new(4, 3, vec![false; 11]).unwrap_err().to_string();
    assert_eq!(message, "mask: expected 4×3 pixels, found 11 values");
    let of_size = |w: usize, h: usize| Mask::new(w, h, vec![true; w * h]).unwrap();
    let message = Agreement::between(&of_size(3, 4), &of_size(4, 3))
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "predicted mask: expected 4×3 pixels as in the true mask, found 3×4"
    );
    assert!(SurfaceDistances::between(&of_size(3, 4), &of_size(4, 3)).is_err());
}

#[test]
fn a_mask_is_read_from_a_grey_image() {
    let mut gray = Gray::zeros(3, 2);
    gray.pixels[4] = 255;
    let expected = Mask::new(3, 2, vec![false, false, false, false, true, false]).unwrap();
    assert_eq!(Mask::from(&gray), expected);
}

#[test]
fn one_class_alone_has_no_auc() {
    let benign = [(0.7, false), (0.2, false), (0.1, false)];
    let counts = Confusion::at(THRESHOLD, &benign);
    assert_eq!(Auc::of(&benign), None);
    assert_eq!((counts.recall(), counts.f1()), (None, None));
    assert_eq!(counts.specificity(), Some(2.0 / 3.0));
    assert_eq!(Confusion::at(THRESHOLD, &[(0.5, true)]).recall(), Some(1.0));
    assert_eq!((brier(&[]), expected_calibration_error(&[])), (None, None));

    let lone_positive = Auc::of(&[(0.1, false), (0.9, true), (0.3, false)]).unwrap();
    assert_eq!((lone_positive.value, lone_positive.ci95), (1.0, None));
    let separated = [(0.1, false), (0.3, false), (0.8, true), (0.9, true)];
    let auc = Auc::of(&separated).unwrap();
    assert_eq!((auc.standard_error, auc.clusters), (Some(0.0), 2));
    assert_eq!(auc.ci95, Some(wilson_ci95(1.0, 2.0)));
    // Scores that separate the classes to either side differ, by what no variance tells.
    let opposite: Vec<_> = separated.iter().map(|&(s, y)| ([s, -s], y)).collect();
    assert_eq!(AucDifference::of(&opposite), None);
}

#[test]
fn calibration_error_of_a_constant_is_its_distance_from_the_prevalence() {
    for p in [0.0, 1.0 / 15.0, 0.3, 1.0] {
        let cases: Vec<_> = (0..10).map(|i| (p, i < 4)).collect();
        assert_relative_eq!(
            expected_calibration_error(&cases).unwrap(),
            (p - 0.4_f64).abs(),
            epsilon = 1e-12
        );
    }
    // Opposite errors in different bins do not cancel.
    let cases = [(0.1, true), (0.9, false)];
    assert_relative_eq!(
        expected_calibration_error(&cases).unwrap(),
        0.9,
        epsilon = 1e-12
    );
}

// ---------------------------------------------------------------- bootstrap

/// 24 patients named p0 to p23, `images` images each, all of a patient's alike.
fn patients(images: usize) -> Vec<(f64, String)> {
    let patient = |i: usize| ((i * i * 37 % 101) as f64 / 101.0, format!("p{i}"));
    (0..24).flat_map(|i| vec![patient(i); images]).collect()
}

fn interval(values: &[(f64, String)], clustered: bool, seed: u64) -> [f64; 2] {
    let values: Vec<_> = values
        .iter()
        .map(|(v, name)| (*v, clustered.then_some(name.as_str())))
        .collect();
    bootstrap_ci95(&values, 2000, seed).unwrap()
}

#[test]
fn bootstrap_draws_whole_patients() {
    let (one, four) = (patients(1), patients(4));
    let width = |[low, high]: [f64; 2]| high - low;
    // Four equal images say no more about a patient than one does (and sums of four round alike).
    assert_eq!(interval(&four, true, 5), interval(&one, true, 5));
    assert_eq!(interval(&one, true, 5), interval(&one, false, 5));
    // Taken for independent they would halve the interval.
    let ratio = width(interval(&four, false, 5)) / width(interval(&four, true, 5));
    assert_relative_eq!(ratio, 0.5, epsilon = 0.05);
    // A patient's images need not follow one another.
    let rounds: Vec<_> = (0..4)
        .flat_map(|k| four[k..].iter().step_by(4).cloned())
        .collect();
    assert_eq!(rounds[1].1, "p1");
    assert_eq!(interval(&rounds, true, 5), interval(&one, true, 5));

    let same_patient = [(0.1, Some("a")), (0.9, Some("a"))];
    assert_eq!(bootstrap_ci95(&same_patient, 2000, 0), None);
}

#[test]
fn bootstrap_depends_on_the_seed_and_not_on_threads() {
    let values = patients(2);
    let with_threads = |n| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build()
            .unwrap();
        pool.install(|| interval(&values, true, 11))
    };
    assert_eq!(with_threads(1), with_threads(3));
    assert_ne!(interval(&values, true, 11), interval(&values, true, 12));
}

// ---------------------------------------------------------------- reports

const HEADER: &str = "dataset,image,patient,label,dice,iou,precision,recall,hd95_px,assd_px,hd95_mm,assd_mm,\
                      p,phi,irregularity,orientation,margin,roundness";

/// Two benign lesions, a malignant one that is missed, and two normal images, one with a false positive.
fn rows() -> Vec<PerImage> {
    let mask = |bits: &[u8]| Mask::new(4, 1, bits.iter().map(|&b| b == 1).collect()).unwrap();
    let row = |image: &str, patient: Option<&str>, label, prediction, truth, mm, p| {
        let mut row = PerImage::new("ours", image, patient.map(str::to_owned), label);
        row.compare(&mask(prediction), &mask(truth), mm).unwrap();
        row.p = p;
        row
    };
    let (none, one, two) = (&[0; 4], &[1, 0, 0, 0], &[1, 1, 0, 0]);
    vec![
        row(
            "a.png",
            Some("x"),
            Label::Benign,
            two,
            two,
            Some(0.5),
            Some(0.25),
        ),
        row(
            "b.png",
            Some("y"),
            Label::Benign,
            one,
            two,
            None,
            Some(0.75),
        ),
        row(
            "c.png",
            None,
            Label::Malignant,
            none,
            one,
            Some(0.5),
            Some(0.5),
        ),
        row("d.png", None, Label::Normal, two, none, None, Some(0.99)),
        row("e.png", None, Label::Normal, none, none, None, None),
    ]
}

#[test]
fn the_mean_of_rows_is_over_those_that_have_the_metric() {
    let mut rows = rows();
    rows.truncate(2);
    (rows[0].dice, rows[1].dice) = (Some(0.25), Some(0.75));
    (rows[0].phi, rows[1].phi) = (None, Some(0.5));
    (rows[0].p, rows[1].p) = (None, None);
    let mean = PerImage::mean(&rows).unwrap();
    assert_eq!((mean.dice, mean.phi, mean.p), (Some(0.5), Some(0.5), None));
    assert_eq!(mean.image, rows[0].image);
    assert_eq!(PerImage::mean(&[]), None);
}

#[test]
fn per_image_csv_has_its_columns_and_leaves_absent_fields_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("per_image.csv");
    let mut rows = rows();
    rows[0].phi = Some(0.125);
    write_csv(&path, &rows).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], HEADER);
    assert_eq!(
        lines[1],
        "ours,a.png,x,benign,1.0,1.0,1.0,1.0,0.0,0.0,0.0,0.0,0.25,0.125,,,,"
    );
    assert_eq!(lines[4], "ours,d.png,,normal,,,,,,,,,0.99,,,,,");
    assert_eq!(lines.len(), 6);

    let mut read: Vec<PerImage> = csv::Reader::from_path(&path)
        .unwrap()
        .deserialize()
        .collect::<Result<_, _>>()
        .unwrap();
    for (read, written) in read.iter_mut().zip(&rows) {
        read.false_positive_area = written.false_positive_area;
    }
    assert_eq!(read, rows);

    #[derive(serde::Serialize)]
    struct Key {
        arm: &'static str,
        fold: usize,
    }
    let keyed: Vec<_> = rows
        .into_iter()
        .map(|row| {
            (
                Key {
                    arm: "multitask",
                    fold: 2,
                },
                row,
            )
        })
        .collect();
    write_csv(&path, &keyed).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().next().unwrap(), format!("arm,fold,{HEADER}"));
    assert!(text.contains("\nmultitask,2,ours,b.png,y,benign,"));
}

#[test]
fn metrics_json_reports_every_part() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.json");
    write_json(
        &path,
        &BTreeMap::from([("ours".into(), DatasetMetrics::of(&rows()))]),
    )
    .unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let ours = &serde_json::from_str::<Value>(&text).unwrap()["ours"];

    assert_eq!(ours["n"], 5);
    let dice = &ours["segmentation"]["dice"];
    assert_eq!(dice["n"], 3);
    assert_relative_eq!(
        number(&dice["mean"]),
        (1.0 + 2.0 / 3.0) / 3.0,
        epsilon = 1e-12
    );
    assert_relative_eq!(number(&dice["median"]), 2.0 / 3.0, epsilon = 1e-12);
    assert_eq!(dice["ci95"], json!([0.0, 1.0]));
    // The size of a pixel is known for one perfect and one missed lesion; the diagonal is √17 px.
    assert_eq!(ours["segmentation"]["hd95_mm"]["n"], 2);
    assert_relative_eq!(
        number(&ours["segmentation"]["hd95_mm"]["mean"]),
        0.25 * 17.0_f64.sqrt(),
        epsilon = 1e-12
    );
    for name in [
        "iou",
        "precision",
        "recall",
        "hd95_px",
        "assd_px",
        "assd_mm",
    ] {
        assert!(ours["segmentation"][name]["mean"].is_number(), "{name}");
    }

    // Three cases: the normal image's p is no case. 0.5 is a positive decision.
    let classification = &ours["classification"];
    assert_eq!(classification["n"], 3);
    assert_eq!(
        classification["auc"],
        json!({"value": 0.5, "standard_error": null, "clusters": 1, "ci95": null})
    );
    for (name, value) in [
        ("sensitivity", 1.0),
        ("specificity", 0.5),
        ("precision", 0.5),
        ("f1", 2.0 / 3.0),
        ("brier", (0.0625 + 0.5625 + 0.25) / 3.0),
        ("ece", 0.5),
    ] {
        assert_relative_eq!(number(&classification[name]), value, epsilon = 1e-12);
    }

    assert_eq!(ours["normals"]["n"], 2);
    assert_eq!(ours["normals"]["false_positive_rate"], 0.5);
    assert_eq!(ours["normals"]["false_positive_area"]["mean"], 1.0);

    assert_eq!(ours["by_label"]["benign"]["n"], 2);
    assert_relative_eq!(
        number(&ours["by_label"]["benign"]["segmentation"]["dice"]["mean"]),
        5.0 / 6.0,
        epsilon = 1e-12
    );
    let missed = &ours["by_label"]["malignant"]["segmentation"]["dice"];
    assert_eq!(
        missed,
        &json!({"n": 1, "clusters": 1, "mean": 0.0, "median": 0.0, "ci95": null})
    );
}

#[test]
fn arms_without_a_task_report_null_for_it() {
    let classified = PerImage {
        p: Some(0.3),
        ..PerImage::new("ours", "a.png", None, Label::Benign)
    };
    let metrics = serde_json::to_value(DatasetMetrics::of(&[classified])).unwrap();
    assert_eq!(metrics["segmentation"], Value::Null);
    assert_eq!(metrics["normals"], Value::Null);
    assert_eq!(metrics["classification"]["auc"], Value::Null);
    assert_eq!(metrics["classification"]["specificity"], 1.0);

    let unclassified: Vec<_> = rows()
        .into_iter()
        .map(|row| PerImage { p: None, ..row })
        .collect();
    let metrics = DatasetMetrics::of(&unclassified);
    assert_eq!(metrics.classification, None);
    assert!(metrics.segmentation.is_some());
}
