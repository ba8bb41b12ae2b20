//! One file that holds a data set at a given size: small enough to carry to another machine.
//!
//! Layout, all integers little-endian: the magic `echopack`, the version as `u32`, the header's length
//! as `u32`, the header (JSON: name, size, cases, drops), then for every case in order the PNG of its
//! letterboxed image and, for a lesion, the PNG of its mask at the original's size. The header gives
//! the length of each, which must add up to the file's.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::image::{self, Gray, MAX_SIDE};
use super::{Case, Drop, Next, Source, letterboxed_image};
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"echopack";
const VERSION: u32 = 1;
const PREFIX: usize = MAGIC.len() + 8;

#[derive(Serialize, Deserialize)]
struct Header {
    name: String,
    size: usize,
    cases: Vec<Packed>,
    drops: Vec<Drop>,
}

#[derive(Serialize, Deserialize)]
struct Packed {
    #[serde(flatten)]
    case: Case,
    image_bytes: usize,
    /// 0 for a normal case.
    mask_bytes: usize,
}

/// A packed data set, held in memory as it is on disk.
pub struct Pack {
    path: PathBuf,
    name: String,
    size: usize,
    cases: Vec<Case>,
    drops: Vec<Drop>,
    /// Where image and mask of each case begin, and where the mask ends.
    spans: Vec<[usize; 3]>,
    bytes: Vec<u8>,
}

impl Pack {
    /// Reads a pack and checks its header.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing, truncated, of another version or no pack at all.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|e| Error::caused(path, "cannot be read", e))?;
        let word = |at: usize| {
            bytes
                .get(at..at + 4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        let (Some(version), Some(length)) = (word(MAGIC.len()), word(MAGIC.len() + 4)) else {
            return Err(Error::file(
                path,
                format!("expected a pack, found {} bytes", bytes.len()),
            ));
        };
        if !bytes.starts_with(MAGIC) {
            return Err(Error::file(
                path,
                "expected a file made by `echograd pack`, found something else",
            ));
        }
        if version != VERSION {
            return Err(Error::file(
                path,
                format!("expected a pack of version {VERSION}, found version {version}"),
            ));
        }
        let payload = PREFIX.saturating_add(length as usize);
        let header = bytes.get(PREFIX..payload).ok_or_else(|| {
            Error::file(
                path,
                format!(
                    "expected a header of {length} bytes, found the end of the file: truncated"
                ),
            )
        })?;
        let header: Header = serde_json::from_slice(header)
            .map_err(|e| Error::caused(path, "expected a pack's header, found other JSON", e))?;

        let side = 1..=MAX_SIDE as usize;
        let sides = header
            .cases
            .iter()
            .flat_map(|p| [p.case.width, p.case.height]);
        if let Some(bad) = sides.chain([header.size]).find(|s| !side.contains(s)) {
            return Err(Error::file(
                path,
                format!("expected sizes of 1 to {MAX_SIDE} pixels, found {bad}"),
            ));
        }
        if header.cases.is_empty() {
            return Err(Error::file(path, "expected cases, found none"));
        }
        let mut end = payload;
        let mut spans = Vec::new();
        for packed in &header.cases {
            let mask = end.saturating_add(packed.image_bytes);
            let next = mask.saturating_add(packed.mask_bytes);
            spans.push([end, mask, next]);
            end = next;
        }
        if end != bytes.len() {
            return Err(Error::file(
                path,
                format!(
                    "expected {end} bytes, found {}: truncated or damaged",
                    bytes.len()
                ),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            name: header.name,
            size: header.size,
            cases: header.cases.into_iter().map(|p| p.case).collect(),
            drops: header.drops,
            spans,
            bytes,
        })
    }

    /// Decodes a PNG of case `i`, which must be `width × height`.
    fn decode(
        &self,
        i: usize,
        png: &[u8],
        (width, height): (usize, usize),
    ) -> Result<::image::DynamicImage> {
        let path = self.path.join(&self.cases[i].image);
        let found = image::dimensions(&path, png)?;
        if found != (width, height) {
            return Err(Error::file(
                path,
                format!(
                    "expected {width}×{height} pixels, found {}×{}",
                    found.0, found.1
                ),
            ));
        }
        image::decode_bytes(&path, png)
    }
}

impl Source for Pack {
    fn name(&self) -> &str {
        &self.name
    }

    fn cases(&self) -> &[Case] {
        &self.cases
    }

    fn drops(&self) -> &[Drop] {
        &self.drops
    }

    fn letterboxed(&self) -> Option<usize> {
        Some(self.size)
    }

    fn image(&self, i: usize) -> Result<Gray> {
        let [start, end, _] = self.spans[i];
        let image = self.decode(i, &self.bytes[start..end], (self.size, self.size))?;
        Ok(image::to_gray(&image))
    }

    fn mask(&self, i: usize) -> Result<Gray> {
        let Case {
            width,
            height,
            label,
            ..
        } = self.cases[i];
        if !label.is_lesion() {
            return Ok(Gray::zeros(width, height));
        }
        let [_, start, end] = self.spans[i];
        let mask = self.decode(i, &self.bytes[start..end], (width, height))?;
        Ok(image::to_mask(&mask))
    }
}

/// Packs `source` at `size` into the file `path`, which appears whole or not at all; `next` is called
/// before each case, from any thread, and its error ends the work.
///
/// # Errors
/// As [`super::load`], and [`Error::File`] if `path` cannot be written.
pub fn write(source: &dyn Source, size: usize, path: &Path, next: Next) -> Result<()> {
    let encoded: Vec<Result<(Vec<u8>, Vec<u8>)>> = source
        .cases()
        .par_iter()
        .enumerate()
        .map(|(i, case)| {
            next()?;
            let image = image::png_bytes(&Gray {
                width: size,
                height: size,
                pixels: letterboxed_image(source, i, size)?,
            });
            let mask = match case.label.is_lesion() {
                true => image::png_bytes(&source.mask(i)?),
                false => Vec::new(),
            };
            Ok((image, mask))
        })
        .collect();
    let blobs = encoded.into_iter().collect::<Result<Vec<_>>>()?;
    let packed = source.cases().iter().zip(&blobs);
    let header = Header {
        name: source.name().to_owned(),
        size,
        cases: packed
            .map(|(case, (image, mask))| Packed {
                case: case.clone(),
                image_bytes: image.len(),
                mask_bytes: mask.len(),
            })
            .collect(),
        drops: source.drops().to_vec(),
    };
    let header = serde_json::to_vec(&header).expect("a header of plain values");
    let length = u32::try_from(header.len()).expect("a header of less than 4 GiB");
    let mut bytes = Vec::new();
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&header);
    for (image, mask) in &blobs {
        bytes.extend_from_slice(image);
        bytes.extend_from_slice(mask);
    }
    image::write_atomically(path, &bytes)
}
