//! Phantoms: B-mode images of breast tissue and lesions made from numbers alone, so that training and
//! external testing need no download.
//!
//! A lesion is described in the BI-RADS lexicon's words, drawn with chances that differ between benign
//! and malignant but overlap; it lies in layered tissue; a scanner model turns both into speckle. Four
//! sites stand for four hospitals with different machines. The mask is the lesion's contour, exact. These images
//! resemble ultrasound; they are no substitute for it.

mod lesion;
mod marks;
mod scanner;
mod tissue;

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

pub use lesion::{Descriptors, Echogenicity, Margin, Orientation, Posterior, Shape};

use crate::data::Label;
use crate::data::image::{Gray, write_png};
use crate::device::philox::{Draws, Philox};
use crate::error::{Error, Result};
use lesion::Lesion;
use scanner::Scanner;
use tissue::Tissue;

/// A hospital with its machine and habits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// A modern linear array at 11 MHz: fine grain, compounding, wide dynamic range.
    A,
    /// A linear array at 8 MHz with little compounding: contrasty, calipers on the lesion, a mark in the corner.
    B,
    /// A trapezoid view at 9 MHz: black corners, flat grey map, depth scale, reverberation.
    C,
    /// An old machine at 6 MHz: small, coarse, saturated, text in the margin.
    D,
}

impl Site {
    /// All four.
    pub const ALL: [Site; 4] = [Site::A, Site::B, Site::C, Site::D];
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for Site {
    type Err = String;

    /// `A`, `B`, `C` or `D`, in either case.
    fn from_str(text: &str) -> Result<Self, String> {
        Site::ALL
            .into_iter()
            .find(|site| text.eq_ignore_ascii_case(&site.to_string()))
            .ok_or_else(|| format!("expected A, B, C or D, found {text:?}"))
    }
}

/// One made image and everything known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phantom {
    /// The picture.
    pub image: Gray,
    /// 255 where a pixel's centre lies within the lesion's contour, 0 elsewhere.
    pub mask: Gray,
    /// Normal, benign or malignant.
    pub label: Label,
    /// The lesion in the lexicon's words; `None` for normal.
    pub descriptors: Option<Descriptors>,
}

/// Streams of one image, so that what is drawn for one part does not shift another.
fn stream(site: Site, seed: u64, index: u64, part: u64) -> Philox {
    Philox::new(seed, (site as u64) << 56 | part << 48 | index)
}

fn label(site: Site, seed: u64, index: u64) -> Label {
    lesion::draw_label(&mut stream(site, seed, index, 0).draws())
}

/// Image `index` (below 2⁴⁸) of the series `seed` of a site; a pure function of the three.
pub fn generate(site: Site, seed: u64, index: u64) -> Phantom {
    let label = label(site, seed, index);
    let mut draws = stream(site, seed, index, 1).draws();
    let malignant = label == Label::Malignant;
    let descriptors = label
        .is_lesion()
        .then(|| Descriptors::draw(malignant, &mut draws));
    let lesion = descriptors.map(|descriptors| Lesion::draw(descriptors, malignant, &mut draws));

    let mut draws = stream(site, seed, index, 2).draws();
    let scanner = scanner(site, &mut draws);
    let depth = draws.between(scanner.depth[0], scanner.depth[1]);
    let view = scanner.field_of_view(depth);
    let hidden = |z| scanner.hidden(view, z);
    let tissue = Tissue::draw(
        stream(site, seed, index, 3),
        view,
        hidden,
        lesion,
        &mut draws,
    );
    let frame = scanner.scan(stream(site, seed, index, 4), &mut draws, depth, &tissue);

    let mut image = Gray {
        width: scanner.width,
        height: scanner.height,
        pixels: frame.pixels,
    };
    marks::draw(site, &mut draws, frame.lesion_box, depth, &mut image);
    let mask = Gray {
        pixels: frame
            .mask
            .iter()
            .map(|&inside| if inside { 255 } else { 0 })
            .collect(),
        ..image
    };
    Phantom {
        image,
        mask,
        label,
        descriptors,
    }
}

/// Each site's machine, with the settings that its operators vary.
fn scanner(site: Site, draws: &mut Draws) -> Scanner {
    match site {
        Site::A => Scanner {
            width: 440 + draws.below(60) as usize,
            height: 400 + draws.below(40) as usize,
            depth: [30.0, 40.0],
            sector: 0.0,
            frequency: 11.0,
            cycles: 2.0,
            f_number: 3.2,
            focus: draws.between(0.3, 0.6),
            looks: 3,
            dynamic_range: 66.0,
            white: draws.between(17.0, 23.0),
            grey_map: 1.3,
            sharpen: 0.1,
            noise: -74.0,
            loss: draws.between(0.0, 0.35),
            reverberation: 0.08,
        },
        Site::B => Scanner {
            width: 380 + draws.below(40) as usize,
            height: 440 + draws.below(50) as usize,
            depth: [36.0, 48.0],
            sector: 0.0,
            frequency: 8.0,
            cycles: 2.2,
            f_number: 3.2,
            focus: draws.between(0.25, 0.5),
            looks: 2,
            dynamic_range: 56.0,
            white: draws.between(13.0, 19.0),
            grey_map: 1.3,
            sharpen: 0.0,
            noise: -70.0,
            loss: draws.between(0.1, 0.6),
            reverberation: 0.15,
        },
        Site::C => Scanner {
            width: 540 + draws.below(40) as usize,
            height: 400 + draws.below(30) as usize,
            depth: [36.0, 46.0],
            sector: 0.3,
            frequency: 9.0,
            cycles: 2.0,
            f_number: 3.2,
            focus: draws.between(0.3, 0.6),
            looks: 3,
            dynamic_range: 76.0,
            white: draws.between(23.0, 30.0),
            grey_map: 1.2,
            sharpen: 0.1,
            noise: -74.0,
            loss: draws.between(-0.05, 0.25),
            reverberation: 0.4,
        },
        Site::D => Scanner {
            width: 320 + draws.below(30) as usize,
            height: 280 + draws.below(40) as usize,
            depth: [34.0, 44.0],
            sector: 0.0,
            frequency: 6.0,
            cycles: 3.0,
            f_number: 4.2,
            focus: draws.between(0.3, 0.5),
            looks: 2,
            dynamic_range: 48.0,
            white: draws.between(8.0, 14.0),
            grey_map: 1.2,
            sharpen: 0.0,
            noise: -62.0,
            loss: draws.between(0.0, 0.5),
            reverberation: 0.25,
        },
    }
}

/// Writes `count` images as a data set in BUSI's layout: `benign/benign (1).png` with
/// `benign/benign (1)_mask.png` and so on, normals with a black mask. `sites` take turns, each with its images 0, 1
/// and so on. Images are made in parallel; `done` is called after each, from any thread, with the number written so
/// far, and its error ends the work. Returns the number of benign, malignant and normal images.
///
/// # Errors
/// [`Error::Argument`] if `sites` is empty; [`Error::File`] if `folder` exists and is not empty, or cannot be written; those of `done`. The
/// images written until then are taken away again.
pub fn write(
    sites: &[Site],
    count: usize,
    seed: u64,
    folder: &Path,
    done: &(dyn Fn(usize) -> Result<()> + Sync),
) -> Result<[usize; 3]> {
    if sites.is_empty() {
        return Err(Error::argument("sites", "expected one or more, found none"));
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::caused(folder, "cannot be made", e))?;
    let mut entries =
        std::fs::read_dir(folder).map_err(|e| Error::caused(folder, "cannot be read", e))?;
    if entries.next().is_some() {
        return Err(Error::file(
            folder,
            "expected a new or empty folder, found files in it",
        ));
    }
    for label in Label::ALL {
        let class = folder.join(label.as_str());
        std::fs::create_dir(&class).map_err(|e| Error::caused(&class, "cannot be made", e))?;
    }
    let mut counts = [0; 3];
    let jobs: Vec<(Site, u64, Label, usize)> = (0..count)
        .map(|i| {
            let (site, index) = (sites[i % sites.len()], (i / sites.len()) as u64);
            let label = label(site, seed, index);
            let number = &mut counts[label as usize];
            *number += 1;
            (site, index, label, *number)
        })
        .collect();
    let written = AtomicUsize::new(0);
    let write = |(site, index, label, number): (Site, u64, Label, usize)| {
        let Phantom { image, mask, .. } = generate(site, seed, index);
        let stem = folder
            .join(label.as_str())
            .join(format!("{label} ({number})"));
        write_png(&stem.with_extension("png"), &image)?;
        write_png(
            &folder
                .join(label.as_str())
                .join(format!("{label} ({number})_mask.png")),
            &mask,
        )?;
        done(written.fetch_add(1, Ordering::Relaxed) + 1)
    };
    let result = jobs.into_par_iter().try_for_each(write);
    if result.is_err() {
        // Part of a data set would pass for the whole. The folder was empty, so all in it is ours.
        for label in Label::ALL {
            let _ = std::fs::remove_dir_all(folder.join(label.as_str()));
        }
    }
    result.map(|()| counts)
}
