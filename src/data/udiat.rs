//! UDIAT Dataset B (Yap et al., IEEE JBHI 2018, doi 10.1109/JBHI.2017.2731873), given out on request.
//!
//! `original/000001.png`, `GT/000001.png` and `DatasetB.xlsx`, whose first column is the number and
//! whose second is Benign or Malignant. The layout is taken from public loaders. No patients and no
//! pixel sizes are given.

use std::path::Path;

use super::files::{Entry, Files, by_stem, images_in, plain_mask};
use super::table::Table;
use crate::error::{Error, Result};

/// Opens the folder that holds `original/`, `GT/` and `DatasetB.xlsx`.
///
/// # Errors
/// [`Error::File`] for a missing folder, workbook, image or mask, an image without a row, or what is
/// wrong with a file.
pub fn open(path: &Path) -> Result<Files> {
    const NUMBER: usize = 0;
    const TYPE: usize = 1;
    let table = Table::headless_xlsx(&path.join("DatasetB.xlsx"), &["number", "type"])?;
    let mut images = by_stem(images_in(&path.join("original"))?)?;
    let mut masks = by_stem(images_in(&path.join("GT"))?)?;

    let mut entries = Vec::new();
    for (i, row) in table.rows().enumerate() {
        let number: u32 = match row.parse(NUMBER) {
            Ok(number) => number,
            // Column names, if there are any.
            Err(_) if i == 0 => continue,
            Err(error) => return Err(error),
        };
        let stem = format!("{number:06}");
        let missing =
            |folder| row.problem(NUMBER, format!("expected {folder}/{stem}.png, found none"));
        entries.push(Entry {
            image: images.remove(&stem).ok_or_else(|| missing("original"))?,
            masks: vec![masks.remove(&stem).ok_or_else(|| missing("GT"))?],
            label: row.parse(TYPE)?,
            patient: None,
            pixel_mm: None,
        });
    }
    if let Some((_, file)) = images.into_iter().chain(masks).next() {
        return Err(Error::file(
            file,
            "expected a row of DatasetB.xlsx with this number, found none",
        ));
    }
    Files::new("udiat", path, entries, plain_mask)
}
