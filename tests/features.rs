//! The features against the table of check values, numerical derivatives and hostile masks.

use std::collections::HashMap;
use std::path::Path;

use calamine::{Reader, Xlsx};
use echograd::data::{self, Label};
use echograd::device::cpu::{Element, Session};
use echograd::features::{FitOptions, MaskSums, Prior, ShapeFeatures, Start};
use echograd::metrics::classification::Auc;
use echograd::ops::losses::{BceWithLogits, SoftDice};
use echograd::ops::mask_head::{BAND, MaskHead};
use echograd::ops::moments::Moments;
use echograd::ops::perimeter::Perimeter;
use echograd::ops::pointwise::{Scale, Sigmoid};
use echograd::ops::shape_features;
use echograd::tape::{Plan, Tape, Var};
use echograd::tensor::{Real, Shape};
use proptest::prelude::*;

const SIZE: usize = 256;

/// A hard mask on 256×256: `inside(x, y)`, coordinates from the image's centre.
fn hard<T: Real>(inside: impl Fn(f64, f64) -> bool) -> Vec<T> {
    let half = (SIZE as f64 - 1.0) / 2.0;
    (0..SIZE * SIZE)
        .map(|i| ((i % SIZE) as f64 - half, (i / SIZE) as f64 - half))
        .map(|(x, y)| if inside(x, y) { T::one() } else { T::zero() })
        .collect()
}

fn disc<T: Real>(column: f64, row: f64, radius: f64) -> Vec<T> {
    let half = (SIZE as f64 - 1.0) / 2.0;
    hard(move |x, y| (x + half - column).hypot(y + half - row) < radius)
}

/// Mask, then area, perimeter, irregularity, orientation, margin, roundness.
fn check_values<T: Real>() -> Vec<(&'static str, Vec<T>, [f64; 6])> {
    let ellipse = |a: f64, b: f64| hard(move |x, y| (x / a).powi(2) + (y / b).powi(2) < 1.0);
    let turned = |x: f64, y: f64| {
        let (u, v) = ((x + y) / 2f64.sqrt(), (y - x) / 2f64.sqrt());
        (u / 80.0).powi(2) + (v / 40.0).powi(2) < 1.0
    };
    let star = |x: f64, y: f64| x.hypot(y) < 60.0 * (1.0 + 0.3 * (8.0 * y.atan2(x)).cos());
    vec![
        (
            "disc",
            hard(|x, y| x.hypot(y) < 60.0),
            [11304.0, 383.09, 0.0163, 0.0, 0.0081, 1.0],
        ),
        (
            "wide ellipse",
            ellipse(80.0, 40.0),
            [10068.0, 394.80, 0.1039, -0.5994, 0.0090, 0.8004],
        ),
        (
            "tall ellipse",
            ellipse(40.0, 80.0),
            [10068.0, 394.80, 0.1039, 0.5994, 0.0090, 0.8004],
        ),
        (
            "turned ellipse",
            hard(turned),
            [10050.0, 393.54, 0.1017, 0.0, 0.0078, 0.8003],
        ),
        (
            "square",
            hard(|x, y| x.abs() < 50.0 && y.abs() < 50.0),
            [10000.0, 397.19, 0.1132, 0.0, 0.0453, 1.0],
        ),
        (
            "star",
            hard(star),
            [11836.0, 728.87, 0.5625, 0.0, 0.2726, 1.0],
        ),
        (
            "small disc",
            disc(20.0, 30.0, 5.0),
            [69.0, 29.46, 0.0005, 0.0, -0.0016, 1.0],
        ),
        (
            "ones",
            vec![T::one(); SIZE * SIZE],
            [65536.0, 1019.94, 0.1163, 0.0, 0.0468, 1.0],
        ),
        (
            "half",
            vec![T::of(0.5); SIZE * SIZE],
            [32768.0, 508.95, 0.1143, 0.0, -0.2920, 1.0],
        ),
    ]
}

fn assert_check_values<T: Real>() {
    for (name, mask, expected) in check_values::<T>() {
        let sums = MaskSums::of(&mask, SIZE);
        let features = sums.features().expect("measurable").to_array();
        assert_measured(
            name,
            &[sums.moments.area, sums.perimeter],
            &features,
            expected,
        );
    }
}

/// Area and perimeter (if there), and features, to the digits of the table.
fn assert_measured(name: &str, sums: &[f64], features: &[f64], expected: [f64; 6]) {
    let close = |what: &str, found: f64, expected: f64, digit: f64| {
        let within = (found - expected).abs() <= 0.5 * digit + 1e-9;
        assert!(within, "{what} of the {name}: {found}, expected {expected}");
    };
    let [area, perimeter, of_shape @ ..] = expected;
    for (what, found, expected, digit) in [
        ("area", sums.first(), area, 1e-9),
        ("perimeter", sums.get(1), perimeter, 0.01),
    ] {
        found.inspect(|found| close(what, **found, expected, digit));
    }
    for ((what, found), expected) in ShapeFeatures::NAMES.iter().zip(features).zip(of_shape) {
        close(what, *found, expected, 1e-4);
    }
}

/// The table through the kernels for GPUs, one operation each, and through the multitask loss: with means
/// 0 and standard deviations 1, features are the gradient of the prior's weights over that of its
/// bias.
#[test]
#[cfg(feature = "emulator")]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn check_values_on_the_emulator() {
    use echograd::device::gpu::{self, Gpu};
    use echograd::ops::control;
    use echograd::ops::multitask_loss::{MultitaskLoss, Tie};
    use echograd::tape::Options;

    let mut tape = Tape::new();
    let mask = tape.input("mask", Shape::new(1, SIZE, SIZE, 1));
    tape.narrow(mask);
    let moments = tape.push(Moments, &[mask]).expect("fits");
    let perimeter = tape.push(Perimeter, &[mask]).expect("fits");
    let shape = tape
        .push_all(shape_features::ShapeFeatures, &[moments, perimeter])
        .expect("fits");
    let (one, vector) = (Shape::SCALAR, Shape::per_channel(4));
    let zero = tape.input("zero", one);
    let ones = tape.input("one", one);
    let zeros = tape.input("zeros", vector);
    let [weight, sd] = ["weight", "sd"].map(|name| tape.input(name, vector));
    let bias = tape.input("bias", one);
    let ramp = tape.input("control", Shape::per_channel(control::LEN));
    let op = MultitaskLoss {
        mask: true,
        classification: Some(1.0),
        consistency: Some(Tie {
            weight: 1.0,
            stop_classifier: false,
            stop_mask: false,
            unweighted: false,
        }),
    };
    let inputs = [
        zero, zero, moments, perimeter, ones, zero, zero, ones, weight, bias, zeros, sd, ramp,
    ];
    let total = tape.push_all(op, &inputs).expect("fits")[0];
    let gradients = tape
        .backward(total, &[weight, bias])
        .expect("differentiable");
    let gradients = [0, 1].map(|k| gradients[k].expect("the prior learns"));
    let kept = [moments, perimeter, shape[0]].into_iter().chain(gradients);
    kept.for_each(|v| tape.keep(v));
    let gpu = Gpu::emulator().expect("built");
    for narrow in [false, true] {
        let plan = Plan::new(&tape, Options::gpu(narrow)).expect("small");
        let mut session = gpu::Session::new(&gpu, plan).expect("all kernels are there");
        session.write(ones, &[1.0]).expect("fits");
        session.write(weight, &[1.0; 4]).expect("fits");
        session.write(sd, &[1.0; 4]).expect("fits");
        session.write(ramp, &[1.0; control::LEN]).expect("fits");
        for (name, pixels, expected) in check_values::<f32>() {
            session.write(mask, &pixels).expect("fits");
            session.run().expect("no kernel fails");
            let read = |var| -> Vec<f64> {
                let values = session.read(var).expect("kept");
                values.into_iter().map(f64::from).collect()
            };
            let sums = [read(moments)[0], read(perimeter)[0]];
            assert_measured(name, &sums, &read(shape[0]), expected);
            let (dweight, dbias) = (read(gradients[0]), read(gradients[1])[0]);
            if name == "half" {
                assert!(dbias == 0.0, "an undecided mask has no shape to agree with");
            } else {
                let features: Vec<f64> = dweight.iter().map(|d| d / dbias).collect();
                assert_measured(name, &[], &features, expected);
            }
        }
    }
}

#[test]
fn check_values_in_f64() {
    assert_check_values::<f64>();
}

#[test]
fn check_values_in_f32() {
    assert_check_values::<f32>();
}

/// Why Sobel: its perimeter of a disc is nearly the true one, that of forward differences is not.
#[test]
fn sobel_is_rounder_than_forward_differences() {
    let mask = disc::<f64>(127.5, 127.5, 60.0);
    let deficit = |perimeter: f64| 1.0 - 4.0 * std::f64::consts::PI * 11304.0 / perimeter.powi(2);
    let at = |x: usize, y: usize| mask[y * SIZE + x];
    let forward: f64 = (0..SIZE - 1)
        .flat_map(|y| (0..SIZE - 1).map(move |x| (x, y)))
        .map(|(x, y)| (at(x + 1, y) - at(x, y)).hypot(at(x, y + 1) - at(x, y)))
        .sum();
    let sobel = MaskSums::of(&mask, SIZE).perimeter;
    assert!((deficit(sobel) - 0.032).abs() < 5e-4, "{}", deficit(sobel));
    assert!(
        (deficit(forward) - 0.261).abs() < 5e-4,
        "{}",
        deficit(forward)
    );
}

/// The gradient of `Σ gradₖ·featureₖ` with respect to every pixel.
fn feature_gradient(mask: &[f64], width: usize, grad: [f64; 4]) -> Vec<f64> {
    let sums = MaskSums::of(mask, width);
    let mut dmask = vec![0.0; mask.len()];
    sums.backward(
        &sums.features_backward(&grad.into()),
        mask,
        width,
        &mut dmask,
    );
    dmask
}

/// Small against `perimeter::EPSILON`, large against the rounding of a feature.
const STEP: f64 = 4e-5;

/// Five-point central differences of `f` in each coordinate of `at`, against `analytic`.
fn assert_gradient(at: &[f64], analytic: &[f64], step: f64, mut f: impl FnMut(&[f64]) -> f64) {
    let largest = analytic.iter().fold(0.0_f64, |max, g| max.max(g.abs()));
    let mut point = at.to_vec();
    for i in 0..at.len() {
        let mut shifted = |offset: f64| {
            point[i] = at[i] + offset * step;
            let value = f(&point);
            point[i] = at[i];
            value
        };
        let numeric =
            (8.0 * (shifted(1.0) - shifted(-1.0)) - (shifted(2.0) - shifted(-2.0))) / (12.0 * step);
        let scale = analytic[i].abs().max(numeric.abs()).max(1e-3 * largest);
        let difference = (analytic[i] - numeric).abs();
        assert!(
            difference <= 1e-6 * scale,
            "coordinate {i} at {}: analytic {}, numeric {numeric}",
            at[i],
            analytic[i]
        );
    }
}

/// All four features at once, in a combination that cannot vanish where one of them is stationary
/// (as roundness is for a disc).
fn assert_feature_gradients(mask: &[f64], width: usize) {
    let grad = [0.9, -0.7, 0.8, 0.6];
    assert_gradient(mask, &feature_gradient(mask, width, grad), STEP, |mask| {
        let features = MaskSums::of(mask, width)
            .features()
            .expect("measurable")
            .to_array();
        features.iter().zip(grad).map(|(f, g)| f * g).sum()
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gradients_of_random_soft_masks(
        (width, mask) in (5usize..14, 9usize..14).prop_flat_map(|(w, h)| {
            (Just(w), prop::collection::vec(0.0..1.0f64, w * h))
        })
    ) {
        prop_assume!((mask.iter().sum::<f64>() - 32.0).abs() > 0.1 && mask.iter().sum::<f64>() > 32.0);
        assert_feature_gradients(&mask, width);
    }

    #[test]
    fn gradients_of_soft_lesions(
        radius in 3.5..6.0f64, aspect in 0.5..1.5f64, x in -4.0..4.0f64, y in -4.0..4.0f64, sharpness in 0.5..2.0f64
    ) {
        let (width, height) = (19, 17);
        let mask: Vec<f64> = (0..width * height)
            .map(|i| ((i % width) as f64 - 9.0 - x, (i / width) as f64 - 8.0 - y))
            .map(|(x, y)| 1.0 / (1.0 + (sharpness * ((x * aspect).hypot(y) - radius)).exp()))
            .collect();
        prop_assume!(mask.iter().sum::<f64>() > 32.1);
        assert_feature_gradients(&mask, width);
    }
}

/// Each feature by each sum, where the four do not hide one another. The sums are scaled to one, as
/// their sizes differ by four orders of magnitude.
#[test]
fn gradients_of_features_by_sums() {
    // None of them is symmetric, where a gradient would vanish.
    let ellipse = |x: f64, y: f64| ((x + 0.5 * y) / 80.0).powi(2) + (y / 40.0).powi(2);
    let star = |x: f64, y: f64| (8.0 * y.atan2(x)).cos();
    let masks = [
        hard(|x, y| ellipse(x, y) < 1.0),
        hard(|x, y| ellipse(y, x) < 1.0),
        hard(|x, y| ellipse(x - 30.0, y - 9.0) < 0.6 + 0.3 * star(x, y)),
        noise(SIZE, SIZE / 2),
    ];
    for mask in masks {
        let sums: [f64; MaskSums::COUNT] = bytemuck::cast(MaskSums::of(&mask, SIZE));
        for k in 0..4 {
            let mut grad = [0.0; 4];
            grad[k] = 1.0;
            let analytic = bytemuck::cast::<MaskSums, [f64; MaskSums::COUNT]>(
                bytemuck::cast::<_, MaskSums>(sums).features_backward(&grad.into()),
            );
            let scale = sums.map(|sum| sum.abs().max(1.0));
            let scaled: Vec<f64> = analytic.iter().zip(scale).map(|(g, s)| g * s).collect();
            assert_gradient(&[0.0; MaskSums::COUNT], &scaled, 1e-3, |offset| {
                let moved: [f64; MaskSums::COUNT] =
                    std::array::from_fn(|i| sums[i] + offset[i] * scale[i]);
                let moved: MaskSums = bytemuck::cast(moved);
                moved.features().expect("measurable").to_array()[k]
            });
        }
    }
}

/// Values in [0, 1) without any structure.
fn noise(width: usize, height: usize) -> Vec<f64> {
    (0..width * height)
        .map(|i| ((i % width * 7919 + i / width * 104_729) % 1009) as f64 / 1009.0)
        .collect()
}

/// Masks on which something vanishes: no edge, no width, one pixel, values far from any.
fn hostile_masks(width: usize, height: usize) -> Vec<(&'static str, Vec<f64>)> {
    let of = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..width * height)
            .map(|i| f(i % width, i / width))
            .collect()
    };
    let noise = |x: usize, y: usize| ((x * 7919 + y * 104_729) % 1009) as f64 / 1009.0;
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    vec![
        ("empty", of(&|_, _| 0.0)),
        ("full", of(&|_, _| 1.0)),
        ("half", of(&|_, _| 0.5)),
        (
            "pixel",
            of(&|x, y| f64::from(u8::from(x == width / 2 && y == height / 2))),
        ),
        ("corner", of(&|x, y| f64::from(u8::from(x == 0 && y == 0)))),
        ("noise", of(&noise)),
        (
            "logits of ±60",
            of(&|x, y| sigmoid(if noise(x, y) < 0.5 { -60.0 } else { 60.0 })),
        ),
        ("1e-30", of(&|_, _| 1e-30)),
        ("faint", of(&|_, _| 33.0 / (width * height) as f64)),
        (
            "horizontal line",
            of(&|x, y| f64::from(u8::from(y == height / 2 && (2..34).contains(&x)))),
        ),
        (
            "vertical line",
            of(&|x, y| f64::from(u8::from(x == 0 && (2..34).contains(&y)))),
        ),
        ("diagonal", of(&|x, y| f64::from(u8::from(x == y)))),
        (
            "opposite corners",
            of(&|x, y| f64::from(u8::from(x + y < 8 || x + y > width + height - 10))),
        ),
    ]
}

#[test]
fn gradients_are_finite_and_bounded() {
    let mut largest = 0.0_f64;
    for (name, mask) in hostile_masks(SIZE, SIZE) {
        for k in 0..4 {
            let mut grad = [0.0; 4];
            grad[k] = 1.0;
            let steepest = feature_gradient(&mask, SIZE, grad)
                .iter()
                .fold(0.0_f64, |max, g| {
                    assert!(g.is_finite(), "{} of {name}", ShapeFeatures::NAMES[k]);
                    max.max(g.abs())
                });
            assert!(
                steepest <= 1e3,
                "{} of {name}: {steepest}",
                ShapeFeatures::NAMES[k]
            );
            largest = largest.max(steepest);
        }
    }
    // The roundness of a line one pixel wide is steep: the bound is not vacuous.
    assert!(largest > 100.0, "{largest}");
}

#[test]
fn gradients_of_near_degenerate_masks() {
    let mut differentiated = 0;
    for (width, height) in [(36, 10), (9, 36)] {
        for (name, mask) in hostile_masks(width, height) {
            let area = mask.iter().sum::<f64>();
            // The gate is a jump: a line of 32 pixels stands on it.
            let mask: Vec<f64> = match area {
                32.0 => mask.iter().map(|m| 0.9 * m + 0.05).collect(),
                _ => mask,
            };
            if mask.iter().sum::<f64>() > 32.1 {
                assert_feature_gradients(&mask, width);
                differentiated += 1;
            } else {
                assert_eq!(MaskSums::of(&mask, width).features(), None, "{name}");
            }
        }
    }
    assert_eq!(differentiated, 14);
}

#[test]
fn below_the_gate_everything_is_zero() {
    for area in [0, 1, 31] {
        let mask: Vec<f32> = (0..64 * 64)
            .map(|i| f32::from(u8::from(i < area)))
            .collect();
        let sums = MaskSums::of(&mask, 64);
        assert_eq!(sums.features(), None);
        assert_eq!(sums.confidence(), 0.0);
        let gradient = sums.features_backward(&[1.0, -2.0, 3.0, 4.0].into());
        assert_eq!(gradient, MaskSums::default());
    }
}

/// Single precision agrees with double for small lesions wherever they lie.
#[test]
fn f32_features_agree_with_f64() {
    for radius in [5.0, 7.3, 20.0] {
        for (column, row) in [
            (5.0, 5.0),
            (127.5, 127.5),
            (250.0, 3.0),
            (249.6, 250.3),
            (1.0, 128.0),
        ] {
            // The same soft-edged logits in both precisions.
            let logits: Vec<f32> = (0..SIZE * SIZE)
                .map(|i| ((i % SIZE) as f64 - column).hypot((i / SIZE) as f64 - row))
                .map(|r| (3.0 * (radius - r)).clamp(-60.0, 60.0) as f32)
                .collect();
            let single: Vec<f32> = logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
            let double: Vec<f64> = logits
                .iter()
                .map(|&z| 1.0 / (1.0 + (-f64::from(z)).exp()))
                .collect();
            let single = MaskSums::of(&single, SIZE)
                .features()
                .expect("measurable")
                .to_array();
            let double = MaskSums::of(&double, SIZE)
                .features()
                .expect("measurable")
                .to_array();
            for k in 0..4 {
                let difference = (single[k] - double[k]).abs();
                assert!(
                    difference <= 1e-4,
                    "{} at {column},{row}: {difference}",
                    ShapeFeatures::NAMES[k]
                );
            }
        }
    }
}

/// A small set of lesions on which malignancy follows margin and orientation.
fn lesions() -> (Vec<ShapeFeatures>, Vec<bool>) {
    (0..120)
        .map(|i| {
            let wave = |k: f64| (i as f64 * k).sin();
            let f = [
                0.2 + 0.1 * wave(1.7),
                -0.3 + 0.3 * wave(2.9),
                0.05 * wave(0.7),
                0.85 + 0.1 * wave(5.3),
            ];
            let score = 20.0 * f[2] + f[1] - 4.0 * f[0] + 1.5 * wave(11.0) + 0.8;
            (ShapeFeatures::from(f), score > 0.0)
        })
        .unzip()
}

/// The minimum is recognised by its first-order conditions: zero slope in free coordinates, slope
/// into the wall for weights held at zero.
#[test]
fn the_fit_satisfies_the_optimality_conditions() {
    let (rows, labels) = lesions();
    for free_sign in [false, true] {
        let options = FitOptions {
            free_sign,
            ..FitOptions::default()
        };
        let prior = Prior::fit(&rows, &labels, options).expect("both classes");
        let (mut by_weight, mut by_bias) = (prior.weights, 0.0);
        for (row, &y) in rows.iter().zip(&labels) {
            let residual = prior.phi(row) - f64::from(u8::from(y));
            let f = row.to_array();
            for k in 0..4 {
                by_weight[k] += residual * (f[k] - prior.mean[k]) / prior.sd[k];
            }
            by_bias += residual;
        }
        assert!(by_bias.abs() < 1e-8, "{by_bias}");
        for (weight, slope) in prior.weights.iter().zip(by_weight) {
            if *weight == 0.0 {
                assert!(!free_sign && slope > 0.0);
            } else {
                assert!(free_sign || *weight > 0.0);
                assert!(slope.abs() < 1e-8, "{slope}");
            }
        }
        // Irregularity counts against malignancy in this set, so the constraint is active.
        assert_eq!(prior.weights[0] < 0.0, free_sign);
        assert_eq!(prior.weights[0] == 0.0, !free_sign);
    }
    let equal = FitOptions {
        start: Start::Equal,
        ..FitOptions::default()
    };
    let weights = Prior::fit(&rows, &labels, equal)
        .expect("both classes")
        .weights;
    assert!(weights[0] > 0.0 && weights.iter().all(|&w| w == weights[0]));
}

#[test]
fn a_feature_left_out_counts_in_nothing() {
    let (mut rows, _) = lesions();
    // Malignant by what is not left out.
    let score = |f: &ShapeFeatures| 4.0 * f.irregularity + f.orientation + 2.0 * f.roundness;
    let labels: Vec<bool> = rows.iter().map(|f| score(f) > 2.2).collect();
    let options = |start| FitOptions {
        start,
        left_out: [false, false, true, false],
        ..FitOptions::default()
    };
    for start in [Start::Fitted, Start::Equal] {
        let prior = Prior::fit(&rows, &labels, options(start)).expect("both classes");
        assert_eq!(prior.weights[2], 0.0);
        assert!([0, 1, 3].iter().all(|&k| prior.weights[k] > 0.0));
        let (features, weights, bias) = prior.backward(&rows[3], 2.0);
        assert_eq!((features.margin, weights[2]), (0.0, 0.0));
        assert!(weights[0] != 0.0 && weights[1] != 0.0 && bias != 0.0);

        // Not even a weight that something else put there.
        let mut weighted = prior;
        weighted.weights[2] = 3.0;
        assert_eq!(weighted.phi(&rows[3]), prior.phi(&rows[3]));
    }
    // What is left out may be constant, and its values do not matter.
    let before = Prior::fit(&rows, &labels, options(Start::Fitted)).expect("both classes");
    for row in &mut rows {
        row.margin = 0.25;
    }
    let after = Prior::fit(&rows, &labels, options(Start::Fitted)).expect("both classes");
    assert_eq!((before.weights, before.bias), (after.weights, after.bias));
}

#[test]
fn the_fit_refuses_what_it_cannot_fit() {
    let (mut rows, labels) = lesions();
    let fit = |rows: &[ShapeFeatures], labels: &[bool]| {
        Prior::fit(rows, labels, FitOptions::default())
            .expect_err("refused")
            .to_string()
    };
    assert!(fit(&rows, &labels[1..]).contains("one label for each of 120 rows, found 119"));
    assert!(fit(&rows, &[true; 120]).contains("found 120 malignant of 120"));
    for row in &mut rows {
        row.margin = 0.25;
    }
    assert!(fit(&rows, &labels).contains("margin"));
}

#[test]
fn gradients_of_the_prior() {
    let (rows, labels) = lesions();
    let prior = Prior::fit(
        &rows,
        &labels,
        FitOptions {
            free_sign: true,
            ..FitOptions::default()
        },
    )
    .expect("fits");
    let (features, weights, bias) = prior.backward(&rows[3], 2.0);
    assert_gradient(&rows[3].to_array(), &features.to_array(), STEP, |f| {
        2.0 * prior.phi(&ShapeFeatures::from([f[0], f[1], f[2], f[3]]))
    });
    assert_gradient(&prior.weights, &weights, STEP, |w| {
        2.0 * Prior {
            weights: [w[0], w[1], w[2], w[3]],
            ..prior
        }
        .phi(&rows[3])
    });
    assert_gradient(&[prior.bias], &[bias], STEP, |b| {
        2.0 * Prior {
            bias: b[0],
            ..prior
        }
        .phi(&rows[3])
    });
}

/// Cross-entropy, Dice loss, moments and perimeter of logits, by the mask head.
fn fused(tape: &mut Tape, inputs: &[Var], sharpness: f64) -> echograd::Result<Vec<Var>> {
    let mut outputs = tape.push_all(MaskHead { sharpness }, inputs)?;
    outputs.remove(2);
    Ok(outputs)
}

/// The same by the operations that the mask head stands for.
fn composed(tape: &mut Tape, inputs: &[Var], sharpness: f64) -> echograd::Result<Vec<Var>> {
    let plain = tape.push(Sigmoid, &inputs[..1])?;
    let sharp = tape.push(Scale { factor: sharpness }, &inputs[..1])?;
    let sharp = tape.push(Sigmoid, &[sharp])?;
    Ok(vec![
        tape.push(BceWithLogits, inputs)?,
        tape.push(SoftDice, &[plain, inputs[1]])?,
        tape.push(Moments, &[sharp])?,
        tape.push(Perimeter, &[sharp])?,
    ])
}

type Record = fn(&mut Tape, &[Var], f64) -> echograd::Result<Vec<Var>>;

/// Values, and the gradient of a fixed combination of them with respect to the logits.
fn head<T: Element>(
    record: Record,
    sharpness: f64,
    shape: Shape,
    logits: &[f64],
    truth: &[f64],
) -> (Vec<Vec<T>>, Vec<T>) {
    let mut tape = Tape::new();
    let inputs = [tape.input("logits", shape), tape.input("truth", shape)];
    let outputs = record(&mut tape, &inputs, sharpness).expect("shapes fit");
    let seeds: Vec<(Var, Var)> = outputs
        .iter()
        .map(|&y| (y, tape.input("seed", tape.shape(y))))
        .collect();
    let gradient = tape
        .backward_from(&seeds, &inputs[..1])
        .expect("differentiable")[0]
        .unwrap();
    outputs
        .iter()
        .chain([&gradient])
        .for_each(|&v| tape.keep(v));
    let plan = Plan::new(&tape, Default::default()).expect("small");
    let mut session = Session::<T>::new(plan).expect("small");
    let cast = |x: &[f64]| x.iter().map(|&x| T::of(x)).collect::<Vec<_>>();
    session.write(inputs[0], &cast(logits));
    session.write(inputs[1], &cast(truth));
    for (k, &(_, seed)) in seeds.iter().enumerate() {
        for (i, s) in session.values_mut(seed).iter_mut().enumerate() {
            *s = T::of([0.7, -0.9, 1e-2, 0.3][k] * (1.0 + (i % 5) as f64));
        }
    }
    session.run();
    let values = outputs.iter().map(|&y| session.read(y).to_vec()).collect();
    (values, session.read(gradient).to_vec())
}

/// Logits of a few blobs with noise, saturated here and there.
fn blobs(shape: Shape) -> (Vec<f64>, Vec<f64>) {
    let noise = noise(shape.w, shape.n * shape.h);
    (0..shape.len())
        .map(|i| {
            let (x, y) = ((i % shape.w) as f64, (i / shape.w % shape.h) as f64);
            let wave = (x * 0.31).sin() * (y * 0.17).cos();
            let z = 6.0 * wave - 1.0 + 2.0 * noise[i];
            let z = if noise[i] > 0.97 { 20.0 * z } else { z };
            (
                z,
                if wave + 0.2 * noise[i] > 0.3 {
                    1.0
                } else {
                    0.0
                },
            )
        })
        .unzip()
}

#[test]
fn the_mask_head_is_its_composition() {
    let shapes = [
        Shape::new(2, 1, 1, 1),
        Shape::new(1, 3, 257, 1),
        Shape::new(3, 17, 16, 1),
        Shape::new(2, BAND, 31, 1),
        Shape::new(2, 2 * BAND + 1, 40, 1),
        Shape::new(1, 5, 2100, 1),
    ];
    for shape in shapes {
        let (logits, truth) = blobs(shape);
        for sharpness in [3.0, 1.7] {
            let (values, gradient) = head::<f64>(fused, sharpness, shape, &logits, &truth);
            let (oracle, expected) = head::<f64>(composed, sharpness, shape, &logits, &truth);
            for (k, (found, expected)) in values.iter().zip(&oracle).enumerate() {
                let largest = expected.iter().fold(1.0_f64, |max, x| max.max(x.abs()));
                for (found, expected) in found.iter().zip(expected) {
                    let close = (found - expected).abs() <= 1e-12 * largest;
                    assert!(close, "output {k} of {shape}: {found}, expected {expected}");
                }
            }
            let largest = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
            for (i, (found, expected)) in gradient.iter().zip(&expected).enumerate() {
                let close = (found - expected).abs() <= 1e-12 * largest;
                assert!(
                    close,
                    "gradient {i} of {shape}: {found}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn the_mask_head_gives_the_same_bits_at_any_number_of_threads() {
    let shape = Shape::new(3, 2 * BAND + 7, 53, 1);
    let (logits, truth) = blobs(shape);
    let bits = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("threads");
        pool.install(|| head::<f32>(fused, 3.0, shape, &logits, &truth))
    };
    let one = bits(1);
    for threads in [2, 3, 8] {
        assert_eq!(bits(threads), one, "{threads} threads");
    }
}

/// Features, whether measurable, and the gradient of one feature (or of their sum, `None`) with
/// respect to the logits, by the mask head.
fn features_of_logits<T: Element>(
    size: usize,
    logits: &[f64],
    feature: Option<usize>,
) -> ([f64; 4], bool, Vec<T>) {
    let mut tape = Tape::new();
    let shape = Shape::new(1, size, size, 1);
    let inputs = [tape.input("logits", shape), tape.input("truth", shape)];
    let head = tape
        .push_all(MaskHead::default(), &inputs)
        .expect("shapes fit");
    let outputs = tape
        .push_all(shape_features::ShapeFeatures, &head[3..])
        .expect("shapes fit");
    let seed = tape.input("seed", Shape::per_image(1, 4));
    let gradient = tape
        .backward_from(&[(outputs[0], seed)], &inputs[..1])
        .expect("differentiable");
    let gradient = gradient[0].expect("depends on the logits");
    [outputs[0], outputs[1], gradient]
        .into_iter()
        .for_each(|v| tape.keep(v));
    let plan = Plan::new(&tape, Default::default()).expect("small");
    let mut session = Session::<T>::new(plan).expect("small");
    session.write(
        inputs[0],
        &logits.iter().map(|&z| T::of(z)).collect::<Vec<_>>(),
    );
    for (k, seed) in session.values_mut(seed).iter_mut().enumerate() {
        *seed = if feature.is_none_or(|feature| feature == k) {
            T::one()
        } else {
            T::zero()
        };
    }
    session.run();
    let features = session.read(outputs[0]);
    let features = std::array::from_fn(|k| features[k].wide());
    let measurable = session.read(outputs[1])[0] == T::one();
    (features, measurable, session.read(gradient).to_vec())
}

/// The mask head in single precision against double, on the same logits, for small lesions anywhere.
#[test]
fn f32_features_of_logits_agree_with_f64() {
    for radius in [5.0, 11.5, 60.0] {
        for (column, row) in [
            (5.0, 5.0),
            (127.5, 127.5),
            (250.0, 3.0),
            (249.6, 250.3),
            (1.0, 63.5),
        ] {
            for background in [-60.0, -4.0] {
                let logits: Vec<f64> = (0..SIZE * SIZE)
                    .map(|i| ((i % SIZE) as f64 - column).hypot((i / SIZE) as f64 - row))
                    .map(|r| f64::from((2.0 * (radius - r)).clamp(background, 60.0) as f32))
                    .collect();
                let (single, _, by_single) = features_of_logits::<f32>(SIZE, &logits, None);
                let (double, measurable, by_double) =
                    features_of_logits::<f64>(SIZE, &logits, None);
                assert!(measurable);
                for k in 0..4 {
                    let difference = (single[k] - double[k]).abs();
                    assert!(
                        difference <= 1e-4,
                        "{} of radius {radius} at {column},{row}: {difference}",
                        ShapeFeatures::NAMES[k]
                    );
                }
                let largest = by_double.iter().fold(0.0_f64, |max, g| max.max(g.abs()));
                for (single, double) in by_single.iter().zip(&by_double) {
                    assert!(
                        (single.wide() - double).abs() <= 1e-3 * largest,
                        "{single} {double}"
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_of_hostile_logits_are_finite_and_bounded() {
    let half = (SIZE as f64 - 1.0) / 2.0;
    let of = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
        (0..SIZE * SIZE)
            .map(|i| f((i % SIZE) as f64 - half, (i / SIZE) as f64 - half))
            .collect()
    };
    let noise = noise(SIZE, SIZE);
    let cases = [
        ("empty", of(&|_, _| -60.0), false),
        ("full", of(&|_, _| 60.0), true),
        ("undecided", of(&|_, _| 0.0), true),
        ("1e-30", of(&|_, _| 1e-30), true),
        ("haze of 1e-30", of(&|_, _| -23.0), false),
        ("infinitesimal steps", of(&|x, _| x * 1e-30), true),
        (
            "one pixel",
            of(&|x, y| if x.hypot(y) < 1.0 { 60.0 } else { -60.0 }),
            false,
        ),
        (
            "line",
            of(&|x, y| {
                if x.abs() < 20.0 && y == 0.5 {
                    60.0
                } else {
                    -60.0
                }
            }),
            true,
        ),
        (
            "soft line",
            of(&|x, y| {
                if x.abs() < 20.0 && y == 0.5 {
                    1.0
                } else {
                    -60.0
                }
            }),
            true,
        ),
        ("noise", noise.iter().map(|m| 8.0 * m - 4.0).collect(), true),
        (
            "saturated noise",
            noise.iter().map(|m| 120.0 * m.round() - 60.0).collect(),
            true,
        ),
        (
            "huge",
            noise.iter().map(|m| 1e30 * (m - 0.5)).collect(),
            true,
        ),
    ];
    for (name, logits, expected) in cases {
        for feature in 0..4 {
            let (features, measurable, gradient) =
                features_of_logits::<f32>(SIZE, &logits, Some(feature));
            assert_eq!(measurable, expected, "{name}");
            assert!(
                features.iter().all(|f| (-1.0..=1.0 + 1e-6).contains(f)),
                "{name}: {features:?}"
            );
            let bounded = gradient.iter().all(|g| g.abs() <= 1e3);
            assert!(bounded, "{} of {name}", ShapeFeatures::NAMES[feature]);
            if !expected {
                assert!(gradient.iter().all(|&g| g == 0.0), "{name}: below the gate");
            }
        }
    }
}

#[test]
fn a_nan_among_the_logits_reaches_losses_and_features() {
    let shape = Shape::new(1, 9, 9, 1);
    let (mut logits, truth) = blobs(shape);
    logits[40] = f64::NAN;
    let (values, gradient) = head::<f32>(fused, 3.0, shape, &logits, &truth);
    for (k, value) in values.iter().enumerate() {
        assert!(value[0].is_nan(), "output {k}");
    }
    assert!(gradient[40].is_nan());
}

/// Features of the letterboxed ground-truth masks of a published data set, with their file names
/// and whether the lesion is malignant.
fn measured(name: &str, folder: &str) -> Vec<(String, ShapeFeatures, bool)> {
    let root = std::env::var("ECHOGRAD_DATA").expect("ECHOGRAD_DATA names the data sets' folder");
    let source = data::open(&format!("{name}:{root}/{folder}")).expect("published data");
    let lesions = source
        .cases()
        .iter()
        .enumerate()
        .filter(|(_, case)| case.label.is_lesion());
    lesions
        .map(|(i, case)| {
            let mask = data::soft_mask(&*source, i, SIZE).expect("a mask");
            let features = MaskSums::of(&mask, SIZE).features().expect("measurable");
            (case.image.clone(), features, case.label == Label::Malignant)
        })
        .collect()
}

fn auc(scores: impl IntoIterator<Item = f64>, positive: &[bool]) -> f64 {
    let cases: Vec<_> = scores.into_iter().zip(positive.iter().copied()).collect();
    Auc::of(&cases).expect("both classes").value
}

fn assert_aucs(rows: &[ShapeFeatures], positive: &[bool], expected: [f64; 4]) {
    for (k, expected) in expected.into_iter().enumerate() {
        let found = auc(rows.iter().map(|row| row.to_array()[k]), positive);
        let close = (found - expected).abs() <= 0.01;
        assert!(
            close,
            "{}: {found}, expected {expected}",
            ShapeFeatures::NAMES[k]
        );
    }
}

/// The radiologists' words for the lesions of BrEaST: whether the shape is irregular, and whether
/// the margin is not circumscribed, by image.
fn lexicon() -> HashMap<String, (bool, bool)> {
    let root = std::env::var("ECHOGRAD_DATA").expect("ECHOGRAD_DATA names the data sets' folder");
    let name = "BrEaST/BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx";
    let mut book: Xlsx<_> =
        calamine::open_workbook(Path::new(&root).join(name)).expect("a workbook");
    let sheet = book
        .worksheet_range_at(0)
        .expect("a sheet")
        .expect("a readable sheet");
    let mut rows = sheet
        .rows()
        .map(|row| row.iter().map(ToString::to_string).collect::<Vec<_>>());
    let header = rows.next().expect("a header");
    let column = |name: &str| {
        header
            .iter()
            .position(|cell| cell == name)
            .expect("a column")
    };
    let [image, shape, margin] = ["Image_filename", "Shape", "Margin"].map(column);
    rows.map(|row| {
        let words = (row[shape] == "irregular", row[margin] != "circumscribed");
        (row[image].clone(), words)
    })
    .collect()
}

/// The AUC of each feature alone, and the prior's fit, as measured when the features were chosen.
#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn features_of_real_masks_tell_malignant_from_benign() {
    let lexicon = lexicon();
    let breast = measured("breast", "BrEaST");
    let rows: Vec<_> = breast.iter().map(|row| row.1).collect();
    let malignant: Vec<_> = breast.iter().map(|row| row.2).collect();
    let (irregular, not_circumscribed): (Vec<_>, Vec<_>) =
        breast.iter().map(|row| lexicon[&row.0]).unzip();
    assert_eq!(rows.len(), 252);
    assert_aucs(&rows, &malignant, [0.673, 0.687, 0.828, 0.658]);
    assert_aucs(&rows, &irregular, [0.760, 0.697, 0.910, 0.611]);
    assert_aucs(&rows, &not_circumscribed, [0.692, 0.730, 0.875, 0.669]);

    let busi = measured("busi", "BUSI/Dataset_BUSI_with_GT");
    let busi_rows: Vec<_> = busi.iter().map(|row| row.1).collect();
    let busi_malignant: Vec<_> = busi.iter().map(|row| row.2).collect();
    assert_eq!(busi_rows.len(), 647);
    assert_aucs(&busi_rows, &busi_malignant, [0.811, 0.711, 0.992, 0.652]);

    let fit = |options| Prior::fit(&rows, &malignant, options).expect("both classes");
    let aucs = |prior: &Prior| {
        let phi =
            |rows: &[ShapeFeatures]| rows.iter().map(|row| prior.phi(row)).collect::<Vec<_>>();
        [
            auc(phi(&rows), &malignant),
            auc(phi(&busi_rows), &busi_malignant),
        ]
    };
    let close = |found: &[f64], expected: &[f64], tolerance: f64| {
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= tolerance,
                "{found}, expected {expected}"
            );
        }
    };
    let prior = fit(FitOptions::default());
    close(&prior.mean, &[0.1814, -0.3150, 0.0425, 0.8628], 1e-3);
    close(&prior.sd, &[0.1141, 0.3031, 0.0454, 0.1245], 1e-3);
    close(&prior.weights, &[0.0, 0.233, 1.265, 0.419], 0.01);
    close(&[prior.bias], &[-0.486], 0.01);
    close(&aucs(&prior), &[0.827, 0.957], 0.005);

    let free = fit(FitOptions {
        free_sign: true,
        ..FitOptions::default()
    });
    close(&free.weights[..1], &[-0.63], 0.02);
    close(&aucs(&free), &aucs(&prior), 0.005);
    let equal = fit(FitOptions {
        start: Start::Equal,
        ..FitOptions::default()
    });
    close(&aucs(&equal), &[0.812, 0.941], 0.005);
}
