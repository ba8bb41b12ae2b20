//! A device that is not there: it hands out addresses without memory behind them and has every kernel by name, so
//! that a session can be made, which tells what it would launch. Nothing runs on it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::launch::Grid;
use super::{Allocated, Description, End, Function};
use crate::error::{Error, Result};

#[derive(Default)]
pub(super) struct Outline {
    /// End of what was allocated.
    end: AtomicU64,
    allocated: Allocated,
}

/// What all addresses are multiples of.
const ALIGN: u64 = 256;

fn refused<T>() -> Result<T> {
    Err(Error::device("outline", "nothing runs on it"))
}

impl End for Outline {
    fn description(&self) -> Description {
        Description {
            name: "outline".into(),
            ..Default::default()
        }
    }
    fn allocate(&self, bytes: usize) -> Result<u64> {
        let bytes = (bytes as u64).next_multiple_of(ALIGN);
        // Not at 0, which is no address.
        Ok(ALIGN + self.end.fetch_add(bytes, Ordering::Relaxed))
    }
    fn free(&self, _: u64) {}
    fn allocated(&self) -> &Allocated {
        &self.allocated
    }
    fn clear(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        refused()
    }
    fn read_aside(&self, _: u64, _: &mut [u8]) -> Result<()> {
        refused()
    }
    fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
        refused()
    }
    fn fetch(&self, _: u64, _: usize) -> Result<u64> {
        refused()
    }
    fn fetched(&self, _: u64, _: &mut [u8]) -> Result<()> {
        refused()
    }
    fn free_fetch(&self, _: u64) {}
    fn function(&self, name: &str) -> Result<Function> {
        Ok(Function {
            handle: 0,
            name: name.into(),
            parameters: None,
            registers: 0,
            shared: 0,
            local: 0,
            max_threads: 0,
        })
    }
    unsafe fn launch(&self, _: &Function, _: &Grid, _: &[u64]) -> Result<()> {
        refused()
    }
    fn occupancy(&self, _: &Function, _: &Grid) -> Result<u32> {
        Ok(0)
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn event(&self) -> Result<u64> {
        refused()
    }
    fn record(&self, _: u64) -> Result<()> {
        refused()
    }
    fn elapsed(&self, _: u64, _: u64) -> Result<f32> {
        refused()
    }
    fn free_event(&self, _: u64) {}
    fn capture(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        refused()
    }
    fn replay(&self, _: u64) -> Result<()> {
        refused()
    }
    fn free_graph(&self, _: u64) {}
    fn range_push(&self, _: &str) {}
    fn range_pop(&self) {}
}
