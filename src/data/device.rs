//! Batches made on a GPU: the samples stay in its memory, and one kernel (`kernels/augment.cu`) augments those of
//! a batch straight into the inputs of a session.
//!
//! A batch is the same, bit for bit, as the one that [`super::loader`] makes of the same request, rounded where
//! the session stores an input as bf16.

use bytemuck::{Pod, Zeroable};

use super::augment::{self, AugmentConfig, Light, RADIUS, TONES};
use super::loader::{Request, Samples};
use crate::device::gpu::launch::{Full, Grid, Stored, kernel};
use crate::device::gpu::{Gpu, Memory, Session};
use crate::error::{Error, Result};
use crate::tape::Var;
use crate::tensor::Shape;

/// Threads of a block of `kernels/augment.cu`, and the side of its tile.
const THREADS: u32 = 256;
const TILE: usize = 32;

/// The samples in device memory, and what it takes to make batches of them.
#[derive(Debug)]
pub struct Augmenter {
    gpu: Gpu,
    config: Option<AugmentConfig>,
    seed: u64,
    size: usize,
    batch: usize,
    /// Of each sample.
    light: Vec<Light>,
    /// Image and mask of each sample, interleaved by pixel.
    samples: Memory,
    /// The spline's weights for each coordinate.
    basis: Memory,
    /// Written for each batch: changes, control points and tone curves of its images.
    drawn: Memory,
    /// What is written there.
    words: Vec<u64>,
}

/// A filter, as the kernel reads it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Gaussian {
    radius: i32,
    taps: [f32; 2 * RADIUS + 1],
}

impl Gaussian {
    fn new(gaussian: &augment::Gaussian) -> Self {
        Self {
            radius: gaussian.radius as i32,
            taps: gaussian.taps,
        }
    }
}

/// What one image undergoes, as the kernel reads it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Change {
    /// −1 for a black image.
    sample: i64,
    /// Of the noise.
    stream: u64,
    matrix: [[f32; 3]; 2],
    moves: i32,
    elastic: i32,
    retones: i32,
    /// Factor of the filtered noise.
    speckle: f32,
    gain: [f32; 2],
    blur: Gaussian,
    grain: Gaussian,
}

/// A coordinate's cell of the control grid, and the weights of the points about it, as the kernel reads them.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Basis {
    cell: i32,
    weights: [f32; 4],
}

/// A control point, and a tone curve.
type Point = [f32; 2];
type Tones = [f32; TONES + 2];

kernel! {
    struct AugmentKernel = "augment" {
        samples: u64,
        changes: u64,
        control: Full,
        tones: Full,
        basis: u64,
        images: Stored,
        masks: u64,
        masks_narrow: i32,
        size: i32,
        points: i32,
        tiles: u32,
        seed: u64,
    }
}

/// Words of `count` elements of type `T`, whose sizes are multiples of a word.
const fn words_of<T>(count: usize) -> usize {
    count * size_of::<T>() / size_of::<u64>()
}

impl Augmenter {
    /// Reads all samples into the memory of `gpu`, two bytes a pixel, for batches of `batch` images augmented under
    /// `seed`; `None` for images and masks as they are.
    ///
    /// # Errors
    /// [`Error::Argument`] if a size is 0 or the configuration is out of range, [`Error::Device`] if the
    /// memory does not suffice; else whatever reading a sample meets.
    pub fn new(
        gpu: &Gpu,
        samples: &dyn Samples,
        batch: usize,
        seed: u64,
        config: Option<AugmentConfig>,
    ) -> Result<Self> {
        let size = samples.size();
        for (name, n) in [("batch", batch), ("size", size)] {
            if n == 0 {
                return Err(Error::argument(name, "expected at least 1, found 0"));
            }
        }
        let cells = match &config {
            Some(config) => {
                config.validate()?;
                config.elastic_cells as usize
            }
            None => 1,
        };
        let pixels = size * size;
        let memory = gpu.memory(samples.len() * pixels * size_of::<[u8; 2]>())?;
        let (mut image, mut mask) = (vec![0; pixels], vec![0; pixels]);
        let mut both = vec![[0u8; 2]; pixels];
        let mut light = Vec::new();
        for index in 0..samples.len() {
            samples.read(index, &mut image, &mut mask)?;
            light.push(Light::of(&image));
            for (both, (&image, &mask)) in both.iter_mut().zip(image.iter().zip(&mask)) {
                *both = [image, mask];
            }
            let bytes = bytemuck::cast_slice(&both);
            memory.write(index * bytes.len(), bytes)?;
        }
        let basis: Vec<Basis> = augment::basis(cells, size)
            .into_iter()
            .map(|(cell, weights)| Basis {
                cell: cell as i32,
                weights,
            })
            .collect();
        let table = gpu.memory(size_of_val(&basis[..]))?;
        table.write(0, bytemuck::cast_slice(&basis))?;
        let each = words_of::<Change>(1)
            + words_of::<Point>((cells + 3) * (cells + 3))
            + words_of::<Tones>(1);
        Ok(Self {
            gpu: gpu.clone(),
            config,
            seed,
            size,
            batch,
            light,
            samples: memory,
            basis: table,
            drawn: gpu.memory(batch * each * size_of::<u64>())?,
            words: vec![0; batch * each],
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        [&self.samples, &self.basis, &self.drawn]
            .map(Memory::bytes)
            .iter()
            .sum()
    }

    /// Queues the making of the requested batch in two inputs of `session`, `images` and `masks` of N×S×S×1 with
    /// N the batch size; a short request leaves the remaining images black. Nothing waits for it: what is queued
    /// afterwards, such as the replay of a graph, finds the batch there.
    ///
    /// # Errors
    /// [`Error::Argument`] if the request holds too many samples or an index that does not exist, if the inputs
    /// are of other shapes, or if the session is another device's; [`Error::Device`] if the device refuses.
    ///
    /// # Panics
    /// If a value is computed by the tape.
    pub fn make(
        &mut self,
        session: &mut Session,
        [images, masks]: [Var; 2],
        request: &Request,
    ) -> Result<()> {
        let (n, size) = (self.batch, self.size);
        if request.indices.len() > n {
            let found = request.indices.len();
            let problem = format!("expected at most {n} samples, found {found}");
            return Err(Error::argument("batch", problem));
        }
        let count = self.light.len();
        if let Some(index) = request.indices.iter().find(|&&index| index >= count) {
            let problem = format!("expected a sample below {count}, found {index}");
            return Err(Error::argument("batch", problem));
        }
        if !session.gpu().is(&self.gpu) {
            let problem = "expected one on the device that holds the samples, found another's";
            return Err(Error::argument("session", problem));
        }
        let expected = Shape::new(n, size, size, 1);
        for (name, var) in [("images", images), ("masks", masks)] {
            let found = session.plan().values()[var.index()].shape;
            if found != expected {
                let problem = format!("expected an input of {expected}, found {found}");
                return Err(Error::argument(name, problem));
            }
        }

        let points = self.points();
        let changes_words = words_of::<Change>(n);
        let control_words = words_of::<Point>(n * points * points);
        let drawn = self.drawn.pointer();
        let after = |words: usize| drawn.after(words * size_of::<u64>());
        let arguments = AugmentKernel {
            samples: self.samples.pointer().address(),
            changes: drawn.address(),
            control: after(changes_words).into(),
            tones: after(changes_words + control_words).into(),
            basis: self.basis.pointer().address(),
            images: session.input(images).into(),
            masks: session.input(masks).address(),
            masks_narrow: session.input(masks).is_narrow().into(),
            size: as_int(size)?,
            points: as_int(points)?,
            tiles: size.div_ceil(TILE) as u32,
            seed: self.seed,
        };
        self.draw(request);
        // Behind the kernel of the batch before, which reads the same memory.
        self.drawn.write(0, bytemuck::cast_slice(&self.words))?;
        let blocks = n * size.div_ceil(TILE).pow(2);
        // SAFETY: the kernel reads the samples whose indices were checked, the tables written here, and
        // writes two inputs of the shape that was checked; all of it is memory of one device.
        unsafe { self.gpu.queue(Grid::new(blocks, THREADS), &arguments) }
    }

    /// Control points along each axis.
    fn points(&self) -> usize {
        self.config.map_or(1, |c| c.elastic_cells as usize) + 3
    }

    /// Fills `words` with what the images of a batch undergo.
    fn draw(&mut self, request: &Request) {
        let (n, points) = (self.batch, self.points().pow(2));
        let (changes, rest) = self.words.split_at_mut(words_of::<Change>(n));
        let (control, tones) = rest.split_at_mut(words_of::<Point>(n * points));
        let changes: &mut [Change] = bytemuck::cast_slice_mut(changes);
        let control: &mut [Point] = bytemuck::cast_slice_mut(control);
        let tones: &mut [Tones] = bytemuck::cast_slice_mut(tones);
        for (slot, to) in changes.iter_mut().enumerate() {
            *to = Change {
                sample: -1,
                ..Zeroable::zeroed()
            };
            let Some(&index) = request.indices.get(slot) else {
                continue;
            };
            to.sample = index as i64;
            let Some(config) = &self.config else {
                continue;
            };
            let key = augment::Augmenter::key(self.seed, request.epoch, index);
            let mut draws = key.draws();
            let change = augment::Change::draw(config, &mut draws);
            to.stream = augment::Augmenter::stream(request.epoch, index);
            to.matrix = change.matrix(self.size);
            to.moves = change.moves().into();
            to.elastic = (change.elastic > 0.0).into();
            to.retones = change.retones().into();
            to.gain = change.depth_gain;
            if change.elastic > 0.0 {
                let control = &mut control[slot * points..][..points];
                change.draw_control(self.size, &mut draws, control);
            }
            if change.retones() {
                change.tones(self.light[index], &mut tones[slot]);
            }
            if change.blur > 0.0 {
                to.blur = Gaussian::new(&augment::Gaussian::new(change.blur));
            }
            if change.speckle > 0.0 {
                let grain = augment::Gaussian::new(change.speckle_grain);
                to.speckle = change.speckle / grain.shrinkage();
                to.grain = Gaussian::new(&grain);
            }
        }
    }
}

/// A size as the kernel's `int`.
fn as_int(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| {
        let problem = format!("expected at most {}, found {n}", i32::MAX);
        Error::argument("size", problem)
    })
}
