//! Readers on small generated data sets with the traps of the real ones, and on the real ones where
//! `ECHOGRAD_DATA` names their folder.

mod support;

use std::fs;

use std::path::Path;

use ::image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use echograd::data::image::{self, Gray, write_png, write_png_rgb};
use echograd::data::letterbox::{Letterbox, quantise};
use echograd::data::split::{Fold, fold, folds};
use echograd::data::{self, Case, Label, Source, pack};
use support::xlsx;
use tempfile::TempDir;

const NOTHING: echograd::data::Next = &|| Ok(());

fn open(name: &str, root: &Path) -> echograd::Result<Box<dyn Source>> {
    data::open(&format!("{name}:{}", root.display()))
}

/// The one-line message of what must fail.
fn refusal<T>(result: echograd::Result<T>) -> String {
    let message = result.err().expect("an error").to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
}

fn counts(source: &dyn Source) -> [usize; 3] {
    Label::ALL.map(|l| source.cases().iter().filter(|c| c.label == l).count())
}

fn images(source: &dyn Source) -> Vec<&str> {
    source.cases().iter().map(|c| c.image.as_str()).collect()
}

/// A file under `root`, its folders made.
fn put(root: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn put_image(root: &Path, name: &str, image: impl Into<DynamicImage>) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.into().save(path).unwrap();
}

/// A grey picture that differs from seed to seed.
fn scan(seed: u8) -> GrayImage {
    GrayImage::from_fn(12, 8, |x, y| Luma([(x * 17 + y * 5) as u8 ^ seed]))
}

/// A mask with one pixel at each of `spots`.
fn mask(spots: &[(u32, u32)]) -> GrayImage {
    let mut mask = GrayImage::new(12, 8);
    for &(x, y) in spots {
        mask.put_pixel(x, y, Luma([255]));
    }
    mask
}

fn spots(mask: &Gray) -> Vec<(usize, usize)> {
    let lit = mask.pixels.iter().enumerate().filter(|(_, v)| **v == 255);
    lit.map(|(i, _)| (i % mask.width, i / mask.width)).collect()
}

// ---- images ---------------------------------------------------------------------------------

#[test]
fn reads_every_pixel_format() {
    let root = TempDir::new().unwrap();
    let read = |name: &str, image: DynamicImage| {
        put_image(root.path(), name, image);
        image::read(&root.path().join(name)).unwrap().pixels
    };
    let grey = [0, 100, 255];
    let gray8 = GrayImage::from_raw(3, 1, grey.to_vec()).unwrap();
    assert_eq!(read("l.png", gray8.clone().into()), grey);
    assert_eq!(read("l.bmp", gray8.clone().into()), grey);
    assert_eq!(read("l.tif", gray8.into()), grey);
    let wide: Vec<u16> = grey.iter().map(|&v| u16::from(v) * 257).collect();
    let gray16 = ::image::ImageBuffer::<Luma<u16>, _>::from_raw(3, 1, wide.clone()).unwrap();
    assert_eq!(read("l16.png", DynamicImage::ImageLuma16(gray16)), grey);
    let rgb16: Vec<u16> = wide.iter().flat_map(|&v| [v; 3]).collect();
    let rgb16 = ::image::ImageBuffer::<Rgb<u16>, _>::from_raw(3, 1, rgb16).unwrap();
    assert_eq!(read("rgb16.png", DynamicImage::ImageRgb16(rgb16)), grey);
    // 0.299, 0.587 and 0.114 of 255.
    let primaries = RgbImage::from_fn(3, 1, |x, _| {
        let mut pixel = [0; 3];
        pixel[x as usize] = 255;
        Rgb(pixel)
    });
    assert_eq!(read("rgb.png", primaries.into()), [76, 150, 29]);
    // What lies under full transparency counts as it is.
    let rgba = RgbaImage::from_fn(3, 1, |x, _| {
        let v = grey[x as usize];
        Rgba([v, v, v, 0])
    });
    assert_eq!(read("rgba.png", rgba.into()), grey);
    // The content decides, not the extension.
    fs::rename(root.path().join("rgba.png"), root.path().join("rgba.jpg")).unwrap();
    assert_eq!(
        image::read(&root.path().join("rgba.jpg")).unwrap().pixels,
        grey
    );
}

/// PNG files of fewer bits than the encoder writes: 1-bit grey `10`, and a palette whose indices 0, 1
/// are red and white.
#[test]
fn reads_bits_and_palettes() {
    fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], body: &[u8]) {
        png.extend((body.len() as u32).to_be_bytes());
        let tail: Vec<u8> = kind.iter().chain(body).copied().collect();
        png.extend(&tail);
        let crc = tail.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |c, _| {
                (c >> 1) ^ (0xEDB8_8320 * (c & 1))
            })
        });
        png.extend((!crc).to_be_bytes());
    }
    let png = |depth: u8, color: u8, palette: Option<&[u8]>, row: u8| {
        let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
        chunk(
            &mut png,
            b"IHDR",
            &[0, 0, 0, 2, 0, 0, 0, 1, depth, color, 0, 0, 0],
        );
        if let Some(palette) = palette {
            chunk(&mut png, b"PLTE", palette);
        }
        // One stored deflate block of a filter byte and one row; Adler-32 of (0, row).
        let adler = [0, 2 + row, 0, 1 + row];
        let data = [&[0x78, 1, 1, 2, 0, 0xFD, 0xFF, 0, row][..], &adler].concat();
        chunk(&mut png, b"IDAT", &data);
        chunk(&mut png, b"IEND", &[]);
        png
    };
    let root = TempDir::new().unwrap();
    put(root.path(), "bit.png", png(1, 0, None, 0b1000_0000));
    let palette = [255, 0, 0, 255, 255, 255];
    put(
        root.path(),
        "palette.png",
        png(1, 3, Some(&palette), 0b0100_0000),
    );
    let read = |name: &str| image::read(&root.path().join(name)).unwrap().pixels;
    assert_eq!(read("bit.png"), [255, 0]);
    assert_eq!(read("palette.png"), [76, 255]);
    let mask = image::read_mask(&root.path().join("bit.png")).unwrap();
    assert_eq!(mask.pixels, [255, 0]);
}

#[test]
fn masks_are_thresholded_at_half_or_are_zero_and_one() {
    let root = TempDir::new().unwrap();
    let read = |values: [u8; 4]| {
        put_image(
            root.path(),
            "m.png",
            GrayImage::from_raw(4, 1, values.to_vec()).unwrap(),
        );
        image::read_mask(&root.path().join("m.png")).unwrap().pixels
    };
    assert_eq!(read([0, 127, 128, 255]), [0, 0, 255, 255]);
    assert_eq!(read([0, 1, 0, 1]), [0, 255, 0, 255]);
    assert_eq!(read([0, 1, 2, 3]), [0; 4]);
    // Red alone is a lesion, whatever the alpha.
    put_image(
        root.path(),
        "m.png",
        RgbaImage::from_pixel(1, 1, Rgba([255, 0, 0, 0])),
    );
    assert_eq!(
        image::read_mask(&root.path().join("m.png")).unwrap().pixels,
        [255]
    );
}

#[test]
fn damaged_images_are_refused() {
    let root = TempDir::new().unwrap();
    let picture = GrayImage::from_fn(64, 64, |x, y| Luma([(x * y) as u8]));
    for name in ["a.png", "a.jpg", "a.bmp", "a.tif"] {
        put_image(root.path(), name, picture.clone());
        let path = root.path().join(name);
        image::read(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        for keep in [0, 1, 20, bytes.len() / 2, bytes.len() - 20] {
            put(root.path(), name, &bytes[..keep]);
            assert_says(&refusal(image::read(&path)), &[name, "expected a complete"]);
        }
    }
    put(root.path(), "text.png", "no image at all");
    assert_says(
        &refusal(image::read(&root.path().join("text.png"))),
        &["text.png"],
    );
    assert_says(
        &refusal(image::read(&root.path().join("none.png"))),
        &["none.png"],
    );
    // A BMP header that claims 30000×30000 pixels.
    let mut bmp = fs::read({
        put_image(root.path(), "huge.bmp", GrayImage::new(4, 4));
        root.path().join("huge.bmp")
    })
    .unwrap();
    bmp[18..22].copy_from_slice(&30000u32.to_le_bytes());
    bmp[22..26].copy_from_slice(&30000u32.to_le_bytes());
    put(root.path(), "huge.bmp", &bmp);
    let path = root.path().join("huge.bmp");
    assert_says(&refusal(image::read(&path)), &["huge.bmp", "8192"]);
    assert_says(
        &refusal(image::dimensions(&path, &bmp)),
        &["huge.bmp", "8192"],
    );
}

#[test]
fn writes_pngs_whole_or_not_at_all() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("out.png");
    let grey = Gray {
        width: 3,
        height: 2,
        pixels: vec![0, 50, 100, 150, 200, 255],
    };
    write_png(&path, &grey).unwrap();
    assert_eq!(image::read(&path).unwrap(), grey);
    write_png_rgb(&path, 1, 1, &[255, 0, 0]).unwrap();
    assert_eq!(image::read(&path).unwrap().pixels, [76]);
    let nowhere = root.path().join("missing/out.png");
    assert_says(
        &refusal(write_png(&nowhere, &grey)),
        &["missing/out.png", "cannot be written"],
    );
    // A folder stands where the file should go: nothing is left behind.
    fs::create_dir(root.path().join("taken.png")).unwrap();
    refusal(write_png(&root.path().join("taken.png"), &grey));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
}

// ---- letterbox ------------------------------------------------------------------------------

#[test]
fn letterbox_agrees_with_pillow_and_the_way_back_with_pytorch() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("goldens/letterbox.json")).unwrap();
    let floats = |v: &serde_json::Value| -> Vec<f32> {
        let list = v.as_array().unwrap().iter();
        list.map(|v| v.as_f64().unwrap() as f32).collect()
    };
    let far = |a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    };
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let (width, height) = (number("width"), number("height"));
        let pixel = |i: usize| {
            let (x, y) = (i % width, i / width);
            (7 * x + 13 * y + 3 * x * y) as u8
        };
        let image = Gray {
            width,
            height,
            pixels: (0..width * height).map(pixel).collect(),
        };
        let letterbox = Letterbox::new(width, height, number("size"));
        let content: [usize; 4] = serde_json::from_value(case["content"].clone()).unwrap();
        let placed = [
            letterbox.left,
            letterbox.top,
            letterbox.content_width,
            letterbox.content_height,
        ];
        assert_eq!(placed, content);
        let square = letterbox.forward(&image);
        assert!(far(&square, &floats(&case["square"])) < 1e-6);
        assert!(far(&letterbox.inverse(&square), &floats(&case["back"])) < 2e-6);
        // Pillow rounds 8-bit images between its two passes, so a level's difference is its own.
        let bytes: Vec<f32> = quantise(&square).into_iter().map(f32::from).collect();
        assert!(far(&bytes, &floats(&case["bytes"])) <= 1.0);
    }
}

#[test]
fn letterbox_keeps_full_and_empty_exact() {
    for (width, height) in [
        (1, 1),
        (1, 700),
        (613, 1),
        (1024, 289),
        (256, 256),
        (255, 257),
    ] {
        let letterbox = Letterbox::new(width, height, 256);
        let mut full = Gray::zeros(width, height);
        assert!(letterbox.forward(&full).iter().all(|&v| v == 0.0));
        full.pixels.fill(255);
        let square = letterbox.forward(&full);
        let lit = square
            .iter()
            .filter(|&&v| (v - 1.0).abs() < 1e-6 && v <= 1.0)
            .count();
        assert_eq!(lit, letterbox.content_width * letterbox.content_height);
        assert!(quantise(&square).iter().all(|&v| v == 0 || v == 255));
        let back = letterbox.inverse(&square);
        assert_eq!(back.len(), width * height);
        assert!(back.iter().all(|v| (v - 1.0).abs() < 1e-5));
    }
}

// ---- specs ----------------------------------------------------------------------------------

#[test]
fn specs() {
    assert_says(
        &refusal(data::open("busy:/data")),
        &[
            "busy:/data",
            "did you mean \"busi\"",
            "breast, busi, uclm, udiat, busbra, folder, pack",
        ],
    );
    assert_says(
        &refusal(data::open("/data")),
        &["NAME:PATH", "breast, busi"],
    );
    assert_says(&refusal(data::open("busi:")), &["NAME:PATH"]);
    for name in data::NAMES {
        assert_says(
            &refusal(data::open(&format!("{name}:/no/such/place"))),
            &["/no/such/place"],
        );
    }
    // Only the first colon separates.
    let root = TempDir::new().unwrap();
    let odd = root.path().join("a:b");
    put_image(&odd, "benign/benign (1).png", scan(1));
    put_image(&odd, "benign/benign (1)_mask.png", mask(&[(1, 1)]));
    assert_eq!(counts(&*open("busi", &odd).unwrap()), [1, 0, 0]);
}

// ---- BUSI -----------------------------------------------------------------------------------

fn busi() -> TempDir {
    let root = TempDir::new().unwrap();
    let at = root.path();
    put_image(at, "benign/benign (2).png", scan(1));
    put_image(at, "benign/benign (2)_mask.png", mask(&[(1, 1)]));
    put_image(
        at,
        "benign/benign (2)_mask_1.png",
        DynamicImage::from(mask(&[(5, 5)])).to_rgba8(),
    );
    put_image(at, "benign/benign (2)_mask_2.png", mask(&[(9, 2), (1, 1)]));
    put_image(at, "malignant/malignant (1).png", scan(1));
    put_image(at, "malignant/malignant (1)_mask.png", mask(&[(3, 3)]));
    put_image(at, "normal/normal (1).png", scan(3));
    put_image(at, "normal/normal (1)_mask.png", mask(&[]));
    root
}

#[test]
fn busi_joins_masks_and_finds_duplicates() {
    let root = busi();
    put(root.path(), "benign/._benign (2).png", "a resource fork");
    put(root.path(), "benign/Thumbs.db", "");
    let source = open("busi", root.path()).unwrap();
    assert_eq!(source.name(), "busi");
    assert_eq!(
        images(&*source),
        ["benign (2).png", "malignant (1).png", "normal (1).png"]
    );
    assert_eq!(source.cases()[0].id(), "benign (2)");
    assert_eq!(spots(&source.mask(0).unwrap()), [(1, 1), (9, 2), (5, 5)]);
    assert_eq!(source.mask(2).unwrap(), Gray::zeros(12, 8));
    assert_eq!(source.image(0).unwrap().pixels, *scan(1).as_raw());
    assert_eq!(data::duplicates(source.cases()), [[0, 1]]);
    // The two copies carry different labels, so neither stays.
    let (kept, drops) = data::without_duplicates(source.cases());
    assert_eq!(kept, [2]);
    assert_eq!(drops.len(), 2);
    assert_says(
        &drops[0].reason,
        &["different labels", "benign (2).png, malignant (1).png"],
    );

    let parent = TempDir::new().unwrap();
    fs::rename(root.path(), parent.path().join("Dataset_BUSI_with_GT")).unwrap();
    assert_eq!(open("busi", parent.path()).unwrap().cases().len(), 3);
}

#[test]
fn duplicates_that_agree_keep_the_first() {
    let root = busi();
    put_image(root.path(), "benign/benign (3).png", scan(9));
    put_image(root.path(), "benign/benign (3)_mask.png", mask(&[(1, 1)]));
    put_image(root.path(), "benign/benign (4).png", scan(9));
    put_image(root.path(), "benign/benign (4)_mask.png", mask(&[(1, 1)]));
    let source = open("busi", root.path()).unwrap();
    let (kept, drops) = data::without_duplicates(source.cases());
    let kept: Vec<&str> = kept.iter().map(|&i| images(&*source)[i]).collect();
    assert_eq!(kept, ["benign (3).png", "normal (1).png"]);
    assert!(
        drops.iter().any(|d| {
            d.file == "benign (4).png" && d.reason == "the same bytes as benign (3).png"
        })
    );
}

#[test]
fn busi_refuses_what_does_not_fit() {
    let refused = |spoil: &dyn Fn(&Path)| {
        let root = busi();
        spoil(root.path());
        refusal(open("busi", root.path()))
    };
    let message = refused(&|at| {
        put_image(
            at,
            "benign/benign (2)_mask_1.png",
            GrayImage::from_pixel(11, 8, Luma([255])),
        );
    });
    assert_says(
        &message,
        &["benign (2)_mask_1.png", "expected 12×8", "found 11×8"],
    );
    let message = refused(&|at| fs::remove_file(at.join("benign/benign (2).png")).unwrap());
    assert_says(
        &message,
        &["benign (2)_mask.png", "expected an image", "found none"],
    );
    let message =
        refused(&|at| fs::remove_file(at.join("malignant/malignant (1)_mask.png")).unwrap());
    assert_says(
        &message,
        &["malignant (1).png", "expected a mask", "found none"],
    );
    let message = refused(&|at| put_image(at, "malignant/malignant (1)_mask.png", mask(&[])));
    assert_says(&message, &["malignant (1)_mask.png", "expected a lesion"]);
    let message = refused(&|at| put_image(at, "normal/normal (1)_mask.png", mask(&[(1, 1)])));
    assert_says(&message, &["normal (1)_mask.png", "expected a black mask"]);
    let empty = TempDir::new().unwrap();
    assert_says(
        &refusal(open("busi", empty.path())),
        &["benign/", "found 0"],
    );
    fs::create_dir(empty.path().join("benign")).unwrap();
    assert_says(
        &refusal(open("busi", empty.path())),
        &["expected images, found none"],
    );
}

#[test]
fn a_truncated_image_stops_loading() {
    let root = busi();
    let path = root.path().join("benign/benign (2).png");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 30]).unwrap();
    let source = open("busi", root.path()).unwrap();
    assert_says(
        &refusal(data::load(&*source, 16, NOTHING)),
        &["benign (2).png", "complete PNG"],
    );
}

// ---- BrEaST ---------------------------------------------------------------------------------

const BREAST: &str = "BrEaST-Lesions_USG-images_and_masks";
const BREAST_COLUMNS: [&str; 5] = [
    "CaseID",
    "Image_filename",
    "Mask_tumor_filename",
    "Pixel_size",
    "Classification",
];

fn breast(rows: &[&[&str]]) -> TempDir {
    let root = TempDir::new().unwrap();
    put(root.path(), "clinical-data-Dec-15-2023.xlsx", xlsx(rows));
    put_image(root.path(), &format!("{BREAST}/case001.png"), scan(1));
    // Alpha differs from red: red counts.
    let tumor = RgbaImage::from_fn(12, 8, |x, y| match (x, y) {
        (2, 3) => Rgba([255, 255, 255, 0]),
        (4, 4) => Rgba([0, 0, 0, 255]),
        _ => Rgba([0, 0, 0, 0]),
    });
    put_image(root.path(), &format!("{BREAST}/case001_tumor.png"), tumor);
    put_image(
        root.path(),
        &format!("{BREAST}/case001_other1.png"),
        mask(&[(7, 7)]),
    );
    put_image(root.path(), &format!("{BREAST}/case002.png"), scan(2));
    root
}

#[test]
fn breast_reads_its_workbook() {
    let root = breast(&[
        &BREAST_COLUMNS,
        &[
            "1",
            "case001.png",
            "case001_tumor.png",
            "0.0085",
            "malignant",
        ],
        &["2", "case002.png", "not applicable", "0.01", " Normal "],
    ]);
    put(
        root.path(),
        "~$clinical-data-Dec-15-2023.xlsx",
        "an open workbook's lock",
    );
    let source = open("breast", root.path()).unwrap();
    assert_eq!(counts(&*source), [0, 1, 1]);
    let case = &source.cases()[0];
    assert!((case.pixel_mm.unwrap() - 0.085).abs() < 1e-12);
    assert_eq!(case.patient.as_deref(), Some("case001"));
    assert_eq!((case.width, case.height), (12, 8));
    assert_eq!(case.sha256.len(), 64);
    assert_eq!(spots(&source.mask(0).unwrap()), [(2, 3)]);
    assert!(spots(&source.mask(1).unwrap()).is_empty());
}

#[test]
fn breast_refuses_what_does_not_fit() {
    let one = [
        "1",
        "case001.png",
        "case001_tumor.png",
        "0.0085",
        "malignant",
    ];
    let two = ["2", "case002.png", "", "0.01", "normal"];
    let refused = |rows: &[&[&str]]| refusal(open("breast", breast(rows).path()));
    let columns = [
        "CaseID",
        "Image_filename",
        "Mask_tumor_filename",
        "Pixel_size",
        "Class",
    ];
    assert_says(
        &refused(&[&columns, &one, &two]),
        &[
            ".xlsx",
            "expected a column Classification",
            "found CaseID, Image_filename",
        ],
    );
    assert_says(
        &refused(&[
            &BREAST_COLUMNS,
            &one,
            &["2", "case002.png", "", "", "benign"],
        ]),
        &["line 3", "Mask_tumor_filename", "benign lesion"],
    );
    assert_says(
        &refused(&[
            &BREAST_COLUMNS,
            &one,
            &["2", "case009.png", "", "", "normal"],
        ]),
        &["line 3", "\"case009.png\"", "found none"],
    );
    assert_says(
        &refused(&[&BREAST_COLUMNS, &one]),
        &["case002.png", "expected a row"],
    );
    assert_says(
        &refused(&[
            &BREAST_COLUMNS,
            &one,
            &["2", "case002.png", "", "small", "normal"],
        ]),
        &["Pixel_size", "expected a positive number", "\"small\""],
    );
    assert_says(
        &refused(&[
            &BREAST_COLUMNS,
            &one,
            &["2", "case002.png", "", "1", "benig"],
        ]),
        &[
            "Classification",
            "expected benign, malignant or normal",
            "\"benig\"",
        ],
    );
    let root = breast(&[&BREAST_COLUMNS, &one, &two]);
    put(
        root.path(),
        "clinical-data-Dec-15-2023.xlsx",
        "not a workbook",
    );
    assert_says(&refusal(open("breast", root.path())), &["expected an xlsx"]);
    fs::remove_file(root.path().join("clinical-data-Dec-15-2023.xlsx")).unwrap();
    assert_says(
        &refusal(open("breast", root.path())),
        &["expected one .xlsx", "found 0"],
    );
}

// ---- BUS-UCLM -------------------------------------------------------------------------------

fn uclm() -> TempDir {
    let root = TempDir::new().unwrap();
    let at = root.path();
    let info = "\u{feff}Image;Resolution;Label;Doppler;Marks;Combined\r\n\
        ALWI_000.png;12x8;Benign;No;No;No\r\n\
        ALWI_001.png;12x8;Normal;Y;No;No\r\n\
        CHSP_000.png;12x8;Malignant;Yes;Yes;No\r\n\
        HESN_000.png;12x8;Benign;No;No;No\r\n\
        HESN_001.png;12x8;Normal;No;No;No\r\n\
        OSCU_000.png;12x8;Malignant;No;No;No\r\n";
    put(at, "INFO.csv", info);
    let colour = |rgb| {
        RgbImage::from_fn(12, 8, |x, y| {
            Rgb(if (x, y) == (4, 2) { rgb } else { [0; 3] })
        })
    };
    let (green, red, black) = ([0, 255, 0], [255, 0, 0], [0, 0, 0]);
    for (name, seed, rgb) in [
        ("ALWI_000", 1, green),
        ("ALWI_001", 2, black),
        ("CHSP_000", 3, red),
        ("HESN_000", 4, green),
        ("HESN_001", 5, black),
        ("OSCU_000", 6, green),
    ] {
        put_image(at, &format!("images/{name}.png"), scan(seed));
        put_image(at, &format!("masks/{name}.png"), colour(rgb));
    }
    // Cropped after the mask was drawn.
    put_image(at, "images/HESN_000.png", RgbaImage::new(9, 6));
    put_image(at, "images/HESN_001.png", RgbaImage::new(10, 6));
    root
}

#[test]
fn uclm_reads_colours_and_leaves_out_what_was_cropped() {
    let root = uclm();
    let source = open("uclm", root.path()).unwrap();
    // A black mask needs no place, so the cropped normal image stays.
    assert_eq!(
        images(&*source),
        [
            "ALWI_000.png",
            "ALWI_001.png",
            "CHSP_000.png",
            "HESN_001.png"
        ]
    );
    let patients: Vec<_> = source
        .cases()
        .iter()
        .map(|c| c.patient.as_deref().unwrap())
        .collect();
    assert_eq!(patients, ["ALWI", "ALWI", "CHSP", "HESN"]);
    assert_eq!(spots(&source.mask(0).unwrap()), [(4, 2)]);
    assert_eq!(spots(&source.mask(2).unwrap()), [(4, 2)]);
    assert_eq!(source.mask(3).unwrap(), Gray::zeros(10, 6));
    let [cropped, contradicted] = source.drops() else {
        panic!("{:?}", source.drops())
    };
    assert_eq!(cropped.file, "HESN_000.png");
    assert_says(&cropped.reason, &["expected 9×6", "found 12×8"]);
    assert_eq!(contradicted.file, "OSCU_000.png");
    assert_says(&contradicted.reason, &["malignant", "green"]);
    // Their masks are shapes all the same, at their own size.
    let own = source.dropped_mask(0).unwrap().unwrap();
    assert_eq!(
        (own.label, own.patient.as_deref()),
        (Label::Benign, Some("HESN"))
    );
    assert_eq!((own.mask.width, own.mask.height), (12, 8));
    assert_eq!(spots(&own.mask), [(4, 2)]);
    assert!(source.dropped_mask(1).unwrap().is_some());
    assert!(source.dropped_mask(2).unwrap().is_none());
}

#[test]
fn uclm_refuses_what_does_not_fit() {
    let refused = |spoil: &dyn Fn(&Path)| {
        let root = uclm();
        spoil(root.path());
        refusal(open("uclm", root.path()))
    };
    let message = refused(&|at| fs::remove_file(at.join("masks/CHSP_000.png")).unwrap());
    assert_says(&message, &["INFO.csv", "line 4", "masks/CHSP_000.png"]);
    let message = refused(&|at| put_image(at, "images/ZZZZ_000.png", scan(1)));
    assert_says(&message, &["ZZZZ_000.png", "expected a row"]);
    let message = refused(&|at| put(at, "INFO.csv", "Image;Resolution\r\nALWI_000.png;12x8\r\n"));
    assert_says(
        &message,
        &[
            "INFO.csv",
            "expected a column Label",
            "found Image, Resolution",
        ],
    );
    let message = refused(&|at| put(at, "masks/CHSP_000.png", "damaged"));
    assert_says(&message, &["CHSP_000.png", "expected a complete PNG"]);
}

// ---- UDIAT, BUS-BRA -------------------------------------------------------------------------

#[test]
fn udiat_with_and_without_column_names() {
    let root = TempDir::new().unwrap();
    for (name, seed) in [("000001", 1), ("000012", 2)] {
        put_image(root.path(), &format!("original/{name}.png"), scan(seed));
        put_image(root.path(), &format!("GT/{name}.png"), mask(&[(2, 2)]));
    }
    let rows: [&[&str]; 3] = [
        &["Image", "Type"],
        &["1", "Benign", "FA"],
        &["12", "Malignant", "IDC"],
    ];
    for rows in [&rows[..], &rows[1..]] {
        put(root.path(), "DatasetB.xlsx", xlsx(rows));
        let source = open("udiat", root.path()).unwrap();
        assert_eq!(images(&*source), ["000001.png", "000012.png"]);
        assert_eq!(counts(&*source), [1, 1, 0]);
    }
    put(
        root.path(),
        "DatasetB.xlsx",
        xlsx(&[&["1", "Benign"], &["7", "Malignant"]]),
    );
    assert_says(
        &refusal(open("udiat", root.path())),
        &["line 2", "original/000007.png"],
    );
    put(root.path(), "DatasetB.xlsx", xlsx(&[&["1", "Benign"]]));
    assert_says(
        &refusal(open("udiat", root.path())),
        &["000012.png", "expected a row"],
    );
}

#[test]
fn busbra_knows_patients() {
    let root = TempDir::new().unwrap();
    let at = root.path().join("BUSBRA");
    put(
        &at,
        "bus_data.csv",
        "ID,Case,Histology,Pathology,BIRADS\nbus_0001-l,7,X,benign,2\nbus_0001-r,7,X,malignant,5\n",
    );
    for side in ["l", "r"] {
        put_image(&at, &format!("Images/bus_0001-{side}.png"), scan(1));
        put_image(&at, &format!("Masks/mask_0001-{side}.png"), mask(&[(2, 2)]));
    }
    for root in [root.path(), &at] {
        let source = open("busbra", root).unwrap();
        assert_eq!(images(&*source), ["bus_0001-l.png", "bus_0001-r.png"]);
        assert_eq!(counts(&*source), [1, 1, 0]);
        assert!(
            source
                .cases()
                .iter()
                .all(|c| c.patient.as_deref() == Some("7"))
        );
    }
    fs::remove_file(at.join("Masks/mask_0001-r.png")).unwrap();
    assert_says(
        &refusal(open("busbra", root.path())),
        &["line 3", "Masks/mask_0001-r.png"],
    );
}

// ---- folder ---------------------------------------------------------------------------------

fn folder() -> TempDir {
    let root = TempDir::new().unwrap();
    let at = root.path();
    put(
        at,
        "labels.csv",
        "image,label,patient,pixel_mm\na.jpg,benign,p1,0.1\nb.c,Malignant,,\nd.png,normal,p2,\n",
    );
    put_image(at, "images/a.jpg", scan(1));
    put_image(at, "images/b.c.png", scan(2));
    put_image(at, "images/d.png", scan(3));
    put_image(at, "images/spare.png", scan(4));
    put_image(at, "masks/a.png", mask(&[(1, 2)]));
    put_image(at, "masks/b.c.bmp", mask(&[(3, 4)]));
    root
}

#[test]
fn folder_takes_anybodys_data() {
    let root = folder();
    let source = open("folder", root.path()).unwrap();
    assert_eq!(images(&*source), ["a.jpg", "b.c.png", "d.png"]);
    let patients: Vec<_> = source
        .cases()
        .iter()
        .map(|c| c.patient.as_deref())
        .collect();
    assert_eq!(patients, [Some("p1"), None, Some("p2")]);
    let spacing: Vec<_> = source.cases().iter().map(|c| c.pixel_mm).collect();
    assert_eq!(spacing, [Some(0.1), None, None]);
    assert_eq!(spots(&source.mask(1).unwrap()), [(3, 4)]);
    assert_eq!(source.drops().len(), 1);
    assert_eq!(source.drops()[0].file, "spare.png");
    assert_says(&source.drops()[0].reason, &["labels.csv has no row"]);
    // Patient and spacing may be left out altogether.
    put(root.path(), "labels.csv", "image,label\na,benign\n");
    assert_eq!(counts(&*open("folder", root.path()).unwrap()), [1, 0, 0]);
}

#[test]
fn folder_refuses_what_does_not_fit() {
    let refused = |spoil: &dyn Fn(&Path)| {
        let root = folder();
        spoil(root.path());
        refusal(open("folder", root.path()))
    };
    let message = refused(&|at| put_image(at, "masks/z.png", mask(&[(1, 1)])));
    assert_says(&message, &["masks/z.png", "expected an image z.*"]);
    let message = refused(&|at| fs::remove_file(at.join("masks/a.png")).unwrap());
    assert_says(&message, &["images/a.jpg", "expected a mask a.*", "benign"]);
    let message = refused(&|at| put_image(at, "images/a.png", scan(9)));
    assert_says(
        &message,
        &["a.png", "expected one file of this name", "a.jpg"],
    );
    for (csv, parts) in [
        ("image\na\n", ["expected a column label", "found image"]),
        ("image,label\nq,benign\n", ["line 2", "\"q\""]),
        ("image,label\na.tif,benign\n", ["line 2", "\"a.tif\""]),
        (
            "image,label\na,benign\na.jpg,benign\n",
            ["line 3", "no row above names"],
        ),
        ("image,label\na,maybe\n", ["line 2, label", "\"maybe\""]),
        (
            "image,label,pixel_mm\na,benign,-1\n",
            ["line 2, pixel_mm", "\"-1\""],
        ),
        (
            "image,label\na,benign,1\n",
            ["labels.csv", "expected a CSV"],
        ),
        ("image,label\n", ["expected images", "found none"]),
    ] {
        assert_says(&refused(&|at| put(at, "labels.csv", csv)), &parts);
    }
}

// ---- packs ----------------------------------------------------------------------------------

#[test]
fn a_pack_gives_what_its_source_gave() {
    let root = uclm();
    let source = open("uclm", root.path()).unwrap();
    let file = root.path().join("small.pack");
    pack::write(&*source, 16, &file, NOTHING).unwrap();
    let packed = open("pack", &file).unwrap();
    assert_eq!(packed.name(), "uclm");
    assert_eq!(packed.letterboxed(), Some(16));
    assert_eq!(packed.cases(), source.cases());
    assert_eq!(packed.drops(), source.drops());
    let examples = data::load(&*source, 16, NOTHING).unwrap();
    assert_eq!(data::load(&*packed, 16, NOTHING).unwrap(), examples);
    for (i, example) in examples.iter().enumerate() {
        assert_eq!(packed.mask(i).unwrap(), source.mask(i).unwrap());
        assert_eq!(packed.image(i).unwrap().pixels, example.image);
    }
    assert_says(
        &refusal(data::load(&*packed, 32, NOTHING)),
        &["expected 16", "found 32"],
    );
}

#[test]
fn damaged_and_hostile_packs_are_refused() {
    let root = busi();
    let file = root.path().join("a.pack");
    pack::write(&*open("busi", root.path()).unwrap(), 16, &file, NOTHING).unwrap();
    let good = fs::read(&file).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let message = refusal(open("pack", &file));
        assert_says(&message, &["a.pack", "expected"]);
        message
    };
    for keep in [0, 7, 15, 16, 40, good.len() / 2, good.len() - 1] {
        refused(&good[..keep]);
    }
    refused(&[&good[..], b"x"].concat());
    let mut other = good.clone();
    other[0] = b'E';
    refused(&other);
    let mut newer = good.clone();
    newer[8] = 9;
    assert_says(&refused(&newer), &["version 1", "version 9"]);
    let mut long = good.clone();
    long[12..16].fill(0xFF);
    assert_says(&refused(&long), &["4294967295", "truncated"]);

    // The same pack under another header.
    let length = u32::from_le_bytes(good[12..16].try_into().unwrap()) as usize;
    let header = str::from_utf8(&good[16..16 + length]).unwrap().to_owned();
    let with = |from: &str, to: &str| {
        let header = header.replacen(from, to, 1);
        assert_ne!(header, str::from_utf8(&good[16..16 + length]).unwrap());
        let size = (header.len() as u32).to_le_bytes();
        [&good[..12], &size, header.as_bytes(), &good[16 + length..]].concat()
    };
    assert_says(
        &refused(&with("\"size\":16", "\"size\":999999999")),
        &["999999999"],
    );
    assert_says(&refused(&with("\"width\":12", "\"width\":0")), &["found 0"]);
    refused(&with(
        "\"image_bytes\":",
        "\"image_bytes\":18446744073709551",
    ));
    refused(&with("\"label\":\"benign\"", "\"label\":\"fine\""));
    // A header whose sizes are possible but not those of the images within.
    fs::write(&file, with("\"width\":12", "\"width\":13")).unwrap();
    let source = open("pack", &file).unwrap();
    assert_says(
        &refusal(source.mask(0)),
        &["benign (2).png", "expected 13×8", "found 12×8"],
    );
    fs::write(&file, with("\"size\":16", "\"size\":17")).unwrap();
    let source = open("pack", &file).unwrap();
    assert_says(
        &refusal(source.image(0)),
        &["expected 17×17", "found 16×16"],
    );
}

// ---- folds ----------------------------------------------------------------------------------

fn case(i: usize, patient: Option<usize>, label: Label) -> Case {
    Case {
        image: format!("{i}.png"),
        patient: patient.map(|p| format!("p{p}")),
        label,
        pixel_mm: None,
        width: 1,
        height: 1,
        sha256: format!("{i}"),
    }
}

fn labelled(counts: [usize; 3]) -> Vec<Case> {
    let labels = Label::ALL.into_iter().zip(counts);
    let labels = labels.flat_map(|(label, n)| std::iter::repeat_n(label, n));
    labels
        .enumerate()
        .map(|(i, label)| case(i, None, label))
        .collect()
}

#[test]
fn folds_partition_and_stratify() {
    let cases = labelled([154, 98, 4]);
    let all: Vec<usize> = (0..cases.len()).collect();
    let split = folds(&cases, &all, 5, 7).unwrap();
    let mut seen: Vec<usize> = Vec::new();
    for fold in &split {
        let held = |l: Label| {
            fold.validation
                .iter()
                .filter(|&&i| cases[i].label == l)
                .count()
        };
        assert!((30..=31).contains(&held(Label::Benign)));
        assert!((19..=20).contains(&held(Label::Malignant)));
        assert!(held(Label::Normal) <= 1);
        assert!((51..=52).contains(&fold.validation.len()));
        let mut both = [&fold.train[..], &fold.validation].concat();
        both.sort();
        assert_eq!(both, all);
        assert!(fold.train.is_sorted() && fold.validation.is_sorted());
        seen.extend(&fold.validation);
    }
    seen.sort();
    assert_eq!(seen, all);
    assert_eq!(folds(&cases, &all, 5, 7).unwrap(), split);
    assert_ne!(folds(&cases, &all, 5, 8).unwrap(), split);
    assert_eq!(fold(&cases, &all, 5, 3, 7).unwrap(), split[3]);
    // Only the cases asked for.
    let lesions: Vec<usize> = (0..252).collect();
    let split = folds(&cases, &lesions, 5, 7).unwrap();
    assert!(
        split
            .iter()
            .all(|f| f.train.len() + f.validation.len() == 252)
    );
}

#[test]
fn folds_keep_patients_and_copies_together() {
    // 20 patients of 1 to 5 images, of which some have both benign and normal images.
    let mut cases = Vec::new();
    for patient in 0..20 {
        for k in 0..=patient % 5 {
            let label = match (patient % 2, k) {
                (0, _) => Label::Malignant,
                (_, 3..) => Label::Normal,
                _ => Label::Benign,
            };
            cases.push(case(cases.len(), Some(patient), label));
        }
    }
    // The same image under two patients, and a copy under none.
    cases[0].sha256 = "same".into();
    cases[30].sha256 = "same".into();
    let copy = cases.len();
    cases.push(Case {
        sha256: "same".into(),
        ..case(copy, None, Label::Benign)
    });
    let all: Vec<usize> = (0..cases.len()).collect();
    for seed in 0..20 {
        for fold in folds(&cases, &all, 4, seed).unwrap() {
            for &i in &fold.train {
                for &j in &fold.validation {
                    assert!(cases[i].patient.is_none() || cases[i].patient != cases[j].patient);
                    assert_ne!(cases[i].sha256, cases[j].sha256);
                }
            }
            let held = fold.validation.len();
            assert!(
                (11..=20).contains(&held),
                "{held} of {} held out",
                cases.len()
            );
        }
    }
}

#[test]
fn folds_that_cannot_be_made_are_refused() {
    let cases = labelled([4, 3, 0]);
    let all: Vec<usize> = (0..7).collect();
    assert_says(
        &refusal(folds(&cases, &all, 5, 0)),
        &["folds", "expected at least 5 benign", "found 4"],
    );
    // The rarer label may be missing in some.
    let count = |fold: &Fold| {
        let of = |label| {
            fold.validation
                .iter()
                .filter(|&&i| cases[i].label == label)
                .count()
        };
        [Label::Benign, Label::Malignant].map(of)
    };
    let rare: Vec<[usize; 2]> = folds(&cases, &all, 4, 0)
        .unwrap()
        .iter()
        .map(count)
        .collect();
    assert!(
        rare.iter()
            .all(|[benign, malignant]| *benign == 1 && *malignant <= 1),
        "{rare:?}"
    );
    assert_says(
        &refusal(folds(&cases, &all, 1, 0)),
        &["expected at least 2", "found 1"],
    );
    assert_says(
        &refusal(fold(&cases, &all, 4, 4, 0)),
        &["fold", "expected 0 to 3", "found 4"],
    );
    // Ten images of one patient cannot be held out from each other.
    let cases: Vec<Case> = (0..10).map(|i| case(i, Some(0), Label::Benign)).collect();
    assert_says(
        &refusal(folds(&cases, &(0..10).collect::<Vec<_>>(), 2, 0)),
        &["found 1"],
    );
}

// ---- real data ------------------------------------------------------------------------------

fn real(name: &str, folder: &str) -> Box<dyn Source> {
    let root = std::env::var("ECHOGRAD_DATA").expect("ECHOGRAD_DATA names the data sets' folder");
    open(name, &Path::new(&root).join(folder)).unwrap()
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn breast_as_published() {
    let source = real("breast", "BrEaST");
    assert_eq!(counts(&*source), [154, 98, 4]);
    assert!(source.drops().is_empty());
    assert!(data::duplicates(source.cases()).is_empty());
    for (i, case) in source.cases().iter().enumerate() {
        let mask = source.mask(i).unwrap();
        assert_eq!((mask.width, mask.height), (case.width, case.height));
        assert_eq!(
            mask.pixels.contains(&255),
            case.label.is_lesion(),
            "{}",
            case.image
        );
        let pixel = case.pixel_mm.unwrap();
        assert!(
            (0.04..0.15).contains(&pixel),
            "{} has {pixel} mm",
            case.image
        );
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    pack::write(&*source, 256, file.path(), NOTHING).unwrap();
    let packed = open("pack", file.path()).unwrap();
    assert!(packed.cases() == source.cases());
    let examples = data::load(&*source, 256, NOTHING).unwrap();
    assert!(data::load(&*packed, 256, NOTHING).unwrap() == examples);
    assert!(fs::metadata(file.path()).unwrap().len() < 9_000_000);
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn busi_as_published() {
    let source = real("busi", "BUSI");
    assert_eq!(counts(&*source), [437, 210, 133]);
    assert!(source.drops().is_empty());
    let groups = data::duplicates(source.cases());
    let names: Vec<&str> = groups
        .iter()
        .flatten()
        .map(|&i| images(&*source)[i])
        .collect();
    assert_eq!(names, ["benign (433).png", "malignant (145).png"]);
    assert_eq!(
        real("busi", "BUSI/Dataset_BUSI_with_GT").cases(),
        source.cases()
    );
    // benign (195) has three masks, and the reader's is their union.
    let i = images(&*source)
        .iter()
        .position(|&n| n == "benign (195).png")
        .unwrap();
    let root = std::env::var("ECHOGRAD_DATA").unwrap();
    let stem = format!("{root}/BUSI/Dataset_BUSI_with_GT/benign/benign (195)_mask");
    let lit = |m: &Gray| m.pixels.iter().filter(|v| **v == 255).count();
    let parts =
        ["", "_1", "_2"].map(|n| image::read_mask(Path::new(&format!("{stem}{n}.png"))).unwrap());
    let all = lit(&source.mask(i).unwrap());
    assert!(parts.iter().all(|part| lit(part) < all));
    assert!(all <= parts.iter().map(lit).sum());
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn uclm_sample_as_published() {
    let source = real("uclm", "BUS-UCLM-sample");
    assert_eq!(counts(&*source), [9, 7, 6]);
    let dropped: Vec<&str> = source.drops().iter().map(|d| &*d.file).collect();
    assert_eq!(dropped, ["HESN_002.png", "HESN_003.png"]);
}
