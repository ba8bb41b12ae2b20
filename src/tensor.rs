//! Shapes, element types and tensors in host memory.
//!
//! Every tensor has four dimensions, `N×H×W×C` with `C` contiguous. Convolution weights are
//! `out×kh×kw×in`, vectors per channel `1×1×1×C`, vectors per image `N×1×1×1`, scalars `1×1×1×1`.

use std::fmt;
use std::iter::Sum;

use crate::device::simd::Dispatch;
use crate::error::{Error, Result};

/// The extent of a tensor: `n×h×w×c`, `c` contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Batch (for weights: output channels).
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels (for weights: input channels).
    pub c: usize,
}

impl Shape {
    /// One element.
    pub const SCALAR: Shape = Shape::new(1, 1, 1, 1);

    /// `n×h×w×c`.
    pub const fn new(n: usize, h: usize, w: usize, c: usize) -> Self {
        Self { n, h, w, c }
    }

    /// `1×1×1×c`: one value per channel.
    pub const fn per_channel(c: usize) -> Self {
        Self::new(1, 1, 1, c)
    }

    /// `n×1×1×c`: `c` values per image.
    pub const fn per_image(n: usize, c: usize) -> Self {
        Self::new(n, 1, 1, c)
    }

    /// Number of elements.
    pub const fn len(&self) -> usize {
        self.n * self.h * self.w * self.c
    }

    /// Whether there are no elements.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of pixels over the whole batch, `n·h·w`: the rows of the tensor seen as a matrix of `c` columns.
    pub const fn rows(&self) -> usize {
        self.n * self.h * self.w
    }

    /// Number of pixels of one image, `h·w`.
    pub const fn pixels(&self) -> usize {
        self.h * self.w
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}×{}×{}×{}", self.n, self.h, self.w, self.c))
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Floating-point element of the CPU path: `f32` to train, `f64` to be differentiated numerically.
pub trait Real:
    num_traits::Float
    + num_traits::NumAssign
    + Dispatch
    + bytemuck::Pod
    + Sum
    + Send
    + Sync
    + fmt::Debug
    + fmt::Display
    + 'static
{
    /// Converts a constant; rounds to nearest for `f32`.
    fn of(value: f64) -> Self;
    /// Widens to `f64`, exactly.
    fn wide(self) -> f64;
}

impl Real for f32 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
}

/// A tensor in host memory.
#[derive(Clone, PartialEq, Debug)]
pub struct Tensor<T> {
    shape: Shape,
    data: Vec<T>,
}

impl<T: Real> Tensor<T> {
    /// Wraps `data`, which must hold exactly `shape.len()` elements.
    ///
    /// # Errors
    /// [`Error::Argument`] if the lengths differ.
    pub fn new(shape: Shape, data: Vec<T>) -> Result<Self> {
        if data.len() == shape.len() {
            Ok(Self { shape, data })
        } else {
            Err(Error::argument(
                "tensor",
                format!(
                    "shape {shape} holds {} elements, found {}",
                    shape.len(),
                    data.len()
                ),
            ))
        }
    }

    /// All elements equal to `value`.
    pub fn full(shape: Shape, value: T) -> Self {
        Self {
            shape,
            data: vec![value; shape.len()],
        }
    }

    /// All zeros.
    pub fn zeros(shape: Shape) -> Self {
        Self::full(shape, T::zero())
    }

    /// Element `i` (NHWC order) is `f(i)`.
    pub fn from_fn(shape: Shape, f: impl FnMut(usize) -> T) -> Self {
        Self {
            shape,
            data: (0..shape.len()).map(f).collect(),
        }
    }

    /// The extent.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The elements in NHWC order.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The elements in NHWC order.
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// The same numbers in another element type.
    pub fn cast<U: Real>(&self) -> Tensor<U> {
        Tensor {
            shape: self.shape,
            data: self.data.iter().map(|x| U::of(x.wide())).collect(),
        }
    }
}
