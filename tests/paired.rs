//! Tests of paired differences against SciPy, statsmodels and a published example, and against their
//! definitions.

use approx::assert_relative_eq;
use echograd::metrics::paired::{EXACT, HodgesLehmann, Wilcoxon, holm, rank_biserial};
use proptest::prelude::*;
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("goldens/paired.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().unwrap().iter();
    values.map(|v| v.as_f64().unwrap()).collect()
}

#[test]
fn samples_agree_with_scipy_and_with_hollander_and_wolfe() {
    for sample in golden()["samples"].as_array().unwrap() {
        println!("{}", sample["name"]);
        let differences = numbers(&sample["differences"]);
        let test = Wilcoxon::of(&differences);
        assert_eq!(test.n as u64, sample["n"].as_u64().unwrap());
        assert_eq!(test.exact, test.n <= EXACT);
        let centre = HodgesLehmann::of(&differences).unwrap();
        for (ours, name) in [
            (test.positive, "positive"),
            (test.negative, "negative"),
            (test.p_value, "p_value"),
            (rank_biserial(&differences).unwrap(), "rank_biserial"),
            (centre.value, "centre"),
        ] {
            let theirs = sample[name].as_f64().unwrap();
            assert_relative_eq!(ours, theirs, max_relative = 1e-10, epsilon = 1e-14);
        }
        assert_eq!(centre.ci95.is_some(), !sample["ci95"].is_null());
        if let Some(ci95) = centre.ci95 {
            for (ours, theirs) in ci95.into_iter().zip(numbers(&sample["ci95"])) {
                assert_relative_eq!(ours, theirs, max_relative = 1e-12, epsilon = 1e-14);
            }
        }
    }
}

#[test]
fn holm_agrees_with_statsmodels() {
    for case in golden()["holm"].as_array().unwrap() {
        let p: Vec<_> = numbers(&case["p"]).into_iter().map(Some).collect();
        for (ours, theirs) in holm(&p).into_iter().zip(numbers(&case["corrected"])) {
            assert_relative_eq!(ours.unwrap(), theirs, max_relative = 1e-12);
        }
    }
    assert!(holm(&[]).is_empty());
    assert_eq!(holm(&[None, None]), [None, None]);
}

#[test]
fn samples_that_say_nothing_are_no_error() {
    for nothing in [&[][..], &[0.0, -0.0]] {
        let test = Wilcoxon::of(nothing);
        assert_eq!((test.n, test.p_value), (0, 1.0));
        assert_eq!(rank_biserial(nothing), None);
    }
    assert_eq!(HodgesLehmann::of(&[]), None);
    let one = HodgesLehmann::of(&[0.5]).unwrap();
    assert_eq!((one.value, one.ci95), (0.5, None));
}

proptest! {
    #[test]
    fn exchanging_the_methods_changes_signs_alone(
        quarters in proptest::collection::vec(-8i32..9, 1..70)
    ) {
        let there: Vec<f64> = quarters.iter().map(|q| f64::from(*q) / 4.0).collect();
        let back: Vec<f64> = there.iter().map(|d| -d).collect();
        let (a, b) = (Wilcoxon::of(&there), Wilcoxon::of(&back));
        prop_assert_eq!((a.positive, a.negative), (b.negative, b.positive));
        prop_assert!((a.p_value - b.p_value).abs() < 1e-12);
        prop_assert!(a.p_value > 0.0 && a.p_value <= 1.0);
        let (a, b) = (HodgesLehmann::of(&there).unwrap(), HodgesLehmann::of(&back).unwrap());
        prop_assert!((a.value + b.value).abs() < 1e-12);
        if let (Some(a), Some(b)) = (a.ci95, b.ci95) {
            prop_assert!((a[0] + b[1]).abs() < 1e-12 && (a[1] + b[0]).abs() < 1e-12);
        }
        if let Some(ci95) = a.ci95 {
            prop_assert!(ci95[0] <= a.value && a.value <= ci95[1]);
        }
    }

    /// The interval and the test are one thing: moved by a centre outside of it, the sample is rejected.
    #[test]
    fn the_interval_holds_the_centres_that_are_not_rejected(
        values in proptest::collection::vec(-1.0f64..1.0, 8..30)
    ) {
        let ci95 = HodgesLehmann::of(&values).unwrap().ci95.unwrap();
        let width = ci95[1] - ci95[0];
        let p = |centre: f64| Wilcoxon::of(&values.iter().map(|v| v - centre).collect::<Vec<_>>()).p_value;
        prop_assert!(p(ci95[0] + 1e-9 * width) > 0.05);
        prop_assert!(p(ci95[0] - 1e-9 * width) <= 0.05);
        prop_assert!(p(ci95[1] + 1e-9 * width) <= 0.05);
    }
}
