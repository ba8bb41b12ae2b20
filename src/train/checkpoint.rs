//! The state of a run in one safetensors file.
//!
//! Tensors carry the names of the tape: parameters as they are (`encoder.0.conv1.weight`), running
//! statistics beside them, the optimizer's moments under `adam.first.` and `adam.second.`, moving
//! averages under `ema.`. All are `f32`, of rank 4. The metadata's one key, `echograd`, holds TOML:
//! the position in the run and the whole configuration. (One key, since the order of several would
//! change from file to file.)

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata as Header, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::config::Config;
use crate::data::image::write_atomically;
use crate::device::Session;
use crate::error::{Error, Result};
use crate::tape::{Kind, Tape, Var};
use crate::tensor::{Shape, Tensor};

/// Key of the metadata.
const KEY: &str = "echograd";
/// Longest header that is read: far more than any network of this crate needs.
const LONGEST_HEADER: u64 = 16 << 20;

/// Where a run stands.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Epochs finished.
    pub epoch: u64,
    /// Steps of the epoch under way that are done.
    pub step: u64,
    /// Sums of the loss's terms over those steps, in the order of the columns of `metrics.csv`.
    pub sums: Vec<f64>,
    /// Best validation score so far.
    pub best: Option<f64>,
    /// The epoch that reached it, counted from 1.
    pub best_epoch: u64,
}

/// A checkpoint in memory.
#[derive(Clone, PartialEq, Debug)]
pub struct Checkpoint {
    /// Where the run stood.
    pub position: Position,
    /// What it was asked to do.
    pub config: Config,
    tensors: HashMap<String, Tensor<f32>>,
}

/// What a network and a checkpoint that it starts from do not have in common.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unmatched {
    /// Tensors that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that the network has no place for.
    pub unused: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    position: Position,
    config: Config,
}

/// Whether a file with this header was written by this program.
pub(super) fn is_own(header: &Header) -> bool {
    let metadata = header.metadata().as_ref();
    metadata.is_some_and(|metadata| metadata.contains_key(KEY))
}

/// Parameters and states: what a checkpoint holds.
pub(super) fn persistent(tape: &Tape) -> impl Iterator<Item = (Var, &str, Shape)> {
    [Kind::Parameter, Kind::State]
        .into_iter()
        .flat_map(|kind| tape.of_kind(kind))
        .map(|var| (var, tape.name(var), tape.shape(var)))
}

/// Writes the parameters and states of `session`, which replays `tape`, to `path`, which appears
/// complete or not at all.
///
/// # Errors
/// [`Error::File`] if it cannot be written; as [`Session::read`].
pub fn write(
    path: &Path,
    tape: &Tape,
    session: &dyn Session<f32>,
    config: &Config,
    position: &Position,
) -> Result<()> {
    let read = |(var, name, shape)| Ok((name, shape, session.read(var)?));
    let values: Vec<_> = persistent(tape).map(read).collect::<Result<_>>()?;
    let tensors = values
        .iter()
        .map(|(name, shape, elements)| (*name, *shape, &**elements));
    write_atomically(path, &encode(path, tensors, config, position)?)
}

/// The bytes of a checkpoint; `path` is for the message.
///
/// # Errors
/// [`Error::File`] if tensors cannot be written so.
pub(super) fn encode<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, Shape, &'a [f32])>,
    config: &Config,
    position: &Position,
) -> Result<Vec<u8>> {
    let metadata = Metadata {
        position: position.clone(),
        config: config.clone(),
    };
    let metadata = toml::to_string(&metadata).expect("metadata are a TOML table");
    let views = tensors.map(|(name, shape, elements)| {
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        let view = TensorView::new(Dtype::F32, extents(shape).to_vec(), bytes);
        (name, view.expect("as many bytes as elements"))
    });
    let bytes = safetensors::serialize(views, Some(HashMap::from([(KEY.to_owned(), metadata)])));
    bytes.map_err(|e| Error::caused(path, "cannot be written", e))
}

fn extents(shape: Shape) -> [usize; 4] {
    [shape.n, shape.h, shape.w, shape.c]
}

impl Checkpoint {
    /// Reads a checkpoint.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, is truncated, or was not written by this program.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(path, &read(path)?)
    }

    /// A checkpoint from the bytes of the file at `path`, which is for the message.
    pub(super) fn of(path: &Path, bytes: &[u8]) -> Result<Self> {
        let not_ours = |e: Box<dyn std::error::Error + Send + Sync>| {
            let problem = format!("expected a checkpoint of echograd, found: {e}");
            Error::caused(path, problem, e)
        };
        let file = SafeTensors::deserialize(bytes).map_err(|e| not_ours(e.into()))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| not_ours(e.into()))?;
        let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
        let text = text.ok_or_else(|| not_ours("no metadata of that name".into()))?;
        let Metadata { position, config } =
            toml::from_str(text).map_err(|e: toml::de::Error| {
                not_ours(e.message().lines().next().unwrap_or_default().into())
            })?;
        let mut tensors = HashMap::new();
        for (name, view) in file.tensors() {
            let &[n, h, w, c] = view.shape() else {
                let problem = format!("{name}: expected rank 4, found {:?}", view.shape());
                return Err(Error::file(path, problem));
            };
            if view.dtype() != Dtype::F32 {
                let problem = format!("{name}: expected F32, found {}", view.dtype());
                return Err(Error::file(path, problem));
            }
            let elements = bytemuck::pod_collect_to_vec(view.data());
            let tensor = Tensor::new(Shape::new(n, h, w, c), elements)?;
            tensors.insert(name, tensor);
        }
        Ok(Self {
            position,
            config,
            tensors,
        })
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor<f32>> {
        self.tensors.get(name)
    }

    /// Writes all parameters and states of `session`, which replays `tape` and whose values must be exactly those in the file.
    /// `path` is for the message.
    ///
    /// # Errors
    /// [`Error::File`] naming the first tensor that is missing, of another shape, or not known; as
    /// [`Session::write`].
    pub fn restore(&self, path: &Path, tape: &Tape, session: &mut dyn Session<f32>) -> Result<()> {
        let wanted: Vec<_> = persistent(tape).collect();
        let mut unknown: Vec<&String> = self
            .tensors
            .keys()
            .filter(|name| !wanted.iter().any(|(_, wanted, _)| wanted == name))
            .collect();
        unknown.sort();
        if let Some(name) = unknown.first() {
            let problem = format!("another model's checkpoint: it holds {name}, unknown here");
            return Err(Error::file(path, problem));
        }
        for (var, name, shape) in wanted {
            let tensor = self.expect(path, name, name, shape)?;
            session.write(var, tensor.data())?;
        }
        Ok(())
    }

    /// A tensor of the network that is evaluated, from the moving averages if the run kept them. `path` is for the
    /// message.
    ///
    /// # Errors
    /// [`Error::File`] naming it if it is missing or of another shape.
    pub fn weight(&self, path: &Path, name: &str, shape: Shape) -> Result<&[f32]> {
        let stored = format!("{}{name}", weights_prefix(&self.config));
        Ok(self.expect(path, &stored, name, shape)?.data())
    }

    /// Starts the weights and running statistics of `session` from those in the file that have the same
    /// name. `path` is for the message.
    ///
    /// # Errors
    /// [`Error::File`] naming the first tensor of another shape, or if there is none in common.
    pub fn initialise(
        &self,
        path: &Path,
        tape: &Tape,
        session: &mut dyn Session<f32>,
    ) -> Result<Unmatched> {
        let prefix = weights_prefix(&self.config);
        let own = |name: &str| {
            // The prior belongs to the masks of its fold.
            !["adam.", "ema.", "prior."]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        };
        let wanted: Vec<_> = persistent(tape).filter(|(_, name, _)| own(name)).collect();
        let mut missing = Vec::new();
        for (var, name, shape) in &wanted {
            let stored = format!("{prefix}{name}");
            if self.tensors.contains_key(&stored) {
                let tensor = self.expect(path, &stored, name, *shape)?;
                session.write(*var, tensor.data())?;
            } else {
                missing.push((*name).to_owned());
            }
        }
        if missing.len() == wanted.len() {
            let problem = "another model's checkpoint: no tensor in common";
            return Err(Error::file(path, problem));
        }
        let stored = self.tensors.keys().filter(|name| own(name));
        let mut unused: Vec<String> = stored
            .filter(|name| !wanted.iter().any(|(_, wanted, _)| wanted == name))
            .cloned()
            .collect();
        unused.sort();
        Ok(Unmatched { missing, unused })
    }

    fn expect(&self, path: &Path, stored: &str, name: &str, shape: Shape) -> Result<&Tensor<f32>> {
        match self.tensors.get(stored) {
            Some(tensor) if tensor.shape() == shape => Ok(tensor),
            found => {
                let found = found.map_or("none".to_owned(), |t| t.shape().to_string());
                let problem =
                    format!("another model's checkpoint: {name}: expected {shape}, found {found}");
                Err(Error::file(path, problem))
            }
        }
    }
}

/// Prefix of the weights that are evaluated.
pub fn weights_prefix(config: &Config) -> &'static str {
    if config.optimizer.ema > 0.0 {
        "ema."
    } else {
        ""
    }
}

/// The file's bytes, once its length and that of its header make sense together.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let unreadable = |e: std::io::Error| Error::caused(path, "cannot be read", e);
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    if length < 8 {
        let problem = format!("expected a checkpoint, found a file of {length} bytes");
        return Err(Error::file(path, problem));
    }
    let mut header = [0; 8];
    file.read_exact(&mut header).map_err(unreadable)?;
    let announced = u64::from_le_bytes(header);
    if announced > LONGEST_HEADER || announced > length - 8 {
        let problem = format!(
            "expected a checkpoint, found a header of {announced} bytes announced in a file of {length}"
        );
        return Err(Error::file(path, problem));
    }
    let mut bytes = header.to_vec();
    file.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}
