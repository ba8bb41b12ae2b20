//! BUS-BRA (Gómez-Flores et al., Medical Physics 2024, doi 10.1002/mp.16812; Zenodo 8231412).
//!
//! `bus_data.csv`, `Images/bus_0001-l.png` and `Masks/mask_0001-l.png`; column `Case` is the patient,
//! `Pathology` the label. The layout is taken from public loaders. No pixel sizes are given.

use std::path::Path;

use super::files::{Entry, Files, by_stem, images_in, plain_mask};
use super::table::Table;
use crate::error::{Error, Result};

/// Opens the folder that holds `bus_data.csv`, or the parent of that folder if it is named `BUSBRA`.
///
/// # Errors
/// [`Error::File`] for a missing folder, table, column, image or mask, an image without a row, or
/// what is wrong with a file.
pub fn open(path: &Path) -> Result<Files> {
    let inner = path.join("BUSBRA");
    let path = if inner.is_dir() { &inner } else { path };
    let table = Table::csv(&path.join("bus_data.csv"), b',')?;
    let mut images = by_stem(images_in(&path.join("Images"))?)?;
    let mut masks = by_stem(images_in(&path.join("Masks"))?)?;
    let id = table.column("ID")?;
    let patient = table.column("Case")?;
    let pathology = table.column("Pathology")?;

    let mut entries = Vec::new();
    for row in table.rows() {
        let stem = row.get(id);
        let number = stem
            .strip_prefix("bus_")
            .ok_or_else(|| row.problem(id, format!("expected bus_NUMBER-SIDE, found {stem:?}")))?;
        let missing = |file: String| row.problem(id, format!("expected {file}, found none"));
        entries.push(Entry {
            image: images
                .remove(stem)
                .ok_or_else(|| missing(format!("Images/{stem}.png")))?,
            masks: vec![
                masks
                    .remove(&format!("mask_{number}"))
                    .ok_or_else(|| missing(format!("Masks/mask_{number}.png")))?,
            ],
            label: row.parse(pathology)?,
            patient: row.present(Some(patient)).map(str::to_owned),
            pixel_mm: None,
        });
    }
    if let Some((_, file)) = images.into_iter().chain(masks).next() {
        return Err(Error::file(
            file,
            "expected a row of bus_data.csv with this ID, found none",
        ));
    }
    Files::new("busbra", path, entries, plain_mask)
}
