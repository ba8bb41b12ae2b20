use std::f64::consts::PI;

use bytemuck::{Pod, Zeroable};

use super::{Moments, perimeter, perimeter_backward};
use crate::tensor::Real;

/// Area in pixels below which a mask shows no measurable lesion.
///
/// The gate is a jump. It is decided from a sum taken in a fixed order, so that it does not depend on
/// threads.
pub const MEASURABLE_AREA: f64 = 32.0;

/// Variance of a uniform distribution over one pixel: it keeps the covariance of a line, or of a
/// single pixel, positive definite (`det ≥ 1/144`).
const PIXEL_VARIANCE: f64 = 1.0 / 12.0;

/// Everything the features need to know of a mask. Also the gradient with respect to it.
#[derive(Clone, Copy, PartialEq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct MaskSums {
    /// Soft moments.
    pub moments: Moments,
    /// Soft perimeter.
    pub perimeter: f64,
}

/// The four features of a measurable mask. Also the gradient with respect to them.
#[derive(Clone, Copy, PartialEq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct ShapeFeatures {
    /// `(P² − 4πS₂) / (P² + 4πS₂)`, 0 for a disc.
    ///
    /// With `S₂` and not the area, because `4πS₂ ≤ P²` holds for every soft mask of the continuum
    /// (the sharp Sobolev inequality in the plane), whereas `4πS₀/P²` is unbounded.
    pub irregularity: f64,
    /// `(cyy − cxx) / (cyy + cxx)`, positive for a lesion taller than wide.
    pub orientation: f64,
    /// `(P − Pₑ) / (P + Pₑ)`, 0 for every ellipse: an elongated smooth lesion is not spiculated.
    pub margin: f64,
    /// `2√det / tr` of the covariance, 1 for a disc.
    pub roundness: f64,
}

impl ShapeFeatures {
    /// The names, in order.
    pub const NAMES: [&str; 4] = ["irregularity", "orientation", "margin", "roundness"];

    /// The values, in the order of [`ShapeFeatures::NAMES`].
    pub fn to_array(self) -> [f64; 4] {
        bytemuck::cast(self)
    }
}

impl From<[f64; 4]> for ShapeFeatures {
    fn from(values: [f64; 4]) -> Self {
        bytemuck::cast(values)
    }
}

/// Covariance and the ellipse that has it, with what the backward shares with the forward.
struct Ellipse {
    xx: f64,
    yy: f64,
    xy: f64,
    trace: f64,
    /// `√det`.
    root: f64,
    /// `√λ₁ + √λ₂ = √(tr + 2√det)`: half the sum of the semi-axes `2√λ`.
    axes: f64,
    /// `h = ((a−b)/(a+b))²` of the semi-axes.
    h: f64,
}

impl Ellipse {
    fn of(m: &Moments) -> Self {
        let xx = m.xx / m.area + PIXEL_VARIANCE;
        let yy = m.yy / m.area + PIXEL_VARIANCE;
        let xy = m.xy / m.area;
        let trace = xx + yy;
        // The bound holds exactly; moments rounded to f32 can miss it for a diagonal line.
        let root = (xx * yy - xy * xy)
            .max(PIXEL_VARIANCE * PIXEL_VARIANCE)
            .sqrt();
        let squared = trace + 2.0 * root;
        Self {
            xx,
            yy,
            xy,
            trace,
            root,
            axes: squared.sqrt(),
            h: (trace - 2.0 * root) / squared,
        }
    }

    fn roundness(&self) -> f64 {
        2.0 * self.root / self.trace
    }

    /// Ramanujan's second formula, `π(a+b)(1 + 3h/(10 + √(4−3h)))`, in the covariance's trace and
    /// determinant, so that no eigenvalue, and no kink at a round lesion, appears.
    fn perimeter(&self) -> f64 {
        2.0 * PI * self.axes * (1.0 + 3.0 * self.h / (10.0 + (4.0 - 3.0 * self.h).sqrt()))
    }

    /// `∂perimeter/∂trace` and `∂perimeter/∂root`.
    fn perimeter_gradient(&self) -> (f64, f64) {
        let s = (4.0 - 3.0 * self.h).sqrt();
        let factor = 1.0 + 3.0 * self.h / (10.0 + s);
        let dfactor = 3.0 / (10.0 + s) + 4.5 * self.h / (s * (10.0 + s).powi(2));
        let squared = self.axes * self.axes;
        // axes = √(tr + 2 root), h = (tr − 2 root) / (tr + 2 root)
        let by_axes = 2.0 * PI * factor / (2.0 * self.axes);
        let by_h = 2.0 * PI * self.axes * dfactor * 4.0 / (squared * squared);
        (
            by_axes + by_h * self.root,
            2.0 * by_axes - by_h * self.trace,
        )
    }
}

impl MaskSums {
    /// Number of sums.
    pub const COUNT: usize = Moments::COUNT + 1;

    /// Of a row-major mask, `width` pixels a row.
    pub fn of<T: Real>(mask: &[T], width: usize) -> Self {
        Self {
            moments: Moments::of(mask, width),
            perimeter: perimeter(mask, width),
        }
    }

    /// Adds to `dmask` the gradient of `Σₖ gradₖ·sumₖ` with respect to each pixel.
    pub fn backward<T: Real>(&self, grad: &MaskSums, mask: &[T], width: usize, dmask: &mut [T]) {
        self.moments.backward(&grad.moments, mask, width, dmask);
        perimeter_backward(mask, width, grad.perimeter, dmask);
    }

    /// Whether the area reaches [`MEASURABLE_AREA`]. A NaN counts as measurable, so that it is seen.
    pub fn measurable(&self) -> bool {
        self.moments.area >= MEASURABLE_AREA || self.moments.area.is_nan()
    }

    /// How decided the mask is: `max(0, 2·S₂/S₀ − 1)`, 1 for a hard mask, 0 for one that is 0.5
    /// throughout and so has no shape to be consistent with; 0 below the gate.
    pub fn confidence(&self) -> f64 {
        if self.measurable() {
            (2.0 * self.moments.energy / self.moments.area - 1.0).max(0.0)
        } else {
            0.0
        }
    }

    /// The features, unless the lesion is too small to measure.
    pub fn features(&self) -> Option<ShapeFeatures> {
        self.measurable().then(|| {
            let ellipse = Ellipse::of(&self.moments);
            let (p, pe) = (self.perimeter, ellipse.perimeter());
            let (p2, disc) = (p * p, 4.0 * PI * self.moments.energy);
            ShapeFeatures {
                irregularity: (p2 - disc) / (p2 + disc),
                orientation: (ellipse.yy - ellipse.xx) / ellipse.trace,
                margin: (p - pe) / (p + pe),
                roundness: ellipse.roundness(),
            }
        })
    }

    /// The gradient of `Σₖ gradₖ·featureₖ` with respect to the sums; exactly zero below the gate.
    pub fn features_backward(&self, grad: &ShapeFeatures) -> MaskSums {
        if !self.measurable() {
            return MaskSums::default();
        }
        let e = Ellipse::of(&self.moments);
        let (p, pe) = (self.perimeter, e.perimeter());
        let (p2, disc) = (p * p, 4.0 * PI * self.moments.energy);
        let irregularity = grad.irregularity * 2.0 / (p2 + disc).powi(2);
        let margin = grad.margin * 2.0 / (p + pe).powi(2);
        let orientation = grad.orientation * 2.0 / (e.trace * e.trace);

        // To tr and √det, then to the covariance, then to the moments.
        let (pe_trace, pe_root) = e.perimeter_gradient();
        let trace = -margin * p * pe_trace - grad.roundness * e.roundness() / e.trace;
        let root = -margin * p * pe_root + grad.roundness * 2.0 / e.trace;
        let det = root / (2.0 * e.root);
        let area = self.moments.area;
        let xx = (trace + det * e.yy - orientation * e.yy) / area;
        let yy = (trace + det * e.xx + orientation * e.xx) / area;
        let xy = -2.0 * det * e.xy / area;
        let m = &self.moments;
        MaskSums {
            moments: Moments {
                area: -(xx * m.xx + yy * m.yy + xy * m.xy) / area,
                energy: -irregularity * p2 * 4.0 * PI,
                x: 0.0,
                y: 0.0,
                xx,
                yy,
                xy,
            },
            perimeter: irregularity * disc * 2.0 * p + margin * pe,
        }
    }
}
