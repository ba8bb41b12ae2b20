//! Data sets, letterboxing, augmentation and phantoms.

pub mod augment;
pub mod loader;
