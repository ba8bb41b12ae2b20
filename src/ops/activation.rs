//! Nonlinearities that other operations apply on the way, so that they cost no pass over memory.

use crate::device::simd::Lanes;
use crate::tensor::Real;

/// The nonlinearity `a` that a normalisation applies to its result.
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
            Self::Silu => u * sigmoid(u),
        }
    }

    /// `dy·a′(u)`.
    #[inline(always)]
    pub(super) fn gradient<L: Lanes>(self, u: L, dy: L) -> L {
        match self {
            Self::Identity => dy,
            Self::Relu => L::select(L::zero().lt(u), dy, L::zero()),
            Self::Silu => {
                let (one, s) = (L::splat(L::Elem::of(1.0)), sigmoid(u));
                dy * s * u.mul_add(one - s, one)
            }
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

#[inline(always)]
fn sigmoid<L: Lanes>(u: L) -> L {
    let one = L::splat(L::Elem::of(1.0));
    one / (one + (-u).exp())
}
