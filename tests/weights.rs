//! Weights that come from elsewhere and go there: export, `--init`, and the Python package safetensors.

use std::path::Path;
use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use echograd::device::cpu::Session;
use echograd::tape::{Kind, Tape, Var};
use echograd::train::checkpoint::{self, Checkpoint, Position};
use echograd::train::config::Preset;
use echograd::train::pretrained::{self, Naming};
use echograd::train::step::TrainingStep;
use echograd::train::{Config, model};
use tempfile::TempDir;

const STEM: [&str; 2] = [
    "encoder.features.0.0.weight",
    "encoder.features.0.1.running_mean",
];

fn config(settings: &[(&str, &str)]) -> Config {
    let small = [("size", "64"), ("batch", "2"), ("arm", "multitask")];
    let settings = small.iter().chain(settings);
    let settings: Vec<(String, String)> = settings
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    Config::preset(Preset::EfficientnetB1)
        .with(&settings)
        .unwrap()
}

/// A run's folder with the checkpoint of a network whose weights differ from their averages.
fn write_run(folder: &Path, config: &Config) -> (TrainingStep, Session<f32>) {
    let step = TrainingStep::record(config, false).unwrap();
    let mut session = step.session::<f32>(1, None).unwrap();
    for (k, var) in values(&step.tape).enumerate() {
        let each = session.values_mut(var).iter_mut().enumerate();
        each.for_each(|(i, x)| *x += 1e-3 * (((i * 7 + k) % 11) as f32));
    }
    let path = folder.join(model::BEST);
    let position = Position::default();
    checkpoint::write(&path, &step.tape, &session, config, &position).unwrap();
    std::fs::write(folder.join(model::CONFIG), config.to_toml()).unwrap();
    (step, session)
}

/// Parameters and states but for those of the optimizer.
fn values(tape: &Tape) -> impl Iterator<Item = Var> {
    let values = [Kind::Parameter, Kind::State]
        .into_iter()
        .flat_map(|kind| tape.of_kind(kind));
    values.filter(|&var| !tape.name(var).starts_with("adam."))
}

fn find(tape: &Tape, name: &str) -> Var {
    let mut kinds = [Kind::Parameter, Kind::State].into_iter();
    let found = kinds.find_map(|kind| tape.find(kind, name));
    found.unwrap_or_else(|| panic!("no {name}"))
}

/// Compares the encoder of a new network, started from the file, with the averages of the run.
fn comes_back(file: &Path, step: &TrainingStep, run: &Session<f32>, bits: bool) {
    let mut session = step.session::<f32>(2, None).unwrap();
    let bytes = std::fs::read(file).unwrap();
    pretrained::initialise(file, &bytes, &step.tape, &mut session).unwrap();
    for var in values(&step.tape) {
        let name = step.tape.name(var);
        if !name.starts_with("encoder.") {
            continue;
        }
        let (found, expected) = (
            session.read(var),
            run.read(find(&step.tape, &format!("ema.{name}"))),
        );
        if bits || !STEM.contains(&name) {
            assert_eq!(found, expected, "{name}");
        } else {
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
            assert!(found.iter().zip(expected).all(near), "{name}");
        }
    }
}

#[test]
fn an_exported_encoder_comes_back() {
    let folder = TempDir::new().unwrap();
    let run = folder.path();
    let (step, session) = write_run(run, &config(&[]));
    for naming in [Naming::Torchvision, Naming::Timm] {
        for channels in [1, 3] {
            let file = run.join("encoder.safetensors");
            let count = pretrained::export(run, naming, channels, &file).unwrap();
            let encoder = |&var: &Var| step.tape.name(var).starts_with("encoder.");
            assert_eq!(count, values(&step.tape).filter(encoder).count());
            comes_back(&file, &step, &session, channels == 1);
        }
    }
}

#[test]
fn the_command_says_what_it_wrote_and_refuses_what_has_no_name_elsewhere() {
    let folder = TempDir::new().unwrap();
    let run = folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let config = config(&[("optimizer.ema", "0")]);
    write_run(&run, &config);
    let export = |more: &[&str]| {
        let mut command = Command::new(cargo_bin!("echograd"));
        let command = command.current_dir(folder.path());
        let command = command.args(["export", "run", "--out", "encoder.safetensors"]);
        command.args(more).output().unwrap()
    };
    // The run's own files stay what they are, whatever its folder is called.
    let best = std::fs::read(run.join(model::BEST)).unwrap();
    for out in ["run/best.safetensors", "./run/../run/config.toml"] {
        let mut command = Command::new(cargo_bin!("echograd"));
        let command = command.current_dir(folder.path());
        let output = command
            .args(["export", "run", "--out", out])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let expected =
            format!("error: --out: expected a file that is none of the run's own, found {out}");
        assert!(text.starts_with(&expected), "{text}");
        assert_eq!(output.status.code(), Some(1));
    }
    assert!(std::fs::read(run.join(model::BEST)).unwrap() == best);
    let output = export(&["--format", "timm", "--json"]);
    assert!(output.status.success());
    let written: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(written["file"], "encoder.safetensors");
    assert_eq!(written["format"], "timm");
    assert_eq!(written["tensors"], 432);
    let bytes = std::fs::read(folder.path().join("encoder.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 432);
    let shape = |name: &str| file.tensor(name).unwrap().shape().to_vec();
    assert_eq!(shape("conv_stem.weight"), [32, 3, 3, 3]);
    assert_eq!(shape("blocks.1.0.conv_dw.weight"), [96, 1, 3, 3]);
    assert_eq!(shape("blocks.6.1.bn3.running_var"), [320]);

    let toml = config.to_toml().replace("efficientnet-b1", "unet");
    std::fs::write(run.join(model::CONFIG), toml).unwrap();
    let output = export(&[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = "error: run: expected a run of the model efficientnet-b1";
    assert!(text.starts_with(expected), "{text}");
    std::fs::remove_file(run.join(model::CONFIG)).unwrap();
    let text = String::from_utf8(export(&[]).stderr).unwrap();
    assert!(text.contains("found no config.toml"), "{text}");
    assert_eq!(export(&["--channels", "2"]).status.code(), Some(2));
}

/// A checkpoint of our own that a network starts from: what does not match is named.
#[test]
fn what_a_checkpoint_lacks_or_has_too_much_is_named() {
    let folder = TempDir::new().unwrap();
    let multitask = config(&[]);
    write_run(folder.path(), &multitask);
    let path = folder.path().join(model::BEST);
    let checkpoint = Checkpoint::read(&path).unwrap();
    let start = |settings: &[(&str, &str)]| {
        let step = TrainingStep::record(&config(settings), false).unwrap();
        let mut session = step.session::<f32>(2, None).unwrap();
        checkpoint.initialise(&path, &step.tape, &mut session)
    };
    let same = start(&[]).unwrap();
    assert!(
        same.missing.is_empty() && same.unused.is_empty(),
        "{same:?}"
    );
    let unmatched = start(&[("arm", "segmentation")]).unwrap();
    assert!(unmatched.missing.is_empty(), "{unmatched:?}");
    assert_eq!(unmatched.unused, ["malignancy.bias", "malignancy.weight"]);
    let error = start(&[("model.widths", "[16, 32, 64, 128, 200]")]).unwrap_err();
    let expected = "another model's checkpoint: decoder.4.conv1.weight: expected 200×3×3×432, found 256×3×3×432";
    assert!(error.to_string().contains(expected), "{error}");

    write_run(folder.path(), &config(&[("arm", "segmentation")]));
    let checkpoint = Checkpoint::read(&path).unwrap();
    let step = TrainingStep::record(&multitask, false).unwrap();
    let mut session = step.session::<f32>(2, None).unwrap();
    let unmatched = checkpoint.initialise(&path, &step.tape, &mut session);
    let unmatched = unmatched.unwrap();
    assert_eq!(unmatched.missing, ["malignancy.weight", "malignancy.bias"]);
    assert!(unmatched.unused.is_empty(), "{unmatched:?}");
}

/// Reads a file, says what it holds, and writes it again, metadata included.
const PYTHON: &str = "
import json, sys
import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
tensors = load_file(sys.argv[1])
with safe_open(sys.argv[1], framework='numpy') as file:
    metadata = file.metadata()
held = {name: [list(x.shape), str(x.dtype), float(x.astype(numpy.float64).sum())] for name, x in tensors.items()}
save_file(dict(reversed(list(tensors.items()))), sys.argv[2], metadata=metadata)
print(json.dumps(held))
";

fn python(from: &Path, to: &Path) -> serde_json::Value {
    let python = std::env::var_os("ECHOGRAD_PYTHON").expect("set when this was built");
    let mut command = Command::new(python);
    let output = command.args(["-c", PYTHON]).arg(from).arg(to).output();
    let output = output.expect("a program");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[cfg_attr(
    not(echograd_python),
    ignore = "set ECHOGRAD_PYTHON to a Python with safetensors and numpy"
)]
fn files_pass_through_the_python_package() {
    let folder = TempDir::new().unwrap();
    let run = folder.path();
    let (step, session) = write_run(run, &config(&[]));
    let [file, again] = ["file", "again"].map(|name| run.join(name).with_extension("safetensors"));

    pretrained::export(run, Naming::Torchvision, 1, &file).unwrap();
    let held = python(&file, &again);
    assert_eq!(held.as_object().unwrap().len(), 432);
    for (name, shape) in [
        ("features.0.0.weight", vec![32, 1, 3, 3]),
        ("features.2.0.block.1.0.weight", vec![96, 1, 3, 3]),
        ("features.2.0.block.0.0.weight", vec![96, 16, 1, 1]),
        ("features.7.1.block.3.1.running_var", vec![320]),
    ] {
        let values = session.read(find(&step.tape, &format!("ema.encoder.{name}")));
        let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
        assert_eq!(held[name][0], serde_json::json!(shape), "{name}");
        assert_eq!(held[name][1], "float32");
        let found = held[name][2].as_f64().unwrap();
        assert!((found - sum).abs() < 1e-9 * values.len() as f64, "{name}");
    }
    comes_back(&again, &step, &session, true);

    let best = run.join(model::BEST);
    python(&best, &again);
    let [ours, theirs] = [&best, &again].map(|path| Checkpoint::read(path).unwrap());
    assert!(ours == theirs);
}
