//! Batches made ahead of the training step on background threads.
//!
//! Workers take requests in turn, read and augment the samples, and hand batches over in the order
//! of the requests. What a batch holds depends on the seed, the epoch and the sample indices alone, so
//! neither the number of workers nor their speed shows in the results.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::data::augment::{AugmentConfig, Augmenter, unit};
use crate::device::philox::Philox;
use crate::error::{Error, Result};
use crate::tensor::{Shape, Tensor};

/// What a loader reads from: letterboxed samples, addressed by index.
pub trait Samples: Send + Sync {
    /// Number of samples.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Side of the square images, in pixels.
    fn size(&self) -> usize;
    /// Writes the image and the soft mask of sample `index`, each row-major `size`×`size`.
    ///
    /// # Errors
    /// Whatever reading meets; the loader passes it on and stops.
    fn read(&self, index: usize, image: &mut [u8], mask: &mut [u8]) -> Result<Target>;
}

/// What the model should say of a sample, and how much that counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// 1 for malignant, 0 for benign or normal.
    pub label: f32,
    /// Weight of the sample in the loss.
    pub weight: f32,
}

/// Samples held in memory: 2·size² bytes each.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    size: usize,
    pixels: Vec<u8>,
    targets: Vec<Target>,
}

impl Pool {
    /// An empty pool for samples of `size`×`size`.
    pub fn new(size: usize) -> Self {
        Self {
            size,
            ..Self::default()
        }
    }

    /// What the model should say of sample `index`, which is there.
    pub fn target(&self, index: usize) -> Target {
        self.targets[index]
    }

    /// Appends a sample: row-major `size`×`size` image and soft mask.
    ///
    /// # Errors
    /// [`Error::Argument`] if a slice has another length.
    pub fn push(&mut self, image: &[u8], mask: &[u8], target: Target) -> Result<()> {
        let pixels = self.size * self.size;
        for (name, slice) in [("image", image), ("mask", mask)] {
            if slice.len() != pixels {
                let found = slice.len();
                let problem = format!("expected {pixels} pixels, found {found}");
                return Err(Error::argument(name, problem));
            }
        }
        self.pixels.extend_from_slice(image);
        self.pixels.extend_from_slice(mask);
        self.targets.push(target);
        Ok(())
    }
}

impl Samples for Pool {
    fn len(&self) -> usize {
        self.targets.len()
    }

    fn size(&self) -> usize {
        self.size
    }

    fn read(&self, index: usize, image: &mut [u8], mask: &mut [u8]) -> Result<Target> {
        let pixels = self.size * self.size;
        let sample = &self.pixels[2 * index * pixels..2 * (index + 1) * pixels];
        image.copy_from_slice(&sample[..pixels]);
        mask.copy_from_slice(&sample[pixels..]);
        Ok(self.targets[index])
    }
}

/// One batch to be made: at most the loader's batch size of sample indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Keys the augmentation, together with the seed and each index.
    pub epoch: u64,
    /// The samples, in order.
    pub indices: Vec<usize>,
}

/// The requests of one epoch over `indices`: shuffled by seed and epoch, cut into batches, the last
/// one possibly short.
pub fn epoch(
    seed: u64,
    epoch: u64,
    mut indices: Vec<usize>,
    batch: usize,
) -> impl Iterator<Item = Request> {
    shuffle(&mut indices, Philox::new(seed, !epoch));
    let batch = batch.max(1);
    (0..indices.len()).step_by(batch).map(move |start| Request {
        epoch,
        indices: indices[start..(start + batch).min(indices.len())].to_vec(),
    })
}

/// Fisher–Yates. The complement of the epoch keeps its stream apart from every sample's.
fn shuffle(indices: &mut [usize], key: Philox) {
    let mut draws = key.draws();
    for i in (1..indices.len()).rev() {
        indices.swap(i, draws.below(i as u32 + 1) as usize);
    }
}

/// A batch of N samples, N being the loader's batch size. A short request leaves the remaining rows
/// black, with label and weight 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// N×S×S×1, intensities in [0, 1].
    pub images: Tensor<f32>,
    /// N×S×S×1, soft masks in [0, 1].
    pub masks: Tensor<f32>,
    /// N×1×1×1, 1 for malignant.
    pub labels: Tensor<f32>,
    /// N×1×1×1.
    pub weights: Tensor<f32>,
    /// The samples present: N of them, fewer in a short batch.
    pub indices: Vec<usize>,
    /// The request's epoch.
    pub epoch: u64,
}

impl Batch {
    fn new(batch: usize, size: usize) -> Self {
        let images = Tensor::zeros(Shape::new(batch, size, size, 1));
        let labels = Tensor::zeros(Shape::per_image(batch, 1));
        Self {
            masks: images.clone(),
            images,
            weights: labels.clone(),
            labels,
            indices: Vec::with_capacity(batch),
            epoch: 0,
        }
    }
}

/// How a [`Loader`] works.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoaderConfig {
    /// Samples in a batch, at least 1.
    pub batch: usize,
    /// Background threads, at least 1.
    pub workers: usize,
    /// Batches made ahead of the one in use, at least 1.
    pub ahead: usize,
    /// Seed of the augmentation.
    pub seed: u64,
    /// `None` for validation: images and masks as they are.
    pub augment: Option<AugmentConfig>,
}

/// Yields the requested batches in order while its threads prepare the next ones. Dropping it stops and
/// joins the threads. After an error it yields nothing more.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There may be room to work, or it is time to stop.
    room: Condvar,
    /// A batch was finished, or the requests ran out.
    done: Condvar,
    ahead: usize,
}

struct State {
    requests: Box<dyn Iterator<Item = Request> + Send>,
    exhausted: bool,
    /// Requests taken by workers.
    taken: usize,
    /// Batches handed to the consumer.
    yielded: usize,
    ready: BTreeMap<usize, Outcome>,
    spare: Vec<Batch>,
}

/// A batch, or the panic of the worker that was making it.
type Outcome = std::result::Result<Result<Batch>, Box<dyn Any + Send>>;

impl Loader {
    /// Starts the workers on `requests`, which is advanced on their threads as room appears and may be
    /// endless.
    ///
    /// # Errors
    /// [`Error::Argument`] if a count is 0 or the augmentation's configuration is out of range.
    pub fn new<S: Samples + 'static>(
        samples: Arc<S>,
        config: LoaderConfig,
        requests: impl Iterator<Item = Request> + Send + 'static,
    ) -> Result<Self> {
        for (name, count) in [
            ("batch", config.batch),
            ("workers", config.workers),
            ("ahead", config.ahead),
        ] {
            if count == 0 {
                return Err(Error::argument(name, "expected at least 1, found 0"));
            }
        }
        let size = samples.size();
        let augmenter = match config.augment {
            Some(augment) => Some(Augmenter::new(augment, size)?),
            None => None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                requests: Box::new(requests),
                exhausted: false,
                taken: 0,
                yielded: 0,
                ready: BTreeMap::new(),
                spare: Vec::new(),
            }),
            room: Condvar::new(),
            done: Condvar::new(),
            ahead: config.ahead,
        });
        let threads = (0..config.workers)
            .map(|_| {
                let shared = Arc::clone(&shared);
                let mut worker = Worker {
                    samples: Arc::clone(&samples),
                    config,
                    augmenter: augmenter.clone(),
                    image: vec![0; size * size],
                    mask: vec![0; size * size],
                };
                std::thread::spawn(move || shared.work(&mut worker))
            })
            .collect();
        Ok(Self { shared, threads })
    }

    /// Gives a used batch back, so that its memory serves a later one.
    pub fn recycle(&self, batch: Batch) {
        self.shared.lock().spare.push(batch);
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    /// The next batch; waits for it if need be.
    ///
    /// # Panics
    /// With the panic of [`Samples::read`] or of the requests' iterator, if one panicked on a worker.
    fn next(&mut self) -> Option<Self::Item> {
        let mut state = self.shared.lock();
        let outcome = loop {
            let turn = state.yielded;
            if let Some(outcome) = state.ready.remove(&turn) {
                break outcome;
            }
            if state.exhausted && turn >= state.taken {
                return None;
            }
            state = self.shared.done.wait(state).expect("loader state");
        };
        state.yielded += 1;
        if !matches!(outcome, Ok(Ok(_))) {
            state.stop();
        }
        drop(state);
        self.shared.room.notify_all();
        match outcome {
            Ok(batch) => Some(batch),
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().stop();
        self.shared.room.notify_all();
        for thread in self.threads.drain(..) {
            // Panics travel through `Outcome`; a worker itself returns normally.
            let _ = thread.join();
        }
    }
}

impl State {
    /// No further batch is made or yielded.
    fn stop(&mut self) {
        self.exhausted = true;
        self.taken = self.yielded;
        self.ready.clear();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held: the requests' iterator runs inside `catch_unwind`.
        self.state.lock().expect("loader state")
    }

    fn work<S: Samples>(&self, worker: &mut Worker<S>) {
        let mut state = self.lock();
        loop {
            if state.exhausted {
                self.done.notify_all();
                return;
            }
            // The batch in use counts neither as ahead nor as taken.
            if state.taken - state.yielded >= self.ahead {
                state = self.room.wait(state).expect("loader state");
                continue;
            }
            let turn = state.taken;
            let request = match catch_unwind(AssertUnwindSafe(|| state.requests.next())) {
                Ok(Some(request)) => request,
                Ok(None) => {
                    state.exhausted = true;
                    self.room.notify_all();
                    continue;
                }
                Err(panic) => {
                    state.exhausted = true;
                    state.taken += 1;
                    state.ready.insert(turn, Err(panic));
                    self.room.notify_all();
                    continue;
                }
            };
            state.taken += 1;
            let batch = state.spare.pop();
            drop(state);
            let outcome = catch_unwind(AssertUnwindSafe(|| worker.make(request, batch)));
            state = self.lock();
            // Stopped meanwhile: nobody will ask for it.
            if turn < state.taken {
                state.ready.insert(turn, outcome);
                self.done.notify_all();
            }
        }
    }
}

struct Worker<S> {
    samples: Arc<S>,
    config: LoaderConfig,
    augmenter: Option<Augmenter>,
    image: Vec<u8>,
    mask: Vec<u8>,
}

impl<S: Samples> Worker<S> {
    fn make(&mut self, request: Request, spare: Option<Batch>) -> Result<Batch> {
        let (n, size) = (self.config.batch, self.samples.size());
        let Request { epoch, indices } = request;
        if indices.len() > n {
            let problem = format!("expected at most {n} samples, found {}", indices.len());
            return Err(Error::argument("batch", problem));
        }
        let mut batch = spare.unwrap_or_else(|| Batch::new(n, size));
        let pixels = size * size;
        for (slot, &index) in indices.iter().enumerate() {
            let Target { label, weight } =
                self.samples.read(index, &mut self.image, &mut self.mask)?;
            let range = slot * pixels..(slot + 1) * pixels;
            let image = &mut batch.images.data_mut()[range.clone()];
            let mask = &mut batch.masks.data_mut()[range];
            match &mut self.augmenter {
                Some(augmenter) => {
                    let key = Augmenter::key(self.config.seed, epoch, index);
                    augmenter.apply(key, &self.image, &self.mask, image, mask);
                }
                None => {
                    unit(&self.image, image);
                    unit(&self.mask, mask);
                }
            }
            batch.labels.data_mut()[slot] = label;
            batch.weights.data_mut()[slot] = weight;
        }
        let present = indices.len();
        batch.images.data_mut()[present * pixels..].fill(0.0);
        batch.masks.data_mut()[present * pixels..].fill(0.0);
        batch.labels.data_mut()[present..].fill(0.0);
        batch.weights.data_mut()[present..].fill(0.0);
        batch.indices = indices;
        batch.epoch = epoch;
        Ok(batch)
    }
}
