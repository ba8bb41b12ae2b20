use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::launch::{Launch, Launches, Pointer};
use super::{Event, Gpu, Memory, copies};
use crate::device::{self, Aside};
use crate::error::{Error, Result};
use crate::tape::{Kind, Plan, Slot, Target, Var};

/// Memory and launches for one plan, and their replay.
pub struct Session {
    gpu: Gpu,
    plan: Plan,
    launches: Vec<Launch>,
    memory: Arc<Buffers>,
    /// One replay, once it was asked for.
    graph: Option<Graph>,
    fetches: VecDeque<Fetch>,
}

/// What launches point to: it must outlive every graph that was captured from them.
struct Buffers {
    arena: Memory,
    /// Tables that operations made.
    _constants: Vec<Memory>,
}

/// The memory of a session ([`Session::hold`]).
pub(crate) struct Hold(#[expect(dead_code, reason = "it is there to be dropped")] Arc<Buffers>);

/// A byte that nobody computes all over: as f32 and bf16 a NaN.
const POISON: u8 = 0xff;

/// Bytes of an arena's word.
const WORD: usize = size_of::<f32>();

impl Session {
    /// Allocates the arena and prepares all launches; all values start as zeros. The plan is one for a
    /// GPU ([`crate::tape::Options::gpu`]).
    ///
    /// # Errors
    /// [`Error::Device`] if there is not enough memory or a kernel cannot be had, [`Error::NoKernel`] if
    /// an operation has none for GPUs, [`Error::Argument`] if the plan is for something else.
    pub fn new(gpu: &Gpu, plan: Plan) -> Result<Self> {
        if plan.target() == Target::Cpu {
            let problem = format!(
                "expected one for {:?}, found {:?}",
                Target::Gpu,
                plan.target()
            );
            return Err(Error::argument("plan", problem));
        }
        let arena = gpu.memory(plan.len() * WORD)?;
        let (mut launches, mut constants) = (Vec::new(), Vec::new());
        let mut early = Vec::new();
        for (index, step) in plan.steps().iter().enumerate() {
            step.op.launch(&mut Launches {
                gpu,
                step,
                index,
                arena: arena.address,
                list: &mut launches,
                constants: &mut constants,
                early: &mut early,
            })?;
        }
        if let (Some(step), false) = (plan.steps().first(), early.is_empty()) {
            let mut first = Vec::new();
            let at = &mut Launches {
                gpu,
                step,
                index: 0,
                arena: arena.address,
                list: &mut first,
                constants: &mut constants,
                early: &mut Vec::new(),
            };
            copies::launch(at, &early)?;
            launches.splice(0..0, first);
        }
        Ok(Self {
            gpu: gpu.clone(),
            plan,
            launches,
            memory: Arc::new(Buffers {
                arena,
                _constants: constants,
            }),
            graph: None,
            fetches: VecDeque::new(),
        })
    }

    /// What is replayed.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What one replay launches, in order. What is done for all steps at the beginning belongs to the first.
    pub fn launches(&self) -> &[Launch] {
        &self.launches
    }

    /// Bytes of device memory: the arena, and the operations' tables.
    pub fn bytes(&self) -> usize {
        let tables = self.memory._constants.iter().map(Memory::bytes);
        self.memory.arena.bytes() + tables.sum::<usize>()
    }

    /// Writes an input, parameter or state, rounded where it is stored as bf16.
    ///
    /// # Errors
    /// [`Error::Device`] if the device refuses, or an earlier kernel failed.
    ///
    /// # Panics
    /// If the value is computed by the tape or holds another number of elements.
    pub fn write(&mut self, var: Var, elements: &[f32]) -> Result<()> {
        let value = &self.plan.values()[var.index()];
        let slot = self.plan.slot(var);
        assert_ne!(value.kind, Kind::Computed, "{} is computed", value.name);
        assert_eq!(elements.len(), slot.len, "elements of {}", value.name);
        let arena = &self.memory.arena;
        if slot.narrow {
            let rounded: Vec<bf16> = elements.iter().map(|&x| bf16::from_f32(x)).collect();
            arena.write(slot.offset * WORD, bytemuck::cast_slice(&rounded))
        } else {
            arena.write(slot.offset * WORD, bytemuck::cast_slice(elements))
        }
    }

    /// Where an input lies, for kernels that write it between replays.
    ///
    /// # Panics
    /// If the value is computed by the tape.
    pub(crate) fn input(&self, var: Var) -> Pointer {
        let value = &self.plan.values()[var.index()];
        let slot = self.plan.slot(var);
        assert_ne!(value.kind, Kind::Computed, "{} is computed", value.name);
        Pointer::to(
            self.memory.arena.address + (slot.offset * WORD) as u64,
            slot.narrow,
        )
    }

    /// Keeps its memory, for kernels that know its addresses, as long as what is returned lives.
    pub(crate) fn hold(&self) -> Hold {
        Hold(self.memory.clone())
    }

    /// What it runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The elements of a persistent or kept value, once the replays queued so far are done.
    ///
    /// # Errors
    /// [`Error::Device`] if a kernel failed.
    ///
    /// # Panics
    /// If the value is neither: its memory may hold something else by now.
    pub fn read(&self, var: Var) -> Result<Vec<f32>> {
        self.elements(self.kept(var))
    }

    fn kept(&self, var: Var) -> Slot {
        let value = &self.plan.values()[var.index()];
        assert!(value.kept, "{} was not kept", value.name);
        self.plan.slot(var)
    }

    fn elements(&self, slot: Slot) -> Result<Vec<f32>> {
        elements(slot, |to| self.memory.arena.read(slot.offset * WORD, to))
    }

    /// Queues all steps once.
    ///
    /// # Errors
    /// [`Error::Device`] if the device refuses a launch.
    pub fn run(&mut self) -> Result<()> {
        queue(&self.gpu, &self.launches)
    }

    /// Runs all steps once, each launch between two events, inside ranges named after the steps'
    /// operations, and returns the time of each. `ahead` queues work in front that is long enough for the
    /// launches to be queued meanwhile: otherwise their times contain waiting for the host.
    ///
    /// # Errors
    /// [`Error::Device`] if a kernel failed.
    pub fn run_timed(&mut self, ahead: impl FnOnce() -> Result<()>) -> Result<Vec<Timed>> {
        let events: Vec<Event<'_>> = (0..=self.launches.len())
            .map(|_| Event::new(&self.gpu))
            .collect::<Result<_>>()?;
        ahead()?;
        events[0].record()?;
        for (launch, event) in self.launches.iter().zip(&events[1..]) {
            let name = self.plan.steps()[launch.step].op.name();
            self.gpu.range(name, || {
                queue(&self.gpu, std::slice::from_ref(launch))?;
                event.record()
            })?;
        }
        self.gpu.synchronize()?;
        let start = &events[0];
        let pairs = self.launches.iter().zip(events.windows(2));
        pairs
            .map(|(launch, pair)| {
                Ok(Timed {
                    step: launch.step,
                    start: start.until(&pair[0])?,
                    time: pair[0].until(&pair[1])?,
                })
            })
            .collect()
    }

    /// The ranges of bytes that values and working memory take up in the arena; whether they persist.
    fn taken(&self) -> impl Iterator<Item = (Range<usize>, bool)> + '_ {
        let values = self.plan.values().iter().enumerate().map(|(i, value)| {
            let persists = value.kind != Kind::Computed;
            (self.plan.slots()[i], persists)
        });
        let steps = self.plan.steps().iter();
        let working = steps.flat_map(|step| [(step.scratch, false), (step.copy, false)]);
        values.chain(working).map(|(slot, persists)| {
            let start = slot.offset * WORD;
            (start..start + bytes(slot), persists)
        })
    }

    /// Fills everything but persistent values with bytes 0xFF, which are NaN: results of an earlier replay,
    /// working memory, and what lies between the values.
    pub(crate) fn poison(&mut self) -> Result<()> {
        let arena = &self.memory.arena;
        let mut bytes = vec![0; arena.bytes()];
        arena.read(0, &mut bytes)?;
        let mut poisoned = vec![POISON; bytes.len()];
        for (range, _) in self.taken().filter(|(_, persists)| *persists) {
            poisoned[range.clone()].copy_from_slice(&bytes[range]);
        }
        arena.write(0, &poisoned)
    }

    /// Whether everything that belongs to no value is as [`Session::poison`] left it.
    pub(crate) fn is_intact(&self) -> Result<bool> {
        let arena = &self.memory.arena;
        let mut bytes = vec![0; arena.bytes()];
        arena.read(0, &mut bytes)?;
        for (range, _) in self.taken() {
            bytes[range].fill(POISON);
        }
        Ok(bytes.iter().all(|&byte| byte == POISON))
    }

    /// Runs all steps once and returns the name of the first computed value with a NaN or infinity among its
    /// elements, in the order of the tape; stops there. What persists may be so from an earlier replay.
    ///
    /// # Errors
    /// [`Error::Device`] if a kernel failed.
    pub fn run_checked(&mut self) -> Result<Option<String>> {
        let mut launches = &self.launches[..];
        for (index, step) in self.plan.steps().iter().enumerate() {
            let count = launches.iter().take_while(|l| l.step == index).count();
            let (own, later) = launches.split_at(count);
            queue(&self.gpu, own)?;
            launches = later;
            for (&output, &(slot, _)) in step.outputs.iter().zip(&step.write) {
                let value = &self.plan.values()[output.index()];
                if value.kind == Kind::Computed
                    && self.elements(slot)?.iter().any(|x| !x.is_finite())
                {
                    return Ok(Some(value.name.clone()));
                }
            }
        }
        Ok(None)
    }

    /// Captures one replay.
    ///
    /// # Errors
    /// [`Error::Device`] if the device cannot.
    pub fn capture(&self) -> Result<Graph> {
        let mut run = || queue(&self.gpu, &self.launches);
        Ok(Graph {
            handle: self.gpu.0.capture(&mut run)?,
            gpu: self.gpu.clone(),
            _memory: self.memory.clone(),
        })
    }
}

impl device::Session<f32> for Session {
    fn plan(&self) -> &Plan {
        self.plan()
    }
    fn write(&mut self, var: Var, elements: &[f32]) -> Result<()> {
        self.write(var, elements)
    }
    fn read(&self, var: Var) -> Result<Cow<'_, [f32]>> {
        self.read(var).map(Cow::Owned)
    }
    fn replay(&mut self) -> Result<()> {
        if let Some(graph) = &self.graph {
            return graph.replay();
        }
        self.graph.insert(self.capture()?).replay()
    }
    fn replay_checked(&mut self) -> Result<Option<String>> {
        self.run_checked()
    }
    fn fetch(&mut self, var: Var) -> Result<()> {
        let slot = self.kept(var);
        let (arena, bytes) = (&self.memory.arena, bytes(slot));
        let address = arena.address + (slot.offset * WORD) as u64;
        let handle = self.gpu.0.fetch(address, bytes)?;
        self.fetches.push_back(Fetch {
            gpu: self.gpu.clone(),
            handle,
            slot,
        });
        Ok(())
    }
    fn fetched(&mut self) -> Result<Option<Vec<f32>>> {
        self.fetches.pop_front().map(|f| f.wait()).transpose()
    }
    fn set_aside(&mut self, aside: &mut Aside<f32>) -> Result<()> {
        if let Aside::Host(_) = aside {
            *aside = Aside::Device(self.gpu.memory(self.plan.persistent() * WORD)?);
        }
        match aside {
            Aside::Device(memory) => self.memory.arena.copy(memory),
            Aside::Host(_) => unreachable!("of the device since the line before"),
        }
    }
    fn on_gpu(&mut self) -> Option<&mut Session> {
        Some(self)
    }
}

/// A copy on its way to the host.
struct Fetch {
    gpu: Gpu,
    handle: u64,
    slot: Slot,
}

impl Fetch {
    fn wait(&self) -> Result<Vec<f32>> {
        elements(self.slot, |to| self.gpu.0.fetched(self.handle, to))
    }
}

/// Bytes of a value in memory.
fn bytes(slot: Slot) -> usize {
    slot.len * if slot.narrow { 2 } else { WORD }
}

/// A value whose bytes `read` delivers.
fn elements(slot: Slot, read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Vec<f32>> {
    if slot.narrow {
        let mut stored = vec![bf16::ZERO; slot.len];
        read(bytemuck::cast_slice_mut(&mut stored))?;
        Ok(stored.into_iter().map(f32::from).collect())
    } else {
        let mut elements = vec![0.0; slot.len];
        read(bytemuck::cast_slice_mut(&mut elements))?;
        Ok(elements)
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.gpu.0.free_fetch(self.handle);
    }
}

fn queue(gpu: &Gpu, launches: &[Launch]) -> Result<()> {
    for launch in launches {
        // SAFETY: the arguments are those of an `Arguments`, whose author promises that they fit the
        // kernel and that it touches only the step's values and tables; these lie in the session's
        // arena and constants, which live as long as whoever queues this.
        unsafe {
            gpu.0
                .launch(&launch.function, &launch.grid, &launch.arguments)
        }?;
    }
    Ok(())
}

/// When a launch ran, in milliseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Timed {
    /// Number of the plan's step.
    pub step: usize,
    /// From the beginning of the replay.
    pub start: f32,
    /// To the end of this launch.
    pub time: f32,
}

/// One replay of a session, captured: a single call queues all its launches. It keeps the session's
/// memory.
pub struct Graph {
    gpu: Gpu,
    handle: u64,
    _memory: Arc<Buffers>,
}

impl Graph {
    /// Queues the replay.
    ///
    /// # Errors
    /// [`Error::Device`] if the device refuses.
    pub fn replay(&self) -> Result<()> {
        self.gpu.0.replay(self.handle)
    }

    /// Milliseconds of one replay behind what `ahead` queues ([`Session::run_timed`]).
    ///
    /// # Errors
    /// [`Error::Device`] if a kernel failed.
    pub fn time(&self, ahead: impl FnOnce() -> Result<()>) -> Result<f32> {
        let (begin, end) = (Event::new(&self.gpu)?, Event::new(&self.gpu)?);
        ahead()?;
        begin.record()?;
        self.replay()?;
        end.record()?;
        self.gpu.synchronize()?;
        begin.until(&end)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.gpu.0.free_graph(self.handle);
    }
}
