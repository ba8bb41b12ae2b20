//! Agreement of two binary masks of one image: overlap, and distance between their outlines.

use std::ops::Range;

use super::classification::Confusion;
use super::statistics::quantile;
use crate::data::image::Gray;
use crate::error::{Error, Result};

/// A binary mask: `true` is lesion.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mask {
    width: usize,
    height: usize,
    pixels: Vec<bool>,
}

impl Mask {
    /// A mask from its rows, top to bottom.
    ///
    /// # Errors
    /// [`Error::Argument`] if `pixels` does not hold `width · height` values.
    pub fn new(width: usize, height: usize, pixels: Vec<bool>) -> Result<Self> {
        if width.checked_mul(height) != Some(pixels.len()) {
            return Err(Error::argument(
                "mask",
                format!(
                    "expected {width}×{height} pixels, found {} values",
                    pixels.len()
                ),
            ));
        }
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// Whether each pixel is lesion, row by row.
    pub fn pixels(&self) -> &[bool] {
        &self.pixels
    }

    /// The number of pixels in the lesion.
    pub fn area(&self) -> usize {
        self.pixels.iter().filter(|&&inside| inside).count()
    }

    /// Length of the image's diagonal in pixels, `√(width² + height²)`.
    pub fn diagonal(&self) -> f64 {
        (self.width as f64).hypot(self.height as f64)
    }

    /// The columns and the rows that have pixels of the mask, from the first to the last; `None` for an empty mask.
    fn bounds(&self) -> Option<[Range<usize>; 2]> {
        let rows = self.pixels.chunks_exact(self.width.max(1)).enumerate();
        let (mut across, mut down) = (self.width..0, self.height..0);
        for (y, row) in rows {
            let Some(first) = row.iter().position(|&inside| inside) else {
                continue;
            };
            let last = row.iter().rposition(|&inside| inside).unwrap_or(first);
            across = across.start.min(first)..across.end.max(last + 1);
            down = down.start.min(y)..y + 1;
        }
        (!down.is_empty()).then_some([across, down])
    }

    /// The part in these columns and rows.
    fn crop(&self, [columns, rows]: &[Range<usize>; 2]) -> Mask {
        let lines = self.pixels.chunks_exact(self.width.max(1));
        let lines = lines.skip(rows.start).take(rows.len());
        Mask {
            width: columns.len(),
            height: rows.len(),
            pixels: lines
                .flat_map(|line| &line[columns.clone()])
                .copied()
                .collect(),
        }
    }

    /// The outline: pixels of the mask with at least one of their four neighbours outside it. What lies
    /// beyond the image's border is outside.
    ///
    /// This is the mask minus its erosion by a cross, which SciPy, MedPy and MONAI take as well.
    pub fn surface(&self) -> Mask {
        let (w, h) = (self.width, self.height);
        let mut pixels = vec![false; self.pixels.len()];
        for y in 0..h {
            for x in 0..w {
                let i = y * w + x;
                let interior = x > 0
                    && x + 1 < w
                    && y > 0
                    && y + 1 < h
                    && self.pixels[i - 1]
                    && self.pixels[i + 1]
                    && self.pixels[i - w]
                    && self.pixels[i + w];
                pixels[i] = self.pixels[i] && !interior;
            }
        }
        Mask {
            width: w,
            height: h,
            pixels,
        }
    }

    /// The squared Euclidean distance, in pixels, from every pixel's centre to that of the nearest pixel of
    /// the mask, row by row; `None` for an empty mask. Exact, in time proportional to the number of pixels.
    ///
    /// Distances along the columns first, then, for each row, the lower envelope of the parabolas
    /// `(x − u)² + d(u)²` (Felzenszwalb and Huttenlocher, *Distance transforms of sampled functions*, 2012),
    /// with the crossings of parabolas in integers (Meijster, Roerdink and Hesselink 2000).
    pub fn squared_distances(&self) -> Option<Vec<u64>> {
        const FAR: i64 = i64::MAX;
        let (w, h) = (self.width, self.height);
        if !self.pixels.contains(&true) {
            return None;
        }

        // Distance to the mask within the column; FAR in a column that has none of it.
        let mut column = vec![FAR; w * h];
        let mut last: Vec<Option<usize>> = vec![None; w];
        for y in 0..h {
            for x in 0..w {
                if self.pixels[y * w + x] {
                    last[x] = Some(y);
                }
                if let Some(seen) = last[x] {
                    column[y * w + x] = (y - seen) as i64;
                }
            }
        }
        last.fill(None);
        for y in (0..h).rev() {
            for x in 0..w {
                if self.pixels[y * w + x] {
                    last[x] = Some(y);
                }
                if let Some(seen) = last[x] {
                    let nearest = &mut column[y * w + x];
                    *nearest = (*nearest).min((seen - y) as i64);
                }
            }
        }

        let mut squared = Vec::with_capacity(w * h);
        // The envelope from left to right: a parabola's column, its height, the first x where it is lowest.
        let mut envelope: Vec<(i64, i64, i64)> = Vec::with_capacity(w);
        for row in column.chunks_exact(w) {
            envelope.clear();
            for (u, &d) in row.iter().enumerate() {
                if d == FAR {
                    continue;
                }
                let (u, f) = (u as i64, d * d);
                let mut start = 0;
                while let Some(&(v, g, begin)) = envelope.last() {
                    // The parabola at v < u is no higher than the one at u exactly for x ≤ this quotient.
                    start = (u * u - v * v + f - g).div_euclid(2 * (u - v)) + 1;
                    if start > begin {
                        break;
                    }
                    envelope.pop();
                    start = 0;
                }
                if start < w as i64 {
                    envelope.push((u, f, start));
                }
            }
            let mut lowest = 0;
            for x in 0..w as i64 {
                while envelope.get(lowest + 1).is_some_and(|next| next.2 <= x) {
                    lowest += 1;
                }
                let (u, f, _) = envelope[lowest];
                squared.push(((x - u) * (x - u) + f) as u64);
            }
        }
        Some(squared)
    }
}

impl From<&Gray> for Mask {
    /// Whatever is not black is lesion.
    fn from(mask: &Gray) -> Self {
        Self {
            width: mask.width,
            height: mask.height,
            pixels: mask.pixels.iter().map(|&value| value > 0).collect(),
        }
    }
}

/// Distances between the outlines of two non-empty masks, in pixels.
#[derive(Clone, PartialEq, Debug)]
pub struct SurfaceDistances {
    /// From each outline pixel of the prediction to the nearest outline pixel of the truth.
    to_truth: Vec<f64>,
    /// From each outline pixel of the truth to the nearest outline pixel of the prediction.
    to_prediction: Vec<f64>,
}

impl SurfaceDistances {
    /// Measures both directions; `None` if either mask is empty.
    ///
    /// # Errors
    /// [`Error::Argument`] if the masks differ in size.
    pub fn between(prediction: &Mask, truth: &Mask) -> Result<Option<Self>> {
        same_size(prediction, truth)?;
        let (Some(a), Some(b)) = (prediction.bounds(), truth.bounds()) else {
            return Ok(None);
        };
        // Nothing beyond both lesions has a part in any of the distances.
        let ends = |i: usize| a[i].start.min(b[i].start)..a[i].end.max(b[i].end);
        let both = [ends(0), ends(1)];
        let [prediction, truth] = [prediction, truth].map(|mask| mask.crop(&both).surface());
        let directed = |from: &Mask, to: &Mask| -> Option<Vec<f64>> {
            let squared = to.squared_distances()?;
            let on_surface = from.pixels.iter().zip(squared).filter(|(on, _)| **on);
            Some(on_surface.map(|(_, d)| (d as f64).sqrt()).collect())
        };
        let both = directed(&prediction, &truth).zip(directed(&truth, &prediction));
        Ok(both.map(|(to_truth, to_prediction)| Self {
            to_truth,
            to_prediction,
        }))
    }

    /// The Hausdorff distance at quantile `q` of 0 to 1, the larger of the two directed quantiles (linear
    /// interpolation between order statistics): `q = 1` is the Hausdorff distance, `q = 0.95` is HD95.
    ///
    /// MONAI's definition, and that of *Metrics reloaded* (Maier-Hein et al. 2024). MedPy takes one quantile
    /// of the two lists together instead, in which the many good pixels of a long outline can hide that a
    /// short one is far away everywhere.
    pub fn hausdorff(&self, q: f64) -> f64 {
        let directed = |d| quantile(d, q).expect("a non-empty mask has an outline");
        directed(&self.to_truth).max(directed(&self.to_prediction))
    }

    /// Average symmetric surface distance: the mean over the pixels of both outlines, as in MedPy.
    pub fn assd(&self) -> f64 {
        let n = self.to_truth.len() + self.to_prediction.len();
        (self.to_truth.iter().sum::<f64>() + self.to_prediction.iter().sum::<f64>()) / n as f64
    }
}

/// How well a predicted mask agrees with the true one.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Agreement {
    /// The image shows a lesion. A prediction that misses it altogether scores zero in every overlap
    /// (precision too, so that a miss never raises an average by its absence) and the image's diagonal in
    /// both distances.
    Lesion {
        /// Dice coefficient, `2|P∩T| / (|P| + |T|)`.
        dice: f64,
        /// Intersection over union (Jaccard index), `|P∩T| / |P∪T|`.
        iou: f64,
        /// `|P∩T| / |P|`.
        precision: f64,
        /// `|P∩T| / |T|`.
        recall: f64,
        /// 95th percentile of the Hausdorff distance in pixels: [`SurfaceDistances::hausdorff`] at 0.95.
        hd95_px: f64,
        /// Average symmetric surface distance in pixels: [`SurfaceDistances::assd`].
        assd_px: f64,
    },
    /// The image shows no lesion: overlap and distance are not defined, and whatever was predicted is false.
    Normal {
        /// The number of predicted pixels.
        false_positive_area: usize,
    },
}

impl Agreement {
    /// Compares a prediction with the truth, at the resolution of the masks.
    ///
    /// # Errors
    /// [`Error::Argument`] if the masks differ in size.
    pub fn between(prediction: &Mask, truth: &Mask) -> Result<Self> {
        same_size(prediction, truth)?;
        let pixels = prediction.pixels.iter().zip(&truth.pixels);
        let counts = Confusion::count(pixels.map(|(&p, &t)| (p, t)));
        let (Some(dice), Some(iou), Some(recall)) =
            (counts.f1(), counts.jaccard(), counts.recall())
        else {
            return Ok(Self::Normal {
                false_positive_area: counts.false_positives,
            });
        };
        let (hd95_px, assd_px) = match SurfaceDistances::between(prediction, truth)? {
            Some(distances) => (distances.hausdorff(0.95), distances.assd()),
            None => (truth.diagonal(), truth.diagonal()),
        };
        Ok(Self::Lesion {
            dice,
            iou,
            precision: counts.precision().unwrap_or(0.0),
            recall,
            hd95_px,
            assd_px,
        })
    }
}

fn same_size(prediction: &Mask, truth: &Mask) -> Result<()> {
    if (prediction.width, prediction.height) != (truth.width, truth.height) {
        return Err(Error::argument(
            "predicted mask",
            format!(
                "expected {}×{} pixels as in the true mask, found {}×{}",
                truth.width, truth.height, prediction.width, prediction.height
            ),
        ));
    }
    Ok(())
}
