//! All three functions, in both element types and on every instruction set, against loops over the definition.

use proptest::prelude::*;

use super::*;
use crate::tensor::Tensor;

fn geometry() -> impl Strategy<Value = Geometry> {
    let channels = || prop_oneof![4 => 1..12usize, 1 => Just(16), 1 => 30..80usize];
    let axis = || (1..=5usize, 1..=3usize, 1..24usize);
    (1..=3usize, channels(), channels(), axis(), axis()).prop_flat_map(|(n, c, out, v, h)| {
        (0..=v.0, 0..=h.0).prop_map(move |(ph, pw)| {
            let extent = |(kernel, _, extra): (usize, usize, usize), padding: usize| {
                // From the smallest image that the kernel fits on.
                (kernel.saturating_sub(2 * padding)).max(1) + extra - 1
            };
            Geometry::new(
                Shape::new(n, extent(v, ph), extent(h, pw), c),
                Shape::new(out, v.0, h.0, c),
                [v.1, h.1],
                [ph, pw],
            )
            .unwrap()
        })
    })
}

/// Calls `f` with the element numbers of every product in the definition: (x, w, y).
fn for_each_product(g: &Geometry, mut f: impl FnMut(usize, usize, usize)) {
    let (x, w, y) = (g.x, g.w, g.output());
    let at = |s: Shape, n: usize, i: usize, j: usize, c: usize| ((n * s.h + i) * s.w + j) * s.c + c;
    for n in 0..y.n {
        for (i, j) in (0..y.h).flat_map(|i| (0..y.w).map(move |j| (i, j))) {
            for (r, s) in (0..w.h).flat_map(|r| (0..w.w).map(move |s| (r, s))) {
                let row = (i * g.stride[0] + r).wrapping_sub(g.padding[0]);
                let column = (j * g.stride[1] + s).wrapping_sub(g.padding[1]);
                if row < x.h && column < x.w {
                    for o in 0..w.n {
                        for c in 0..w.c {
                            f(
                                at(x, n, row, column, c),
                                at(w, o, r, s, c),
                                at(y, n, i, j, o),
                            );
                        }
                    }
                }
            }
        }
    }
}

fn values<T: Real>(shape: Shape, seed: usize) -> Tensor<T> {
    // Exact in f32, so that both element types see one problem.
    Tensor::from_fn(shape, |i| {
        let bits = (i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
        T::of(bits as f64 / 32768.0 - 1.0)
    })
}

/// A result, and for each element the sum of its terms' magnitudes.
struct Reference {
    sums: Vec<f64>,
    magnitudes: Vec<f64>,
    terms: usize,
}

impl Reference {
    fn new(len: usize, terms: usize) -> Self {
        Self {
            sums: vec![0.0; len],
            magnitudes: vec![0.0; len],
            terms,
        }
    }

    fn add(&mut self, i: usize, term: f64) {
        self.sums[i] += term;
        self.magnitudes[i] += term.abs();
    }
}

fn reference(g: &Geometry) -> [Reference; 3] {
    let (x, w, dy) = (
        values::<f64>(g.x, 1),
        values::<f64>(g.w, 2),
        values::<f64>(g.output(), 3),
    );
    let (x, w, dy) = (x.data(), w.data(), dy.data());
    let taps = g.w.h * g.w.w;
    let mut results = [
        Reference::new(dy.len(), taps * g.w.c),
        Reference::new(x.len(), taps * g.w.n),
        Reference::new(w.len(), g.output().rows()),
    ];
    for_each_product(g, |ix, iw, iy| {
        results[0].add(iy, x[ix] * w[iw]);
        results[1].add(ix, dy[iy] * w[iw]);
        results[2].add(iw, dy[iy] * x[ix]);
    });
    results
}

/// Output, mean and variance.
fn with_statistics<T: Real>(level: Level, g: &Geometry) -> [Vec<T>; 3] {
    let (x, w) = (values::<T>(g.x, 1), values::<T>(g.w, 2));
    let fresh = |len: usize| vec![T::nan(); len];
    let [mut y, mut mean, mut var] = [g.output().len(), g.w.n, g.w.n].map(fresh);
    let statistics = [&mut mean[..], &mut var[..]];
    let mut scratch = fresh(g.statistics_scratch());
    forward_with_statistics(
        level,
        g,
        x.data(),
        w.data(),
        &mut y,
        statistics,
        &mut scratch,
    );
    [y, mean, var]
}

fn ours<T: Real>(level: Level, g: &Geometry) -> [Vec<T>; 3] {
    let (x, w, dy) = (
        values::<T>(g.x, 1),
        values::<T>(g.w, 2),
        values::<T>(g.output(), 3),
    );
    // Whatever is not written shows.
    let fresh = |len: usize| vec![T::nan(); len];
    let (mut y, mut dx, mut dw) = (
        fresh(dy.data().len()),
        fresh(x.data().len()),
        fresh(w.data().len()),
    );
    let mut scratch = fresh(g.forward_scratch());
    forward(level, g, x.data(), w.data(), &mut y, &mut scratch);
    let [same, mean, var] = with_statistics(level, g);
    assert!(same == y, "{g:?}: statistics change the output");
    statistics::tests::check(&y, [&mean, &var]).unwrap_or_else(|e| panic!("{g:?}: {e}"));
    let mut scratch = fresh(g.input_gradient_scratch());
    input_gradient(level, g, w.data(), dy.data(), &mut dx, &mut scratch);
    let mut scratch = fresh(g.weight_gradient_scratch());
    weight_gradient(level, g, x.data(), dy.data(), &mut dw, &mut scratch);
    [y, dx, dw]
}

fn check_against_reference<T: Real>(g: &Geometry) -> Result<(), TestCaseError> {
    let names = ["forward", "input gradient", "weight gradient"];
    let want = reference(g);
    for level in Level::available() {
        for ((name, want), got) in names.iter().zip(&want).zip(ours::<T>(level, g)) {
            // Rounding errors of either sum accumulate like a random walk.
            let steps = T::epsilon().wide() * (2.0 + (want.terms as f64).sqrt());
            for (i, got) in got.iter().enumerate() {
                let (sum, tolerance) = (want.sums[i], steps * want.magnitudes[i]);
                prop_assert!(
                    (got.wide() - sum).abs() <= tolerance,
                    "{name} with {level:?}, element {i}: {got} for {sum}"
                );
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn matches_the_definition_in_f32(g in geometry()) {
        check_against_reference::<f32>(&g)?;
    }

    #[test]
    fn matches_the_definition_in_f64(g in geometry()) {
        check_against_reference::<f64>(&g)?;
    }
}

/// `a(y + b)` of a convolution's `y`, in f64.
fn finished<T: Real>(y: &[T], b: &[T], activation: Activation) -> Vec<f64> {
    let of = |(i, y): (usize, &T)| {
        let u = y.wide() + b[i % b.len()].wide();
        match activation {
            Activation::Identity => u,
            Activation::Relu => u.max(0.0),
            Activation::Silu => u / (1.0 + (-u).exp()),
        }
    };
    y.iter().enumerate().map(of).collect()
}

fn check_epilogue<T: Real>(g: &Geometry) -> Result<(), TestCaseError> {
    let (x, w) = (values::<T>(g.x, 1), values::<T>(g.w, 2));
    let bias = values::<T>(Shape::per_channel(g.w.n), 4);
    for level in Level::available() {
        let fresh = |len: usize| vec![T::nan(); len];
        let run = |epilogue| {
            let (mut y, mut scratch) = (fresh(g.output().len()), fresh(g.forward_scratch()));
            let (x, w) = (x.data(), w.data());
            geometry::correlate(level, g, x, w, epilogue, &mut y, &mut scratch);
            y
        };
        let sums = run(None);
        for activation in [Activation::Identity, Activation::Relu, Activation::Silu] {
            let bias = bias.data();
            let found = run(Some(Epilogue { bias, activation }));
            let expected = finished(&sums, bias, activation);
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let error = (found.wide() - expected).abs();
                let tolerance = 8.0 * T::epsilon().wide() * (1.0 + sums[i].wide().abs());
                prop_assert!(
                    error <= tolerance,
                    "{level:?}, {activation:?}, {i}: {found} for {expected}"
                );
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bias_and_activation_are_those_of_the_sums(g in geometry()) {
        check_epilogue::<f32>(&g)?;
        check_epilogue::<f64>(&g)?;
    }
}

/// Sums that are made in several passes are finished once.
#[test]
fn bias_and_activation_follow_the_last_pass() {
    let shapes = [
        (Shape::new(1, 8, 8, 300), Shape::new(130, 3, 3, 300)),
        (Shape::new(2, 5, 7, 260), Shape::new(70, 1, 1, 260)),
    ];
    for (x, w) in shapes {
        let g = Geometry::new(x, w, [1, 1], [w.h / 2; 2]).unwrap();
        check_epilogue::<f32>(&g).unwrap();
        check_epilogue::<f64>(&g).unwrap();
    }
}

#[test]
fn a_bias_that_does_not_fit_is_refused() {
    let op = Conv2dBias {
        conv: Conv2d::new(1, 1),
        activation: Activation::Relu,
    };
    let (x, w) = (Shape::new(1, 4, 4, 3), Shape::new(2, 3, 3, 3));
    assert_eq!(
        op.outputs(&[x, w, Shape::per_channel(2)]).unwrap(),
        [Shape::new(1, 4, 4, 2)]
    );
    let error = op.outputs(&[x, w, Shape::per_channel(3)]).unwrap_err();
    assert!(
        error.to_string().starts_with("conv2d_bias: expected"),
        "{error}"
    );
}

/// Layers large enough to be cut along every axis: several blocks, ranges of channels, and chunks.
#[test]
fn large_layers_match_the_definition() {
    for (x, w, stride, padding) in [
        (
            Shape::new(1, 9, 300, 3),
            Shape::new(5, 3, 3, 3),
            [1, 1],
            [1, 1],
        ),
        (
            Shape::new(2, 40, 40, 70),
            Shape::new(66, 3, 3, 70),
            [1, 1],
            [1, 1],
        ),
        (
            Shape::new(1, 8, 8, 150),
            Shape::new(130, 3, 3, 150),
            [1, 1],
            [1, 1],
        ),
        (
            Shape::new(1, 33, 35, 70),
            Shape::new(140, 3, 2, 70),
            [2, 3],
            [1, 2],
        ),
        (
            Shape::new(2, 30, 40, 36),
            Shape::new(1, 1, 1, 36),
            [1, 1],
            [0, 0],
        ),
        (
            Shape::new(3, 1, 1, 500),
            Shape::new(2, 1, 1, 500),
            [1, 1],
            [0, 0],
        ),
    ] {
        let g = Geometry::new(x, w, stride, padding).unwrap();
        check_against_reference::<f32>(&g).unwrap();
        check_against_reference::<f64>(&g).unwrap();
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    for (x, w, stride) in [
        (Shape::new(2, 40, 50, 20), Shape::new(24, 3, 3, 20), [1, 1]),
        (
            Shape::new(1, 16, 16, 130),
            Shape::new(100, 3, 3, 130),
            [1, 1],
        ),
        (Shape::new(2, 31, 33, 9), Shape::new(17, 5, 3, 9), [2, 3]),
    ] {
        let g = Geometry::new(x, w, stride, [1, 1]).unwrap();
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let level = Level::current();
            pool.install(|| (ours::<f32>(level, &g), with_statistics::<f32>(level, &g)))
        };
        let one = on(1);
        for threads in [2, 3] {
            assert!(on(threads) == one, "{g:?} on {threads} threads");
        }
    }
}

#[test]
fn impossible_geometries_are_refused() {
    let x = Shape::new(1, 4, 4, 3);
    let refused = |w: Shape, stride, padding| Geometry::new(x, w, stride, padding).is_err();
    assert!(refused(Shape::new(2, 3, 3, 4), [1, 1], [0, 0]));
    assert!(refused(Shape::new(2, 5, 3, 3), [1, 1], [0, 0]));
    assert!(refused(Shape::new(2, 3, 3, 3), [0, 1], [0, 0]));
    assert!(refused(Shape::new(0, 3, 3, 3), [1, 1], [0, 0]));
    assert!(!refused(Shape::new(2, 5, 3, 3), [1, 1], [1, 0]));
}
