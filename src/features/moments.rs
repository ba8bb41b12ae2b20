use bytemuck::{Pod, Zeroable};

use crate::tensor::Real;

/// The soft moments of one mask `m`, pixels as units, `x` and `y` from the image's centre:
/// `x = column − (W−1)/2`, `y = row − (H−1)/2`.
///
/// The second moments are taken about the mask's own centroid. About the image's centre they would
/// cancel when a covariance is formed of them: a lesion of radius 5 near the edge of a 256² frame
/// has `Σx²m / Σm` near 14400 and a variance of 6.25, which `f32` cannot tell apart to four digits.
#[derive(Clone, Copy, PartialEq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Moments {
    /// `S₀ = Σm`, the soft area.
    pub area: f64,
    /// `S₂ = Σm²`.
    pub energy: f64,
    /// `Sx = Σxm`.
    pub x: f64,
    /// `Sy = Σym`.
    pub y: f64,
    /// `Σ(x−x̄)²m` with `x̄ = Sx/S₀`.
    pub xx: f64,
    /// `Σ(y−ȳ)²m` with `ȳ = Sy/S₀`.
    pub yy: f64,
    /// `Σ(x−x̄)(y−ȳ)m`.
    pub xy: f64,
}

impl Moments {
    /// Number of moments.
    pub const COUNT: usize = 7;

    /// From their values in order.
    pub(crate) fn read<T: Real>(values: &[T]) -> Self {
        bytemuck::cast(std::array::from_fn::<f64, { Self::COUNT }, _>(|k| {
            values[k].wide()
        }))
    }

    /// Their values in order.
    pub(crate) fn write<T: Real>(self, values: &mut [T]) {
        let array: [f64; Self::COUNT] = bytemuck::cast(self);
        values
            .iter_mut()
            .zip(array)
            .for_each(|(value, moment)| *value = T::of(moment));
    }

    /// Of a row-major mask, `width` pixels a row.
    pub fn of<T: Real>(mask: &[T], width: usize) -> Self {
        // Raw moments about the image's centre, all in f64: what cancels below loses 1e-12 at most.
        let mut raw = Self::default();
        for (row, y) in mask.chunks_exact(width).zip(centred(mask.len() / width)) {
            let (mut area, mut energy, mut x, mut xx) = (0.0, 0.0, 0.0, 0.0);
            for (&m, u) in row.iter().zip(centred(width)) {
                let m = m.wide();
                area += m;
                energy += m * m;
                x += u * m;
                xx += u * u * m;
            }
            raw.area += area;
            raw.energy += energy;
            raw.x += x;
            raw.xx += xx;
            raw.y += y * area;
            raw.yy += y * y * area;
            raw.xy += y * x;
        }
        raw.about_centroid()
    }

    /// Moves the second moments from the image's centre to the mask's centroid.
    pub(crate) fn about_centroid(self) -> Self {
        let (x, y) = self.centroid();
        Self {
            xx: self.xx - x * self.x,
            yy: self.yy - y * self.y,
            xy: self.xy - x * self.y,
            ..self
        }
    }

    /// `(x̄, ȳ)`, and the image's centre for an empty mask.
    pub fn centroid(&self) -> (f64, f64) {
        if self.area == 0.0 {
            (0.0, 0.0)
        } else {
            (self.x / self.area, self.y / self.area)
        }
    }

    /// Adds to `dmask` the gradient of `Σₖ gradₖ·momentₖ` with respect to each pixel.
    ///
    /// `∂/∂m` of a central moment is `(x−x̄)²`: moving the centroid changes it only to second order.
    pub fn backward<T: Real>(&self, grad: &Moments, mask: &[T], width: usize, dmask: &mut [T]) {
        let (cx, cy) = self.centroid();
        let rows = mask.chunks_exact(width).zip(dmask.chunks_exact_mut(width));
        for ((row, drow), y) in rows.zip(centred(mask.len() / width)) {
            let v = y - cy;
            let constant = grad.area + grad.y * y + grad.yy * v * v;
            for ((&m, d), x) in row.iter().zip(drow).zip(centred(width)) {
                let u = x - cx;
                *d += T::of(
                    constant
                        + 2.0 * grad.energy * m.wide()
                        + grad.x * x
                        + (grad.xx * u + grad.xy * v) * u,
                );
            }
        }
    }
}

/// The coordinates of `n` pixels in a line, from its centre.
fn centred(n: usize) -> impl Iterator<Item = f64> {
    (0..n).map(move |i| i as f64 - (n as f64 - 1.0) / 2.0)
}
