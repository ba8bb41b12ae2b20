//! How a study goes: on a terminal every method with its folds, the run under way, the time left; elsewhere plain
//! lines.

use std::collections::HashSet;
use std::io::IsTerminal;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;

use super::INTERRUPTED;
use super::progress::Console;
use crate::study::protocol::{Protocol, Run};
use crate::study::{State, Watch};
use crate::train::Report;
use crate::train::run::Epoch;

/// Time between plain lines about a run under way.
const PLAIN_INTERVAL: Duration = Duration::from_secs(20);
/// Time between pictures of a run under way.
const FRAME: Duration = Duration::from_millis(100);
/// Widest bar.
const BAR: usize = 24;

/// Tells on stderr how a study goes.
#[derive(Default)]
pub struct Overview {
    /// Work before the first run.
    console: Console,
    grid: Mutex<Option<Grid>>,
    /// Lines said already: every run finds the same duplicates and flaws in the same data.
    said: Mutex<HashSet<String>>,
}

/// All runs and their states.
struct Grid {
    runs: Vec<(Run, Cell)>,
    methods: Vec<String>,
    /// Epochs of each run; none for one that takes its network from another.
    epochs: Vec<u64>,
    current: Option<usize>,
    /// What is being done.
    activity: String,
    /// What the latest epoch of the current run came to, or which ensemble is tested.
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
    Done(String),
    Skipped,
}

/// Lines at the bottom of a terminal that are drawn again and again.
struct Screen {
    term: Term,
    /// Lengths of the lines that stand there.
    drawn: Vec<usize>,
    since: Instant,
}

impl Screen {
    fn new() -> Self {
        Self {
            term: Term::buffered_stderr(),
            drawn: Vec::new(),
            since: Instant::now(),
        }
    }

    /// Puts lines in place of those drawn before; none clear them away. After an interrupt, whose message stands
    /// below, everything stays as it is. That a terminal is gone stops no work.
    fn show(&mut self, lines: &[String]) {
        if INTERRUPTED.load(Ordering::SeqCst) {
            return;
        }
        let (_, width) = self.term.size();
        // Lines that were as wide as the terminal take several rows of one that has become narrower.
        let rows = |length: &usize| length.div_ceil(usize::from(width).max(1)).max(1);
        let above = self.drawn.iter().map(rows).sum();
        let _ = self.term.move_cursor_up(above);
        let _ = self.term.clear_to_end_of_screen();
        for line in lines {
            let _ = self.term.write_line(line);
        }
        let _ = self.term.flush();
        self.drawn = lines.iter().map(|line| line.chars().count()).collect();
        self.since = Instant::now();
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.show(&[]);
    }
}

impl Grid {
    /// The time that the epochs still to do will take.
    fn left(&self) -> Option<Duration> {
        let left = |(cell, epochs): (&Cell, &u64)| match cell {
            Cell::Waiting => *epochs,
            Cell::Training(done) => epochs.saturating_sub(*done),
            Cell::Testing | Cell::Done(_) | Cell::Skipped => 0,
        };
        let cells = self.runs.iter().map(|(_, cell)| cell);
        let left: u64 = cells.zip(&self.epochs).map(left).sum();
        (self.trained > 0 && left > 0).then(|| {
            let each = self.started.elapsed() / u32::try_from(self.trained).unwrap_or(u32::MAX);
            each.mul_f64(left as f64)
        })
    }

    fn finished(&self) -> usize {
        let over = |(_, cell): &&(Run, Cell)| matches!(cell, Cell::Done(_) | Cell::Skipped);
        self.runs.iter().filter(over).count()
    }

    /// How many runs are over, and the time left.
    fn progress(&self) -> String {
        let left = self.left().filter(|left| left.as_secs() > 0);
        let left = left.map(|left| format!(", {} left", span(left)));
        format!(
            "{}/{} runs{}",
            self.finished(),
            self.runs.len(),
            left.unwrap_or_default()
        )
    }

    /// What is being done.
    fn now(&self) -> String {
        match self.current {
            Some(current) => format!("{}: {}", self.runs[current].0, self.activity),
            None => self.activity.clone(),
        }
    }

    /// The picture: at most `height` lines of at most `width` letters.
    fn picture(&self, width: usize, height: usize) -> Vec<String> {
        let finished = BAR.min(width / 4) * self.finished() / self.runs.len().max(1);
        let bar = "█".repeat(finished) + &"░".repeat(BAR.min(width / 4) - finished);
        let bottom = [
            format!("{bar} {}", self.progress()),
            self.now(),
            self.latest.clone(),
        ];
        let room = height.saturating_sub(bottom.len());
        let mut lines = self.table(width, room);
        lines.extend(bottom);
        let fitting = lines.into_iter().map(|line| cut(line, width));
        fitting.rev().take(height).rev().collect()
    }

    /// A line for each method, in columns where there is room for a cell of each run; the methods about the current
    /// one where there is not room for all.
    fn table(&self, width: usize, height: usize) -> Vec<String> {
        let names = self.methods.iter().map(|name| name.chars().count());
        let indent = 2 + names.max().unwrap_or(0).min(width / 3);
        let heads = self.heads();
        let rows: Vec<Vec<String>> = self
            .methods
            .iter()
            .map(|name| self.of(name).map(Cell::text).collect())
            .collect();
        let column = rows.iter().flatten().chain(&heads);
        // As wide as a figure with its name, so that columns do not move when one comes.
        let column = column.map(|text| text.chars().count()).max();
        let column = 2 + column.unwrap_or(0).max(9);
        let in_columns = indent + heads.len() * column <= width + 2;
        let mut lines: Vec<String> = rows
            .iter()
            .zip(&self.methods)
            .map(|(cells, name)| {
                let cells = match in_columns {
                    true => cells.iter().map(|text| format!("{text:column$}")).collect(),
                    false => self.summary(name),
                };
                let name = cut(name.clone(), indent - 2);
                format!("{name:indent$}{cells}").trim_end().to_owned()
            })
            .collect();
        let heads: String = heads.iter().map(|text| format!("{text:column$}")).collect();
        let head = in_columns.then(|| format!("{:indent$}{heads}", "").trim_end().to_owned());
        let room = height.saturating_sub(usize::from(head.is_some()));
        if lines.len() > room {
            let current = self.current.map(|i| &self.runs[i].0.arm);
            let current = self.methods.iter().position(|name| Some(name) == current);
            let room = room.saturating_sub(1);
            let first = current.unwrap_or(0).saturating_sub(room / 2);
            let first = first.min(lines.len() - room);
            let hidden = lines.len() - room;
            lines = lines.drain(first..first + room).collect();
            lines.push(format!("… and {hidden} more methods"));
        }
        head.into_iter().chain(lines).collect()
    }

    /// The cells of a method.
    fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Cell> {
        let of_method = self.runs.iter().filter(move |(run, _)| run.arm == name);
        of_method.map(|(_, cell)| cell)
    }

    /// What stands above the cells.
    fn heads(&self) -> Vec<String> {
        let first = self.methods.first();
        let runs = self.runs.iter().map(|(run, _)| run);
        let runs: Vec<&Run> = runs.filter(|run| Some(&run.arm) == first).collect();
        let several = runs.iter().any(|run| run.seed != runs[0].seed);
        runs.iter()
            .map(|run| match several {
                true => format!("fold {} s{}", run.fold, run.seed),
                false => format!("fold {}", run.fold),
            })
            .collect()
    }

    /// A method's cells in short.
    fn summary(&self, name: &str) -> String {
        let cells: Vec<&Cell> = self.of(name).collect();
        let over = |cell: &&&Cell| matches!(cell, Cell::Done(_) | Cell::Skipped);
        let done = cells.iter().filter(over).count();
        let parts = cells.iter().filter_map(|cell| match cell {
            Cell::Training(_) | Cell::Testing => Some(cell.text()),
            _ => None,
        });
        let latest = cells.iter().rev().find_map(|cell| match cell {
            Cell::Done(figure) => Some(format!("last {figure}")),
            _ => None,
        });
        let parts: Vec<String> = [format!("{done}/{}", cells.len())]
            .into_iter()
            .chain(latest)
            .chain(parts)
            .collect();
        parts.join("  ")
    }

    /// Shows how it stands; `now` if something happened that must not be missed.
    fn draw(&mut self, now: bool) {
        let Some(mut screen) = self.screen.take() else {
            return;
        };
        if now || screen.since.elapsed() >= FRAME {
            let (height, width) = screen.term.size();
            // The cursor stands in the row below, and a full last column would wrap.
            let (height, width) = (usize::from(height), usize::from(width));
            screen.show(&self.picture(width.saturating_sub(1), height.saturating_sub(1)));
        }
        self.screen = Some(screen);
    }

    /// Says something that stays.
    fn say(&mut self, text: &str) {
        if let Some(screen) = &mut self.screen {
            screen.show(&[]);
        }
        note!("{text}");
        self.draw(true);
    }
}

impl Cell {
    fn text(&self) -> String {
        match self {
            Self::Waiting => "·".to_owned(),
            Self::Training(epoch) => format!("▸{epoch}"),
            Self::Testing => "▸test".to_owned(),
            Self::Done(figure) => figure.clone(),
            Self::Skipped => "×".to_owned(),
        }
    }
}

/// A duration, roughly.
fn span(time: Duration) -> String {
    let minutes = (time.as_secs() + 30) / 60;
    match (time.as_secs(), minutes) {
        (seconds, _) if seconds < 90 => format!("{seconds} s"),
        (_, minutes) if minutes < 90 => format!("{minutes} min"),
        (_, minutes) => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

/// Text of at most `width` letters.
fn cut(text: String, width: usize) -> String {
    if text.chars().count() <= width {
        return text;
    }
    let kept = text.chars().take(width.saturating_sub(1));
    kept.chain(['…']).take(width).collect()
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
        match self.grid().as_mut() {
            Some(grid) => grid.say(text),
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
            value.map_or(String::new(), |value| format!(", {name} {value:.3}"))
        };
        grid.latest = format!(
            "epoch {}/{epochs}: loss {:.3}{}{}",
            epoch.epoch,
            epoch.loss,
            show("Dice", epoch.val_dice),
            show("AUC", epoch.val_auc)
        );
        if grid.screen.is_none() && grid.said.elapsed() >= PLAIN_INTERVAL {
            grid.said = Instant::now();
            note!("{}: {}, {}", grid.progress(), grid.now(), grid.latest);
        }
        grid.draw(true);
    }

    fn progress(&self, what: &str, done: u64, total: u64, message: &str) {
        match self.grid().as_mut() {
            Some(grid) => {
                grid.activity = format!("{what} {done}/{total}");
                grid.draw(false);
            }
            None => self.console.progress(what, done, total, message),
        }
    }
}

impl Watch for Overview {
    fn begin(&self, plan: &Protocol, runs: &[Run]) {
        let mut grid = self.grid();
        // The old screen goes before the new one appears.
        *grid = None;
        let now = Instant::now();
        let epochs = |run: &Run| match plan.training(run) == *run {
            true => plan.config(run).epochs,
            false => 0,
        };
        let mut new = Grid {
            epochs: runs.iter().map(epochs).collect(),
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
            activity: String::new(),
            latest: String::new(),
            trained: 0,
            started: now,
            said: now,
            screen: std::io::stderr().is_terminal().then(Screen::new),
        };
        new.draw(true);
        *grid = Some(new);
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
        grid.latest.clear();
        grid.activity = match state {
            State::Testing(set) => format!("testing on {set}"),
            _ => "training".to_owned(),
        };
        let show = |name: &str, value: &Option<f64>| {
            value.map_or(String::new(), |v| format!(", {name} {v:.3}"))
        };
        let (cell, said) = match state {
            State::Training => (Cell::Training(0), None),
            State::Testing(_) => (Cell::Testing, None),
            State::Done(dice, auc) => {
                let text = format!("{run}: held out{}{}", show("Dice", dice), show("AUC", auc));
                // A column is of Dice, but for methods that have none.
                let figure = match (dice, auc) {
                    (Some(dice), _) => format!("{dice:.3}"),
                    (None, Some(auc)) => format!("AUC {auc:.3}"),
                    (None, None) => "done".to_owned(),
                };
                (Cell::Done(figure), Some(text))
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
            (Some(_), Some(text)) if skipped => grid.say(&text),
            _ => {}
        }
        grid.draw(true);
    }

    fn ensemble(&self, arm: &str, set: &str) {
        let mut guard = self.grid();
        let Some(grid) = guard.as_mut() else {
            return;
        };
        grid.current = None;
        grid.latest = format!("ensemble of {arm}, testing on {set}");
        grid.activity.clear();
        if grid.screen.is_none() {
            note!("{}", grid.latest);
        }
        grid.draw(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(methods: usize, folds: usize, seeds: u64) -> Grid {
        let methods: Vec<String> = (0..methods).map(|i| format!("method-{i}")).collect();
        let mut runs = Vec::new();
        for seed in 0..seeds {
            for fold in 0..folds {
                runs.extend(methods.iter().map(|arm| Run {
                    arm: arm.clone(),
                    fold,
                    seed,
                }));
            }
        }
        let now = Instant::now();
        Grid {
            epochs: vec![5; runs.len()],
            runs: runs.into_iter().map(|run| (run, Cell::Waiting)).collect(),
            methods,
            current: None,
            activity: "training 7/50".into(),
            latest: "epoch 3/5: loss 1.000, Dice 0.500".into(),
            trained: 0,
            started: now,
            said: now,
            screen: None,
        }
    }

    #[test]
    fn every_picture_fits_its_terminal() {
        for (methods, folds, seeds) in [(1, 2, 1), (4, 3, 1), (4, 5, 3), (16, 3, 2)] {
            let mut grid = grid(methods, folds, seeds);
            let last = grid.runs.len() - 1;
            grid.runs[0].1 = Cell::Done("AUC 0.500".into());
            grid.runs[last].1 = Cell::Training(3);
            grid.current = Some(last);
            for (width, height) in [
                (80, 24),
                (120, 40),
                (40, 24),
                (80, 8),
                (10, 3),
                (1, 1),
                (0, 0),
            ] {
                let lines = grid.picture(width, height);
                assert!(lines.len() <= height, "{lines:?}");
                assert!(
                    lines.iter().all(|line| line.chars().count() <= width),
                    "{lines:?}"
                );
                if width >= 40 && height >= 8 {
                    // What is under way is in sight.
                    assert!(lines.iter().any(|line| line.contains("▸3")), "{lines:?}");
                    assert!(lines[lines.len() - 2].starts_with(&format!("method-{}", methods - 1)));
                    assert!(lines[lines.len() - 3].contains(&format!(" 1/{} runs", last + 1)));
                }
            }
        }
    }

    #[test]
    fn cells_stand_in_columns_where_there_is_room() {
        let mut grid = grid(2, 2, 1);
        grid.runs[0].1 = Cell::Done("0.500".into());
        grid.runs[1].1 = Cell::Skipped;
        let lines = grid.picture(80, 24);
        assert_eq!(lines[0], "          fold 0     fold 1");
        assert_eq!(lines[1], "method-0  0.500      ·");
        assert_eq!(lines[2], "method-1  ×          ·");
        assert_eq!(
            lines[4..],
            ["training 7/50", "epoch 3/5: loss 1.000, Dice 0.500"]
        );
        let narrow = grid.picture(20, 24);
        assert_eq!(narrow[0], "metho…  1/2  last 0…");
        assert_eq!(
            [
                span(Duration::from_secs(89)),
                span(Duration::from_secs(7140))
            ],
            ["89 s", "1 h 59 min"]
        );
    }
}
