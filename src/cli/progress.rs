//! Progress with time left on a terminal, plain lines elsewhere; always on stderr.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

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
            let style = "{prefix} {bar:30} {pos}/{len} {msg}";
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
        let elapsed = self.started.elapsed();
        let since = done.saturating_sub(self.before);
        let space = if message.is_empty() { "" } else { " " };
        let mut text = format!("{message}{space}");
        // Not the bar's own estimate, which would count what an earlier call did as done in no time.
        if since > 0 {
            let left = elapsed.mul_f64(total.saturating_sub(done) as f64 / since as f64);
            text += &format!("({:#} left)", HumanDuration(left));
        }
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(text);
            }
            None if elapsed >= self.due => {
                self.due = elapsed + PLAIN_INTERVAL;
                note!("{}: {done}/{total} {text}", self.what);
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
