//! The operations' CUDA kernels, run by the emulator, against the CPU.
#![cfg(feature = "emulator")]

use echograd::device::gpu::{self, Gpu};
use echograd::gradcheck::{self, Sampler};
use echograd::ops::examples;
use echograd::ops::pointwise::Scale;
use echograd::ops::registry;
use echograd::tape::{Options, Plan, Tape};
use echograd::tensor::Shape;
use echograd::{Error, Result};

/// Random problems of each operation and storage.
const CASES: u64 = 12;

#[test]
fn kernels_agree_with_the_cpu() {
    let mut checked = Vec::new();
    for entry in registry() {
        let gpu = Gpu::emulator().unwrap();
        // Not the seeds of `gradcheck`'s default.
        match gradcheck::check_operation(&entry, 7_000, CASES, Some(&gpu)) {
            Ok(report) => {
                assert!(
                    report.failures.is_empty(),
                    "{}: {:#?}",
                    entry.name,
                    report.failures
                );
                checked.push(entry.name);
            }
            Err(Error::NoKernel { .. }) => {}
            Err(problem) => panic!("{}: {problem}", entry.name),
        }
    }
    assert!(checked.contains(&"scale"), "{checked:?}");
}

#[test]
fn larger_problems_fill_several_blocks() {
    for entry in registry() {
        let gpu = Gpu::emulator().unwrap();
        for seed in 0..2 {
            let case = (entry.case)(&mut Sampler::large(seed));
            for narrow in [false, true] {
                match gradcheck::check_on(&gpu, &case, seed, narrow) {
                    Ok(outcome) => assert!(
                        outcome.mismatch.is_none(),
                        "{} ({}): {:?}",
                        entry.name,
                        case.description,
                        outcome.mismatch
                    ),
                    Err(Error::NoKernel { .. }) => {}
                    Err(problem) => panic!("{} ({}): {problem}", entry.name, case.description),
                }
            }
        }
    }
}

/// A session with one operation of the registry on `shape`.
fn session(name: &str, shape: Shape) -> Result<gpu::Session> {
    let mut tape = Tape::new();
    let (y, _) = examples::record(&mut tape, name, shape)?;
    tape.keep(y);
    gpu::Session::new(&Gpu::emulator()?, Plan::new(&tape, Options::gpu(false))?)
}

#[test]
fn an_operation_without_kernel_is_named() {
    let problem = session("conv2d", Shape::new(1, 4, 4, 2)).err().unwrap();
    assert!(
        matches!(problem, Error::NoKernel { op: "conv2d" }),
        "{problem}"
    );
    assert_eq!(
        problem.to_string(),
        "conv2d: has no CUDA kernel yet; use --device cpu"
    );
}

#[test]
fn an_empty_batch_launches_nothing() {
    let mut session = session("scale", Shape::new(0, 4, 4, 2)).unwrap();
    assert!(session.launches().is_empty());
    session.run().unwrap();
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
    let timed = session.run_timed().unwrap();
    assert_eq!(timed.len(), session.launches().len());
    assert!(timed.iter().all(|t| t.start >= 0.0 && t.time >= 0.0));
}
