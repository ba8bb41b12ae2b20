//! Weights of EfficientNet-B1 that were trained elsewhere, in a safetensors file with the names of torchvision
//! (`features.1.0.block.0.0.weight`) or timm (`blocks.0.0.conv_dw.weight`).
//!
//! They were trained on colour images normalised by [`MEAN`] and [`SD`]. Here images have one channel with
//! intensities in [0, 1], which stands for three equal ones: the stem's kernels are divided by [`SD`] and summed,
//! and what [`MEAN`] contributes moves into the running mean behind them. Away from the image's border, whose
//! padding stands for other intensities, this gives the same features.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors};

use super::checkpoint;
use crate::device::Session;
use crate::error::{Error, Result};
use crate::tape::{Kind, Tape};
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

/// Writes the parameters and running statistics of the encoder on `tape` from the file at `path`. The file's
/// classifier, its head behind the last stage, and counters of batches are not needed.
///
/// # Errors
/// [`Error::File`] if the file cannot be read, or naming the first tensor that is missing, unknown, of another
/// shape or of another type than F32.
pub fn initialise(path: &Path, tape: &Tape, session: &mut dyn Session<f32>) -> Result<()> {
    let mut stored = read(path)?;
    let wanted: Vec<_> = [Kind::Parameter, Kind::State]
        .into_iter()
        .flat_map(|kind| tape.of_kind(kind))
        .filter_map(|var| Some((var, tape.name(var).strip_prefix(ENCODER)?, tape.shape(var))))
        .collect();
    let mut unknown: Vec<&String> = stored
        .keys()
        .filter(|name| !wanted.iter().any(|(_, wanted, _)| wanted == name))
        .collect();
    unknown.sort();
    if let Some(name) = unknown.first() {
        let problem = format!("expected weights of EfficientNet-B1, found {name}, unknown there");
        return Err(Error::file(path, problem));
    }
    sum_stem(&mut stored, &wanted.iter().map(|w| (w.1, w.2)).collect());
    for (var, name, shape) in wanted {
        let expected = if shape == Shape::per_channel(shape.c) {
            vec![shape.c]
        } else {
            vec![shape.n, shape.c, shape.h, shape.w]
        };
        let stored = match stored.get(name) {
            Some(stored) if stored.extents == expected => stored,
            found => {
                let found = found.map_or("none".to_owned(), |s| format!("{:?}", s.extents));
                let problem = format!("{name}: expected {expected:?}, found {found}");
                return Err(Error::file(path, problem));
            }
        };
        let element = |i: usize| {
            let (c, pixel) = (i % shape.c, i / shape.c);
            let (tap, n) = (pixel % shape.pixels(), pixel / shape.pixels());
            stored.elements[(n * shape.c + c) * shape.pixels() + tap]
        };
        let values: Vec<f32> = (0..shape.len()).map(element).collect();
        session.write(var, &values)?;
    }
    Ok(())
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
    if let Some(mean) = stored.get_mut(STEM_MEAN) {
        for (mean, shift) in mean.elements.iter_mut().zip(shifts) {
            *mean = (f64::from(*mean) + shift) as f32;
        }
    }
}

/// The tensors of a file that may be of use, by torchvision's names.
fn read(path: &Path) -> Result<HashMap<String, Stored>> {
    let bytes = checkpoint::read(path)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::caused(path, format!("expected a safetensors file, found: {e}"), e))?;
    let mut stored = HashMap::new();
    for (name, view) in file.tensors() {
        let name = torchvision(&name).unwrap_or(name);
        let unused = ["features.8.", "classifier."]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if unused || name.ends_with("num_batches_tracked") {
            continue;
        }
        if view.dtype() != Dtype::F32 {
            let problem = format!("{name}: expected F32, found {}", view.dtype());
            return Err(Error::file(path, problem));
        }
        let tensor = Stored {
            extents: view.shape().to_vec(),
            elements: bytemuck::pod_collect_to_vec(view.data()),
        };
        stored.insert(name, tensor);
    }
    Ok(stored)
}

/// Whether the file at `path` is a safetensors file that this program did not write.
///
/// # Errors
/// [`Error::File`] if it cannot be read.
pub fn is_foreign(path: &Path) -> Result<bool> {
    let bytes = checkpoint::read(path)?;
    let header = SafeTensors::read_metadata(&bytes);
    Ok(header.is_ok_and(|(_, header)| !checkpoint::is_own(&header)))
}

/// torchvision's name of a tensor with timm's name.
fn torchvision(name: &str) -> Option<String> {
    let (layer, kind) = name.rsplit_once('.')?;
    let layer = match layer {
        "conv_stem" => "features.0.0".to_owned(),
        "bn1" => "features.0.1".to_owned(),
        "conv_head" => "features.8.0".to_owned(),
        "bn2" => "features.8.1".to_owned(),
        _ => {
            let mut parts = layer.strip_prefix("blocks.")?.splitn(3, '.');
            let stage: usize = parts.next()?.parse().ok()?;
            let (block, inner) = (parts.next()?, parts.next()?);
            // The first stage's blocks expand nothing.
            let layers: &[(&str, &str)] = if stage == 0 {
                &[
                    ("conv_dw", "0.0"),
                    ("bn1", "0.1"),
                    ("se.conv_reduce", "1.fc1"),
                    ("se.conv_expand", "1.fc2"),
                    ("conv_pw", "2.0"),
                    ("bn2", "2.1"),
                ]
            } else {
                &[
                    ("conv_pw", "0.0"),
                    ("bn1", "0.1"),
                    ("conv_dw", "1.0"),
                    ("bn2", "1.1"),
                    ("se.conv_reduce", "2.fc1"),
                    ("se.conv_expand", "2.fc2"),
                    ("conv_pwl", "3.0"),
                    ("bn3", "3.1"),
                ]
            };
            let (_, inner) = layers.iter().find(|(timm, _)| *timm == inner)?;
            format!("features.{}.{block}.block.{inner}", stage + 1)
        }
    };
    Some(format!("{layer}.{kind}"))
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::device::cpu::Session;
    use crate::gradcheck::Sampler;
    use crate::nn::{EfficientNet, Mode, Network};
    use crate::tape::{Options, Plan, Var};

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
        initialise(path, tape, &mut session)?;
        Ok(session)
    }

    #[test]
    fn a_grey_image_gives_the_features_of_three_equal_channels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let (colour, images, map) = encoder("other", 3, 0);
        let tensors = draw(&colour);
        write(&path, &tensors);
        assert!(is_foreign(&path).unwrap());
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
        let (tape, ..) = encoder("encoder", 1, 1);
        let fails = |spoil: &dyn Fn(&mut Tensors), expected: &str| {
            let mut tensors = draw(&tape);
            spoil(&mut tensors);
            write(&path, &tensors);
            let text = load(&path, &tape).err().unwrap().to_string();
            assert!(text.contains(expected), "expected {expected:?} in {text}");
        };
        let named = |tensors: &Tensors, name: &str| {
            let found = tensors.iter().position(|t| t.0 == name);
            found.unwrap_or_else(|| panic!("no {name}"))
        };
        let name = "features.1.0.block.1.fc1.bias";
        fails(
            &|t| drop(t.remove(named(t, name))),
            "features.1.0.block.1.fc1.bias: expected [8], found none",
        );
        fails(
            &|t| {
                let i = named(t, name);
                (t[i].1, t[i].2) = (vec![2, 3], vec![0.0; 6]);
            },
            "features.1.0.block.1.fc1.bias: expected [8], found [2, 3]",
        );
        fails(
            &|t| t.push(("layer1.weight".into(), vec![1], vec![0.0])),
            "found layer1.weight, unknown there",
        );
    }
}
