//! How a study goes: on a terminal every method with its folds, the run under way, the time left; elsewhere plain
//! lines.

use std::collections::HashSet;
use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::progress::Console;
use crate::study::protocol::{Protocol, Run};
use crate::study::{State, Watch};
use crate::train::Report;
use crate::train::run::Epoch;

/// Time between plain lines about a run under way.
const PLAIN_INTERVAL: Duration = Duration::from_secs(20);

/// Tells on stderr how a study goes.
#[derive(Default)]
pub struct Overview {
    /// Work before the first run, and pieces of work within one.
    console: Console,
    grid: Mutex<Option<Grid>>,
    /// Lines said already: every run finds the same duplicates and flaws in the same data.
    said: Mutex<HashSet<String>>,
}

/// All runs and their states.
struct Grid {
    runs: Vec<(Run, Cell)>,
    methods: Vec<String>,
    epochs: Vec<u64>,
    current: Option<usize>,
    latest: String,
    /// Epochs done since the start, by this process.
    trained: u64,
    started: Instant,
    said: Instant,
    screen: Option<Screen>,
}

#[derive(Clone)]
enum Cell {
    Waiting,
    Training(u64),
    Testing,
    Done(Option<f64>),
    Skipped,
}

/// A line for each method, and one below for all.
struct Screen {
    all: MultiProgress,
    methods: Vec<ProgressBar>,
    total: ProgressBar,
}

impl Screen {
    fn new(plan: &Protocol, runs: usize) -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let style =
            |template: &str| ProgressStyle::with_template(template).expect("the template is valid");
        let line = |method: &crate::study::protocol::Method| {
            let bar = all.add(ProgressBar::new(1));
            bar.set_style(style("{prefix:16} {wide_msg}"));
            bar.set_prefix(method.name.clone());
            bar
        };
        let methods = plan.methods.iter().map(line).collect();
        let total = all.add(ProgressBar::new(runs as u64));
        total.set_style(style("{bar:16} {pos}/{len} {wide_msg}"));
        Self {
            all,
            methods,
            total,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing is left to say if the terminal is gone.
        let _ = self.all.clear();
    }
}

impl Grid {
    /// Epochs that are still to do, and the time that they will take.
    fn left(&self) -> Option<Duration> {
        let left = |(cell, epochs): (&Cell, &u64)| match cell {
            Cell::Waiting => *epochs,
            Cell::Training(done) => epochs.saturating_sub(*done),
            Cell::Testing | Cell::Done(_) | Cell::Skipped => 0,
        };
        let cells = self.runs.iter().map(|(_, cell)| cell);
        let left: u64 = cells.zip(&self.epochs).map(left).sum();
        (self.trained > 0).then(|| {
            self.started
                .elapsed()
                .mul_f64(left as f64 / self.trained as f64)
        })
    }

    fn finished(&self) -> usize {
        let over = |(_, cell): &&(Run, Cell)| matches!(cell, Cell::Done(_) | Cell::Skipped);
        self.runs.iter().filter(over).count()
    }

    fn message(&self) -> String {
        let left = self.left();
        let left = left.map_or(String::new(), |left| {
            format!(", {:#} left", HumanDuration(left))
        });
        let current = self
            .current
            .map_or(String::new(), |i| self.runs[i].0.to_string());
        format!("{current}{}{left}", self.latest)
    }

    fn draw(&self) {
        let Some(screen) = &self.screen else {
            return;
        };
        for (name, bar) in self.methods.iter().zip(&screen.methods) {
            let cells = self.runs.iter().filter(|(run, _)| run.arm == *name);
            let text = |(_, cell): &(Run, Cell)| match cell {
                Cell::Waiting => "·".to_owned(),
                Cell::Training(epoch) => format!("▸{epoch}"),
                Cell::Testing => "▸test".to_owned(),
                Cell::Done(score) => score.map_or("done".into(), |s| format!("{s:.3}")),
                Cell::Skipped => "×".to_owned(),
            };
            bar.set_message(cells.map(text).collect::<Vec<_>>().join("  "));
        }
        screen.total.set_position(self.finished() as u64);
        screen.total.set_message(self.message());
    }
}

impl Overview {
    fn grid(&self) -> MutexGuard<'_, Option<Grid>> {
        self.grid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Report for Overview {
    fn line(&self, text: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if !said.insert(text.to_owned()) {
            return;
        }
        match self.grid().as_ref().and_then(|grid| grid.screen.as_ref()) {
            Some(screen) => screen.all.suspend(|| note!("{text}")),
            None => self.console.line(text),
        }
    }

    fn epoch(&self, epoch: &Epoch, epochs: u64, _: bool) {
        let mut grid = self.grid();
        let Some(grid) = grid.as_mut() else {
            return;
        };
        let Some(current) = grid.current else {
            return;
        };
        grid.runs[current].1 = Cell::Training(epoch.epoch);
        grid.trained += 1;
        let show = |name: &str, value: Option<f64>| {
            value.map_or(String::new(), |value| format!(" {name} {value:.3}"))
        };
        grid.latest = format!(
            ": epoch {}/{epochs} loss {:.3}{}{}",
            epoch.epoch,
            epoch.loss,
            show("Dice", epoch.val_dice),
            show("AUC", epoch.val_auc)
        );
        if grid.screen.is_none() && grid.said.elapsed() >= PLAIN_INTERVAL {
            grid.said = Instant::now();
            note!("{}/{} {}", grid.finished(), grid.runs.len(), grid.message());
        }
        grid.draw();
    }

    fn progress(&self, what: &str, done: u64, total: u64, message: &str) {
        if self.grid().is_none() {
            self.console.progress(what, done, total, message);
        }
    }
}

impl Watch for Overview {
    fn begin(&self, plan: &Protocol, runs: &[Run]) {
        let mut grid = self.grid();
        // The old screen goes before the new one appears.
        *grid = None;
        let terminal = std::io::stderr().is_terminal();
        let now = Instant::now();
        *grid = Some(Grid {
            epochs: runs.iter().map(|run| plan.config(run).epochs).collect(),
            runs: runs
                .iter()
                .map(|run| (run.clone(), Cell::Waiting))
                .collect(),
            methods: plan
                .methods
                .iter()
                .map(|method| method.name.clone())
                .collect(),
            current: None,
            latest: String::new(),
            trained: 0,
            started: now,
            said: now,
            screen: terminal.then(|| Screen::new(plan, runs.len())),
        });
    }

    fn state(&self, run: &Run, state: &State) {
        let mut guard = self.grid();
        let Some(grid) = guard.as_mut() else {
            return;
        };
        let Some(place) = grid.runs.iter().position(|(known, _)| known == run) else {
            return;
        };
        grid.current = Some(place);
        grid.latest = match state {
            State::Testing(set) => format!(": testing on {set}"),
            _ => String::new(),
        };
        let show = |name: &str, value: &Option<f64>| {
            value.map_or(String::new(), |v| format!(", {name} {v:.3}"))
        };
        let (cell, said) = match state {
            State::Training => (Cell::Training(0), None),
            State::Testing(_) => (Cell::Testing, None),
            State::Done(dice, auc) => {
                let text = format!("{run}: held out{}{}", show("Dice", dice), show("AUC", auc));
                (Cell::Done(dice.or(*auc)), Some(text))
            }
            State::Skipped(reason) => (
                Cell::Skipped,
                Some(format!("{run}: not computed: {reason}")),
            ),
        };
        let skipped = matches!(cell, Cell::Skipped);
        grid.runs[place].1 = cell;
        match (&grid.screen, said) {
            (None, Some(text)) => note!("{}/{} {text}", grid.finished(), grid.runs.len()),
            // What the screen cannot say.
            (Some(screen), Some(text)) if skipped => screen.all.suspend(|| note!("{text}")),
            _ => {}
        }
        grid.draw();
    }
}
