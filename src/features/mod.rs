//! Four shape features of a soft lesion mask, after the BI-RADS lexicon, and the malignancy prior φ
//! composed of them.
//!
//! The idea of tying a segmentation and a malignancy head together through differentiable BI-RADS
//! features is that of Zhang, Moradi and Saha (arXiv 2511.15968). The formulas of that paper are not
//! public; the ones here are this project's own reading, chosen so that every feature is bounded,
//! smooth in every pixel, and grows with suspicion:
//!
//! | feature | BI-RADS descriptor | formula | range |
//! |---|---|---|---|
//! | irregularity | shape: irregular | `(P² − 4πS₂) / (P² + 4πS₂)` | (−1, 1), 0 for a disc |
//! | orientation | orientation: not parallel | `(cyy − cxx) / (cyy + cxx)` | (−1, 1) |
//! | margin | margin: not circumscribed | `(P − Pₑ) / (P + Pₑ)` | (−1, 1), 0 for an ellipse |
//! | roundness | shape: oval to round | `ρ = 2√det c / tr c` | (0, 1] |
//!
//! `S₂` is the sum of squared mask values, `P` the soft [`perimeter()`], `c` the covariance of the
//! mask's mass ([`Moments`]) and `Pₑ` the perimeter of the ellipse with that covariance. Coordinates
//! are in pixels, `x` to the right and `y` deeper into tissue, both from the image's centre.
//!
//! An image whose mask has an area below [`MEASURABLE_AREA`] shows no measurable lesion: it has no
//! features and passes no gradient.
//!
//! This module is the mathematics on slices, generic over the element type; `ops` makes tape
//! operations of it.
//!
//! ```
//! use echograd::features::{MaskSums, Prior};
//!
//! // A disc of radius 20 in a 64×64 frame.
//! let mask: Vec<f32> = (0..64 * 64)
//!     .map(|i| ((i % 64) as f32 - 31.5, (i / 64) as f32 - 31.5))
//!     .map(|(x, y)| if x * x + y * y < 400.0 { 1.0 } else { 0.0 })
//!     .collect();
//! let features = MaskSums::of(&mask, 64).features().expect("large enough to measure");
//! assert!(features.irregularity < 0.04 && features.roundness > 0.99);
//! assert!(MaskSums::of(&[0.0_f32; 64 * 64], 64).features().is_none());
//! ```

mod moments;
mod perimeter;
mod prior;
mod shape;

pub use moments::Moments;
pub use perimeter::{EPSILON, perimeter, perimeter_backward};
pub use prior::{FitOptions, Prior, Start};
pub use shape::{MEASURABLE_AREA, MaskSums, ShapeFeatures};
