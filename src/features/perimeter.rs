use crate::tensor::Real;

/// Softening of the gradient's length at zero, in mask units per pixel.
pub const EPSILON: f64 = 1e-3;

/// The soft perimeter of a row-major mask, `width` pixels a row, in pixels:
/// `Σ √(gx² + gy² + ε²) − ε`, the total variation of the mask with Sobel's derivatives over eight.
///
/// The mask is zero outside the image and the sum runs over the `(H+2)×(W+2)` pixels of the frame
/// padded by one, so that a lesion cut by the border still has its edge counted. Sobel's stencil
/// because it is nearly rotation invariant: for a disc of radius 60, `1 − 4πA/P²` is 0.03 with it
/// and 0.26 with forward differences.
pub fn perimeter<T: Real>(mask: &[T], width: usize) -> f64 {
    let mut sum = 0.0;
    sobel(mask, width, |_, _, gx, gy| {
        // (√(q + ε²) − ε) without cancellation where the mask is flat.
        let (root, q) = (length(gx, gy), gx * gx + gy * gy);
        sum += (q / (root + T::of(EPSILON))).wide();
    });
    sum
}

/// Adds to `dmask` the gradient of `grad` times the [`perimeter()`] with respect to each pixel: the
/// transposed Sobel stencil of the unit normals `g/√(|g|² + ε²)`.
pub fn perimeter_backward<T: Real>(mask: &[T], width: usize, grad: f64, dmask: &mut [T]) {
    let height = mask.len() / width;
    let (scale, two) = (T::of(grad / 8.0), T::of(2.0));
    sobel(mask, width, |y, x, gx, gy| {
        let unit = scale / length(gx, gy);
        let (u, v) = (gx * unit, gy * unit);
        // Frame pixel (y, x) has its stencil centred on image pixel (y−1, x−1).
        for (row, a, b) in [
            (y, T::one(), -T::one()),
            (y + 1, two, T::zero()),
            (y + 2, T::one(), T::one()),
        ] {
            if !(2..height + 2).contains(&row) {
                continue;
            }
            let drow = &mut dmask[(row - 2) * width..][..width];
            for (column, c, d) in [
                (x, -T::one(), T::one()),
                (x + 1, T::zero(), two),
                (x + 2, T::one(), T::one()),
            ] {
                if (2..width + 2).contains(&column) {
                    drow[column - 2] += a * c * u + b * d * v;
                }
            }
        }
    });
}

/// `√(gx² + gy² + ε²)`.
fn length<T: Real>(gx: T, gy: T) -> T {
    (gx * gx + gy * gy + T::of(EPSILON * EPSILON)).sqrt()
}

/// Calls `each(y, x, gx, gy)` for every pixel of the padded frame, in row-major order.
fn sobel<T: Real>(mask: &[T], width: usize, mut each: impl FnMut(usize, usize, T, T)) {
    let height = mask.len() / width;
    let row = |y: usize| {
        (1..=height)
            .contains(&y)
            .then(|| &mask[(y - 1) * width..][..width])
    };
    let eighth = T::of(0.125);
    for y in 0..height + 2 {
        let (above, here, below) = (y.checked_sub(1).and_then(row), row(y), row(y + 1));
        // The stencil is separable: smoothing and difference down each column first.
        let column = |x: usize| {
            let at = |row: Option<&[T]>| match row {
                Some(row) if (1..=width).contains(&x) => row[x - 1],
                _ => T::zero(),
            };
            let (a, b, c) = (at(above), at(here), at(below));
            (a + b + b + c, c - a)
        };
        let (mut left, mut middle) = ((T::zero(), T::zero()), column(0));
        for x in 0..width + 2 {
            let right = column(x + 1);
            let gx = (right.0 - left.0) * eighth;
            let gy = (left.1 + middle.1 + middle.1 + right.1) * eighth;
            each(y, x, gx, gy);
            (left, middle) = (middle, right);
        }
    }
}
