//! The CUDA compiler of a machine: looked for when the crate is built, and by `echograd doctor`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An nvcc that runs.
pub struct Nvcc {
    pub path: PathBuf,
    /// Its version, `(13, 0)`.
    pub version: (u32, u32),
    /// What `--list-gpu-code` says.
    known: String,
}

impl Nvcc {
    /// The nvcc of `ECHOGRAD_NVCC` (a path; empty for none), `CUDA_HOME` or `PATH`.
    ///
    /// # Errors
    /// The path and what is wrong with it, if it does not run.
    pub fn find() -> Option<Result<Self, (PathBuf, String)>> {
        let path = match env::var_os("ECHOGRAD_NVCC") {
            Some(path) => (!path.is_empty()).then(|| path.into()),
            None => {
                let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
                let path = env::var_os("PATH").unwrap_or_default();
                home.into_iter()
                    .chain(env::split_paths(&path))
                    .map(|folder| folder.join(if cfg!(windows) { "nvcc.exe" } else { "nvcc" }))
                    .find(|nvcc| nvcc.is_file())
            }
        }?;
        let found = Self::ask(&path);
        Some(found.map_err(|problem| (path, problem)))
    }

    fn ask(path: &Path) -> Result<Self, String> {
        let ask = |question: &str| {
            let answer = Command::new(path).arg(question).output();
            let answer = answer.map_err(|e| e.to_string())?;
            Ok::<_, String>(String::from_utf8_lossy(&answer.stdout).into_owned())
        };
        Ok(Self {
            path: path.to_owned(),
            version: version(&ask("--version")?).ok_or("tells no version")?,
            known: ask("--list-gpu-code")?,
        })
    }

    /// Whether it makes machine code for an architecture: `90` or `90a` for compute capability 9.0.
    pub fn knows(&self, architecture: &str) -> bool {
        let base = format!("sm_{}", architecture.trim_end_matches('a'));
        self.known.lines().any(|line| line.trim() == base)
    }
}

/// The version in "Cuda compilation tools, release 13.0, V13.0.88".
fn version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("release ")?;
    let (major, rest) = rest.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
