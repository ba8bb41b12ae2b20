//! Every operation of every available instruction set against scalar arithmetic.

use num_traits::{Float, One};

use super::*;

fn values<T: Real>() -> Vec<T> {
    let special = [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -7.25, 1e-30, 1e30, 1e-3];
    (0..4 * MAX_LANES)
        .map(|i| {
            let x = special.get(i).copied();
            T::of(x.unwrap_or_else(|| ((i * 37 + 11) % 101) as f64 * 0.37 - 18.0))
        })
        .collect()
}

/// Compares lane operations with their scalar meaning, bit for bit, on shifted pairs of values.
struct Exact<'a, T>(&'a [T]);

impl<T: Real> Kernel<T> for Exact<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let fused = L::one_rounding();
        for start in 0..self.0.len() - L::N - 2 {
            let at = |shift: usize| &self.0[start + shift..];
            let [a, b, c] = [0, 1, 2].map(|shift| L::load(at(shift)));
            let check = |name: &str, got: L, want: &dyn Fn(T, T, T) -> T| {
                let mut lanes = [T::zero(); MAX_LANES];
                got.store(&mut lanes);
                for (i, &got) in lanes[..L::N].iter().enumerate() {
                    let want = want(at(0)[i], at(1)[i], at(2)[i]);
                    assert!(
                        got.wide().to_bits() == want.wide().to_bits(),
                        "{name} at {start}+{i}: {got} for {want}"
                    );
                }
            };
            check("load", a, &|a, _, _| a);
            check("add", a + b, &|a, b, _| a + b);
            check("sub", a - b, &|a, b, _| a - b);
            check("mul", a * b, &|a, b, _| a * b);
            check("div", a / (b * b + L::splat(T::one())), &|a, b, _| {
                a / (b * b + T::one())
            });
            check("neg", -a, &|a, _, _| -a);
            check("abs", a.abs(), &|a, _, _| a.abs());
            check("sqrt", a.abs().sqrt(), &|a, _, _| a.abs().sqrt());
            check("min", a.min(c), &|a, _, c| if a < c { a } else { c });
            check("max", a.max(c), &|a, _, c| if a > c { a } else { c });
            check("select", L::select(a.lt(b), a, c), &|a, b, c| {
                if a < b { a } else { c }
            });
            check("mul_add", a.mul_add(b, c), &|a, b, c| {
                if fused { a.mul_add(b, c) } else { a * b + c }
            });
            check("splat", L::splat(at(0)[0]), &|_, _, _| at(0)[0]);
            check("zero", L::zero(), &|_, _, _| T::zero());
        }
    }
}

/// Whether `mul_add` rounds once.
trait OneRounding: Lanes {
    #[inline(always)]
    fn one_rounding() -> bool {
        let tiny = Self::splat(Self::Elem::epsilon());
        let one = Self::splat(Self::Elem::one());
        // (1 + ε)(1 − ε) − 1 = −ε², which two roundings lose.
        (one + tiny).mul_add(one - tiny, -one).reduce_sum() != Self::Elem::zero()
    }
}
impl<L: Lanes> OneRounding for L {}

#[test]
fn arithmetic_is_exact() {
    for level in Level::available() {
        dispatch_at(level, Exact(&values::<f32>()));
        dispatch_at(level, Exact(&values::<f64>()));
    }
}

#[test]
fn native_levels_fuse_and_portable_does_not() {
    struct Fused;
    impl<T: Real> Kernel<T> for Fused {
        type Out = bool;
        #[inline(always)]
        fn run<L: Lanes<Elem = T>>(self) -> bool {
            L::one_rounding()
        }
    }
    for level in Level::available() {
        let native = level.name() != "portable";
        assert_eq!(dispatch_at::<f32, _>(level, Fused), native, "{level:?}");
        assert_eq!(dispatch_at::<f64, _>(level, Fused), native, "{level:?}");
    }
}

/// Partial loads and stores touch exactly the elements given; sums follow the documented tree.
struct Partial<T>(std::marker::PhantomData<T>);

impl<T: Real> Kernel<T> for Partial<T> {
    type Out = ();
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) {
        let source: Vec<T> = (1..=L::N).map(|i| T::of(1.0 / i as f64)).collect();
        for n in 0..=L::N {
            let x = L::load_first(&source[..n]);
            let mut all = vec![T::of(9.0); L::N];
            x.store(&mut all);
            assert_eq!(all[..n], source[..n]);
            assert!(all[n..].iter().all(|x| *x == T::zero()));
            let mut part = vec![T::of(9.0); L::N + 1];
            L::load(&source).store_first(&mut part[..n]);
            assert_eq!(part[..n], source[..n]);
            assert!(part[n..].iter().all(|x| *x == T::of(9.0)));
        }
        fn tree<T: Real>(x: &[T]) -> T {
            let half = x.len() / 2;
            if half == 0 {
                return x[0];
            }
            let sums: Vec<T> = (0..half).map(|i| x[i] + x[i + half]).collect();
            tree(&sums)
        }
        assert_eq!(L::load(&source).reduce_sum(), tree(&source));
    }
}

#[test]
fn partial_loads_stores_and_sums() {
    for level in Level::available() {
        dispatch_at::<f32, _>(level, Partial(std::marker::PhantomData));
        dispatch_at::<f64, _>(level, Partial(std::marker::PhantomData));
    }
}

struct ExpOf<'a, T>(&'a [T]);

impl<T: Real> Kernel<T> for ExpOf<'_, T> {
    type Out = Vec<T>;
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) -> Vec<T> {
        let mut out = vec![T::zero(); self.0.len()];
        for (x, y) in self.0.chunks(L::N).zip(out.chunks_mut(L::N)) {
            L::load_first(x).exp().store_first(y);
        }
        out
    }
}

/// The logistic function and reciprocals of a slice.
struct LogisticOf<'a, T>(&'a [T]);

impl<T: Real> Kernel<T> for LogisticOf<'_, T> {
    type Out = [Vec<T>; 2];
    #[inline(always)]
    fn run<L: Lanes<Elem = T>>(self) -> [Vec<T>; 2] {
        let mut out = [0, 1].map(|_| vec![T::zero(); self.0.len()]);
        for (i, x) in self.0.chunks(L::N).enumerate() {
            let at = i * L::N..i * L::N + x.len();
            let x = L::load_first(x);
            x.logistic().store_first(&mut out[0][at.clone()]);
            x.recip().store_first(&mut out[1][at]);
        }
        out
    }
}

#[test]
fn logistic_and_reciprocal_are_accurate_and_nan_passes() {
    for level in Level::available() {
        let x: Vec<f32> = (0..200_001).map(|i| -87.0 + i as f32 * 8.7e-4).collect();
        let [logistic, reciprocal] = dispatch_at(level, LogisticOf(&x));
        for (&x, (y, z)) in x.iter().zip(logistic.into_iter().zip(reciprocal)) {
            for (name, got, want, most) in [
                ("logistic", y, 1.0 / (1.0 + f64::from(-x).exp()), 4.0),
                ("reciprocal", z, 1.0 / f64::from(x), 1.0),
            ] {
                let error = (f64::from(got) / want - 1.0).abs() / f64::from(f32::EPSILON);
                assert!(
                    x == 0.0 || error <= most,
                    "{level:?}: {name} of {x}: {error} ulp"
                );
            }
        }
        let x: Vec<f64> = (0..200_001).map(|i| -707.0 + i as f64 * 7.07e-3).collect();
        for (x, y) in x.iter().zip(&dispatch_at(level, LogisticOf(&x))[0]) {
            let error = (y * (1.0 + (-x).exp()) - 1.0).abs();
            assert!(error <= 1e-15, "{level:?}: logistic of {x}: {error}");
        }
        let edge = [f32::NEG_INFINITY, -1e30, 1e30, f32::INFINITY, f32::NAN];
        let [y, _] = dispatch_at(level, LogisticOf(&edge));
        assert!(y[0] < 2e-38 && y[1] < 2e-38, "{level:?}: {y:?}");
        assert_eq!(y[2..4], [1.0, 1.0], "{level:?}");
        assert!(y[4].is_nan());
        let y = dispatch_at(level, LogisticOf(&[f64::NEG_INFINITY, 1e30, f64::NAN]));
        assert!(y[0][0] < 1e-307 && y[0][1] == 1.0 && y[0][2].is_nan());
    }
}

#[test]
fn exp_is_accurate_over_the_whole_range() {
    for level in Level::available() {
        let x: Vec<f32> = (0..200_001).map(|i| -88.0 + i as f32 * 8.8e-4).collect();
        for (x, y) in x.iter().zip(dispatch_at(level, ExpOf(&x))) {
            let want = f64::from(*x).exp();
            // From −87.33 down results are subnormal, with an absolute spacing.
            let ulp = f64::from(f32::EPSILON) * want.max(f64::from(f32::MIN_POSITIVE));
            if want < f64::from(f32::MAX) {
                let error = (f64::from(y) - want).abs() / ulp;
                assert!(error <= 2.0, "{level:?}: exp({x}) = {y}, {error} ulp");
            }
        }
        let x: Vec<f64> = (0..200_001).map(|i| -708.0 + i as f64 * 7.08e-3).collect();
        for (x, y) in x.iter().zip(dispatch_at(level, ExpOf(&x))) {
            let error = (y / x.exp() - 1.0).abs();
            assert!(error <= 1e-15, "{level:?}: exp({x}) = {y}, off by {error}");
        }
    }
}

#[test]
fn exp_at_the_ends() {
    for level in Level::available() {
        let edge = [
            0.0,
            -0.0,
            89.0,
            1e9,
            f32::INFINITY,
            -104.0,
            -1e9,
            f32::NEG_INFINITY,
        ];
        let want = [
            1.0,
            1.0,
            f32::INFINITY,
            f32::INFINITY,
            f32::INFINITY,
            0.0,
            0.0,
            0.0,
        ];
        assert_eq!(dispatch_at(level, ExpOf(&edge)), want, "{level:?}");
        let edge = [
            0.0,
            -0.0,
            710.0,
            1e9,
            f64::INFINITY,
            -746.0,
            -1e9,
            f64::NEG_INFINITY,
        ];
        let want = want.map(f64::from);
        assert_eq!(dispatch_at(level, ExpOf(&edge)), want, "{level:?}");
        assert!(dispatch_at(level, ExpOf(&[f32::NAN]))[0].is_nan());
        assert!(dispatch_at(level, ExpOf(&[f64::NAN]))[0].is_nan());
        let subnormal = dispatch_at(level, ExpOf(&[-100.0f32, -103.0]));
        assert_eq!(subnormal[0].to_bits(), 27, "e⁻¹⁰⁰ in units of 2⁻¹⁴⁹");
        assert_eq!(subnormal[1].to_bits(), 1);
        let subnormal = dispatch_at(level, ExpOf(&[-740.0f64]))[0];
        assert!((subnormal / (-740.0f64).exp() - 1.0).abs() < 1e-2);
    }
}
