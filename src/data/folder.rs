//! Anybody's data: `images/`, `masks/` and `labels.csv`.
//!
//! `labels.csv` has the columns `image,label` and, if wanted, `patient` and `pixel_mm` (millimetres
//! per pixel, which may be empty). `image` is a file of `images/`, with or without its extension; its
//! mask is the file of the same stem in `masks/`, in any supported format. Normal cases need no mask.
//!
//! To test on, it may lack `labels.csv` ([`open_unlabelled`]) or `masks/` ([`open_unmasked`]).

use std::path::Path;

use super::files::{Entry, Files, by_stem, file_name, images_in, plain_mask};
use super::table::Table;
use super::{Drop, Label, image};
use crate::error::{Error, Result};

/// Opens the folder that holds `images/`, `masks/` and `labels.csv`. Images without a row are left
/// out and reported.
///
/// # Errors
/// [`Error::File`] for a missing folder, table or column, a row without image, a mask without image,
/// a lesion without mask, or what is wrong with a file.
pub fn open(path: &Path) -> Result<Files> {
    read(path, false)
}

/// Opens a folder without `masks/`: the masks of its lesions are not known.
///
/// # Errors
/// As [`open`].
pub fn open_unmasked(path: &Path) -> Result<Files> {
    let mut files = read(path, true)?;
    files.lacks.masks = true;
    Ok(files)
}

/// Opens a folder without `labels.csv`: an image with a mask that is not black shows a lesion, benign or malignant;
/// an image with a black mask, or with none, shows none.
///
/// # Errors
/// As [`open`].
pub fn open_unlabelled(path: &Path) -> Result<Files> {
    let images = by_stem(images_in(&path.join("images"))?)?;
    let mut masks = by_stem(images_in(&path.join("masks"))?)?;
    let mut entries = Vec::new();
    for (stem, image) in images {
        let mask = masks.remove(&stem);
        let lesion = match &mask {
            Some(mask) => image::read_mask(mask)?.pixels.contains(&255),
            None => false,
        };
        entries.push(Entry {
            image,
            masks: mask.into_iter().collect(),
            // Of the two, one that is not looked at.
            label: if lesion { Label::Benign } else { Label::Normal },
            patient: None,
            pixel_mm: None,
        });
    }
    if let Some((stem, mask)) = masks.first_key_value() {
        let problem = format!("expected an image {stem}.* in images, found none");
        return Err(Error::file(mask, problem));
    }
    let mut files = Files::new("folder", path, entries, plain_mask)?;
    files.lacks.labels = true;
    Ok(files)
}

fn read(path: &Path, unmasked: bool) -> Result<Files> {
    let table = Table::csv(&path.join("labels.csv"), b',')?;
    let mut images = by_stem(images_in(&path.join("images"))?)?;
    let folder = path.join("masks");
    // Without lesions there are no masks to keep a folder for.
    let mut masks = match folder.exists() {
        true => by_stem(images_in(&folder)?)?,
        false => Default::default(),
    };
    if let Some(mask) = masks.keys().find(|&stem| !images.contains_key(stem)) {
        return Err(Error::file(
            &masks[mask],
            format!("expected an image {mask}.* in images, found none"),
        ));
    }
    let name_column = table.column("image")?;
    let class = table.column("label")?;
    let patient = table.optional("patient");
    let pixel_mm = table.optional("pixel_mm");

    let mut entries = Vec::new();
    for row in table.rows() {
        let name = row.get(name_column);
        let without_extension = Path::new(name).file_stem().and_then(|stem| stem.to_str());
        let (stem, file) = images
            .remove_entry(name)
            .or_else(|| {
                images
                    .remove_entry(without_extension?)
                    .filter(|(_, file)| file_name(file) == name)
            })
            .ok_or_else(|| {
                let expected = "expected a file in images/ that no row above names";
                row.problem(
                    name_column,
                    format!("{expected}, found none called {name:?}"),
                )
            })?;
        let mask = masks.remove(&stem);
        let label: Label = row.parse(class)?;
        if label.is_lesion() && mask.is_none() && !unmasked {
            return Err(Error::file(
                file,
                format!("expected a mask {stem}.* in masks, since it is {label}, found none"),
            ));
        }
        entries.push(Entry {
            image: file,
            masks: mask.into_iter().collect(),
            label,
            patient: row.present(patient).map(str::to_owned),
            pixel_mm: row.length(pixel_mm)?,
        });
    }
    let mut files = Files::new("folder", path, entries, plain_mask)?;
    files.drops.extend(images.values().map(|file| Drop {
        file: file_name(file),
        reason: "labels.csv has no row for it".to_owned(),
    }));
    Ok(files)
}
