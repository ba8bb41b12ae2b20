//! Weights of EfficientNet-B1 from and for elsewhere, in a safetensors file with the names of torchvision
//! (`features.1.0.block.0.0.weight`) or timm (`blocks.0.0.conv_dw.weight`).
//!
//! There they see colour images normalised by [`MEAN`] and [`SD`]. Here images have one channel with intensities
//! in [0, 1], which stands for three equal ones. On the way in the stem's kernels are divided by [`SD`] and
//! summed, and what [`MEAN`] contributes moves into the running mean behind them; on the way out each channel gets
//! a third of the kernel, and the rest is undone. Away from the image's border, whose padding stands for other
//! intensities, this gives the same features.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;

use super::checkpoint::{self, Checkpoint};
use super::config::{Config, ModelKind};
use super::model::{BEST, CONFIG, LAST};
use super::run::{MANIFEST, METRICS};
use super::step::Evaluation;
use crate::data::image::write_atomically;
use crate::device::Session;
use crate::error::{Error, Result};
use crate::tape::{Kind, Tape, Var};
use crate::tensor::Shape;

/// Mean of the three channels that such weights are trained with.
pub const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
/// Standard deviation of the three channels that such weights are trained with.
pub const SD: [f64; 3] = [0.229, 0.224, 0.225];

/// What the names of the encoder's values begin with on a tape.
const ENCODER: &str = "encoder.";
const STEM: &str = "features.0.0.weight";
const STEM_MEAN: &str = "features.0.1.running_mean";

/// A tensor as it stands in the file, in the order of PyTorch.
struct Stored {
    extents: Vec<usize>,
    elements: Vec<f32>,
}

/// Whose names tensors have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Naming {
    /// `features.1.0.block.0.0.weight`
    Torchvision,
    /// `blocks.0.0.conv_dw.weight`
    Timm,
}

impl Naming {
    /// The name of a tensor that torchvision calls `name`.
    pub fn of(self, name: &str) -> String {
        match self {
            Self::Torchvision => None,
            Self::Timm => timm(name),
        }
        .unwrap_or_else(|| name.to_owned())
    }
}

/// The encoder's parameters and running statistics, by torchvision's names.
fn encoder(tape: &Tape) -> Vec<(Var, &str, Shape)> {
    [Kind::Parameter, Kind::State]
        .into_iter()
        .flat_map(|kind| tape.of_kind(kind))
        .filter_map(|var| Some((var, tape.name(var).strip_prefix(ENCODER)?, tape.shape(var))))
        .collect()
}

/// Extents of a value in the order of PyTorch.
fn extents(shape: Shape) -> Vec<usize> {
    if shape == Shape::per_channel(shape.c) {
        vec![shape.c]
    } else {
        vec![shape.n, shape.c, shape.h, shape.w]
    }
}

/// Where PyTorch has element `i` of a value.
fn place(shape: Shape, i: usize) -> usize {
    let (c, pixel) = (i % shape.c, i / shape.c);
    let (tap, n) = (pixel % shape.pixels(), pixel / shape.pixels());
    (n * shape.c + c) * shape.pixels() + tap
}

/// Writes the parameters and running statistics of the encoder on `tape` from the bytes of a file, whose `path` is for
/// the message. The file's classifier, its head behind the last stage, and counters of batches are not needed.
///
/// # Errors
/// [`Error::File`] if the bytes are of no safetensors file, or naming the first tensor that is missing, unknown, of
/// another shape or of another type than F32.
pub fn initialise(
    path: &Path,
    bytes: &[u8],
    tape: &Tape,
    session: &mut dyn Session<f32>,
) -> Result<()> {
    let (naming, mut stored) = read(path, bytes)?;
    let wanted = encoder(tape);
    let mut unknown: Vec<&String> = stored
        .keys()
        .filter(|name| !wanted.iter().any(|(_, wanted, _)| wanted == name))
        .collect();
    unknown.sort();
    if let Some(name) = unknown.first() {
        let name = naming.of(name);
        let problem = format!("expected weights of EfficientNet-B1, found {name}, unknown there");
        return Err(Error::file(path, problem));
    }
    sum_stem(&mut stored, &wanted.iter().map(|w| (w.1, w.2)).collect());
    for (var, name, shape) in wanted {
        let expected = extents(shape);
        let stored = match stored.get(name) {
            Some(stored) if stored.extents == expected => stored,
            found => {
                let found = found.map_or("none".to_owned(), |s| format!("{:?}", s.extents));
                let name = naming.of(name);
                let problem = format!("{name}: expected {expected:?}, found {found}");
                return Err(Error::file(path, problem));
            }
        };
        let element = |i: usize| stored.elements[place(shape, i)];
        let values: Vec<f32> = (0..shape.len()).map(element).collect();
        if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
            let name = naming.of(name);
            let problem = format!("{name}: expected finite numbers, found {bad}");
            return Err(Error::file(path, problem));
        }
        session.write(var, &values)?;
    }
    Ok(())
}

/// Writes the encoder of the best network of the run in folder `run` to a safetensors file at `out`, with a stem
/// for `channels` channels: 1, as it was trained, or 3, for images as torchvision and timm expect them.
///
/// # Errors
/// [`Error::File`] if the folder does not hold a run of an EfficientNet-B1 with a checkpoint, or the file cannot
/// be written; [`Error::Argument`] for another number of channels, or an `out` that is a file of the run.
pub fn export(run: &Path, naming: Naming, channels: usize, out: &Path) -> Result<usize> {
    if ![1, 3].contains(&channels) {
        let problem = format!("expected 1 or 3, found {channels}");
        return Err(Error::argument("channels", problem));
    }
    let config = Config::of_run(run)?;
    // Beside the run's own files is a good place, in place of one of them would be the end of the run.
    let own = [BEST, LAST, CONFIG, MANIFEST, METRICS].map(Some);
    let named = own.contains(&out.file_name().and_then(|name| name.to_str()));
    let folder = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if named && folder.canonicalize().ok() == run.canonicalize().ok() {
        let problem = format!(
            "expected a file that is none of the run's own, found {}",
            out.display()
        );
        return Err(Error::argument("--out", problem));
    }
    if config.model.kind != ModelKind::EfficientnetB1 {
        let problem = "expected a run of the model efficientnet-b1, found one of a plain U-Net, which \
            torchvision and timm do not have";
        return Err(Error::file(run, problem));
    }
    let path = run.join(BEST);
    let checkpoint = Checkpoint::read(&path)?;
    let evaluation = Evaluation::record(&config)?;
    let mut tensors = HashMap::new();
    for (_, name, shape) in encoder(&evaluation.tape) {
        let values = checkpoint.weight(&path, &format!("{ENCODER}{name}"), shape)?;
        let mut elements = vec![0.0; values.len()];
        for (i, &value) in values.iter().enumerate() {
            elements[place(shape, i)] = value;
        }
        let extents = extents(shape);
        tensors.insert(name.to_owned(), Stored { extents, elements });
    }
    if channels == 3 {
        spread_stem(&mut tensors);
    }
    let views = tensors.iter().map(|(name, stored)| {
        let bytes: &[u8] = bytemuck::cast_slice(&stored.elements);
        let view = TensorView::new(Dtype::F32, stored.extents.clone(), bytes);
        (naming.of(name), view.expect("as many bytes as elements"))
    });
    let bytes = safetensors::serialize(views, None)
        .map_err(|e| Error::caused(out, "cannot be written", e))?;
    write_atomically(out, &bytes)?;
    Ok(tensors.len())
}

/// Makes a stem for colour one for grey, if that is what is wanted; see the module's documentation.
fn sum_stem(stored: &mut HashMap<String, Stored>, wanted: &HashMap<&str, Shape>) {
    let Some(&shape) = wanted.get(STEM) else {
        return;
    };
    let colour = vec![shape.n, 3, shape.h, shape.w];
    if shape.c != 1 || stored.get(STEM).is_none_or(|stem| stem.extents != colour) {
        return;
    }
    let stem = stored.get_mut(STEM).expect("seen above");
    let kernels = std::mem::take(&mut stem.elements);
    let taps = shape.pixels();
    let mut shifts = Vec::with_capacity(shape.n);
    for kernel in kernels.chunks_exact(3 * taps) {
        let weight = |c: usize, tap: usize| f64::from(kernel[c * taps + tap]) / SD[c];
        let of_tap = |tap: usize| (0..3).map(|c| weight(c, tap)).sum::<f64>();
        stem.elements
            .extend((0..taps).map(|tap| of_tap(tap) as f32));
        let of_channel = |c: usize| (0..taps).map(|tap| weight(c, tap) * MEAN[c]).sum::<f64>();
        shifts.push((0..3).map(of_channel).sum::<f64>());
    }
    stem.extents[1] = 1;
    move_mean(stored, &shifts);
}

/// Makes a stem for grey one for colour that [`sum_stem`] makes the same again, but for rounding.
fn spread_stem(stored: &mut HashMap<String, Stored>) {
    let Some(stem) = stored.get_mut(STEM) else {
        return;
    };
    let kernels = std::mem::take(&mut stem.elements);
    let taps = stem.extents[2] * stem.extents[3];
    let mut shifts = Vec::with_capacity(stem.extents[0]);
    for kernel in kernels.chunks_exact(taps) {
        for sd in SD {
            let third = |&w: &f32| (f64::from(w) * sd / 3.0) as f32;
            stem.elements.extend(kernel.iter().map(third));
        }
        let sum: f64 = kernel.iter().map(|&w| f64::from(w)).sum();
        shifts.push(-sum * MEAN.iter().sum::<f64>() / 3.0);
    }
    stem.extents[1] = 3;
    move_mean(stored, &shifts);
}

fn move_mean(stored: &mut HashMap<String, Stored>, shifts: &[f64]) {
    if let Some(mean) = stored.get_mut(STEM_MEAN) {
        for (mean, shift) in mean.elements.iter_mut().zip(shifts) {
            *mean = (f64::from(*mean) + shift) as f32;
        }
    }
}

/// The tensors of a file that may be of use, by torchvision's names, and whose names they had.
fn read(path: &Path, bytes: &[u8]) -> Result<(Naming, HashMap<String, Stored>)> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| Error::caused(path, format!("expected a safetensors file, found: {e}"), e))?;
    let mut stored = HashMap::new();
    let mut naming = Naming::Torchvision;
    for (found, view) in file.tensors() {
        let name = match torchvision(&found) {
            Some(name) => {
                naming = Naming::Timm;
                name
            }
            None => found.clone(),
        };
        let unused = ["features.8.", "classifier."]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if unused || name.ends_with("num_batches_tracked") {
            continue;
        }
        if view.dtype() != Dtype::F32 {
            let problem = format!("{found}: expected F32, found {}", view.dtype());
            return Err(Error::file(path, problem));
        }
        let tensor = Stored {
            extents: view.shape().to_vec(),
            elements: bytemuck::pod_collect_to_vec(view.data()),
        };
        stored.insert(name, tensor);
    }
    Ok((naming, stored))
}

/// Whether these are the bytes of a safetensors file that this program did not write.
pub fn is_foreign(bytes: &[u8]) -> bool {
    let header = SafeTensors::read_metadata(bytes);
    header.is_ok_and(|(_, header)| !checkpoint::is_own(&header))
}

/// Layers outside of the stages, as timm and as torchvision call them.
const LAYERS: [(&str, &str); 4] = [
    ("conv_stem", "features.0.0"),
    ("bn1", "features.0.1"),
    ("conv_head", "features.8.0"),
    ("bn2", "features.8.1"),
];
/// Layers of the first stage's blocks, which expand nothing.
const FIRST_BLOCKS: [(&str, &str); 6] = [
    ("conv_dw", "0.0"),
    ("bn1", "0.1"),
    ("se.conv_reduce", "1.fc1"),
    ("se.conv_expand", "1.fc2"),
    ("conv_pw", "2.0"),
    ("bn2", "2.1"),
];
/// Layers of the other stages' blocks.
const BLOCKS: [(&str, &str); 8] = [
    ("conv_pw", "0.0"),
    ("bn1", "0.1"),
    ("conv_dw", "1.0"),
    ("bn2", "1.1"),
    ("se.conv_reduce", "2.fc1"),
    ("se.conv_expand", "2.fc2"),
    ("conv_pwl", "3.0"),
    ("bn3", "3.1"),
];

fn layers(stage: usize) -> &'static [(&'static str, &'static str)] {
    if stage == 0 { &FIRST_BLOCKS } else { &BLOCKS }
}

/// torchvision's name of a tensor with timm's name.
fn torchvision(name: &str) -> Option<String> {
    let (layer, kind) = name.rsplit_once('.')?;
    if let Some((_, layer)) = LAYERS.iter().find(|(timm, _)| *timm == layer) {
        return Some(format!("{layer}.{kind}"));
    }
    let mut parts = layer.strip_prefix("blocks.")?.splitn(3, '.');
    let stage: usize = parts.next()?.parse().ok()?;
    let (block, inner) = (parts.next()?, parts.next()?);
    let (_, inner) = layers(stage).iter().find(|(timm, _)| *timm == inner)?;
    Some(format!(
        "features.{}.{block}.block.{inner}.{kind}",
        stage + 1
    ))
}

/// timm's name of a tensor with torchvision's name.
fn timm(name: &str) -> Option<String> {
    let (layer, kind) = name.rsplit_once('.')?;
    if let Some((layer, _)) = LAYERS.iter().find(|(_, torchvision)| *torchvision == layer) {
        return Some(format!("{layer}.{kind}"));
    }
    let mut parts = layer.strip_prefix("features.")?.splitn(4, '.');
    let stage = parts.next()?.parse::<usize>().ok()?.checked_sub(1)?;
    let (block, inner) = (parts.next()?, parts.nth(1)?);
    let (inner, _) = layers(stage)
        .iter()
        .find(|(_, torchvision)| *torchvision == inner)?;
    Some(format!("blocks.{stage}.{block}.{inner}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Session;
    use crate::gradcheck::Sampler;
    use crate::nn::{EfficientNet, Mode, Network};
    use crate::tape::{Options, Plan};

    /// An encoder on images of `channels` channels under `prefix`, its last map kept.
    fn encoder(prefix: &str, channels: usize, stages: usize) -> (Tape, Var, Var) {
        let mut tape = Tape::new();
        let images = tape.input("images", Shape::new(1, 32, 32, channels));
        let mut model = EfficientNet::b1();
        model.stages.truncate(stages);
        let mut network = Network::new(&mut tape, Mode::Evaluate);
        let maps = network.scope(prefix, |n| model.record(n, images)).unwrap();
        let last = maps[maps.len() - 1];
        tape.keep(last);
        (tape, images, last)
    }

    fn session(tape: &Tape) -> Session<f32> {
        Session::new(Plan::new(tape, Options::default()).unwrap()).unwrap()
    }

    type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

    /// Random weights for the tape's values in the order of PyTorch.
    fn draw(tape: &Tape) -> Tensors {
        let mut s = Sampler::new(4);
        [Kind::Parameter, Kind::State]
            .into_iter()
            .flat_map(|kind| tape.of_kind(kind))
            .map(|var| {
                let (name, shape) = (tape.name(var), tape.shape(var));
                let extents = if shape == Shape::per_channel(shape.c) {
                    vec![shape.c]
                } else {
                    vec![shape.n, shape.c, shape.h, shape.w]
                };
                let low = if name.ends_with("running_var") {
                    0.5
                } else {
                    -0.5
                };
                let values = s.values(shape.len(), low, low + 1.0);
                let name = name.split_once('.').unwrap().1.to_owned();
                (name, extents, values.iter().map(|&v| v as f32).collect())
            })
            .collect()
    }

    fn write(path: &Path, tensors: &Tensors) {
        let views = tensors.iter().map(|(name, extents, values)| {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            (
                name,
                TensorView::new(Dtype::F32, extents.clone(), bytes).unwrap(),
            )
        });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn load(path: &Path, tape: &Tape) -> Result<Session<f32>> {
        let mut session = session(tape);
        initialise(path, &std::fs::read(path).unwrap(), tape, &mut session)?;
        Ok(session)
    }

    #[test]
    fn a_grey_image_gives_the_features_of_three_equal_channels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let (colour, images, map) = encoder("other", 3, 0);
        let tensors = draw(&colour);
        write(&path, &tensors);
        assert!(is_foreign(&std::fs::read(&path).unwrap()));
        let mut reference = session(&colour);
        for (name, extents, values) in &tensors {
            let var = [Kind::Parameter, Kind::State]
                .into_iter()
                .find_map(|kind| colour.find(kind, &format!("other.{name}")))
                .unwrap();
            let mut values = values.clone();
            if let [n, c, h, w] = extents[..] {
                for (i, value) in values.iter_mut().enumerate() {
                    let (channel, tap, o) = (i % c, i / c % (h * w), i / (c * h * w));
                    let index = (o * c + channel) * h * w + tap;
                    *value = tensors.iter().find(|t| t.0 == *name).unwrap().2[index];
                }
                assert_eq!(n * c * h * w, values.len());
            }
            reference.write(var, &values);
        }
        let grey = Sampler::new(9).values(32 * 32, 0.0, 1.0);
        let normalised = grey
            .iter()
            .flat_map(|x| (0..3).map(move |c| ((x - MEAN[c]) / SD[c]) as f32));
        reference.write(images, &normalised.collect::<Vec<f32>>());
        reference.run();

        let (tape, images, grey_map) = encoder("encoder", 1, 0);
        let mut session = load(&path, &tape).unwrap();
        session.write(
            images,
            &grey.iter().map(|&x| x as f32).collect::<Vec<f32>>(),
        );
        session.run();
        let expected = reference.read(map).chunks_exact(32);
        let pairs = session.read(grey_map).chunks_exact(32).zip(expected);
        for (pixel, (found, expected)) in pairs.enumerate() {
            // The first row and column reach over the border.
            if pixel >= 16 && pixel % 16 > 0 {
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn both_namings_give_the_same_weights() {
        let folder = tempfile::tempdir().unwrap();
        let (tape, ..) = encoder("encoder", 1, 2);
        let mut tensors = draw(&tape);
        let [ours, theirs] = ["torchvision", "timm"].map(|name| folder.path().join(name));
        tensors.push(("classifier.1.weight".into(), vec![2], vec![0.0; 2]));
        tensors.push(("features.8.0.weight".into(), vec![1], vec![0.0]));
        tensors.push(("features.0.1.num_batches_tracked".into(), vec![], vec![0.0]));
        write(&ours, &tensors);
        let timm = |name: &str| {
            let (layer, kind) = name.rsplit_once('.').unwrap();
            let layer = match layer {
                "features.0.0" => "conv_stem".to_owned(),
                "features.0.1" => "bn1".to_owned(),
                "features.8.0" => "conv_head".to_owned(),
                "classifier.1" => "classifier".to_owned(),
                _ => {
                    let parts: Vec<&str> = layer.splitn(5, '.').collect();
                    let inner = match (parts[1], parts[4]) {
                        ("1", "0.0") | ("2", "1.0") => "conv_dw",
                        ("1", "0.1") | ("2", "0.1") => "bn1",
                        ("1", "1.fc1") | ("2", "2.fc1") => "se.conv_reduce",
                        ("1", "1.fc2") | ("2", "2.fc2") => "se.conv_expand",
                        ("1", "2.0") | ("2", "0.0") => "conv_pw",
                        ("1", "2.1") | ("2", "1.1") => "bn2",
                        ("2", "3.0") => "conv_pwl",
                        ("2", "3.1") => "bn3",
                        other => panic!("{other:?}"),
                    };
                    let stage: usize = parts[1].parse().unwrap();
                    format!("blocks.{}.{}.{inner}", stage - 1, parts[2])
                }
            };
            format!("{layer}.{kind}")
        };
        for tensor in &mut tensors {
            tensor.0 = timm(&tensor.0);
        }
        write(&theirs, &tensors);
        let [ours, theirs] = [ours, theirs].map(|path| load(&path, &tape).unwrap());
        for kind in [Kind::Parameter, Kind::State] {
            for var in tape.of_kind(kind) {
                assert_eq!(ours.read(var), theirs.read(var), "{}", tape.name(var));
                assert!(ours.read(var).iter().any(|&x| x != 0.0));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let (tape, ..) = encoder("encoder", 1, 2);
        let fails = |naming: Naming, spoil: &dyn Fn(&mut Tensors), expected: &str| {
            let mut tensors = draw(&tape);
            spoil(&mut tensors);
            tensors.iter_mut().for_each(|t| t.0 = naming.of(&t.0));
            write(&path, &tensors);
            let text = load(&path, &tape).err().unwrap().to_string();
            assert!(text.contains(expected), "expected {expected:?} in {text}");
        };
        let named = |tensors: &Tensors, name: &str| {
            let found = tensors.iter().position(|t| t.0 == name);
            found.unwrap_or_else(|| panic!("no {name}"))
        };
        let name = "features.2.0.block.2.fc1.bias";
        for (naming, name_there) in [
            (Naming::Torchvision, name),
            (Naming::Timm, "blocks.1.0.se.conv_reduce.bias"),
        ] {
            fails(
                naming,
                &|t| drop(t.remove(named(t, name))),
                &format!(": {name_there}: expected [4], found none"),
            );
            fails(
                naming,
                &|t| {
                    let i = named(t, name);
                    (t[i].1, t[i].2) = (vec![2, 3], vec![0.0; 6]);
                },
                &format!(": {name_there}: expected [4], found [2, 3]"),
            );
            fails(
                naming,
                &|t| t.push(("layer1.weight".into(), vec![1], vec![0.0])),
                "found layer1.weight, unknown there",
            );
            // A block more than the network has.
            let extra = "features.2.7.block.0.1.bias";
            fails(
                naming,
                &|t| t.push((extra.into(), vec![1], vec![0.0])),
                &format!("found {}, unknown there", naming.of(extra)),
            );
        }
    }

    #[test]
    fn a_stem_for_colour_is_the_one_for_grey_again() {
        let mut s = Sampler::new(7);
        let kernels: Vec<f32> = s
            .values(4 * 9, -0.5, 0.5)
            .iter()
            .map(|&x| x as f32)
            .collect();
        let means = vec![0.5f32, -0.25, 0.0, 1.0];
        let stored = |extents: Vec<usize>, elements: &[f32]| Stored {
            extents,
            elements: elements.to_vec(),
        };
        let mut tensors = HashMap::from([
            (STEM.to_owned(), stored(vec![4, 1, 3, 3], &kernels)),
            (STEM_MEAN.to_owned(), stored(vec![4], &means)),
        ]);
        spread_stem(&mut tensors);
        assert_eq!(tensors[STEM].extents, [4, 3, 3, 3]);
        assert!(tensors[STEM_MEAN].elements != means);
        sum_stem(
            &mut tensors,
            &HashMap::from([(STEM, Shape::new(4, 3, 3, 1))]),
        );
        assert_eq!(tensors[STEM].extents, [4, 1, 3, 3]);
        for (name, expected) in [(STEM, kernels), (STEM_MEAN, means)] {
            for (found, expected) in tensors[name].elements.iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{name}: {found} for {expected}"
                );
            }
        }
    }

    #[test]
    fn names_there_and_back() {
        let (tape, ..) = encoder("encoder", 1, 7);
        for (_, name, _) in super::encoder(&tape) {
            let there = timm(name).unwrap_or_else(|| panic!("{name} has no name"));
            assert_ne!(there, name);
            assert_eq!(torchvision(&there).unwrap(), name);
            assert_eq!(torchvision(name), None);
        }
    }
}
