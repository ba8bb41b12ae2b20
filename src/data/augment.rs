//! Random changes to a training image that leave its diagnosis alone.
//!
//! All geometry (flip, rotation, scale, shift, elastic) is one map from output to source pixels, so
//! image and mask are resampled once and by the same map; all photometry (blur, depth gain, speckle,
//! gamma, contrast) follows. The image is never flipped vertically: depth has meaning. Numbers come
//! from [`Philox`] keyed by seed, epoch and sample, so a sample is the same whichever thread makes it.

use serde::{Deserialize, Serialize};

use crate::device::philox::{Draws, Philox};
use crate::error::{Error, Result};

/// How often and how strongly training images are changed. Each `p_*` is a probability in [0, 1];
/// the other values are magnitudes, and 0 switches that change off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentConfig {
    /// Horizontal mirror. Default 0.5.
    pub p_flip: f32,
    /// Rotation, scale and shift together. Default 0.8.
    pub p_affine: f32,
    /// Largest rotation either way, degrees, 0–45. Default 10.
    pub rotation: f32,
    /// Largest enlargement: the factor is log-uniform in 1/(1+scale) to 1+scale, 0–1. Default 0.15.
    pub scale: f32,
    /// Largest shift along each axis, as a part of the image's side, 0–0.5. Default 0.08.
    pub shift: f32,
    /// Smooth random deformation. Default 0.3.
    pub p_elastic: f32,
    /// Cells of the deformation's control grid along each axis, 1–32. Default 4.
    pub elastic_cells: u32,
    /// Largest control displacement as a part of the image's side. Default 0.04; at most
    /// 0.4/`elastic_cells`, below which the map cannot fold (Choi and Lee 2000: 1/2.48).
    pub elastic: f32,
    /// Change of gamma. Default 0.5.
    pub p_gamma: f32,
    /// Largest |ln γ|, 0–1.5. Default 0.35.
    pub gamma: f32,
    /// Change of contrast and brightness together. Default 0.5.
    pub p_contrast: f32,
    /// Largest relative change of contrast about the image's mean, 0–0.9. Default 0.25.
    pub contrast: f32,
    /// Largest change of brightness, full scale being 1, 0–0.5. Default 0.06.
    pub brightness: f32,
    /// Multiplicative, spatially correlated noise. Default 0.3.
    pub p_speckle: f32,
    /// Largest standard deviation of the noise, 0–1. Default 0.2.
    pub speckle: f32,
    /// Largest grain of the noise: σ in pixels of its correlating Gaussian, 0.5–3. Default 1.5.
    pub speckle_grain: f32,
    /// Gaussian blur. Default 0.2.
    pub p_blur: f32,
    /// Largest σ of the blur in pixels, 0–3. Default 1.2.
    pub blur: f32,
    /// Gain that varies with depth. Default 0.3.
    pub p_depth_gain: f32,
    /// Largest coefficient of the gain's linear and quadratic part, 0–0.45. Default 0.25.
    pub depth_gain: f32,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        Self {
            p_flip: 0.5,
            p_affine: 0.8,
            rotation: 10.0,
            scale: 0.15,
            shift: 0.08,
            p_elastic: 0.3,
            elastic_cells: 4,
            elastic: 0.04,
            p_gamma: 0.5,
            gamma: 0.35,
            p_contrast: 0.5,
            contrast: 0.25,
            brightness: 0.06,
            p_speckle: 0.3,
            speckle: 0.2,
            speckle_grain: 1.5,
            p_blur: 0.2,
            blur: 1.2,
            p_depth_gain: 0.3,
            depth_gain: 0.25,
        }
    }
}

impl AugmentConfig {
    /// Changes nothing: every probability 0.
    pub fn identity() -> Self {
        Self {
            p_flip: 0.0,
            p_affine: 0.0,
            p_elastic: 0.0,
            p_gamma: 0.0,
            p_contrast: 0.0,
            p_speckle: 0.0,
            p_blur: 0.0,
            p_depth_gain: 0.0,
            ..Self::default()
        }
    }

    /// Checks every value against its documented range.
    ///
    /// # Errors
    /// [`Error::Argument`] named `augment.KEY` with the range and the value found.
    pub fn validate(&self) -> Result<()> {
        if !(1..=32).contains(&self.elastic_cells) {
            let problem = format!("expected 1 to 32, found {}", self.elastic_cells);
            return Err(Error::argument("augment.elastic_cells", problem));
        }
        for (key, value, low, high) in [
            ("p_flip", self.p_flip, 0.0, 1.0),
            ("p_affine", self.p_affine, 0.0, 1.0),
            ("rotation", self.rotation, 0.0, 45.0),
            ("scale", self.scale, 0.0, 1.0),
            ("shift", self.shift, 0.0, 0.5),
            ("p_elastic", self.p_elastic, 0.0, 1.0),
            (
                "elastic",
                self.elastic,
                0.0,
                0.4 / self.elastic_cells as f32,
            ),
            ("p_gamma", self.p_gamma, 0.0, 1.0),
            ("gamma", self.gamma, 0.0, 1.5),
            ("p_contrast", self.p_contrast, 0.0, 1.0),
            ("contrast", self.contrast, 0.0, 0.9),
            ("brightness", self.brightness, 0.0, 0.5),
            ("p_speckle", self.p_speckle, 0.0, 1.0),
            ("speckle", self.speckle, 0.0, 1.0),
            ("speckle_grain", self.speckle_grain, 0.5, 3.0),
            ("p_blur", self.p_blur, 0.0, 1.0),
            ("blur", self.blur, 0.0, 3.0),
            ("p_depth_gain", self.p_depth_gain, 0.0, 1.0),
            ("depth_gain", self.depth_gain, 0.0, 0.45),
        ] {
            if !(low..=high).contains(&value) {
                let problem = format!("expected {low} to {high}, found {value}");
                return Err(Error::argument(format!("augment.{key}"), problem));
            }
        }
        Ok(())
    }
}

/// What one sample undergoes: [`AugmentConfig`]'s ranges after the dice have fallen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Mirrored left to right.
    pub flip: bool,
    /// Rotation in radians, positive turning x towards y (clockwise on screen).
    pub rotation: f32,
    /// Enlargement.
    pub scale: f32,
    /// Shift in parts of the side, x then y.
    pub shift: [f32; 2],
    /// Largest control displacement in parts of the side.
    pub elastic: f32,
    /// Exponent of intensity.
    pub gamma: f32,
    /// Factor about the image's mean.
    pub contrast: f32,
    /// Added intensity.
    pub brightness: f32,
    /// Standard deviation of the multiplicative noise.
    pub speckle: f32,
    /// σ of the Gaussian that correlates the noise, px.
    pub speckle_grain: f32,
    /// σ of the blur, px.
    pub blur: f32,
    /// Linear and quadratic coefficient of the gain over depth.
    pub depth_gain: [f32; 2],
}

impl Change {
    /// Draws a change. The number of draws does not depend on the configuration, so switching one
    /// kind of change off leaves the others as they were.
    pub fn draw(config: &AugmentConfig, draws: &mut Draws) -> Self {
        let flip = draws.chance(config.p_flip);

        let affine = f32::from(draws.chance(config.p_affine));
        let rotation = affine * draws.between(-1.0, 1.0) * config.rotation.to_radians();
        let scale = (affine * draws.between(-1.0, 1.0) * config.scale.ln_1p()).exp();
        let shift = [(); 2].map(|()| affine * draws.between(-1.0, 1.0) * config.shift);

        let elastic = f32::from(draws.chance(config.p_elastic)) * draws.uniform() * config.elastic;

        let on = f32::from(draws.chance(config.p_gamma));
        let gamma = (on * draws.between(-1.0, 1.0) * config.gamma).exp();

        let on = f32::from(draws.chance(config.p_contrast));
        let contrast = 1.0 + on * draws.between(-1.0, 1.0) * config.contrast;
        let brightness = on * draws.between(-1.0, 1.0) * config.brightness;

        let on = f32::from(draws.chance(config.p_speckle));
        let speckle = on * draws.uniform() * config.speckle;
        let speckle_grain = draws.between(0.5, config.speckle_grain);

        let blur = f32::from(draws.chance(config.p_blur)) * draws.uniform() * config.blur;

        let on = f32::from(draws.chance(config.p_depth_gain));
        let depth_gain = [(); 2].map(|()| on * draws.between(-1.0, 1.0) * config.depth_gain);

        Self {
            flip,
            rotation,
            scale,
            shift,
            elastic,
            gamma,
            contrast,
            brightness,
            speckle,
            speckle_grain,
            blur,
            depth_gain,
        }
    }

    /// The affine part as a map from output to source: `source = a·output + b`, in pixels from the
    /// centre of an image of side `size`; rows of `[a | b]`.
    pub fn matrix(&self, size: usize) -> [[f32; 3]; 2] {
        let (sin, cos) = self.rotation.sin_cos();
        let (sin, cos) = (sin / self.scale, cos / self.scale);
        let mirror = if self.flip { -1.0 } else { 1.0 };
        let [dx, dy] = self.shift.map(|s| s * size as f32);
        [
            [mirror * cos, mirror * sin, -mirror * (cos * dx + sin * dy)],
            [-sin, cos, sin * dx - cos * dy],
        ]
    }

    /// Draws the displacements of the control points, in pixels, after [`Change::draw`] from the same draws.
    pub(super) fn draw_control(&self, size: usize, draws: &mut Draws, control: &mut [[f32; 2]]) {
        let amplitude = self.elastic * size as f32;
        for point in control {
            *point = [(); 2].map(|()| draws.between(-amplitude, amplitude));
        }
    }

    /// The tone curve at multiples of 1/[`TONES`], for an image of brightness `light`. The last entry is never
    /// reached but read.
    pub(super) fn tones(&self, light: Light, tones: &mut [f32; TONES + 2]) {
        let mean = light.mean().powf(self.gamma);
        for (i, tone) in tones.iter_mut().enumerate() {
            let v = i as f32 / TONES as f32;
            let lifted = mean + self.contrast * (v.powf(self.gamma) - mean);
            *tone = (lifted + self.brightness).clamp(0.0, 1.0) * (v / BLACK).min(1.0);
        }
    }

    pub(super) fn moves(&self) -> bool {
        self.flip
            || self.rotation != 0.0
            || self.scale != 1.0
            || self.shift != [0.0; 2]
            || self.elastic != 0.0
    }

    pub(super) fn retones(&self) -> bool {
        self.gamma != 1.0 || self.contrast != 1.0 || self.brightness != 0.0
    }
}

/// Applies changes to samples of one size; owns the scratch, so that nothing is allocated per sample.
#[derive(Clone, Debug)]
pub struct Augmenter {
    config: AugmentConfig,
    size: usize,
    /// Image and mask interleaved, with one pixel of background before and two after each axis, so
    /// that sampling needs no bounds cases.
    padded: Vec<[u8; 2]>,
    /// Where the pixels of one row come from.
    taps: Vec<Tap>,
    spline: Spline,
    blur: Blur,
    noise: Vec<f32>,
    tone: [f32; TONES + 2],
}

/// What of an image's brightness the tone curve needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Light {
    /// Sum of all pixels.
    sum: u64,
    /// Pixels that are not black.
    lit: u64,
}

impl Light {
    pub(super) fn of(image: &[u8]) -> Self {
        // Integers: the sum is exact, and the same however it is vectorised.
        Self {
            sum: image.iter().map(|&v| u64::from(v)).sum(),
            lit: image.iter().map(|&v| u64::from(v > 0)).sum(),
        }
    }

    /// Mean of the pixels that are not black, in [0, 1].
    fn mean(self) -> f32 {
        self.sum as f32 / (255 * self.lit.max(1)) as f32
    }
}

/// Intervals of the tone curve's table.
pub(super) const TONES: usize = 1024;
/// Intensities below this fade to black whatever the tone curve, so letterbox padding stays black.
const BLACK: f32 = 4.0 / 255.0;
/// First block of the noise field; the change and the control grid come from the blocks before.
const NOISE_COUNTER: u64 = 1 << 32;

impl Augmenter {
    /// For samples of `size`×`size`.
    ///
    /// # Errors
    /// As [`AugmentConfig::validate`]; also if `size` is 0.
    pub fn new(config: AugmentConfig, size: usize) -> Result<Self> {
        config.validate()?;
        if size == 0 {
            return Err(Error::argument("size", "expected at least 1, found 0"));
        }
        Ok(Self {
            config,
            size,
            padded: vec![[0; 2]; (size + 3) * (size + 3)],
            taps: vec![Tap::default(); size],
            spline: Spline::new(config.elastic_cells as usize, size),
            blur: Blur::new(size),
            noise: vec![0.0; size * size],
            tone: [0.0; TONES + 2],
        })
    }

    /// The random numbers of sample `index` in `epoch`.
    pub fn key(seed: u64, epoch: u64, index: usize) -> Philox {
        Philox::new(seed, Self::stream(epoch, index))
    }

    /// Their stream under the seed.
    pub(super) fn stream(epoch: u64, index: usize) -> u64 {
        epoch << 32 | index as u64
    }

    /// Writes the changed `image` (8-bit, black to white) and `mask` (8-bit soft, 0 to 255) as
    /// intensities in [0, 1]. All four are row-major `size`×`size`. What comes from outside the
    /// source is 0. Returns the change drawn from `key`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn apply(
        &mut self,
        key: Philox,
        image: &[u8],
        mask: &[u8],
        image_out: &mut [f32],
        mask_out: &mut [f32],
    ) -> Change {
        let pixels = self.size * self.size;
        for length in [image.len(), mask.len(), image_out.len(), mask_out.len()] {
            assert_eq!(length, pixels, "augment: a slice is not size×size");
        }
        let mut draws = key.draws();
        let change = Change::draw(&self.config, &mut draws);
        if change.moves() {
            self.resample(&change, &mut draws, image, mask, image_out, mask_out);
        } else {
            unit(image, image_out);
            unit(mask, mask_out);
        }
        if change.blur > 0.0 {
            let gaussian = Gaussian::new(change.blur);
            self.blur.apply(&gaussian, image_out, Edge::Repeat);
        }
        if change.depth_gain != [0.0; 2] || change.speckle > 0.0 || change.retones() {
            self.photometry(&change, key, image, image_out);
        }
        change
    }

    fn resample(
        &mut self,
        change: &Change,
        draws: &mut Draws,
        image: &[u8],
        mask: &[u8],
        image_out: &mut [f32],
        mask_out: &mut [f32],
    ) {
        let size = self.size;
        let stride = size + 3;
        for (row, (i, m)) in self
            .padded
            .chunks_exact_mut(stride)
            .skip(1)
            .zip(image.chunks_exact(size).zip(mask.chunks_exact(size)))
        {
            for (to, (&i, &m)) in row[1..].iter_mut().zip(i.iter().zip(m)) {
                *to = [i, m];
            }
        }
        let [[a, b, tx], [c, d, ty]] = change.matrix(size);
        let centre = (size - 1) as f32 / 2.0;
        let last = size as f32;
        let elastic = change.elastic > 0.0;
        self.spline.offsets.fill([0.0; 2]);
        if elastic {
            change.draw_control(size, draws, &mut self.spline.control);
        }
        let rows = image_out
            .chunks_exact_mut(size)
            .zip(mask_out.chunks_exact_mut(size));
        for (y, (image_row, mask_row)) in rows.enumerate() {
            if elastic {
                self.spline.row(y);
            }
            // Where to read, then reading: the first loop is arithmetic alone and vectorises.
            let v = y as f32 - centre;
            for (x, (tap, [du, dv])) in self.taps.iter_mut().zip(&self.spline.offsets).enumerate() {
                let (u, v) = (x as f32 - centre + du, v + dv);
                // Beyond the border pixels everything is background.
                let sx = (a * u + b * v + tx + centre).clamp(-1.0, last) + 1.0;
                let sy = (c * u + d * v + ty + centre).clamp(-1.0, last) + 1.0;
                let (column, row) = (sx as i32, sy as i32);
                *tap = Tap {
                    at: (row * stride as i32 + column) as u32,
                    fx: sx - column as f32,
                    fy: sy - row as f32,
                };
            }
            for ((Tap { at, fx, fy }, image_out), mask_out) in
                self.taps.iter().zip(&mut *image_row).zip(&mut *mask_row)
            {
                let at = *at as usize;
                let upper = &self.padded[at..at + 2];
                let lower = &self.padded[at + stride..at + stride + 2];
                let mix = |k: usize| {
                    let [p, q] = [upper[0][k], upper[1][k]].map(f32::from);
                    let [r, s] = [lower[0][k], lower[1][k]].map(f32::from);
                    let (upper, lower) = (p + fx * (q - p), r + fx * (s - r));
                    upper + fy * (lower - upper)
                };
                *image_out = mix(0);
                *mask_out = mix(1);
            }
            for row in [image_row, mask_row] {
                row.iter_mut().for_each(|v| *v /= 255.0);
            }
        }
    }

    fn photometry(&mut self, change: &Change, key: Philox, source: &[u8], image: &mut [f32]) {
        if change.retones() {
            change.tones(Light::of(source), &mut self.tone);
        }
        if change.speckle > 0.0 {
            uniform_noise(key, &mut self.noise);
            let grain = Gaussian::new(change.speckle_grain);
            self.blur.apply(&grain, &mut self.noise, Edge::Wrap);
            let sigma = change.speckle / grain.shrinkage();
            self.noise.iter_mut().for_each(|n| *n = 1.0 + sigma * *n);
        }
        let [linear, quadratic] = change.depth_gain;
        let depth = 2.0 / self.size as f32;
        for (y, (row, noise)) in image
            .chunks_exact_mut(self.size)
            .zip(self.noise.chunks_exact(self.size))
            .enumerate()
        {
            // Legendre polynomials over depth in (−1, 1): the two parts do not mix.
            let t = (y as f32 + 0.5) * depth - 1.0;
            let gain = 1.0 + linear * t + quadratic * (1.5 * t * t - 0.5);
            if change.speckle > 0.0 {
                for (v, n) in row.iter_mut().zip(noise) {
                    *v = (*v * gain * n).clamp(0.0, 1.0);
                }
            } else {
                row.iter_mut()
                    .for_each(|v| *v = (*v * gain).clamp(0.0, 1.0));
            }
            if change.retones() {
                for v in row {
                    let scaled = *v * TONES as f32;
                    let i = scaled as usize;
                    let (low, high) = (self.tone[i], self.tone[i + 1]);
                    *v = low + (scaled - i as f32) * (high - low);
                }
            }
        }
    }
}

/// A point between four pixels: the index of the upper left one, and how far right and down of it.
#[derive(Clone, Copy, Debug, Default)]
struct Tap {
    at: u32,
    fx: f32,
    fy: f32,
}

/// 8-bit to [0, 1]: what augmentation yields for a sample that it leaves alone.
pub fn unit(from: &[u8], to: &mut [f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = f32::from(from) / 255.0;
    }
}

/// White noise of mean 0 and variance 1, uniform in distribution: the blur that follows averages
/// enough pixels to make it nearly normal, and a byte a pixel is all it takes.
fn uniform_noise(key: Philox, noise: &mut [f32]) {
    // Bytes 0..=255 have variance (256² − 1)/12.
    const SD: f32 = 73.900_38;
    for (i, chunk) in noise.chunks_mut(16).enumerate() {
        let block = key.block(NOISE_COUNTER + i as u64);
        let bytes = block.into_iter().flat_map(u32::to_le_bytes);
        for (n, byte) in chunk.iter_mut().zip(bytes) {
            *n = (f32::from(byte) - 127.5) / SD;
        }
    }
}

/// For each of `size` coordinates, its cell of `cells` and the weights of the four control points about it.
pub(super) fn basis(cells: usize, size: usize) -> Vec<(usize, [f32; 4])> {
    (0..size)
        .map(|i| {
            let at = (i as f32 + 0.5) / size as f32 * cells as f32;
            let cell = at as usize;
            let t = at - cell as f32;
            let s = 1.0 - t;
            let weights = [
                s * s * s,
                (3.0 * t - 6.0) * t * t + 4.0,
                (3.0 * s - 6.0) * s * s + 4.0,
                t * t * t,
            ];
            (cell, weights.map(|w| w / 6.0))
        })
        .collect()
}

/// A displacement field: uniform cubic B-splines over a coarse grid of control vectors.
#[derive(Clone, Debug)]
struct Spline {
    cells: usize,
    control: Vec<[f32; 2]>,
    /// As [`basis`] says.
    basis: Vec<(usize, [f32; 4])>,
    /// The control grid collapsed along y at the current row.
    collapsed: Vec<[f32; 2]>,
    /// The current row's displacements.
    offsets: Vec<[f32; 2]>,
}

impl Spline {
    fn new(cells: usize, size: usize) -> Self {
        let points = cells + 3;
        Self {
            cells,
            control: vec![[0.0; 2]; points * points],
            basis: basis(cells, size),
            collapsed: vec![[0.0; 2]; points],
            offsets: vec![[0.0; 2]; size],
        }
    }

    /// Fills `offsets` for row `y`.
    fn row(&mut self, y: usize) {
        let points = self.cells + 3;
        let (cell, weights) = self.basis[y];
        let rows = &self.control[cell * points..(cell + 4) * points];
        for (x, out) in self.collapsed.iter_mut().enumerate() {
            *out = blend(weights, [0, 1, 2, 3].map(|k| rows[k * points + x]));
        }
        for (out, &(cell, weights)) in self.offsets.iter_mut().zip(&self.basis) {
            let four = &self.collapsed[cell..cell + 4];
            *out = blend(weights, [four[0], four[1], four[2], four[3]]);
        }
    }
}

#[inline(always)]
fn blend(weights: [f32; 4], points: [[f32; 2]; 4]) -> [f32; 2] {
    let mut sum = [0.0; 2];
    for (w, [x, y]) in weights.into_iter().zip(points) {
        sum = [sum[0] + w * x, sum[1] + w * y];
    }
    sum
}

/// Separable Gaussian blur of a square image in place.
#[derive(Clone, Debug)]
struct Blur {
    size: usize,
    line: Vec<f32>,
    rows: Vec<f32>,
}

/// Taps on either side of the largest Gaussian (σ = 3).
pub(super) const RADIUS: usize = 8;

/// The taps of a Gaussian filter, which add up to 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gaussian {
    /// Taps on either side.
    pub radius: usize,
    /// The first 2·radius + 1 of them count.
    pub taps: [f32; 2 * RADIUS + 1],
}

impl Gaussian {
    /// With standard deviation `sigma`, in (0, 3] px.
    pub(super) fn new(sigma: f32) -> Self {
        let radius = ((2.7 * sigma).ceil() as usize).min(RADIUS);
        let mut all = [0.0; 2 * RADIUS + 1];
        let taps = &mut all[..=2 * radius];
        for (k, tap) in taps.iter_mut().enumerate() {
            let d = (k as f32 - radius as f32) / sigma;
            *tap = (-0.5 * d * d).exp();
        }
        let sum: f32 = taps.iter().sum();
        taps.iter_mut().for_each(|tap| *tap /= sum);
        Self { radius, taps: all }
    }

    fn taps(&self) -> &[f32] {
        &self.taps[..=2 * self.radius]
    }

    /// The factor by which the filter, applied along both axes, shrinks the standard deviation of white noise.
    pub(super) fn shrinkage(&self) -> f32 {
        self.taps().iter().map(|tap| tap * tap).sum()
    }
}

impl Blur {
    fn new(size: usize) -> Self {
        Self {
            size,
            line: vec![0.0; size + 2 * RADIUS],
            rows: vec![0.0; size * size],
        }
    }

    fn apply(&mut self, gaussian: &Gaussian, image: &mut [f32], edge: Edge) {
        let (size, radius, taps) = (self.size, gaussian.radius, gaussian.taps());
        let at = |i: usize, k: usize| edge.pixel(i as isize + k as isize - radius as isize, size);
        let line = &mut self.line[..size + 2 * radius];
        for (row, out) in image.chunks(size).zip(self.rows.chunks_mut(size)) {
            line[radius..radius + size].copy_from_slice(row);
            for i in 0..radius {
                line[i] = row[at(0, i)];
                line[radius + size + i] = row[at(size, radius + i)];
            }
            out.fill(0.0);
            for (k, &tap) in taps.iter().enumerate() {
                accumulate(tap, &line[k..k + size], out);
            }
        }
        for (y, out) in image.chunks_mut(size).enumerate() {
            out.fill(0.0);
            for (k, &tap) in taps.iter().enumerate() {
                let row = at(y, k) * size;
                accumulate(tap, &self.rows[row..row + size], out);
            }
        }
    }
}

/// What lies beyond the border of a blurred image.
#[derive(Clone, Copy, Debug)]
enum Edge {
    /// The border pixel, repeated.
    Repeat,
    /// The opposite side, which keeps noise stationary.
    Wrap,
}

impl Edge {
    fn pixel(self, i: isize, size: usize) -> usize {
        match self {
            Edge::Repeat => i.clamp(0, size as isize - 1) as usize,
            Edge::Wrap => i.rem_euclid(size as isize) as usize,
        }
    }
}

fn accumulate(factor: f32, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}
