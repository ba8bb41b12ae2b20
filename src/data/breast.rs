//! BrEaST (Pawłowska et al., Sci Data 2024, doi 10.1038/s41597-024-02984-z).
//!
//! `BrEaST-Lesions_USG-images_and_masks/caseNNN.png` with `caseNNN_tumor.png`, and a clinical
//! workbook beside that folder, whose file name carries a date. One image per patient. Masks of other
//! findings (`caseNNN_otherK.png`) are not lesions under study and are left alone. All PNGs are RGBA,
//! with alpha that means nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Label;
use super::files::{Entry, Files, file_name, images_in, plain_mask};
use super::table::Table;
use crate::error::{Error, Result};

const IMAGES: &str = "BrEaST-Lesions_USG-images_and_masks";

/// Opens the folder that holds the workbook and the image folder.
///
/// # Errors
/// [`Error::File`] for a missing folder, workbook or column; an image without a row or the reverse; a
/// lesion without mask or the reverse; or what is wrong with a file.
pub fn open(path: &Path) -> Result<Files> {
    let table = Table::xlsx(&workbook(path)?)?;
    let folder = path.join(IMAGES);
    let mut files = images_in(&folder)?;
    let image = table.column("Image_filename")?;
    let mask = table.column("Mask_tumor_filename")?;
    let size = table.column("Pixel_size")?;
    let class = table.column("Classification")?;

    let mut entries = Vec::new();
    for row in table.rows() {
        let name = row.get(image);
        let file = files.remove(name).ok_or_else(|| {
            row.problem(image, format!("expected {name:?} in {IMAGES}, found none"))
        })?;
        let label: Label = row.parse(class)?;
        // Pixel_size is in centimetres.
        let pixel_mm = row.length(Some(size))?.map(|cm| 10.0 * cm);
        let mut masks = Vec::new();
        if label.is_lesion() {
            let name = row.get(mask);
            masks.push(files.remove(name).ok_or_else(|| {
                row.problem(
                    mask,
                    format!("expected the mask of a {label} lesion in {IMAGES}, found no {name:?}"),
                )
            })?);
        }
        entries.push(Entry {
            patient: file.file_stem().map(|s| s.to_string_lossy().into_owned()),
            image: file,
            masks,
            label,
            pixel_mm,
        });
    }
    let known: BTreeSet<String> = entries.iter().map(|e| file_name(&e.image)).collect();
    for (name, file) in files {
        let other = name
            .split_once("_other")
            .is_some_and(|(case, _)| known.contains(&format!("{case}.png")));
        if !other {
            return Err(Error::file(
                file,
                "expected a row of the workbook that names this file, found none",
            ));
        }
    }
    Files::new("breast", path, entries, plain_mask)
}

/// The one workbook in `folder`.
fn workbook(folder: &Path) -> Result<PathBuf> {
    let unreadable = |e| Error::caused(folder, "expected a readable folder", e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = file_name(&path);
        // "~$" marks the lock file of an open Excel.
        if name.ends_with(".xlsx") && !name.starts_with(['~', '.']) {
            found.push(path);
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        n => Err(Error::file(
            folder,
            format!("expected one .xlsx of clinical data here, found {n}"),
        )),
    }
}
