//! Lesions in the words of the BI-RADS lexicon, and their contours.

use std::f32::consts::{PI, TAU};

use crate::data::Label;
use crate::device::philox::Draws;

/// 15% normal, 50% benign, 35% malignant.
pub(super) fn draw_label(draws: &mut Draws) -> Label {
    pick(
        draws,
        &[
            (Label::Normal, 15),
            (Label::Benign, 50),
            (Label::Malignant, 35),
        ],
    )
}

/// BI-RADS: shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// Elliptic.
    Oval,
    /// As tall as wide.
    Round,
    /// Neither.
    Irregular,
}

/// BI-RADS: orientation to the skin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orientation {
    /// Wider than tall.
    Parallel,
    /// Taller than wide, or round.
    NotParallel,
}

/// BI-RADS: margin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Margin {
    /// Sharp and smooth.
    Circumscribed,
    /// Short-cycle undulations (microlobulated).
    Lobulated,
    /// Sharp lines projecting from the mass.
    Spiculated,
    /// No clear line between the mass and its surroundings.
    Indistinct,
}

/// BI-RADS: posterior features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Posterior {
    /// As bright below the lesion as beside it.
    Unchanged,
    /// Brighter below: the lesion attenuates less than tissue.
    Enhancement,
    /// Darker below: the lesion attenuates more.
    Shadow,
}

/// BI-RADS: echo pattern, relative to fat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Echogenicity {
    /// Without echoes, as a cyst.
    Anechoic,
    /// Darker than fat.
    Hypoechoic,
    /// Like fat.
    Isoechoic,
    /// Of both dark and bright parts.
    Heterogeneous,
}

/// A lesion in the lexicon's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Descriptors {
    /// Shape.
    pub shape: Shape,
    /// Orientation.
    pub orientation: Orientation,
    /// Margin.
    pub margin: Margin,
    /// Posterior features.
    pub posterior: Posterior,
    /// Echo pattern.
    pub echogenicity: Echogenicity,
}

/// One of `options`, with chances in proportion to the numbers.
fn pick<T: Copy>(draws: &mut Draws, options: &[(T, u32)]) -> T {
    let mut ticket = draws.below(options.iter().map(|option| option.1).sum());
    for &(value, chances) in options {
        if ticket < chances {
            return value;
        }
        ticket -= chances;
    }
    unreachable!("the ticket is below the sum of the chances")
}

impl Descriptors {
    /// The chances follow how often the lexicon's descriptors are reported in either class, and overlap:
    /// no single descriptor decides.
    pub(super) fn draw(malignant: bool, draws: &mut Draws) -> Self {
        let shape = pick(
            draws,
            &if malignant {
                [(Shape::Oval, 14), (Shape::Round, 8), (Shape::Irregular, 78)]
            } else {
                [
                    (Shape::Oval, 72),
                    (Shape::Round, 12),
                    (Shape::Irregular, 16),
                ]
            },
        );
        let parallel = draws.chance(if malignant { 0.5 } else { 0.9 });
        let orientation = if parallel && shape != Shape::Round {
            Orientation::Parallel
        } else {
            Orientation::NotParallel
        };
        let margin = pick(
            draws,
            &if malignant {
                [
                    (Margin::Circumscribed, 8),
                    (Margin::Lobulated, 27),
                    (Margin::Spiculated, 35),
                    (Margin::Indistinct, 30),
                ]
            } else {
                [
                    (Margin::Circumscribed, 76),
                    (Margin::Lobulated, 12),
                    (Margin::Spiculated, 2),
                    (Margin::Indistinct, 10),
                ]
            },
        );
        let posterior = pick(
            draws,
            &if malignant {
                [
                    (Posterior::Unchanged, 38),
                    (Posterior::Enhancement, 12),
                    (Posterior::Shadow, 50),
                ]
            } else {
                [
                    (Posterior::Unchanged, 50),
                    (Posterior::Enhancement, 44),
                    (Posterior::Shadow, 6),
                ]
            },
        );
        let echogenicity = pick(
            draws,
            &if malignant {
                [
                    (Echogenicity::Anechoic, 0),
                    (Echogenicity::Hypoechoic, 78),
                    (Echogenicity::Isoechoic, 6),
                    (Echogenicity::Heterogeneous, 16),
                ]
            } else {
                [
                    (Echogenicity::Anechoic, 18),
                    (Echogenicity::Hypoechoic, 58),
                    (Echogenicity::Isoechoic, 16),
                    (Echogenicity::Heterogeneous, 8),
                ]
            },
        );
        Self {
            shape,
            orientation,
            margin,
            posterior,
            echogenicity,
        }
    }
}

/// Samples of a contour's radius over the full turn.
const ANGLES: usize = 1024;

/// A lesion's contour, star-shaped about its centre, and its acoustics. Lengths in mm.
#[derive(Clone, Debug)]
pub(super) struct Lesion {
    /// Lateral position and depth of the centre.
    pub centre: [f32; 2],
    /// Semi-axes before the contour is shaped: lateral, axial.
    pub axes: [f32; 2],
    /// Radius over angle, and the factor from radial to normal distance.
    contour: Vec<[f32; 2]>,
    reach: f32,
    /// Scattering inside, dB relative to bright glandular tissue.
    pub level: f32,
    /// Spread of the texture inside, dB.
    pub mottle: f32,
    /// Width over which the border fades.
    pub softness: f32,
    /// Two-way loss for a mm inside, dB; negative brightens what lies below.
    pub loss: f32,
    /// Echogenic halo: brightness in dB and width.
    pub halo: [f32; 2],
    /// Strength of the specular capsule.
    pub capsule: f32,
    /// Bright specks: positions relative to the centre.
    pub calcifications: Vec<[f32; 2]>,
}

impl Lesion {
    /// A lesion of the given kind with its centre at the origin.
    pub fn draw(descriptors: Descriptors, malignant: bool, draws: &mut Draws) -> Self {
        let Descriptors {
            shape,
            orientation,
            margin,
            posterior,
            echogenicity,
        } = descriptors;
        let aspect = match (shape, orientation) {
            (Shape::Round, _) => draws.between(0.94, 1.06),
            (_, Orientation::Parallel) => draws.between(0.45, 0.85),
            (_, Orientation::NotParallel) => draws.between(1.12, 1.6),
        };
        let size = if malignant {
            draws.between(3.5, 8.0)
        } else {
            draws.between(3.0, 7.5)
        };
        let axes = [size / aspect.sqrt(), size * aspect.sqrt()];
        let radii = contour(shape, margin, axes, draws);
        let reach = radii.iter().copied().fold(0.0, f32::max);
        let step = TAU / ANGLES as f32;
        let contour = (0..ANGLES)
            .map(|i| {
                let r = radii[i];
                let next = radii[(i + 1) % ANGLES];
                let before = radii[(i + ANGLES - 1) % ANGLES];
                let slope = (next - before) / (2.0 * step * r);
                [r, 1.0 / (1.0 + slope * slope).sqrt()]
            })
            .collect();
        let (level, mottle) = match echogenicity {
            Echogenicity::Anechoic => (draws.between(-52.0, -40.0), 1.0),
            Echogenicity::Hypoechoic => (draws.between(-30.0, -23.0), 2.0),
            Echogenicity::Isoechoic => (draws.between(-20.0, -16.5), 2.0),
            Echogenicity::Heterogeneous => (draws.between(-27.0, -21.0), 7.0),
        };
        let mottle = mottle + if malignant { 1.5 } else { 0.0 };
        let thickness = 1.6 * axes[1];
        let loss = match posterior {
            Posterior::Unchanged => draws.between(-1.0, 1.0),
            Posterior::Enhancement => -draws.between(5.0, 10.0),
            Posterior::Shadow => draws.between(9.0, 22.0),
        } / thickness;
        let softness = match margin {
            Margin::Circumscribed => draws.between(0.1, 0.3),
            Margin::Lobulated | Margin::Spiculated => draws.between(0.3, 0.9),
            Margin::Indistinct => draws.between(1.2, 2.6),
        };
        let halo = if malignant || margin != Margin::Circumscribed {
            [draws.between(0.0, 6.0), draws.between(1.0, 2.5)]
        } else {
            [draws.between(0.0, 2.5), draws.between(0.5, 1.2)]
        };
        let capsule = if margin == Margin::Circumscribed {
            draws.between(0.3, 1.0)
        } else {
            0.0
        };
        let calcifications = if draws.chance(if malignant { 0.35 } else { 0.08 }) {
            (0..4 + draws.below(12))
                .map(|_| {
                    let angle = draws.between(0.0, TAU);
                    let r = 0.75 * draws.uniform().sqrt();
                    [r * axes[0] * angle.cos(), r * axes[1] * angle.sin()]
                })
                .collect()
        } else {
            Vec::new()
        };
        Self {
            centre: [0.0; 2],
            axes,
            contour,
            reach,
            level,
            mottle,
            softness,
            loss,
            halo,
            capsule,
            calcifications,
        }
    }

    /// How far the contour reaches from the centre: left, right, up, down.
    pub fn extent(&self) -> [f32; 4] {
        let mut extent = [0.0f32; 4];
        for (i, [radius, _]) in self.contour.iter().enumerate() {
            let (sin, cos) = (i as f32 * TAU / ANGLES as f32).sin_cos();
            for (far, along) in extent.iter_mut().zip([-cos, cos, -sin, sin]) {
                *far = far.max(radius * along);
            }
        }
        extent
    }

    /// Distance in mm from (x, depth) to the contour, positive inside: exact in sign, and in size to
    /// first order near the contour. `None` beyond any influence of the lesion.
    pub fn inside(&self, x: f32, z: f32) -> Option<f32> {
        let (dx, dz) = (x - self.centre[0], z - self.centre[1]);
        let limit = self.reach + 3.0 * self.softness.max(self.halo[1]);
        let square = dx * dx + dz * dz;
        if square > limit * limit {
            return None;
        }
        let turn = (dz.atan2(dx) / TAU + 1.0) * ANGLES as f32;
        let i = turn as usize;
        let t = turn - i as f32;
        let ([r0, n0], [r1, n1]) = (self.contour[i % ANGLES], self.contour[(i + 1) % ANGLES]);
        let (radius, normal) = (r0 + t * (r1 - r0), n0 + t * (n1 - n0));
        Some((radius - square.sqrt()) * normal)
    }
}

/// Radius over angle: an ellipse, bent by low harmonics as far as its shape is irregular, then given its
/// margin.
fn contour(shape: Shape, margin: Margin, axes: [f32; 2], draws: &mut Draws) -> Vec<f32> {
    let tilt = match shape {
        Shape::Round => draws.between(-PI, PI),
        _ => draws.between(-0.25, 0.25),
    };
    let bend = match shape {
        Shape::Irregular => draws.between(0.18, 0.32),
        Shape::Oval | Shape::Round => draws.between(0.01, 0.04),
    };
    let harmonics: Vec<[f32; 3]> = (2..8)
        .map(|k| {
            let k = k as f32;
            [k, bend * draws.normal() / k, draws.between(0.0, TAU)]
        })
        .collect();
    // Where along the turn the lobes lie closer or wider.
    let warp = [draws.between(0.0, TAU), draws.between(0.0, TAU)];
    let lobes = (8 + draws.below(7)) as f32;
    let lobe_height = draws.between(0.06, 0.13);
    let spikes: Vec<[f32; 3]> = (0..9 + draws.below(10))
        .map(|_| {
            [
                draws.between(0.0, TAU),
                0.1 + 0.5 * draws.uniform().powi(2),
                draws.between(0.03, 0.09),
            ]
        })
        .collect();
    (0..ANGLES)
        .map(|i| {
            let angle = i as f32 * TAU / ANGLES as f32;
            let (sin, cos) = (angle - tilt).sin_cos();
            let ellipse = axes[0] * axes[1] / (axes[1] * cos).hypot(axes[0] * sin);
            let wave: f32 = harmonics
                .iter()
                .map(|[k, a, phase]| a * (k * angle + phase).cos())
                .sum();
            let detail = match margin {
                Margin::Circumscribed => 1.0,
                // Low wobble only: the border itself is what cannot be seen.
                Margin::Indistinct => 1.0 + 0.05 * (5.0 * angle + warp[0]).sin(),
                Margin::Lobulated => {
                    let turn = angle
                        + 0.25 * (2.0 * angle + warp[0]).sin()
                        + 0.12 * (3.0 * angle + warp[1]).sin();
                    1.0 + lobe_height * ((lobes / 2.0 * turn).sin().abs() - 0.6)
                }
                Margin::Spiculated => {
                    let spike = |&[at, height, width]: &[f32; 3]| {
                        let d = (angle - at + PI).rem_euclid(TAU) - PI;
                        height * (-(d / width).abs()).exp()
                    };
                    0.9 + spikes.iter().map(spike).fold(0.0, f32::max)
                }
            };
            ellipse * wave.exp() * detail
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::philox::Philox;

    const DRAWS: usize = 4000;

    /// How many of a class's lesions have a property.
    fn count(malignant: bool, has: impl Fn(&Descriptors) -> bool) -> f64 {
        let mut draws = Philox::new(4, 0).draws();
        let hits = (0..DRAWS).filter(|_| has(&Descriptors::draw(malignant, &mut draws)));
        hits.count() as f64 / DRAWS as f64
    }

    /// Each suspicious descriptor is more frequent among malignant lesions, and none decides.
    #[test]
    fn descriptors_follow_the_lexicon_and_overlap() {
        let suspicious: [fn(&Descriptors) -> bool; 4] = [
            |d| d.shape == Shape::Irregular,
            |d| d.orientation == Orientation::NotParallel,
            |d| d.margin != Margin::Circumscribed,
            |d| d.posterior == Posterior::Shadow,
        ];
        for (i, has) in suspicious.into_iter().enumerate() {
            let (benign, malignant) = (count(false, has), count(true, has));
            assert!(malignant > benign + 0.25, "{i}: {benign} {malignant}");
            assert!(
                benign > 0.04 && malignant < 0.96,
                "{i}: {benign} {malignant}"
            );
        }
    }

    #[test]
    fn labels_have_their_shares() {
        let mut draws = Philox::new(4, 1).draws();
        let mut counts = [0.0; 3];
        for _ in 0..DRAWS {
            counts[draw_label(&mut draws) as usize] += 1.0 / DRAWS as f64;
        }
        for (label, share) in [
            (Label::Benign, 0.5),
            (Label::Malignant, 0.35),
            (Label::Normal, 0.15),
        ] {
            let found = counts[label as usize];
            // Four standard errors of a share.
            assert!(
                (found - share).abs() < 2.0 / (DRAWS as f64).sqrt(),
                "{label}: {found}"
            );
        }
    }

    /// The signed distance vanishes on the contour and grows inwards with slope 1 where it is smooth.
    #[test]
    fn distance_to_a_round_contour() {
        let descriptors = Descriptors {
            shape: Shape::Round,
            orientation: Orientation::NotParallel,
            margin: Margin::Circumscribed,
            posterior: Posterior::Unchanged,
            echogenicity: Echogenicity::Hypoechoic,
        };
        let lesion = Lesion::draw(descriptors, false, &mut Philox::new(1, 1).draws());
        let [left, right, ..] = lesion.extent();
        assert!(lesion.inside(0.99 * right, 0.0).unwrap() > 0.0);
        assert!(lesion.inside(-1.02 * left, 0.0).unwrap() < 0.0);
        let slope =
            lesion.inside(right - 0.6, 0.0).unwrap() - lesion.inside(right - 0.1, 0.0).unwrap();
        assert!((slope - 0.5).abs() < 0.03, "{slope}");
        assert!(lesion.inside(20.0, 0.0).is_none());
    }

    /// 4πA/P² of the contour: a smooth oval is compact, the suspicious margins are not.
    #[test]
    fn margins_lengthen_the_contour() {
        let compactness = |margin: Margin| {
            let mut draws = Philox::new(8, 0).draws();
            let mean: f32 = (0..50)
                .map(|_| {
                    let radii = contour(Shape::Oval, margin, [6.0, 4.0], &mut draws);
                    let point = |i: usize| {
                        let (sin, cos) = (i as f32 * TAU / ANGLES as f32).sin_cos();
                        [radii[i % ANGLES] * cos, radii[i % ANGLES] * sin]
                    };
                    let (mut area, mut perimeter) = (0.0, 0.0);
                    for i in 0..ANGLES {
                        let ([x0, y0], [x1, y1]) = (point(i), point(i + 1));
                        area += 0.5 * (x0 * y1 - x1 * y0);
                        perimeter += (x1 - x0).hypot(y1 - y0);
                    }
                    4.0 * PI * area / (perimeter * perimeter)
                })
                .sum();
            mean / 50.0
        };
        let smooth = compactness(Margin::Circumscribed);
        // An ellipse of axes 3:2 has 0.923.
        assert!((smooth - 0.92).abs() < 0.02, "{smooth}");
        let (lobulated, spiculated) = (
            compactness(Margin::Lobulated),
            compactness(Margin::Spiculated),
        );
        assert!(lobulated < 0.9 * smooth, "{lobulated}");
        assert!(spiculated < 0.7 * smooth, "{spiculated}");
    }
}
