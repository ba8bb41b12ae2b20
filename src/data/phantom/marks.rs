//! What sites leave in the picture besides tissue: calipers, scales, text.

use super::Site;
use crate::data::image::Gray;
use crate::device::philox::Draws;

/// Marks the image as the site's operators do. Calipers do not depend on the diagnosis.
pub(super) fn draw(
    site: Site,
    draws: &mut Draws,
    lesion: Option<[usize; 4]>,
    depth: f32,
    image: &mut Gray,
) {
    let measured = draws.chance(0.35);
    match site {
        Site::A => {}
        Site::B => {
            if let (true, Some([left, right, top, bottom])) = (measured, lesion) {
                let (cx, cy) = ((left + right) / 2, (top + bottom) / 2);
                dots(image, [left, cy], [right, cy]);
                dots(image, [cx, top], [cx, bottom]);
                for [x, y] in [[left, cy], [right, cy], [cx, top], [cx, bottom]] {
                    cross(image, x, y, 4);
                }
            }
            text(image, draws, [6, 6], 2);
        }
        Site::C => {
            // Centimetre ticks along the right edge.
            let centimetre = image.height as f32 * 10.0 / depth;
            for k in 1..=(depth / 10.0) as usize {
                let y = (k as f32 * centimetre) as usize;
                for x in image.width - 7..image.width - 2 {
                    set(image, x, y, 190);
                }
            }
        }
        Site::D => {
            let y = image.height - 18;
            let count = 4 + draws.below(4) as usize;
            text(image, draws, [8, y], count);
            if let (true, Some([left, right, top, bottom])) = (measured, lesion) {
                let cy = (top + bottom) / 2;
                cross(image, left, cy, 3);
                cross(image, right, cy, 3);
            }
        }
    }
}

fn set(image: &mut Gray, x: usize, y: usize, level: u8) {
    if x < image.width && y < image.height {
        image.pixels[y * image.width + x] = level;
    }
}

fn cross(image: &mut Gray, x: usize, y: usize, arm: usize) {
    for k in 0..=2 * arm {
        set(image, (x + k).wrapping_sub(arm), y, 255);
        set(image, x, (y + k).wrapping_sub(arm), 255);
    }
}

fn dots(image: &mut Gray, from: [usize; 2], to: [usize; 2]) {
    let length = (to[0] - from[0]).max(to[1] - from[1]);
    for k in (0..=length).step_by(4) {
        let at = |i: usize| from[i] + (to[i] - from[i]) * k / length.max(1);
        set(image, at(0), at(1), 220);
    }
}

/// `count` capitals and digits in a 3×5 type of dots two pixels wide.
fn text(image: &mut Gray, draws: &mut Draws, [x, y]: [usize; 2], count: usize) {
    // Rows of three dots, top to bottom, highest bit first: L R T B 1 2 3 4 5 6 7 9.
    const GLYPHS: [u16; 12] = [
        0b100_100_100_100_111,
        0b110_101_110_101_101,
        0b111_010_010_010_010,
        0b110_101_110_101_110,
        0b010_110_010_010_111,
        0b111_001_111_100_111,
        0b111_001_111_001_111,
        0b101_101_111_001_001,
        0b111_100_111_001_111,
        0b111_100_111_101_111,
        0b111_001_010_010_010,
        0b111_101_111_001_111,
    ];
    for place in 0..count {
        let glyph = GLYPHS[draws.below(GLYPHS.len() as u32) as usize];
        for dot in (0..15).filter(|dot| glyph >> (14 - dot) & 1 == 1) {
            let (left, top) = (x + 8 * place + dot % 3 * 2, y + dot / 3 * 2);
            for [dx, dy] in [[0, 0], [1, 0], [0, 1], [1, 1]] {
                set(image, left + dx, top + dy, 230);
            }
        }
    }
}
