//! Progress with time left on a terminal, plain lines elsewhere; always on stderr.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::train::Report;

/// When the first plain line comes: work that is over by then needs none.
const PLAIN_FIRST: Duration = Duration::from_secs(2);
/// Time between plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Tells on stderr how long work goes.
#[derive(Default)]
pub struct Console {
    current: Mutex<Option<Work>>,
}

/// One kind of work, from its first report to the first report of another.
struct Work {
    what: String,
    bar: Option<ProgressBar>,
    /// How much was done already when it began, by a run that is resumed.
    before: u64,
    started: Instant,
    /// Time since the start when the next plain line is due.
    due: Duration,
}

impl Work {
    fn new(what: &str, done: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = "{prefix} {bar:30} {pos}/{len} {msg} [{elapsed} < {eta}]";
            bar.set_style(ProgressStyle::with_template(style).expect("the template is valid"));
            bar.set_prefix(what.to_owned());
            bar.with_position(done)
        });
        Self {
            what: what.to_owned(),
            bar,
            before: done,
            started: Instant::now(),
            due: PLAIN_FIRST,
        }
    }

    fn set(&mut self, done: u64, total: u64, message: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(message.to_owned());
            }
            None if self.started.elapsed() >= self.due => {
                let elapsed = self.started.elapsed();
                self.due = elapsed + PLAIN_INTERVAL;
                let each = elapsed.as_secs_f64() / done.saturating_sub(self.before).max(1) as f64;
                let left = each * total.saturating_sub(done) as f64;
                let space = if message.is_empty() { "" } else { " " };
                note!(
                    "{}: {done}/{total}{space}{message} ({left:.0} s left)",
                    self.what
                );
            }
            None => {}
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Report for Console {
    fn line(&self, text: &str) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match current.as_ref().and_then(|work| work.bar.as_ref()) {
            Some(bar) => bar.suspend(|| note!("{text}")),
            None => note!("{text}"),
        }
    }

    fn progress(&self, what: &str, done: u64, total: u64, message: &str) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_none_or(|work| work.what != what) {
            // The old bar goes before the new one appears.
            *current = None;
            *current = Some(Work::new(what, done, total));
        }
        if done >= total {
            // A full bar would stand there through whatever silent work comes next.
            *current = None;
        } else if let Some(work) = current.as_mut() {
            work.set(done, total, message);
        }
    }
}
