//! From tissue to picture: what a pulse-echo scanner makes of it.
//!
//! The received signal is simulated as complex baseband (IQ), which is the radio-frequency line after
//! demodulation at the carrier: unresolved scatterers become circular Gaussian noise with the tissue's
//! backscatter as variance, specular interfaces a coherent part beside it (so the envelope is Rician).
//! The field is attenuated along each beam, convolved with a pulse along the beam and with a beam
//! profile across it that widens away from the focus, joined by receiver noise which the depth gain lifts,
//! detected, averaged over looks (spatial compounding), log-compressed, and scan-converted.
//! See Szabo, "Diagnostic Ultrasound Imaging: Inside Out", chapters 8 to 10.

use super::tissue::{Echo, Tissue};
use crate::device::philox::{Draws, Philox};

/// A scanner's and a site's settings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scanner {
    /// Image, px.
    pub width: usize,
    pub height: usize,
    /// Depth shown, mm, from and to.
    pub depth: [f32; 2],
    /// Half the angle of a sector in radians; 0 for a linear array.
    pub sector: f32,
    /// Carrier, MHz.
    pub frequency: f32,
    /// Cycles in the pulse.
    pub cycles: f32,
    /// Aperture's focal length over its width.
    pub f_number: f32,
    /// Transmit focus as a part of the depth.
    pub focus: f32,
    /// Frames compounded.
    pub looks: usize,
    /// Shown range, dB.
    pub dynamic_range: f32,
    /// Level shown as white, dB relative to bright glandular tissue.
    pub white: f32,
    /// Exponent of the grey map.
    pub grey_map: f32,
    /// Strength of the edge filter.
    pub sharpen: f32,
    /// Receiver noise at the skin, dB.
    pub noise: f32,
    /// Uncompensated loss, dB for a mm.
    pub loss: f32,
    /// Amplitude of reverberation between skin and transducer.
    pub reverberation: f32,
}

/// One patient seen by one scanner: grey levels and lesion mask, both row-major.
pub(super) struct Frame {
    pub pixels: Vec<u8>,
    pub mask: Vec<bool>,
    /// Pixel of the lesion's extremes, for calipers: left, right, top, bottom.
    pub lesion_box: Option<[usize; 4]>,
}

/// How beams run: parallel, or fanning out from a virtual apex behind a flat aperture.
#[derive(Clone, Copy)]
struct Geometry {
    width: f32,
    depth: f32,
    /// Distance of the apex behind the skin, mm.
    apex: Option<f32>,
    /// Half the aperture, mm.
    aperture: f32,
}

impl Geometry {
    fn new(width: f32, depth: f32, sector: f32) -> Self {
        let half = width / 2.0;
        if sector == 0.0 {
            return Self {
                width,
                depth,
                apex: None,
                aperture: half,
            };
        }
        // The outer beams reach the image's lower corners.
        let aperture = half - depth * sector.sin();
        Self {
            width,
            depth,
            apex: Some(aperture / sector.tan()),
            aperture,
        }
    }

    /// Image point of `beam` in (−1, 1) at `range` mm.
    fn point(&self, beam: f32, range: f32) -> [f32; 2] {
        let from = beam * self.aperture;
        let centre = self.width / 2.0;
        match self.apex {
            None => [centre + from, range],
            Some(apex) => {
                let norm = from.hypot(apex);
                [centre + from + range * from / norm, range * apex / norm]
            }
        }
    }

    /// Beam and range of an image point; `None` outside the field of view.
    fn beam(&self, x: f32, z: f32) -> Option<[f32; 2]> {
        let x = x - self.width / 2.0;
        let [from, range] = match self.apex {
            None => [x, z],
            Some(apex) => {
                let from = x * apex / (z + apex);
                [from, z * from.hypot(apex) / apex]
            }
        };
        let beam = from / self.aperture;
        (beam.abs() <= 1.0 && range < self.depth).then_some([beam, range])
    }
}

/// How the operator holds the probe and sets the sliders.
#[derive(Clone, Copy, Default)]
struct Contact {
    /// Amplitude in dB and phase of a smooth loss across the aperture.
    uneven: [f32; 2],
    /// Loss at a lifted end, dB, and which end: −1 or 1.
    lifted: [f32; 2],
    /// Depth gain that does not match the tissue, dB.
    mistuned: [f32; 2],
}

impl Contact {
    fn draw(draws: &mut Draws) -> Self {
        let lifts = f32::from(draws.chance(0.25));
        Self {
            uneven: [draws.between(0.0, 0.8), draws.between(0.0, 6.0)],
            lifted: [
                lifts * draws.between(6.0, 18.0),
                if draws.chance(0.5) { 1.0 } else { -1.0 },
            ],
            mistuned: [draws.between(-2.5, 2.5), draws.between(-2.5, 2.5)],
        }
    }

    /// dB lost by `beam` in (−1, 1) at the skin.
    fn loss(&self, beam: f32) -> f32 {
        let [amplitude, phase] = self.uneven;
        let wave = (phase + 9.0 * beam).sin() + (2.3 * phase + 23.0 * beam).sin();
        let [lifted, end] = self.lifted;
        let off = ((end * beam - 0.82) / 0.1).clamp(0.0, 1.0);
        amplitude * wave + lifted * off * off
    }

    /// dB gained at the part `t` of the depth.
    fn gain(&self, t: f32) -> f32 {
        self.mistuned[0] * (5.0 * t).sin() + self.mistuned[1] * (2.0 * t - 1.0)
    }
}

fn amplitude(db: f32) -> f32 {
    (db * (std::f32::consts::LN_10 / 20.0)).exp()
}

impl Scanner {
    /// Width and depth of the image in mm when `depth` is shown.
    pub fn field_of_view(&self, depth: f32) -> [f32; 2] {
        [depth * self.width as f32 / self.height as f32, depth]
    }

    /// How much of the image, in mm from either side, no beam reaches at depth `z`.
    pub fn hidden(&self, [width, depth]: [f32; 2], z: f32) -> f32 {
        let geometry = Geometry::new(width, depth, self.sector);
        geometry.apex.map_or(0.0, |apex| {
            width / 2.0 - geometry.aperture * (1.0 + z / apex)
        })
    }

    /// Scans `tissue` to the given depth.
    pub fn scan(&self, key: Philox, draws: &mut Draws, depth: f32, tissue: &Tissue) -> Frame {
        let pixel = depth / self.height as f32;
        let [width, _] = self.field_of_view(depth);
        let geometry = Geometry::new(width, depth, self.sector);
        // One beam a pixel at the skin suffices: the beam is wider than that.
        let (beams, ranges) = (self.width, self.height);
        let contact = Contact::draw(draws);
        let envelope = self.envelope(key, &contact, &geometry, |x, z| tissue.echo(x, z));
        let levels = self.compress(&envelope, beams, ranges);

        let mut pixels = vec![0; self.width * self.height];
        let mut mask = vec![false; self.width * self.height];
        let mut extremes: Option<[usize; 4]> = None;
        for y in 0..self.height {
            for x in 0..self.width {
                let (mm_x, mm_z) = ((x as f32 + 0.5) * pixel, (y as f32 + 0.5) * pixel);
                let Some([beam, range]) = geometry.beam(mm_x, mm_z) else {
                    continue;
                };
                let i = y * self.width + x;
                let level = if geometry.apex.is_none() {
                    levels[i]
                } else {
                    bilinear(&levels, beams, ranges, (beam + 1.0) / 2.0, range / depth)
                };
                pixels[i] = (255.0 * level).round() as u8;
                if tissue.is_lesion(mm_x, mm_z) {
                    mask[i] = true;
                    let [left, right, top, bottom] = extremes.unwrap_or([x, x, y, y]);
                    extremes = Some([left.min(x), right.max(x), top.min(y), bottom.max(y)]);
                }
            }
        }
        Frame {
            pixels,
            mask,
            lesion_box: extremes,
        }
    }

    /// Envelope over range × beam, 1 being bright glandular tissue.
    fn envelope(
        &self,
        key: Philox,
        contact: &Contact,
        geometry: &Geometry,
        tissue: impl Fn(f32, f32) -> Echo,
    ) -> Vec<f32> {
        let (beams, ranges) = (self.width, self.height);
        let step = geometry.depth / ranges as f32;
        let wavelength = 1.54 / self.frequency;
        let mut lost: Vec<f32> = (0..beams)
            .map(|i| contact.loss((i as f32 + 0.5) / beams as f32 * 2.0 - 1.0))
            .collect();

        let mut diffuse = vec![0.0; beams * ranges];
        let mut specular = vec![0.0; beams * ranges];
        let mut smoothed = vec![0.0; beams];
        for y in 0..ranges {
            let range = (y as f32 + 0.5) * step;
            let gain = contact.gain(range / geometry.depth) - self.loss * range;
            let row = y * beams..(y + 1) * beams;
            let (diffuse, specular) = (&mut diffuse[row.clone()], &mut specular[row]);
            for x in 0..beams {
                let beam = (x as f32 + 0.5) / beams as f32 * 2.0 - 1.0;
                let [px, pz] = geometry.point(beam, range);
                let echo = tissue(px, pz);
                let near = self.reverberation * reverberation(range, px);
                let passed = gain - lost[x];
                // An interface is rough: part of its echo is speckle too.
                let passed = amplitude(passed);
                let rough = 0.8 * echo.specular;
                diffuse[x] = passed * amplitude(echo.level).hypot(rough);
                specular[x] = passed * 0.16 * echo.specular + near;
                lost[x] += echo.loss * step;
            }
            // Shadows soften with depth: each beam's aperture sees its neighbours' paths.
            for x in 0..beams {
                let (left, right) = (lost[x.saturating_sub(1)], lost[(x + 1).min(beams - 1)]);
                smoothed[x] = 0.7 * lost[x] + 0.15 * (left + right);
            }
            std::mem::swap(&mut lost, &mut smoothed);
        }

        let axial = kernel(0.3 * self.cycles * wavelength / step);
        let lateral_step = 2.0 * geometry.aperture / beams as f32;
        let across: Vec<Kernel> = (0..ranges)
            .map(|y| {
                let range = (y as f32 + 0.5) * step;
                let focus = self.focus * geometry.depth;
                let spread = (range - focus) / (4.0 * wavelength * self.f_number * self.f_number);
                let waist = 0.45 * wavelength * self.f_number;
                let fanned = geometry.apex.map_or(1.0, |apex| (apex + range) / apex);
                let sigma = waist * (1.0 + 0.05 * spread * spread).sqrt();
                kernel(sigma / (lateral_step * fanned))
            })
            .collect();

        // The depth gain lifts the receiver's noise by what tissue is expected to attenuate.
        let floor: Vec<f32> = (0..ranges)
            .map(|y| amplitude(self.noise + 0.11 * self.frequency * (y as f32 + 0.5) * step))
            .collect();

        let mut envelope = vec![0.0; beams * ranges];
        let mut part = vec![0.0; beams * ranges];
        let mut power = vec![0.0; beams * ranges];
        let mut scratch = Convolution::new(beams, ranges);
        for look in 0..self.looks {
            power.fill(0.0);
            for quadrature in 0..2 {
                let seed = (2 * look + quadrature) as u64;
                white(key, 2 * seed, &mut part);
                for ((part, diffuse), specular) in part.iter_mut().zip(&diffuse).zip(&specular) {
                    // The coherent part is in phase.
                    let coherent = if quadrature == 0 { *specular } else { 0.0 };
                    *part = *part * diffuse + coherent;
                }
                scratch.rows(&part, &across);
                // The receiver adds its noise before the pulse's matched filter.
                white(key, 2 * seed + 1, &mut part);
                for ((row, noise), floor) in scratch
                    .plane
                    .chunks_exact_mut(beams)
                    .zip(part.chunks_exact(beams))
                    .zip(&floor)
                {
                    // Scan lines are fewer than pixels: neighbours share their noise.
                    accumulate(0.7 * floor, noise, row);
                    accumulate(0.5 * floor, &noise[1..], row);
                    accumulate(0.5 * floor, noise, &mut row[1..]);
                }
                scratch.columns(&mut part, &axial);
                for (power, v) in power.iter_mut().zip(&part) {
                    *power += v * v;
                }
            }
            for (envelope, power) in envelope.iter_mut().zip(&power) {
                *envelope += power.sqrt() / self.looks as f32;
            }
        }
        envelope
    }

    /// Grey level in [0, 1]: logarithm, edge filter, grey map.
    fn compress(&self, envelope: &[f32], beams: usize, ranges: usize) -> Vec<f32> {
        let black = self.white - self.dynamic_range;
        let mut levels: Vec<f32> = envelope
            .iter()
            .map(|&e| (8.685_89 * e.max(1e-9).ln() - black) / self.dynamic_range)
            .collect();
        if self.sharpen > 0.0 {
            let mut smooth = levels.clone();
            let wide = kernel_of_unit_sum(2.0);
            let mut scratch = Convolution::new(beams, ranges);
            scratch.rows(&smooth, &vec![wide; ranges]);
            scratch.columns(&mut smooth, &wide);
            for (level, smooth) in levels.iter_mut().zip(&smooth) {
                *level += self.sharpen * (*level - smooth);
            }
        }
        for level in &mut levels {
            *level = level.clamp(0.0, 1.0).powf(self.grey_map);
        }
        levels
    }
}

/// Echoes between transducer and skin: equally spaced, each fainter than the one before, uneven along
/// the aperture.
fn reverberation(range: f32, x: f32) -> f32 {
    const SPACING: f32 = 1.2;
    let order = (range / SPACING).round();
    if !(1.0..=7.0).contains(&order) {
        return 0.0;
    }
    let d = (range - order * SPACING) / 0.15;
    let uneven = 0.6 + 0.4 * (0.21 * x + order).sin();
    uneven * (-d * d - 0.6 * order).exp()
}

/// White noise of variance ½ for each part of a complex number of variance 1, plane `index` of `key`.
/// Sums of two 8-bit uniform numbers: the convolution averages enough of them to be normal.
fn white(key: Philox, index: u64, plane: &mut [f32]) {
    // The standard deviation of the sum of two bytes, each of variance (256² − 1)/12.
    const SCALE: f32 = std::f32::consts::FRAC_1_SQRT_2 / 104.510_93;
    for (i, chunk) in plane.chunks_mut(8).enumerate() {
        let block = key.block((index + 1) << 32 | i as u64);
        for (k, v) in chunk.iter_mut().enumerate() {
            let half = block[k / 2] >> (16 * (k % 2)) & 0xFFFF;
            *v = ((half & 0xFF) + (half >> 8)) as f32 * SCALE - 255.0 * SCALE;
        }
    }
}

const RADIUS: usize = 12;

#[derive(Clone, Copy)]
struct Kernel {
    radius: usize,
    taps: [f32; 2 * RADIUS + 1],
}

/// Gaussian of standard deviation `sigma` px and unit energy: it keeps the power of white noise.
fn kernel(sigma: f32) -> Kernel {
    let mut kernel = Kernel {
        radius: ((2.6 * sigma).ceil() as usize).clamp(1, RADIUS),
        taps: [0.0; 2 * RADIUS + 1],
    };
    let mut energy = 0.0;
    for k in 0..=2 * kernel.radius {
        let d = (k as f32 - kernel.radius as f32) / sigma.max(0.3);
        let tap = (-0.5 * d * d).exp();
        kernel.taps[k] = tap;
        energy += tap * tap;
    }
    kernel.taps.iter_mut().for_each(|tap| *tap /= energy.sqrt());
    kernel
}

fn kernel_of_unit_sum(sigma: f32) -> Kernel {
    let mut kernel = kernel(sigma);
    let sum: f32 = kernel.taps.iter().sum();
    kernel.taps.iter_mut().for_each(|tap| *tap /= sum);
    kernel
}

/// Separable convolution of a plane of rows, border values repeated.
struct Convolution {
    width: usize,
    height: usize,
    line: Vec<f32>,
    plane: Vec<f32>,
}

impl Convolution {
    fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            line: vec![0.0; width + 2 * RADIUS],
            plane: vec![0.0; width * height],
        }
    }

    /// Across each row with its own kernel; the result is `self.plane`.
    fn rows(&mut self, image: &[f32], across: &[Kernel]) {
        let width = self.width;
        for ((row, out), kernel) in image
            .chunks_exact(width)
            .zip(self.plane.chunks_exact_mut(width))
            .zip(across)
        {
            let r = kernel.radius;
            let line = &mut self.line[..width + 2 * r];
            line[..r].fill(row[0]);
            line[r..r + width].copy_from_slice(row);
            line[r + width..].fill(row[width - 1]);
            out.fill(0.0);
            for (k, &tap) in kernel.taps[..=2 * r].iter().enumerate() {
                accumulate(tap, &line[k..k + width], out);
            }
        }
    }

    /// Along the columns of `self.plane`, into `image`.
    fn columns(&self, image: &mut [f32], along: &Kernel) {
        let r = along.radius;
        for (y, out) in image.chunks_exact_mut(self.width).enumerate() {
            out.fill(0.0);
            for (k, &tap) in along.taps[..=2 * r].iter().enumerate() {
                let row = (y + k).saturating_sub(r).min(self.height - 1) * self.width;
                accumulate(tap, &self.plane[row..row + self.width], out);
            }
        }
    }
}

fn accumulate(factor: f32, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

/// Value at parts (u, v) of the plane's extent.
fn bilinear(plane: &[f32], width: usize, height: usize, u: f32, v: f32) -> f32 {
    let x = (u * width as f32 - 0.5).clamp(0.0, (width - 1) as f32);
    let y = (v * height as f32 - 0.5).clamp(0.0, (height - 1) as f32);
    let (x0, y0) = (x as usize, y as usize);
    let (x1, y1) = ((x0 + 1).min(width - 1), (y0 + 1).min(height - 1));
    let (tx, ty) = (x - x0 as f32, y - y0 as f32);
    let at = |x: usize, y: usize| plane[y * width + x];
    let upper = at(x0, y0) + tx * (at(x1, y0) - at(x0, y0));
    let lower = at(x0, y1) + tx * (at(x1, y1) - at(x0, y1));
    upper + ty * (lower - upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One look, no noise, no reverberation.
    const PLAIN: Scanner = Scanner {
        width: 400,
        height: 400,
        depth: [40.0, 40.0],
        sector: 0.0,
        frequency: 10.0,
        cycles: 2.0,
        f_number: 3.0,
        focus: 0.25,
        looks: 1,
        dynamic_range: 60.0,
        white: 20.0,
        grey_map: 1.0,
        sharpen: 0.0,
        noise: -200.0,
        loss: 0.0,
        reverberation: 0.0,
    };
    const SIDE: f32 = 40.0;

    fn envelope(scanner: Scanner, tissue: impl Fn(f32, f32) -> Echo) -> Vec<f32> {
        let geometry = Geometry::new(SIDE, SIDE, scanner.sector);
        scanner.envelope(Philox::new(1, 2), &Contact::default(), &geometry, tissue)
    }

    fn even(level: f32) -> Echo {
        Echo {
            level,
            specular: 0.0,
            loss: 0.0,
        }
    }

    fn mean(values: impl Iterator<Item = f32>) -> f64 {
        let (sum, count) = values.fold((0.0, 0.0), |(s, n), v| (s + f64::from(v), n + 1.0));
        sum / count
    }

    /// Fully developed speckle: unit power for a level of 0 dB, and Rayleigh's mean over standard
    /// deviation, √(π/(4 − π)) = 1.913 for one look and √n times that for n.
    #[test]
    fn speckle_of_even_tissue_is_rayleigh() {
        for looks in [1, 4] {
            let envelope = envelope(Scanner { looks, ..PLAIN }, |_, _| even(0.0));
            let first = mean(envelope.iter().copied());
            let second = mean(envelope.iter().map(|e| e * e));
            let ratio = first / (second - first * first).sqrt();
            let expected = 1.913 * (looks as f64).sqrt();
            assert!((ratio / expected - 1.0).abs() < 0.03, "{looks}: {ratio}");
            let rayleigh = (std::f64::consts::PI / 4.0).sqrt();
            assert!((first / rayleigh - 1.0).abs() < 0.02, "{looks}: {first}");
        }
    }

    /// A slab that takes 2 dB a mm over 5 mm darkens what lies below by 10 dB.
    #[test]
    fn loss_accumulates_along_the_beam() {
        let envelope = envelope(PLAIN, |_, z| Echo {
            loss: if (15.0..20.0).contains(&z) { 2.0 } else { 0.0 },
            ..even(0.0)
        });
        let rows = |from: usize, to: usize| mean(envelope[from * 400..to * 400].iter().copied());
        let db = 20.0 * (rows(10, 140) / rows(220, 400)).log10();
        assert!((db - 10.0).abs() < 0.5, "{db}");
    }

    /// Width of the echo of a small reflector, in beams above half its peak.
    #[test]
    fn the_beam_is_narrowest_at_the_focus() {
        let width = |depth: f32| {
            let envelope = envelope(PLAIN, |x, z| Echo {
                specular: f32::from((x - 20.0).hypot(z - depth) < 0.08),
                ..even(-200.0)
            });
            let peak = envelope.iter().copied().fold(0.0, f32::max);
            let row = envelope.iter().position(|&e| e == peak).unwrap() / 400;
            let row = &envelope[row * 400..(row + 1) * 400];
            row.iter().filter(|&&e| e > peak / 2.0).count()
        };
        // The focus lies at 10 mm.
        assert!(
            width(10.05) < width(36.05),
            "{} {}",
            width(10.05),
            width(36.05)
        );
    }

    /// A beam point maps back to its beam and range, and the corners see nothing.
    #[test]
    fn the_sector_maps_both_ways() {
        let geometry = Geometry::new(50.0, 40.0, 0.3);
        for beam in [-0.99, -0.4, 0.0, 0.7] {
            for range in [0.5, 17.0, 39.5] {
                let [x, z] = geometry.point(beam, range);
                let [b, r] = geometry.beam(x, z).unwrap();
                assert!((b - beam).abs() < 1e-4 && (r - range).abs() < 1e-3);
            }
        }
        assert!(geometry.beam(0.5, 0.5).is_none());
        assert!(geometry.beam(0.5, 39.5).is_none());
    }
}
