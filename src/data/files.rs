//! What all readers of image folders share: checks when opened, pixels when asked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::image::{self, Gray};
use super::{Case, Drop, Dropped, Label, Lacks, Source, hex};
use crate::error::{Error, Result};

/// One line of a data set before its files were looked at.
pub(super) struct Entry {
    pub image: PathBuf,
    /// Joined by OR; none for a normal case.
    pub masks: Vec<PathBuf>,
    pub label: Label,
    pub patient: Option<String>,
    pub pixel_mm: Option<f64>,
}

/// Decodes one mask file of a case with the given label.
pub(super) type ReadMask = fn(&Path, Label) -> Result<Gray, Flaw>;

/// A data set of image and mask files.
pub struct Files {
    name: &'static str,
    cases: Vec<Case>,
    paths: Vec<(PathBuf, Vec<PathBuf>)>,
    pub(super) drops: Vec<Drop>,
    pub(super) lacks: Lacks,
    /// What is left of the first drops; later ones have neither label nor mask.
    dropped: Vec<Entry>,
    read_mask: ReadMask,
}

impl Files {
    /// Checks all entries in parallel: the image is hashed and its header read, the masks are decoded
    /// and held against the image's size and the label.
    ///
    /// # Errors
    /// Whatever is wrong with the first bad entry; or no entries at all.
    pub(super) fn new(
        name: &'static str,
        root: &Path,
        entries: Vec<Entry>,
        read_mask: ReadMask,
    ) -> Result<Self> {
        Self::build(name, root, entries, read_mask, |_| false)
    }

    /// As [`Files::new`], but an entry whose flaw `tolerated` accepts is left out and reported.
    pub(super) fn build(
        name: &'static str,
        root: &Path,
        entries: Vec<Entry>,
        read_mask: ReadMask,
        tolerated: impl Fn(&Flaw) -> bool,
    ) -> Result<Self> {
        if entries.is_empty() {
            return Err(Error::file(root, "expected images, found none"));
        }
        let checked: Vec<Result<Case, Flaw>> = entries
            .par_iter()
            .map(|entry| check(entry, read_mask))
            .collect();
        let mut files = Self {
            name,
            cases: Vec::new(),
            paths: Vec::new(),
            drops: Vec::new(),
            lacks: Lacks::default(),
            dropped: Vec::new(),
            read_mask,
        };
        let mut seen = BTreeMap::new();
        for (entry, checked) in entries.into_iter().zip(checked) {
            match checked {
                Ok(case) => {
                    if let Some(other) = seen.insert(case.image.clone(), entry.image.clone()) {
                        return Err(Error::file(
                            &entry.image,
                            format!(
                                "expected a file name of its own, found {} too",
                                other.display()
                            ),
                        ));
                    }
                    files.cases.push(case);
                    files.paths.push((entry.image, entry.masks));
                }
                Err(flaw) if tolerated(&flaw) => {
                    files.drops.push(Drop {
                        file: file_name(&entry.image),
                        reason: flaw.error.to_string(),
                    });
                    files.dropped.push(entry);
                }
                Err(flaw) => return Err(flaw.error),
            }
        }
        Ok(files)
    }
}

/// What is wrong with an entry.
pub(super) struct Flaw {
    /// Whether the files are sound, but mask and image (or label) do not belong together.
    pub mismatch: bool,
    pub error: Error,
}

impl Flaw {
    pub(super) fn mismatch(path: &Path, problem: impl Into<String>) -> Self {
        Self {
            mismatch: true,
            error: Error::file(path, problem),
        }
    }
}

impl From<Error> for Flaw {
    fn from(error: Error) -> Self {
        Self {
            mismatch: false,
            error,
        }
    }
}

fn check(entry: &Entry, read_mask: ReadMask) -> Result<Case, Flaw> {
    let bytes =
        fs::read(&entry.image).map_err(|e| Error::caused(&entry.image, "cannot be read", e))?;
    let (width, height) = image::dimensions(&entry.image, &bytes)?;
    if entry.masks.is_empty() {
        // A normal case, or a reader that knows of a lesion without a mask.
    } else if entry.label.is_lesion() {
        let mask = join(&entry.masks, entry.label, (width, height), read_mask)?;
        if !mask.pixels.contains(&255) {
            return Err(Flaw::mismatch(
                &entry.masks[0],
                format!(
                    "expected a lesion, since the image is labelled {}, \
                     found no pixel at half of full scale or above",
                    entry.label
                ),
            ));
        }
    } else {
        // A black mask says the same at any size, so its size is not held against the image's.
        for path in &entry.masks {
            if read_mask(path, entry.label)?.pixels.contains(&255) {
                return Err(Flaw::mismatch(
                    path,
                    "expected a black mask, since the image is labelled normal, found a lesion in it",
                ));
            }
        }
    }
    Ok(Case {
        image: file_name(&entry.image),
        patient: entry.patient.clone(),
        label: entry.label,
        pixel_mm: entry.pixel_mm,
        width,
        height,
        sha256: hex(&Sha256::digest(&bytes)),
    })
}

/// Several masks of one image joined by OR.
fn join(
    paths: &[PathBuf],
    label: Label,
    (width, height): (usize, usize),
    read_mask: ReadMask,
) -> Result<Gray, Flaw> {
    let mut joined = Gray::zeros(width, height);
    for path in paths {
        let mask = read_mask(path, label)?;
        if (mask.width, mask.height) != (width, height) {
            return Err(Flaw::mismatch(
                path,
                format!(
                    "expected {width}×{height} pixels like its image, found {}×{}",
                    mask.width, mask.height
                ),
            ));
        }
        for (all, &one) in joined.pixels.iter_mut().zip(&mask.pixels) {
            *all |= one;
        }
    }
    Ok(joined)
}

impl Source for Files {
    fn name(&self) -> &str {
        self.name
    }

    fn cases(&self) -> &[Case] {
        &self.cases
    }

    fn drops(&self) -> &[Drop] {
        &self.drops
    }

    fn lacks(&self) -> Lacks {
        self.lacks
    }

    fn dropped_mask(&self, k: usize) -> Result<Option<Dropped>> {
        let dropped = self.dropped.get(k);
        let Some((entry, first)) = dropped.and_then(|entry| Some((entry, entry.masks.first()?)))
        else {
            return Ok(None);
        };
        let first = image::read_mask(first)?;
        // Not `read_mask` of the data set: what it objects to is known.
        let extent = (first.width, first.height);
        let mask = join(&entry.masks, entry.label, extent, plain_mask);
        Ok(Some(Dropped {
            label: entry.label,
            patient: entry.patient.clone(),
            mask: mask.map_err(|flaw| flaw.error)?,
        }))
    }

    fn image(&self, i: usize) -> Result<Gray> {
        image::read(&self.paths[i].0)
    }

    fn mask(&self, i: usize) -> Result<Gray> {
        let case = &self.cases[i];
        let size = (case.width, case.height);
        if !case.label.is_lesion() {
            return Ok(Gray::zeros(size.0, size.1));
        }
        if self.paths[i].1.is_empty() {
            return Err(Error::file(&self.paths[i].0, "expected a mask, found none"));
        }
        join(&self.paths[i].1, case.label, size, self.read_mask).map_err(|flaw| flaw.error)
    }
}

/// Masks as most data sets store them, whatever the label.
pub(super) fn plain_mask(path: &Path, _: Label) -> Result<Gray, Flaw> {
    Ok(image::read_mask(path)?)
}

/// The last component of a path, for display.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The image files directly in `folder`, by name, sorted.
///
/// # Errors
/// [`Error::File`] if the folder is missing or unreadable.
pub(super) fn images_in(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "bmp", "tif", "tiff"];
    let unreadable = |e| Error::caused(folder, "expected a readable folder", e);
    let mut images = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = file_name(&path);
        let known = path
            .extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)));
        // macOS leaves "._name.png" beside files on foreign disks.
        if known && !name.starts_with('.') {
            images.insert(name, path);
        }
    }
    Ok(images)
}

/// Files by their name without extension.
///
/// # Errors
/// [`Error::File`] if two files differ only in their extension.
pub(super) fn by_stem(files: BTreeMap<String, PathBuf>) -> Result<BTreeMap<String, PathBuf>> {
    let mut stems = BTreeMap::new();
    for file in files.into_values() {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        if let Some(other) = stems.insert(stem.into_owned(), file.clone()) {
            return Err(Error::file(
                file,
                format!(
                    "expected one file of this name, found {} too",
                    other.display()
                ),
            ));
        }
    }
    Ok(stems)
}
