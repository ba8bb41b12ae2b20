//! The mask head's CUDA kernels in the emulator, against the CPU's code in `f64`.
#![cfg(echograd_emulator)]

use std::ffi::c_void;

use echograd::Result;
use echograd::device::cpu::Session;
use echograd::device::emulator::{self, Buffer, SEEDS};
use echograd::device::gpu::Gpu;
use echograd::features::{MaskSums, Moments, ShapeFeatures};
use echograd::gradcheck::{self, Sampler};
use echograd::ops::mask_head::MaskHead;
use echograd::ops::registry;
use echograd::tape::{Options, Plan, Tape};
use echograd::tensor::Shape;
use half::bf16;

/// Launches with a list of arguments, each a variable that outlives the launch.
macro_rules! launch {
    ($name:expr, $blocks:expr $(, $argument:expr)* $(,)?) => {{
        let mut arguments: Vec<*mut c_void> = vec![$((&raw const $argument).cast_mut().cast()),*];
        // SAFETY: as the kernels of kernels/mask_head.cu declare.
        unsafe { emulator::launch($name, [$blocks, 1, 1], [THREADS, 1, 1], 0, &mut arguments) }
    }};
}

const THREADS: u32 = 128;

/// How an image is cut up.
#[derive(Clone, Copy, Debug)]
struct Cut {
    rows: i32,
    lanes: i32,
}

impl Cut {
    /// As the operation does it.
    fn usual(shape: Shape, rows: i32) -> Self {
        let lanes = shape.w.div_ceil(8).next_power_of_two().clamp(2, 32) as i32;
        Self { rows, lanes }
    }

    fn pieces(self, shape: Shape) -> u32 {
        let strips = shape.w.div_ceil(8 * self.lanes as usize);
        (shape.n * shape.h.div_ceil(self.rows as usize) * strips) as u32
    }

    fn blocks(self, shape: Shape) -> u32 {
        self.pieces(shape).div_ceil(THREADS / self.lanes as u32)
    }
}

/// Logits and truth as a GPU holds them; `offset` elements lie before them.
struct Inputs {
    shape: Shape,
    logits: Buffer,
    truth: Buffer,
    narrow: bool,
    offset: usize,
}

/// Copies `values` behind `offset` elements, as bf16 if `narrow`.
fn stored(values: &[f32], narrow: bool, offset: usize) -> Result<Buffer> {
    let padded: Vec<f32> = std::iter::repeat_n(f32::NAN, offset)
        .chain(values.iter().copied())
        .collect();
    if narrow {
        Buffer::from_slice(
            &padded
                .iter()
                .map(|&x| bf16::from_f32(x).to_bits())
                .collect::<Vec<_>>(),
        )
    } else {
        Buffer::from_slice(&padded)
    }
}

impl Inputs {
    fn new(
        shape: Shape,
        logits: &[f32],
        truth: &[f32],
        narrow: bool,
        offset: usize,
    ) -> Result<Self> {
        Ok(Self {
            shape,
            logits: stored(logits, narrow, offset)?,
            truth: stored(truth, narrow, offset)?,
            narrow,
            offset,
        })
    }

    fn address(&self, buffer: &Buffer) -> *mut c_void {
        buffer
            .address()
            .wrapping_byte_add(self.offset * if self.narrow { 2 } else { 4 })
    }

    fn kernel(&self, name: &str) -> String {
        let any = !self.shape.w.is_multiple_of(8) || !self.offset.is_multiple_of(8);
        let kind = if self.narrow { "bf16" } else { "f32" };
        format!("{name}{}_{kind}", if any { "_any" } else { "" })
    }

    /// The five outputs.
    fn forward(&self, sharpness: f32, cut: Cut) -> Result<[Vec<f32>; 5]> {
        let s = self.shape;
        let (pieces, images) = (cut.pieces(s), s.n as u32);
        let partials = Buffer::new(64 * pieces as usize)?;
        let (h, w) = (s.h as i32, s.w as i32);
        let (z, g) = (self.address(&self.logits), self.address(&self.truth));
        let sums = partials.address();
        launch!(
            &self.kernel("mask_head_bands"),
            cut.blocks(s),
            z,
            g,
            sums,
            pieces,
            h,
            w,
            cut.rows,
            cut.lanes,
            sharpness
        )?;
        let outputs = [1, 1, 3, 7, 1].map(|k| Buffer::new(4 * k * s.n).unwrap());
        let [ce, dice, overlap, moments, perimeter] =
            [0, 1, 2, 3, 4].map(|o: usize| outputs[o].address());
        launch!(
            "mask_head_finish",
            images.div_ceil(4),
            sums,
            ce,
            dice,
            overlap,
            moments,
            perimeter,
            images,
            h,
            w,
            cut.rows,
            cut.lanes
        )?;
        Ok(outputs.map(|b| b.to_vec()))
    }

    /// The gradient, for the sums of the forward pass and gradients of outputs 0, 1, 3 and 4.
    fn gradient(
        &self,
        sharpness: f32,
        cut: Cut,
        found: &[Vec<f32>; 5],
        asked: &[Vec<f32>; 4],
    ) -> Result<Vec<f32>> {
        let s = self.shape;
        let (pieces, h, w) = (cut.pieces(s), s.h as i32, s.w as i32);
        let size = if self.narrow { 2 } else { 4 };
        let dlogits = Buffer::new((s.len() + self.offset) * size)?;
        let (z, g, dz) = (
            self.address(&self.logits),
            self.address(&self.truth),
            self.address(&dlogits),
        );
        let buffers: Vec<Buffer> = [&found[2], &found[3]]
            .into_iter()
            .chain(asked)
            .map(|v| Buffer::from_slice(v))
            .collect::<Result<_>>()?;
        let [overlap, moments, de, dd, dm, dp]: [*mut c_void; 6] =
            std::array::from_fn(|i| buffers[i].address());
        launch!(
            &self.kernel("mask_head_gradient"),
            cut.blocks(s),
            z,
            g,
            overlap,
            moments,
            de,
            dd,
            dm,
            dp,
            dz,
            pieces,
            h,
            w,
            cut.rows,
            cut.lanes,
            sharpness
        )?;
        Ok(if self.narrow {
            dlogits.to_vec::<u16>()[self.offset..]
                .iter()
                .map(|&b| bf16::from_bits(b).to_f32())
                .collect()
        } else {
            dlogits.to_vec::<f32>()[self.offset..].to_vec()
        })
    }
}

/// Outputs and gradient by the CPU's code in f64.
fn reference(
    shape: Shape,
    sharpness: f64,
    logits: &[f32],
    truth: &[f32],
    asked: &[Vec<f32>; 4],
) -> Result<(Vec<Vec<f64>>, Vec<f64>)> {
    let mut tape = Tape::new();
    let (z, g) = (tape.input("logits", shape), tape.input("truth", shape));
    let outputs = tape.push_all(MaskHead { sharpness }, &[z, g])?;
    outputs.iter().for_each(|&o| tape.keep(o));
    let wanted = [0, 1, 3, 4].map(|o| outputs[o]);
    let seeds = wanted.map(|o| tape.input("seed", tape.shape(o)));
    let pairs: Vec<_> = wanted.into_iter().zip(seeds).collect();
    let gradient = tape.backward_from(&pairs, &[z])?[0].unwrap();
    tape.keep(gradient);
    let mut session = Session::<f64>::new(Plan::new(&tape, Options::default())?)?;
    let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    session.write(z, &wide(logits));
    session.write(g, &wide(truth));
    for (seed, asked) in seeds.into_iter().zip(asked) {
        session.write(seed, &wide(asked));
    }
    session.run();
    let values = outputs.iter().map(|&o| session.read(o).to_vec()).collect();
    Ok((values, session.read(gradient).to_vec()))
}

/// Uniform numbers, the same for the same salt.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, low: f32, high: f32) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        low + (high - low) * ((self.0 >> 40) as f32 / (1 << 24) as f32)
    }
    fn many(&mut self, count: usize, low: f32, high: f32) -> Vec<f32> {
        (0..count).map(|_| self.next(low, high)).collect()
    }
}

/// One batch cut in one way.
#[derive(Clone, Copy, Debug)]
struct Problem {
    shape: Shape,
    sharpness: f32,
    narrow: bool,
    offset: usize,
    rows: i32,
    salt: u64,
}

/// Runs the kernels under two seeds, holds them to the reference, and wants the same bits of both.
fn check(p: Problem) -> Result<()> {
    let mut numbers = Numbers(p.salt);
    let round = |x: Vec<f32>| match p.narrow {
        true => x.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect(),
        false => x,
    };
    let logits = round(numbers.many(p.shape.len(), -6.0, 6.0));
    let truth = round(numbers.many(p.shape.len(), 0.0, 1.0));
    let asked = [1, 1, 7, 1].map(|k| numbers.many(k * p.shape.n, -1.0, 1.0));
    let expected = reference(p.shape, f64::from(p.sharpness), &logits, &truth, &asked)?;

    let inputs = Inputs::new(p.shape, &logits, &truth, p.narrow, p.offset)?;
    let cut = Cut::usual(p.shape, p.rows);
    let run = |seed| {
        emulator::with_seed(seed, || {
            let found = inputs.forward(p.sharpness, cut)?;
            let dlogits = inputs.gradient(p.sharpness, cut, &found, &asked)?;
            Ok((found, dlogits))
        })
    };
    let (found, dlogits) = run(p.salt)?;
    let again = run(p.salt + 1)?;
    assert_eq!((&found, &dlogits), (&again.0, &again.1), "{p:?}");

    for (o, (found, expected)) in found.iter().zip(&expected.0).enumerate() {
        let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        for (&a, &b) in found.iter().zip(expected) {
            let error = (f64::from(a) - b).abs();
            assert!(error <= 1e-5 * largest, "{p:?}: output {o}: {a} for {b}");
        }
    }
    let largest = expected.1.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let tolerance = if p.narrow { 1.0 / 256.0 } else { 0.0 } + 1e-4;
    for (i, (&a, &b)) in dlogits.iter().zip(&expected.1).enumerate() {
        let error = (f64::from(a) - b).abs();
        assert!(
            error <= tolerance * b.abs().max(1e-3 * largest),
            "{p:?}: derivative {i}: {a} for {b}"
        );
    }
    Ok(())
}

#[test]
fn outputs_and_gradients_at_all_sizes() -> Result<()> {
    // Around the eight columns of a lane, the 256 of a strip, and the rows of a band.
    let sizes = [
        (1, 1),
        (1, 8),
        (8, 1),
        (2, 7),
        (3, 16),
        (9, 24),
        (17, 33),
        (16, 130),
        (13, 248),
        (18, 256),
        (9, 257),
        (7, 264),
        (5, 520),
    ];
    for (case, (h, w)) in sizes.into_iter().enumerate() {
        for (k, narrow) in [false, true].into_iter().enumerate() {
            check(Problem {
                shape: Shape::new(1 + (case + k) % 3, h, w, 1),
                sharpness: [3.0, 1.7, 3.0][(case + k) % 3],
                narrow,
                offset: if case % 4 == 1 { 3 } else { 0 },
                rows: [8, 2, 16, 32][(case + 2 * k) % 4],
                salt: (2 * case + k) as u64,
            })?;
        }
    }
    Ok(())
}

#[test]
fn every_seed_and_random_cuts() -> Result<()> {
    let mut numbers = Numbers(99);
    for seed in SEEDS {
        for narrow in [false, true] {
            let [n, h, w, rows] =
                [4.0, 40.0, 70.0, 20.0].map(|most| numbers.next(1.0, most) as usize);
            check(Problem {
                shape: Shape::new(n, h, w * [1, 8][usize::from(narrow)], 1),
                sharpness: if numbers.next(0.0, 1.0) < 0.5 {
                    3.0
                } else {
                    2.5
                },
                narrow,
                offset: 0,
                rows: rows.max(2) as i32,
                salt: seed,
            })?;
        }
    }
    Ok(())
}

#[test]
fn the_gradient_of_hard_truths_keeps_its_digits_in_both_tails() -> Result<()> {
    let shape = Shape::new(1, 8, 200, 1);
    // Every tail meets both truths.
    let logits: Vec<f32> = (0..shape.len())
        .map(|i| {
            let size = 8.0 + 12.0 * (i / 4) as f32 / (shape.len() / 4 - 1) as f32;
            if i % 2 == 0 { size } else { -size }
        })
        .collect();
    let truth: Vec<f32> = (0..shape.len()).map(|i| (i / 2 % 2) as f32).collect();
    // Cross-entropy alone: nothing larger hides it.
    let asked = [vec![1.0], vec![0.0], vec![0.0; 7], vec![0.0]];
    for sharpness in [3.0, 1.7] {
        let of_the_cpu = reference(shape, f64::from(sharpness), &logits, &truth, &asked)?.1;
        let inputs = Inputs::new(shape, &logits, &truth, false, 0)?;
        let cut = Cut::usual(shape, 8);
        let found = inputs.forward(sharpness, cut)?;
        let dlogits = inputs.gradient(sharpness, cut, &found, &asked)?;
        for (i, (&a, &b)) in dlogits.iter().zip(&of_the_cpu).enumerate() {
            let z = f64::from(logits[i]);
            // σ(z) − 1 = −σ(−z).
            let sign = 1.0 - 2.0 * f64::from(truth[i]);
            let exact = sign / (1.0 + (-sign * z).exp()) / shape.len() as f64;
            let problem = format!("κ = {sharpness}, z = {z}, g = {}", truth[i]);
            assert!(
                (b / exact - 1.0).abs() <= 1e-12,
                "{problem}: the CPU's {b} for {exact}"
            );
            assert!(
                (f64::from(a) / exact - 1.0).abs() <= 1e-4,
                "{problem}: {a} for {exact}"
            );
        }
    }
    Ok(())
}

/// Features of image `i`.
fn features(found: &[Vec<f32>; 5], i: usize) -> (MaskSums, Option<[f64; 4]>) {
    let m: [f64; 7] = std::array::from_fn(|k| f64::from(found[3][7 * i + k]));
    let [area, energy, x, y, xx, yy, xy] = m;
    let sums = MaskSums {
        moments: Moments {
            area,
            energy,
            x,
            y,
            xx,
            yy,
            xy,
        },
        perimeter: f64::from(found[4][i]),
    };
    (sums, sums.features().map(ShapeFeatures::to_array))
}

/// Logits of masks of 256×256, each from `inside(x, y)` with x, y from the centre.
fn masks(masks: &[&dyn Fn(f64, f64) -> f32]) -> Vec<f32> {
    let pixel = |i: usize| ((i % 256) as f64 - 127.5, (i / 256) as f64 - 127.5);
    masks
        .iter()
        .flat_map(|mask| (0..65_536).map(|i| mask(pixel(i).0, pixel(i).1)))
        .collect()
}

#[test]
fn check_values_of_hard_masks() -> Result<()> {
    let hard = |inside: bool| if inside { 20.0 } else { -20.0 };
    let ellipse = |x: f64, y: f64| hard((x / 80.0).powi(2) + (y / 40.0).powi(2) < 1.0);
    let half = std::f64::consts::FRAC_1_SQRT_2;
    let logits = masks(&[
        &|x, y| hard(x.hypot(y) < 60.0),
        &ellipse,
        &|x, y| ellipse(y, x),
        &|x, y| ellipse(half * (x + y), half * (y - x)),
        &|x, y| hard(x.abs() < 50.0 && y.abs() < 50.0),
        &|x, y| hard(x.hypot(y) < 60.0 * (1.0 + 0.3 * (8.0 * y.atan2(x)).cos())),
        &|x, y| hard((x + 107.5).hypot(y + 97.5) < 5.0),
        &|_, _| hard(true),
        &|_, _| 0.0,
    ]);
    // Area, perimeter, irregularity, orientation, margin, roundness.
    let expected = [
        [11304.0, 383.09, 0.0163, 0.0, 0.0081, 1.0],
        [10068.0, 394.80, 0.1039, -0.5994, 0.0090, 0.8004],
        [10068.0, 394.80, 0.1039, 0.5994, 0.0090, 0.8004],
        [10050.0, 393.54, 0.1017, 0.0, 0.0078, 0.8003],
        [10000.0, 397.19, 0.1132, 0.0, 0.0453, 1.0],
        [11836.0, 728.87, 0.5625, 0.0, 0.2726, 1.0],
        [69.0, 29.46, 0.0005, 0.0, -0.0016, 1.0],
        [65536.0, 1019.94, 0.1163, 0.0, 0.0468, 1.0],
        [32768.0, 508.95, 0.1143, 0.0, -0.2920, 1.0],
    ];
    let shape = Shape::new(9, 256, 256, 1);
    for narrow in [false, true] {
        let inputs = Inputs::new(shape, &logits, &vec![0.0; shape.len()], narrow, 0)?;
        let found = inputs.forward(3.0, Cut::usual(shape, 32))?;
        for (i, expected) in expected.iter().enumerate() {
            let (sums, features) = features(&found, i);
            let all = [sums.moments.area, sums.perimeter];
            let all = all.into_iter().chain(features.unwrap());
            for (k, (found, expected)) in all.zip(expected).enumerate() {
                let printed = [0.5, 0.005, 5e-5, 5e-5, 5e-5, 5e-5][k];
                assert!(
                    (found - expected).abs() <= printed + 1e-6,
                    "mask {i}: {found} for {expected}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn features_of_small_lesions_anywhere() -> Result<()> {
    // Soft discs of radius 5 in a frame of two strips, at its corners and at borders of lanes, strips
    // and bands, each in a haze that σ(3z) all but removes.
    let (h, w) = (70, 300);
    let centres = [
        (5, 5),
        (294, 64),
        (255, 31),
        (256, 32),
        (7, 47),
        (128, 16),
        (296, 2),
        (251, 69),
    ];
    let shape = Shape::new(centres.len(), h, w, 1);
    let logit = |i: usize| {
        let (x, y) = centres[i / (h * w)];
        let (dx, dy) = ((i % w) as f32 - x as f32, (i / w % h) as f32 - y as f32);
        (4.0 * (5.4 - dx.hypot(0.9 * dy))).clamp(-4.5, 9.0)
    };
    for narrow in [false, true] {
        let logits: Vec<f32> = match narrow {
            true => (0..shape.len())
                .map(|i| bf16::from_f32(logit(i)).to_f32())
                .collect(),
            false => (0..shape.len()).map(logit).collect(),
        };
        let truth = vec![0.0; shape.len()];
        let zeros = [1, 1, 7, 1].map(|k| vec![0.0; k * shape.n]);
        let (expected, _) = reference(shape, 3.0, &logits, &truth, &zeros)?;
        let found =
            Inputs::new(shape, &logits, &truth, narrow, 0)?.forward(3.0, Cut::usual(shape, 32))?;
        for (i, centre) in centres.iter().enumerate() {
            let (sums, features) = features(&found, i);
            let mut exact = sums;
            exact.moments =
                bytemuck::cast(std::array::from_fn::<f64, 7, _>(|k| expected[3][7 * i + k]));
            exact.perimeter = expected[4][i];
            let (found, exact) = (features.unwrap(), exact.features().unwrap().to_array());
            for (a, b) in found.iter().zip(exact) {
                assert!(
                    (a - b).abs() <= 1e-5,
                    "lesion at {centre:?}: {found:?} for {exact:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_not_finite_reaches_every_output() -> Result<()> {
    let shape = Shape::new(3, 20, 24, 1);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for narrow in [false, true] {
            for sharpness in [3.0, 2.0] {
                let mut logits = Numbers(7).many(shape.len(), -3.0, 3.0);
                let at = shape.pixels() + 5 * 24 + 9;
                logits[at] = bad;
                let truth = vec![0.5; shape.len()];
                let inputs = Inputs::new(shape, &logits, &truth, narrow, 0)?;
                let cut = Cut::usual(shape, 8);
                let found = inputs.forward(sharpness, cut)?;
                let asked = [1, 1, 7, 1].map(|k| vec![1.0; k * shape.n]);
                let dlogits = inputs.gradient(sharpness, cut, &found, &asked)?;
                for image in 0..3 {
                    let faulty = image == 1;
                    assert_eq!(found[0][image].is_finite(), !faulty, "{bad}: cross-entropy");
                    let rest = [(1, 1, 1), (2, 3, 2), (3, 7, 7), (4, 1, 1)];
                    for (o, stride, k) in rest {
                        // A sigmoid makes infinities finite, and Σg knows nothing of logits.
                        let values = &found[o][stride * image..][..k];
                        let expected = faulty && bad.is_nan();
                        assert!(
                            values.iter().all(|x| x.is_nan() == expected),
                            "{bad}: {o}: {values:?}"
                        );
                    }
                    let d = &dlogits[image * shape.pixels()..][..shape.pixels()];
                    assert_eq!(
                        d.iter().any(|x| x.is_nan()),
                        faulty && bad.is_nan(),
                        "{bad}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_operation_launches_them() -> Result<()> {
    let gpu = Gpu::emulator()?;
    let entry = registry()
        .into_iter()
        .find(|e| e.name == "mask_head")
        .unwrap();
    for seed in 0..12 {
        for narrow in [false, true] {
            let case = (entry.case)(&mut Sampler::new(seed));
            let outcome = gradcheck::check_on(&gpu, &case, seed, narrow)?;
            assert!(
                outcome.mismatch.is_none(),
                "{}: {:?}",
                case.description,
                outcome.mismatch
            );
        }
    }
    Ok(())
}

#[test]
fn a_batch_without_images_is_refused() {
    let mut tape = Tape::new();
    let [z, g] = ["logits", "truth"].map(|name| tape.input(name, Shape::new(0, 16, 24, 1)));
    let refused = tape.push_all(MaskHead::default(), &[z, g]).unwrap_err();
    assert!(
        refused.to_string().contains("at least one image"),
        "{refused}"
    );
}
