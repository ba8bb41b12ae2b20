//! The emulator against plain loops, and against bugs planted for it to find.
#![cfg(feature = "emulator")]

use std::ffi::c_void;

use echograd::Result;
use echograd::device::emulator::{self, Buffer, SEEDS};
use echograd::device::philox::Philox;

/// Launches with a list of arguments, each a variable that outlives the launch.
macro_rules! launch {
    ($name:expr, $grid:expr, $block:expr, $shared:expr $(, $argument:expr)* $(,)?) => {{
        let mut arguments: Vec<*mut c_void> = vec![$((&raw const $argument).cast_mut().cast()),*];
        // SAFETY: the tests pass what the kernels of kernels/selftest declare.
        unsafe { emulator::launch($name, $grid, $block, $shared, &mut arguments) }
    }};
}

/// Numbers in [-1, 1) that are multiples of 2⁻⁶, so that sums of a few products are exact.
fn numbers(count: usize, salt: u32) -> Vec<f32> {
    let value = |i: usize| {
        let bits = (i as u32 ^ salt.rotate_left(16)).wrapping_mul(0x9e37_79b1);
        (bits >> 25) as f32 / 64.0 - 1.0
    };
    (0..count).map(value).collect()
}

fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// c = a·b, row-major, in f64.
fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let cell = |i: usize| {
        let (row, column) = (i / n, i % n);
        let term = |l: usize| f64::from(a[row * k + l]) * f64::from(b[l * n + column]);
        (0..k).map(term).sum::<f64>() as f32
    };
    (0..m * n).map(cell).collect()
}

/// Runs a test under every seed.
fn under_seeds(test: impl Fn() -> Result<()>) {
    for seed in SEEDS {
        emulator::with_seed(seed, &test).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn block_sums_are_exact_sums() {
    let (blocks, each) = (7, 1001_i32);
    let x = numbers(blocks * each as usize, 1);
    let expected: Vec<f32> = x.chunks(each as usize).map(|c| c.iter().sum()).collect();
    under_seeds(|| {
        let (input, output) = (Buffer::from_slice(&x)?, Buffer::new(4 * blocks)?);
        let (px, py) = (input.address(), output.address());
        launch!(
            "selftest_block_sum",
            [blocks as u32, 1, 1],
            [256, 1, 1],
            0,
            px,
            py,
            each
        )?;
        assert_eq!(output.to_vec::<f32>(), expected);
        Ok(())
    });
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn warp_sums_are_exact_sums() {
    let warps = 9_i32;
    let x = numbers(32 * warps as usize, 2);
    let expected: Vec<f32> = x.chunks(32).map(|c| c.iter().sum()).collect();
    under_seeds(|| {
        let (input, output) = (Buffer::from_slice(&x)?, Buffer::new(4 * warps as usize)?);
        let (px, py) = (input.address(), output.address());
        launch!(
            "selftest_warp_sum",
            [3, 1, 1],
            [128, 1, 1],
            0,
            px,
            py,
            warps
        )?;
        assert_eq!(output.to_vec::<f32>(), expected);
        Ok(())
    });
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn tiled_product_with_1024_threads() {
    let n = 45_usize;
    let (a, b) = (numbers(n * n, 3), numbers(n * n, 4));
    let expected = product(&a, &b, n, n, n);
    under_seeds(|| {
        let (left, right) = (Buffer::from_slice(&a)?, Buffer::from_slice(&b)?);
        let output = Buffer::new(4 * n * n)?;
        let (pa, pb, pc, size) = (left.address(), right.address(), output.address(), n as i32);
        launch!(
            "selftest_matmul",
            [2, 2, 1],
            [32, 32, 1],
            0,
            pa,
            pb,
            pc,
            size
        )?;
        assert_eq!(output.to_vec::<f32>(), expected);
        Ok(())
    });
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn tensor_core_product_with_asynchronous_copies() {
    let (m, n, k) = (50_usize, 40_usize, 72_usize);
    let (a, b) = (numbers(m * k, 5), numbers(k * n, 6));
    let halves = |x: &[f32]| x.iter().map(|&x| to_bf16(x)).collect::<Vec<_>>();
    let expected = product(&a, &b, m, n, k);
    under_seeds(|| {
        let (left, right) = (
            Buffer::from_slice(&halves(&a))?,
            Buffer::from_slice(&halves(&b))?,
        );
        let output = Buffer::new(4 * m * n)?;
        let (pa, pb, pc) = (left.address(), right.address(), output.address());
        let (im, in_, ik) = (m as i32, n as i32, k as i32);
        launch!(
            "selftest_gemm",
            [2, 2, 1],
            [128, 1, 1],
            0,
            pa,
            pb,
            pc,
            im,
            in_,
            ik
        )?;
        assert_eq!(output.to_vec::<f32>(), expected);
        Ok(())
    });
}

/// The published known answers (src/device/philox.rs), and blocks of the host's streams.
#[test]
fn random_numbers_are_those_of_the_host() {
    let published = [
        (
            0,
            0,
            0,
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        ),
        (
            u64::MAX,
            u64::MAX,
            u64::MAX,
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            0x299f_31d0_a409_3822,
            0x0370_7344_1319_8a2e,
            0x85a3_08d3_243f_6a88,
            [0xd16c_fe09_u32, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    let blocks = |seed: u64, stream: u64, counters: &[u64]| -> Result<Vec<[u32; 4]>> {
        let from = Buffer::from_slice(counters)?;
        let to = Buffer::new(16 * counters.len())?;
        let (pf, pt, count) = (from.address(), to.address(), counters.len() as i32);
        launch!(
            "selftest_philox",
            [counters.len().div_ceil(32) as u32, 1, 1],
            [32, 1, 1],
            0,
            seed,
            stream,
            pf,
            pt,
            count
        )?;
        Ok(to.to_vec())
    };
    under_seeds(|| {
        for (seed, stream, counter, words) in published {
            assert_eq!(blocks(seed, stream, &[counter])?, [words]);
        }
        let counters: Vec<u64> = (0..70).map(|i| i << (i % 40)).collect();
        let host = Philox::new(11, 5 << 32 | 7);
        let expected: Vec<[u32; 4]> = counters.iter().map(|&i| host.block(i)).collect();
        assert_eq!(blocks(11, 5 << 32 | 7, &counters)?, expected);
        Ok(())
    });
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn fragments_of_tf32_and_f16() -> Result<()> {
    let (a, b) = (numbers(16 * 8, 7), numbers(8 * 8, 8));
    let (left, right) = (Buffer::from_slice(&a)?, Buffer::from_slice(&b)?);
    let output = Buffer::new(4 * 16 * 8)?;
    let (pa, pb, pd) = (left.address(), right.address(), output.address());
    launch!("selftest_mma_tf32", [1, 1, 1], [32, 1, 1], 0, pa, pb, pd)?;
    assert_eq!(output.to_vec::<f32>(), product(&a, &b, 16, 8, 8));

    // Multiples of 1/64 in [-1, 1) as halves: exponent and fraction by hand.
    let half = |x: &f32| {
        let bits = x.to_bits();
        let exponent = (bits >> 23 & 255) as i32 - 127 + 15;
        let magnitude = if *x == 0.0 {
            0
        } else {
            (exponent as u32) << 10 | bits >> 13 & 1023
        };
        (bits >> 16 & 0x8000 | magnitude) as u16
    };
    let (a, b) = (numbers(16 * 16, 9), numbers(16 * 8, 10));
    let left = Buffer::from_slice(&a.iter().map(half).collect::<Vec<_>>())?;
    let right = Buffer::from_slice(&b.iter().map(half).collect::<Vec<_>>())?;
    let (pa, pb) = (left.address(), right.address());
    launch!("selftest_mma_f16", [1, 1, 1], [32, 1, 1], 0, pa, pb, pd)?;
    assert_eq!(output.to_vec::<f32>(), product(&a, &b, 16, 8, 16));
    Ok(())
}

/// How a matrix of 64 rows and 16 of k may lie in shared memory, by the figures of the PTX manual ("Shared Memory Matrix
/// Layout" of wgmma): mode of the swizzle, rows of the other index than k, strides in bytes, and where an element is.
struct Layout {
    mode: u64,
    transposed: bool,
    leading: u64,
    stride: u64,
    place: fn(usize, usize) -> usize,
}

/// Rows of k, with the eights of rows one after another: of 128, 64, 32 bytes, and blocks of 8 rows of 16 bytes.
/// Rows of the other index, likewise.
const LAYOUTS: [Layout; 7] = [
    Layout {
        mode: 1,
        transposed: false,
        leading: 16,
        stride: 1024,
        place: |row, k| row * 128 + ((k / 8) ^ (row % 8)) * 16 + k % 8 * 2,
    },
    Layout {
        mode: 2,
        transposed: false,
        leading: 16,
        stride: 512,
        place: |row, k| row * 64 + ((k / 8) ^ (row / 2 % 4)) * 16 + k % 8 * 2,
    },
    Layout {
        mode: 3,
        transposed: false,
        leading: 16,
        stride: 256,
        place: |row, k| row * 32 + ((k / 8) ^ (row / 4 % 2)) * 16 + k % 8 * 2,
    },
    Layout {
        mode: 0,
        transposed: false,
        leading: 128,
        stride: 256,
        place: |row, k| row / 8 * 256 + k / 8 * 128 + row % 8 * 16 + k % 8 * 2,
    },
    Layout {
        mode: 1,
        transposed: true,
        leading: 4096,
        stride: 1024,
        place: |row, k| k * 128 + ((row / 8) ^ (k % 8)) * 16 + row % 8 * 2,
    },
    Layout {
        mode: 2,
        transposed: true,
        leading: 1024,
        stride: 512,
        place: |row, k| row / 32 * 1024 + k * 64 + ((row / 8 % 4) ^ (k / 2 % 4)) * 16 + row % 8 * 2,
    },
    Layout {
        mode: 0,
        transposed: true,
        leading: 1024,
        stride: 128,
        place: |row, k| k / 8 * 1024 + row / 8 * 128 + k % 8 * 16 + row % 8 * 2,
    },
];

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn warpgroups_read_matrices_as_descriptors_say() {
    const B: usize = 8192;
    let (a, b) = (numbers(64 * 16, 12), numbers(16 * 64, 13));
    let expected = product(&a, &b, 64, 64, 16);
    for (number, layout) in LAYOUTS.iter().enumerate() {
        let mut image = vec![0x7fff_u16; 8192];
        for row in 0..64 {
            for k in 0..16 {
                image[(layout.place)(row, k) / 2] = to_bf16(a[row * 16 + k]);
                image[(B + (layout.place)(row, k)) / 2] = to_bf16(b[k * 64 + row]);
            }
        }
        let run = |mode: u64, leading: u64, stride: u64, transposed: bool| {
            let (from, to) = (Buffer::from_slice(&image)?, Buffer::new(4 * 64 * 64)?);
            let left = ((leading / 16) << 16) | ((stride / 16) << 32) | (mode << 62);
            let right = left + B as u64 / 16;
            let (pf, pt, transposed) = (from.address(), to.address(), i32::from(transposed));
            launch!(
                "selftest_wgmma",
                [1, 1, 1],
                [128, 1, 1],
                16_384,
                pf,
                left,
                right,
                transposed,
                pt
            )?;
            Ok::<_, echograd::Error>(to.to_vec::<f32>())
        };
        let Layout {
            mode,
            transposed,
            leading,
            stride,
            ..
        } = *layout;
        under_seeds(|| {
            let found = run(mode, leading, stride, transposed)?;
            assert_eq!(found, expected, "layout {number}");
            Ok(())
        });
        // Rows of one block have no leading stride.
        let wrong = (0..4)
            .map(|other| (other, leading, stride, transposed))
            .filter(|wrong| wrong.0 != mode)
            .chain([
                (mode, leading, 2 * stride, transposed),
                (mode, leading, stride, !transposed),
            ])
            .chain((mode == 0 || mode == 2 && transposed).then_some((
                mode,
                2 * leading,
                stride,
                transposed,
            )));
        for (mode, leading, stride, transposed) in wrong {
            let found = run(mode, leading, stride, transposed);
            assert!(
                !found.is_ok_and(|found| found == expected),
                "layout {number} as {mode}, {leading}, {stride}, {transposed}"
            );
        }
    }
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn rounding_of_bf16_and_tf32() -> Result<()> {
    // Exact, halfway to even and to odd, beyond halfway, overflow to infinity, subnormal, special.
    let cases: [(u32, u16, u32); 10] = [
        (0x3f80_0000, 0x3f80, 0x3f80_0000),
        (0x3f80_8000, 0x3f80, 0x3f80_8000),
        (0x3f81_8000, 0x3f82, 0x3f81_8000),
        (0x3f80_8001, 0x3f81, 0x3f80_8000),
        (0x3f80_1000, 0x3f80, 0x3f80_2000),
        (0x3f80_0fff, 0x3f80, 0x3f80_0000),
        (0xff7f_ffff, 0xff80, 0xff80_0000),
        (0x0000_8001, 0x0001, 0x0000_8000),
        (0x7f80_0000, 0x7f80, 0x7f80_0000),
        (0x7fc0_0001, 0x7fff, 0x7fc0_0001),
    ];
    let n = cases.len() as i32;
    let x = Buffer::from_slice(&cases.map(|(x, _, _)| x))?;
    let (y, z) = (Buffer::new(2 * cases.len())?, Buffer::new(4 * cases.len())?);
    let pairs = Buffer::new(2 * cases.len())?;
    let (px, py, pz, pp) = (x.address(), y.address(), z.address(), pairs.address());
    launch!(
        "selftest_round",
        [1, 1, 1],
        [256, 1, 1],
        0,
        px,
        py,
        pz,
        pp,
        n
    )?;
    assert_eq!(y.to_vec::<u16>(), cases.map(|(_, y, _)| y));
    assert_eq!(z.to_vec::<u32>(), cases.map(|(_, _, z)| z));
    assert_eq!(pairs.to_vec::<u16>(), cases.map(|(_, y, _)| y));
    Ok(())
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn histogram_by_integer_atomics() {
    let x: Vec<u32> = (0..3000_u32)
        .map(|i| i.wrapping_mul(2_654_435_761) >> 28)
        .collect();
    let mut expected = vec![0_u32; 16];
    x.iter().for_each(|&v| expected[v as usize] += 1);
    under_seeds(|| {
        let (input, counts) = (Buffer::from_slice(&x)?, Buffer::from_slice(&[0_u32; 16])?);
        let (px, pc, n) = (input.address(), counts.address(), x.len() as i32);
        launch!("selftest_histogram", [5, 1, 1], [128, 1, 1], 0, px, pc, n)?;
        assert_eq!(counts.to_vec::<u32>(), expected);
        Ok(())
    });
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn warp_operations() {
    let x: Vec<u32> = (0..32_u32).map(|i| i * i % 101).collect();
    let lanes = 0..32_usize;
    let ballot =
        |p: &dyn Fn(usize) -> bool| lanes.clone().fold(0_u32, |b, i| b | u32::from(p(i)) << i);
    let row = |f: &dyn Fn(usize) -> u32| lanes.clone().map(f).collect::<Vec<_>>();
    let expected = [
        row(&|i| x[(5 * i + 3) % 32]),
        row(&|i| if i % 8 < 3 { x[i] } else { x[i - 3] }),
        row(&|i| if i % 16 + 3 > 15 { x[i] } else { x[i + 3] }),
        row(&|i| x[i ^ 9]),
        row(&|_| ballot(&|i| x[i].is_multiple_of(3))),
        row(&|_| u32::from(x.contains(&7))),
        row(&|_| 1),
        row(&|i| ballot(&|j| x[j] % 4 == x[i] % 4)),
        row(&|_| x.iter().sum()),
        row(&|_| *x.iter().max().unwrap()),
        row(&|_| (*x.iter().min().unwrap() as i32 - 50) as u32),
    ]
    .concat();
    under_seeds(|| {
        let (input, output) = (Buffer::from_slice(&x)?, Buffer::new(4 * expected.len())?);
        let (px, po) = (input.address(), output.address());
        launch!("selftest_warp", [1, 1, 1], [32, 1, 1], 0, px, po)?;
        assert_eq!(output.to_vec::<u32>(), expected);
        Ok(())
    });
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn votes_of_a_block() {
    let x: Vec<i32> = (0..96).map(|i| i % 13 - 6).collect();
    let expected = [x.iter().filter(|&&v| v > 0).count() as i32, 1, 1];
    under_seeds(|| {
        let (input, output) = (Buffer::from_slice(&x)?, Buffer::new(12)?);
        let (px, po) = (input.address(), output.address());
        launch!("selftest_block_votes", [1, 1, 1], [96, 1, 1], 0, px, po)?;
        assert_eq!(output.to_vec::<i32>(), expected);
        Ok(())
    });
}

/// Threads of each pair of kernels in kernels/selftest/planted.cu, texts of which the report of its bad
/// one must contain one, and the line that it must name. Without a barrier a thread may as well find
/// what nobody has written yet as what somebody is writing.
const PLANTED: [(&str, u32, &[&str], &str); 21] = [
    (
        "block_barrier",
        128,
        &["race: ", "uninitialised: "],
        "y[i] = tile[127 - i];",
    ),
    (
        "warp_barrier",
        32,
        &["race: ", "uninitialised: "],
        "y[i] = tile[i ^ 1];",
    ),
    ("warp_reuse", 32, &["race: "], "float other = tile[i ^ 1];"),
    (
        "buffer_reuse",
        128,
        &["race: "],
        "sum += stages[step % 2][127 - i];",
    ),
    ("early_read", 32, &["race: "], "y[i] = tile[31 - i];"),
    (
        "shared_index",
        64,
        &["at byte 256 of shared array tile"],
        "y[i] = row[",
    ),
    (
        "row_index",
        64,
        &["out of bounds: index 16 of an array"],
        "? tile[i / 16]",
    ),
    (
        "global_index",
        96,
        &["at byte 256 of a buffer of 256"],
        "y[i] = x[i];",
    ),
    (
        "uninitialised",
        32,
        &["uninitialised: reads byte 124"],
        "sum += tile[k];",
    ),
    (
        "divergent_barrier",
        64,
        &["waits in __syncthreads for thread (32,0,0), which has returned"],
        "__syncthreads();",
    ),
    (
        "two_barriers",
        64,
        &["waits in another __syncthreads"],
        "__syncthreads();",
    ),
    (
        "divergent_shuffle",
        32,
        &["divergence: "],
        "__shfl_xor_sync",
    ),
    (
        "misaligned",
        8,
        &["misaligned: "],
        "reinterpret_cast<const float4*>",
    ),
    (
        "misaligned_copy",
        8,
        &["misaligned: the source of cp.async"],
        "cp_async<16>(&tile[4 * i]",
    ),
    (
        "product_wait",
        128,
        &["race: reads a sum of a wgmma"],
        "y[i] = sums[0][0]",
    ),
    (
        "product_proxy",
        128,
        &["no fence of the async proxy"],
        "wgmma_bf16<64>(sums",
    ),
    (
        "product_fence",
        128,
        &["race: a wgmma without wgmma.fence"],
        "wgmma_bf16<64>(sums",
    ),
    (
        "product_barrier",
        128,
        &["race: ", "uninitialised: "],
        "wgmma_bf16<64>(sums",
    ),
    (
        "product_reuse",
        128,
        &["which a wgmma that is under way reads"],
        "reinterpret_cast<bf16*>(stage)[place] =",
    ),
    (
        "product_pattern",
        128,
        &["in none of the first rows of its pattern"],
        "wgmma_bf16<64>(sums",
    ),
    (
        "product_warp",
        128,
        &[
            "divergence: returns after 0 of the 1 wgmma",
            "divergence: calls the 1th wgmma",
        ],
        "wgmma_bf16<64>(sums",
    ),
];

fn planted(name: &str, threads: u32) -> Result<()> {
    let count = if name.contains("global_index") {
        64
    } else {
        512
    };
    let (x, y) = (
        Buffer::from_slice(&numbers(count, 11))?,
        Buffer::new(4 * count)?,
    );
    let (px, py) = (x.address(), y.address());
    let shared = if name.contains("product") { 8192 } else { 0 };
    launch!(name, [1, 1, 1], [threads, 1, 1], shared, px, py)
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn right_twins_pass() {
    for (name, threads, ..) in PLANTED {
        under_seeds(|| planted(&format!("planted_{name}_good"), threads));
    }
}

#[cfg_attr(
    all(echograd_emulator, not(echograd_emulator_checks = "own")),
    ignore = "another sanitizer was built in"
)]
#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn planted_bugs_are_found_under_every_seed() {
    let source = include_str!("../kernels/selftest/planted.cu");
    for (name, threads, expected, code) in PLANTED {
        if cfg!(echograd_emulator_clang) && name == "misaligned" {
            continue; // Clang does not check copies of whole vectors
        }
        for seed in SEEDS {
            let found =
                emulator::with_seed(seed, || planted(&format!("planted_{name}_bad"), threads));
            let report = found.expect_err(name).to_string();
            let fits = expected.iter().any(|text| report.contains(text));
            assert!(fits, "{name}, seed {seed}: {report}");
            // Every planted.cu line that the report names, of which one must be the faulty line.
            let lines = report
                .split("kernels/selftest/planted.cu:")
                .skip(1)
                .map(|rest| {
                    let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap();
                    source
                        .lines()
                        .nth(digits.parse::<usize>().unwrap() - 1)
                        .unwrap()
                });
            let lines: Vec<_> = lines.collect();
            assert!(
                lines.iter().any(|line| line.contains(code)),
                "{name}: {report}: {lines:?}"
            );
        }
    }
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn launches_that_the_driver_would_refuse() {
    let fails = |name: &str, grid, block, shared, expected: &str| {
        let (x, n) = (std::ptr::null_mut::<c_void>(), 1_i32);
        let error = launch!(name, grid, block, shared, x, x, n)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    };
    let one = [1, 1, 1];
    fails("selftest_none", one, one, 0, "no kernel of this name");
    fails("selftest_block_sum", [0, 1, 1], one, 0, "grid of [0, 1, 1]");
    fails(
        "selftest_block_sum",
        [1, 65_536, 1],
        one,
        0,
        "grid of [1, 65536, 1]",
    );
    fails(
        "selftest_block_sum",
        one,
        [1, 1, 65],
        0,
        "block of [1, 1, 65]",
    );
    fails("selftest_block_sum", one, [512, 1, 1], 0, "bound to 256");
    fails(
        "selftest_block_sum",
        one,
        [256, 1, 1],
        232_448,
        "too much shared memory",
    );
    fails(
        "selftest_matmul",
        one,
        one,
        0,
        "3 arguments for 4 parameters",
    );
}

#[test]
#[cfg_attr(not(echograd_emulator), ignore = "built without a C++20 compiler")]
fn parameters_are_listed() {
    assert_eq!(
        emulator::parameters("selftest_block_sum").unwrap(),
        [8, 8, 4]
    );
    assert!(emulator::kernels().any(|name| name == "selftest_gemm"));
}

/// The bugs a sanitizer of the compiler finds, by ending the process.
#[cfg(any(
    echograd_emulator_checks = "address",
    echograd_emulator_checks = "thread"
))]
mod sanitizer {
    use super::*;

    const VARIABLE: &str = "ECHOGRAD_PLANTED";

    #[test]
    #[ignore = "run by sanitizers_find_planted_bugs, in a process of its own"]
    fn one_planted_bug() -> Result<()> {
        let name = std::env::var(VARIABLE).expect("set by the parent");
        let threads = PLANTED
            .iter()
            .find(|p| p.0 == name)
            .expect("a planted bug")
            .1;
        planted(&format!("planted_{name}_bad"), threads)
    }

    #[test]
    fn sanitizers_find_planted_bugs() {
        let (names, report): (&[&str], _) = if cfg!(echograd_emulator_checks = "address") {
            (&["shared_index", "global_index"], "ERROR: AddressSanitizer")
        } else {
            let races = &["block_barrier", "warp_barrier", "warp_reuse"];
            (races, "WARNING: ThreadSanitizer: data race")
        };
        for name in names {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args([
                    "--ignored",
                    "--exact",
                    "sanitizer::one_planted_bug",
                    "--nocapture",
                ])
                .env(VARIABLE, name)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{name} passed");
            assert!(
                text.contains(report) && text.contains("planted.cu"),
                "{name}: {text}"
            );
        }
    }
}
