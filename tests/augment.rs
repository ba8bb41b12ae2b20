//! Augmentation and the loader through their public interface.

use std::sync::Arc;

use echograd::data::augment::{AugmentConfig, Augmenter, Change, unit};
use echograd::data::loader::{Loader, LoaderConfig, Pool, Request, Samples, Target, epoch};
use echograd::device::philox::Philox;
use echograd::{Error, Result};
use proptest::prelude::*;

/// Noise from dark to bright, the same in the mask.
fn noise(size: usize, seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut draws = Philox::new(seed, 9).draws();
    let mut plane = || (0..size * size).map(|_| draws.below(256) as u8).collect();
    (plane(), plane())
}

fn run(config: AugmentConfig, size: usize, key: Philox, from: &(Vec<u8>, Vec<u8>)) -> Sample {
    let mut augmenter = Augmenter::new(config, size).unwrap();
    let mut sample = Sample {
        image: vec![f32::NAN; size * size],
        mask: vec![f32::NAN; size * size],
        change: Change::draw(&config, &mut key.draws()),
    };
    let change = augmenter.apply(key, &from.0, &from.1, &mut sample.image, &mut sample.mask);
    assert_eq!(change, sample.change);
    sample
}

struct Sample {
    image: Vec<f32>,
    mask: Vec<f32>,
    change: Change,
}

fn plain(bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len()];
    unit(bytes, &mut out);
    out
}

/// Everything at once and at full strength.
fn strongest() -> AugmentConfig {
    AugmentConfig {
        p_flip: 0.5,
        p_affine: 1.0,
        rotation: 45.0,
        scale: 1.0,
        shift: 0.5,
        p_elastic: 1.0,
        elastic_cells: 4,
        elastic: 0.1,
        p_gamma: 1.0,
        gamma: 1.5,
        p_contrast: 1.0,
        contrast: 0.9,
        brightness: 0.5,
        p_speckle: 1.0,
        speckle: 1.0,
        speckle_grain: 3.0,
        p_blur: 1.0,
        blur: 3.0,
        p_depth_gain: 1.0,
        depth_gain: 0.45,
    }
}

/// Only geometry without deformation.
fn affine(rotation: f32, scale: f32, shift: f32) -> AugmentConfig {
    AugmentConfig {
        p_affine: 1.0,
        rotation,
        scale,
        shift,
        ..AugmentConfig::identity()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn identity_returns_the_input_exactly(size in 1usize..40, seed: u64) {
        let from = noise(size, seed);
        // Untouched, and through the resampler with every magnitude at 0.
        for config in [AugmentConfig::identity(), affine(0.0, 0.0, 0.0)] {
            let sample = run(config, size, Philox::new(seed, 0), &from);
            prop_assert_eq!(sample.image, plain(&from.0));
            prop_assert_eq!(sample.mask, plain(&from.1));
        }
    }

    #[test]
    fn a_flip_mirrors_columns_and_twice_is_the_input(size in 1usize..40, seed: u64) {
        let from = noise(size, seed);
        let config = AugmentConfig { p_flip: 1.0, ..AugmentConfig::identity() };
        let once = run(config, size, Philox::new(seed, 0), &from);
        let mut mirrored = plain(&from.0);
        mirrored.chunks_exact_mut(size).for_each(<[f32]>::reverse);
        prop_assert_eq!(&once.image, &mirrored);
        let bytes = |plane: &[f32]| plane.iter().map(|v| (v * 255.0).round() as u8).collect();
        let twice = run(config, size, Philox::new(seed, 1), &(bytes(&once.image), bytes(&once.mask)));
        prop_assert_eq!(twice.image, plain(&from.0));
        prop_assert_eq!(twice.mask, plain(&from.1));
    }

    #[test]
    fn everything_at_full_strength_stays_in_the_unit_interval(size in 1usize..70, seed: u64) {
        let from = noise(size, seed);
        let sample = run(strongest(), size, Philox::new(seed, 0), &from);
        for v in sample.image.iter().chain(&sample.mask) {
            prop_assert!((0.0..=1.0).contains(v), "{}", v);
        }
    }

    /// The inverse map's determinant has the flip's sign and its vertical entry stays positive: down is
    /// down, whatever is drawn.
    #[test]
    fn never_flipped_vertically(seed: u64) {
        let change = Change::draw(&strongest(), &mut Philox::new(seed, 0).draws());
        let [[a, b, _], [c, d, _]] = change.matrix(256);
        prop_assert!(d > 0.0);
        prop_assert_eq!(a * d - b * c < 0.0, change.flip);
    }

    #[test]
    fn a_change_stays_within_its_ranges(seed: u64) {
        let config = AugmentConfig::default();
        let change = Change::draw(&config, &mut Philox::new(seed, 0).draws());
        prop_assert!(change.rotation.abs() <= config.rotation.to_radians());
        prop_assert!(change.scale.ln().abs() <= config.scale.ln_1p() + 1e-6);
        prop_assert!(change.shift.iter().all(|s| s.abs() <= config.shift));
        prop_assert!((0.0..=config.elastic).contains(&change.elastic));
        prop_assert!(change.gamma.ln().abs() <= config.gamma + 1e-6);
        prop_assert!((change.contrast - 1.0).abs() <= config.contrast + 1e-6);
        prop_assert!(change.brightness.abs() <= config.brightness);
        prop_assert!((0.0..=config.speckle).contains(&change.speckle));
        prop_assert!((0.5..=config.speckle_grain).contains(&change.speckle_grain));
        prop_assert!((0.0..=config.blur).contains(&change.blur));
        prop_assert!(change.depth_gain.iter().all(|g| g.abs() <= config.depth_gain));
    }

    #[test]
    fn rotation_and_scale_change_a_discs_area_as_they_should(seed: u64) {
        const SIZE: usize = 128;
        let from = disc(SIZE, 0.0, 0.0, 25.0);
        let sample = run(affine(45.0, 0.3, 0.1), SIZE, Philox::new(seed, 0), &from);
        let before: f32 = plain(&from.1).iter().sum();
        let after: f32 = sample.mask.iter().sum();
        let expected = before * sample.change.scale * sample.change.scale;
        prop_assert!((after / expected - 1.0).abs() < 0.01, "{} {}", after, expected);
    }

    /// A spot goes where the documented parameters say: mirrored, scaled, turned, then shifted.
    #[test]
    fn a_spot_lands_where_the_parameters_say(seed: u64) {
        const SIZE: usize = 129;
        let config = AugmentConfig { p_flip: 0.5, ..affine(30.0, 0.2, 0.1) };
        let sample = run(config, SIZE, Philox::new(seed, 0), &disc(SIZE, 18.0, -11.0, 5.0));
        let Change { flip, rotation, scale, shift, .. } = sample.change;
        let (x, y) = (scale * if flip { -18.0 } else { 18.0 }, scale * -11.0);
        let (sin, cos) = rotation.sin_cos();
        let expected = [
            cos * x - sin * y + shift[0] * SIZE as f32,
            sin * x + cos * y + shift[1] * SIZE as f32,
        ];
        let (x, y) = centroid(&sample.mask, SIZE);
        prop_assert!((x - expected[0]).abs() < 0.1 && (y - expected[1]).abs() < 0.1,
            "found {} {}, expected {:?}", x, y, expected);
        // The image went the same way as the mask.
        prop_assert_eq!(&sample.image, &sample.mask);
    }

    /// An elastic map without folds moves pixels smoothly: a ramp stays a ramp along each row.
    #[test]
    fn the_strongest_elastic_map_does_not_fold(seed: u64, cells in 1u32..12) {
        const SIZE: usize = 128;
        let ramp: Vec<u8> = (0..SIZE * SIZE).map(|i| (64 + (i % SIZE)) as u8).collect();
        let config = AugmentConfig {
            p_elastic: 1.0,
            elastic_cells: cells,
            elastic: 0.4 / cells as f32,
            ..AugmentConfig::identity()
        };
        let sample = run(config, SIZE, Philox::new(seed, 0), &(ramp, vec![255; SIZE * SIZE]));
        let rows = sample.image.chunks_exact(SIZE).zip(sample.mask.chunks_exact(SIZE));
        for (image, mask) in rows {
            for x in 1..SIZE {
                // Where nothing came from outside, the source column increases.
                if mask[x - 1] == 1.0 && mask[x] == 1.0 {
                    prop_assert!(image[x] > image[x - 1]);
                }
            }
        }
    }
}

fn disc(size: usize, x: f32, y: f32, radius: f32) -> (Vec<u8>, Vec<u8>) {
    let centre = (size - 1) as f32 / 2.0;
    let mask: Vec<u8> = (0..size * size)
        .map(|i| {
            let dx = (i % size) as f32 - centre - x;
            let dy = (i / size) as f32 - centre - y;
            // One pixel of soft edge.
            ((radius - dx.hypot(dy) + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8
        })
        .collect();
    (mask.clone(), mask)
}

fn centroid(mask: &[f32], size: usize) -> (f32, f32) {
    let centre = (size - 1) as f64 / 2.0;
    let (mut sum, mut x, mut y) = (0.0, 0.0, 0.0);
    for (i, &m) in mask.iter().enumerate() {
        let m = f64::from(m);
        sum += m;
        x += m * ((i % size) as f64 - centre);
        y += m * ((i / size) as f64 - centre);
    }
    ((x / sum) as f32, (y / sum) as f32)
}

#[test]
fn each_change_happens_as_often_as_configured() {
    let config = AugmentConfig::default();
    let draws = 4000;
    let changes: Vec<Change> = (0..draws)
        .map(|i| Change::draw(&config, &mut Augmenter::key(5, 2, i).draws()))
        .collect();
    let off = Change::draw(&AugmentConfig::identity(), &mut Philox::new(0, 0).draws());
    type Happened = fn(&Change, &Change) -> bool;
    let cases: [(f32, Happened); 8] = [
        (config.p_flip, |c, off| c.flip != off.flip),
        (config.p_affine, |c, off| c.rotation != off.rotation),
        (config.p_elastic, |c, off| c.elastic != off.elastic),
        (config.p_gamma, |c, off| c.gamma != off.gamma),
        (config.p_contrast, |c, off| c.contrast != off.contrast),
        (config.p_speckle, |c, off| c.speckle != off.speckle),
        (config.p_blur, |c, off| c.blur != off.blur),
        (config.p_depth_gain, |c, off| c.depth_gain != off.depth_gain),
    ];
    for (i, (p, happened)) in cases.into_iter().enumerate() {
        let count = changes.iter().filter(|c| happened(c, &off)).count() as f32;
        let deviation = (p * (1.0 - p) * draws as f32).sqrt();
        let expected = p * draws as f32;
        assert!(
            (count - expected).abs() < 5.0 * deviation,
            "case {i}: {count}"
        );
    }
    // Both ways equally often: five standard errors of a mean of uniform numbers.
    let mean = changes.iter().map(|c| c.rotation).sum::<f32>() / draws as f32;
    let limit = 5.0 * (config.p_affine / 3.0 / draws as f32).sqrt() * config.rotation.to_radians();
    assert!(mean.abs() < limit, "{mean} {limit}");
}

/// On a uniform grey the noise has the drawn standard deviation, and neighbours correlate as white
/// noise under the drawn Gaussian does.
#[test]
fn speckle_has_the_drawn_strength_and_grain() {
    const SIZE: usize = 256;
    let grey = vec![100; SIZE * SIZE];
    let config = AugmentConfig {
        p_speckle: 1.0,
        speckle: 0.2,
        speckle_grain: 2.0,
        ..AugmentConfig::identity()
    };
    for seed in 0..8 {
        let from = (grey.clone(), vec![0; SIZE * SIZE]);
        let sample = run(config, SIZE, Philox::new(seed, 0), &from);
        let n: Vec<f64> = sample
            .image
            .iter()
            .map(|&v| f64::from(v) * 2.55 - 1.0)
            .collect();
        let count = (SIZE * SIZE) as f64;
        let variance = n.iter().map(|n| n * n).sum::<f64>() / count;
        let lag: f64 = n
            .chunks_exact(SIZE)
            .flat_map(|row| row.windows(2))
            .map(|pair| pair[0] * pair[1])
            .sum();
        let correlation = lag / variance / (count - SIZE as f64);
        let strength = f64::from(sample.change.speckle);
        let grain = f64::from(sample.change.speckle_grain);
        assert!((variance.sqrt() / strength - 1.0).abs() < 0.1, "{seed}");
        let tap = |i: i32| (-0.5 * (f64::from(i) / grain).powi(2)).exp();
        let overlap = |lag: i32| (-20..20).map(|i| tap(i) * tap(i + lag)).sum::<f64>();
        let expected = overlap(1) / overlap(0);
        assert!(
            (correlation - expected).abs() < 0.02,
            "{seed}: {correlation} {expected}"
        );
    }
}

#[test]
fn black_stays_black_under_every_photometric_change() {
    const SIZE: usize = 64;
    let (mut image, mask) = noise(SIZE, 1);
    image[..SIZE * SIZE / 2].fill(0);
    let config = AugmentConfig {
        p_flip: 0.0,
        p_affine: 0.0,
        p_elastic: 0.0,
        p_blur: 0.0,
        ..strongest()
    };
    for seed in 0..50 {
        let sample = run(
            config,
            SIZE,
            Philox::new(seed, 0),
            &(image.clone(), mask.clone()),
        );
        assert!(sample.image[..SIZE * SIZE / 2].iter().all(|&v| v == 0.0));
        assert_ne!(sample.image, plain(&image));
        assert_eq!(sample.mask, plain(&mask));
    }
}

#[test]
fn a_value_out_of_range_is_named() {
    assert!(AugmentConfig::default().validate().is_ok());
    assert!(strongest().validate().is_ok());
    let defaults = AugmentConfig::default();
    for (config, message) in [
        (
            AugmentConfig {
                rotation: 60.0,
                ..defaults
            },
            "augment.rotation: expected 0 to 45, found 60",
        ),
        (
            AugmentConfig {
                p_blur: f32::NAN,
                ..defaults
            },
            "augment.p_blur: expected 0 to 1, found NaN",
        ),
        (
            AugmentConfig {
                elastic_cells: 8,
                elastic: 0.06,
                ..defaults
            },
            "augment.elastic: expected 0 to 0.05, found 0.06",
        ),
        (
            AugmentConfig {
                elastic_cells: 0,
                ..defaults
            },
            "augment.elastic_cells: expected 1 to 32, found 0",
        ),
    ] {
        assert_eq!(config.validate().unwrap_err().to_string(), message);
    }
    let unknown = toml::from_str::<AugmentConfig>("rotaton = 3").unwrap_err();
    assert!(unknown.to_string().contains("rotaton"), "{unknown}");
}

const SIZE: usize = 24;

fn pool(count: usize) -> Arc<Pool> {
    let mut pool = Pool::new(SIZE);
    for i in 0..count {
        let (image, mask) = noise(SIZE, i as u64);
        let target = Target {
            label: (i % 2) as f32,
            weight: 1.0 + i as f32,
        };
        pool.push(&image, &mask, target).unwrap();
    }
    Arc::new(pool)
}

fn config(workers: usize, ahead: usize) -> LoaderConfig {
    LoaderConfig {
        batch: 4,
        workers,
        ahead,
        seed: 11,
        augment: Some(strongest()),
    }
}

fn two_epochs(count: usize) -> impl Iterator<Item = Request> + Send + 'static {
    (0..2).flat_map(move |e| epoch(11, e, (0..count).collect(), 4))
}

#[test]
fn batches_have_the_same_bits_at_any_thread_count() {
    let reference: Vec<_> = Loader::new(pool(10), config(1, 1), two_epochs(10))
        .unwrap()
        .map(|batch| batch.unwrap())
        .collect();
    assert_eq!(reference.len(), 6);
    for (workers, ahead) in [(2, 1), (4, 2), (3, 16)] {
        let mut loader = Loader::new(pool(10), config(workers, ahead), two_epochs(10)).unwrap();
        let mut expected = reference.iter();
        while let Some(batch) = loader.next() {
            let batch = batch.unwrap();
            assert_eq!(Some(&batch), expected.next());
            // Its memory, with stale contents, serves a later batch.
            loader.recycle(batch);
        }
        assert_eq!(expected.len(), 0);
    }
}

#[test]
fn an_epoch_holds_every_sample_once_and_pads_the_last_batch() {
    let batches: Vec<_> = Loader::new(pool(10), config(2, 2), two_epochs(10))
        .unwrap()
        .map(|batch| batch.unwrap())
        .collect();
    let orders: Vec<Vec<usize>> = (0..2)
        .map(|e| {
            let epoch = batches.iter().filter(|b| b.epoch == e);
            epoch.flat_map(|b| b.indices.clone()).collect()
        })
        .collect();
    assert_ne!(orders[0], orders[1]);
    for mut order in orders {
        order.sort_unstable();
        assert!(order.into_iter().eq(0..10));
    }
    for batch in &batches {
        for (slot, &index) in batch.indices.iter().enumerate() {
            assert_eq!(batch.labels.data()[slot], (index % 2) as f32);
            assert_eq!(batch.weights.data()[slot], 1.0 + index as f32);
        }
        let present = batch.indices.len();
        assert!(batch.weights.data()[present..].iter().all(|&w| w == 0.0));
        assert!(
            batch.images.data()[present * SIZE * SIZE..]
                .iter()
                .all(|&v| v == 0.0)
        );
    }
    assert_eq!(batches[2].indices.len(), 2);
    // The same sample looks different in another epoch.
    let image = |e: u64| {
        let batch = batches
            .iter()
            .find(|b| b.epoch == e && b.indices.contains(&3));
        let batch = batch.unwrap();
        let slot = batch.indices.iter().position(|&i| i == 3).unwrap();
        batch.images.data()[slot * SIZE * SIZE..(slot + 1) * SIZE * SIZE].to_vec()
    };
    assert_ne!(image(0), image(1));
}

#[test]
fn without_augmentation_samples_come_as_they_are() {
    let plain_config = LoaderConfig {
        augment: None,
        ..config(1, 1)
    };
    let request = Request {
        epoch: 0,
        indices: vec![2, 0],
    };
    let mut loader = Loader::new(pool(3), plain_config, std::iter::once(request)).unwrap();
    let batch = loader.next().unwrap().unwrap();
    for (slot, seed) in [2, 0].into_iter().enumerate() {
        let (image, mask) = noise(SIZE, seed);
        let range = slot * SIZE * SIZE..(slot + 1) * SIZE * SIZE;
        assert_eq!(batch.images.data()[range.clone()], plain(&image));
        assert_eq!(batch.masks.data()[range], plain(&mask));
    }
    assert!(loader.next().is_none());
}

/// Sample 6 fails, with an error or a panic.
struct Faulty {
    panics: bool,
}

impl Samples for Faulty {
    fn len(&self) -> usize {
        10
    }
    fn size(&self) -> usize {
        SIZE
    }
    fn read(&self, index: usize, image: &mut [u8], mask: &mut [u8]) -> Result<Target> {
        if index == 6 {
            assert!(!self.panics, "sample 6");
            return Err(Error::file("six.png", "truncated"));
        }
        image.fill(1);
        mask.fill(1);
        Ok(Target {
            label: 0.0,
            weight: 1.0,
        })
    }
}

fn in_order() -> impl Iterator<Item = Request> + Send {
    (0..).step_by(2).map(|i| Request {
        epoch: 0,
        indices: vec![i % 10, (i + 1) % 10],
    })
}

#[test]
fn an_error_arrives_in_its_turn_and_ends_the_loader() {
    for workers in [1, 4] {
        let samples = Arc::new(Faulty { panics: false });
        let mut loader = Loader::new(samples, config(workers, 3), in_order()).unwrap();
        for start in [0, 2, 4] {
            let batch = loader.next().unwrap().unwrap();
            assert_eq!(batch.indices, [start, start + 1]);
        }
        let error = loader.next().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "six.png: truncated");
        assert!(loader.next().is_none());
    }
}

#[test]
fn a_workers_panic_reaches_the_consumer() {
    let samples = Arc::new(Faulty { panics: true });
    let mut loader = Loader::new(samples, config(2, 2), in_order()).unwrap();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        while loader.next().unwrap().is_ok() {}
    }));
    let payload = outcome.unwrap_err();
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"sample 6"));
}

/// The requests never end; dropping the loader does, and its threads let go of the samples.
#[test]
fn dropping_the_loader_joins_its_threads() {
    let samples = pool(10);
    let mut loader = Loader::new(Arc::clone(&samples), config(3, 2), in_order()).unwrap();
    assert!(loader.next().unwrap().is_ok());
    drop(loader);
    assert_eq!(Arc::strong_count(&samples), 1);
}
