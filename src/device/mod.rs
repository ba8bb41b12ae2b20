//! What a tape runs on.

#[cfg(feature = "cuda")]
pub mod code;
pub mod cpu;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod gpu;
#[cfg(feature = "cuda")]
pub(crate) mod nvcc;
pub mod philox;
pub mod simd;

use std::borrow::Cow;

use crate::error::Result;
use crate::tape::{Options, Plan, Tape, Var};

use self::gpu::Gpu;

/// Most bytes of a value that is fetched ([`Session::fetch`]).
pub const FETCH: usize = 4 << 10;

/// The memory of one plan and its replay, wherever that is: what training and evaluation need. Work may only be
/// queued when a call returns; [`Session::read`] and [`Session::fetched`] wait for it.
pub trait Session<T: Clone>: Send + Sync {
    /// What is replayed.
    fn plan(&self) -> &Plan;

    /// Writes an input, parameter or state, behind the replays queued so far.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses, or an earlier kernel failed.
    ///
    /// # Panics
    /// If the value is computed by the tape or holds another number of elements.
    fn write(&mut self, var: Var, elements: &[T]) -> Result<()>;

    /// The elements of a persistent or kept value, once the replays queued so far are done.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if a kernel failed.
    ///
    /// # Panics
    /// If the value is neither: its memory may hold something else by now.
    fn read(&self, var: Var) -> Result<Cow<'_, [T]>>;

    /// Queues one replay; a GPU does it as one captured graph.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the device refuses.
    fn replay(&mut self) -> Result<()>;

    /// Replays and returns the name of the first value with a NaN or infinity among its elements, in the order
    /// of the tape; stops there.
    ///
    /// # Errors
    /// As [`Session::read`].
    fn replay_checked(&mut self) -> Result<Option<String>>;

    /// Takes a copy of a small kept value as the replays queued so far leave it; [`Session::fetched`] returns it.
    ///
    /// # Errors
    /// As [`Session::replay`].
    ///
    /// # Panics
    /// As [`Session::read`], or if the value takes more than [`FETCH`] bytes.
    fn fetch(&mut self, var: Var) -> Result<()>;

    /// The oldest copy that was fetched, once it is there: what was queued behind it need not be done. None if
    /// there is no such copy.
    ///
    /// # Errors
    /// As [`Session::read`].
    fn fetched(&mut self) -> Result<Option<Vec<T>>>;

    /// Copies all that persists, inputs too, as the replays queued so far leave it, over what was set aside before.
    /// Nothing waits for it; on a GPU memory is allocated the first time.
    ///
    /// # Errors
    /// As [`Session::replay`]; [`crate::Error::Device`] if there is no memory for it.
    fn set_aside(&mut self, aside: &mut Aside<T>) -> Result<()>;

    /// The session itself if it is one of a GPU, where kernels besides the tape's may write inputs
    /// ([`crate::data::device`]).
    fn on_gpu(&mut self) -> Option<&mut gpu::Session> {
        None
    }
}

/// What [`Session::set_aside`] copied, where the session lies, to be read by another thread while the session goes on.
#[derive(Debug)]
pub enum Aside<T> {
    /// In main memory.
    Host(Vec<T>),
    /// In a GPU's memory.
    Device(gpu::Memory),
}

impl<T> Default for Aside<T> {
    fn default() -> Self {
        Self::Host(Vec::new())
    }
}

impl Aside<f32> {
    /// Takes what was set aside last: the words of the plan ([`Plan::persistent`]), in which a value that is stored in
    /// full lies as its slot says.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn take(&mut self) -> Result<Vec<f32>> {
        match self {
            Self::Host(words) => Ok(std::mem::take(words)),
            Self::Device(memory) => {
                let mut words = vec![0.0; memory.bytes() / size_of::<f32>()];
                memory.read_aside(bytemuck::cast_slice_mut(&mut words))?;
                Ok(words)
            }
        }
    }
}

/// Where tapes are replayed.
#[derive(Clone, Default, Debug)]
pub enum Backend {
    /// This machine's processor.
    #[default]
    Cpu,
    /// A GPU or the emulator.
    Gpu {
        /// Which.
        gpu: Gpu,
        /// Whether activations are stored as bf16 ([`crate::tape::Value::narrow`]).
        narrow: bool,
    },
}

impl Backend {
    /// What computes: `cpu`, or the GPU's name ([`Gpu::name`]).
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".into(),
            Self::Gpu { gpu, .. } => gpu.name(),
        }
    }

    /// Lays out the memory of `tape` and allocates it; all values start as zeros.
    ///
    /// # Errors
    /// As [`cpu::Session::new`] and [`gpu::Session::new`].
    pub fn session(&self, tape: &Tape) -> Result<Box<dyn Session<f32>>> {
        Ok(match self {
            Self::Cpu => Box::new(cpu::Session::new(Plan::new(tape, Options::default())?)?),
            Self::Gpu { gpu, narrow } => {
                let plan = Plan::new(tape, Options::gpu(*narrow))?;
                Box::new(gpu::Session::new(gpu, plan)?)
            }
        })
    }
}
