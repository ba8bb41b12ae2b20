//! Letterboxing: an image of any size, centred in a square without distortion, and the way back.
//!
//! Aspect is kept because "taller than wide" means something in an ultrasound image. Resampling is
//! separable with a triangle filter whose support grows with the reduction, so that shrinking is
//! antialiased (this is Pillow's `BILINEAR`); enlarging is plain bilinear interpolation with pixel
//! centres at half-integers (`align_corners = false`), the border pixel repeated beyond the edge.
//!
//! ```
//! use echograd::data::{image::Gray, letterbox::Letterbox};
//!
//! let scan = Gray { width: 800, height: 600, pixels: vec![255; 800 * 600] };
//! let letterbox = Letterbox::new(scan.width, scan.height, 256);
//! assert_eq!((letterbox.content_width, letterbox.content_height), (256, 192));
//! assert_eq!((letterbox.left, letterbox.top), (0, 32));
//!
//! let square = letterbox.forward(&scan); // 256 × 256, what a network reads
//! assert_eq!(square[0], 0.0); // padding
//! let map = letterbox.inverse(&square); // 600 × 800, where metrics are measured
//! assert_eq!(map.len(), 800 * 600);
//! ```

use super::image::Gray;

/// Where an image of `width × height` lies in a square of side `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Letterbox {
    /// Side of the square.
    pub size: usize,
    /// Columns of the original.
    pub width: usize,
    /// Rows of the original.
    pub height: usize,
    /// Columns of the content inside the square.
    pub content_width: usize,
    /// Rows of the content inside the square.
    pub content_height: usize,
    /// First column of the content.
    pub left: usize,
    /// First row of the content.
    pub top: usize,
}

impl Letterbox {
    /// The longer side fills the square; the shorter is rounded to the nearest pixel (halves up, at
    /// least 1), so aspect is kept to within half a pixel. An odd remainder of the padding goes to
    /// the right and the bottom.
    ///
    /// # Panics
    /// If a size is zero.
    pub fn new(width: usize, height: usize, size: usize) -> Self {
        assert!(width > 0 && height > 0 && size > 0, "empty letterbox");
        let longer = width.max(height);
        let scaled = |side: usize| ((2 * side * size + longer) / (2 * longer)).max(1);
        let (content_width, content_height) = (scaled(width), scaled(height));
        Self {
            size,
            width,
            height,
            content_width,
            content_height,
            left: (size - content_width) / 2,
            top: (size - content_height) / 2,
        }
    }

    /// Letterboxed pixels per original pixel, `size / max(width, height)`.
    pub fn scale(&self) -> f64 {
        self.size as f64 / self.width.max(self.height) as f64
    }

    /// The image in the square: `size × size` values in [0, 1], zero outside the content.
    ///
    /// # Panics
    /// If `image` has another size than this letterbox was made for.
    pub fn forward(&self, image: &Gray) -> Vec<f32> {
        assert_eq!((image.width, image.height), (self.width, self.height));
        let unit: Vec<f32> = image.pixels.iter().map(|&v| f32::from(v) / 255.0).collect();
        let content = resample(
            &unit,
            (self.width, self.height),
            (self.content_width, self.content_height),
        );
        let mut square = vec![0.0; self.size * self.size];
        for (y, row) in content.chunks_exact(self.content_width).enumerate() {
            let start = (self.top + y) * self.size + self.left;
            for (out, &v) in square[start..][..self.content_width].iter_mut().zip(row) {
                // Weights sum to one up to rounding.
                *out = v.clamp(0.0, 1.0);
            }
        }
        square
    }

    /// The content of a square map (probabilities or logits) at the original's resolution:
    /// `height × width` values.
    ///
    /// # Panics
    /// If `map` does not hold `size · size` values.
    pub fn inverse(&self, map: &[f32]) -> Vec<f32> {
        assert_eq!(map.len(), self.size * self.size);
        let content: Vec<f32> = map
            .chunks_exact(self.size)
            .skip(self.top)
            .take(self.content_height)
            .flat_map(|row| &row[self.left..][..self.content_width])
            .copied()
            .collect();
        resample(
            &content,
            (self.content_width, self.content_height),
            (self.width, self.height),
        )
    }
}

/// Values in [0, 1] as bytes, rounded to the nearest.
pub fn quantise(values: &[f32]) -> Vec<u8> {
    values.iter().map(|&v| (v * 255.0 + 0.5) as u8).collect()
}

/// Resamples a `from.1 × from.0` (rows × columns) map to `to`, columns first.
fn resample(source: &[f32], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
    let columns = Taps::new(from.0, to.0);
    let rows = Taps::new(from.1, to.1);
    let mut narrow = Vec::with_capacity(to.0 * from.1);
    for row in source.chunks_exact(from.0) {
        narrow.extend(columns.iter().map(|(first, weights)| {
            let window = &row[first..first + weights.len()];
            window
                .iter()
                .zip(weights)
                .map(|(&v, &w)| v * w)
                .sum::<f32>()
        }));
    }
    let mut out = vec![0.0; to.0 * to.1];
    for (row, (first, weights)) in out.chunks_exact_mut(to.0).zip(rows.iter()) {
        for (k, &w) in weights.iter().enumerate() {
            let source = &narrow[(first + k) * to.0..][..to.0];
            for (o, &v) in row.iter_mut().zip(source) {
                *o += v * w;
            }
        }
    }
    out
}

/// For every output position, the first input position and the weights from there on.
struct Taps {
    first: Vec<usize>,
    /// `weights[ends[i - 1]..ends[i]]` belong to output `i`.
    ends: Vec<usize>,
    weights: Vec<f32>,
}

impl Taps {
    fn new(from: usize, to: usize) -> Self {
        let step = from as f64 / to as f64;
        let support = step.max(1.0);
        let (mut first, mut ends, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..to {
            let centre = (i as f64 + 0.5) * step;
            let low = (centre - support + 0.5).floor().max(0.0) as usize;
            let high = ((centre + support + 0.5).floor() as usize).min(from);
            let triangle = |j: usize| (1.0 - ((j as f64 + 0.5 - centre) / support).abs()).max(0.0);
            let total: f64 = (low..high).map(triangle).sum();
            first.push(low);
            weights.extend((low..high).map(|j| (triangle(j) / total) as f32));
            ends.push(weights.len());
        }
        Self {
            first,
            ends,
            weights,
        }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[f32])> {
        let mut start = 0;
        self.first
            .iter()
            .zip(&self.ends)
            .map(move |(&first, &end)| {
                let weights = &self.weights[start..end];
                start = end;
                (first, weights)
            })
    }
}
