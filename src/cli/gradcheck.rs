//! `echograd gradcheck`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::progress::Console;
use crate::device::gpu::Gpu;
use crate::error::{Error, Result};
use crate::gradcheck::{
    DEVICE_TOLERANCE, Problem, Report, TOLERANCE, check_augmentation, check_operation,
    check_optimizer,
};
use crate::ops::{Entry, device_registry, registry};
use crate::train::config::Device;
use crate::train::{Report as _, stop};

/// Check the gradient of every operation against finite differences, or a GPU's kernels against the CPU
///
/// Each operation is run on random problems in double precision: sizes of 1, odd sizes, every stride and padding. Its
/// hand-derived gradient must agree with five-point central differences to 1e-6, relative to the derivative or to a
/// thousandth of the largest one. On another device the same problems are run by its kernels, in f32 and in bf16, and
/// every output and gradient is compared with the CPU's in double precision; a second run and a captured graph must give
/// the same bits. The last line counts the operations that passed and failed; those that the device has no kernels for
/// are listed before it. Operations of inference, wide convolutions, augmentation and several steps of the optimizer are
/// checked there alone.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where to run the operations
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Check this operation alone
    #[arg(long, value_name = "NAME", value_parser = checked)]
    op: Option<Operation>,
    /// Random problems for each operation
    #[arg(long, value_name = "N", help = "Random problems for each operation [default: 200, on the emulator 20]", value_parser = clap::value_parser!(u64).range(1..))]
    cases: Option<u64>,
    /// Seed of the first problem; the next ones count up from it
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A line of the registry, found by its name.
#[derive(Clone, Debug)]
pub struct Operation(Entry);

impl Operation {
    /// Its name in the registry.
    pub fn name(&self) -> &'static str {
        self.0.name
    }
}

/// Finds an operation of the registry.
pub(super) fn operation(name: &str) -> Result<Operation, String> {
    find(name, registry())
}

/// Finds what can be checked on a device.
fn checked(name: &str) -> Result<Operation, String> {
    find(name, [registry(), device_registry()].concat())
}

/// Finds an operation, or says which name is meant.
fn find(name: &str, registry: Vec<Entry>) -> Result<Operation, String> {
    if let Some(entry) = registry.iter().find(|entry| entry.name == name) {
        return Ok(Operation(*entry));
    }
    let distance = |entry: &&Entry| strsim::damerau_levenshtein(entry.name, name);
    let nearest = registry.iter().min_by_key(distance).map_or("", |e| e.name);
    let known: Vec<&str> = registry.iter().map(|entry| entry.name).collect();
    Err(format!(
        "unknown operation, did you mean {nearest:?}? Known are {}",
        known.join(", ")
    ))
}

#[derive(Serialize)]
struct Document<'a> {
    device: Device,
    seed: u64,
    cases: u64,
    tolerance: f64,
    passed: usize,
    failed: usize,
    operations: &'a [Report],
    /// Operations that the device has no kernels for.
    missing: &'a [&'static str],
}

impl Args {
    /// The device. Where convolutions go by `wgmma`, small ones do too: from two blocks on, so that smaller problems
    /// take smaller tiles.
    fn open(&self) -> Result<Option<Gpu>> {
        let by_wgmma = |gpu: Gpu| match gpu.wgmma() {
            Some(_) => gpu.with_wgmma(2),
            None => Ok(gpu),
        };
        self.device.open()?.map(by_wgmma).transpose()
    }

    /// Runs the command.
    ///
    /// # Errors
    /// If this build lacks the device, or on Ctrl-C.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        // Opened first, so that a missing device is told before anything else.
        let gpu = self.open()?;
        let cases = self.cases.unwrap_or(match self.device {
            Device::Emulator => 20,
            Device::Cpu | Device::Cuda => 200,
        });
        let mut entries = registry();
        if gpu.is_some() {
            entries.extend(device_registry());
        }
        if let Some(Operation(wanted)) = &self.op {
            entries.retain(|entry| entry.name == wanted.name);
            if entries.is_empty() {
                let problem = format!("{} needs --device cuda or emulator", wanted.name);
                return Err(Error::argument("--op", problem).into());
            }
        }
        let interrupt = super::interrupt()?;
        let (console, done) = (Console::default(), AtomicU64::new(0));
        // Where a kernel may hang, results come as they are there.
        let at_once = self.device == Device::Cuda && !self.json;
        let check = |gpu: Option<&Gpu>, entry: &Entry| {
            stop(interrupt)?;
            let report = match check_operation(entry, self.seed, cases, gpu) {
                Err(Error::NoKernel { .. }) => Err(entry.name),
                report => Ok(report?),
            };
            let n = done.fetch_add(1, Ordering::Relaxed) + 1;
            match &report {
                Ok(report) if at_once => row(report)?,
                _ if at_once => {}
                _ => console.progress("operations", n, entries.len() as u64, entry.name),
            }
            Ok(report)
        };
        if at_once {
            header(self.device)?;
        }
        let checked: Result<Vec<std::result::Result<Report, &'static str>>> = match &gpu {
            None => entries.par_iter().map(|entry| check(None, entry)).collect(),
            // Each operation has an emulator of its own, with a queue of its own.
            Some(_) if self.device == Device::Emulator => entries
                .par_iter()
                .map(|entry| check(self.open()?.as_ref(), entry))
                .collect(),
            gpu => entries
                .iter()
                .map(|entry| check(gpu.as_ref(), entry))
                .collect(),
        };
        let (mut reports, mut missing) = (Vec::new(), Vec::new());
        for checked in checked? {
            match checked {
                Ok(report) => reports.push(report),
                Err(name) => missing.push(name),
            }
        }
        if let (Some(gpu), None) = (&gpu, &self.op) {
            for check in [check_optimizer, check_augmentation] {
                let report = check(gpu, self.seed)?;
                if at_once {
                    row(&report)?;
                }
                reports.push(report);
            }
        }
        drop(console);
        let failed = reports.iter().filter(|r| !r.failures.is_empty()).count();
        let passed = reports.len() - failed;
        if self.json {
            let document = Document {
                device: self.device,
                seed: self.seed,
                cases,
                tolerance: if gpu.is_some() {
                    DEVICE_TOLERANCE
                } else {
                    TOLERANCE
                },
                passed,
                failed,
                operations: &reports,
                missing: &missing,
            };
            super::print_json(&document)?;
        } else {
            if !at_once {
                header(self.device)?;
                reports.iter().try_for_each(row)?;
            }
            print_failures(&reports, self.device)?;
            if !missing.is_empty() {
                outln!(
                    "no kernels for {}: {}",
                    super::name_of(&self.device),
                    missing.join(", ")
                );
            }
            outln!("{passed} passed, {failed} failed");
        }
        Ok(ExitCode::from(u8::from(failed > 0)))
    }
}

fn header(device: Device) -> Result<()> {
    let compared = if device == Device::Cpu {
        "derivatives"
    } else {
        "numbers"
    };
    outln!(
        "{:<26} {:>6} {:>12} {:>12}",
        "operation",
        "cases",
        compared,
        "worst error"
    );
    Ok(())
}

fn row(of: &Report) -> Result<()> {
    let verdict = if of.failures.is_empty() {
        "ok"
    } else {
        "FAILED"
    };
    outln!(
        "{:<26} {:>6} {:>12} {:>12.1e}  {verdict}",
        of.op,
        of.cases,
        of.compared,
        of.worst
    );
    Ok(())
}

fn print_failures(reports: &[Report], device: Device) -> Result<()> {
    for r in reports {
        let Some(first) = r.failures.first() else {
            continue;
        };
        let expected = match device {
            Device::Cpu => "finite difference",
            Device::Cuda | Device::Emulator => "on the CPU",
        };
        let problem = match &first.problem {
            Problem::Error(problem) => problem.clone(),
            Problem::Mismatch(m) => {
                let what = if m.input == "output" { "" } else { "d/d" };
                format!(
                    "{what}{}[{}] is {:e}, {expected} {:e}",
                    m.input, m.element, m.analytic, m.numeric
                )
            }
        };
        outln!(
            "{}: {} of {} cases failed; seed {}: {}: {problem}",
            r.op,
            r.failures.len(),
            r.cases,
            first.seed,
            first.description
        );
        let on = match device {
            Device::Cpu => String::new(),
            device => format!(" --device {}", super::name_of(&device)),
        };
        outln!(
            "  repeat: echograd gradcheck{on} --op {} --seed {} --cases 1",
            r.op,
            first.seed
        );
    }
    Ok(())
}
