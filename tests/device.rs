//! The operations' CUDA kernels, run by the emulator, against the CPU.
#![cfg(feature = "emulator")]

use echograd::device::cpu::{self, Io};
use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{self, Sampler};
use echograd::ops::examples;
use echograd::ops::pointwise::{Add, Mul, Scale, SumTo};
use echograd::ops::{Kernel, Op, device_registry, registry};
use echograd::profile;
use echograd::tape::{Kind, Options, Plan, Tape, Var};
use echograd::tensor::{Real, Shape};
use echograd::{Error, Result};

/// Random problems of each operation and storage.
const CASES: u64 = 12;

#[test]
fn kernels_of_every_operation_agree_with_the_cpu() {
    for entry in registry() {
        let gpu = Gpu::emulator().unwrap();
        // Not the seeds of `gradcheck`'s default.
        let report = gradcheck::check_operation(&entry, 7_000, CASES, Some(&gpu)).unwrap();
        let (name, failures) = (entry.name, report.failures);
        assert!(failures.is_empty(), "{name}: {failures:#?}");
    }
}

#[test]
fn the_optimizer_agrees_with_the_cpu() {
    let report = gradcheck::check_optimizer(&Gpu::emulator().unwrap(), 3).unwrap();
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
    assert!(report.compared > 4 * 20_000);
}

#[test]
fn larger_problems_fill_several_blocks() {
    for entry in registry() {
        let gpu = Gpu::emulator().unwrap();
        for seed in 0..2 {
            let case = (entry.case)(&mut Sampler::large(seed));
            for narrow in [false, true] {
                let outcome = gradcheck::check_on(&gpu, &case, seed, narrow).unwrap();
                let (name, what, worst) = (entry.name, &case.description, outcome.mismatch);
                assert!(worst.is_none(), "{name} ({what}): {worst:?}");
            }
        }
    }
}

#[test]
fn what_only_devices_are_checked_on_agrees_with_the_cpu() {
    for entry in device_registry() {
        let gpu = Gpu::emulator().unwrap();
        let report = gradcheck::check_operation(&entry, 8_000, 4, Some(&gpu)).unwrap();
        let (name, failures) = (entry.name, report.failures);
        assert!(failures.is_empty(), "{name}: {failures:#?}");
        assert!(report.compared > 0, "{name}");
    }
    let report = gradcheck::check_augmentation(&Gpu::emulator().unwrap(), 5).unwrap();
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
    assert_eq!(report.compared, 2 * 2 * 3 * 68 * 68);
}

/// Problems of wide convolutions are some for the tiles that training takes.
#[test]
fn wide_convolutions_take_wide_tiles() {
    let entry = device_registry()
        .into_iter()
        .find(|e| e.name == "conv2d_wide")
        .unwrap();
    let gpu = Gpu::emulator().unwrap();
    let mut names = Vec::new();
    for seed in 0..20 {
        for mut sampler in [Sampler::new(seed), Sampler::large(seed)] {
            let mut d = gradcheck::differentiate(&(entry.case)(&mut sampler)).unwrap();
            d.outputs.iter().for_each(|&y| d.tape.keep(y));
            let plan = Plan::new(&d.tape, Options::gpu(true)).unwrap();
            let session = gpu::Session::new(&gpu, plan).unwrap();
            let launches = session.launches().iter();
            names.extend(launches.map(|launch| launch.function.name.to_string()));
        }
    }
    for kernel in [
        "conv_128x128_bf16",
        "conv_128x64_bf16",
        "conv_weight_gradient_128x128_bf16",
    ] {
        assert!(names.iter().any(|name| name == kernel), "{kernel}");
    }
}

/// A session with one operation of the registry on `shape`.
fn session(name: &str, shape: Shape) -> Result<gpu::Session> {
    let mut tape = Tape::new();
    let (y, _) = examples::record(&mut tape, name, shape)?;
    tape.keep(y);
    gpu::Session::new(&Gpu::emulator()?, Plan::new(&tape, Options::gpu(false))?)
}

/// An operation for the CPU alone.
#[derive(Debug)]
struct Untold;

impl<T: Real> Kernel<T> for Untold {
    fn run(&self, io: &mut Io<'_, T>) {
        io.output(0).copy_from_slice(io.input(0));
    }
}

impl Op for Untold {
    fn name(&self) -> &'static str {
        "untold"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(inputs.to_vec())
    }
}

#[test]
fn an_operation_without_kernel_is_named() {
    let mut tape = Tape::new();
    let x = tape.input("x", Shape::per_channel(2));
    let y = tape.push(Untold, &[x]).unwrap();
    tape.keep(y);
    let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
    let problem = gpu::Session::new(&Gpu::emulator().unwrap(), plan).err();
    assert_eq!(
        problem.unwrap().to_string(),
        "untold: has no CUDA kernel yet; use --device cpu"
    );
}

#[test]
fn an_empty_batch_launches_nothing() {
    let mut session = session("scale", Shape::new(0, 4, 4, 2)).unwrap();
    assert!(session.launches().is_empty());
    session.run().unwrap();
}

#[test]
fn broadcasting_to_nothing_is_empty_and_sums_to_zero() {
    let empty = [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 3, 0), (0, 0, 0, 0)];
    for (n, h, w, c) in empty {
        let a = Shape::new(n, h, w, c);
        for b in [a, Shape::per_channel(c), Shape::per_image(n, c)] {
            let record = || {
                let mut tape = Tape::new();
                let (x, y) = (tape.input("a", a), tape.input("b", b));
                let sum = tape.push(Add, &[x, y])?;
                let product = tape.push(Mul, &[sum, y])?;
                let sums = [
                    tape.push(SumTo { shape: b }, &[product])?,
                    tape.push(SumTo { shape: b }, &[product, sum])?,
                ];
                tape.keep(product);
                sums.into_iter().for_each(|s| tape.keep(s));
                Ok::<_, Error>((tape, y, product, sums))
            };
            let zeros = vec![0.0; b.len()];
            let (tape, y, product, sums) = record().unwrap();
            let plan = Plan::new(&tape, Options::default()).unwrap();
            let mut session = cpu::Session::<f32>::new(plan).unwrap();
            session.write(y, &vec![7.0; b.len()]);
            session.run();
            assert!(session.read(product).is_empty(), "{a} with {b}");
            for sum in sums {
                assert_eq!(session.read(sum), zeros, "{a} with {b}");
            }

            let (tape, y, product, sums) = record().unwrap();
            let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
            let mut session = gpu::Session::new(&Gpu::emulator().unwrap(), plan).unwrap();
            session.write(y, &vec![7.0; b.len()]).unwrap();
            session.run().unwrap();
            assert!(session.read(product).unwrap().is_empty(), "{a} with {b}");
            for sum in sums {
                assert_eq!(session.read(sum).unwrap(), zeros, "{a} with {b}");
            }
        }
    }
}

#[test]
fn a_tensor_larger_than_memory_is_refused() {
    // 2⁴⁸ bytes: an address space's worth.
    let problem = session("scale", Shape::new(1 << 16, 1 << 15, 1 << 15, 1))
        .err()
        .unwrap();
    assert!(problem.to_string().contains("memory"), "{problem}");
}

#[test]
fn a_graph_keeps_its_memory_and_sees_new_inputs() {
    let mut tape = Tape::new();
    let shape = Shape::per_channel(5);
    let x = tape.input("x", shape);
    let y = tape.push(Scale { factor: 3.0 }, &[x]).unwrap();
    tape.keep(y);
    let gpu = Gpu::emulator().unwrap();
    let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
    let mut session = gpu::Session::new(&gpu, plan).unwrap();
    let graph = session.capture().unwrap();
    // Captured, not run.
    assert_eq!(session.read(y).unwrap(), [0.0; 5]);
    session.write(x, &[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    graph.replay().unwrap();
    assert_eq!(session.read(y).unwrap(), [3.0, 6.0, 9.0, 12.0, 15.0]);
    drop(session);
    graph.replay().unwrap();
}

#[test]
fn every_launch_can_be_timed() {
    let mut session = session("scale", Shape::new(2, 3, 5, 7)).unwrap();
    let timed = session.run_timed(|| Ok(())).unwrap();
    assert_eq!(timed.len(), session.launches().len());
    assert!(timed.iter().all(|t| t.start >= 0.0 && t.time >= 0.0));
}

/// The loss and its gradients, as training records them and composed of one operation each, on masks of a
/// smooth lesion.
#[test]
fn the_feature_block_agrees_with_the_cpu() {
    let masks = Shape::new(2, 40, 48, 1);
    let value = |name: &str, i: usize| -> f64 {
        let (image, pixel) = (i / masks.pixels(), i % masks.pixels());
        let (x, y) = ((pixel % masks.w) as f64, (pixel / masks.w) as f64);
        let radius = ((x - 20.0 - 3.0 * image as f64) / 1.5).hypot(y - 18.0);
        let value = match name {
            "logits" => (9.0 - radius) / 2.0 + (x * 0.7).sin() * 0.3,
            "truth" => f64::from(u8::from(radius < 10.0)),
            "malignancy" => 0.5 - i as f64,
            "labels" => i as f64,
            "prior.mean" => 0.1,
            "prior.sd" => 0.2 + 0.1 * i as f64,
            "control" => 1.0,
            _ => 0.3 + 0.1 * i as f64,
        };
        // Exact in bf16, so that all devices and storages see the same.
        let (sign, size) = (value.signum(), value.abs());
        let unit = 2f64.powi(size.max(1e-30).log2().floor() as i32 - 7);
        sign * (size / unit).round() * unit
    };
    // The composition rounds the mask that everything follows from, two sigmoids of a scaling, and four
    // gradients that are added one by one.
    let roundings = [1.0, 7.0];
    for (block, roundings) in [profile::fused(masks), profile::unfused(masks)]
        .into_iter()
        .zip(roundings)
    {
        let profile::Block { tape, results } = block.unwrap();
        let kinds = [Kind::Input, Kind::Parameter, Kind::State];
        let vars: Vec<Var> = kinds
            .into_iter()
            .flat_map(|kind| tape.of_kind(kind))
            .collect();
        let values = |var: Var| -> Vec<f64> {
            let name = tape.name(var);
            (0..tape.shape(var).len()).map(|i| value(name, i)).collect()
        };
        let plan = Plan::new(&tape, Options::default()).unwrap();
        let mut cpu = cpu::Session::<f64>::new(plan).unwrap();
        vars.iter().for_each(|&var| cpu.write(var, &values(var)));
        cpu.run();
        for narrow in [false, true] {
            let plan = Plan::new(&tape, Options::gpu(narrow)).unwrap();
            let mut device = gpu::Session::new(&Gpu::emulator().unwrap(), plan).unwrap();
            for &var in &vars {
                let values: Vec<f32> = values(var).into_iter().map(|x| x as f32).collect();
                device.write(var, &values).unwrap();
            }
            device.run().unwrap();
            for &var in &results {
                let (found, expected) = (device.read(var).unwrap(), cpu.read(var));
                let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                assert!(largest > 0.0);
                let tolerance =
                    match narrow && (roundings > 1.0 || tape.values()[var.index()].narrow) {
                        true => roundings / 256.0,
                        false => 1e-4,
                    };
                for (a, b) in found.iter().zip(expected) {
                    let error = (f64::from(*a) - b).abs();
                    assert!(
                        error <= tolerance * largest,
                        "{}: {a} and {b}",
                        tape.name(var)
                    );
                }
            }
        }
    }
}
