//! Nonlinearities that other operations apply on the way, so that they cost no pass over memory.

use std::ops::Range;

use crate::device::simd::Lanes;
use crate::tensor::Real;

/// The nonlinearity `a` that a normalisation, or a convolution with bias, applies to its result.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Activation {
    /// `a(u) = u`.
    #[default]
    Identity,
    /// `a(u) = max(u, 0)`; the derivative at 0 is taken as 0.
    Relu,
    /// `a(u) = u·σ(u)`, σ the logistic function (Elfwing et al. 2018).
    Silu,
}

impl Activation {
    /// `a(u)`.
    #[inline(always)]
    pub(super) fn apply<L: Lanes>(self, u: L) -> L {
        match self {
            Self::Identity => u,
            // Not `max`: a NaN must pass on to where it is noticed.
            Self::Relu => L::select(u.lt(L::zero()), L::zero(), u),
            Self::Silu => u * u.logistic(),
        }
    }

    /// `dy·a′(u)`.
    #[inline(always)]
    pub(super) fn gradient<L: Lanes>(self, u: L, dy: L) -> L {
        match self {
            Self::Identity => dy,
            Self::Relu => L::select(L::zero().lt(u), dy, L::zero()),
            Self::Silu => {
                let (one, s) = (L::splat(L::Elem::of(1.0)), u.logistic());
                dy * s * u.mul_add(one - s, one)
            }
        }
    }

    /// Its number for kernels: `with_activation` in `kernels/epilogue.cuh`.
    pub(super) fn number(self) -> i32 {
        match self {
            Self::Identity => 0,
            Self::Relu => 1,
            Self::Silu => 2,
        }
    }

    /// Floating-point operations of `a` on one element; an exponential counts as ten.
    pub(super) fn flops(self) -> u64 {
        match self {
            Self::Identity => 0,
            Self::Relu => 1,
            Self::Silu => 13,
        }
    }
}

/// What a convolution does to its sums while they are in cache: `a(sum + b)`, with one `b` per channel.
#[derive(Clone, Copy)]
pub(super) struct Epilogue<'a, T> {
    /// Of every channel.
    pub bias: &'a [T],
    pub activation: Activation,
}

impl<T: Real> Epilogue<'_, T> {
    /// Finishes the sums of `pixels` pixels, `stride` elements apart, from their first of `channels` at `y` on.
    ///
    /// # Safety
    /// `y` must be readable and writable for `channels.len()` elements from every `pixel·stride`, with no other
    /// access to those meanwhile.
    #[inline(always)]
    pub unsafe fn finish<L: Lanes<Elem = T>>(
        &self,
        y: *mut T,
        pixels: usize,
        stride: usize,
        channels: Range<usize>,
    ) {
        for (i, bias) in self.bias[channels].chunks(L::N).enumerate() {
            let (vector, lanes) = (L::load_first(bias), bias.len());
            for pixel in 0..pixels {
                // SAFETY: the caller's.
                let y = unsafe {
                    std::slice::from_raw_parts_mut(y.add(pixel * stride + i * L::N), lanes)
                };
                let sum = L::load_first(y);
                self.activation.apply(sum + vector).store_first(y);
            }
        }
    }
}
