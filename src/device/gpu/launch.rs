//! How an operation says what to launch.
//!
//! [`crate::ops::Op::launch`] is called once per planned step, when a session is made. It hands typed
//! argument lists, made by the `kernel!` macro in the operation's room, to
//! [`Launches::launch`]; addresses in the arena do not change any more, so the whole list can be
//! replayed without further work, or captured.

use super::{Function, Gpu, Memory, copies};
use crate::error::{Error, Result};
use crate::tape::{PlannedStep, Slot};
use crate::tensor::Shape;

pub use super::copies::Copy as WeightCopy;

/// How many blocks of how many threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    /// Blocks along x, y, z.
    pub blocks: [u32; 3],
    /// Threads of a block, along x, y, z.
    pub threads: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Grid {
    /// `blocks` × `threads` in one dimension. Too many blocks are refused when launched.
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self {
            blocks: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1],
            threads: [threads, 1, 1],
            shared: 0,
        }
    }

    /// As many blocks of `threads` as give each of `items` a thread.
    pub fn cover(items: usize, threads: u32) -> Self {
        Self::new(items.div_ceil(threads as usize), threads)
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Self {
        Self {
            shared: u32::try_from(bytes).unwrap_or(u32::MAX),
            ..self
        }
    }
}

/// An address in device memory and how the elements there are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pointer {
    address: u64,
    /// bf16 in place of f32.
    narrow: bool,
}

impl Pointer {
    /// No address, for what a kernel is to leave out.
    pub const NULL: Pointer = Pointer {
        address: 0,
        narrow: false,
    };

    /// To elements of f32, or bf16 if `narrow`.
    pub(super) fn to(address: u64, narrow: bool) -> Self {
        Self { address, narrow }
    }

    /// The address as a number, to be put into a table of pointers.
    pub fn address(self) -> u64 {
        self.address
    }

    /// The f32 that lie `bytes` further on, within the same value or scratch.
    pub fn after(self, bytes: usize) -> Self {
        Self::to(self.address + bytes as u64, false)
    }

    /// The same from element `count` on.
    pub fn skip(self, count: usize) -> Self {
        let bytes = if self.narrow { 2 } else { 4 };
        Self::to(self.address + (count * bytes) as u64, self.narrow)
    }

    /// Whether the elements are bf16.
    pub fn is_narrow(self) -> bool {
        self.narrow
    }

    /// Whether the address is a multiple of `bytes`.
    pub fn is_aligned(self, bytes: u64) -> bool {
        self.address.is_multiple_of(bytes)
    }
}

/// A parameter of the kernel's storage type `T*`: f32 or bf16. A kernel with such parameters exists
/// once per type, as `NAME_f32` and `NAME_bf16`; all of them agree in a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored(Pointer);

impl From<Pointer> for Stored {
    fn from(pointer: Pointer) -> Self {
        Self(pointer)
    }
}

/// A parameter that points to f32 whatever activations are stored in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full(Pointer);

impl From<Pointer> for Full {
    fn from(pointer: Pointer) -> Self {
        Self(pointer)
    }
}

/// One argument, as it is passed.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    bits: u64,
    bytes: u32,
    /// For pointers to the storage type: whether that is bf16.
    stored: Option<bool>,
    /// For pointers to f32: whether the elements there are f32.
    fits: bool,
}

/// A type of kernel parameters.
pub trait Argument: Copy {
    /// As it is passed.
    fn word(self) -> Word;
}

impl Argument for Stored {
    fn word(self) -> Word {
        Word {
            bits: self.0.address,
            bytes: 8,
            stored: Some(self.0.narrow),
            fits: true,
        }
    }
}

impl Argument for Full {
    fn word(self) -> Word {
        Word {
            bits: self.0.address,
            bytes: 8,
            stored: None,
            fits: !self.0.narrow,
        }
    }
}

macro_rules! scalars {
    ($($type:ty: $bits:expr),*) => {$(
        impl Argument for $type {
            fn word(self) -> Word {
                Word { bits: $bits(self), bytes: size_of::<$type>() as u32, stored: None, fits: true }
            }
        }
    )*};
}
scalars!(u64: u64::from, u32: u64::from, i32: |x: i32| u64::from(x.cast_unsigned()),
    i64: i64::cast_unsigned, f32: |x: f32| u64::from(x.to_bits()), f64: f64::to_bits);

/// The arguments of one kernel; implemented by the `kernel!` macro.
///
/// # Safety
/// What is handed to [`Launches::launch`] is launched as it is, later and perhaps often. So whoever
/// implements this promises that [`KERNEL`](Arguments::KERNEL) takes these words, in number, order and
/// type, and that the kernel, launched with them, touches nothing but what they point to: the inputs,
/// outputs and scratch of the step, of their extents, and tables from [`Launches::constant`].
pub unsafe trait Arguments {
    /// Name of the kernel, without `_f32` or `_bf16` if it has parameters of type [`Stored`].
    const KERNEL: &'static str;
    /// In the order of the kernel's parameters.
    fn words(&self) -> Vec<Word>;
}

/// Declares the typed argument list of a kernel: a struct with one field per parameter, in their
/// order. Pointers are [`Stored`](launch::Stored) or [`Full`](launch::Full), scalars `i32`, `u32`,
/// `i64`, `u64` (for `size_t`), `f32`, `f64`. The emulator compares the sizes with the kernel's. The fields must
/// match the kernel and their values the memory pointed to: see the Safety section of
/// [`Arguments`](launch::Arguments).
///
/// ```ignore
/// kernel! {
///     /// `y = factor·x`.
///     struct ScaleKernel = "scale" { x: Stored, y: Stored, len: u64, factor: f32 }
/// }
/// ```
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis struct $name:ident = $kernel:literal
        { $($(#[$field_meta:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        $vis struct $name { $($(#[$field_meta])* $vis $field: $type),* }

        // SAFETY: the fields are the kernel's parameters, and the operation that fills them, in the same
        // room, passes addresses of its step with their extents.
        unsafe impl $crate::device::gpu::launch::Arguments for $name {
            const KERNEL: &'static str = $kernel;
            fn words(&self) -> Vec<$crate::device::gpu::launch::Word> {
                vec![$($crate::device::gpu::launch::Argument::word(self.$field)),*]
            }
        }
    };
}
pub(crate) use kernel;

/// A launch with everything that its replay needs.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Number of the plan's step that it belongs to.
    pub step: usize,
    /// What is launched.
    pub function: Function,
    /// In how many threads.
    pub grid: Grid,
    pub(super) arguments: Vec<u64>,
}

/// What an operation sees while it records its launches: where its values lie in the arena.
pub struct Launches<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) step: &'a PlannedStep,
    pub(super) index: usize,
    /// Address of the arena.
    pub(super) arena: u64,
    pub(super) list: &'a mut Vec<Launch>,
    pub(super) constants: &'a mut Vec<Memory>,
    /// Copies that are made before the first step, and where they go.
    pub(super) early: &'a mut Vec<(WeightCopy, u64)>,
}

impl Launches<'_> {
    /// The number of inputs.
    pub fn inputs(&self) -> usize {
        self.step.read.len()
    }

    /// The number of outputs.
    pub fn outputs(&self) -> usize {
        self.step.write.len()
    }

    /// Extent of input `i`.
    pub fn input_shape(&self, i: usize) -> Shape {
        self.step.read[i].1
    }

    /// Extent of output `o`.
    pub fn output_shape(&self, o: usize) -> Shape {
        self.step.write[o].1
    }

    /// Input `i`; the address of output 0 if that overwrites it.
    pub fn input(&self, i: usize) -> Pointer {
        self.pointer(self.step.read[i].0)
    }

    /// Output `o`, whose contents are undefined before a kernel writes them unless it persists.
    pub fn output(&self, o: usize) -> Pointer {
        self.pointer(self.step.write[o].0)
    }

    /// Working memory of [`crate::ops::Op::device_scratch`] bytes with undefined contents.
    pub fn scratch(&self) -> Pointer {
        self.pointer(self.step.scratch)
    }

    /// Working memory from byte `offset` on, for elements of bf16 if `narrow`, else of f32.
    pub fn scratch_at(&self, offset: usize, narrow: bool) -> Pointer {
        let address = self.scratch().address + offset as u64;
        Pointer { address, narrow }
    }

    /// Blocks from which a product of bf16 goes by `wgmma`, if any does.
    pub fn wgmma(&self) -> Option<usize> {
        self.gpu.wgmma()
    }

    /// A number of elements as a kernel's `int`.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is too large.
    pub fn int(&self, x: usize) -> Result<i32> {
        i32::try_from(x).map_err(|_| {
            let problem = format!("expected at most {} elements, found {x}", i32::MAX);
            Error::shape(self.step.op.name(), problem)
        })
    }

    /// Memory that keeps `words` for all replays, such as a table of addresses.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no memory for it.
    pub fn constant(&mut self, words: &[u64]) -> Result<Pointer> {
        let memory = self.gpu.memory(size_of_val(words))?;
        memory.write(0, bytemuck::cast_slice(words))?;
        let address = memory.address;
        self.constants.push(memory);
        Ok(Pointer {
            address,
            narrow: false,
        })
    }

    /// The copy that the operation has asked for ([`crate::ops::Op::device_copy`]).
    ///
    /// # Errors
    /// As [`Launches::launch`].
    pub fn copy(&mut self, copy: WeightCopy) -> Result<Pointer> {
        let to = self.pointer(self.step.copy).address;
        if self.step.early {
            self.early.push((copy, to));
        } else {
            copies::launch(self, &[(copy, to)])?;
        }
        Ok(Pointer::to(to, copy.narrow))
    }

    /// Appends a launch; one without blocks is left out.
    ///
    /// # Errors
    /// [`Error::Device`] if the device has no such kernel, if its parameters are others, if there are
    /// more blocks than a grid holds, or if a pointer's elements are stored in another type than the
    /// kernel's.
    pub fn launch<A: Arguments>(&mut self, grid: Grid, arguments: &A) -> Result<()> {
        let launch = prepare(self.gpu, self.index, grid, arguments)?;
        self.list.extend(launch);
        Ok(())
    }

    fn pointer(&self, slot: Slot) -> Pointer {
        Pointer {
            address: self.arena + slot.offset as u64 * size_of::<f32>() as u64,
            narrow: slot.narrow,
        }
    }
}

/// A launch of step `step`; none if there are no blocks. Errors as [`Launches::launch`].
pub(super) fn prepare<A: Arguments>(
    gpu: &Gpu,
    step: usize,
    grid: Grid,
    arguments: &A,
) -> Result<Option<Launch>> {
    if grid.blocks.contains(&0) {
        return Ok(None);
    }
    let words = arguments.words();
    let mut stored = words.iter().filter_map(|w| w.stored);
    let name = match stored.next() {
        None => A::KERNEL.to_owned(),
        Some(narrow) => {
            if stored.any(|other| other != narrow) {
                let problem = "expected one storage type, found f32 and bf16";
                return Err(Error::device(A::KERNEL, problem));
            }
            format!("{}_{}", A::KERNEL, if narrow { "bf16" } else { "f32" })
        }
    };
    if let Some(position) = words.iter().position(|w| !w.fits) {
        let problem = format!("parameter {position}: expected f32, found bf16");
        return Err(Error::device(name, problem));
    }
    if grid.blocks[0] > i32::MAX as u32 || grid.blocks[1].max(grid.blocks[2]) > 65_535 {
        let problem = format!("more blocks than a grid holds: {:?}", grid.blocks);
        return Err(Error::device(name, problem));
    }
    let function = gpu.0.function(&name)?;
    if let Some(parameters) = &function.parameters {
        let sizes: Vec<u32> = words.iter().map(|w| w.bytes).collect();
        if sizes != *parameters {
            let problem = format!("parameters of {parameters:?} bytes, arguments of {sizes:?}");
            return Err(Error::device(name, problem));
        }
    }
    Ok(Some(Launch {
        step,
        function,
        grid,
        arguments: words.iter().map(|w| w.bits).collect(),
    }))
}
