//! `echograd pack`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use super::SIZE_RANGE;
use super::progress::Progress;
use crate::data::pack;

/// Pack a data set into one small file: letterboxed 8-bit images, masks at original size, labels
///
/// The file is read back with --data pack:FILE. It keeps patients, pixel sizes, original sizes, the SHA-256 of every source image
/// and the list of what was left out.
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
    /// If the data cannot be read or the file cannot be written.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let source = super::data::open(&self.data)?;
        let count = source.cases().len();
        let progress = Mutex::new((Progress::new("packing", count as u64), 0));
        let done = || {
            let mut guard = progress.lock().expect("no panic while counting");
            guard.1 += 1;
            let n = guard.1;
            guard.0.set(n, "");
        };
        pack::write(&*source, self.size.into(), &self.out, &done)?;
        drop(progress);
        let bytes = std::fs::metadata(&self.out)?.len();
        println!(
            "{}: {count} cases, {:.1} MB",
            self.out.display(),
            bytes as f64 / 1e6
        );
        Ok(ExitCode::SUCCESS)
    }
}
