//! echograd: multi-task breast-ultrasound training in Rust.
#![warn(missing_docs)]

pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod features;
pub mod gradcheck;
pub mod loss;
pub mod metrics;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod report;
pub mod tape;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
