//! The emulator as a device: memory is host memory, a launch is over when it returns.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Instant;

use super::launch::Grid;
use super::{Allocated, Description, End, FETCH, Function, Traffic};
use crate::device::cpu::check_memory;
use crate::device::emulator::{self, Buffer};
use crate::error::{Error, Result};

#[derive(Default)]
pub(super) struct Emulator(Mutex<State>, Allocated);

#[derive(Default)]
struct State {
    memory: BTreeMap<u64, Buffer>,
    events: HashMap<u64, Option<Instant>>,
    graphs: HashMap<u64, Vec<Queued>>,
    fetches: HashMap<u64, Vec<u8>>,
    /// While a graph is captured: by whom, and where launches go.
    capturing: Option<(ThreadId, Vec<Queued>)>,
    /// Memory that was given back during a capture.
    given_back: Vec<u64>,
    handles: u64,
    /// Draws the order of threads.
    seed: Option<u64>,
    traffic: Traffic,
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

impl Queued {
    /// # Safety
    /// As [`End::launch`].
    unsafe fn run(mut self, seed: Option<u64>) -> Result<()> {
        let pointers = self.arguments.iter_mut().map(std::ptr::from_mut);
        let mut pointers: Vec<*mut c_void> = pointers.map(<*mut u64>::cast).collect();
        let (name, grid) = (&self.function.name, &self.grid);
        // SAFETY: as this function's contract; a parameter's value lies at the beginning of its word,
        // the processor being little-endian.
        let mut launch = || unsafe {
            let (blocks, threads, shared) = (grid.blocks, grid.threads, grid.shared as usize);
            emulator::launch(name, blocks, threads, shared, &mut pointers)
        };
        match seed {
            Some(seed) => emulator::with_seed(seed, launch),
            None => launch(),
        }
    }
}

fn captured(doing: &str) -> Error {
    let problem = format!("{doing}: not while a graph is captured");
    Error::device("emulator", problem)
}

impl Emulator {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For what the driver refuses while a graph is captured.
    fn enter(&self, doing: &str) -> Result<MutexGuard<'_, State>> {
        let state = self.state();
        match state.capturing {
            Some(_) => Err(captured(doing)),
            None => Ok(state),
        }
    }
}

/// A capture that is under way. However it ends, the queue can be used again.
struct Capture<'a>(&'a Emulator);

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.capturing = None;
        for address in std::mem::take(&mut state.given_back) {
            state.memory.remove(&address);
        }
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
        self.enter("allocating memory")?
            .memory
            .insert(address, buffer);
        Ok(address)
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        if state.capturing.is_some() {
            state.given_back.push(address);
        } else {
            state.memory.remove(&address);
        }
    }

    fn allocated(&self) -> &Allocated {
        &self.1
    }

    fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        self.enter("clearing memory")?
            .bytes(address, bytes)?
            .fill(0);
        Ok(())
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<()> {
        let mut state = self.enter("writing")?;
        state.traffic.writes += 1;
        state.bytes(address, from.len())?.copy_from_slice(from);
        Ok(())
    }

    fn read(&self, address: u64, to: &mut [u8]) -> Result<()> {
        let mut state = self.enter("reading")?;
        state.traffic.reads += 1;
        to.copy_from_slice(state.bytes(address, to.len())?);
        Ok(())
    }

    fn read_aside(&self, address: u64, to: &mut [u8]) -> Result<()> {
        let mut state = self.enter("reading")?;
        state.traffic.reads_aside += 1;
        to.copy_from_slice(state.bytes(address, to.len())?);
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let mut state = self.enter("copying")?;
        state.traffic.copies += 1;
        let copied = state.bytes(from, bytes)?.to_vec();
        state.bytes(to, bytes)?.copy_from_slice(&copied);
        Ok(())
    }

    fn fetch(&self, address: u64, bytes: usize) -> Result<u64> {
        assert!(bytes <= FETCH, "{bytes} bytes fetched");
        let mut state = self.enter("fetching")?;
        state.traffic.fetches += 1;
        let copy = state.bytes(address, bytes)?.to_vec();
        let fetch = state.handle();
        state.fetches.insert(fetch, copy);
        Ok(fetch)
    }

    fn fetched(&self, fetch: u64, to: &mut [u8]) -> Result<()> {
        let state = self.enter("waiting for a fetch")?;
        to.copy_from_slice(&state.fetches[&fetch]);
        Ok(())
    }

    fn free_fetch(&self, fetch: u64) {
        self.state().fetches.remove(&fetch);
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
        let launch = Queued {
            function: function.clone(),
            grid: *grid,
            arguments: arguments.to_vec(),
        };
        let mut state = self.state();
        match &mut state.capturing {
            Some((thread, queue)) if *thread == thread::current().id() => {
                queue.push(launch);
                return Ok(());
            }
            Some(_) => return Err(captured(&function.name)),
            None => {}
        }
        state.traffic.launches += 1;
        let seed = state.seed;
        drop(state);
        // SAFETY: as this function's contract.
        unsafe { launch.run(seed) }
    }

    fn occupancy(&self, _: &Function, _: &Grid) -> Result<u32> {
        Ok(0)
    }

    fn synchronize(&self) -> Result<()> {
        self.enter("waiting")?.traffic.waits += 1;
        Ok(())
    }

    fn event(&self) -> Result<u64> {
        let mut state = self.state();
        let event = state.handle();
        state.events.insert(event, None);
        Ok(event)
    }

    fn record(&self, event: u64) -> Result<()> {
        let mut state = self.enter("recording an event")?;
        state.events.insert(event, Some(Instant::now()));
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
        self.enter("capturing a graph")?.capturing = Some((thread::current().id(), Vec::new()));
        let capture = Capture(self);
        queue()?;
        let mut state = self.state();
        let (_, launches) = state.capturing.take().expect("this capture");
        let graph = state.handle();
        state.graphs.insert(graph, launches);
        drop(state);
        drop(capture);
        Ok(graph)
    }

    fn replay(&self, graph: u64) -> Result<()> {
        let mut state = self.enter("replaying a graph")?;
        state.traffic.replays += 1;
        let (launches, seed) = (state.graphs.get(&graph).cloned(), state.seed);
        drop(state);
        for launch in launches.into_iter().flatten() {
            // SAFETY: as it was promised when the launch was captured; the graph's owner keeps the
            // memory.
            unsafe { launch.run(seed) }?;
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

    fn traffic(&self) -> Traffic {
        self.state().traffic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_takes_the_launches_of_its_thread_alone() {
        let end = Emulator::default();
        let function = Function {
            handle: 0,
            name: "never_run".into(),
            parameters: None,
            registers: 0,
            shared: 0,
            local: 0,
            max_threads: 0,
        };
        // SAFETY: launched while a graph is captured, and the graph is not replayed.
        let launch = || unsafe { end.launch(&function, &Grid::new(1, 32), &[]) };
        let (kept, freed) = (end.allocate(4).unwrap(), end.allocate(4).unwrap());
        let elsewhere = || {
            let refused = [
                launch(),
                end.clear(kept, 4),
                end.write(kept, &[1; 4]),
                end.read(kept, &mut [0; 4]),
                end.synchronize(),
                end.capture(&mut || Ok(())).map(drop),
            ];
            for result in refused {
                let problem = result.unwrap_err().to_string();
                let expected = "not while a graph is captured";
                assert!(problem.ends_with(expected), "{problem}");
            }
            end.free(freed);
        };
        let graph = end.capture(&mut || {
            launch()?;
            thread::scope(|scope| scope.spawn(elsewhere).join()).expect("the other thread");
            assert!(end.state().memory.contains_key(&freed));
            launch()
        });
        let state = end.state();
        assert_eq!(state.graphs[&graph.unwrap()].len(), 2);
        assert!(!state.memory.contains_key(&freed));
        drop(state);
        // One that fails leaves nothing behind.
        end.capture(&mut || Err(captured("a step"))).unwrap_err();
        end.write(kept, &[1; 4]).unwrap();
    }
}
