//! `echograd pack`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use super::SIZE_RANGE;
use super::progress::Console;
use crate::data::pack;
use crate::train::{Report as _, stop};

/// Pack a data set into one small file
///
/// It holds letterboxed 8-bit images, masks at original size, labels, patients, pixel sizes, original sizes, the SHA-256 of
/// every source image and the list of what was left out. --data pack:FILE reads it back.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Data set to pack
    #[arg(long, value_name = "NAME:PATH")]
    data: String,
    /// Side of the square that images are letterboxed to, in pixels
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(SIZE_RANGE))]
    size: u16,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If the data cannot be read or the file cannot be written, or on Ctrl-C.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let interrupt = super::interrupt()?;
        let source = super::data::open(&self.data)?;
        let count = source.cases().len();
        let console = Console::default();
        let packed = AtomicU64::new(0);
        let next = || {
            let n = packed.fetch_add(1, Ordering::Relaxed) + 1;
            console.progress("packing", n, count as u64, "");
            stop(interrupt)
        };
        pack::write(&*source, self.size.into(), &self.out, &next)?;
        drop(console);
        let bytes = std::fs::metadata(&self.out)?.len();
        outln!(
            "{}: {count} cases, {:.1} MB",
            self.out.display(),
            bytes as f64 / 1e6
        );
        Ok(ExitCode::SUCCESS)
    }
}
