//! Vector lanes with run-time dispatch: a kernel is written once over [`Lanes`] and runs with AVX-512,
//! AVX2 + FMA, NEON or plain arrays, whichever the machine has.
//!
//! A kernel is a value that implements [`Kernel`]; [`dispatch`] picks the instruction set and calls it:
//!
//! ```
//! use echograd::device::simd::{self, Kernel, Lanes};
//!
//! /// y ← a·x + y
//! struct Axpy<'a> {
//!     a: f32,
//!     x: &'a [f32],
//!     y: &'a mut [f32],
//! }
//!
//! impl Kernel<f32> for Axpy<'_> {
//!     type Out = ();
//!     #[inline(always)]
//!     fn run<L: Lanes<Elem = f32>>(self) {
//!         let a = L::splat(self.a);
//!         for (x, y) in self.x.chunks(L::N).zip(self.y.chunks_mut(L::N)) {
//!             a.mul_add(L::load_first(x), L::load_first(y)).store_first(y);
//!         }
//!     }
//! }
//!
//! let mut y = [1.0; 19];
//! simd::dispatch(Axpy { a: 2.0, x: &[3.0; 19], y: &mut y });
//! assert_eq!(y, [7.0; 19]);
//! ```
//!
//! Two rules make this fast. `run` and every function between it and the lanes are `#[inline(always)]`, since
//! only what is inlined into the dispatcher is compiled for its instruction set. For the same reason a closure
//! given to rayon is the wrong place to *be inside* of a kernel: dispatch within the task, not around it.
//!
//! Results may differ in their last bits between instruction sets (they differ in lane count, hence in the order
//! of sums, and only some fuse multiplication with addition); they never depend on the number of threads.

mod lanes;

use std::ops::{Add, Div, Mul, Neg, Sub};
use std::sync::LazyLock;

use num_traits::Zero;

use crate::tensor::Real;

/// The most lanes any instruction set has.
pub const MAX_LANES: usize = 16;

/// A vector register's worth of `f32` or `f64`.
///
/// Values of these types exist only inside a [`Kernel`], after [`dispatch`] has made sure that the machine has
/// their instructions.
pub trait Lanes:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The element type.
    type Elem: Real;
    /// The outcome of a comparison, one truth value per lane.
    type Mask: Copy;
    /// Number of lanes, a power of two.
    const N: usize;
    /// Vector registers of the instruction set: bounds the accumulators a kernel can keep.
    const REGISTERS: usize;

    /// All lanes equal to `x`.
    fn splat(x: Self::Elem) -> Self;

    /// Lanes from `N` consecutive elements, of any alignment.
    ///
    /// # Safety
    /// `from` must be valid for reading `N` elements.
    unsafe fn load_ptr(from: *const Self::Elem) -> Self;

    /// Writes the lanes to `N` consecutive elements, of any alignment.
    ///
    /// # Safety
    /// `to` must be valid for writing `N` elements.
    unsafe fn store_ptr(self, to: *mut Self::Elem);

    /// `self · a + b`, rounded once where the instruction set can, twice on the portable lanes.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The smaller of the two; unspecified where either is NaN.
    fn min(self, other: Self) -> Self;
    /// The larger of the two; unspecified where either is NaN.
    fn max(self, other: Self) -> Self;
    /// Where `self < other`; false where either is NaN.
    fn lt(self, other: Self) -> Self::Mask;
    /// `yes` where the mask holds, `no` elsewhere.
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;

    /// Shifts every lane's bits left by the mantissa's length, so that an integer held in the low bits becomes
    /// an exponent. A step of [`Lanes::exp`].
    #[doc(hidden)]
    fn shift_into_exponent(self) -> Self;

    /// eˣ: within 2 units in the last place for `f32`, 1e-15 relative for `f64`; ∞ and 0 beyond the range
    /// (subnormal results included), NaN for NaN.
    fn exp(self) -> Self;

    /// 1/x: within 1 unit in the last place where both are normal numbers; NaN for NaN, 0 may come out NaN.
    fn recip(self) -> Self;

    /// The logistic function 1/(1 + e⁻ˣ): within 4 units in the last place for `f32`, 1e-15 relative for `f64`;
    /// never less than the least normal number, nearly; NaN for NaN.
    fn logistic(self) -> Self;

    /// All lanes zero.
    #[inline(always)]
    fn zero() -> Self {
        Self::splat(Self::Elem::zero())
    }

    /// Lanes from the first `N` elements.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    fn load(from: &[Self::Elem]) -> Self {
        assert!(from.len() >= Self::N);
        // SAFETY: the length was checked.
        unsafe { Self::load_ptr(from.as_ptr()) }
    }

    /// Writes the lanes to the first `N` elements.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    fn store(self, to: &mut [Self::Elem]) {
        assert!(to.len() >= Self::N);
        // SAFETY: the length was checked.
        unsafe { self.store_ptr(to.as_mut_ptr()) }
    }

    /// Lanes from the first `N` elements or as many as there are; the others zero.
    #[inline(always)]
    fn load_first(from: &[Self::Elem]) -> Self {
        if from.len() >= Self::N {
            return Self::load(from);
        }
        let mut lanes = [Self::Elem::zero(); MAX_LANES];
        lanes[..from.len()].copy_from_slice(from);
        Self::load(&lanes)
    }

    /// Writes the lanes to the first `N` elements or as many as there are.
    #[inline(always)]
    fn store_first(self, to: &mut [Self::Elem]) {
        if to.len() >= Self::N {
            return self.store(to);
        }
        let mut lanes = [Self::Elem::zero(); MAX_LANES];
        self.store(&mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    /// Sum of the lanes: halves are added until one is left.
    #[inline(always)]
    fn reduce_sum(self) -> Self::Elem {
        let mut lanes = [Self::Elem::zero(); MAX_LANES];
        self.store(&mut lanes);
        let mut half = Self::N / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}

/// A computation written over any lanes.
pub trait Kernel<T: Real> {
    /// What it returns.
    type Out;
    /// Runs it. Implementations must be `#[inline(always)]`.
    fn run<L: Lanes<Elem = T>>(self) -> Self::Out;
}

/// Element types that have lanes: `f32` and `f64`. A part of [`Real`].
pub trait Dispatch: Sized {
    /// Runs `kernel` with the lanes of `level`.
    #[doc(hidden)]
    fn dispatch<K: Kernel<Self>>(level: Level, kernel: K) -> K::Out
    where
        Self: Real;
}

/// Runs `kernel` with the best instruction set of this machine (see [`Level::current`]).
#[inline]
pub fn dispatch<T: Real, K: Kernel<T>>(kernel: K) -> K::Out {
    T::dispatch(Level::current(), kernel)
}

/// Runs `kernel` with the instruction set `level`.
#[inline]
pub fn dispatch_at<T: Real, K: Kernel<T>>(level: Level, kernel: K) -> K::Out {
    T::dispatch(level, kernel)
}

/// Asks for the cache line at `address`, which need not be valid, where there is an instruction for it.
#[inline(always)]
pub fn prefetch<T>(address: *const T) {
    // SAFETY: part of x86-64 itself; an invalid address is ignored.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// An instruction set that this machine has; there is no way to make one that it lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Level(Isa);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Level {
    /// Every instruction set of this machine, the best last.
    pub fn available() -> impl DoubleEndedIterator<Item = Level> {
        let levels = [
            Some(Level(Isa::Portable)),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"))
                .then_some(Level(Isa::Avx2)),
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx512f").then_some(Level(Isa::Avx512)),
            #[cfg(target_arch = "aarch64")]
            std::arch::is_aarch64_feature_detected!("neon").then_some(Level(Isa::Neon)),
        ];
        levels.into_iter().flatten()
    }

    /// The instruction set that [`dispatch`] uses: the best one, or the one named by the environment variable
    /// `ECHOGRAD_ISA` (`portable`, `avx2`, `avx512`, `neon`) if this machine has it. Decided at the first call.
    pub fn current() -> Level {
        static CURRENT: LazyLock<Level> = LazyLock::new(|| {
            let wanted = std::env::var("ECHOGRAD_ISA").unwrap_or_default();
            Level::available()
                .find(|level| level.name() == wanted)
                .or_else(|| Level::available().last())
                .unwrap_or(Level(Isa::Portable))
        });
        *CURRENT
    }

    /// The name that `ECHOGRAD_ISA` takes.
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => "neon",
        }
    }
}

#[cfg(test)]
mod tests;
