//! Data sets behind one trait, letterboxing, augmentation, batches and cross-validation folds.
//!
//! [`open`] reads `NAME:PATH`. Each reader knows its data set's published layout and checks it as a
//! whole when it is opened: every image is hashed, every mask decoded and held against its image
//! and its label. What a user can mend (a missing or damaged file, a mask of another size) is an
//! error that names the file; what is wrong in the data set as published is left out and listed
//! with its reason in [`Source::drops`].

pub mod augment;
pub mod breast;
pub mod busbra;
pub mod busi;
pub mod device;
mod files;
pub mod folder;
pub mod image;
pub mod letterbox;
pub mod loader;
pub mod pack;
pub mod phantom;
pub mod split;
mod table;
pub mod uclm;
pub mod udiat;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use image::Gray;
use letterbox::Letterbox;

/// What a case is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// A lesion that is not cancer.
    Benign,
    /// Cancer.
    Malignant,
    /// No lesion.
    Normal,
}

impl Label {
    /// The three labels.
    pub const ALL: [Label; 3] = [Label::Benign, Label::Malignant, Label::Normal];

    /// `benign`, `malignant` or `normal`, as files spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Label::Benign => "benign",
            Label::Malignant => "malignant",
            Label::Normal => "normal",
        }
    }

    /// Whether there is a lesion.
    pub const fn is_lesion(self) -> bool {
        !matches!(self, Label::Normal)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Label {
    type Err = String;

    /// In any case, surrounding blanks ignored.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        Label::ALL
            .into_iter()
            .find(|label| text.eq_ignore_ascii_case(label.as_str()))
            .ok_or_else(|| format!("expected benign, malignant or normal, found {text:?}"))
    }
}

/// One image of a data set and what is known about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// File name with extension; unique within the data set.
    pub image: String,
    /// The patient, where the data set names one.
    pub patient: Option<String>,
    /// What the case is known to be.
    pub label: Label,
    /// Millimetres per pixel of the original image, where known.
    pub pixel_mm: Option<f64>,
    /// Columns of the original image.
    pub width: usize,
    /// Rows of the original image.
    pub height: usize,
    /// SHA-256 of the original image file, in lower-case hexadecimal.
    pub sha256: String,
}

impl Case {
    /// The file name without its extension.
    pub fn id(&self) -> &str {
        self.image
            .rsplit_once('.')
            .map_or(self.image.as_str(), |(stem, _)| stem)
    }

    /// Where the image lies in a square of side `size`.
    pub fn letterbox(&self, size: usize) -> Letterbox {
        Letterbox::new(self.width, self.height, size)
    }
}

/// A file left out of a data set, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drop {
    /// The image's file name.
    pub file: String,
    /// Why it cannot be used.
    pub reason: String,
}

/// A shape without an image that it fits ([`Source::dropped_mask`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// What the case is known to be.
    pub label: Label,
    /// The patient, where the data set names one.
    pub patient: Option<String>,
    /// The mask at its own size, 0 or 255.
    pub mask: Gray,
}

/// What a data set of [`open_to_test`] does without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lacks {
    /// Diagnoses: what [`Case::label`] says of a lesion means nothing; whether there is one is known.
    pub labels: bool,
    /// Masks of lesions.
    pub masks: bool,
}

/// A data set that was opened and checked.
pub trait Source: Send + Sync {
    /// The name of its reader (`breast`, `busi`, …; for a pack, of the data set packed in it).
    fn name(&self) -> &str;

    /// Its cases, in a fixed order; `i` below is an index into them.
    fn cases(&self) -> &[Case];

    /// The images left out.
    fn drops(&self) -> &[Drop];

    /// What it does without; nothing, unless it was opened by [`open_to_test`].
    fn lacks(&self) -> Lacks {
        Lacks::default()
    }

    /// What is known of the image left out as `drops()[k]`, if the data set has a mask of it: unfit to train on
    /// or to compare with, but a shape that can be measured.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    fn dropped_mask(&self, k: usize) -> Result<Option<Dropped>> {
        let _ = k;
        Ok(None)
    }

    /// The side of its squares if the images are already letterboxed (a pack), `None` if they are
    /// originals.
    fn letterboxed(&self) -> Option<usize> {
        None
    }

    /// Image `i`: the original, or the square of side [`Source::letterboxed`].
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    fn image(&self, i: usize) -> Result<Gray>;

    /// Mask `i` at the original image's size, 0 or 255; black for a normal case, several lesions in
    /// one.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    fn mask(&self, i: usize) -> Result<Gray>;
}

/// The names [`open`] knows.
pub const NAMES: [&str; 7] = [
    "breast", "busi", "uclm", "udiat", "busbra", "folder", "pack",
];

/// Opens `NAME:PATH`, for example `busi:/data/BUSI` (only the first colon separates).
///
/// # Errors
/// [`Error::Argument`] for an unknown name (the nearest is suggested) or a missing path;
/// [`Error::File`] for anything missing or wrong in the data set.
pub fn open(spec: &str) -> Result<Box<dyn Source>> {
    let Some((name, path)) = spec.split_once(':').filter(|(_, path)| !path.is_empty()) else {
        return Err(Error::argument(
            "data",
            format!(
                "expected NAME:PATH with NAME one of {}, found {spec:?}",
                NAMES.join(", ")
            ),
        ));
    };
    let path = Path::new(path);
    Ok(match name {
        "breast" => Box::new(breast::open(path)?),
        "busi" => Box::new(busi::open(path)?),
        "uclm" => Box::new(uclm::open(path)?),
        "udiat" => Box::new(udiat::open(path)?),
        "busbra" => Box::new(busbra::open(path)?),
        "folder" => Box::new(folder::open(path)?),
        "pack" => Box::new(pack::Pack::open(path)?),
        _ => {
            let nearest = NAMES
                .into_iter()
                .min_by_key(|known| strsim::damerau_levenshtein(known, name))
                .unwrap_or_default();
            return Err(Error::argument(
                spec,
                format!(
                    "unknown data set {name:?}, did you mean {nearest:?}? Known are {}",
                    NAMES.join(", ")
                ),
            ));
        }
    })
}

/// Opens a data set to test on, as [`open`] does, but lets a `folder:` be without `labels.csv` or without `masks/`:
/// a part of the metrics can be computed all the same ([`Source::lacks`]).
///
/// # Errors
/// As [`open`].
pub fn open_to_test(spec: &str) -> Result<Box<dyn Source>> {
    let Some(path) = spec.strip_prefix("folder:").map(Path::new) else {
        return open(spec);
    };
    let lacks = Lacks {
        labels: !path.join("labels.csv").exists(),
        masks: !path.join("masks").exists(),
    };
    match lacks {
        Lacks {
            labels: true,
            masks: false,
        } => Ok(Box::new(folder::open_unlabelled(path)?)),
        Lacks {
            labels: false,
            masks: true,
        } => Ok(Box::new(folder::open_unmasked(path)?)),
        Lacks {
            labels: true,
            masks: true,
        } if path.is_dir() => {
            let problem = "expected labels.csv, masks or both to compare with, found neither";
            Err(Error::file(path, problem))
        }
        _ => open(spec),
    }
}

/// Groups of cases whose image files are the same bytes, each in case order. Near-duplicates
/// (another crop, another encoding) are not found.
pub fn duplicates(cases: &[Case]) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, case) in cases.iter().enumerate() {
        groups.entry(&case.sha256).or_default().push(i);
    }
    let mut groups: Vec<_> = groups.into_values().filter(|g| g.len() > 1).collect();
    groups.sort();
    groups
}

/// The cases that remain without exact duplicates, and what was left out: of each group the first
/// case stays, or none if its copies carry different labels, since then neither can be trusted.
pub fn without_duplicates(cases: &[Case]) -> (Vec<usize>, Vec<Drop>) {
    let mut keep = vec![true; cases.len()];
    let mut drops = Vec::new();
    for group in duplicates(cases) {
        let first = &cases[group[0]];
        let agree = group.iter().all(|&i| cases[i].label == first.label);
        for &i in &group[usize::from(agree)..] {
            keep[i] = false;
            drops.push(Drop {
                file: cases[i].image.clone(),
                reason: if agree {
                    format!("the same bytes as {}", first.image)
                } else {
                    let names: Vec<_> = group.iter().map(|&i| cases[i].image.as_str()).collect();
                    format!(
                        "the same bytes under different labels: {}",
                        names.join(", ")
                    )
                },
            });
        }
    }
    ((0..cases.len()).filter(|&i| keep[i]).collect(), drops)
}

/// One case as training and evaluation read it: `size × size` bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The letterboxed image, intensity · 255.
    pub image: Vec<u8>,
    /// The letterboxed soft mask, coverage · 255.
    pub mask: Vec<u8>,
}

/// Bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Counts the cases of long work, and may stop it.
pub type Next<'a> = &'a (dyn Fn() -> Result<()> + Sync);

/// All cases of `source` letterboxed to `size` (two bytes a pixel), in case order, read in parallel;
/// `next` is called before each case, from any thread, and its error ends the work. Masks at original size stay on disk and are
/// read one by one with [`Source::mask`].
///
/// # Errors
/// [`Error::Argument`] if `source` is a pack of another size; [`Error::File`] for the first case, in
/// case order, that cannot be read; those of `next`.
pub fn load(source: &dyn Source, size: usize, next: Next) -> Result<Vec<Example>> {
    let examples: Vec<Result<Example>> = (0..source.cases().len())
        .into_par_iter()
        .map(|i| {
            next()?;
            Ok(Example {
                image: letterboxed_image(source, i, size)?,
                mask: letterbox::quantise(&soft_mask(source, i, size)?),
            })
        })
        .collect();
    examples.into_iter().collect()
}

/// Image `i` letterboxed to `size × size`, 8 bits.
///
/// # Errors
/// As [`load`].
pub fn letterboxed_image(source: &dyn Source, i: usize, size: usize) -> Result<Vec<u8>> {
    match source.letterboxed() {
        None => {
            let letterbox = source.cases()[i].letterbox(size);
            Ok(letterbox::quantise(&letterbox.forward(&source.image(i)?)))
        }
        Some(packed) if packed == size => Ok(source.image(i)?.pixels),
        Some(packed) => Err(Error::argument(
            "size",
            format!("expected {packed}, the size this pack was made with, found {size}"),
        )),
    }
}

/// Mask `i` letterboxed to `size × size`: the lesion's coverage of each pixel, in [0, 1].
///
/// # Errors
/// [`Error::File`] if it cannot be read.
pub fn soft_mask(source: &dyn Source, i: usize, size: usize) -> Result<Vec<f32>> {
    let case = &source.cases()[i];
    if case.label.is_lesion() {
        Ok(case.letterbox(size).forward(&source.mask(i)?))
    } else {
        Ok(vec![0.0; size * size])
    }
}
