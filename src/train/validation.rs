//! How the network stands in training: what it says of the held-out images, at its own resolution and without flips,
//! since what only tests depend on changes no weights.
//!
//! On a GPU all of it happens there. Weights come from the memory of the training step by one launch, images and masks
//! lie in its memory, and of what the network says only each image's overlap with its mask and malignancy are read.

use super::checkpoint::weights_prefix;
use super::config::Config;
use super::model::sigmoid;
use super::step::{Evaluation, TrainingStep};
use crate::data::augment::unit;
use crate::data::device::Augmenter;
use crate::data::loader::{Pool, Request, Samples};
use crate::device::{Backend, FETCH, Session};
use crate::error::{Error, Result};
use crate::metrics::classification::Auc;
use crate::nn::weights::{self, Part, Transfer};
use crate::ops::overlap::Overlap;
use crate::tape::{Kind, Var};

/// A GPU is shown that many times the images of a training step at once: in inference no layer's results are kept, so
/// that they need no more memory than the step.
const SHOWN: usize = 4;

/// Most images whose results can be fetched at once.
const MOST: usize = FETCH / size_of::<[f32; 2]>();

/// The network of a training step in evaluation, and the images that it is shown.
pub(super) struct Validation {
    evaluation: Evaluation,
    masks: Var,
    overlap: Option<Var>,
    session: Box<dyn Session<f32>>,
    way: Way,
    pool: Pool,
    /// Images that are shown at once.
    batch: usize,
}

/// How weights and images come to the session.
enum Way {
    /// Over the host: what each weight is made of.
    Host(Vec<Part<Var>>),
    /// Within a GPU.
    Device {
        weights: Transfer,
        images: Box<Augmenter>,
    },
}

impl Validation {
    /// For the network that `config` describes, as `training` holds it, a session of `step`, and the images of `pool`,
    /// of which there is at least one.
    ///
    /// # Errors
    /// As [`Evaluation::folded`], [`Backend::session`] and [`Augmenter::new`]; [`Error::Shape`] naming the first weight
    /// that `step` lacks.
    pub fn new(
        config: &Config,
        backend: &Backend,
        step: &TrainingStep,
        training: &mut dyn Session<f32>,
        pool: Pool,
    ) -> Result<Self> {
        let most = match backend {
            Backend::Cpu => config.batch,
            Backend::Gpu { .. } => (SHOWN * config.batch).min(MOST),
        };
        // As few batches as that takes, all of a size.
        let batch = pool.len().div_ceil(pool.len().div_ceil(most));
        let mut evaluation = Evaluation::folded(&Config {
            batch,
            ..config.clone()
        })?;
        let (images, logits) = (evaluation.images, evaluation.logits);
        let tape = &mut evaluation.tape;
        let masks = tape.input("masks", tape.shape(images));
        tape.narrow(masks);
        let overlap = logits.mask.map(|mask| tape.push(Overlap, &[mask, masks]));
        let overlap = overlap.transpose()?;
        overlap.iter().for_each(|&overlap| tape.keep(overlap));

        let mut session = evaluation.session(backend)?;
        let prefix = weights_prefix(config);
        let parts = evaluation.parts(|name, shape| {
            let averaged = format!("{prefix}{name}");
            let mut kinds = [Kind::Parameter, Kind::State].into_iter();
            let var = kinds.find_map(|kind| step.tape.find(kind, &averaged));
            let problem = || format!("expected {name}, {shape}, found none");
            var.filter(|&var| step.tape.shape(var) == shape)
                .ok_or_else(|| Error::shape("weights", problem()))
        })?;
        let way = match (training.on_gpu(), session.on_gpu()) {
            (Some(training), Some(session)) => Way::Device {
                weights: Transfer::new(training, session, &parts)?,
                images: Box::new(Augmenter::new(session.gpu(), &pool, batch, 0, None)?),
            },
            _ => Way::Host(parts),
        };
        Ok(Self {
            evaluation,
            masks,
            overlap,
            session,
            way,
            pool,
            batch,
        })
    }

    /// Shows all images to the network as `training` has it. Returns the mean of their Dice coefficients, if masks are
    /// predicted, and the AUC of their malignancy, if that is and there are both kinds.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn run(&mut self, training: &dyn Session<f32>) -> Result<(Option<f64>, Option<f64>)> {
        self.load(training)?;
        let images = self.pool.len();
        let starts = (0..images).step_by(self.batch);
        let batches: Vec<Vec<usize>> = starts
            .map(|start| (start..images.min(start + self.batch)).collect())
            .collect();
        let malignancy = self.evaluation.logits.malignancy;
        for indices in &batches {
            self.show(indices)?;
            self.session.replay()?;
            for var in [self.overlap, malignancy].into_iter().flatten() {
                self.session.fetch(var)?;
            }
        }
        let (mut dice, mut scores) = (0.0, Vec::new());
        for indices in &batches {
            let mut fetched = |var: Option<Var>| match var {
                Some(_) => self.session.fetched(),
                None => Ok(None),
            };
            let (overlaps, logits) = (fetched(self.overlap)?, fetched(malignancy)?);
            for overlap in overlaps
                .iter()
                .flat_map(|o| o.chunks(2))
                .take(indices.len())
            {
                dice += quotient(overlap[0].into(), overlap[1].into());
            }
            for (&index, &logit) in indices.iter().zip(logits.iter().flatten()) {
                let malignant = self.pool.target(index).label > 0.5;
                scores.push((sigmoid(logit.into()), malignant));
            }
        }
        let dice = self.overlap.map(|_| dice / images as f64);
        Ok((dice, Auc::of(&scores).map(|auc| auc.value)))
    }

    /// Takes the weights as they stand in training: moving averages if there are any.
    fn load(&mut self, training: &dyn Session<f32>) -> Result<()> {
        match &self.way {
            Way::Device { weights, .. } => weights.queue(),
            Way::Host(parts) => parts.iter().try_for_each(|part| {
                let values = part.map(|&var| training.read(var))?;
                weights::load(&mut *self.session, values)
            }),
        }
    }

    /// Puts images and masks of a batch in place.
    fn show(&mut self, indices: &[usize]) -> Result<()> {
        let inputs = [self.evaluation.images, self.masks];
        if let (Way::Device { images, .. }, Some(session)) = (&mut self.way, self.session.on_gpu())
        {
            let indices = indices.to_vec();
            return images.make(session, inputs, &Request { epoch: 0, indices });
        }
        let pixels = self.pool.size().pow(2);
        let mut bytes = [vec![0; pixels], vec![0; pixels]];
        let mut planes = [(); 2].map(|()| vec![0.0; self.batch * pixels]);
        for (slot, &index) in indices.iter().enumerate() {
            let [image, mask] = &mut bytes;
            self.pool.read(index, image, mask)?;
            for (bytes, plane) in bytes.iter().zip(&mut planes) {
                unit(bytes, &mut plane[slot * pixels..][..pixels]);
            }
        }
        let mut planes = inputs.into_iter().zip(&planes);
        planes.try_for_each(|(input, plane)| self.session.write(input, plane))
    }
}

/// Dice coefficient of two masks with `both` pixels in common and `either` in the one plus in the other. 0 if nothing is
/// predicted.
fn quotient(both: f64, either: f64) -> f64 {
    // A lesion too thin to fill half a pixel anywhere, and none predicted.
    if either == 0.0 {
        return 0.0;
    }
    2.0 * both / either
}

#[cfg(all(test, echograd_emulator))]
mod tests {
    use super::*;
    use crate::data::loader::Target;
    use crate::device::gpu::Gpu;
    use crate::gradcheck::Sampler;

    /// Weights that are folded on the device are those that are folded on the host, bit for bit, and so are the results.
    #[test]
    fn the_way_over_the_host_gives_the_same_bits() {
        // A convolution of more elements than a block makes, and one of an odd number.
        let settings = [
            ("preset", "tiny"),
            ("size", "16"),
            ("batch", "1"),
            ("model.widths", "[3, 24]"),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let config = Config::load(None, &settings).unwrap();
        let step = TrainingStep::record(&config, false).unwrap();
        let mut sampler = Sampler::new(3);
        let mut pool = Pool::new(config.size);
        for i in 0..9u8 {
            let mut plane = || -> Vec<u8> {
                let values = sampler.values(config.size.pow(2), 0.0, 256.0);
                values.into_iter().map(|x| x as u8).collect()
            };
            let (image, mask) = (plane(), plane());
            let target = Target {
                label: f32::from(i % 2),
                weight: 1.0,
            };
            pool.push(&image, &mask, target).unwrap();
        }
        for narrow in [false, true] {
            let gpu = Gpu::emulator().unwrap();
            let backend = Backend::Gpu { gpu, narrow };
            let mut training = backend.session(&step.tape).unwrap();
            step.start(&mut *training, 0, None).unwrap();
            for var in step.tape.of_kind(Kind::State) {
                let (name, len) = (step.tape.name(var), step.tape.shape(var).len());
                // Variances are positive.
                let low = if name.ends_with("running_var") {
                    0.1
                } else {
                    -1.0
                };
                let values = sampler.values(len, low, 1.0);
                let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
                training.write(var, &values).unwrap();
            }
            let pool = || pool.clone();
            let make = |training: &mut dyn Session<f32>| {
                Validation::new(&config, &backend, &step, training, pool()).unwrap()
            };
            let mut validation = make(&mut *training);
            assert_eq!(validation.batch, 3, "nine, at most four at once");
            let results = |validation: &mut Validation| {
                let found = validation.run(&*training).unwrap();
                let tape = &validation.evaluation.tape;
                let read = |var| -> Vec<u32> {
                    let values = validation.session.read(var).unwrap();
                    values.iter().map(|x| x.to_bits()).collect()
                };
                let values: Vec<Vec<u32>> = tape.of_kind(Kind::Parameter).map(read).collect();
                (found, values)
            };
            let within = results(&mut validation);
            let parts = validation.evaluation.parts(|name, _| {
                let mut kinds = [Kind::Parameter, Kind::State].into_iter();
                let averaged = format!("ema.{name}");
                Ok(kinds
                    .find_map(|kind| step.tape.find(kind, &averaged))
                    .unwrap())
            });
            validation.way = Way::Host(parts.unwrap());
            assert!(within == results(&mut validation), "narrow: {narrow}");
            let (dice, auc) = within.0;
            assert!(dice.unwrap() > 0.0 && auc.is_some());
        }
    }
}
