//! The emulator as a device: memory is host memory, a launch is over when it returns.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::launch::Grid;
use super::{Description, End, Function};
use crate::device::cpu::check_memory;
use crate::device::emulator::{self, Buffer};
use crate::error::{Error, Result};

#[derive(Default)]
pub(super) struct Emulator(Mutex<State>);

#[derive(Default)]
struct State {
    memory: BTreeMap<u64, Buffer>,
    events: HashMap<u64, Option<Instant>>,
    graphs: HashMap<u64, Vec<Queued>>,
    /// Where launches go while a graph is captured.
    capturing: Option<Vec<Queued>>,
    handles: u64,
    /// Draws the order of threads.
    seed: Option<u64>,
}

/// A launch of a graph.
#[derive(Clone)]
struct Queued {
    function: Function,
    grid: Grid,
    arguments: Vec<u64>,
}

impl State {
    fn handle(&mut self) -> u64 {
        self.handles += 1;
        self.handles
    }

    /// The bytes at `address`, inside one piece of memory.
    fn bytes(&mut self, address: u64, len: usize) -> Result<&mut [u8]> {
        let outside = || Error::device("emulator", format!("no {len} bytes at {address:#x}"));
        let piece = self.memory.range_mut(..=address).next_back();
        let (&start, buffer) = piece.ok_or_else(outside)?;
        let offset = (address - start) as usize;
        buffer
            .bytes_mut()
            .get_mut(offset..)
            .and_then(|rest| rest.get_mut(..len))
            .ok_or_else(outside)
    }
}

impl Emulator {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End for Emulator {
    fn description(&self) -> Description {
        Description {
            name: "emulator".into(),
            ..Default::default()
        }
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        check_memory(bytes)?;
        let buffer = Buffer::new(bytes)?;
        let address = buffer.address() as u64;
        self.state().memory.insert(address, buffer);
        Ok(address)
    }

    fn free(&self, address: u64) {
        self.state().memory.remove(&address);
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        self.state().bytes(address, bytes)?.fill(0);
        Ok(())
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<()> {
        self.state()
            .bytes(address, from.len())?
            .copy_from_slice(from);
        Ok(())
    }

    fn read(&self, address: u64, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(self.state().bytes(address, to.len())?);
        Ok(())
    }

    fn function(&self, name: &str) -> Result<Function> {
        Ok(Function {
            handle: 0,
            name: name.into(),
            parameters: Some(emulator::parameters(name)?.to_vec()),
            registers: 0,
            shared: 0,
            local: 0,
            max_threads: 0,
        })
    }

    unsafe fn launch(&self, function: &Function, grid: &Grid, arguments: &[u64]) -> Result<()> {
        let mut state = self.state();
        if let Some(queue) = &mut state.capturing {
            queue.push(Queued {
                function: function.clone(),
                grid: *grid,
                arguments: arguments.to_vec(),
            });
            return Ok(());
        }
        let seed = state.seed;
        drop(state);
        let pointers = arguments.iter().map(|a| std::ptr::from_ref(a).cast_mut());
        let mut pointers: Vec<*mut c_void> = pointers.map(<*mut u64>::cast).collect();
        // SAFETY: as this function's contract; a parameter's value lies at the beginning of its word,
        // the processor being little-endian.
        let mut launch = || unsafe {
            let (blocks, threads, shared) = (grid.blocks, grid.threads, grid.shared as usize);
            emulator::launch(&function.name, blocks, threads, shared, &mut pointers)
        };
        match seed {
            Some(seed) => emulator::with_seed(seed, launch),
            None => launch(),
        }
    }

    fn occupancy(&self, _: &Function, _: &Grid) -> Result<u32> {
        Ok(0)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn event(&self) -> Result<u64> {
        let mut state = self.state();
        let event = state.handle();
        state.events.insert(event, None);
        Ok(event)
    }

    fn record(&self, event: u64) -> Result<()> {
        self.state().events.insert(event, Some(Instant::now()));
        Ok(())
    }

    fn elapsed(&self, from: u64, to: u64) -> Result<f32> {
        let state = self.state();
        let time = |event| state.events.get(&event).copied().flatten();
        match (time(from), time(to)) {
            (Some(from), Some(to)) => Ok((to - from).as_secs_f32() * 1e3),
            _ => Err(Error::device("emulator", "an event was not recorded")),
        }
    }

    fn free_event(&self, event: u64) {
        self.state().events.remove(&event);
    }

    fn capture(&self, queue: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        self.state().capturing = Some(Vec::new());
        let queued = queue();
        let mut state = self.state();
        let launches = state.capturing.take().unwrap_or_default();
        queued?;
        let graph = state.handle();
        state.graphs.insert(graph, launches);
        Ok(graph)
    }

    fn replay(&self, graph: u64) -> Result<()> {
        let launches = self.state().graphs.get(&graph).cloned();
        for queued in launches.into_iter().flatten() {
            // SAFETY: as it was promised when the launch was captured; the graph's owner keeps the
            // memory.
            unsafe { self.launch(&queued.function, &queued.grid, &queued.arguments) }?;
        }
        Ok(())
    }

    fn free_graph(&self, graph: u64) {
        self.state().graphs.remove(&graph);
    }

    fn range_push(&self, _: &str) {}
    fn range_pop(&self) {}

    fn reorder(&self, seed: u64) {
        self.state().seed = Some(seed);
    }
}
