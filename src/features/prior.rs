use super::ShapeFeatures;
use crate::error::{Error, Result};

/// The malignancy prior of a measurable mask: `φ = σ(b + Σₖ wₖ (fₖ − μₖ)/sₖ)`.
///
/// `μ` and `s` come from the source's training masks and stay; `w` and `b` are learnable.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prior {
    /// `w`, in the order of [`ShapeFeatures::NAMES`].
    pub weights: [f64; 4],
    /// `b`.
    pub bias: f64,
    /// `μ`.
    pub mean: [f64; 4],
    /// `s`, positive; infinite for a feature that is left out.
    pub sd: [f64; 4],
}

/// Where the weights start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Start {
    /// From a logistic fit, each feature with its own weight.
    #[default]
    Fitted,
    /// From a logistic fit in which all features share one weight.
    Equal,
}

/// How [`Prior::fit`] fits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FitOptions {
    /// Where the weights start.
    pub start: Start,
    /// Let weights be negative. By default they are not, so that each reads as suspicion.
    pub free_sign: bool,
    /// Features to leave out, in the order of [`ShapeFeatures::NAMES`]: their weight is 0 and their `s` infinite,
    /// so that they change neither `φ` nor any gradient, and learning leaves their weight where it is.
    pub left_out: [bool; 4],
}

impl Prior {
    /// Means and standard deviations of the rows, and the weights and bias that minimise
    /// `Σ log-loss + ½‖w‖²`, by default under `w ≥ 0`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are not as many labels as rows, if a class is missing, or if a
    /// feature is constant or not finite.
    pub fn fit(rows: &[ShapeFeatures], malignant: &[bool], options: FitOptions) -> Result<Self> {
        if rows.len() != malignant.len() {
            let problem = format!(
                "expected one label for each of {} rows, found {}",
                rows.len(),
                malignant.len()
            );
            return Err(Error::argument("prior", problem));
        }
        let positives = malignant.iter().filter(|&&y| y).count();
        if positives == 0 || positives == rows.len() {
            let problem = format!(
                "expected measurable lesions of both classes, found {positives} malignant of {}",
                rows.len()
            );
            return Err(Error::argument("prior", problem));
        }
        let n = rows.len() as f64;
        let (mut mean, mut sd) = ([0.0; 4], [0.0; 4]);
        for k in 0..4 {
            if options.left_out[k] {
                sd[k] = f64::INFINITY;
                continue;
            }
            let column = || rows.iter().map(|row| row.to_array()[k]);
            mean[k] = column().sum::<f64>() / n;
            sd[k] = (column().map(|f| (f - mean[k]).powi(2)).sum::<f64>() / n).sqrt();
            if !(sd[k] > 0.0 && sd[k].is_finite()) {
                let problem = format!(
                    "{} does not vary over the {n} rows",
                    ShapeFeatures::NAMES[k]
                );
                return Err(Error::argument("prior", problem));
            }
        }
        let standard = rows.iter().map(|row| {
            let f = row.to_array();
            std::array::from_fn::<_, 4, _>(|k| (f[k] - mean[k]) / sd[k])
        });
        let (weights, bias) = match options.start {
            Start::Fitted => logistic(&standard.collect::<Vec<_>>(), malignant, options.free_sign),
            Start::Equal => {
                let sums: Vec<_> = standard.map(|z| [z.iter().sum()]).collect();
                let ([weight], bias) = logistic(&sums, malignant, options.free_sign);
                let counts = |k: usize| if options.left_out[k] { 0.0 } else { weight };
                (std::array::from_fn(counts), bias)
            }
        };
        Ok(Self {
            weights,
            bias,
            mean,
            sd,
        })
    }

    /// `φ` of one mask.
    pub fn phi(&self, features: &ShapeFeatures) -> f64 {
        let z = self.standardised(features);
        let eta: f64 = self.bias + z.iter().zip(&self.weights).map(|(z, w)| z * w).sum::<f64>();
        sigmoid(eta)
    }

    /// The gradient of `grad·φ` with respect to the features, the weights and the bias.
    pub fn backward(&self, features: &ShapeFeatures, grad: f64) -> (ShapeFeatures, [f64; 4], f64) {
        let phi = self.phi(features);
        let eta = grad * phi * (1.0 - phi);
        let z = self.standardised(features);
        let dfeatures: [f64; 4] = std::array::from_fn(|k| eta * self.weights[k] / self.sd[k]);
        (dfeatures.into(), z.map(|z| eta * z), eta)
    }

    fn standardised(&self, features: &ShapeFeatures) -> [f64; 4] {
        let f = features.to_array();
        std::array::from_fn(|k| (f[k] - self.mean[k]) / self.sd[k])
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 + eˣ)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Ridge logistic regression: minimises `Σᵢ log(1 + exp(ηᵢ)) − yᵢηᵢ + ½‖w‖²` over `w` and an
/// unpenalised `b`, `η = b + w·z`, under `w ≥ 0` unless `free_sign`.
///
/// Projected Newton (Bertsekas 1982): a Newton step in the coordinates that are not held at zero by
/// their gradient, halved until the projected point improves enough. The objective is strictly convex
/// in `w`, and in `b` as long as both classes occur, so the minimum is unique.
fn logistic<const K: usize>(
    rows: &[[f64; K]],
    labels: &[bool],
    free_sign: bool,
) -> ([f64; K], f64) {
    let eta =
        |w: &[f64; K], b: f64, z: &[f64; K]| b + w.iter().zip(z).map(|(w, z)| w * z).sum::<f64>();
    let objective = |w: &[f64; K], b: f64| {
        let fit: f64 = rows
            .iter()
            .zip(labels)
            .map(|(z, &y)| {
                let eta = eta(w, b, z);
                softplus(if y { -eta } else { eta })
            })
            .sum();
        fit + 0.5 * w.iter().map(|w| w * w).sum::<f64>()
    };
    let (mut w, mut b) = ([0.0; K], 0.0);
    // A handful of steps: convergence is quadratic. The 1e-12 below lets the last of them through,
    // whose improvement is lost in rounding.
    for _ in 0..100 {
        // Gradient and Hessian; coordinate K is the bias.
        let mut gradient = vec![0.0; K + 1];
        let mut hessian = vec![vec![0.0; K + 1]; K + 1];
        for k in 0..K {
            gradient[k] = w[k];
            hessian[k][k] = 1.0;
        }
        for (z, &y) in rows.iter().zip(labels) {
            let p = sigmoid(eta(&w, b, z));
            let z: Vec<f64> = z.iter().copied().chain([1.0]).collect();
            for (i, row) in hessian.iter_mut().enumerate() {
                gradient[i] += (p - f64::from(u8::from(y))) * z[i];
                for (h, x) in row.iter_mut().zip(&z) {
                    *h += p * (1.0 - p) * x * z[i];
                }
            }
        }
        let free: Vec<usize> = (0..=K)
            .filter(|&k| k == K || free_sign || w[k] > 0.0 || gradient[k] < 0.0)
            .collect();
        let slope: Vec<f64> = free.iter().map(|&k| gradient[k]).collect();
        if slope.iter().all(|g| g.abs() <= 1e-12 * rows.len() as f64) {
            break;
        }
        let curvature = free
            .iter()
            .map(|&i| free.iter().map(|&j| hessian[i][j]).collect())
            .collect();
        let step = solve(curvature, slope.clone());
        let before = objective(&w, b);
        let descent: f64 = slope.iter().zip(&step).map(|(g, s)| g * s).sum();
        let mut length = 1.0;
        while length > 1e-10 {
            let (mut w1, mut b1) = (w, b);
            for (&k, s) in free.iter().zip(&step) {
                if k == K {
                    b1 -= length * s;
                } else {
                    w1[k] -= length * s;
                    if !free_sign {
                        w1[k] = w1[k].max(0.0);
                    }
                }
            }
            if objective(&w1, b1) <= before * (1.0 + 1e-12) - 1e-4 * length * descent {
                (w, b) = (w1, b1);
                break;
            }
            length *= 0.5;
        }
    }
    (w, b)
}

/// Solves `a·x = b` for a symmetric positive definite `a`, by Gaussian elimination (no pivoting is
/// needed for such a matrix).
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for k in 0..n {
        let pivot = a[k].clone();
        for i in k + 1..n {
            let factor = a[i][k] / pivot[k];
            for j in k..n {
                a[i][j] -= factor * pivot[j];
            }
            b[i] -= factor * b[k];
        }
    }
    for k in (0..n).rev() {
        let known: f64 = (k + 1..n).map(|j| a[k][j] * b[j]).sum();
        b[k] = (b[k] - known) / a[k][k];
    }
    b
}
