//! BUS-UCLM (Vallez et al., Sci Data 12:242, 2025, doi 10.1038/s41597-025-04562-3).
//!
//! `images/PPPP_NNN.png` and `masks/PPPP_NNN.png`, where `PPPP` is the patient; `INFO.csv` names the
//! label. Mask colours repeat the label: green is benign, red malignant.
//!
//! Some images, of patient HESN, were cropped by hand after their masks were drawn: 608–792 pixels
//! wide where mask and table say 856×606. Laid over each other, no one rule (stretching, padding at a
//! corner or in the middle, one shift for all) puts the masks of two such images on their lesions, so
//! a lesion image of that kind is left out and reported rather than trained on with a displaced mask.
//! So is one whose mask colour contradicts its label.

use std::path::Path;

use super::Label;
use super::files::{Entry, Files, Flaw, images_in};
use super::image::{self, Gray};
use super::table::Table;
use crate::error::{Error, Result};

/// Opens the folder that holds `images/`, `masks/` and `INFO.csv`.
///
/// # Errors
/// [`Error::File`] for a missing folder, table, column, image or mask, an image without a row, or
/// what is wrong with a file.
pub fn open(path: &Path) -> Result<Files> {
    let table = Table::csv(&path.join("INFO.csv"), b';')?;
    let mut images = images_in(&path.join("images"))?;
    let mut masks = images_in(&path.join("masks"))?;
    let image = table.column("Image")?;
    let class = table.column("Label")?;

    let mut entries = Vec::new();
    for row in table.rows() {
        let name = row.get(image);
        let missing = |kind| row.problem(image, format!("expected {kind}/{name}, found none"));
        let (patient, _) = name.split_once('_').ok_or_else(|| {
            row.problem(
                image,
                format!("expected PATIENT_NUMBER.png, found {name:?}"),
            )
        })?;
        entries.push(Entry {
            image: images.remove(name).ok_or_else(|| missing("images"))?,
            masks: vec![masks.remove(name).ok_or_else(|| missing("masks"))?],
            label: row.parse(class)?,
            patient: Some(patient.to_owned()),
            pixel_mm: None,
        });
    }
    if let Some((_, file)) = images.into_iter().chain(masks).next() {
        return Err(Error::file(
            file,
            "expected a row of INFO.csv that names this file, found none",
        ));
    }
    Files::build("uclm", path, entries, read_mask, |flaw| flaw.mismatch)
}

/// The coloured mask, if its colour agrees with the label.
fn read_mask(path: &Path, label: Label) -> Result<Gray, Flaw> {
    let image = image::decode(path)?;
    let (mut green, mut red) = (false, false);
    for pixel in image.to_rgb8().pixels() {
        red |= pixel.0[0] >= 128;
        green |= pixel.0[1] >= 128;
    }
    let contradiction = match label {
        Label::Benign if red => "red (malignant)",
        Label::Malignant if green => "green (benign)",
        _ => return Ok(image::to_mask(&image)),
    };
    Err(Flaw::mismatch(
        path,
        format!("expected a mask in the colour of its label, {label}, found {contradiction}"),
    ))
}
