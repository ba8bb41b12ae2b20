//! A search for settings on the source alone.
//!
//! One key after the other, each value is tried with what was best so far of the others (coordinate descent, one
//! sweep). A trial's score is its mean over folds and seeds on the held-out parts: Dice, AUC, or the mean of both for an
//! arm that does both, since Dice alone would ask for a classifier that learns nothing. No target is ever opened.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::protocol::{ABLATIONS, ARMS, DataSet, Method, OWN, Protocol, Run, SHARED, Search};
use super::{
    State, Watch, claim, fits, folds, open, read_json, sweep, trained, unfit, untouched,
    watch_ramp, write_json,
};
use crate::data::image::write_atomically;
use crate::error::{Error, Result};
use crate::metrics::classification::Auc;
use crate::metrics::statistics::mean;
use crate::metrics::{PerImage, read_csv, write_csv};
use crate::train::config::{Arm, Device};
use crate::train::evaluate::make_folder;
use crate::train::run::VALIDATION;
use crate::train::{Config, stop};

/// Name of the plan.
pub const PLAN: &str = "search.json";
/// Name of the table of trials.
pub const TRIALS: &str = "trials.csv";
/// Name of the file for `study --config`.
pub const CHOICE: &str = "choice.toml";

/// What is tried unless it is said otherwise: each key with its values.
pub const GRID: [(&str, &[&str]); 8] = [
    ("loss.classification", &["0.05", "0.2", "1.0"]),
    ("loss.consistency", &["0.1", "0.3", "1.0", "3.0"]),
    ("loss.kappa", &["1.0", "3.0", "6.0"]),
    ("loss.ramp_start", &["0.0", "5.0", "15.0"]),
    ("loss.ramp_epochs", &["0.0", "10.0"]),
    ("prior.start", &["fitted", "equal"]),
    ("prior.free_sign", &["false", "true"]),
    ("prior.frozen", &["false", "true"]),
];

/// What to search.
#[derive(Clone, Copy, Debug)]
pub struct SearchArgs<'a> {
    /// Source, folds, seeds and methods; no targets. With `resume` what was said of it, or `None` for plan and grid of the
    /// search in `out`.
    pub plan: Option<&'a Protocol>,
    /// Keys with their values, in the order in which they are tried.
    pub grid: &'a [(String, Vec<String>)],
    /// The search's folder: new, empty, or with `resume` that of an earlier call.
    pub out: &'a Path,
    /// Go on where the search in `out` stopped.
    pub resume: bool,
    /// As [`super::StudyArgs::device`].
    pub device: Option<Device>,
}

/// A row of `trials.csv`.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Trial {
    /// The method.
    pub arm: String,
    /// Its number, from 0: the configuration to begin with.
    pub trial: usize,
    /// The key that is different from the best before; empty in trial 0.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Mean Dice over runs, on their held-out parts.
    pub dice: Option<f64>,
    /// Mean AUC over runs.
    pub auc: Option<f64>,
    /// What is compared.
    pub score: f64,
    /// Whether it was the best so far.
    pub best: bool,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Searched {
    /// Every trial.
    pub trials: Vec<Trial>,
    /// Each method with its best configuration.
    pub methods: Vec<Method>,
}

/// Searches, and writes `trials.csv` and `choice.toml`.
///
/// # Errors
/// [`Error::Argument`] for keys, values or data that cannot be used or are not those that the search began with, or an
/// `out` that already holds something; [`Error::File`]; [`Error::Interrupted`], after saving; and whatever a trial's
/// training meets.
pub fn search(
    args: &SearchArgs<'_>,
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<Searched> {
    let Plan { plan, grid, data } = begin(args, watch, interrupt)?;
    let mut searched = Searched {
        trials: Vec::new(),
        methods: Vec::new(),
    };
    for method in &plan.methods {
        let keys: Vec<&(String, Vec<String>)> = grid
            .iter()
            .filter(|(key, _)| applies(method.config.arm, key))
            .collect();
        let mut best = (method.config.clone(), f64::NEG_INFINITY);
        let mut tried: Vec<Config> = Vec::new();
        let mut candidates = vec![(String::new(), String::new())];
        for (key, values) in keys {
            candidates.extend(values.iter().map(|value| (key.clone(), value.clone())));
        }
        for (key, value) in candidates {
            let config = match key.as_str() {
                "" => method.config.clone(),
                key => set(&best.0, key, &value)?,
            };
            if tried.contains(&config) {
                continue;
            }
            let number = tried.len();
            watch_ramp(&method.name, &config, watch);
            let (dice, auc) = trial(&plan, args.out, method, number, &config, watch, interrupt)?;
            let of_arm = [
                dice.filter(|_| config.arm.segments()),
                auc.filter(|_| config.arm.classifies()),
            ];
            let figures: Vec<f64> = of_arm.into_iter().flatten().collect();
            let score = mean(&figures).unwrap_or_default();
            // The first of equals stays.
            let better = score > best.1;
            if better {
                best = (config.clone(), score);
            }
            tried.push(config);
            watch.line(&format!(
                "{} trial {number}{}: score {score:.4}{}",
                method.name,
                if key.is_empty() {
                    String::new()
                } else {
                    format!(", {key} = {value}")
                },
                if better { ", best" } else { "" }
            ));
            searched.trials.push(Trial {
                arm: method.name.clone(),
                trial: number,
                key,
                value,
                dice,
                auc,
                score,
                best: better,
            });
            write_csv(&args.out.join(TRIALS), &searched.trials)?;
        }
        searched.methods.push(Method {
            name: method.name.clone(),
            config: best.0,
        });
    }
    let mut trials = BTreeMap::new();
    for trial in &searched.trials {
        *trials.entry(trial.arm.clone()).or_default() += 1;
    }
    let search = Search {
        source: plan.source.clone(),
        sha256: data.map(|data| data.sha256).unwrap_or_default(),
        trials,
    };
    let text = choice(&plan, &searched.methods, &search);
    write_atomically(&args.out.join(CHOICE), text.as_bytes())?;
    Ok(searched)
}

fn set(config: &Config, key: &str, value: &str) -> Result<Config> {
    config.clone().with(&[(key.to_owned(), value.to_owned())])
}

/// Whether an arm's training depends on a key.
fn applies(arm: Arm, key: &str) -> bool {
    let of_consistency = key.starts_with("prior.")
        || (key.starts_with("loss.")
            && !["loss.classification", "loss.class_weights"].contains(&key));
    match key {
        _ if of_consistency => arm == Arm::Consistency,
        "loss.classification" => arm.classifies() && arm.segments(),
        "loss.class_weights" => arm.classifies(),
        _ => true,
    }
}

/// `search.json`.
#[derive(Serialize, Deserialize)]
struct Plan {
    plan: Protocol,
    grid: Vec<(String, Vec<String>)>,
    /// The source as found; absent in files of earlier versions.
    #[serde(default)]
    data: Option<DataSet>,
}

/// What is searched, after it was held against what the search in `out` began with.
fn begin(args: &SearchArgs<'_>, watch: &dyn Watch, interrupt: &AtomicBool) -> Result<Plan> {
    let path = args.out.join(PLAN);
    let asked = args.plan.map(|plan| (plan.clone(), args.grid.to_vec()));
    let last;
    let (plan, grid, before) = if args.resume {
        let before: Plan = read_json(&path, "expected the folder of a search to resume")?;
        let (asked, grid) = asked.unwrap_or_else(|| {
            let mut own = before.plan.clone();
            if let Some(device) = args.device {
                own.move_to(device);
            }
            (own, before.grid.clone())
        });
        let mut own = before.plan;
        // The source may have moved: its hashes are below.
        if before.data.is_some() {
            own.source.clone_from(&asked.source);
        }
        if let Some((key, ours, theirs)) = own.difference(&asked) {
            let problem =
                format!("expected {ours}, as the search to resume has it, found {theirs}");
            return Err(Error::argument(key, problem));
        }
        if grid != before.grid {
            let problem = format!(
                "expected the command that the search began with, found another; {} has it",
                path.display()
            );
            return Err(Error::argument("--grid", problem));
        }
        last = own.methods[0].config.device;
        (asked, grid, before.data)
    } else {
        claim(args.out, PLAN, "a search")?;
        let (plan, grid) = asked.ok_or_else(|| {
            Error::argument("--source", "expected a source to search on, found none")
        })?;
        last = plan.methods[0].config.device;
        (plan, grid, None)
    };
    let config = &plan.methods[0].config;
    config.backend(config.device)?;
    let apart = |key: &str| SHARED.contains(&key) || OWN.iter().any(|(own, _)| *own == key);
    if let Some((key, _)) = grid.iter().find(|(key, _)| apart(key)) {
        let problem = "expected a setting to choose, found one that says what all trials are tested on or where";
        return Err(Error::argument(format!("--grid {key}"), problem));
    }
    // Every key and value is checked before the first trial, those too that one method has no use for.
    for method in &plan.methods {
        for (key, values) in &grid {
            for value in values {
                set(&method.config, key, value)?;
            }
        }
    }
    let sets = open(&plan, None, watch, interrupt)?;
    let source = &sets[0];
    fits(source, &plan.methods)?;
    untouched(&plan.methods, &sets, watch)?;
    for (number, fold) in folds(&plan, source)?.iter().enumerate() {
        for Method { name, config } in &plan.methods {
            if let Some(reason) = unfit(config, source, fold) {
                let problem = format!("{name} fold {number}: {reason}");
                return Err(Error::argument("--folds", problem));
            }
        }
    }
    let now = &source.description;
    match before.as_ref().map(|before| before.change(now)) {
        Some(Some(change)) => {
            let problem = format!("expected the images that the search began with, found {change}");
            return Err(Error::argument(&plan.source, problem));
        }
        None if args.resume => watch.line(&format!(
            "{} does not say what images the search began with: taken to be those of {}",
            path.display(),
            plan.source
        )),
        _ => {}
    }
    if config.device != last {
        watch.line(&format!(
            "resumed on {}, before on {last}: results may differ in their last bits or more",
            config.device
        ));
    }
    make_folder(args.out)?;
    if args.resume {
        sweep(args.out)?;
    }
    let plan = Plan {
        plan,
        grid,
        data: Some(now.clone()),
    };
    write_json(&path, &plan)?;
    Ok(plan)
}

/// Mean Dice and AUC of a configuration over folds and seeds.
fn trial(
    plan: &Protocol,
    out: &Path,
    method: &Method,
    number: usize,
    config: &Config,
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<(Option<f64>, Option<f64>)> {
    let plan = Protocol {
        methods: vec![Method {
            name: method.name.clone(),
            config: config.clone(),
        }],
        ..plan.clone()
    };
    let runs = plan.runs();
    watch.begin(&plan, &runs);
    let (mut dice, mut auc) = (Vec::new(), Vec::new());
    for run in &runs {
        stop(interrupt)?;
        let folder = folder(run, out, number);
        trained(run, &folder, &plan.config(run), watch, interrupt)?;
        let rows: Vec<PerImage> = read_csv(&folder.join(VALIDATION).join("per_image.csv"))?;
        let of_run = mean(&rows.iter().filter_map(|row| row.dice).collect::<Vec<_>>());
        let cases: Vec<_> = rows.iter().filter_map(PerImage::diagnosis).collect();
        let auc_of_run = Auc::of(&cases).map(|auc| auc.value);
        watch.state(run, &State::Done(of_run, auc_of_run));
        dice.extend(of_run);
        auc.extend(auc_of_run);
    }
    Ok((mean(&dice), mean(&auc)))
}

fn folder(run: &Run, out: &Path, number: usize) -> std::path::PathBuf {
    let name = format!("fold-{}_seed-{}", run.fold, run.seed);
    out.join("trials")
        .join(&run.arm)
        .join(number.to_string())
        .join(name)
}

/// What `study --config` takes: the settings that the methods began with, and for each method its choice.
fn choice(plan: &Protocol, methods: &[Method], search: &Search) -> String {
    let base = &plan.methods[0].config;
    let preset = Config::preset(base.preset);
    // A study has its own data, folds and seeds.
    let own = ["data", "seed", "fold", "folds", "arm", "device"];
    let different = |from: &Config, to: &Config| -> toml::Table {
        let (from, to) = (from.table(), to.table());
        difference(&from, &to, &own)
    };
    let mut table = different(&preset, base);
    let preset = toml::Value::try_from(base.preset);
    if let Ok(preset) = preset {
        table.insert("preset".to_owned(), preset);
    }
    let mut chosen = toml::Table::new();
    for method in methods {
        // What is no arm has its arm's table below its own, and if its name says nothing, it says its arm.
        let is_arm = ARMS.iter().any(|(name, _)| *name == method.name);
        let is_ablation = ABLATIONS.iter().any(|a| a.name == method.name);
        let arm = ARMS.iter().find(|(_, arm)| *arm == method.config.arm);
        let below = methods
            .iter()
            .find(|other| !is_arm && arm.is_some_and(|(name, _)| *name == other.name));
        let below = below.map_or(base, |arm| &arm.config);
        let mut own = different(below, &method.config);
        if let (false, Some((name, _))) = (is_arm || is_ablation, arm) {
            own.insert("arm".to_owned(), (*name).into());
        }
        chosen.insert(method.name.clone(), own.into());
    }
    table.insert("methods".to_owned(), chosen.into());
    if let Ok(search) = toml::Value::try_from(search) {
        table.insert("search".to_owned(), search);
    }
    format!(
        "# Chosen by echograd search on the folds of {}; for study --config.\n{table}",
        plan.source
    )
}

/// The values of `to` that `from` has otherwise.
fn difference(from: &toml::Table, to: &toml::Table, leave: &[&str]) -> toml::Table {
    let mut table = toml::Table::new();
    for (key, value) in to {
        let changed = match (from.get(key), value) {
            _ if leave.contains(&key.as_str()) => None,
            (Some(toml::Value::Table(from)), toml::Value::Table(to)) => {
                let inner = difference(from, to, &[]);
                (!inner.is_empty()).then(|| inner.into())
            }
            (Some(before), value) if before == value => None,
            _ => Some(value.clone()),
        };
        if let Some(changed) = changed {
            table.insert(key.clone(), changed);
        }
    }
    table
}
