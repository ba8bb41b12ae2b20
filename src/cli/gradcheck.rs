//! `echograd gradcheck`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::Serialize;

use super::progress::Console;
use crate::error::{Error, Result};
use crate::gradcheck::{Report, TOLERANCE, check_operation};
use crate::ops::{Entry, registry};
use crate::train::config::Device;
use crate::train::{Report as _, stop};

/// Check the gradient of every operation against finite differences
///
/// Each operation is run on random problems in double precision: sizes of 1, odd sizes, every stride and padding. Its
/// hand-derived gradient must agree with five-point central differences to 1e-6, relative to the derivative or to a
/// thousandth of the largest one. The last line counts the operations that passed and failed.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where to run the operations
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Check this operation alone
    #[arg(long, value_name = "NAME", value_parser = operation)]
    op: Option<Operation>,
    /// Random problems for each operation
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    cases: u64,
    /// Seed of the first problem; the next ones count up from it
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A line of the registry, found by its name.
#[derive(Clone, Debug)]
struct Operation(Entry);

fn operation(name: &str) -> Result<Operation, String> {
    let registry = registry();
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
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If this build lacks the device, or on Ctrl-C.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let missing = match self.device {
            Device::Cpu => None,
            Device::Emulator => Some("this build has no emulator of a CUDA device"),
            Device::Cuda => Some("this build has no CUDA device"),
        };
        if let Some(missing) = missing {
            return Err(Error::argument("--device", format!("{missing}; use cpu")).into());
        }
        let entries = match &self.op {
            Some(Operation(entry)) => vec![*entry],
            None => registry(),
        };
        let interrupt = super::interrupt()?;
        let (console, done) = (Console::default(), AtomicU64::new(0));
        let reports: Vec<Report> = entries
            .par_iter()
            .map(|entry| {
                stop(interrupt)?;
                let report = check_operation(entry, self.seed, self.cases);
                let n = done.fetch_add(1, Ordering::Relaxed) + 1;
                console.progress("operations", n, entries.len() as u64, entry.name);
                report
            })
            .collect::<Result<_>>()?;
        drop(console);
        let failed = reports.iter().filter(|r| !r.failures.is_empty()).count();
        let passed = reports.len() - failed;
        if self.json {
            let document = Document {
                device: self.device,
                seed: self.seed,
                cases: self.cases,
                tolerance: TOLERANCE,
                passed,
                failed,
                operations: &reports,
            };
            super::print_json(&document)?;
        } else {
            print(&reports)?;
            outln!("{passed} passed, {failed} failed");
        }
        Ok(ExitCode::from(u8::from(failed > 0)))
    }
}

fn print(reports: &[Report]) -> Result<()> {
    outln!(
        "{:<18} {:>6} {:>12} {:>12}",
        "operation",
        "cases",
        "derivatives",
        "worst error"
    );
    for r in reports {
        let verdict = if r.failures.is_empty() {
            "ok"
        } else {
            "FAILED"
        };
        outln!(
            "{:<18} {:>6} {:>12} {:>12.1e}  {verdict}",
            r.op,
            r.cases,
            r.compared,
            r.worst
        );
    }
    for r in reports {
        let Some(first) = r.failures.first() else {
            continue;
        };
        let m = &first.mismatch;
        outln!(
            "{}: {} of {} cases failed; seed {}: {}: d/d{}[{}] is {:e}, finite difference {:e}",
            r.op,
            r.failures.len(),
            r.cases,
            first.seed,
            first.description,
            m.input,
            m.element,
            m.analytic,
            m.numeric
        );
        outln!(
            "  repeat: echograd gradcheck --op {} --seed {} --cases 1",
            r.op,
            first.seed
        );
    }
    Ok(())
}
