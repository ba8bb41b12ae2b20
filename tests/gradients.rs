//! Every operation of the registry: its gradient against finite differences, proof that this check
//! notices a wrong gradient, and the same bits however the work is split or planned.

use std::collections::BTreeMap;

use echograd::Result;
use echograd::device::cpu::{Element, Io};
use echograd::gradcheck::{self, Case, Differentiated, Sampler};
use echograd::ops::pointwise::Scale;
use echograd::ops::{Entry, Kernel, Op, registry};
use echograd::tape::{Options, Var};
use echograd::tensor::{Real, Shape};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64,
        // The same on every machine; `echograd gradcheck --seed` draws others.
        rng_seed: RngSeed::Fixed(0),
        failure_persistence: None,
        ..Default::default() })]
    #[test]
    fn gradients_agree_with_finite_differences(seed in any::<u64>()) {
        for entry in registry() {
            let case = (entry.case)(&mut Sampler::new(seed));
            let outcome = gradcheck::check(&case, seed).unwrap();
            prop_assert!(
                outcome.mismatch.is_none(),
                "{} ({}): {:?}", entry.name, case.description, outcome.mismatch
            );
        }
    }

    /// Operations record less where only some inputs are differentiated, or only some outputs used.
    #[test]
    fn parts_of_gradients_agree_with_the_whole(seed in any::<u64>()) {
        for entry in registry() {
            let case = (entry.case)(&mut Sampler::new(seed));
            let whole = gradcheck::differentiate(&case).unwrap();
            let gradients = run::<f64>(&case, &whole, seed, Options::default()).1;
            for input in 0..case.inputs.len() {
                let part = gradcheck::differentiate_part(&case, None, Some(input)).unwrap();
                let alone = run::<f64>(&case, &part, seed, Options::default()).1;
                prop_assert_eq!(
                    &alone[input], &gradients[input],
                    "{} ({}), {} alone", entry.name, case.description, case.inputs[input].name
                );
            }
            if whole.selected.len() > 1 {
                for output in 0..whole.selected.len() {
                    let part = gradcheck::differentiate_part(&case, Some(output), None).unwrap();
                    let outcome = gradcheck::check_gradient(&case, &part, seed).unwrap();
                    prop_assert!(
                        outcome.mismatch.is_none(),
                        "{} ({}), output {output} alone: {:?}",
                        entry.name, case.description, outcome.mismatch
                    );
                }
            }
        }
    }
}

/// Outputs, and gradients (empty where there is none).
fn run<T: Element>(
    case: &Case,
    d: &Differentiated,
    seed: u64,
    options: Options,
) -> (Vec<Vec<T>>, Vec<Vec<T>>) {
    let mut d = d.clone();
    d.outputs.iter().for_each(|&y| d.tape.keep(y));
    let mut session = gradcheck::session::<T>(case, &d, seed, options).unwrap();
    session.run();
    let outputs = d.outputs.iter().map(|&y| session.read(y).to_vec());
    let gradient = |g: &Option<Var>| g.map_or(Vec::new(), |g| session.read(g).to_vec());
    (
        outputs.collect(),
        d.gradients.iter().map(gradient).collect(),
    )
}

/// Something wrong with a recorded gradient.
#[derive(Clone, Copy)]
enum Break {
    /// The gradient of an input has the other sign.
    Sign(usize),
    /// The gradient of an input is not passed on.
    Dropped(usize),
    /// The gradient of an input is off by one element along an axis.
    Shifted(usize, usize),
    /// A gradient step sees zeros for one of its inputs.
    Term(usize, usize),
}

impl Break {
    /// All that apply to a gradient, with a name that is the same in every case of an operation.
    fn all(case: &Case, d: &Differentiated) -> Vec<(String, Break)> {
        let mut breaks = Vec::new();
        for (i, input) in case.inputs.iter().enumerate() {
            let Some(gradient) = d.gradients[i] else {
                continue;
            };
            let name = input.name;
            breaks.push((format!("{name}: sign"), Break::Sign(i)));
            breaks.push((format!("{name}: dropped"), Break::Dropped(i)));
            for (axis, letter) in ["n", "h", "w", "c"].into_iter().enumerate() {
                if extents(d.tape.shape(gradient))[axis] > 1 {
                    let label = format!("{name}: shifted along {letter}");
                    breaks.push((label, Break::Shifted(i, axis)));
                }
            }
        }
        let mut seen = BTreeMap::new();
        let steps = d.tape.steps().iter().enumerate();
        for (index, step) in steps.filter(|(_, s)| s.origin.is_some()) {
            let nth = seen.entry(step.op.name()).or_insert(0);
            *nth += 1;
            for input in 0..step.inputs.len() {
                let label = format!("{} {nth}: without input {input}", step.op.name());
                breaks.push((label, Break::Term(index, input)));
            }
        }
        breaks
    }

    fn apply(self, d: &Differentiated) -> Result<Differentiated> {
        let mut d = d.clone();
        match self {
            Break::Sign(i) => d.then(i, Scale { factor: -1.0 })?,
            Break::Dropped(i) => d.gradients[i] = None,
            Break::Shifted(i, axis) => d.then(i, Roll { axis })?,
            Break::Term(step, input) => {
                let shape = d.tape.shape(d.tape.steps()[step].inputs[input]);
                // Inputs that nobody writes are zeros.
                let zeros = d.tape.input("zeros", shape);
                d.tape.rewire(step, input, zeros);
            }
        }
        Ok(d)
    }
}

trait Then {
    fn then(&mut self, input: usize, op: impl Op + 'static) -> Result<()>;
}

impl Then for Differentiated {
    /// Appends an operation to the gradient of an input.
    fn then(&mut self, input: usize, op: impl Op + 'static) -> Result<()> {
        let broken = self.tape.push(op, &[self.gradients[input].unwrap()])?;
        self.tape.keep(broken);
        self.gradients[input] = Some(broken);
        Ok(())
    }
}

fn extents(shape: Shape) -> [usize; 4] {
    [shape.n, shape.h, shape.w, shape.c]
}

/// Moves a tensor on by one element along an axis (of n, h, w, c), around its end.
#[derive(Clone, Copy, Debug)]
struct Roll {
    axis: usize,
}

impl<T: Real> Kernel<T> for Roll {
    fn run(&self, io: &mut Io<'_, T>) {
        let extents = extents(io.input_shape(0));
        let inner: usize = extents[self.axis + 1..].iter().product();
        let (y, x) = (io.output(0), io.input(0));
        for (i, y) in y.iter_mut().enumerate() {
            let at = i / inner % extents[self.axis];
            let from = (at + 1) % extents[self.axis];
            *y = x[i - at * inner + from * inner];
        }
    }
}

impl Op for Roll {
    fn name(&self) -> &'static str {
        "roll"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs.to_vec())
    }
}

/// Breaks that change nothing, with the reason: operation, break, why.
const NEUTRAL: &[(&str, &str, &str)] = &[
    (
        "global_avg_pool",
        "x: shifted along h",
        "all pixels of an image have the same gradient",
    ),
    (
        "global_avg_pool",
        "x: shifted along w",
        "all pixels of an image have the same gradient",
    ),
];

/// For every operation and every way to break its recorded gradient, some seed must fail the check;
/// unless the break is known to change nothing, in which case none may.
#[test]
fn every_broken_gradient_is_noticed() {
    let mut wrong = Vec::new();
    let mut unused: Vec<_> = NEUTRAL.iter().collect();
    for entry in registry() {
        for (label, noticed) in noticed_breaks(&entry) {
            let neutral = |n: &&(&str, &str, &str)| (n.0, n.1) == (entry.name, label.as_str());
            unused.retain(|n| !neutral(n));
            match (noticed, NEUTRAL.iter().find(neutral)) {
                (false, None) => wrong.push(format!("{}, {label}: not noticed", entry.name)),
                (true, Some(n)) => {
                    wrong.push(format!("{}, {label}: noticed, but {}", entry.name, n.2));
                }
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(unused.is_empty(), "no such breaks: {unused:?}");
}

/// Each break of an operation's gradient, and whether one of a few seeds shows it.
fn noticed_breaks(entry: &Entry) -> BTreeMap<String, bool> {
    let mut noticed = BTreeMap::new();
    for seed in 0..24 {
        let case = (entry.case)(&mut Sampler::new(seed));
        let d = gradcheck::differentiate(&case).unwrap();
        for (label, wrong) in Break::all(&case, &d) {
            let noticed = noticed.entry(label).or_insert(false);
            if !*noticed {
                let broken = wrong.apply(&d).unwrap();
                let outcome = gradcheck::check_gradient(&case, &broken, seed).unwrap();
                *noticed = outcome.mismatch.is_some();
            }
        }
    }
    noticed
}

/// Largest distance of `f32` results from the `f64` results of the same inputs, as a share of the tensor's
/// largest element: 32 roundings, enough for sums in blocks and the few operations around them, beside what
/// [`gradcheck::conditioning`] allows.
const F32_TOLERANCE: f64 = 32.0 * (f32::EPSILON / 2.0) as f64;

#[test]
fn bits_depend_on_neither_threads_nor_plan_and_agree_with_f64() {
    let pools = [1, 2, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap()
    });
    for entry in registry() {
        for seed in 0..8 {
            let mut case = (entry.case)(&mut Sampler::large(seed));
            for input in &mut case.inputs {
                let rounded = input.values.iter().map(|&v| f64::from(v as f32));
                input.values = rounded.collect();
            }
            let d = gradcheck::differentiate(&case).unwrap();
            let what = format!("{} ({})", entry.name, case.description);
            let single = pools[0].install(|| run::<f32>(&case, &d, seed, Options::default()));
            for recompute in [true, false] {
                for in_place in [true, false] {
                    let options = Options {
                        recompute,
                        in_place,
                        ..Options::default()
                    };
                    for pool in &pools {
                        let again = pool.install(|| run::<f32>(&case, &d, seed, options));
                        assert!(same_bits(&single, &again), "{what}, {options:?}, {pool:?}");
                    }
                }
            }
            let double = run::<f64>(&case, &d, seed, Options::default());
            let inputs = case.inputs.iter_mut().filter(|i| i.differentiable);
            inputs.for_each(|input| gradcheck::nudge(&mut input.values));
            let nudged = run::<f64>(&case, &d, seed, Options::default());
            let double = double.0.iter().chain(&double.1);
            let double = double.zip(nudged.0.iter().chain(&nudged.1));
            for (single, (double, nudged)) in single.0.iter().chain(&single.1).zip(double) {
                let largest = double.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                let allowed = F32_TOLERANCE * largest + gradcheck::conditioning(double, nudged);
                for (i, (single, double)) in single.iter().zip(double).enumerate() {
                    let error = (f64::from(*single) - double).abs();
                    assert!(
                        error <= allowed,
                        "{what}: element {i} is {single}, in f64 {double}"
                    );
                }
            }
        }
    }
}

fn same_bits(a: &(Vec<Vec<f32>>, Vec<Vec<f32>>), b: &(Vec<Vec<f32>>, Vec<Vec<f32>>)) -> bool {
    let bits = |x: &(Vec<Vec<f32>>, Vec<Vec<f32>>)| -> Vec<u32> {
        x.0.iter()
            .chain(&x.1)
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    };
    bits(a) == bits(b)
}
