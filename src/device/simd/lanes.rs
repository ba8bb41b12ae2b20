//! The lanes of each instruction set. The types are private: only [`Dispatch`], which takes a [`Level`] that the
//! machine has been seen to support, hands them out, and that is what makes the `unsafe` blocks below sound.

use std::ops::{Add, Div, Mul, Neg, Sub};

use super::{Dispatch, Isa, Kernel, Lanes, Level};
use crate::tensor::Real;

macro_rules! dispatch {
    ($elem:ty, $avx2:ident, $avx512:ident, $neon:ident) => {
        impl Dispatch for $elem {
            #[inline]
            fn dispatch<K: Kernel<Self>>(level: Level, kernel: K) -> K::Out {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma")]
                fn avx2<K: Kernel<$elem>>(kernel: K) -> K::Out {
                    kernel.run::<x86::$avx2>()
                }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f")]
                fn avx512<K: Kernel<$elem>>(kernel: K) -> K::Out {
                    kernel.run::<x86::$avx512>()
                }
                #[cfg(target_arch = "aarch64")]
                #[target_feature(enable = "neon")]
                fn neon<K: Kernel<$elem>>(kernel: K) -> K::Out {
                    kernel.run::<neon::$neon>()
                }
                match level.0 {
                    Isa::Portable => kernel.run::<Portable<$elem>>(),
                    // SAFETY: a `Level` exists only for instruction sets that this machine has.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => unsafe { avx2(kernel) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => unsafe { avx512(kernel) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => unsafe { neon(kernel) },
                }
            }
        }
    };
}

dispatch!(f32, F32x8, F32x16, F32x4);
dispatch!(f64, F64x4, F64x8, F64x2);

/// What eˣ needs to know about an element type. The polynomial stands for (eʳ − 1 − r)/r² on |r| ≤ ½ln 2.
struct Exp<const TERMS: usize> {
    /// Beyond these the result is 0 or ∞; within them 2ⁿ splits into two representable factors.
    range: [f64; 2],
    /// Within these 2ⁿ is a normal number, and so is its reciprocal.
    normal: [f64; 2],
    /// 1.5·2^mantissa: adding it rounds to an integer and leaves that integer in the low bits.
    magic: f64,
    bias: f64,
    /// ln 2 in two parts, the first with so few bits that n·first is exact.
    ln2: [f64; 2],
    polynomial: [f64; TERMS],
}

/// Coefficients of S. Moshier's Cephes `expf`.
const EXP_F32: Exp<6> = Exp {
    range: [-104.0, 89.0],
    normal: [-87.0, 87.0],
    magic: 12_582_912.0,
    bias: 127.0,
    ln2: [0.693_359_375, -2.121_944_4e-4],
    polynomial: [
        1.987_569_15e-4,
        1.398_199_95e-3,
        8.333_451_9e-3,
        4.166_579_6e-2,
        1.666_666_55e-1,
        5.000_000_1e-1,
    ],
};

/// Taylor coefficients to r¹³, whose remainder (0.35¹⁴/14!) is below half a unit in the last place.
const EXP_F64: Exp<12> = Exp {
    range: [-746.0, 710.0],
    normal: [-708.0, 708.0],
    magic: 6_755_399_441_055_744.0,
    bias: 1023.0,
    ln2: [6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10],
    polynomial: [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
    ],
};

/// n + `magic` and eʳ, where x = n·ln 2 + r with n = round(x/ln 2), for `x` held within `range`.
#[inline(always)]
fn split<L: Lanes, const TERMS: usize>(x: L, range: [f64; 2], data: &Exp<TERMS>) -> (L, L) {
    let constant = |c: f64| L::splat(L::Elem::of(c));
    let [low, high] = range.map(constant);
    let magic = constant(data.magic);
    // Comparisons with NaN are false, so NaN passes through both selections.
    let x = L::select(x.lt(low), low, x);
    let x = L::select(high.lt(x), high, x);
    let shifted = x.mul_add(constant(std::f64::consts::LOG2_E), magic);
    let n = shifted - magic;
    let r = (-n).mul_add(constant(data.ln2[0]), x);
    let r = (-n).mul_add(constant(data.ln2[1]), r);
    let mut p = constant(data.polynomial[0]);
    for &c in &data.polynomial[1..] {
        p = p.mul_add(r, constant(c));
    }
    (shifted, p.mul_add(r * r, r) + constant(1.0))
}

/// eˣ = 2ⁿ·eʳ. 2ⁿ is applied in two factors so that subnormal results come out right.
#[inline(always)]
fn exp<L: Lanes, const TERMS: usize>(x: L, data: &Exp<TERMS>) -> L {
    let constant = |c: f64| L::splat(L::Elem::of(c));
    let magic = constant(data.magic);
    let (shifted, e) = split(x, data.range, data);
    let n = shifted - magic;
    let half = n.mul_add(constant(0.5), magic) - magic;
    let two_to = |n: L| (n + constant(data.bias) + magic).shift_into_exponent();
    e * two_to(half) * two_to(n - half)
}

/// 1/(1 + e⁻ˣ). Where one factor 2ⁿ does not do, the result is as good as 0 or 1.
#[inline(always)]
fn logistic<L: Lanes, const TERMS: usize>(x: L, data: &Exp<TERMS>) -> L {
    let (shifted, e) = split(-x, data.normal, data);
    let factor = (shifted + L::splat(L::Elem::of(data.bias))).shift_into_exponent();
    e.mul_add(factor, L::splat(L::Elem::of(1.0))).recip()
}

/// Four lanes in an array, for machines without any of the above: the compiler vectorises them as it can.
#[derive(Clone, Copy)]
struct Portable<T>([T; 4]);

impl<T: Real> Portable<T> {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(T, T) -> T) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

macro_rules! portable_operator {
    ($($trait:ident $method:ident $op:tt),*) => {$(
        impl<T: Real> $trait for Portable<T> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, |a, b| a $op b)
            }
        }
    )*};
}
portable_operator!(Add add +, Sub sub -, Mul mul *, Div div /);

impl<T: Real> Neg for Portable<T> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self(self.0.map(|a| -a))
    }
}

macro_rules! portable {
    ($elem:ty, $exp:ident) => {
        impl Lanes for Portable<$elem> {
            type Elem = $elem;
            type Mask = [bool; 4];
            const N: usize = 4;
            const REGISTERS: usize = 16;
            #[inline(always)]
            fn splat(x: $elem) -> Self {
                Self([x; 4])
            }
            #[inline(always)]
            unsafe fn load_ptr(from: *const $elem) -> Self {
                // SAFETY: the caller's.
                Self(unsafe { from.cast::<[$elem; 4]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn store_ptr(self, to: *mut $elem) {
                // SAFETY: the caller's.
                unsafe { to.cast::<[$elem; 4]>().write_unaligned(self.0) }
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                // Not `f32::mul_add`: without the instruction that is a library call per lane.
                self * a + b
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                Self(self.0.map(<$elem>::sqrt))
            }
            #[inline(always)]
            fn abs(self) -> Self {
                Self(self.0.map(<$elem>::abs))
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                self.zip(other, |a, b| if a < b { a } else { b })
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                self.zip(other, |a, b| if a > b { a } else { b })
            }
            #[inline(always)]
            fn lt(self, other: Self) -> Self::Mask {
                std::array::from_fn(|i| self.0[i] < other.0[i])
            }
            #[inline(always)]
            fn select(mask: Self::Mask, yes: Self, no: Self) -> Self {
                Self(std::array::from_fn(|i| {
                    if mask[i] { yes.0[i] } else { no.0[i] }
                }))
            }
            #[inline(always)]
            fn shift_into_exponent(self) -> Self {
                Self(
                    self.0
                        .map(|a| <$elem>::from_bits(a.to_bits() << (<$elem>::MANTISSA_DIGITS - 1))),
                )
            }
            #[inline(always)]
            fn recip(self) -> Self {
                Self(self.0.map(<$elem>::recip))
            }
            #[inline(always)]
            fn exp(self) -> Self {
                exp(self, &$exp)
            }
            #[inline(always)]
            fn logistic(self) -> Self {
                logistic(self, &$exp)
            }
        }
    };
}
portable!(f32, EXP_F32);
portable!(f64, EXP_F64);

/// A lane type around a native register: `$name` wraps `$reg`, and each operation names its intrinsic.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! native {
    ($name:ident: [$elem:ty; $n:literal] in $reg:ty, $registers:literal registers, mask $mask:ty, $exp:ident;
     add $add:ident, sub $sub:ident, mul $mul:ident, div $div:ident, splat $splat:ident, load $load:ident,
     store $store:ident, sqrt $sqrt:ident, min $min:ident, max $max:ident,
     mul_add |$fa:ident, $fb:ident, $fc:ident| $fma:expr, neg |$ng:ident| $neg:expr, abs |$ab:ident| $abs:expr,
     lt |$la:ident, $lb:ident| $lt:expr, select |$sm:ident, $sy:ident, $sn:ident| $select:expr,
     shift |$sh:ident| $shift:expr, recip |$rc:ident| $recip:expr) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name($reg);

        native!(@operator $name, Add add $add, Sub sub $sub, Mul mul $mul, Div div $div);

        impl Neg for $name {
            type Output = Self;
            #[inline(always)]
            fn neg(self) -> Self {
                let $ng = self.0;
                // SAFETY: see the module's documentation.
                Self(unsafe { $neg })
            }
        }

        // SAFETY of every block: see the module's documentation; pointers are the caller's.
        impl Lanes for $name {
            type Elem = $elem;
            type Mask = $mask;
            const N: usize = $n;
            const REGISTERS: usize = $registers;
            #[inline(always)]
            fn splat(x: $elem) -> Self {
                Self(unsafe { $splat(x) })
            }
            #[inline(always)]
            unsafe fn load_ptr(from: *const $elem) -> Self {
                Self(unsafe { $load(from) })
            }
            #[inline(always)]
            unsafe fn store_ptr(self, to: *mut $elem) {
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                let ($fa, $fb, $fc) = (self.0, a.0, b.0);
                Self(unsafe { $fma })
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                Self(unsafe { $sqrt(self.0) })
            }
            #[inline(always)]
            fn abs(self) -> Self {
                let $ab = self.0;
                Self(unsafe { $abs })
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                Self(unsafe { $min(self.0, other.0) })
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                Self(unsafe { $max(self.0, other.0) })
            }
            #[inline(always)]
            fn lt(self, other: Self) -> Self::Mask {
                let ($la, $lb) = (self.0, other.0);
                unsafe { $lt }
            }
            #[inline(always)]
            fn select($sm: Self::Mask, yes: Self, no: Self) -> Self {
                let ($sy, $sn) = (yes.0, no.0);
                Self(unsafe { $select })
            }
            #[inline(always)]
            fn shift_into_exponent(self) -> Self {
                let $sh = self.0;
                Self(unsafe { $shift })
            }
            #[inline(always)]
            fn recip(self) -> Self {
                let $rc = self.0;
                Self(unsafe { $recip })
            }
            #[inline(always)]
            fn exp(self) -> Self {
                exp(self, &$exp)
            }
            #[inline(always)]
            fn logistic(self) -> Self {
                logistic(self, &$exp)
            }
        }
    };
    (@operator $name:ident, $($trait:ident $method:ident $intrinsic:ident),*) => {$(
        impl $trait for $name {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: see the module's documentation.
                Self(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    native!(F32x8: [f32; 8] in __m256, 16 registers, mask __m256, EXP_F32;
        add _mm256_add_ps, sub _mm256_sub_ps, mul _mm256_mul_ps, div _mm256_div_ps, splat _mm256_set1_ps,
        load _mm256_loadu_ps, store _mm256_storeu_ps, sqrt _mm256_sqrt_ps, min _mm256_min_ps, max _mm256_max_ps,
        mul_add |a, b, c| _mm256_fmadd_ps(a, b, c),
        neg |a| _mm256_xor_ps(a, _mm256_set1_ps(-0.0)),
        abs |a| _mm256_andnot_ps(_mm256_set1_ps(-0.0), a),
        lt |a, b| _mm256_cmp_ps::<_CMP_LT_OQ>(a, b),
        select |m, y, n| _mm256_blendv_ps(n, y, m),
        shift |a| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(a))),
        recip |a| _mm256_div_ps(_mm256_set1_ps(1.0), a));

    native!(F64x4: [f64; 4] in __m256d, 16 registers, mask __m256d, EXP_F64;
        add _mm256_add_pd, sub _mm256_sub_pd, mul _mm256_mul_pd, div _mm256_div_pd, splat _mm256_set1_pd,
        load _mm256_loadu_pd, store _mm256_storeu_pd, sqrt _mm256_sqrt_pd, min _mm256_min_pd, max _mm256_max_pd,
        mul_add |a, b, c| _mm256_fmadd_pd(a, b, c),
        neg |a| _mm256_xor_pd(a, _mm256_set1_pd(-0.0)),
        abs |a| _mm256_andnot_pd(_mm256_set1_pd(-0.0), a),
        lt |a, b| _mm256_cmp_pd::<_CMP_LT_OQ>(a, b),
        select |m, y, n| _mm256_blendv_pd(n, y, m),
        shift |a| _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(a))),
        recip |a| _mm256_div_pd(_mm256_set1_pd(1.0), a));

    native!(F32x16: [f32; 16] in __m512, 32 registers, mask __mmask16, EXP_F32;
        add _mm512_add_ps, sub _mm512_sub_ps, mul _mm512_mul_ps, div _mm512_div_ps, splat _mm512_set1_ps,
        load _mm512_loadu_ps, store _mm512_storeu_ps, sqrt _mm512_sqrt_ps, min _mm512_min_ps, max _mm512_max_ps,
        mul_add |a, b, c| _mm512_fmadd_ps(a, b, c),
        neg |a| _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(i32::MIN))),
        abs |a| _mm512_abs_ps(a),
        lt |a, b| _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b),
        select |m, y, n| _mm512_mask_blend_ps(m, n, y),
        shift |a| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(a))),
        recip |a| reciprocal(a));

    native!(F64x8: [f64; 8] in __m512d, 32 registers, mask __mmask8, EXP_F64;
        add _mm512_add_pd, sub _mm512_sub_pd, mul _mm512_mul_pd, div _mm512_div_pd, splat _mm512_set1_pd,
        load _mm512_loadu_pd, store _mm512_storeu_pd, sqrt _mm512_sqrt_pd, min _mm512_min_pd, max _mm512_max_pd,
        mul_add |a, b, c| _mm512_fmadd_pd(a, b, c),
        neg |a| _mm512_castsi512_pd(_mm512_xor_si512(_mm512_castpd_si512(a), _mm512_set1_epi64(i64::MIN))),
        abs |a| _mm512_abs_pd(a),
        lt |a, b| _mm512_cmp_pd_mask::<_CMP_LT_OQ>(a, b),
        select |m, y, n| _mm512_mask_blend_pd(m, n, y),
        shift |a| _mm512_castsi512_pd(_mm512_slli_epi64::<52>(_mm512_castpd_si512(a))),
        recip |a| _mm512_div_pd(_mm512_set1_pd(1.0), a));

    /// 1/a: an estimate to 14 bits and a step of Newton's method, a third of a division's time.
    ///
    /// # Safety
    /// The machine must have AVX-512.
    #[inline(always)]
    unsafe fn reciprocal(a: __m512) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let estimate = _mm512_rcp14_ps(a);
            let error = _mm512_fnmadd_ps(a, estimate, _mm512_set1_ps(1.0));
            _mm512_fmadd_ps(estimate, error, estimate)
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::*;

    native!(F32x4: [f32; 4] in float32x4_t, 32 registers, mask uint32x4_t, EXP_F32;
        add vaddq_f32, sub vsubq_f32, mul vmulq_f32, div vdivq_f32, splat vdupq_n_f32,
        load vld1q_f32, store vst1q_f32, sqrt vsqrtq_f32, min vminq_f32, max vmaxq_f32,
        mul_add |a, b, c| vfmaq_f32(c, a, b),
        neg |a| vnegq_f32(a),
        abs |a| vabsq_f32(a),
        lt |a, b| vcltq_f32(a, b),
        select |m, y, n| vbslq_f32(m, y, n),
        shift |a| vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(a))),
        recip |a| vdivq_f32(vdupq_n_f32(1.0), a));

    native!(F64x2: [f64; 2] in float64x2_t, 32 registers, mask uint64x2_t, EXP_F64;
        add vaddq_f64, sub vsubq_f64, mul vmulq_f64, div vdivq_f64, splat vdupq_n_f64,
        load vld1q_f64, store vst1q_f64, sqrt vsqrtq_f64, min vminq_f64, max vmaxq_f64,
        mul_add |a, b, c| vfmaq_f64(c, a, b),
        neg |a| vnegq_f64(a),
        abs |a| vabsq_f64(a),
        lt |a, b| vcltq_f64(a, b),
        select |m, y, n| vbslq_f64(m, y, n),
        shift |a| vreinterpretq_f64_u64(vshlq_n_u64::<52>(vreinterpretq_u64_f64(a))),
        recip |a| vdivq_f64(vdupq_n_f64(1.0), a));
}
