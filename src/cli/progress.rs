//! Progress with time left on a terminal, plain lines elsewhere; always on stderr.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::train::Report;

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
    started: Instant,
    printed: Instant,
}

impl Work {
    fn new(what: &str, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = "{prefix} {bar:30} {pos}/{len} {msg} [{elapsed} < {eta}]";
            bar.set_style(ProgressStyle::with_template(style).expect("the template is valid"));
            bar.set_prefix(what.to_owned());
            bar
        });
        let now = Instant::now();
        Self {
            what: what.to_owned(),
            bar,
            started: now,
            printed: now,
        }
    }

    fn set(&mut self, done: u64, total: u64, message: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(message.to_owned());
            }
            None if self.printed.elapsed() >= PLAIN_INTERVAL => {
                self.printed = Instant::now();
                let elapsed = self.started.elapsed().as_secs_f64();
                let left = elapsed / done.max(1) as f64 * total.saturating_sub(done) as f64;
                let space = if message.is_empty() { "" } else { " " };
                eprintln!(
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
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn progress(&self, what: &str, done: u64, total: u64, message: &str) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_none_or(|work| work.what != what) {
            // The old bar goes before the new one appears.
            *current = None;
            *current = Some(Work::new(what, total));
        }
        if let Some(work) = current.as_mut() {
            work.set(done, total, message);
        }
    }
}
