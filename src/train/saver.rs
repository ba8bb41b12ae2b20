//! Checkpoints written beside the training: the steps of the next epoch wait neither for copies to the host nor for the
//! disk.
//!
//! The state is set aside where the session lies, and a thread writes it while training goes on. One state waits at
//! most. A newer one takes its place, except that of the best network so far, which only a better one replaces: so the
//! best is written whatever happens, and where writing takes longer than an epoch, [`LAST`] skips some.
//!
//! A run can be killed at any time. [`METRICS`] comes first, since rows beyond the checkpoint are left out when the run
//! is taken up; then [`LAST`]; then, of the same bytes, [`BEST`], which can be had from [`LAST`] again where it is missing
//! ([`mend`]). At no time does [`LAST`] speak of a best network that is in neither.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::checkpoint::{self, Position};
use super::config::Config;
use super::model::{BEST, LAST};
use super::run::{Epoch, METRICS};
use crate::data::image::write_atomically;
use crate::device::{Aside, Session};
use crate::error::{Error, Result};
use crate::metrics::write_csv;
use crate::tape::{Tape, Var};
use crate::tensor::Shape;

/// What is written of a state beside its tensors.
pub(super) struct State {
    /// Where the run stands.
    pub position: Position,
    /// All rows of the metrics.
    pub rows: Vec<Epoch>,
    /// Whether it is the best so far.
    pub best: bool,
}

/// Writes states of one run, on a thread that ends with it.
pub(super) struct Saver {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

struct Shared {
    slot: Mutex<Slot>,
    /// Something waits, or nothing will come.
    changed: Condvar,
    files: Files,
}

/// A state that waits.
#[derive(Default)]
struct Slot {
    state: Option<State>,
    /// Its tensors.
    aside: Aside<f32>,
    closed: bool,
}

/// Where a run's states go.
struct Files {
    out: PathBuf,
    config: Config,
    /// Names and extents of all tensors, and the words that are theirs.
    tensors: Vec<(String, Shape, Range<usize>)>,
}

impl Files {
    fn write(&self, state: &State, words: &[f32]) -> Result<()> {
        write_csv(&self.out.join(METRICS), &state.rows)?;
        let path = self.out.join(LAST);
        let tensors = self.tensors.iter();
        let tensors = tensors.map(|(name, shape, at)| (&**name, *shape, &words[at.clone()]));
        let bytes = checkpoint::encode(&path, tensors, &self.config, &state.position)?;
        write_atomically(&path, &bytes)?;
        if state.best {
            write_atomically(&self.out.join(BEST), &bytes)?;
        }
        Ok(())
    }
}

impl Shared {
    fn new(
        out: &Path,
        config: &Config,
        tape: &Tape,
        session: &mut dyn Session<f32>,
    ) -> Result<Self> {
        // Now, so that memory is not missing later.
        let mut slot = Slot::default();
        session.set_aside(&mut slot.aside)?;
        let place = |(var, name, shape): (Var, &str, Shape)| {
            let slot = session.plan().slot(var);
            (name.to_owned(), shape, slot.offset..slot.offset + slot.len)
        };
        Ok(Self {
            slot: Mutex::new(slot),
            changed: Condvar::new(),
            files: Files {
                out: out.to_owned(),
                config: config.clone(),
                tensors: checkpoint::persistent(tape).map(place).collect(),
            },
        })
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what comes until nothing will.
    fn work(&self) -> Result<()> {
        loop {
            let slot = self.lock();
            let waits = |slot: &mut Slot| slot.state.is_none() && !slot.closed;
            let slot = self.changed.wait_while(slot, waits);
            let mut slot = slot.unwrap_or_else(PoisonError::into_inner);
            let Some(state) = slot.state.take() else {
                return Ok(());
            };
            let words = slot.aside.take()?;
            drop(slot);
            self.files.write(&state, &words)?;
        }
    }
}

impl Saver {
    /// For states of `session`, which replays `tape`, in the folder `out`.
    ///
    /// # Errors
    /// As [`Session::set_aside`].
    pub fn new(
        out: &Path,
        config: &Config,
        tape: &Tape,
        session: &mut dyn Session<f32>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::new(out, config, tape, session)?);
        let theirs = Arc::clone(&shared);
        Ok(Self {
            shared,
            thread: Some(thread::spawn(move || theirs.work())),
        })
    }

    /// Has the state of `session` written, now or in a while; what becomes of those that wait stands above.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Device`] if an earlier one could not be written; as [`Session::set_aside`].
    pub fn put(&mut self, session: &mut dyn Session<f32>, state: State) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.finish()?;
        }
        let mut slot = self.shared.lock();
        let keeps = slot.state.as_ref().is_some_and(|waiting| waiting.best);
        if state.best || !keeps {
            session.set_aside(&mut slot.aside)?;
            slot.state = Some(state);
            self.shared.changed.notify_one();
        }
        Ok(())
    }

    /// Waits until all that there was is written, and writes the state of `session` behind it. Nothing can be put
    /// afterwards.
    ///
    /// # Errors
    /// As [`Saver::put`]; [`Error::File`] if this one cannot be written.
    pub fn put_last(&mut self, session: &mut dyn Session<f32>, state: &State) -> Result<()> {
        self.finish()?;
        let mut slot = self.shared.lock();
        session.set_aside(&mut slot.aside)?;
        let words = slot.aside.take()?;
        self.shared.files.write(state, &words)
    }

    fn finish(&mut self) -> Result<()> {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Saver {
    /// What waits is written all the same: the run ends for another reason.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes [`BEST`] of [`LAST`], which is at `position`, where that is the best network itself: the run may have been
/// killed between the two.
///
/// # Errors
/// [`Error::File`] if one cannot be read or the other not be written.
pub(super) fn mend(out: &Path, position: &Position) -> Result<()> {
    let Position {
        epoch,
        step,
        best_epoch,
        ..
    } = *position;
    if epoch == 0 || epoch != best_epoch || step != 0 {
        return Ok(());
    }
    let last = out.join(LAST);
    let bytes = std::fs::read(&last).map_err(|e| Error::caused(&last, "cannot be read", e))?;
    write_atomically(&out.join(BEST), &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Backend;
    use crate::train::checkpoint::Checkpoint;
    use crate::train::config::Preset;

    #[test]
    fn a_newer_state_takes_the_place_of_one_that_waits_unless_that_is_the_best() {
        let folder = tempfile::tempdir().unwrap();
        let mut tape = Tape::new();
        let weight = tape.parameter("weight", Shape::per_channel(3));
        let mut session = Backend::Cpu.session(&tape).unwrap();
        let config = Config::preset(Preset::Tiny);
        let shared = Shared::new(folder.path(), &config, &tape, &mut *session).unwrap();
        // Without a thread everything waits.
        let mut saver = Saver {
            shared: Arc::new(shared),
            thread: None,
        };
        let state = |epoch, best| State {
            position: Position {
                epoch,
                ..Position::default()
            },
            rows: Vec::new(),
            best,
        };
        let found = |name| {
            let checkpoint = Checkpoint::read(&folder.path().join(name)).unwrap();
            let weight = checkpoint.tensor("weight").unwrap().data().to_vec();
            (checkpoint.position.epoch, weight)
        };
        for (epoch, best) in [(1, true), (2, true), (3, false)] {
            session.write(weight, &[epoch as f32; 3]).unwrap();
            saver.put(&mut *session, state(epoch, best)).unwrap();
        }
        saver.shared.lock().closed = true;
        saver.shared.work().unwrap();
        assert_eq!(found(LAST), (2, vec![2.0; 3]));
        assert_eq!(found(BEST), (2, vec![2.0; 3]));
        // The end of a run is never skipped.
        saver.put_last(&mut *session, &state(3, false)).unwrap();
        assert_eq!(found(LAST), (3, vec![3.0; 3]));
        assert_eq!(found(BEST), (2, vec![2.0; 3]));
    }
}
