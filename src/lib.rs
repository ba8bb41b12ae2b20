//! echograd trains networks that outline a breast tumour in ultrasound and call it benign or
//! malignant, with both tasks tied together by four differentiable shape features after the
//! BI-RADS lexicon; it tests them on data of other hospitals. The README says what for, and what the
//! program does; this page is the map of the code.
//!
//! # One sentence
//!
//! A training step is recorded once as a tape of hand-written operations, its memory is planned, and
//! it is replayed on the processor or a GPU; every operation carries its own hand-derived backward, checked
//! against finite differences.
//!
//! # Rooms
//!
//! From the ground up. [`tape`], [`device`], [`ops`] and [`gradcheck`] make up the engine and know each
//! other; otherwise a room depends only on those above it.
//!
//! | room | what is in it |
//! |---|---|
//! | [`error`], [`tensor`] | the error type; shapes (N×H×W×C) and element types (`f32`, `f64`) |
//! | [`tape`] | record → backward → plan → replay; read it first |
//! | [`device`] | what a plan runs on: the CPU session, GPUs (driver or emulator), vector lanes with run-time dispatch, counter-based random numbers |
//! | [`ops`] | one room per operation: shape rule, cost, CPU kernel, backward, random test cases; and the registry of all |
//! | [`gradcheck`] | every registered backward against finite differences |
//! | [`features`] | the shape features and the malignancy prior φ as mathematics on slices |
//! | [`nn`], [`loss`], [`optim`] | networks, the loss of the four arms, AdamW: what records operations on a tape |
//! | [`data`] | readers of the data sets, letterboxing, folds, augmentation, batches, phantoms |
//! | [`metrics`] | segmentation and classification metrics with their statistics |
//! | [`train`] | configuration, the training loop, checkpoints, evaluation, prediction |
//! | [`profile`] | time of each step of a plan beside its bytes, its arithmetic and the machine's best |
//! | [`report`] | self-contained HTML pages and their plots |
//! | [`study`] | several methods on several data sets, their statistics and report; searches, comparisons of runs |
//! | [`cli`] | the commands of the program, one file each |
//!
//! # Three ideas that hold everywhere
//!
//! **Recorded once.** Shapes are inferred and memory is laid out before the first step; a replay
//! allocates nothing. What changes from step to step (learning rate, step number, ramp) is an input,
//! [`ops::control`].
//!
//! **Generic over the element.** Every kernel is written once for `f32` and `f64`: the code that
//! trains in `f32` is the code that is differentiated numerically in `f64`.
//!
//! **Deterministic.** Work is split into pieces of fixed size and partial sums are added in a fixed
//! order; random numbers are keyed by seed, step and element. The same seed on the same instruction set
//! gives the same bits at any number of threads, and a resumed run equals an uninterrupted one.
//!
//! # Example
//!
//! ```
//! use echograd::device::cpu::Session;
//! use echograd::ops::{conv2d::Conv2d, losses::Mse};
//! use echograd::tape::{Options, Plan, Tape};
//! use echograd::tensor::Shape;
//!
//! // One 3×3 convolution of a 1×8×8×1 image to 4 channels, compared with a target.
//! let mut tape = Tape::new();
//! let image = tape.input("image", Shape::new(1, 8, 8, 1));
//! let target = tape.input("target", Shape::new(1, 8, 8, 4));
//! let weight = tape.parameter("weight", Shape::new(4, 3, 3, 1));
//! let output = tape.push(Conv2d::new(1, 1), &[image, weight])?;
//! let loss = tape.push(Mse, &[output, target])?;
//! let gradient = tape.backward(loss, &[weight])?[0].expect("the loss depends on the weight");
//! tape.keep(gradient);
//!
//! let plan = Plan::new(&tape, Options::default())?;
//! println!("{plan}"); // every step with its shape, memory and arithmetic
//! let mut session = Session::<f32>::new(plan)?;
//! session.write(image, &[1.0; 64]);
//! session.write(target, &[1.0; 256]);
//! session.run();
//! assert!(session.read(gradient).iter().all(|g| *g < 0.0));
//! # Ok::<(), echograd::Error>(())
//! ```
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
pub mod profile;
pub mod report;
pub mod study;
pub mod tape;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
