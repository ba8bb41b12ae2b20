//! The CPU: a session owns a plan's arena and replays its steps; rayon works inside the kernels.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::marker::PhantomData;

use memmap2::MmapMut;

use super::Aside;
use crate::error::{Error, Result};
use crate::ops::{Kernel, Op};
use crate::tape::{Kind, Plan, PlannedStep, Slot, Target, Var};
use crate::tensor::{Real, Shape};

/// An element type for which operations have kernels.
pub trait Element: Real {
    #[doc(hidden)]
    fn run(op: &dyn Op, io: &mut Io<'_, Self>);
}

impl Element for f32 {
    fn run(op: &dyn Op, io: &mut Io<'_, Self>) {
        Kernel::<f32>::run(op, io);
    }
}

impl Element for f64 {
    fn run(op: &dyn Op, io: &mut Io<'_, Self>) {
        Kernel::<f64>::run(op, io);
    }
}

/// What a kernel sees: its inputs, outputs and scratch, as slices of the arena.
pub struct Io<'a, T> {
    arena: *mut T,
    step: &'a PlannedStep,
    taken: &'a mut [bool],
    scratch_taken: bool,
    lifetime: PhantomData<&'a mut T>,
}

// SAFETY: through a shared `Io` only inputs and extents can be reached, and those are only read.
unsafe impl<T: Sync> Sync for Io<'_, T> {}

impl<'a, T: Real> Io<'a, T> {
    /// Input `i`. Not to be called for the input that is overwritten ([`Io::in_place`]).
    pub fn input(&self, i: usize) -> &'a [T] {
        assert_ne!(
            self.step.in_place,
            Some(i),
            "{} reads an overwritten input",
            self.step.op.name()
        );
        // SAFETY: `layout` places values that are alive at the same step apart, so this piece of
        // the arena is written neither by this step's outputs nor by its scratch.
        unsafe {
            std::slice::from_raw_parts(self.start(self.step.read[i].0), self.step.read[i].0.len)
        }
    }

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

    /// Output `o`. A computed value's contents are undefined before the kernel writes them; a
    /// persistent value holds what it held before; with [`Io::in_place`], output 0 holds the input.
    ///
    /// # Panics
    /// If a kernel takes the same output twice.
    pub fn output(&mut self, o: usize) -> &'a mut [T] {
        assert!(
            !self.taken[o],
            "{} takes output {o} twice",
            self.step.op.name()
        );
        self.taken[o] = true;
        let slot = self.step.write[o].0;
        // SAFETY: as for `input`, and `taken` makes sure that no two slices to it exist. Outputs
        // of one step are distinct values.
        unsafe { std::slice::from_raw_parts_mut(self.start(slot), slot.len) }
    }

    /// Whether output 0 lies where the input that [`Op::in_place`] names lay.
    pub fn in_place(&self) -> bool {
        self.step.in_place.is_some()
    }

    /// Working memory of at least [`Op::scratch`] elements with undefined contents.
    ///
    /// # Panics
    /// If a kernel takes it twice.
    pub fn scratch(&mut self) -> &'a mut [T] {
        assert!(
            !self.scratch_taken,
            "{} takes its scratch twice",
            self.step.op.name()
        );
        self.scratch_taken = true;
        // SAFETY: as for `output`.
        unsafe {
            std::slice::from_raw_parts_mut(self.start(self.step.scratch), self.step.scratch.len)
        }
    }

    fn start(&self, slot: Slot) -> *mut T {
        // SAFETY: the plan's slots lie inside the arena of `Plan::len` elements.
        unsafe { self.arena.add(slot.offset) }
    }
}

/// Memory for one plan, and its replay.
pub struct Session<T> {
    plan: Plan,
    arena: Arena<T>,
    taken: Vec<bool>,
    fetched: VecDeque<Vec<T>>,
}

impl<T: Element> Session<T> {
    /// Allocates the arena; all values start as zeros.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is not enough memory, or the plan is one for a GPU.
    pub fn new(plan: Plan) -> Result<Self> {
        if plan.target() != Target::Cpu {
            let problem = format!(
                "expected one for {:?}, found {:?}",
                Target::Cpu,
                plan.target()
            );
            return Err(Error::argument("plan", problem));
        }
        let arena = Arena::new(plan.len())?;
        let outputs = plan
            .steps()
            .iter()
            .map(|s| s.write.len())
            .max()
            .unwrap_or(0);
        Ok(Self {
            plan,
            arena,
            taken: vec![false; outputs],
            fetched: VecDeque::new(),
        })
    }

    /// What is replayed.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes reserved for the arena, all that the session needs beside its plan.
    pub fn bytes(&self) -> usize {
        self.arena.map.len()
    }

    /// The elements of a persistent or kept value.
    ///
    /// # Panics
    /// If the value is neither: its memory may hold something else by now.
    pub fn read(&self, var: Var) -> &[T] {
        let value = &self.plan.values()[var.index()];
        assert!(value.kept, "{} was not kept", value.name);
        self.arena.slice(self.plan.slot(var))
    }

    /// The elements of an input, parameter or state, to be written.
    ///
    /// # Panics
    /// If the value is computed by the tape.
    pub fn values_mut(&mut self, var: Var) -> &mut [T] {
        let value = &self.plan.values()[var.index()];
        assert_ne!(
            value.kind,
            Kind::Computed,
            "{} is computed by the tape",
            value.name
        );
        self.arena.slice_mut(self.plan.slot(var))
    }

    /// Writes an input, parameter or state.
    ///
    /// # Panics
    /// If the value is computed by the tape or holds another number of elements.
    pub fn write(&mut self, var: Var, elements: &[T]) {
        self.values_mut(var).copy_from_slice(elements);
    }

    /// Runs all steps once.
    pub fn run(&mut self) {
        (0..self.plan.steps().len()).for_each(|index| self.step(index));
    }

    /// Runs all steps, calling `after` behind each with its number.
    pub fn run_observed(&mut self, mut after: impl FnMut(usize)) {
        for index in 0..self.plan.steps().len() {
            self.step(index);
            after(index);
        }
    }

    /// Runs all steps, letting `round` change the results of each before they are read: a device may store them in
    /// fewer bits.
    pub fn run_rounded(&mut self, mut round: impl FnMut(Var, &mut [T])) {
        for index in 0..self.plan.steps().len() {
            self.step(index);
            for &output in &self.plan.steps()[index].outputs {
                round(output, self.arena.slice_mut(self.plan.slot(output)));
            }
        }
    }

    /// Runs all steps and returns the name of the first computed value with a NaN or infinity among its
    /// elements, in the order of the tape; stops there. What persists may be so from an earlier replay.
    pub fn run_checked(&mut self) -> Option<String> {
        for index in 0..self.plan.steps().len() {
            self.step(index);
            for &output in &self.plan.steps()[index].outputs {
                let value = &self.plan.values()[output.index()];
                let elements = self.arena.slice(self.plan.slot(output));
                if value.kind == Kind::Computed && elements.iter().any(|x| !x.is_finite()) {
                    return Some(value.name.clone());
                }
            }
        }
        None
    }

    fn step(&mut self, index: usize) {
        let step = &self.plan.steps()[index];
        self.taken.fill(false);
        let mut io = Io {
            arena: self.arena.start(),
            step,
            taken: &mut self.taken,
            scratch_taken: false,
            lifetime: PhantomData,
        };
        T::run(&*step.op, &mut io);
    }
}

impl<T: Element> super::Session<T> for Session<T> {
    fn plan(&self) -> &Plan {
        self.plan()
    }
    fn write(&mut self, var: Var, elements: &[T]) -> Result<()> {
        self.write(var, elements);
        Ok(())
    }
    fn read(&self, var: Var) -> Result<Cow<'_, [T]>> {
        Ok(Cow::Borrowed(self.read(var)))
    }
    fn replay(&mut self) -> Result<()> {
        self.run();
        Ok(())
    }
    fn replay_checked(&mut self) -> Result<Option<String>> {
        Ok(self.run_checked())
    }
    fn fetch(&mut self, var: Var) -> Result<()> {
        self.fetched.push_back(self.read(var).to_vec());
        Ok(())
    }
    fn fetched(&mut self) -> Result<Option<Vec<T>>> {
        Ok(self.fetched.pop_front())
    }
    fn set_aside(&mut self, aside: &mut Aside<T>) -> Result<()> {
        let all = Slot {
            len: self.plan.persistent(),
            ..Slot::default()
        };
        *aside = Aside::Host(self.arena.slice(all).to_vec());
        Ok(())
    }
}

/// Bytes of this machine's main memory, where the system tells (Linux).
#[cfg(target_os = "linux")]
pub fn memory() -> Option<u64> {
    // SAFETY: asks for two numbers; -1 where there is none.
    let [pages, bytes] =
        [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|what| unsafe { libc::sysconf(what) });
    u64::try_from(pages)
        .ok()?
        .checked_mul(u64::try_from(bytes).ok()?)
}

/// Bytes of this machine's main memory, where the system tells (Linux).
#[cfg(not(target_os = "linux"))]
pub fn memory() -> Option<u64> {
    None
}

/// Refuses what the machine cannot hold: a system that promises more memory than it has would end the
/// program once it is used.
pub(crate) fn check_memory(bytes: usize) -> Result<()> {
    match memory() {
        Some(memory) if bytes as u64 > memory => {
            let problem = format!(
                "expected at most this machine's {} MiB, found a need of {} MiB",
                memory >> 20,
                bytes >> 20
            );
            Err(Error::argument("memory", problem))
        }
        _ => Ok(()),
    }
}

/// Zeroed memory, in large pages where the system has them: a network's tensors span so many small ones
/// that looking up their addresses would cost time. Pages that are never touched cost nothing.
struct Arena<T> {
    map: MmapMut,
    element: PhantomData<T>,
}

impl<T: Real> Arena<T> {
    fn new(len: usize) -> Result<Self> {
        let bytes = len.max(1).saturating_mul(size_of::<T>());
        check_memory(bytes)?;
        let map = MmapMut::map_anon(bytes).map_err(|e| {
            let problem = format!("cannot reserve {} MiB for this plan: {e}", bytes >> 20);
            Error::argument("memory", problem)
        })?;
        // A wish, not a need: where it is refused, small pages do.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self {
            map,
            element: PhantomData,
        })
    }

    fn start(&mut self) -> *mut T {
        self.map.as_mut_ptr().cast()
    }

    fn slice(&self, slot: Slot) -> &[T] {
        let elements: &[T] = bytemuck::cast_slice(&self.map);
        &elements[slot.offset..][..slot.len]
    }

    fn slice_mut(&mut self, slot: Slot) -> &mut [T] {
        let elements: &mut [T] = bytemuck::cast_slice_mut(&mut self.map);
        &mut elements[slot.offset..][..slot.len]
    }
}
