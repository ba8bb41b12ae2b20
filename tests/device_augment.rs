//! Batches that the emulator makes of samples in its memory, against those of the CPU.
#![cfg(echograd_emulator)]

use echograd::data::augment::{AugmentConfig, Augmenter, unit};
use echograd::data::device;
use echograd::data::loader::{Pool, Request, Samples, Target};
use echograd::device::Backend;
use echograd::device::gpu::{Gpu, Session};
use echograd::device::philox::Philox;
use echograd::tape::{Options, Plan, Tape, Var};
use echograd::tensor::Shape;
use half::bf16;

const SEED: u64 = 0x1234_5678_9abc;

/// Speckle from dark to bright, other noise in the mask; a black border, as letterboxing leaves it.
fn samples(count: usize, size: usize) -> Pool {
    let mut pool = Pool::new(size);
    for i in 0..count {
        let mut draws = Philox::new(i as u64, 9).draws();
        let mut plane = |border: usize| -> Vec<u8> {
            (0..size * size)
                .map(|at| match at / size < border {
                    true => 0,
                    false => draws.below(256) as u8,
                })
                .collect()
        };
        let (image, mask) = (plane(size / 5), plane(size / 3));
        let target = Target {
            label: 0.0,
            weight: 1.0,
        };
        pool.push(&image, &mask, target).unwrap();
    }
    pool
}

/// A session with nothing but the two inputs; `narrow` says which are bf16.
fn session(gpu: &Gpu, shape: Shape, narrow: [bool; 2]) -> (Session, [Var; 2]) {
    let mut tape = Tape::new();
    let vars = ["images", "masks"].map(|name| tape.input(name, shape));
    for (var, narrow) in vars.into_iter().zip(narrow) {
        tape.keep(var);
        if narrow {
            tape.narrow(var);
        }
    }
    let plan = Plan::new(&tape, Options::gpu(true)).unwrap();
    (Session::new(gpu, plan).unwrap(), vars)
}

/// The batch as the CPU makes it: images and masks.
fn expected(
    pool: &Pool,
    batch: usize,
    config: Option<AugmentConfig>,
    request: &Request,
) -> [Vec<f32>; 2] {
    let size = pool.size();
    let pixels = size * size;
    let mut planes = [vec![0.0; batch * pixels], vec![0.0; batch * pixels]];
    let [images, masks] = &mut planes;
    let mut augmenter = config.map(|config| Augmenter::new(config, size).unwrap());
    let (mut image, mut mask) = (vec![0; pixels], vec![0; pixels]);
    for (slot, &index) in request.indices.iter().enumerate() {
        pool.read(index, &mut image, &mut mask).unwrap();
        let at = slot * pixels..(slot + 1) * pixels;
        let (to_image, to_mask) = (&mut images[at.clone()], &mut masks[at]);
        match &mut augmenter {
            Some(augmenter) => {
                let key = Augmenter::key(SEED, request.epoch, index);
                augmenter.apply(key, &image, &mask, to_image, to_mask);
            }
            None => {
                unit(&image, to_image);
                unit(&mask, to_mask);
            }
        }
    }
    planes
}

/// Every kind of change, at full strength.
fn strongest() -> AugmentConfig {
    AugmentConfig {
        p_affine: 1.0,
        rotation: 45.0,
        scale: 1.0,
        shift: 0.5,
        p_elastic: 1.0,
        elastic_cells: 5,
        elastic: 0.08,
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
        ..AugmentConfig::default()
    }
}

/// One kind of change alone.
fn alone(change: impl FnOnce(&mut AugmentConfig)) -> AugmentConfig {
    let mut config = AugmentConfig::identity();
    change(&mut config);
    config
}

#[test]
fn batches_are_the_cpus_bit_for_bit() {
    let gpu = Gpu::emulator().unwrap();
    let configs = [
        None,
        Some(AugmentConfig::identity()),
        Some(AugmentConfig::default()),
        Some(strongest()),
        Some(alone(|c| c.p_flip = 1.0)),
        Some(alone(|c| c.p_affine = 1.0)),
        Some(alone(|c| c.p_elastic = 1.0)),
        Some(alone(|c| c.p_gamma = 1.0)),
        Some(alone(|c| c.p_contrast = 1.0)),
        Some(alone(|c| c.p_speckle = 1.0)),
        Some(alone(|c| c.p_blur = 1.0)),
        Some(alone(|c| c.p_depth_gain = 1.0)),
    ];
    // One tile and several, partial ones, rows that are no multiple of a thread's pixels, sizes below the
    // filters' radius.
    for size in [1, 5, 32, 45, 68] {
        let pool = samples(4, size);
        for (seed, config) in configs.into_iter().enumerate() {
            let narrow = [seed % 2 == 1, seed % 4 > 1];
            let shape = Shape::new(3, size, size, 1);
            let (mut session, vars) = session(&gpu, shape, narrow);
            let mut augmenter = device::Augmenter::new(&gpu, &pool, 3, SEED, config).unwrap();
            gpu.reorder(seed as u64);
            // A whole batch, then a short one in its place.
            for (epoch, indices) in [(3, vec![2, 0, 3]), (4, vec![1, 1]), (5, vec![])] {
                let request = Request { epoch, indices };
                augmenter.make(&mut session, vars, &request).unwrap();
                let planes = expected(&pool, 3, config, &request);
                for ((var, plane), narrow) in vars.into_iter().zip(planes).zip(narrow) {
                    let stored = |v: f32| {
                        if narrow {
                            bf16::from_f32(v).to_f32()
                        } else {
                            v
                        }
                    };
                    let found = session.read(var).unwrap();
                    for (i, (found, expected)) in found.into_iter().zip(plane).enumerate() {
                        let expected = stored(expected);
                        assert!(
                            found == expected,
                            "size {size}, {config:?}, epoch {epoch}, {i}: {found} for {expected}"
                        );
                    }
                }
            }
        }
    }
}

/// Training knows its session as one of any device.
#[test]
fn sessions_of_gpus_are_found() {
    let mut tape = Tape::new();
    tape.input("images", Shape::new(1, 8, 8, 1));
    let gpu = Gpu::emulator().unwrap();
    let backend = Backend::Gpu { gpu, narrow: false };
    assert!(backend.session(&tape).unwrap().on_gpu().is_some());
    assert!(Backend::Cpu.session(&tape).unwrap().on_gpu().is_none());
}

#[test]
fn what_does_not_fit_is_named() {
    let gpu = Gpu::emulator().unwrap();
    let pool = samples(2, 8);
    let mut augmenter = device::Augmenter::new(&gpu, &pool, 2, SEED, None).unwrap();
    assert!(augmenter.bytes() >= 2 * 2 * 64);
    let (mut right, vars) = session(&gpu, Shape::new(2, 8, 8, 1), [false; 2]);
    let (mut wrong, other) = session(&gpu, Shape::new(2, 8, 9, 1), [false; 2]);
    let (mut foreign, foreign_vars) = session(
        &Gpu::emulator().unwrap(),
        Shape::new(2, 8, 8, 1),
        [false; 2],
    );
    let request = |indices| Request { epoch: 0, indices };
    let mut message = |session: &mut Session, vars, indices| {
        let made = augmenter.make(session, vars, &request(indices));
        made.unwrap_err().to_string()
    };
    assert!(message(&mut right, vars, vec![0, 1, 0]).contains("at most 2"));
    assert!(message(&mut right, vars, vec![2]).contains("found 2"));
    assert!(message(&mut wrong, other, vec![0]).contains("images"));
    assert!(message(&mut foreign, foreign_vars, vec![0]).contains("device"));
    for (batch, config) in [
        (0, AugmentConfig::default()),
        (
            1,
            AugmentConfig {
                p_blur: 2.0,
                ..AugmentConfig::default()
            },
        ),
    ] {
        assert!(device::Augmenter::new(&gpu, &pool, batch, SEED, Some(config)).is_err());
    }
}
