//! Data sets, letterboxing, augmentation and phantoms.
