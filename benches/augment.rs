//! Augmented images per second on one thread, with every change on and with the default mixture.
//!
//! `cargo bench --bench augment`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use echograd::data::augment::{AugmentConfig, Augmenter};
use echograd::device::philox::Philox;

fn augment(criterion: &mut Criterion) {
    let defaults = AugmentConfig::default();
    let everything = AugmentConfig {
        p_flip: 0.5,
        p_affine: 1.0,
        p_elastic: 1.0,
        p_gamma: 1.0,
        p_contrast: 1.0,
        p_speckle: 1.0,
        p_blur: 1.0,
        p_depth_gain: 1.0,
        ..defaults
    };
    for size in [128, 256] {
        let mut draws = Philox::new(0, 0).draws();
        let image: Vec<u8> = (0..size * size).map(|_| draws.below(256) as u8).collect();
        let (mut image_out, mut mask_out) = (vec![0.0; size * size], vec![0.0; size * size]);
        let mut group = criterion.benchmark_group(format!("augment/{size}"));
        group.throughput(Throughput::Elements(1));
        for (name, config) in [("default", defaults), ("everything", everything)] {
            let mut augmenter = Augmenter::new(config, size).expect("valid configuration");
            let mut sample = 0;
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    sample += 1;
                    let key = Augmenter::key(0, 0, sample);
                    augmenter.apply(key, &image, &image, &mut image_out, &mut mask_out)
                });
            });
        }
    }
}

criterion_group!(benches, augment);
criterion_main!(benches);
