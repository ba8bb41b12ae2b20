//! The anatomy under the transducer: skin, fat lobules between septa, gland, muscle, chest wall.

use crate::data::phantom::lesion::Lesion;
use crate::device::philox::{Draws, Philox};

/// What sound meets at a point.
#[derive(Clone, Copy, Debug)]
pub(super) struct Echo {
    /// Diffuse scattering, dB relative to bright glandular tissue.
    pub level: f32,
    /// Amplitude of the coherent (specular) reflection, 1 being as strong as level 0 dB.
    pub specular: f32,
    /// Two-way loss in excess of what the depth gain compensates, dB for a mm.
    pub loss: f32,
}

/// Smooth random field of unit lattice and about unit variance, periodic over [`LATTICE`] cells.
struct Field(Vec<f32>);

const LATTICE: usize = 64;

impl Field {
    fn new(key: Philox) -> Self {
        let values = (0..(LATTICE * LATTICE / 4) as u64).flat_map(|i| key.normal4(i));
        // Interpolation averages neighbours; 1.5 restores the variance.
        Self(values.map(|v| 1.5 * v).collect())
    }

    /// The lattice's own value.
    #[inline]
    fn node(&self, i: i32, j: i32) -> f32 {
        let wrap = |i: i32| (i & (LATTICE as i32 - 1)) as usize;
        self.0[wrap(j) * LATTICE + wrap(i)]
    }

    #[inline]
    fn at(&self, x: f32, y: f32) -> f32 {
        let ((i, tx), (j, ty)) = (split(x), split(y));
        let (tx, ty) = (tx * tx * (3.0 - 2.0 * tx), ty * ty * (3.0 - 2.0 * ty));
        let (left, right) = (self.node(i, j), self.node(i + 1, j));
        let upper = left + tx * (right - left);
        let (left, right) = (self.node(i, j + 1), self.node(i + 1, j + 1));
        let lower = left + tx * (right - left);
        upper + ty * (lower - upper)
    }

    /// Two octaves.
    #[inline]
    fn rough(&self, x: f32, y: f32) -> f32 {
        0.85 * self.at(x, y) + 0.5 * self.at(2.0 * x + 17.3, 2.0 * y + 5.9)
    }
}

/// The layers under one point of the skin.
#[derive(Clone, Copy)]
struct Layers {
    /// Depths of the lower borders of skin, fat, gland, retromammary fat and muscle.
    borders: [f32; 5],
    /// How much of each border's reflection is seen, 0 to 1.
    gaps: [f32; 5],
}

/// Layers are tabulated every so many mm, finer than a pixel, beginning `MARGIN` left of the image.
const COLUMN: f32 = 0.05;
const MARGIN: f32 = 1.0;

/// One patient's tissue, with or without a lesion. Lengths in mm, x from the image's left edge, z from
/// the skin.
pub(super) struct Tissue {
    field: Field,
    lesion: Option<Lesion>,
    layers: Vec<Layers>,
    /// Size of the fat lobules, lateral and axial.
    lobule: [f32; 2],
    septa: f32,
    /// Share of fat among the gland, 0 to 1.
    fatty: f32,
    fascia: f32,
}

/// The integer below `x` and the remainder, without `floor`, a library call on baseline x86-64.
#[inline]
fn split(x: f32) -> (i32, f32) {
    let i = x as i32 - i32::from(x < 0.0);
    (i, x - i as f32)
}

#[inline]
fn bell(d: f32, width: f32) -> f32 {
    let t = d / width;
    (-t * t).exp()
}

#[inline]
fn smoothstep(low: f32, high: f32, v: f32) -> f32 {
    let t = ((v - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

impl Tissue {
    /// Tissue for an image `width`×`depth`; the lesion is moved among the gland, to where all of it is
    /// seen: `hidden` is how much of the image's left and right lies outside the beams at a depth.
    pub fn draw(
        key: Philox,
        [width, depth]: [f32; 2],
        hidden: impl Fn(f32) -> f32,
        lesion: Option<Lesion>,
        draws: &mut Draws,
    ) -> Self {
        let skin = draws.between(1.0, 2.0);
        let fat = skin + draws.between(0.08, 0.3) * depth;
        let gland = fat + draws.between(0.2, 0.45) * depth;
        let retro = gland + draws.between(0.5, 3.5);
        let muscle = retro + draws.between(5.0, 11.0);
        let relief = draws.between(0.3, 1.1);
        let tilt = draws.between(-0.12, 0.12);
        let (lateral, axial) = (draws.uniform(), draws.uniform());
        let lesion = lesion.map(|mut lesion| {
            // Shares of the range, or its middle where there is no room.
            let inner =
                |low: f32, high: f32, t: f32| low + if low < high { t } else { 0.5 } * (high - low);
            let [left, right, above, below] = lesion.extent();
            let z = inner(fat - 1.0, gland, axial)
                .min(depth - below - 3.0)
                .max(skin + above + 0.5);
            let side = hidden(z - above) + 1.0;
            lesion.centre = [inner(side + left, width - side - right, lateral), z];
            lesion
        });
        let field = Field::new(key);
        let layers = (0..((width + 2.0 * MARGIN) / COLUMN) as usize)
            .map(|column| {
                let x = column as f32 * COLUMN - MARGIN;
                let wave = |row: f32, scale: f32| field.at(x / scale + 7.7 * row, row);
                let skin = skin + 0.12 * wave(1.0, 14.0);
                let fat = fat + relief * (1.6 * wave(2.0, 13.0) + 0.5 * wave(3.0, 4.0));
                let gland_here = (gland
                    + relief * (1.4 * wave(4.0, 15.0) + 0.4 * wave(5.0, 5.0))
                    + tilt * (x - width / 2.0))
                    .max(fat + 1.0);
                // Deeper layers are stiffer and follow less.
                let follow = 0.6 * (gland_here - gland);
                let retro = (retro + follow).max(gland_here + 0.3);
                let muscle = muscle + 0.7 * follow + 0.5 * relief * wave(8.0, 18.0);
                Layers {
                    borders: [skin, fat, gland_here, retro, muscle],
                    gaps: std::array::from_fn(|k| {
                        smoothstep(-0.8, 0.8, field.at(x / 5.0, 31.0 + k as f32))
                    }),
                }
            })
            .collect();
        Self {
            field,
            lesion,
            layers,
            lobule: [draws.between(6.0, 13.0), draws.between(2.5, 5.0)],
            septa: draws.between(0.6, 2.2),
            fatty: draws.between(0.0, 1.0),
            fascia: draws.between(0.8, 2.5),
        }
    }

    /// Whether the point lies within the lesion's contour.
    pub fn is_lesion(&self, x: f32, z: f32) -> bool {
        let distance = self.lesion.as_ref().and_then(|l| l.inside(x, z));
        distance.is_some_and(|d| d > 0.0)
    }

    /// The echo at (x, z).
    pub fn echo(&self, x: f32, z: f32) -> Echo {
        let around = self.healthy(x, z);
        match &self.lesion {
            Some(lesion) => match lesion.inside(x, z) {
                Some(inside) => self.lesion_echo(lesion, inside, x, z, around),
                None => around,
            },
            None => around,
        }
    }

    fn lesion_echo(&self, lesion: &Lesion, inside: f32, x: f32, z: f32, around: Echo) -> Echo {
        let field = &self.field;
        let share = smoothstep(-lesion.softness, lesion.softness, inside);
        let mottle = lesion.mottle * field.rough(x / 2.2 + 3.1, z / 1.6 + 40.7);
        let [bright, width] = lesion.halo;
        let patchy = 0.6 + 0.4 * field.at(x / 4.0 + 11.0, z / 4.0);
        let halo = if inside < 0.0 {
            bright * patchy.max(0.0) * bell(inside, width)
        } else {
            0.0
        };
        let mut specular = around.specular * (1.0 - share);
        if lesion.capsule > 0.0 {
            // A mirror is seen where it faces the beam: above and below.
            let (dx, dz) = (x - lesion.centre[0], z - lesion.centre[1]);
            let facing =
                dz / lesion.axes[1] / (dx / lesion.axes[0]).hypot(dz / lesion.axes[1]).max(1e-3);
            let facing = facing * facing;
            specular += lesion.capsule * facing * facing * bell(inside + 0.1, 0.16);
        }
        for [cx, cz] in &lesion.calcifications {
            let d = (x - lesion.centre[0] - cx).hypot(z - lesion.centre[1] - cz);
            specular += 1.3 * bell(d, 0.14);
        }
        // Refraction along the flanks of a smooth border takes sound out of the beam.
        let flank = if lesion.capsule > 0.0 {
            1.2 * bell(inside, 0.3)
        } else {
            0.0
        };
        let side = ((x - lesion.centre[0]).abs() / lesion.axes[0]).min(1.1);
        Echo {
            level: around.level + halo + share * (lesion.level + mottle - around.level - halo),
            specular,
            loss: around.loss * (1.0 - share) + lesion.loss * share + flank * side.powi(6),
        }
    }

    fn healthy(&self, x: f32, z: f32) -> Echo {
        let field = &self.field;
        let column = ((x + MARGIN) / COLUMN) as usize;
        let Layers {
            borders: [skin, fat, gland, retro, muscle],
            gaps,
        } = self.layers[column.min(self.layers.len() - 1)];
        let gap = |k: usize| gaps[k];
        // Short bright strokes: fibres that happen to face the beam.
        let stroke = |scale: f32, low: f32| {
            0.8 * smoothstep(low, low + 1.2, field.at(x / 2.3 + 40.0, z / scale + 3.0))
        };

        if z < skin {
            // Bright entry echo, the dermis, and its lower border.
            let line = 1.8 * bell(z - 0.25, 0.16) + 1.1 * bell(skin - z, 0.14) * gap(0);
            return Echo {
                level: -9.0 + 2.0 * field.at(x / 3.0, z / 0.3),
                specular: line,
                loss: 0.0,
            };
        }
        if z < fat {
            let mut echo = self.fat_lobules(x, z, 0.0);
            echo.specular += 0.6 * stroke(0.4, 1.9)
                + self.fascia * 0.5 * gap(1) * bell(fat - z, 0.14)
                + 0.8 * bell(z - skin, 0.14) * gap(0);
            return echo;
        }
        if z < gland {
            // Echogenic stroma in wavy sheets, with islands of fat and ducts between them.
            let warp = 0.7 * field.at(x / 7.0 + 9.0, z / 7.0);
            let sheet = field.rough(x / 4.0 + 2.0, (z + warp) / 1.1);
            let island = field.at(x / 4.2 + 21.0, (z + warp) / 2.1 + 13.0)
                + 0.5 * field.rough(x / 1.9, (z + warp) / 0.9 + 29.0);
            let dark = smoothstep(0.6 - 1.2 * self.fatty, 2.2 - 1.2 * self.fatty, island);
            let ridge = field.rough(x / 5.5 + 33.0, (z + 1.5 * warp) / 1.2 + 3.0);
            let strand =
                bell(ridge, 0.16) * smoothstep(0.0, 1.5, field.at(x / 3.0, z / 2.0 + 50.0));
            return Echo {
                level: -5.0 + 2.2 * sheet - 11.0 * dark,
                specular: 0.9 * strand
                    + stroke(0.45, 1.4)
                    + self.fascia * 0.6 * gap(2) * bell(gland - z, 0.15)
                    + self.fascia * 0.4 * gap(1) * bell(z - fat, 0.14),
                loss: 0.05 * sheet + 0.35 * strand,
            };
        }
        if z < retro {
            let mut echo = self.fat_lobules(x, z, 37.0);
            echo.specular += self.fascia * gap(3) * bell(retro - z, 0.16);
            return echo;
        }
        let along = z - retro;
        if z < muscle {
            // Fascicles with bright perimysium along them.
            let bend = 0.5 * field.at(x / 12.0 + 3.0, z / 6.0);
            let ridge = field.rough(x / 11.0 + 51.0, (along + bend) / 0.85);
            let strength = smoothstep(-0.6, 1.2, field.at(x / 5.0 + 8.0, along / 1.5 + 20.0));
            return Echo {
                level: -18.0 + 2.0 * ridge,
                specular: 1.0 * bell(ridge, 0.13) * strength
                    + stroke(0.35, 1.3)
                    + self.fascia * gap(3) * bell(along, 0.16)
                    + 0.7 * self.fascia * gap(4) * bell(muscle - z, 0.2),
                loss: 0.05,
            };
        }
        // Intercostal tissue and pleura: mostly dark, with a few layered echoes.
        let below = z - muscle;
        let ridge = field.at(x / 15.0 + 5.0, below / 1.1 + 44.0);
        Echo {
            level: -20.0 - 0.5 * below.min(16.0),
            specular: 0.35 * bell(ridge, 0.12)
                + 0.7 * stroke(0.4, 1.6)
                + 0.7 * self.fascia * gap(4) * bell(below, 0.2),
            loss: 0.25,
        }
    }

    /// Fat: dark lobules, the cells of a warped Voronoi diagram, between bright septa.
    fn fat_lobules(&self, x: f32, z: f32, offset: f32) -> Echo {
        let field = &self.field;
        let [wide, tall] = self.lobule;
        let u = (x + 2.0 * field.at(x / 8.0 + offset, z / 5.0 + 1.0)) / wide + offset;
        let v = (z + 1.0 * field.at(x / 7.0 + 4.0, z / 6.0 + offset)) / tall;
        let ((cell_u, _), (cell_v, _)) = (split(u), split(v));
        let mut nearest = [(f32::INFINITY, 0.0, 0.0, 0.0); 2];
        for cv in cell_v - 1..=cell_v + 1 {
            for cu in cell_u - 1..=cell_u + 1 {
                let jitter = |k: i32| 0.5 + 0.22 * field.node(cu + k, cv - k).clamp(-2.0, 2.0);
                let (pu, pv) = (cu as f32 + jitter(5), cv as f32 + jitter(12));
                let d = (pu - u).powi(2) + (pv - v).powi(2);
                let candidate = (d, pu, pv, field.node(cu + 3, cv + 9));
                if d < nearest[0].0 {
                    nearest = [candidate, nearest[0]];
                } else if d < nearest[1].0 {
                    nearest[1] = candidate;
                }
            }
        }
        let [(d1, u1, v1, own), (d2, u2, v2, _)] = nearest;
        // Distance to the bisector in mm, and how far its normal lies along the beam.
        let (nu, nv) = ((u2 - u1) / wide, (v2 - v1) / tall);
        let gradient = nu.hypot(nv).max(1e-6);
        let distance = 0.5 * (d2 - d1) / gradient;
        let facing = (nv / gradient).abs();
        let strength = smoothstep(-1.0, 1.0, field.at(x / 4.0 + 25.0, z / 4.0 + offset));
        let septum = bell(distance, 0.13) * (0.15 + 0.85 * facing.powi(3)) * strength;
        Echo {
            level: -17.0 + 1.2 * own + 1.0 * field.rough(x / 1.6, z / 1.0 + 9.0),
            specular: self.septa * septum,
            loss: -0.05 + 0.5 * septum,
        }
    }
}
