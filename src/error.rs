//! The one error type of the library: each variant names the file, argument or operation at fault,
//! what was expected and what was found, so that the command line can print it as it is.

use std::path::{Path, PathBuf};

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Everything that can go wrong for a reason a user can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that is missing, unreadable, malformed or not writable.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected and what was found.
        problem: String,
        /// The underlying failure, if another library reported one.
        #[source]
        source: Option<Cause>,
    },
    /// A flag, configuration key or function argument outside its domain.
    #[error("{name}: {problem}")]
    Argument {
        /// The flag (`--size`), key (`train.epochs`) or parameter.
        name: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// Shapes that an operation cannot combine.
    #[error("{op}: {problem}")]
    Shape {
        /// The operation's registry name.
        op: &'static str,
        /// What was expected and what was found.
        problem: String,
    },
    /// A device that is missing or refuses, or a kernel at fault.
    #[error("{name}: {problem}")]
    Device {
        /// The device (`cuda`, `emulator`) or the kernel.
        name: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// An operation that GPUs have no kernel for yet.
    #[error("{op}: has no CUDA kernel yet; use --device cpu")]
    NoKernel {
        /// The operation's name.
        op: &'static str,
    },
    /// A NaN or infinity that appeared during a training step.
    #[error("non-finite value at step {step}, first in {tensor} (images: {})", images.join(", "))]
    NonFinite {
        /// The training step, counted from 1.
        step: u64,
        /// The tensor in which it first appeared, in tape order.
        tensor: String,
        /// The images of the batch.
        images: Vec<String>,
    },
    /// Ctrl-C or a termination signal arrived; everything worth keeping was saved.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// A [`Error::File`] without an underlying cause.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::File {
            path: path.as_ref().to_owned(),
            problem: problem.into(),
            source: None,
        }
    }

    /// A [`Error::File`] that keeps the failure another library reported.
    pub fn caused(
        path: impl AsRef<Path>,
        problem: impl Into<String>,
        source: impl Into<Cause>,
    ) -> Self {
        Self::File {
            path: path.as_ref().to_owned(),
            problem: problem.into(),
            source: Some(source.into()),
        }
    }

    /// An [`Error::Argument`].
    pub fn argument(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Argument {
            name: name.into(),
            problem: problem.into(),
        }
    }

    /// An [`Error::Device`].
    pub fn device(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Device {
            name: name.into(),
            problem: problem.into(),
        }
    }

    /// An [`Error::Shape`].
    pub fn shape(op: &'static str, problem: impl Into<String>) -> Self {
        Self::Shape {
            op,
            problem: problem.into(),
        }
    }
}
