//! The loss behind the mask head against the operations that it stands for, and all losses and features on the
//! emulated GPU against the CPU.

use echograd::device::cpu::{Element, Session};
use echograd::gradcheck::Sampler;
use echograd::ops::control;
use echograd::ops::multitask_loss::{MultitaskLoss, Tie};
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::{Real, Shape};
use echograd::{Error, Result};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// One input of the loss.
#[derive(Clone, Debug)]
struct Input {
    shape: Shape,
    values: Vec<f64>,
    differentiable: bool,
}

/// A loss with what it is computed of: images far from the gate, some of them padding.
#[derive(Clone, Debug)]
struct Problem {
    op: MultitaskLoss,
    inputs: Vec<Input>,
}

/// Where inputs stand if all terms are there.
const MOMENTS: usize = 2;
const PERIMETER: usize = 3;
const WEIGHT: usize = 4;
const LOGIT: usize = 5;
const CLASS_WEIGHT: usize = 7;
const PRIOR: usize = 8;

impl Problem {
    fn draw(seed: u64, n: usize) -> Self {
        let s = &mut Sampler::new(seed);
        let (mask, classes) = match s.size(0, 4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        let tie = (mask && classes && s.chance(0.8)).then(|| Tie {
            weight: s.uniform(0.1, 4.0),
            stop_classifier: s.chance(0.2),
            stop_mask: s.chance(0.2),
            unweighted: s.chance(0.3),
        });
        let classification = classes.then(|| s.uniform(0.1, 3.0));
        Self::of(s, n, mask, classification, tie)
    }

    /// All terms, moved by everything.
    fn whole(seed: u64, n: usize) -> Self {
        let tie = Tie {
            weight: 0.7,
            stop_classifier: false,
            stop_mask: false,
            unweighted: false,
        };
        Self::of(&mut Sampler::new(seed), n, true, Some(1.3), Some(tie))
    }

    fn of(
        s: &mut Sampler,
        n: usize,
        mask: bool,
        classification: Option<f64>,
        consistency: Option<Tie>,
    ) -> Self {
        let mut inputs = Vec::new();
        let mut add = |shape: Shape, values: Vec<f64>, differentiable| {
            inputs.push(Input {
                shape,
                values,
                differentiable,
            });
        };
        let (image, vector) = (Shape::per_image(n, 1), Shape::per_channel(4));
        let weights = |s: &mut Sampler| -> Vec<f64> {
            let weight = |_| {
                if s.chance(0.2) {
                    0.0
                } else {
                    s.uniform(0.5, 2.0)
                }
            };
            (0..n).map(weight).collect()
        };
        if mask {
            add(image, s.values(n, 0.0, 2.0), true);
            add(image, s.values(n, 0.0, 1.0), true);
            let moments = (0..n).flat_map(|_| {
                let area = match s.chance(0.25) {
                    true => s.uniform(1.0, 31.0),
                    false => s.uniform(33.0, 900.0),
                };
                let (xx, yy) = (s.uniform(2.0, 40.0), s.uniform(2.0, 40.0));
                let xy = s.uniform(-0.9, 0.9) * (xx * yy).sqrt();
                let [x, y] = [0; 2].map(|_| s.uniform(-90.0, 90.0));
                [1.0, s.uniform(0.3, 1.0), x, y, xx, yy, xy].map(|of_area| area * of_area)
            });
            add(Shape::per_image(n, 7), moments.collect(), true);
            add(image, s.values(n, 10.0, 200.0), true);
            add(image, weights(s), false);
        }
        if classification.is_some() {
            add(image, s.values(n, -6.0, 6.0), true);
            let labels = (0..n).map(|_| f64::from(u8::from(s.chance(0.5))));
            add(image, labels.collect(), false);
            add(image, weights(s), false);
        }
        if consistency.is_some() {
            add(vector, s.values(4, 0.0, 1.5), true);
            add(Shape::SCALAR, s.values(1, -1.0, 1.0), true);
            add(vector, s.values(4, -0.3, 0.8), false);
            add(vector, s.values(4, 0.05, 0.5), false);
            let of_step = s.values(control::LEN, 0.1, 1.0);
            add(Shape::per_channel(control::LEN), of_step, false);
        }
        let op = MultitaskLoss {
            mask,
            classification,
            consistency,
        };
        Self { op, inputs }
    }

    /// Records the loss and its gradients; a `seed` is what the total's gradient is scaled with.
    fn record(&self, fused: bool, seeded: bool) -> Result<Recorded> {
        let mut tape = Tape::new();
        let inputs: Vec<Var> = (self.inputs.iter())
            .map(|input| tape.input("input", input.shape))
            .collect();
        let values = if fused {
            let terms = 1
                + 2 * usize::from(self.op.mask)
                + usize::from(self.op.classification.is_some())
                + usize::from(self.op.consistency.is_some());
            tape.push_all(self.op, &inputs)?[..terms].to_vec()
        } else {
            self.op.compose(&mut tape, &inputs)?
        };
        let wanted: Vec<Var> = (self.inputs.iter().zip(&inputs))
            .filter(|(input, _)| input.differentiable)
            .map(|(_, &var)| var)
            .collect();
        let seed = seeded.then(|| tape.input("seed", Shape::SCALAR));
        let gradients = match seed {
            Some(seed) => tape.backward_from(&[(values[0], seed)], &wanted)?,
            None => tape.backward(values[0], &wanted)?,
        };
        let kept = values.iter().chain(gradients.iter().flatten());
        kept.for_each(|&v| tape.keep(v));
        Ok(Recorded {
            tape,
            inputs,
            seed,
            values,
            wanted,
            gradients,
        })
    }

    /// The total and the terms; the gradients of the differentiable inputs, zeros where there is none.
    fn run<T: Element>(&self, fused: bool, seed: Option<f64>) -> (Vec<T>, Vec<Vec<T>>) {
        let recorded = self.record(fused, seed.is_some()).unwrap();
        let plan = Plan::new(&recorded.tape, Options::default()).unwrap();
        let mut session = Session::<T>::new(plan).unwrap();
        for (&var, input) in recorded.inputs.iter().zip(&self.inputs) {
            session.write(var, &cast(&input.values));
        }
        if let (Some(var), Some(seed)) = (recorded.seed, seed) {
            session.write(var, &[T::of(seed)]);
        }
        session.run();
        let values = recorded.values.iter().map(|&v| session.read(v)[0]);
        let gradients = recorded.wanted.iter().zip(&recorded.gradients);
        let gradients = gradients.map(|(&var, gradient)| match gradient {
            Some(gradient) => session.read(*gradient).to_vec(),
            None => vec![T::zero(); recorded.tape.shape(var).len()],
        });
        (values.collect(), gradients.collect())
    }

    /// The gradient of input `i` from those that [`Problem::run`] returned.
    fn gradient<'a, T>(&self, gradients: &'a [Vec<T>], i: usize) -> &'a [T] {
        let before = &self.inputs[..i];
        &gradients[before.iter().filter(|input| input.differentiable).count()]
    }
}

struct Recorded {
    tape: Tape,
    inputs: Vec<Var>,
    seed: Option<Var>,
    values: Vec<Var>,
    wanted: Vec<Var>,
    gradients: Vec<Option<Var>>,
}

fn cast<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::of(x)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, rng_seed: RngSeed::Fixed(0),
        failure_persistence: None, ..Default::default() })]
    #[test]
    fn the_multitask_loss_is_its_composition(seed in any::<u64>(), n in 1usize..12) {
        let problem = Problem::draw(seed, n);
        let (values, gradients) = problem.run::<f64>(true, None);
        let (oracle, expected) = problem.run::<f64>(false, None);
        for (found, expected) in values.iter().zip(&oracle) {
            prop_assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0),
                "{found}, expected {expected}: {problem:?}");
        }
        for (found, expected) in gradients.iter().zip(&expected) {
            let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for (found, expected) in found.iter().zip(expected) {
                prop_assert!((found - expected).abs() <= 1e-12 * largest,
                    "{found}, expected {expected}: {problem:?}");
            }
        }
        // Another gradient of the total scales all of them; by a power of 2, without rounding.
        let (_, scaled) = problem.run::<f64>(true, Some(-4.0));
        for (scaled, gradient) in scaled.iter().flatten().zip(gradients.iter().flatten()) {
            prop_assert_eq!(*scaled, -4.0 * gradient);
        }
    }
}

/// The backward of the loss itself is nothing but its gradients: no step is recorded for it.
#[test]
fn gradients_of_the_loss_itself_are_handed_out() {
    let recorded = Problem::whole(1, 3).record(true, false).unwrap();
    let plan = Plan::new(&recorded.tape, Options::default()).unwrap();
    let names: Vec<_> = plan.steps().iter().map(|step| step.op.name()).collect();
    assert_eq!(names, ["multitask_loss"]);
}

#[test]
fn images_without_weight_may_hold_anything() {
    let mut problem = Problem::whole(2, 4);
    for k in [WEIGHT, CLASS_WEIGHT] {
        problem.inputs[k].values = vec![1.0, 2.0, 0.0, 1.5];
    }
    let (values, gradients) = problem.run::<f64>(true, None);
    for k in [0, 1, MOMENTS, PERIMETER, LOGIT] {
        let each = problem.inputs[k].values.len() / 4;
        problem.inputs[k].values[2 * each..3 * each].fill(f64::NAN);
    }
    let (again, gradients_again) = problem.run::<f64>(true, None);
    assert_eq!(again, values);
    assert_eq!(gradients_again, gradients);
    let padding = |k: usize, each: usize| &problem.gradient(&gradients, k)[2 * each..3 * each];
    assert_eq!(padding(LOGIT, 1), [0.0]);
    assert_eq!(padding(MOMENTS, 7), [0.0; 7]);

    for k in [WEIGHT, CLASS_WEIGHT] {
        problem.inputs[k].values = vec![0.0; 4];
    }
    let (values, gradients) = problem.run::<f64>(true, None);
    assert!(
        values
            .iter()
            .chain(gradients.iter().flatten())
            .all(|&x| x == 0.0)
    );
}

#[test]
fn lesions_below_the_gate_have_no_consistency() {
    let mut problem = Problem::whole(3, 3);
    problem.inputs[WEIGHT].values = vec![1.0; 3];
    for image in 0..3 {
        problem.inputs[MOMENTS].values[7 * image] = 31.9;
    }
    let (values, gradients) = problem.run::<f64>(true, None);
    assert_eq!(values[4], 0.0);
    for k in [MOMENTS, PERIMETER, PRIOR, PRIOR + 1] {
        assert!(problem.gradient(&gradients, k).iter().all(|&d| d == 0.0));
    }
    // Not because nothing is ever passed on.
    problem.inputs[MOMENTS].values[..2].copy_from_slice(&[32.1, 30.0]);
    let (values, gradients) = problem.run::<f64>(true, None);
    assert!(values[4] > 0.0);
    let dmoments = problem.gradient(&gradients, MOMENTS);
    assert!(dmoments[0] != 0.0 && dmoments[7..].iter().all(|&d| d == 0.0));
}

#[test]
fn a_nan_reaches_total_and_gradient() {
    for k in [0, 1, LOGIT, MOMENTS, PERIMETER] {
        let mut problem = Problem::whole(4, 2);
        problem.inputs[WEIGHT].values = vec![1.0; 2];
        problem.inputs[CLASS_WEIGHT].values = vec![1.0; 2];
        problem.inputs[MOMENTS].values[..2].copy_from_slice(&[90.0, 80.0]);
        problem.inputs[k].values[0] = f64::NAN;
        let (values, gradients) = problem.run::<f32>(true, None);
        assert!(values[0].is_nan(), "input {k}");
        if k >= MOMENTS {
            let d = problem.gradient(&gradients, if k == LOGIT { LOGIT } else { PERIMETER });
            assert!(d[0].is_nan() && !d[1].is_nan(), "input {k}: {d:?}");
        }
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let whole = Problem::whole(5, 2);
    let refused = |problem: &Problem, words: &str| {
        let error = problem.record(true, false).err().expect("an error");
        assert!(matches!(error, Error::Shape { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let mut problem = whole.clone();
    problem.op.mask = false;
    refused(&problem, "expected mask and classification to tie");
    problem.op.consistency = None;
    problem.op.classification = None;
    refused(&problem, "found neither");
    let mut problem = whole.clone();
    problem.inputs[LOGIT].shape = Shape::per_image(3, 1);
    refused(&problem, "expected [2×1×1×1, 2×1×1×1, 2×1×1×7");
    let mut problem = whole.clone();
    problem.inputs.pop();
    refused(&problem, "found [2×1×1×1");
    refused(&Problem::whole(5, 0), "expected at least one image");
}

#[cfg(feature = "emulator")]
mod emulated {
    use super::*;
    use echograd::device::emulator::SEEDS;
    use echograd::device::gpu::{self, Gpu};
    use echograd::features::Moments;
    use echograd::gradcheck;
    use echograd::ops::losses::{BceWithLogits, Mse, SoftDice, WeightedMean};
    use echograd::ops::perimeter::Perimeter;
    use echograd::ops::{self, Op, registry};

    /// Every output and gradient of random problems as on the CPU, in both storages, whatever the order of
    /// threads.
    #[test]
    #[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
    fn losses_and_features_agree_with_the_cpu() {
        let gpu = Gpu::emulator().unwrap();
        let names = [
            "bce_with_logits",
            "soft_dice",
            "mse",
            "weighted_mean",
            "moments",
            "perimeter",
            "shape_features",
            "prior",
            "consistency",
            "multitask_loss",
        ];
        for name in names {
            let entry = registry().into_iter().find(|e| e.name == name).unwrap();
            for seed in 0..60 {
                // Some so large that there are several pieces.
                let sampler = if seed % 6 == 0 {
                    Sampler::large
                } else {
                    Sampler::new
                };
                let mut case = (entry.case)(&mut sampler(seed));
                for input in &mut case.inputs {
                    // Constant only because finite differences see what passes no gradient on.
                    input.differentiable |= input.name == "moments";
                }
                for narrow in [false, true] {
                    let outcome = gradcheck::check_on(&gpu, &case, seed, narrow);
                    let outcome = outcome.unwrap_or_else(|e| panic!("{name}, seed {seed}: {e}"));
                    assert!(
                        outcome.mismatch.is_none(),
                        "{name}, seed {seed}, bf16 {narrow}, {}: {:?}",
                        case.description,
                        outcome.mismatch
                    );
                }
            }
        }
    }

    /// Applies an operation once on the emulator, in another order of threads for each seed.
    fn apply(op: impl Op + Clone + 'static, narrow: bool, inputs: &[(Shape, &[f32])]) -> Vec<f32> {
        let gpu = Gpu::emulator().unwrap();
        let results = SEEDS.map(|seed| {
            let mut tape = Tape::new();
            let vars: Vec<Var> = (inputs.iter())
                .map(|&(shape, _)| {
                    let var = tape.input("input", shape);
                    tape.narrow(var);
                    var
                })
                .collect();
            let y = tape.push(op.clone(), &vars).unwrap();
            tape.keep(y);
            let plan = Plan::new(&tape, Options::gpu(narrow)).unwrap();
            let mut session = gpu::Session::new(&gpu, plan).unwrap();
            for (&var, (_, values)) in vars.iter().zip(inputs) {
                session.write(var, values).unwrap();
            }
            gpu.reorder(seed);
            session.run().unwrap();
            session.read(y).unwrap()
        });
        let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
        assert!(results.iter().all(|y| bits(y) == bits(&results[0])));
        results[0].clone()
    }

    #[test]
    #[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
    fn extreme_logits_and_nan_on_the_emulator() {
        let shape = Shape::new(2, 1, 1, 4);
        let z = [-1e4, 1e4, 60.0, -60.0, f32::NAN, 0.0, 0.0, 0.0];
        let g = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0];
        let bce = apply(BceWithLogits, false, &[(shape, &z), (shape, &g)]);
        approx::assert_relative_eq!(bce[0], 8.756_511e-27 / 2.0, max_relative = 1e-5);
        assert!(bce[1].is_nan());
        for narrow in [false, true] {
            let wrong = [1e4, -1e4, 1e4, -1e4, 0.0, 0.0, 0.0, 0.0];
            let right = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0];
            let bce = apply(BceWithLogits, narrow, &[(shape, &wrong), (shape, &right)]);
            approx::assert_relative_eq!(bce[0], 1e4, max_relative = 4e-3);
            approx::assert_relative_eq!(bce[1], std::f32::consts::LN_2, max_relative = 1e-6);
            assert!(apply(Mse, narrow, &[(shape, &z), (shape, &z)])[1].is_nan());
            let dice = apply(SoftDice, narrow, &[(shape, &[0.0; 8]), (shape, &[0.0; 8])]);
            assert_eq!(dice, [0.0; 2]);
        }
        let images = Shape::per_image(3, 1);
        let mean = |w: &[f32; 3]| {
            let v = [f32::NAN, 2.0, 5.0];
            apply(WeightedMean, false, &[(images, &v), (images, w)])
        };
        assert_eq!(mean(&[0.0, 2.0, 1.0]), [3.0]);
        assert_eq!(mean(&[0.0; 3]), [0.0]);
        assert!(mean(&[1.0, 2.0, 1.0])[0].is_nan());
    }

    #[test]
    #[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
    fn masks_of_one_pixel_and_of_nan_on_the_emulator() {
        let one = Shape::new(1, 1, 1, 1);
        for narrow in [false, true] {
            let moments = apply(ops::moments::Moments, narrow, &[(one, &[0.5])]);
            assert_eq!(moments, [0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0]);
            let perimeter = apply(Perimeter, narrow, &[(one, &[0.5])])[0];
            let expected = echograd::features::perimeter(&[0.5f64], 1) as f32;
            approx::assert_relative_eq!(perimeter, expected, max_relative = 1e-6);
            // The second of three images, of sizes that fit vectors and that do not.
            for shape in [Shape::new(3, 5, 16, 1), Shape::new(3, 5, 7, 1)] {
                let mut masks = vec![0.25; shape.len()];
                masks[shape.pixels() + 9] = f32::NAN;
                let moments = apply(ops::moments::Moments, narrow, &[(shape, &masks)]);
                let nans = moments.iter().map(|m| m.is_nan());
                let expected = (0..3 * Moments::COUNT).map(|i| i / Moments::COUNT == 1);
                assert!(nans.eq(expected), "{shape}: {moments:?}");
                let perimeters = apply(Perimeter, narrow, &[(shape, &masks)]);
                assert!(perimeters[1].is_nan() && !(perimeters[0] + perimeters[2]).is_nan());
            }
        }
    }

    /// All arms, everything that may be stopped, and more images than the block has threads, as the CPU.
    #[test]
    #[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
    fn the_multitask_loss_on_the_emulator() {
        let gpu = Gpu::emulator().unwrap();
        let drawn = (0..20).map(|seed| Problem::draw(seed, 1 + seed as usize % 5));
        let large = [255, 257, 1030].map(|n| Problem::whole(6, n));
        for mut problem in drawn.chain(large) {
            let n = problem.inputs[0].shape.n;
            for input in &mut problem.inputs {
                input.values = input.values.iter().map(|&x| f64::from(x as f32)).collect();
            }
            let (values, gradients) = problem.run::<f64>(true, None);
            let recorded = problem.record(true, false).unwrap();
            let plan = Plan::new(&recorded.tape, Options::gpu(false)).unwrap();
            let mut session = gpu::Session::new(&gpu, plan).unwrap();
            for (&var, input) in recorded.inputs.iter().zip(&problem.inputs) {
                session.write(var, &cast(&input.values)).unwrap();
            }
            session.run().unwrap();
            let expected = values.iter().map(std::slice::from_ref);
            let expected = expected.chain(gradients.iter().map(Vec::as_slice));
            let gradients = recorded.gradients.iter().map(|g| g.unwrap());
            let found = recorded.values.iter().copied().chain(gradients);
            for (var, expected) in found.zip(expected) {
                let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                for (found, expected) in session.read(var).unwrap().iter().zip(expected) {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(error <= 2e-7 * largest, "{n}: {found}, expected {expected}");
                }
            }
        }
    }

    /// On the emulator, too, padding and lesions below the gate add nothing, and a NaN is not lost.
    #[test]
    #[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
    fn edges_of_the_multitask_loss_on_the_emulator() {
        let gpu = Gpu::emulator().unwrap();
        let run = |problem: &Problem| -> (Vec<f32>, Vec<Vec<f32>>) {
            let recorded = problem.record(true, false).unwrap();
            let plan = Plan::new(&recorded.tape, Options::gpu(false)).unwrap();
            let mut session = gpu::Session::new(&gpu, plan).unwrap();
            for (&var, input) in recorded.inputs.iter().zip(&problem.inputs) {
                session.write(var, &cast(&input.values)).unwrap();
            }
            session.run().unwrap();
            let read = |var: &Var| session.read(*var).unwrap();
            let gradients = recorded.gradients.iter().map(|g| read(&g.unwrap()));
            let values = recorded.values.iter().map(|v| read(v)[0]);
            (values.collect(), gradients.collect())
        };
        let mut problem = Problem::whole(2, 4);
        for k in [WEIGHT, CLASS_WEIGHT] {
            problem.inputs[k].values = vec![1.0, 2.0, 0.0, 1.5];
        }
        let found = run(&problem);
        for k in [0, 1, MOMENTS, PERIMETER, LOGIT] {
            let each = problem.inputs[k].values.len() / 4;
            problem.inputs[k].values[2 * each..3 * each].fill(f64::NAN);
        }
        assert_eq!(run(&problem), found);

        problem.inputs[PRIOR + 4].values[control::RAMP] = 1.0;
        for image in 0..4 {
            problem.inputs[MOMENTS].values[7 * image] = 31.9;
        }
        let (values, gradients) = run(&problem);
        assert_eq!(values[4], 0.0);
        for k in [MOMENTS, PERIMETER, PRIOR, PRIOR + 1] {
            assert!(problem.gradient(&gradients, k).iter().all(|&d| d == 0.0));
        }
        problem.inputs[MOMENTS].values[0] = f64::NAN;
        let (values, gradients) = run(&problem);
        assert!(values[0].is_nan() && values[4].is_nan() && !values[3].is_nan());
        assert!(problem.gradient(&gradients, PERIMETER)[0].is_nan());
        assert_eq!(problem.gradient(&gradients, PERIMETER)[1..], [0.0; 3]);
        for k in [WEIGHT, CLASS_WEIGHT] {
            problem.inputs[k].values = vec![0.0; 4];
        }
        let (values, gradients) = run(&problem);
        assert!(
            values
                .iter()
                .chain(gradients.iter().flatten())
                .all(|&x| x == 0.0)
        );
    }
}
