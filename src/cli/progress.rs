//! Progress with time left on a terminal, plain lines elsewhere; always on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Seconds between plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Work of a known length.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
    started: Instant,
    printed: Instant,
}

impl Progress {
    /// Starts to report on `total` pieces of `what`.
    pub fn new(what: &str, total: u64) -> Self {
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
            total,
            done: 0,
            started: now,
            printed: now,
        }
    }

    /// `done` pieces are finished; `message` says how it goes (may be empty).
    pub fn set(&mut self, done: u64, message: &str) {
        self.done = done;
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(message.to_owned());
            }
            None if self.printed.elapsed() >= PLAIN_INTERVAL => {
                self.printed = Instant::now();
                let elapsed = self.started.elapsed().as_secs_f64();
                let left = elapsed / done.max(1) as f64 * self.total.saturating_sub(done) as f64;
                eprintln!(
                    "{}: {done}/{} {message} ({left:.0} s left)",
                    self.what, self.total
                );
            }
            None => {}
        }
    }

    /// A line above the bar that stays.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
