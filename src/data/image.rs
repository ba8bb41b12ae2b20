//! Reading of grey images and lesion masks, and writing of PNGs.

use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

use image::{DynamicImage, ExtendedColorType, ImageEncoder, ImageFormat, ImageReader, Limits};

use crate::error::{Error, Result};

/// The largest width or height that is read, in pixels: far above any ultrasound frame, and low
/// enough that a forged header cannot ask for much memory.
pub const MAX_SIDE: u32 = 8192;

/// An 8-bit grey image, or a mask whose pixels are 0 or 255.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gray {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height × width` values, row by row from the top.
    pub pixels: Vec<u8>,
}

impl Gray {
    /// A black image.
    pub fn zeros(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            pixels: vec![0; width * height],
        }
    }
}

/// Reads a PNG, JPEG, BMP or TIFF as grey.
///
/// Colour becomes luma, `0.299 R + 0.587 G + 0.114 B` (Rec. 601, the integer form of Pillow's
/// `convert("L")`). Alpha is ignored and never composited: some published scans have transparent
/// areas with content beneath. 16-bit values are scaled linearly to 8 bits.
///
/// # Errors
/// [`Error::File`] if the file is missing, truncated, of another format, of floating-point pixels,
/// or larger than [`MAX_SIDE`] on a side.
pub fn read(path: &Path) -> Result<Gray> {
    Ok(to_gray(&decode(path)?))
}

/// Reads a mask: a pixel belongs to the lesion (255) if any of R, G, B is at least half of full
/// scale; alpha is ignored. Files that hold only the values 0 and 1 are taken as 0 and full scale.
///
/// # Errors
/// As [`read`].
pub fn read_mask(path: &Path) -> Result<Gray> {
    Ok(to_mask(&decode(path)?))
}

/// The width and height of the image whose file holds `bytes`, from its header alone.
///
/// # Errors
/// As [`read`], as far as the header shows it.
pub fn dimensions(path: &Path, bytes: &[u8]) -> Result<(usize, usize)> {
    let (width, height) = reader(bytes)
        .and_then(|r| r.into_dimensions())
        .map_err(|e| unreadable(path, e))?;
    if width > MAX_SIDE || height > MAX_SIDE {
        return Err(Error::file(
            path,
            format!("expected at most {MAX_SIDE} pixels a side, found {width}×{height}"),
        ));
    }
    Ok((width as usize, height as usize))
}

pub(super) fn decode(path: &Path) -> Result<DynamicImage> {
    let bytes = fs::read(path).map_err(|e| Error::caused(path, "cannot be read", e))?;
    decode_bytes(path, &bytes)
}

/// Decodes image bytes that came from `path`, as [`read`] does.
pub(super) fn decode_bytes(path: &Path, bytes: &[u8]) -> Result<DynamicImage> {
    let reader = reader(bytes).map_err(|e| unreadable(path, e))?;
    // The decoder fills the missing part of a JPEG with grey and calls it a success.
    if reader.format() == Some(ImageFormat::Jpeg) && !jpeg_ends(bytes) {
        return Err(Error::file(
            path,
            "expected a complete JPEG, found no end-of-image marker: truncated",
        ));
    }
    match reader.decode().map_err(|e| unreadable(path, e))? {
        DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_) => Err(Error::file(
            path,
            "expected 8- or 16-bit integer pixels, found floating point",
        )),
        image => Ok(image),
    }
}

/// Whether an end-of-image marker follows the last start-of-scan marker. Neither occurs within
/// compressed data, where a byte of 0xFF is followed by 0 or a restart marker.
fn jpeg_ends(bytes: &[u8]) -> bool {
    let last = |marker: [u8; 2]| bytes.windows(2).rposition(|pair| pair == marker);
    last([0xFF, 0xDA]).is_some_and(|scan| last([0xFF, 0xD9]) > Some(scan))
}

/// A reader that goes by content rather than by extension, with limits on what it allocates.
fn reader(bytes: &[u8]) -> Result<ImageReader<Cursor<&[u8]>>, image::ImageError> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    reader.limits(limits);
    Ok(reader)
}

fn unreadable(path: &Path, error: image::ImageError) -> Error {
    Error::caused(
        path,
        format!("expected a complete PNG, JPEG, BMP or TIFF of at most {MAX_SIDE} pixels a side"),
        error,
    )
}

pub(super) fn to_gray(image: &DynamicImage) -> Gray {
    let pixels = match image {
        DynamicImage::ImageLuma8(i) => i.as_raw().clone(),
        DynamicImage::ImageLumaA8(i) => i.pixels().map(|p| p.0[0]).collect(),
        DynamicImage::ImageRgb8(i) => i.pixels().map(|p| luma(p.0)).collect(),
        DynamicImage::ImageRgba8(i) => i.pixels().map(|p| luma([p.0[0], p.0[1], p.0[2]])).collect(),
        DynamicImage::ImageLuma16(i) => i.pixels().map(|p| eight_bits(p.0[0])).collect(),
        DynamicImage::ImageLumaA16(i) => i.pixels().map(|p| eight_bits(p.0[0])).collect(),
        DynamicImage::ImageRgb16(i) => i.pixels().map(|p| luma(p.0.map(eight_bits))).collect(),
        other => other
            .to_rgba16()
            .pixels()
            .map(|p| luma([p.0[0], p.0[1], p.0[2]].map(eight_bits)))
            .collect(),
    };
    Gray {
        width: image.width() as usize,
        height: image.height() as usize,
        pixels,
    }
}

/// Rec. 601 luma, rounded, with weights that sum to 2¹⁶.
fn luma([r, g, b]: [u8; 3]) -> u8 {
    ((19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b) + 0x8000) >> 16) as u8
}

/// `v · 255 / 65535`, rounded.
fn eight_bits(v: u16) -> u8 {
    ((u32::from(v) + 128) / 257) as u8
}

/// The largest of R, G and B at every pixel, on the file's own scale, and that scale's maximum.
fn brightest(image: &DynamicImage) -> (Vec<u16>, u16) {
    /// Of pixels of `channels` values, of which the first `colours` are no alpha.
    fn of<T: Copy + Into<u16>>(raw: &[T], channels: usize, colours: usize) -> Vec<u16> {
        let largest = |pixel: &[T]| pixel[..colours].iter().map(|&v| v.into()).max();
        raw.chunks_exact(channels).filter_map(largest).collect()
    }
    match image {
        DynamicImage::ImageLuma8(i) => (of(i.as_raw(), 1, 1), 255),
        DynamicImage::ImageLumaA8(i) => (of(i.as_raw(), 2, 1), 255),
        DynamicImage::ImageRgb8(i) => (of(i.as_raw(), 3, 3), 255),
        DynamicImage::ImageRgba8(i) => (of(i.as_raw(), 4, 3), 255),
        other => (of(other.to_rgb16().as_raw(), 3, 3), u16::MAX),
    }
}

pub(super) fn to_mask(image: &DynamicImage) -> Gray {
    let (values, full) = brightest(image);
    let threshold = match values.iter().max() {
        Some(1) => 1,
        _ => full / 2 + 1,
    };
    Gray {
        width: image.width() as usize,
        height: image.height() as usize,
        pixels: values
            .iter()
            .map(|&v| if v >= threshold { 255 } else { 0 })
            .collect(),
    }
}

/// Writes a grey PNG; the file appears whole or not at all.
///
/// # Errors
/// [`Error::File`] if the folder is missing or not writable, or the disk is full.
pub fn write_png(path: &Path, image: &Gray) -> Result<()> {
    let bytes = encode(
        &image.pixels,
        image.width,
        image.height,
        ExtendedColorType::L8,
    );
    write_atomically(path, &bytes)
}

/// Writes an RGB PNG from `height × width × 3` bytes; the file appears whole or not at all.
///
/// # Errors
/// As [`write_png`].
///
/// # Panics
/// If `rgb` does not hold `width · height · 3` bytes.
pub fn write_png_rgb(path: &Path, width: usize, height: usize, rgb: &[u8]) -> Result<()> {
    write_atomically(path, &png_rgb_bytes(width, height, rgb))
}

/// The bytes of an RGB PNG from `height × width × 3` bytes.
///
/// # Panics
/// If `rgb` does not hold `width · height · 3` bytes.
pub fn png_rgb_bytes(width: usize, height: usize, rgb: &[u8]) -> Vec<u8> {
    encode(rgb, width, height, ExtendedColorType::Rgb8)
}

/// The bytes of a grey PNG, packed as small as the encoder can.
pub(super) fn png_bytes(image: &Gray) -> Vec<u8> {
    encode(
        &image.pixels,
        image.width,
        image.height,
        ExtendedColorType::L8,
    )
}

fn encode(pixels: &[u8], width: usize, height: usize, color: ExtendedColorType) -> Vec<u8> {
    use image::codecs::png::{CompressionType, FilterType, PngEncoder};
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
        .write_image(pixels, width as u32, height as u32, color)
        .expect("a PNG of the right number of bytes, written to memory");
    bytes
}

/// How the names of temporary files begin; six letters or digits follow.
const TEMPORARY: &str = ".tmp";

/// Whether a file of that name is one of [`write_atomically`]'s: only a killed program leaves it.
pub(crate) fn is_temporary(name: &str) -> bool {
    let rest = name.strip_prefix(TEMPORARY);
    rest.is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Writes `bytes` to a temporary file beside `path`, syncs it and renames it into place, so that
/// `path` holds either its old content or all of the new. Links are followed; what is no file, such as
/// `/dev/stdout` or a named pipe, is written to as it is.
///
/// # Errors
/// [`Error::File`] if the folder is missing or not writable, or the disk is full.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let unwritable = |e| Error::caused(path, "cannot be written", e);
    let found = fs::canonicalize(path);
    let path = found.as_deref().unwrap_or(path);
    if fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(unwritable)?;
        return file.write_all(bytes).map_err(unwritable);
    }
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY);
    // A temporary file is private by default; the result should follow the user's umask.
    #[cfg(unix)]
    let builder = {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666))
    };
    let write = || -> std::io::Result<()> {
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        // The rename itself must survive a power cut too.
        #[cfg(unix)]
        fs::File::open(folder)?.sync_all()?;
        Ok(())
    };
    write().map_err(unwritable)
}
