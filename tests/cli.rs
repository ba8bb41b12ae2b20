//! The program as scripts and people meet it: exit codes, streams, files, errors, signals.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use assert_cmd::cargo::cargo_bin;
use echograd::data::image::{Gray, write_png};
use serde_json::Value;
use support::xlsx;
use tempfile::TempDir;

/// A run that takes a fraction of a second.
const SMALL: [&str; 11] = [
    "--preset",
    "tiny",
    "--size",
    "16",
    "--batch",
    "4",
    "--folds",
    "3",
    "--set",
    "model.widths=[3,5]",
    "--epochs",
];

/// The program, in a folder of its own. Backtraces are asked for, so that a test sees it if one is
/// printed.
fn echograd(folder: &Path) -> Command {
    let mut command = Command::new(cargo_bin!("echograd"));
    command.current_dir(folder).env("RUST_BACKTRACE", "1");
    command.stdin(Stdio::null());
    command
}

fn output(folder: &Path, args: &[&str]) -> Output {
    echograd(folder).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("UTF-8")
}

/// Stdout of a command that must succeed, and has nothing to hide on stderr.
fn done(folder: &Path, args: &[&str]) -> String {
    let output = output(folder, args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    // Plain lines, since nobody looks: no cursor is moved, no colour set.
    assert!(!stderr.contains(['\x1b', '\r']), "{args:?}: {stderr:?}");
    text(&output.stdout).to_owned()
}

/// The one JSON document on the stdout of a command.
fn json(folder: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&done(folder, args)).expect("one JSON document and nothing else")
}

/// Every file below a folder with its content.
fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Holds a failure to its form: exit code, nothing on stdout, one line that says `error: ` and has all
/// of `parts`, and then nothing but indented causes.
fn assert_fails(output: &Output, parts: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{parts:?}: {stderr}");
    assert_eq!(text(&output.stdout), "", "{parts:?}");
    let lines: Vec<&str> = stderr.lines().collect();
    let errors: Vec<usize> = (0..lines.len())
        .filter(|&i| lines[i].starts_with("error: "))
        .collect();
    let [at] = errors[..] else {
        panic!("{parts:?}: expected one line of error, found {stderr}")
    };
    for part in parts {
        assert!(lines[at].contains(part), "expected {part:?} in {stderr}");
    }
    for cause in &lines[at + 1..] {
        assert!(cause.starts_with("  "), "not a cause: {cause:?}: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A command that must fail and leave every file below `folder` as it was.
fn fails(folder: &Path, args: &[&str], parts: &[&str]) {
    let before = snapshot(folder);
    assert_fails(&output(folder, args), parts);
    assert!(before == snapshot(folder), "{args:?} changed files");
}

fn usage(folder: &Path, args: &[&str], part: &str) {
    let output = output(folder, args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert_eq!(text(&output.stdout), "");
    assert!(stderr.contains(part), "expected {part:?} in {stderr}");
}

// ---- fixtures -------------------------------------------------------------------------------

/// Fourteen images of 40×32 with round (benign) or wavy (malignant) blobs, and two without, as
/// `folder:` reads them.
fn write_data(folder: &Path) {
    let (width, height) = (40, 32);
    for sub in ["images", "masks"] {
        fs::create_dir_all(folder.join(sub)).unwrap();
    }
    let mut labels = "image,label,pixel_mm\n".to_owned();
    for i in 0..16usize {
        let (malignant, normal) = (i % 2 == 0, i >= 14);
        let inside = |x: usize, y: usize| {
            let (dx, dy) = (
                x as f64 - 15.0 - (i % 5) as f64,
                y as f64 - 14.0 - (i % 3) as f64,
            );
            let wave = if malignant { 0.3 } else { 0.0 };
            let radius = 9.0 * (1.0 + wave * (5.0 * dy.atan2(dx)).cos()) + (i % 4) as f64;
            !normal && dx.hypot(dy * 1.3) < radius
        };
        let paint = |value: &dyn Fn(usize, usize) -> u8| Gray {
            width,
            height,
            pixels: (0..width * height)
                .map(|p| value(p % width, p / width))
                .collect(),
        };
        let image = paint(&|x, y| {
            let noise = (x * 7919 + y * 104_729 + i * 1_299_709) % 61;
            (noise + if inside(x, y) { 40 } else { 150 }) as u8
        });
        let mask = paint(&|x, y| if inside(x, y) { 255 } else { 0 });
        let name = format!("{i:02}.png");
        write_png(&folder.join("images").join(&name), &image).unwrap();
        write_png(&folder.join("masks").join(&name), &mask).unwrap();
        let label = match (normal, malignant) {
            (true, _) => "normal",
            (_, true) => "malignant",
            _ => "benign",
        };
        labels += &format!("{name},{label},0.1\n");
    }
    fs::write(folder.join("labels.csv"), labels).unwrap();
}

/// A folder with the data above in `data/` and a run on it in `run/`, made once for all tests that only
/// read them.
fn shared() -> &'static Path {
    static SHARED: OnceLock<PathBuf> = OnceLock::new();
    SHARED.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        write_data(&folder.join("data"));
        train(&folder, "run", "1");
        folder
    })
}

/// Trains on `data/` in `folder`.
fn train(folder: &Path, out: &str, epochs: &str) -> String {
    done(folder, &train_args(out, epochs, &[]))
}

fn train_args<'a>(out: &'a str, epochs: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "--data", "folder:data", "--out", out];
    args.extend(SMALL);
    args.push(epochs);
    args.extend(more);
    args
}

/// A folder of one's own with copies of the shared data and run, to spoil.
fn copy() -> TempDir {
    let root = TempDir::new().unwrap();
    for (from, bytes) in snapshot(shared()) {
        let kept = from.strip_prefix(shared()).unwrap();
        if !(kept.starts_with("data") || kept.starts_with("run")) {
            continue;
        }
        let to = root.path().join(kept);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, bytes).unwrap();
    }
    root
}

// ---- help and usage -------------------------------------------------------------------------

const COMMANDS: [&str; 14] = [
    "demo",
    "train",
    "evaluate",
    "predict",
    "export",
    "study",
    "search",
    "compare",
    "features",
    "phantom",
    "pack",
    "summary",
    "gradcheck",
    "profile",
];

#[test]
fn help_fits_a_screen_and_lists_every_command() {
    let folder = TempDir::new().unwrap();
    let wide = |text: &str| text.lines().any(|line| line.chars().count() > 100);
    let top = done(folder.path(), &["--help"]);
    assert!(!wide(&top), "{top}");
    for command in COMMANDS {
        assert!(top.contains(&format!("\n  {command} ")), "{command}: {top}");
        let help = done(folder.path(), &["help", command]);
        assert!(help.contains(&format!("Usage: echograd {command}")));
        assert!(!wide(&help), "{help}");
    }
    // Alone, the program teaches, but it was not asked for anything that it could do.
    let alone = output(folder.path(), &[]);
    assert_eq!(alone.status.code(), Some(2));
    assert!(text(&alone.stderr).contains("Usage: echograd"));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let folder = TempDir::new().unwrap();
    for (args, part) in [
        (&["trian"][..], "train"),
        (&["train", "--data", "busi:x"], "--out <RUN>"),
        (&["train", "--out", "run"], "--data"),
        (&["train", "--out", "r", "--arm", "both"], "consistency"),
        (&["train", "--out", "r", "--size", "8"], "16..=4096"),
        (&["train", "--out", "r", "--set", "epochs"], "KEY=VALUE"),
        (&["features"], "--data"),
        (
            &["features", "--data", "busi:x", "--mask", "y"],
            "cannot be used with",
        ),
        (
            &["phantom", "--site", "E", "--count", "1", "--out", "o"],
            "--site",
        ),
        (
            &["phantom", "--site", "A", "--count", "0", "--out", "o"],
            "--count",
        ),
        (&["predict", "run", "--out", "o"], "<FILE>"),
        (&["gradcheck", "--op", "conv2"], "did you mean \"conv2d\"?"),
        (&["summary", "--threads", "0"], "--threads"),
    ] {
        usage(folder.path(), args, part);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

// ---- bad input ------------------------------------------------------------------------------

#[test]
fn data_that_is_not_there_is_named() {
    let root = TempDir::new().unwrap();
    let at = root.path();
    fs::create_dir(at.join("empty")).unwrap();
    fs::write(at.join("file"), "text").unwrap();
    for (spec, parts) in [
        ("busi:nowhere", &["nowhere: expected a readable folder"][..]),
        ("busi:empty", &["empty: expected benign/", "found 0"]),
        ("busi:file", &["file: expected a readable folder"]),
        ("breast:empty", &["empty: expected one .xlsx", "found 0"]),
        ("uclm:empty", &["empty/INFO.csv: expected"]),
        ("folder:empty", &["empty/labels.csv: expected"]),
        ("pack:nowhere", &["nowhere: cannot be read"]),
        ("pack:file", &["file: expected a pack, found 4 bytes"]),
        ("empty", &["expected NAME:PATH", "found \"empty\""]),
        ("busi:", &["expected NAME:PATH", "found \"busi:\""]),
        (
            "buzi:empty",
            &["unknown data set", "did you mean \"busi\"?"],
        ),
    ] {
        fails(at, &["features", "--data", spec], parts);
        fails(at, &["train", "--data", spec, "--out", "run"], parts);
        fails(at, &["pack", "--data", spec, "--out", "packed"], parts);
    }
}

#[test]
fn damaged_data_is_refused_by_file() {
    let fails = |spoil: &dyn Fn(&Path), parts: &[&str]| {
        let root = copy();
        spoil(&root.path().join("data"));
        for args in [
            &["features", "--data", "folder:data"][..],
            &["pack", "--data", "folder:data", "--out", "packed"],
            &["evaluate", "run", "--data", "folder:data", "--out", "out"],
            &["train", "--data", "folder:data", "--out", "new"],
        ] {
            fails(root.path(), args, parts);
        }
    };
    fails(
        &|at| {
            let image = fs::read(at.join("images/03.png")).unwrap();
            fs::write(at.join("masks/03.png"), &image[..image.len() / 2]).unwrap();
        },
        &["data/masks/03.png: expected a complete PNG"],
    );
    fails(
        &|at| fs::write(at.join("images/03.png"), "no image").unwrap(),
        &["data/images/03.png: expected a complete PNG"],
    );
    fails(
        &|at| {
            fs::remove_file(at.join("images/03.png")).unwrap();
            fs::create_dir(at.join("images/03.png")).unwrap();
        },
        &["data/images/03.png: cannot be read"],
    );
    fails(
        &|at| {
            let (width, height) = (41, 32);
            let pixels = vec![255; width * height];
            let mask = Gray {
                width,
                height,
                pixels,
            };
            write_png(&at.join("masks/03.png"), &mask).unwrap();
        },
        &["masks/03.png: expected 40×32 pixels like its image, found 41×32"],
    );
    fails(
        &|at| fs::remove_file(at.join("images/03.png")).unwrap(),
        &["masks/03.png: expected an image 03.*", "found none"],
    );
    fails(
        &|at| fs::remove_file(at.join("masks/03.png")).unwrap(),
        &[
            "images/03.png: expected a mask 03.*",
            "benign",
            "found none",
        ],
    );
    for (table, parts) in [
        (
            "image,class\n00.png,benign\n",
            &["labels.csv: expected a column label, found image, class"][..],
        ),
        (
            "image,label\n00,benign\n00.png,benign\n",
            &["labels.csv: line 3, image", "no row above names"],
        ),
        (
            "image,label\n00,suspicious\n",
            &["labels.csv: line 2, label", "found \"suspicious\""],
        ),
    ] {
        fails(
            &|at| fs::write(at.join("labels.csv"), table).unwrap(),
            parts,
        );
    }
}

/// An image's header is sound and its pixels are missing: found when the pixels are read.
#[test]
fn an_image_cut_short_stops_the_work() {
    let root = copy();
    let path = root.path().join("data/images/05.png");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let parts = ["data/images/05.png: expected a complete PNG"];
    for args in [
        &["pack", "--data", "folder:data", "--out", "packed"][..],
        &["evaluate", "run", "--data", "folder:data", "--out", "out"],
        &["train", "--data", "folder:data", "--out", "new"],
    ] {
        fails(root.path(), args, &parts);
    }
    // Also when a whole batch of images before it is sound.
    let images: Vec<String> = (0..6).map(|i| format!("data/images/{i:02}.png")).collect();
    let mut predict = vec!["predict", "run", "--out", "out"];
    predict.extend(images.iter().map(String::as_str));
    fails(root.path(), &predict, &parts);
    let features = ["features", "--mask", "data/images/05.png"];
    fails(root.path(), &features, &parts);
}

#[test]
fn a_workbook_without_a_column_is_refused() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("clinical.xlsx");
    let images = "BrEaST-Lesions_USG-images_and_masks";
    fs::create_dir(root.path().join(images)).unwrap();
    let args = ["features", "--data", "breast:."];
    fs::write(&path, xlsx(&[&["CaseID", "Image_filename", "Pixel_size"]])).unwrap();
    fails(
        root.path(),
        &args,
        &["clinical.xlsx: expected a column Mask_tumor_filename, found CaseID, Image_filename"],
    );
    fs::write(&path, "no workbook").unwrap();
    fails(
        root.path(),
        &args,
        &["clinical.xlsx: expected an xlsx workbook"],
    );
}

#[test]
fn every_pixel_format_is_measured() {
    use image::{ImageBuffer, Luma};
    let folder = TempDir::new().unwrap();
    let lesion = |x: u32, y: u32| (10..30).contains(&x) && (12..28).contains(&y);
    let wide = ImageBuffer::from_fn(40, 40, |x, y| {
        Luma([if lesion(x, y) { u16::MAX } else { 0 }])
    });
    wide.save(folder.path().join("sixteen.png")).unwrap();
    let plain = ImageBuffer::from_fn(40, 40, |x, y| Luma([if lesion(x, y) { 255u8 } else { 0 }]));
    plain.save(folder.path().join("eight.png")).unwrap();
    // The `image` crate writes no palettes.
    let file = fs::File::create(folder.path().join("palette.png")).unwrap();
    let mut encoder = png::Encoder::new(file, 40, 40);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_palette(vec![0, 0, 0, 255, 255, 255]);
    let indices: Vec<u8> = (0..1600)
        .map(|p| u8::from(lesion(p % 40, p / 40)))
        .collect();
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&indices).unwrap();
    writer.finish().unwrap();

    let names = ["eight.png", "sixteen.png", "palette.png"];
    let mut args = vec!["features", "--json", "--size", "40", "--mask"];
    args.extend(names);
    let report = json(folder.path(), &args);
    let rows = report["rows"].as_array().unwrap();
    for (row, name) in rows.iter().zip(names) {
        assert_eq!(row["image"], name);
        assert_eq!(row["area"], 320.0, "{name}");
        assert_eq!(row["margin"], rows[0]["margin"], "{name}");
    }
    assert_eq!(rows.len(), 3);
}

#[test]
fn a_setting_that_cannot_be_is_named() {
    let root = copy();
    let fails = |more: &[&str], parts: &[&str]| {
        let args = train_args("new", "1", more);
        fails(root.path(), &args, parts);
    };
    fails(
        &["--set", "optimizer.learning_rat=1"],
        &["optimizer.learning_rat: unknown key, did you mean optimizer.learning_rate?"],
    );
    fails(
        &["--set", "epochs=0"],
        &["epochs: expected 1 to 100000, found 0"],
    );
    fails(
        &["--set", "loss.kappa=many"],
        &["loss.kappa: ", "expected f64"],
    );
    fails(
        &["--set", "size=17"],
        &["size: expected a multiple of", "17"],
    );
    fails(&["--fold", "3"], &["fold: expected 0 to 2, found 3"]);
    fails(
        &["--set", "folds=9"],
        &["folds: expected at least 9", "found 7"],
    );
    fails(
        &["--set", "preset=efficientnet-b1"],
        &["model.widths: expected 5 widths (for efficientnet-b1), found 2"],
    );
    fails(
        &["--config", "nowhere.toml"],
        &["nowhere.toml: cannot be read"],
    );
    let config = root.path().join("my.toml");
    fs::write(&config, "[optimizer]\nlearning_rate = = 1\n").unwrap();
    fails(&["--config", "my.toml"], &["my.toml: expected TOML"]);
    fs::write(&config, "seed = 7\n").unwrap();
    for command in ["study", "search"] {
        let mut args = vec![command, "--source", "folder:data", "--out", "new"];
        let given = [&args[..], &["--target", "busi:x"]].concat();
        args = if command == "study" { given } else { args };
        let why = "found one that each has its own of; use --seed and --seeds";
        for (more, what) in [
            (["--config", "my.toml"], "my.toml: seed: "),
            (["--set", "seed=7"], "error: seed: "),
        ] {
            let args = [&args[..], &more].concat();
            self::fails(root.path(), &args, &[what, why]);
        }
    }
    fs::write(&config, "[augment]\np_flap = 0.5\n").unwrap();
    fails(
        &["--config", "my.toml"],
        &["augment.p_flap: unknown key, did you mean augment.p_flip?"],
    );
    for args in [
        &["gradcheck", "--device", "cuda"][..],
        &[
            "train", "--device", "cuda", "--data", "busi:x", "--out", "x",
        ],
    ] {
        let mut blind = echograd(root.path());
        blind.args(args).env("CUDA_VISIBLE_DEVICES", "");
        assert_fails(&blind.output().unwrap(), &["cuda: "]);
    }
}

#[test]
fn a_checkpoint_that_is_none_of_ours_is_refused() {
    let root = copy();
    let path = root.path().join("run/best.safetensors");
    let good = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut endless = good.clone();
    endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let json = text(&good[8..8 + header]);
    let huge = json.replacen(
        "\"shape\":[3,3,3,1]",
        "\"shape\":[9223372036854775807,2,2,2]",
        1,
    );
    assert_ne!(json, huge);
    let huge = [
        &(huge.len() as u64).to_le_bytes()[..],
        huge.as_bytes(),
        &good[8 + header..],
    ]
    .concat();
    let wide = train_args("wide", "1", &["--set", "model.widths=[4,6]"]);
    done(root.path(), &wide);
    let other = fs::read(root.path().join("wide/best.safetensors")).unwrap();
    for (bytes, part) in [
        (&b""[..], "expected a checkpoint, found a file of 0 bytes"),
        (&good[..good.len() / 2], "expected a checkpoint"),
        (&endless, "a header of 18446744073709551615 bytes"),
        (&huge, "expected a checkpoint of echograd, found: "),
        (&other, "another model's checkpoint: encoder.0.conv1.weight"),
    ] {
        fs::write(&path, bytes).unwrap();
        for args in [
            vec!["evaluate", "run", "--data", "folder:data", "--out", "out"],
            vec!["predict", "run", "data/images/00.png", "--out", "out"],
            train_args("new", "1", &["--init", "run/best.safetensors"]),
        ] {
            fails(root.path(), &args, &["run/best.safetensors: ", part]);
        }
    }
}

#[test]
fn packs_that_do_not_fit_or_are_forged_are_refused() {
    let root = copy();
    let at = root.path();
    done(
        at,
        &[
            "pack",
            "--data",
            "folder:data",
            "--size",
            "16",
            "--out",
            "p",
        ],
    );
    // As good as its source where the size agrees.
    let args = |size: &'static str| {
        vec![
            "train", "--data", "pack:p", "--preset", "tiny", "--size", size, "--epochs", "1",
            "--folds", "3", "--out", "new",
        ]
    };
    fails(
        at,
        &args("32"),
        &["size: expected 16, the size this pack was made with, found 32"],
    );
    done(at, &args("16"));

    let good = fs::read(at.join("p")).unwrap();
    let mut endless = good.clone();
    endless[12..16].fill(0xFF);
    for (bytes, part) in [
        (&good[..good.len() - 9], "truncated or damaged"),
        (&endless, "expected a header of 4294967295 bytes"),
    ] {
        fs::write(at.join("p"), bytes).unwrap();
        fails(
            at,
            &["features", "--data", "pack:p"],
            &["p: expected", part],
        );
    }
}

#[test]
fn results_that_cannot_be_written_are_an_error() {
    let root = copy();
    let at = root.path();
    fs::write(at.join("file"), "mine").unwrap();
    let data = ["--data", "folder:data"];
    // Permissions do not stop root; a file in the way stops everybody.
    for out in ["file/below", "/proc/below"] {
        let part = [out];
        fails(at, &train_args(out, "1", &[]), &part);
        let evaluate = ["evaluate", "run", data[0], data[1], "--out", out];
        fails(at, &evaluate, &part);
        let predict = ["predict", "run", "data/images/00.png", "--out", out];
        fails(at, &predict, &part);
        fails(at, &["features", data[0], data[1], "--csv", out], &part);
        fails(at, &["pack", data[0], data[1], "--out", out], &part);
        let phantom = ["phantom", "--site", "A", "--count", "1", "--out", out];
        fails(at, &phantom, &part);
        fails(at, &["demo", "--quick", "--out", out], &part);
    }
}

#[test]
fn what_is_there_already_stays() {
    let root = copy();
    let at = root.path();
    let rerun = train_args("run", "1", &[]);
    fails(at, &rerun, &["run: already holds a run", "--resume"]);
    fails(
        at,
        &train_args("data", "1", &[]),
        &["data: expected a new or empty folder"],
    );
    let phantom = ["phantom", "--site", "A", "--count", "1", "--out", "data"];
    fails(at, &phantom, &["data: expected a new or empty folder"]);
    fails(
        at,
        &["demo", "--out", "data"],
        &["data: expected a new or empty folder"],
    );
    fails(
        at,
        &["train", "--resume", "--out", "run", "--seed", "7"],
        &["seed: expected 0, as the run to resume has it, found 7"],
    );
    fails(
        at,
        &["train", "--resume", "--out", "data"],
        &["data: expected the folder of a run to resume"],
    );
}

#[test]
fn a_folder_that_is_no_run_and_images_of_one_name_are_refused() {
    let root = copy();
    let at = root.path();
    let part = ["data: expected the folder of a run, found no config.toml in it"];
    fails(
        at,
        &["evaluate", "data", "--data", "folder:data", "--out", "out"],
        &part,
    );
    fails(
        at,
        &["predict", "data", "data/images/00.png", "--out", "out"],
        &part,
    );
    let (image, mask) = ("data/images/00.png", "data/masks/00.png");
    fails(
        at,
        &["predict", "run", image, mask, "--out", "out"],
        &["FILE: expected files of different names", image, mask],
    );
    // BUSI keeps its true masks beside the images, under the name that a predicted one would have.
    fails(
        at,
        &["predict", "run", image, "--out", "data/images"],
        &["--out: expected a folder apart from the images", image],
    );
}

// ---- streams --------------------------------------------------------------------------------

#[test]
fn json_is_one_document_on_stdout() {
    let root = copy();
    let at = root.path();
    let features = json(at, &["features", "--data", "folder:data", "--json"]);
    assert_eq!(features["rows"].as_array().unwrap().len(), 16);
    assert_eq!(features["auc"].as_array().unwrap().len(), 4);
    let trained = json(at, &train_args("new", "1", &["--json"]));
    assert!(trained["segmentation"]["dice"]["mean"].is_number());
    let evaluate = ["evaluate", "new", "--data", "folder:data", "--out", "out"];
    let evaluated = json(at, &[&evaluate[..], &["--json"]].concat());
    let file: Value =
        serde_json::from_slice(&fs::read(at.join("out/metrics.json")).unwrap()).unwrap();
    assert_eq!(evaluated, file);
    let images = ["data/images/00.png", "data/images/15.png"];
    let predict = [
        "predict", "new", images[0], images[1], "--out", "o", "--json",
    ];
    let predicted = json(at, &predict);
    let file: Value =
        serde_json::from_slice(&fs::read(at.join("o/predictions.json")).unwrap()).unwrap();
    assert_eq!(predicted, file);
    let summary = json(at, &["summary", "new", "--json"]);
    assert_eq!(summary["size"], 16);
    let step = ["profile", "--step", "--preset", "tiny", "--batch", "2"];
    let profile = json(at, &[&step[..], &["--iters", "1", "--json"]].concat());
    let profile = &profile["profiles"][0];
    let layers = profile["layers"].as_array().unwrap();
    let sum = |part: &str, of: &str| -> u64 {
        let each = layers.iter().map(|layer| layer[part][of].as_u64().unwrap());
        each.sum()
    };
    for of in ["bytes", "flops"] {
        let all = profile[of].as_u64().unwrap();
        assert_eq!(sum("forward", of) + sum("backward", of), all, "{of}");
    }
    let layer = |name: &str| layers.iter().find(|layer| layer["layer"] == name).unwrap();
    let conv = layer("decoder.1.conv2");
    assert_eq!(conv["shape"], serde_json::json!([2, 32, 32, 16]));
    let [forward, backward] = ["forward", "backward"].map(|pass| &conv[pass]);
    // Either gradient has the products of the convolution.
    let products = 2 * 2 * 32 * 32 * 16 * 9 * 16;
    assert!(forward["flops"].as_u64().unwrap() >= products);
    assert_eq!(backward["flops"], 2 * products);
    for pass in [forward, backward] {
        let share = pass["roofline"].as_f64().unwrap();
        assert!(share > 0.0 && pass["seconds"].as_f64().unwrap() > 0.0);
    }
    let gradcheck = json(at, &["gradcheck", "--cases", "1", "--op", "add", "--json"]);
    assert_eq!(
        (&gradcheck["passed"], &gradcheck["failed"]),
        (&1.into(), &0.into())
    );
}

/// Parameters, their running statistics, and multiplications with addition in convolutions and linear layers:
/// those of the same networks in PyTorch (`benches/peers`).
#[test]
fn a_summary_counts_as_pytorch_does() {
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    let one = |preset: &str| {
        let args = ["summary", "--preset", preset, "--batch", "1", "--json"];
        let summary = json(at, &args);
        let keys = [
            "parameters",
            "trainable_parameters",
            "statistics",
            "multiply_adds",
        ];
        keys.map(|key| summary[key].as_u64().unwrap())
    };
    assert_eq!(one("unet"), [1_964_066, 1_964_066, 2944, 870_842_624]);
    let parameters = 8_372_726;
    let expected = [parameters, parameters, 61_472, 3_116_510_016];
    assert_eq!(one("efficientnet-b1"), expected);

    let summary = |depth: &[&str]| done(at, &[&["summary"], depth].concat());
    let (whole, top) = (summary(&[]), summary(&["--depth", "1"]));
    for text in [&whole, &top] {
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
        let total = text.lines().find(|line| line.starts_with("Total params"));
        assert!(total.unwrap().ends_with(" 1,964,066"), "{text}");
    }
    assert!(whole.contains("├─norm1: normalize"), "{whole}");
    assert!(!top.contains("norm1"), "{top}");
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_breaks_nothing() {
    let root = copy();
    let at = root.path();
    let gone = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        writer
    };
    for args in [
        &["summary", "--preset", "tiny"][..],
        &["summary", "--preset", "tiny", "--plan"],
        &["gradcheck", "--op", "add", "--cases", "1"],
        &["features", "--data", "folder:data"],
        &["features", "--data", "folder:data", "--json"],
        &["predict", "run", "data/images/00.png", "--out", "out"],
        &["evaluate", "run", "--data", "folder:data", "--out", "out"],
    ] {
        let output = echograd(at).args(args).stdout(gone()).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(
            !stderr.contains("panicked") && !stderr.contains("error"),
            "{stderr}"
        );
    }
    assert!(at.join("features.csv").is_file() && at.join("out/metrics.json").is_file());
    // Without anybody to watch it, training goes on.
    let args = train_args("new", "2", &[]);
    let output = echograd(at).args(args).stderr(gone()).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(at.join("new/last.safetensors").is_file());
    // An error then has no line, but its exit code.
    let args = ["features", "--data", "folder:nowhere"];
    let output = echograd(at).args(args).stderr(gone()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_what_was_there_stays() {
    let root = copy();
    let at = root.path();
    let full = || {
        fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let args = ["summary", "--preset", "tiny"];
    let output = echograd(at).args(args).stdout(full()).output().unwrap();
    assert_fails(&output, &["standard output: cannot be written"]);
    assert!(text(&output.stderr).contains("No space left on device"));
    fails(
        at,
        &["features", "--data", "folder:data", "--csv", "/dev/full"],
        &["/dev/full: cannot be written"],
    );

    // No file may grow beyond 12 KiB: checkpoints do not fit, small files do.
    let limited = |args: &[&str]| {
        let mut command = Command::new("sh");
        command.current_dir(at).env("RUST_BACKTRACE", "1");
        command.args(["-c", "ulimit -f 24; exec \"$0\" \"$@\""]);
        command.arg(cargo_bin!("echograd"));
        command.args(args).output().unwrap()
    };
    let output = limited(&train_args("new", "1", &[]));
    assert_fails(&output, &["new/last.safetensors: cannot be written"]);
    assert!(text(&output.stderr).contains("File too large"));
    for checkpoint in ["best.safetensors", "last.safetensors"] {
        assert!(!at.join("new").join(checkpoint).exists());
    }
    // Once there is room again, the run goes on.
    done(at, &["train", "--resume", "--out", "new"]);

    let before = snapshot(&at.join("new"));
    let output = limited(&[
        "pack",
        "--data",
        "folder:data",
        "--out",
        "new/last.safetensors",
    ]);
    assert_fails(&output, &["new/last.safetensors: cannot be written"]);
    assert!(before == snapshot(&at.join("new")));
}

#[cfg(unix)]
#[test]
fn results_go_where_a_name_points() {
    let root = copy();
    let at = root.path();
    let mask = "data/masks/00.png";
    let shown = done(at, &["features", "--mask", mask, "--csv", "/dev/stdout"]);
    assert!(shown.starts_with("image,label,area,"), "{shown}");
    std::os::unix::fs::symlink("kept.csv", at.join("link.csv")).unwrap();
    fs::write(at.join("kept.csv"), "old").unwrap();
    done(at, &["features", "--mask", mask, "--csv", "link.csv"]);
    assert!(at.join("link.csv").is_symlink());
    let kept = fs::read_to_string(at.join("kept.csv")).unwrap();
    assert!(kept.starts_with("image,label,area,"), "{kept}");
}

// ---- formats --------------------------------------------------------------------------------

fn header_and_rows(path: &Path) -> (String, Vec<csv::StringRecord>) {
    let mut reader = csv::Reader::from_path(path).unwrap();
    let header: Vec<String> = reader
        .headers()
        .unwrap()
        .iter()
        .map(str::to_owned)
        .collect();
    let rows = reader.records().collect::<Result<_, _>>().unwrap();
    (header.join(","), rows)
}

#[test]
fn features_writes_a_row_for_every_image() {
    let root = copy();
    let args = ["features", "--data", "folder:data", "--csv", "t.csv"];
    let shown = done(root.path(), &args);
    let names = ["irregularity", "orientation", "margin", "roundness"];
    for (line, name) in shown.lines().skip(1).zip(names) {
        assert!(line.starts_with(name), "{shown}");
    }
    let (header, rows) = header_and_rows(&root.path().join("t.csv"));
    let columns = "image,label,area,perimeter,irregularity,orientation,margin,roundness";
    assert_eq!(header, columns);
    assert_eq!(rows.len(), 16);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row[0], format!("{i:02}.png"));
        let label = match i {
            14.. => "normal",
            _ if i % 2 == 0 => "malignant",
            _ => "benign",
        };
        assert_eq!(&row[1], label);
        assert_eq!(row[2].parse::<f64>().unwrap() > 32.0, i < 14);
        for k in 4..8 {
            assert_eq!(row[k].parse::<f64>().is_ok(), i < 14, "{}", &row[k]);
            assert_eq!(row[k].is_empty(), i >= 14);
        }
    }
}

#[test]
fn features_of_one_patient_count_once() {
    let root = copy();
    let auc = || {
        json(
            root.path(),
            &["features", "--data", "folder:data", "--json"],
        )["auc"]
            .clone()
    };
    let alone = auc();
    let path = root.path().join("data/labels.csv");
    let text = fs::read_to_string(&path).unwrap();
    let mut labels = "image,label,patient,pixel_mm\n".to_owned();
    for (i, line) in text.lines().skip(1).enumerate() {
        let fields: Vec<&str> = line.split(',').collect();
        labels += &format!("{},{},p{},{}\n", fields[0], fields[1], i / 4, fields[2]);
    }
    fs::write(&path, labels).unwrap();
    let clustered = auc();
    for (alone, clustered) in alone
        .as_array()
        .unwrap()
        .iter()
        .zip(clustered.as_array().unwrap())
    {
        let figure = |of: &Value, name: &str| of["auc"][name].as_f64().unwrap();
        assert_eq!(alone["n"], clustered["n"]);
        assert_eq!(figure(alone, "value"), figure(clustered, "value"));
        assert_eq!(
            [alone, clustered].map(|of| figure(of, "clusters")),
            [7.0, 4.0]
        );
        assert_ne!(alone["auc"]["ci95"], clustered["auc"]["ci95"]);
    }
}

/// BUS-UCLM has images that were cropped after their masks were drawn.
#[test]
fn features_measures_a_mask_that_does_not_fit_its_image() {
    use image::{ImageBuffer, Rgb};
    let root = TempDir::new().unwrap();
    for sub in ["images", "masks"] {
        fs::create_dir(root.path().join(sub)).unwrap();
    }
    fs::write(
        root.path().join("INFO.csv"),
        "Image;Resolution;Label;Doppler;Marks;Combined\n\
         FINE_000.png;60x40;Benign;No;No;No\n\
         HESN_000.png;60x40;Malignant;No;No;No\n",
    )
    .unwrap();
    for (name, colour, width) in [("FINE_000", [0, 255, 0], 60), ("HESN_000", [255, 0, 0], 50)] {
        let inside = |x, y| (20..40).contains(&x) && (12..28).contains(&y);
        let mask = ImageBuffer::from_fn(60, 40, |x, y| {
            Rgb(if inside(x, y) { colour } else { [0u8; 3] })
        });
        mask.save(root.path().join(format!("masks/{name}.png")))
            .unwrap();
        let image = Gray::zeros(width, 40);
        write_png(&root.path().join(format!("images/{name}.png")), &image).unwrap();
    }
    let output = output(
        root.path(),
        &["features", "--data", "uclm:.", "--size", "60"],
    );
    assert_eq!(output.status.code(), Some(0));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("left out HESN_000.png"), "{stderr}");
    assert!(
        stderr.contains("measured all the same: HESN_000.png"),
        "{stderr}"
    );
    let (_, rows) = header_and_rows(&root.path().join("features.csv"));
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[1][0], &rows[1][1]), ("HESN_000.png", "malignant"));
    assert!(rows[1].iter().skip(2).eq(rows[0].iter().skip(2)));
}

#[test]
#[cfg_attr(not(echograd_data), ignore = "set ECHOGRAD_DATA")]
fn features_of_the_uclm_sample_leave_no_image_out() {
    let data = std::env::var("ECHOGRAD_DATA").unwrap();
    let spec = format!("uclm:{data}/BUS-UCLM-sample");
    let root = TempDir::new().unwrap();
    let report = json(root.path(), &["features", "--data", &spec, "--json"]);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 24);
    for row in rows {
        let lesion = row["label"] != "normal";
        assert_eq!(row["margin"].is_number(), lesion, "{row}");
    }
}

#[test]
fn a_run_and_its_results_have_the_promised_form() {
    let root = copy();
    let at = root.path();
    let files: Vec<String> = snapshot(&at.join("run"))
        .keys()
        .map(|path| path.strip_prefix(at).unwrap().display().to_string())
        .collect();
    assert_eq!(
        files,
        [
            "run/best.safetensors",
            "run/config.toml",
            "run/last.safetensors",
            "run/manifest.json",
            "run/metrics.csv",
            "run/validation/images.csv",
            "run/validation/metrics.json",
            "run/validation/per_image.csv",
        ]
    );
    let evaluate = ["evaluate", "run", "--data", "folder:data", "--out", "out"];
    done(at, &[&evaluate[..], &["--include-training"]].concat());
    let (header, rows) = header_and_rows(&at.join("out/per_image.csv"));
    assert_eq!(
        header,
        "dataset,image,patient,label,dice,iou,precision,recall,hd95_px,assd_px,hd95_mm,assd_mm,\
         p,phi,irregularity,orientation,margin,roundness"
    );
    assert_eq!(rows.len(), 16);
    assert_eq!(
        (&rows[0][0], &rows[0][1], &rows[0][2], &rows[0][3]),
        ("folder", "00.png", "", "malignant")
    );
    let metrics: Value =
        serde_json::from_slice(&fs::read(at.join("out/metrics.json")).unwrap()).unwrap();
    let metrics = &metrics["folder"];
    assert_eq!(metrics["n"], 16);
    for name in ["dice", "iou", "hd95_px"] {
        let metric = &metrics["segmentation"][name];
        assert!(metric["mean"].is_number(), "{name}: {metrics:#}");
        assert!(metric["median"].is_number(), "{name}");
        assert_eq!(metric["ci95"].as_array().unwrap().len(), 2, "{name}");
    }
    let classification = &metrics["classification"];
    let auc = &classification["auc"];
    assert!(auc["value"].is_number() && auc["ci95"].as_array().unwrap().len() == 2);
    for name in ["sensitivity", "specificity", "brier", "ece"] {
        assert!(classification[name].is_number(), "{name}");
    }
    assert_eq!(metrics["normals"]["n"], 2);
    assert!(metrics["normals"]["false_positive_rate"].is_number());

    // The images that it learned from are known by their bytes.
    let output = output(at, &evaluate);
    let known = "left out 9 of 16 images of folder:data: the run was trained on them";
    assert!(
        text(&output.stderr).contains(known),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(header_and_rows(&at.join("out/per_image.csv")).1.len(), 7);
}

#[test]
fn predictions_are_drawn_at_the_images_size() {
    let root = copy();
    let at = root.path();
    fs::rename(at.join("data/images/01.png"), at.join("a scan.v2.png")).unwrap();
    done(
        at,
        &[
            "predict",
            "run",
            "a scan.v2.png",
            "data/images/02.png",
            "--out",
            "out",
        ],
    );
    let names: Vec<String> = snapshot(&at.join("out"))
        .keys()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    let expected = [
        "02_mask.png",
        "02_overlay.png",
        "a scan.v2_mask.png",
        "a scan.v2_overlay.png",
        "predictions.json",
    ];
    assert_eq!(names, expected);
    for png in &names[..4] {
        let size = image::image_dimensions(at.join("out").join(png)).unwrap();
        assert_eq!(size, (40, 32), "{png}");
    }
    let mask = image::open(at.join("out/02_mask.png")).unwrap().to_luma8();
    assert!(mask.pixels().all(|p| p.0[0] == 0 || p.0[0] == 255));
    let predictions: Value =
        serde_json::from_slice(&fs::read(at.join("out/predictions.json")).unwrap()).unwrap();
    let [first, second] = &predictions.as_array().unwrap()[..] else {
        panic!("{predictions:#}")
    };
    assert_eq!(first["image"], "a scan.v2.png");
    assert_eq!(first["mask"], "a scan.v2_mask.png");
    assert_eq!(second["overlay"], "02_overlay.png");
    let area = mask.pixels().filter(|p| p.0[0] == 255).count();
    assert_eq!(second["area_px"], area);
    assert!((0.0..=1.0).contains(&second["p"].as_f64().unwrap()));
}

#[test]
fn runs_named_one_after_the_other_are_averaged() {
    let root = copy();
    let at = root.path();
    done(at, &train_args("other", "1", &["--fold", "1"]));
    let evaluate = [
        "evaluate",
        "run",
        "other",
        "--data",
        "folder:data",
        "--out",
        "out",
    ];
    done(at, &[&evaluate[..], &["--include-training"]].concat());
    let (header, rows) = header_and_rows(&at.join("out/per_image.csv"));
    assert!(
        header.ends_with(",roundness,p_sd,mask_agreement"),
        "{header}"
    );
    assert!(
        rows.iter()
            .all(|row| row[18].parse::<f64>().is_ok() && row[19].parse::<f64>().is_ok())
    );
    let output = output(at, &evaluate);
    let known = "images of folder:data: the runs were trained on them";
    assert!(
        text(&output.stderr).contains(known),
        "{}",
        text(&output.stderr)
    );
    let images = ["data/images/00.png", "data/images/01.png"];
    let predict = [
        "predict", "run", "other", images[0], images[1], "--out", "o",
    ];
    let shown = done(at, &predict);
    assert!(
        shown
            .lines()
            .next()
            .unwrap()
            .ends_with("phi    p sd   agree"),
        "{shown}"
    );
    assert_eq!(shown.lines().count(), 3);
    let file: Value =
        serde_json::from_slice(&fs::read(at.join("o/predictions.json")).unwrap()).unwrap();
    assert!(file[1]["p_sd"].is_number() && file[1]["mask_agreement"].is_number());
    fails(
        at,
        &["predict", "run", "other", "--out", "p"],
        &["FILE: expected image files, found none"],
    );
    fails(
        at,
        &["predict", "run", "data", images[0], "--out", "p"],
        &["data: expected the folder of a run"],
    );
}

#[test]
fn phantoms_lie_as_busi_does() {
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    let args = [
        "phantom", "--site", "B", "--count", "6", "--seed", "3", "--out", "p",
    ];
    let shown = done(at, &args);
    assert!(shown.starts_with("p: 6 images of site B ("), "{shown}");
    let files = snapshot(&at.join("p"));
    assert_eq!(files.len(), 12);
    for path in files.keys() {
        let label = path
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap();
        assert!(["benign", "malignant", "normal"].contains(&label));
        let name = path.file_name().unwrap().to_str().unwrap();
        let rest = name.strip_prefix(&format!("{label} (")).expect(name);
        let (number, rest) = rest.split_once(')').unwrap();
        assert!((1..=6).contains(&number.parse().unwrap()));
        assert!([".png", "_mask.png"].contains(&rest), "{name}");
    }
    let read = json(at, &["features", "--data", "busi:p", "--json"]);
    assert_eq!(read["rows"].as_array().unwrap().len(), 6);
}

#[test]
fn gradcheck_ends_with_its_counts() {
    let folder = TempDir::new().unwrap();
    let shown = done(
        folder.path(),
        &["gradcheck", "--cases", "2", "--op", "conv2d"],
    );
    assert_eq!(shown.lines().last(), Some("1 passed, 0 failed"));
    assert!(
        shown
            .lines()
            .any(|line| line.starts_with("conv2d ") && line.ends_with("ok"))
    );
}

// ---- profile --------------------------------------------------------------------------------

#[test]
fn profile_measures_each_step() {
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    let list = json(at, &["profile", "--list", "--json"]);
    let names: Vec<&str> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"mask_head") && names.contains(&"conv2d"));

    let shape = ["--shape", "2,8,8,4", "--iters", "2"];
    let args = [
        &["profile", "--op", "add", "--json", "--trace", "t.json"],
        &shape[..],
    ]
    .concat();
    let found = json(at, &args);
    let rows = found["profiles"][0]["rows"].as_array().unwrap();
    assert_eq!(rows[0]["operation"], "add");
    assert_eq!(rows[0]["shape"], serde_json::json!([2, 8, 8, 4]));
    // Two tensors read, one written, four bytes an element, one addition each.
    assert_eq!(rows[0]["bytes"], 3 * 4 * 512);
    assert_eq!(rows[0]["flops"], 512);
    assert!(rows[0]["seconds"].as_f64().unwrap() > 0.0);
    assert!(found["roof"]["copy_bytes_per_second"].as_f64().unwrap() > 1e6);
    let trace: Value = serde_json::from_slice(&fs::read(at.join("t.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let timed: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(timed.len(), rows.len());
    assert_eq!(timed[0]["name"], "add");
    assert!(timed.windows(2).all(|pair| {
        let time = |event: &Value, key: &str| event[key].as_f64().unwrap();
        time(pair[0], "ts") + time(pair[0], "dur") <= time(pair[1], "ts") + 1e-3
    }));

    let block = [
        "profile",
        "--features",
        "--shape",
        "1,32,32,1",
        "--iters",
        "1",
        "--json",
    ];
    let block = json(at, &block);
    let profiles = block["profiles"].as_array().unwrap();
    assert_eq!(profiles.len(), 2);
    assert!(profiles[0]["bytes"].as_u64() < profiles[1]["bytes"].as_u64());
    assert!(block["fusion"].as_f64().unwrap() > 0.0);
    let step = [
        "profile", "--step", "--preset", "tiny", "--batch", "2", "--size", "16", "--iters", "1",
    ];
    let step = done(at, &step);
    assert!(
        step.contains("conv2d_weight_gradient") && step.contains("slowest steps"),
        "{step}"
    );
    assert!(
        step.lines().all(|line| line.chars().count() <= 100),
        "{step}"
    );

    let fails = |args: &[&str], parts: &[&str]| {
        assert_fails(&output(at, &[&["profile"], args].concat()), parts);
    };
    fails(
        &["--op", "relu", "--dtype", "bf16"],
        &["--dtype: bf16 needs --device"],
    );
    fails(
        &["--op", "mask_head", "--shape", "1,8,8,3"],
        &["mask_head: "],
    );
    let nowhere = [
        "--op",
        "relu",
        "--shape",
        "1,2,2,1",
        "--iters",
        "1",
        "--trace",
        "no/t.json",
    ];
    fails(&nowhere, &["no/t.json: cannot be written"]);
    for shape in [
        "1,2,3",
        "0,1,1,1",
        "a,1,1,1",
        "1,1,1,1,1",
        "100000,100000,100000,1",
    ] {
        let args = ["profile", "--op", "relu", "--shape", shape];
        assert_eq!(output(at, &args).status.code(), Some(2), "{shape}");
    }
}

#[test]
fn profile_predicts_what_a_gpu_would_take() {
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    let small = ["--preset", "tiny", "--batch", "2", "--size", "16"];
    let predict = |gpu: &str, dtype: &str| {
        let args = [
            "profile",
            "--step",
            "--predict",
            gpu,
            "--dtype",
            dtype,
            "--json",
        ];
        json(at, &[&args[..], &small].concat())
    };
    let (h100, h200, wide) = (
        predict("h100", "bf16"),
        predict("h200", "bf16"),
        predict("h100", "f32"),
    );
    assert_eq!(
        (&h100["predicted"], &h100["device"]),
        (&"h100".into(), &Value::Null)
    );
    let bytes = |found: &Value| found["profiles"][0]["bytes"].as_u64().unwrap();
    assert_eq!(bytes(&h100), bytes(&h200));
    assert!(bytes(&h100) < bytes(&wide));
    for row in h100["profiles"][0]["rows"].as_array().unwrap() {
        // 3.35 TB/s, 989.4 TFLOP/s, and what a kernel takes at least.
        let number = |key: &str| row[key].as_f64().unwrap();
        let least = (number("bytes") / 3.35e12).max(number("flops") / 989.4e12);
        let launches = row["kernels"].as_array().unwrap().len();
        let expected = least.max(2e-6) + 2e-6 * (launches as f64 - 1.0);
        assert!((number("seconds") - expected).abs() < 1e-12, "{row}");
    }
    let rows = h100["profiles"][0]["rows"].as_array().unwrap();
    let launches: usize = rows
        .iter()
        .map(|r| r["kernels"].as_array().unwrap().len())
        .sum();
    assert_eq!(h100["profiles"][0]["launches"], launches);
    assert!(launches > rows.len());
    let text = done(
        at,
        &[&["profile", "--step", "--predict", "h200"], &small[..]].concat(),
    );
    assert!(
        text.starts_with("predicted for h200: copy 4800.0 GB/s"),
        "{text}"
    );
    let both = [
        "profile",
        "--op",
        "add",
        "--predict",
        "h100",
        "--device",
        "cuda",
    ];
    assert_eq!(output(at, &both).status.code(), Some(2));
}

// ---- signals --------------------------------------------------------------------------------

#[cfg(unix)]
mod signals {
    use super::*;

    fn start(folder: &Path, args: &[&str]) -> Child {
        let mut command = echograd(folder);
        command.args(args).stdout(Stdio::piped());
        command.stderr(Stdio::piped()).spawn().unwrap()
    }

    fn send(child: &Child, signal: &str) {
        let pid = child.id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(status.success());
    }

    /// Lets a command run until `ready`, signals it, and waits for its end.
    fn signalled(folder: &Path, args: &[&str], ready: impl Fn() -> bool, signal: &str) -> Output {
        let mut child = start(folder, args);
        while !ready() {
            let status = child.try_wait().unwrap();
            assert!(status.is_none(), "{args:?} ended too early: {status:?}");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        send(&child, signal);
        child.wait_with_output().unwrap()
    }

    /// As [`signalled`], with Ctrl-C once a line on stderr holds `text`.
    fn interrupted_after(folder: &Path, args: &[&str], text: &str) {
        let mut child = start(folder, args);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let found = lines.by_ref().any(|line| line.unwrap().contains(text));
        assert!(found, "{args:?} never said {text:?}");
        send(&child, "-INT");
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{args:?}: {rest:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(
            !rest.iter().any(|line| line.contains("panicked")),
            "{rest:?}"
        );
    }

    #[test]
    fn a_stopped_run_resumes_to_the_same_bytes() {
        let root = TempDir::new().unwrap();
        let at = root.path();
        write_data(&at.join("data"));
        let args =
            |out: &'static str| train_args(out, "60", &["--set", "early_stopping.patience=0"]);
        done(at, &args("whole"));
        let whole = snapshot(&at.join("whole"));
        for (out, signal, code) in [
            ("ctrl-c", "-INT", Some(130)),
            ("terminated", "-TERM", Some(130)),
            ("killed", "-KILL", None),
        ] {
            let begun = || at.join(out).join("last.safetensors").exists();
            let output = signalled(at, &args(out), begun, signal);
            let stderr = text(&output.stderr);
            assert_eq!(output.status.code(), code, "{out}: {stderr}");
            if code.is_some() {
                assert!(stderr.contains("--resume goes on from there"), "{stderr}");
                assert!(!stderr.contains("error"), "{stderr}");
            }
            assert!(!at.join(out).join("validation").exists());
            done(at, &["train", "--resume", "--out", out]);
            let resumed = snapshot(&at.join(out));
            for (path, bytes) in &whole {
                let name = path.strip_prefix(at.join("whole")).unwrap();
                // It holds the seconds that each epoch took.
                if name != Path::new("metrics.csv") {
                    assert!(
                        resumed[&at.join(out).join(name)] == *bytes,
                        "{out}: {name:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn ctrl_c_ends_every_command_without_half_a_result() {
        let root = copy();
        let at = root.path();
        // At this size, an image takes long.
        let data = ["--data", "folder:data", "--size", "4096"];
        let opened = "folder: 16 images";
        let features = ["features", data[0], data[1], data[2], data[3]];
        interrupted_after(at, &features, opened);
        let pack = [
            "pack", data[0], data[1], data[2], data[3], "--out", "packed",
        ];
        interrupted_after(at, &pack, opened);
        let phantom = ["phantom", "--site", "A", "--count", "9999", "--out", "p"];
        let begun = || at.join("p/benign/benign (1)_mask.png").exists();
        let output = signalled(at, &phantom, begun, "-INT");
        assert_eq!(output.status.code(), Some(130));
        assert!(fs::read_dir(at.join("p")).unwrap().next().is_none());
        interrupted_after(
            at,
            &["demo", "--quick", "--out", "d"],
            "site A: 30 phantoms",
        );
        assert!(!at.join("d/index.html").exists());
        assert!(!at.join("d/runs").exists());

        // Enough images that it is at work when the signal comes.
        let line = fs::read_to_string(at.join("data/labels.csv")).unwrap();
        let mut labels = line.clone();
        for i in 0..4000 {
            let image = at.join(format!("data/images/more{i}.png"));
            fs::hard_link(at.join("data/images/15.png"), image).unwrap();
            labels += &format!("more{i}.png,normal,\n");
        }
        fs::write(at.join("data/labels.csv"), labels).unwrap();
        let evaluate = ["evaluate", "run", "--data", "folder:data", "--out", "out"];
        interrupted_after(at, &evaluate, "left out 9 of");
        let names: Vec<_> = fs::read_dir(at)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(
            !names
                .iter()
                .any(|name| name == "features.csv" || name == "packed")
        );
        assert!(
            !names
                .iter()
                .any(|name| name.to_str().unwrap().starts_with(".tmp"))
        );
        assert!(fs::read_dir(at.join("out")).unwrap().next().is_none());
    }
}
