//! Philox4x32-10: random numbers as a pure function of (seed, stream, counter).
//!
//! Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. There is no
//! state to share or to advance: whoever handles element `i` computes its number, so results do not
//! depend on how work is split over threads, and a resumed run continues exactly where it stopped.
//!
//! The key is the seed; the 128-bit counter is the 64-bit counter (low words) and the 64-bit
//! stream (high words). One block is four 32-bit words.
//!
//! ```
//! use echograd::device::philox::Philox;
//! let noise = Philox::new(7, 0);
//! assert_eq!(noise.block(41), Philox::new(7, 0).block(41));
//! assert_ne!(noise.block(41), noise.block(42));
//! ```

/// A keyed stream of random blocks, addressed by counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Philox {
    /// The stream `stream` of `seed`; distinct pairs give statistically independent streams.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self {
            key: words(seed),
            stream: words(stream),
        }
    }

    /// The four random words at `counter`.
    #[inline(always)]
    pub const fn block(&self, counter: u64) -> [u32; 4] {
        let [low, high] = words(counter);
        philox4x32_10([low, high, self.stream[0], self.stream[1]], self.key)
    }

    /// Four numbers uniform in [0, 1), multiples of 2⁻²⁴.
    #[inline(always)]
    pub fn uniform4(&self, counter: u64) -> [f32; 4] {
        self.block(counter).map(unit_f32)
    }

    /// Two numbers uniform in [0, 1), multiples of 2⁻⁵³.
    #[inline(always)]
    pub fn uniform2_f64(&self, counter: u64) -> [f64; 2] {
        let [a, b, c, d] = self.block(counter);
        [unit_f64(a, b), unit_f64(c, d)]
    }

    /// Four standard normal numbers by the Box–Muller transform; |x| < 5.8.
    #[inline(always)]
    pub fn normal4(&self, counter: u64) -> [f32; 4] {
        let [a, b, c, d] = self.uniform4(counter);
        let (x, y) = box_muller(a, b);
        let (z, w) = box_muller(c, d);
        [x, y, z, w]
    }

    /// Successive draws from counter 0 on, for code that takes a varying number of them.
    pub const fn draws(self) -> Draws {
        Draws {
            philox: self,
            counter: 0,
            block: [0; 4],
            left: 0,
        }
    }
}

/// Successive draws from one [`Philox`] stream; made by [`Philox::draws`].
#[derive(Clone, Debug)]
pub struct Draws {
    philox: Philox,
    counter: u64,
    block: [u32; 4],
    left: usize,
}

impl Draws {
    /// The next 32 random bits.
    #[inline]
    pub fn word(&mut self) -> u32 {
        if self.left == 0 {
            self.block = self.philox.block(self.counter);
            self.counter += 1;
            self.left = 4;
        }
        self.left -= 1;
        self.block[3 - self.left]
    }

    /// Uniform in [0, 1).
    #[inline]
    pub fn uniform(&mut self) -> f32 {
        unit_f32(self.word())
    }

    /// Uniform between `low` and `high`; `low` itself if they are equal.
    #[inline]
    pub fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// True with probability `p`: never for 0, always for 1.
    #[inline]
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }

    /// Standard normal; takes two words.
    #[inline]
    pub fn normal(&mut self) -> f32 {
        let (a, b) = (self.uniform(), self.uniform());
        box_muller(a, b).0
    }

    /// Uniform in 0..n for `n` > 0 (Lemire's multiplication; bias below n/2³²).
    #[inline]
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.word()) * u64::from(n)) >> 32) as u32
    }
}

const fn words(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

#[inline(always)]
fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

#[inline(always)]
fn unit_f64(low: u32, high: u32) -> f64 {
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Two independent standard normals from two uniforms in [0, 1). The logarithm's argument is
/// 1 − u, which is exact in f32 here and never 0.
#[inline(always)]
fn box_muller(u: f32, v: f32) -> (f32, f32) {
    let radius = (-2.0 * (1.0 - u).ln()).sqrt();
    let (sin, cos) = (std::f32::consts::TAU * v).sin_cos();
    (radius * cos, radius * sin)
}

/// The bijection itself: ten rounds over `counter` under `key`.
#[inline(always)]
const fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    // The golden ratio and √3 − 1, as fractions of 2³².
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut round = 0;
    while round < 10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let [low0, high0] = words(MULTIPLIERS[0] * counter[0] as u64);
        let [low1, high1] = words(MULTIPLIERS[1] * counter[2] as u64);
        counter = [
            high1 ^ counter[1] ^ key[0],
            low1,
            high0 ^ counter[3] ^ key[1],
            low0,
        ];
        round += 1;
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The `philox4x32 10` lines of Random123's `tests/kat_vectors`.
    #[test]
    fn matches_the_published_known_answers() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
            let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
            let philox = Philox::new(pair(key[0], key[1]), pair(counter[2], counter[3]));
            assert_eq!(philox.block(pair(counter[0], counter[1])), expected);
        }
    }

    #[test]
    fn the_ends_of_the_unit_interval() {
        assert_eq!((unit_f32(0), unit_f64(0, 0)), (0.0, 0.0));
        assert_eq!(unit_f32(u32::MAX), 1.0 - 2f32.powi(-24));
        assert_eq!(unit_f64(u32::MAX, u32::MAX), 1.0 - 2f64.powi(-53));
        let largest = box_muller(unit_f32(u32::MAX), 0.0).0;
        assert!((5.7..5.8).contains(&largest), "{largest}");
    }

    /// Means and variances within five standard errors of theirs, and no correlation between the
    /// two halves of a Box–Muller pair.
    #[test]
    fn moments_of_the_distributions() {
        let blocks = 1 << 16;
        let n = f64::from(4 * blocks);
        let philox = Philox::new(3, 5);
        let (mut u1, mut u2, mut z1, mut z2, mut pair) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for i in 0..blocks as u64 {
            for u in philox.uniform4(i).map(f64::from) {
                u1 += u;
                u2 += u * u;
            }
            let z = philox.normal4(i).map(f64::from);
            z1 += z.iter().sum::<f64>();
            z2 += z.iter().map(|z| z * z).sum::<f64>();
            pair += z[0] * z[1] + z[2] * z[3];
        }
        let five = 5.0 / n.sqrt();
        assert!((u1 / n - 0.5).abs() < five * (1.0f64 / 12.0).sqrt());
        assert!((u2 / n - 1.0 / 3.0).abs() < five * (4.0f64 / 45.0).sqrt());
        assert!((z1 / n).abs() < five);
        assert!((z2 / n - 1.0).abs() < five * 2.0f64.sqrt());
        assert!((2.0 * pair / n).abs() < five * 2.0f64.sqrt());
    }

    #[test]
    fn draws_walk_through_the_blocks() {
        let philox = Philox::new(1, 2);
        let mut draws = philox.draws();
        let words: Vec<u32> = (0..8).map(|_| draws.word()).collect();
        assert_eq!(words[..4], philox.block(0));
        assert_eq!(words[4..], philox.block(1));
        assert!((0..1000).all(|_| draws.below(3) < 3 && !draws.chance(0.0) && draws.chance(1.0)));
    }
}
