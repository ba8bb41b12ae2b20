//! BUSI (Al-Dhabyani et al., Data in Brief 2020, doi 10.1016/j.dib.2019.104863).
//!
//! `benign/benign (N).png` with `benign (N)_mask.png`, then `_mask_1.png` and so on where there are
//! several lesions; `malignant/` and `normal/` likewise. No patients and no pixel sizes are given.
//!
//! The published set holds one pair of identical files under contradictory labels, `benign (433)` and
//! `malignant (145)`, which [`super::duplicates`] finds. Near-duplicates, of which there are many more by
//! published accounts, are not looked for: without patient names, folds made within BUSI can hold
//! views of one lesion on both sides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Label;
use super::files::{Entry, Files, images_in, plain_mask};
use crate::error::{Error, Result};

/// Opens the folder that holds `benign/` (and `malignant/`, `normal/`), or its parent.
///
/// # Errors
/// [`Error::File`] for a missing folder, a mask without image, a lesion without mask, or what is
/// wrong with a file.
pub fn open(path: &Path) -> Result<Files> {
    let root = root(path)?;
    let mut entries = Vec::new();
    for label in Label::ALL {
        let folder = root.join(label.as_str());
        // Phantoms and subsets may have no normal cases.
        if folder.is_dir() {
            entries.extend(class(&folder, label)?);
        }
    }
    Files::new("busi", &root, entries, plain_mask)
}

/// `path` or the one folder below it that holds a folder named after a label.
fn root(path: &Path) -> Result<PathBuf> {
    let holds_classes = |folder: &Path| {
        Label::ALL
            .iter()
            .any(|label| folder.join(label.as_str()).is_dir())
    };
    if holds_classes(path) {
        return Ok(path.to_owned());
    }
    let unreadable = |e| Error::caused(path, "expected a readable folder", e);
    let mut below = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        below.push(entry.map_err(unreadable)?.path());
    }
    below.retain(|folder| holds_classes(folder));
    match below.len() {
        1 => Ok(below.remove(0)),
        found => Err(Error::file(
            path,
            format!(
                "expected benign/, malignant/ or normal/ here or in one folder below, found {found} such folders"
            ),
        )),
    }
}

fn class(folder: &Path, label: Label) -> Result<Vec<Entry>> {
    let mut images = images_in(folder)?;
    let mut masks: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    images.retain(|name, path| match mask_of(name) {
        Some(stem) => {
            masks.entry(stem.to_owned()).or_default().push(path.clone());
            false
        }
        None => true,
    });
    let mut entries = Vec::new();
    for image in images.into_values() {
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let masks = masks.remove(stem.as_ref()).unwrap_or_default();
        if masks.is_empty() && label.is_lesion() {
            return Err(Error::file(
                &image,
                format!("expected a mask {stem}_mask.png, since it is {label}, found none"),
            ));
        }
        entries.push(Entry {
            image,
            masks,
            label,
            patient: None,
            pixel_mm: None,
        });
    }
    match masks.into_iter().next() {
        Some((stem, paths)) => Err(Error::file(
            &paths[0],
            format!("expected an image {stem}.png beside this mask, found none"),
        )),
        None => Ok(entries),
    }
}

/// `benign (4)` for `benign (4)_mask.png` and `benign (4)_mask_1.png`.
fn mask_of(name: &str) -> Option<&str> {
    let (stem, _) = name.rsplit_once('.')?;
    let (image, rest) = stem.rsplit_once("_mask")?;
    let number = rest.strip_prefix('_').unwrap_or(rest);
    number.bytes().all(|b| b.is_ascii_digit()).then_some(image)
}
