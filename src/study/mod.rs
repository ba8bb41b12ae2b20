//! Does consistency generalise? Several methods trained on folds of one data set and tested on others that none of
//! them has seen, with the statistics that the question needs.
//!
//! [`study`] fills a folder:
//!
//! | | |
//! |---|---|
//! | `study.toml` | the plan: data, folds, seeds, every method's whole configuration ([`protocol`]) |
//! | `manifest.json` | the data as found, program, device, what could not be computed and why |
//! | `runs/ARM/fold-F_seed-S/` | a run as [`crate::train`] writes it, without its last checkpoint, and its results on each data set in a folder of its name |
//! | `runs/ARM/ensemble/` | results of its networks together, likewise |
//! | `per_image.csv` | all results, one row for each image and run |
//! | `ensembles.csv` | results of [`ensemble`](mod@ensemble)s, one row for each image and method |
//! | `normals.csv` | pixels predicted in images without a lesion |
//! | `statistics.json` | [`statistics::Statistics`] |
//! | `report.html`, `figures/` | the same to read ([`page`]) |
//!
//! All methods see the same folds, seeds, steps and starting weights. The source's validation part chooses the epoch;
//! threshold and weights are then fixed, and targets are only ever tested on. Methods whose configurations differ only
//! in how they are tested ([`Config::test_flip`]) share their networks, which the first of them trains. Everything reported is computed from the
//! files of the runs, so a study that was stopped, however it was, goes on with what is there and ends in the
//! same numbers. [`search`](mod@search) chooses settings on the source alone; [`compare`](mod@compare) sets any runs side by side.

pub mod compare;
pub mod ensemble;
pub mod page;
pub mod protocol;
pub mod search;
pub mod statistics;
mod verdict;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::image::{is_temporary, write_atomically};
use crate::data::split::{self, Fold};
use crate::data::{self, Label, Source, hex};
use crate::device::simd::Level;
use crate::error::{Error, Result};
use crate::metrics::{PerImage, read_csv, write_csv};
use crate::train::config::Device;
use crate::train::evaluate::{RESULTS, examine, make_folder, write};
use crate::train::model::{BEST, CONFIG, LAST};
use crate::train::run::{self, Epoch, METRICS, TrainArgs, VALIDATION, is_finished, train};
use crate::train::schedule::cut_short;
use crate::train::{Config, Model, Report, select, stop};
use ensemble::ENSEMBLES;
use protocol::{DataSet, Method, Protocol, Run, names};
use statistics::{Measured, Statistics};

/// Name of the plan.
pub const PLAN: &str = "study.toml";
/// Name of the file that says what a study was made from.
pub const MANIFEST: &str = "manifest.json";
/// Name of the file with a row for each image and run.
pub const PER_IMAGE: &str = "per_image.csv";
/// Name of the file with the false positives.
pub const NORMALS: &str = "normals.csv";
/// Name of the file with the statistics.
pub const STATISTICS: &str = "statistics.json";
/// Name of the page.
pub const PAGE: &str = "report.html";

/// What to study.
#[derive(Clone, Copy, Debug)]
pub struct StudyArgs<'a> {
    /// The plan; with `resume` what was said of it, or `None` for the plan of the study in `out`.
    pub plan: Option<&'a Protocol>,
    /// The study's folder: new, empty, or with `resume` that of an earlier call.
    pub out: &'a Path,
    /// Go on where the study in `out` stopped.
    pub resume: bool,
    /// With `resume` and without a plan, which says it itself: where to compute from now on; `None` for where it was
    /// computed before.
    pub device: Option<Device>,
}

/// Where a run stands.
#[derive(Clone, PartialEq, Debug)]
pub enum State {
    /// It is being trained.
    Training,
    /// Its network is being tested on the data set of that name.
    Testing(String),
    /// It is finished; mean Dice and AUC on its held-out part.
    Done(Option<f64>, Option<f64>),
    /// It will not be computed, for this reason.
    Skipped(String),
}

/// Who watches a study.
pub trait Watch: Report {
    /// All runs that there will be, in their order.
    fn begin(&self, plan: &Protocol, runs: &[Run]) {
        let _ = (plan, runs);
    }

    /// All runs are over, and the networks of the method `arm` are tested together on the data set of that name.
    fn ensemble(&self, arm: &str, set: &str) {
        let _ = (arm, set);
    }

    /// A run has come to this.
    fn state(&self, run: &Run, state: &State) {
        match state {
            State::Training => self.line(&format!("{run}: training")),
            State::Testing(_) => {}
            State::Done(dice, auc) => {
                let show = |name: &str, value: &Option<f64>| {
                    value.map_or(String::new(), |v| format!(", {name} {v:.3}"))
                };
                let (dice, auc) = (show("Dice", dice), show("AUC", auc));
                self.line(&format!("{run}: done, held out{dice}{auc}"));
            }
            State::Skipped(reason) => self.line(&format!("{run}: not computed: {reason}")),
        }
    }
}

impl Watch for () {}

/// Something that could not be computed, and why.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Missing {
    /// What: a run, or a figure of a data set.
    pub what: String,
    /// Why not.
    pub reason: String,
}

/// What computes: a program, on a device. Results have the same bits where all of it is equal, and a GPU's model too.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Means {
    /// Program and version.
    pub program: String,
    /// Instruction set of the kernels.
    pub instruction_set: String,
    /// Where it computes; the processor where files of earlier versions do not say it.
    #[serde(default = "processor")]
    pub device: Device,
}

fn processor() -> Device {
    Device::Cpu
}

impl Means {
    fn current(device: Device) -> Self {
        Self {
            program: format!("echograd {}", env!("CARGO_PKG_VERSION")),
            instruction_set: Level::current().name().into(),
            device,
        }
    }
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            instruction_set,
            device,
        } = self;
        write!(
            f,
            "{program} on {device} with {instruction_set} instructions"
        )
    }
}

/// `manifest.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// What it began with.
    #[serde(flatten)]
    pub begun: Means,
    /// What it went on with, each time that this was something else than before.
    #[serde(default)]
    pub resumed: Vec<Means>,
    /// The source first, then the targets.
    pub data: Vec<DataSet>,
    /// SHA-256 of the files that runs start from, by their paths.
    #[serde(default)]
    pub init: BTreeMap<String, String>,
    /// What could not be computed.
    pub not_computed: Vec<Missing>,
    /// The plan.
    pub plan: Protocol,
}

impl Manifest {
    /// Remembers what the study was computed with before, and says so if it was something else.
    fn go_on(&mut self, before: &Self, watch: &dyn Watch) {
        let now = std::mem::replace(&mut self.begun, before.begun.clone());
        self.resumed.clone_from(&before.resumed);
        let last = self.resumed.last().unwrap_or(&self.begun);
        if *last != now {
            watch.line(&format!(
                "resumed by {now}, before by {last}: results may differ in their last bits or more"
            ));
            self.resumed.push(now);
        }
    }
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Studied {
    /// The plan.
    pub plan: Protocol,
    /// The statistics.
    pub statistics: Statistics,
    /// Whether a run, or a test of one, that could have been computed failed.
    pub failed: bool,
}

/// A data set in use.
pub(crate) struct Opened {
    pub(crate) name: String,
    pub(crate) source: Box<dyn Source>,
    /// The cases used.
    pub(crate) subset: Vec<usize>,
    pub(crate) description: DataSet,
}

/// Trains what is not trained yet, tests what is not tested yet, and writes the results.
///
/// # Errors
/// [`Error::Argument`] for a plan or data that cannot be used at all, a source that is not what the study began with, a
/// target that shares images with it, a network to start from that has seen any of the images, or an `out` that already
/// holds something; [`Error::File`] for files that cannot be read or written; [`Error::Device`];
/// [`Error::Interrupted`], after saving. A run that fails otherwise is reported, and the others go on; if none succeeds,
/// its error is returned. Nor does a target end a study that cannot be read when networks are tested on it: what it would
/// have told is missing.
pub fn study(args: &StudyArgs<'_>, watch: &dyn Watch, interrupt: &AtomicBool) -> Result<Studied> {
    let path = args.out.join(MANIFEST);
    let before: Option<Manifest> = match args.resume && path.is_file() {
        true => Some(read_json(&path, "expected a study's manifest")?),
        false => None,
    };
    let plan = plan(args, before.as_ref())?;
    // What the device lacks should show before anything is read or written.
    let device = plan.methods[0].config.device;
    plan.methods[0].config.backend(device)?;
    let sets = open(&plan, before.as_ref(), watch, interrupt)?;
    for set in &sets {
        fits(set, &plan.methods)?;
    }
    apart(&sets, watch)?;
    untouched(&plan.methods, &sets, watch)?;
    let init = init_hashes(&plan.methods, before.as_ref())?;
    let folds = folds(&plan, &sets[0])?;
    make_folder(args.out)?;
    let mut manifest = Manifest {
        begun: Means::current(device),
        resumed: Vec::new(),
        data: sets.iter().map(|set| set.description.clone()).collect(),
        init,
        not_computed: Vec::new(),
        plan: plan.clone(),
    };
    if args.resume {
        sweep(args.out)?;
    }
    if let Some(before) = &before {
        unchanged(args.out, before, &manifest, watch)?;
        manifest.go_on(before, watch);
    }
    write_atomically(&args.out.join(PLAN), plan.to_toml().as_bytes())?;
    write_json(&path, &manifest)?;

    for method in &plan.methods {
        watch_ramp(&method.name, &method.config, watch);
    }
    let runs = plan.runs();
    watch.begin(&plan, &runs);
    let (mut done, mut first_error) = (Vec::new(), None);
    let mut untested = Vec::new();
    for run in &runs {
        stop(interrupt)?;
        let skip = |reason: String, missing: &mut Vec<Missing>| {
            watch.state(run, &State::Skipped(reason.clone()));
            missing.push(Missing {
                what: run.to_string(),
                reason,
            });
        };
        if let Some(reason) = unfit(&plan.config(run), &sets[0], &folds[run.fold]) {
            skip(reason, &mut manifest.not_computed);
            continue;
        }
        match one(&plan, run, args.out, &sets, watch, interrupt) {
            Ok(missing) => {
                untested.extend(missing);
                done.push(run.clone());
            }
            // What stops one run stops them all, or is for the user to decide.
            Err(error @ (Error::Interrupted | Error::File { .. } | Error::Device { .. })) => {
                return Err(error);
            }
            Err(error) => {
                skip(error.to_string(), &mut manifest.not_computed);
                first_error.get_or_insert(error);
            }
        }
    }
    if done.is_empty() {
        let problem = "expected a run that can be computed, found none";
        return Err(first_error.unwrap_or_else(|| {
            let reason = manifest.not_computed.first();
            let reason = reason.map_or(String::new(), |m| format!(" ({}: {})", m.what, m.reason));
            Error::argument("--arms", format!("{problem}{reason}"))
        }));
    }
    let measured = measured(args.out, &done, &sets)?;
    let (ensembles, missing) = ensemble::all(&plan, &done, args.out, &sets, watch, interrupt)?;
    untested.extend(missing);
    let failed = first_error.is_some() || !untested.is_empty();
    manifest.not_computed.extend(untested);
    let descriptions: Vec<&DataSet> = sets.iter().map(|set| &set.description).collect();
    let mut statistics = Statistics::of(&plan, &measured, &ensembles, &descriptions);
    manifest
        .not_computed
        .extend(statistics.not_computed.clone());
    statistics.not_computed.clone_from(&manifest.not_computed);
    write_rows(args.out, &measured)?;
    write_csv(&args.out.join(ENSEMBLES), &ensemble::rows(&ensembles))?;
    write_json(&args.out.join(STATISTICS), &statistics)?;
    write_json(&path, &manifest)?;
    let histories = histories(args.out, &done)?;
    page::write(
        args.out,
        &manifest,
        &statistics,
        &measured,
        &histories,
        &sets,
    )?;
    Ok(Studied {
        plan,
        statistics,
        failed,
    })
}

fn plan(args: &StudyArgs<'_>, before: Option<&Manifest>) -> Result<Protocol> {
    let path = args.out.join(PLAN);
    if !args.resume {
        claim(args.out, PLAN, "a study")?;
        let problem = "expected a source and targets, found none";
        let plan = args
            .plan
            .ok_or_else(|| Error::argument("--source", problem))?;
        return Ok(plan.clone());
    }
    if !path.is_file() {
        let problem = format!("expected the folder of a study to resume, found no {PLAN} in it");
        return Err(Error::file(args.out, problem));
    }
    let mut own = Protocol::read(&path)?;
    let Some(asked) = args.plan else {
        if let Some(device) = args.device {
            own.move_to(device);
        }
        return Ok(own);
    };
    // Methods may be added behind those that there are.
    let mut known = asked.clone();
    let more = known
        .methods
        .split_off(own.methods.len().min(known.methods.len()));
    // Data may have moved: the manifest knows what they hold.
    if before.is_some() && own.targets.len() == known.targets.len() {
        own.source.clone_from(&known.source);
        own.targets.clone_from(&known.targets);
    }
    match own.difference(&known) {
        None => {
            // Of what is no difference, the latest word counts.
            for (own, known) in own.methods.iter_mut().zip(known.methods) {
                own.config.workers = known.config.workers;
                own.config.device = known.config.device;
            }
            own.methods.extend(more);
            Ok(own)
        }
        Some((key, ours, theirs)) => {
            let problem = format!("expected {ours}, as the study to resume has it, found {theirs}");
            Err(Error::argument(key, problem))
        }
    }
}

/// Refuses a folder that holds something.
pub(crate) fn claim(out: &Path, marker: &str, what: &str) -> Result<()> {
    if out.join(marker).exists() {
        let problem =
            format!("already holds {what}: go on with it (--resume) or choose another folder");
        return Err(Error::file(out, problem));
    }
    run::new_or_empty(out)
}

/// The data of a plan, under the names that they have in the study to resume if there is one.
fn open(
    plan: &Protocol,
    before: Option<&Manifest>,
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<Vec<Opened>> {
    let specs: Vec<&str> = [plan.source.as_str()]
        .into_iter()
        .chain(plan.targets.iter().map(String::as_str))
        .collect();
    let mut sources = Vec::new();
    for (i, spec) in specs.iter().enumerate() {
        watch.progress("opening data", i as u64, specs.len() as u64, spec);
        stop(interrupt)?;
        sources.push(match i {
            0 => data::open(spec)?,
            _ => data::open_to_test(spec)?,
        });
    }
    let known: Vec<(&str, &str)> = sources
        .iter()
        .zip(&specs)
        .map(|(source, spec)| (source.name(), *spec))
        .collect();
    let names = match before {
        Some(before) if before.data.len() == known.len() => {
            before.data.iter().map(|set| set.name.clone()).collect()
        }
        _ => names(&known),
    };
    let drop_duplicates = plan.methods.iter().any(|m| m.config.drop_duplicates);
    let opened = sources.into_iter().zip(&specs).zip(names);
    let opened = opened
        .map(|((source, spec), name)| {
            stop(interrupt)?;
            let (subset, drops) = select(&*source, drop_duplicates, watch);
            let description = DataSet::of(&name, spec, &*source, &subset, drops)?;
            Ok(Opened {
                name,
                source,
                subset,
                description,
            })
        })
        .collect();
    let all = specs.len() as u64;
    watch.progress("opening data", all, all, "");
    opened
}

/// Refuses a data set that methods cannot read at their size.
pub(crate) fn fits(set: &Opened, methods: &[Method]) -> Result<()> {
    let Some(size) = set.source.letterboxed() else {
        return Ok(());
    };
    match methods.iter().find(|method| method.config.size != size) {
        None => Ok(()),
        Some(Method { name, config }) => Err(Error::argument(
            &set.description.data,
            format!(
                "expected a pack of size {}, which {name} has, found one of size {size}",
                config.size
            ),
        )),
    }
}

/// Refuses targets that hold images of the source, since a network would be tested on what it was trained on, and one
/// that is another once more. Names of patients that source and target share are told: they may be the same people.
fn apart(sets: &[Opened], watch: &dyn Watch) -> Result<()> {
    let source = sets[0].source.cases();
    let own: HashMap<&str, &str> = source
        .iter()
        .map(|case| (case.sha256.as_str(), case.image.as_str()))
        .collect();
    for target in &sets[1..] {
        let cases = target.source.cases().iter();
        let shared: Vec<(&str, &str)> = cases
            .filter_map(|case| Some((case.image.as_str(), *own.get(case.sha256.as_str())?)))
            .collect();
        if let Some((theirs, ours)) = shared.first() {
            let problem = format!(
                "expected images that are not in the source {}, found {}: {theirs} is its {ours}",
                sets[0].description.data,
                shared.len()
            );
            return Err(Error::argument(&target.description.data, problem));
        }
    }
    let hashes = |set: &Opened| -> BTreeSet<String> {
        let cases = set.source.cases().iter();
        cases.map(|case| case.sha256.clone()).collect()
    };
    for (i, target) in sets.iter().enumerate().skip(1) {
        let images = hashes(target);
        if let Some(other) = sets[1..i].iter().find(|other| hashes(other) == images) {
            let problem = format!(
                "expected other images than those of {}, found the same",
                other.description.data
            );
            return Err(Error::argument(&target.description.data, problem));
        }
        let patients = |set: &Opened| -> BTreeSet<String> {
            let cases = set.source.cases().iter();
            cases.filter_map(|case| case.patient.clone()).collect()
        };
        let (ours, theirs) = (patients(&sets[0]), patients(target));
        let mut shared = ours.intersection(&theirs);
        if let Some(first) = shared.next() {
            watch.line(&format!(
                "{} patients of {} have names of the source's, {first:?} first; if they are the same people, leave them out",
                1 + shared.count(),
                target.description.data
            ));
        }
    }
    Ok(())
}

/// Refuses methods that start from a network which a data set here has trained or chosen, or the one that this network
/// started from, and so on: every image here is held out from somebody. What stands in no manifest beside a network is
/// said to be unknown.
fn untouched(methods: &[Method], sets: &[Opened], watch: &dyn Watch) -> Result<()> {
    let given: BTreeSet<&str> = methods.iter().map(|m| m.config.init.as_str()).collect();
    for init in given.into_iter().filter(|init| !init.is_empty()) {
        let (mut next, mut visited) = (init.to_owned(), BTreeSet::new());
        while !next.is_empty() && visited.insert(next.clone()) {
            let path = Path::new(&next).with_file_name(run::MANIFEST);
            let Ok(manifest) = run::Manifest::read(&path) else {
                watch.line(&format!(
                    "what images {next} has seen is not known: no run's {} is beside it",
                    run::MANIFEST
                ));
                break;
            };
            let seen = manifest
                .samples()
                .map(|sample| sample.image.sha256.as_str());
            let seen: HashSet<&str> = seen.collect();
            for set in sets {
                let cases = set.source.cases().iter();
                let mut known = cases.filter(|case| seen.contains(case.sha256.as_str()));
                if let Some(first) = known.next() {
                    let problem = format!(
                        "expected a network that has seen no image of {}, since all are held out once, found {} that \
                         {next} was made with, {} first",
                        set.description.data,
                        1 + known.count(),
                        first.image
                    );
                    return Err(Error::argument("init", problem));
                }
            }
            next = manifest.config.init;
        }
    }
    Ok(())
}

/// SHA-256 of the files that methods start from, by their paths; refuses those that are no longer what the study to
/// resume began with.
fn init_hashes(methods: &[Method], before: Option<&Manifest>) -> Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    for init in methods.iter().map(|method| &method.config.init) {
        if init.is_empty() || hashes.contains_key(init) {
            continue;
        }
        let before = before.and_then(|before| before.init.get(init));
        let hash = match (std::fs::read(init), before) {
            (Ok(bytes), _) => hex(&Sha256::digest(bytes)),
            // Runs that are finished, or only begun, need it no more; others will miss it.
            (Err(_), Some(before)) => before.clone(),
            (Err(e), None) => return Err(Error::caused(init, "cannot be read", e)),
        };
        if before.is_some_and(|before| *before != hash) {
            let problem = "expected the file that the study began with, found another";
            return Err(Error::file(init, problem));
        }
        hashes.insert(init.clone(), hash);
    }
    Ok(hashes)
}

/// The folds that [`train`] will make.
fn folds(plan: &Protocol, source: &Opened) -> Result<Vec<Fold>> {
    let cases = source.source.cases();
    let mut lesions = source.subset.clone();
    lesions.retain(|&i| cases[i].label.is_lesion());
    split::folds(
        cases,
        &lesions,
        plan.folds,
        plan.methods[0].config.fold_seed,
    )
}

/// Why a run cannot be computed on its fold.
fn unfit(config: &Config, source: &Opened, fold: &Fold) -> Option<String> {
    let cases = source.source.cases();
    for (part, name) in [(&fold.train, "training"), (&fold.validation, "held-out")] {
        let malignant = part.iter().filter(|&&i| cases[i].label == Label::Malignant);
        let (n, malignant) = (part.len(), malignant.count());
        if n == 0 {
            return Some(format!("the {name} part of the fold has no lesions"));
        }
        if config.arm.classifies() && (malignant == 0 || malignant == n) {
            return Some(format!(
                "the {name} part of the fold has {malignant} malignant of {n} lesions, and classifying needs both"
            ));
        }
    }
    None
}

/// Says before hours of training which method's ramp is longer than they are.
fn watch_ramp(name: &str, config: &Config, watch: &dyn Watch) {
    if let Some(problem) = cut_short(config) {
        watch.line(&format!("{name}: {problem}"));
    }
}

/// Compares what a study began with and what there is now. Results on a target that changed are computed anew; a
/// source that changed is another study.
fn unchanged(out: &Path, before: &Manifest, now: &Manifest, watch: &dyn Watch) -> Result<()> {
    for (i, (was, is)) in before.data.iter().zip(&now.data).enumerate() {
        let Some(change) = was.change(is) else {
            continue;
        };
        // Results on a target that changed where it is are another matter than another target.
        if i == 0 || was.data != is.data {
            let problem = format!("expected the images that the study began with, found {change}");
            return Err(Error::argument(&is.data, problem));
        }
        watch.line(&format!(
            "{} has changed, testing on it again: {change}",
            is.data
        ));
        let of_runs = now.plan.runs().into_iter().map(|run| run.folder(out));
        let methods = now.plan.methods.iter();
        let of_ensembles = methods.map(|method| ensemble::folder(out, &method.name));
        for folder in of_runs.chain(of_ensembles) {
            remove(&folder.join(&is.name).join(RESULTS))?;
        }
    }
    Ok(())
}

/// Removes what a killed call left of files that it was writing, here and below.
fn sweep(folder: &Path) -> Result<()> {
    let unreadable = |e| Error::caused(folder, "cannot be read", e);
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let kind = entry.file_type().map_err(unreadable)?;
        if kind.is_dir() {
            sweep(&entry.path())?;
        } else if kind.is_file() && is_temporary(&entry.file_name().to_string_lossy()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::caused(path, "cannot be removed", e))
        }
        _ => Ok(()),
    }
}

/// Trains and tests one run, as far as it is not done. Returns what it could not be tested on.
fn one(
    plan: &Protocol,
    run: &Run,
    out: &Path,
    sets: &[Opened],
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<Vec<Missing>> {
    let folder = run.folder(out);
    let trainer = plan.training(run);
    let of_trainer = trainer.folder(out);
    let config = plan.config(run);
    trained(run, &of_trainer, &plan.config(&trainer), watch, interrupt)?;
    if !is_finished(&folder) {
        watch.state(run, &State::Testing(sets[0].name.clone()));
        take_over(&of_trainer, &folder, &config, &sets[0], watch, interrupt)?;
    }
    let (mut model, mut missing) = (None, Vec::new());
    for (i, set) in sets.iter().enumerate() {
        let folder = folder.join(&set.name);
        if folder.join(RESULTS).is_file() {
            continue;
        }
        watch.state(run, &State::Testing(set.name.clone()));
        let model = match &mut model {
            Some(model) => model,
            none => none.insert(Model::open(&run.folder(out), config.device, usize::MAX)?),
        };
        let subset = match i {
            0 => unseen(set, &run.folder(out))?,
            _ => set.subset.clone(),
        };
        let rows = examine(model, &*set.source, &subset, watch, interrupt);
        let Some(rows) = or_missing(rows, &run.to_string(), i, set, watch, &mut missing)? else {
            continue;
        };
        make_folder(&folder)?;
        write_csv(&folder.join(NORMALS), &normals(&rows))?;
        write(&folder, &set.name, set.source.cases(), &rows)?;
    }
    let rows = rows(&folder, &sets[0].name)?;
    let dice: Vec<f64> = rows.iter().filter_map(|row| row.dice).collect();
    let diagnoses: Vec<_> = rows.iter().filter_map(PerImage::diagnosis).collect();
    let auc = crate::metrics::classification::Auc::of(&diagnoses);
    let dice = crate::metrics::statistics::mean(&dice);
    watch.state(run, &State::Done(dice, auc.map(|auc| auc.value)));
    Ok(missing)
}

/// What was found on data set number `i`, or for a target that could not be tested on the reason, which is added to
/// `missing`.
fn or_missing(
    rows: Result<Vec<PerImage>>,
    what: &str,
    i: usize,
    set: &Opened,
    watch: &dyn Watch,
    missing: &mut Vec<Missing>,
) -> Result<Option<Vec<PerImage>>> {
    match rows {
        Ok(rows) => Ok(Some(rows)),
        // Training needs the source too, and a device that fails will fail again.
        Err(error @ (Error::Interrupted | Error::Device { .. })) => Err(error),
        Err(error) if i == 0 => Err(error),
        Err(error) => {
            let what = format!("{what} on {}", set.name);
            let reason = error.to_string();
            watch.line(&format!("{what}: not computed: {reason}"));
            missing.push(Missing { what, reason });
            Ok(None)
        }
    }
}

/// Trains the run in `folder` from where it stands, unless that is over. Its last checkpoint goes, since a finished run
/// needs it for nothing, and it is as large as the best.
fn trained(
    run: &Run,
    folder: &Path,
    config: &Config,
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<()> {
    if !is_finished(folder) {
        watch.state(run, &State::Training);
        let args = TrainArgs {
            out: folder,
            config: None,
            settings: &config.settings(),
            resume: folder.join(CONFIG).is_file(),
        };
        train(&args, watch, interrupt)?;
    }
    remove(&folder.join(LAST))
}

/// Makes `folder` a run with the network of another, `trainer`, and a configuration that differs from that one's only in
/// how it is tested.
fn take_over(
    trainer: &Path,
    folder: &Path,
    config: &Config,
    source: &Opened,
    watch: &dyn Watch,
    interrupt: &AtomicBool,
) -> Result<()> {
    make_folder(folder)?;
    for name in [BEST, METRICS] {
        let (from, to) = (trainer.join(name), folder.join(name));
        remove(&to)?;
        // Files of runs are replaced and never changed, so both may have the same bytes on the disk.
        std::fs::hard_link(&from, &to)
            .or_else(|_| std::fs::copy(&from, &to).map(drop))
            .map_err(|e| Error::caused(&to, "cannot be written", e))?;
    }
    let manifest = run::Manifest {
        config: config.clone(),
        ..run::Manifest::read(&trainer.join(run::MANIFEST))?
    };
    write_json(&folder.join(run::MANIFEST), &manifest)?;
    write_atomically(&folder.join(CONFIG), config.to_toml().as_bytes())?;
    let held_out: HashSet<&str> = manifest
        .validation
        .iter()
        .map(|sample| sample.image.image.as_str())
        .collect();
    let cases = source.source.cases();
    let mut subset = source.subset.clone();
    subset.retain(|&i| held_out.contains(cases[i].image.as_str()));
    let mut model = Model::open(folder, config.device, usize::MAX)?;
    let rows = examine(&mut model, &*source.source, &subset, watch, interrupt)?;
    let folder = folder.join(VALIDATION);
    make_folder(&folder)?;
    write(&folder, source.source.name(), cases, &rows).map(drop)
}

/// The source's images that a run was not trained on: its held-out part, and those without a lesion.
fn unseen(source: &Opened, run: &Path) -> Result<Vec<usize>> {
    let manifest = run::Manifest::read(&run.join(run::MANIFEST))?;
    let seen = manifest
        .train
        .iter()
        .map(|sample| sample.image.sha256.as_str());
    let seen: HashSet<&str> = seen.collect();
    let cases = source.source.cases();
    let mut subset = source.subset.clone();
    subset.retain(|&i| !seen.contains(cases[i].sha256.as_str()));
    Ok(subset)
}

/// A row of `normals.csv`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Normal {
    /// The data set.
    pub dataset: String,
    /// The image.
    pub image: String,
    /// Pixels predicted in it, at its own resolution.
    pub false_positive_area: usize,
}

fn normals(rows: &[PerImage]) -> Vec<Normal> {
    let of = |row: &PerImage| {
        Some(Normal {
            dataset: row.dataset.clone(),
            image: row.image.clone(),
            false_positive_area: row.false_positive_area?,
        })
    };
    rows.iter().filter_map(of).collect()
}

/// Results of a run on the data set of that name.
fn rows(run: &Path, name: &str) -> Result<Vec<PerImage>> {
    let folder = run.join(name);
    let mut rows: Vec<PerImage> = read_csv(&folder.join("per_image.csv"))?;
    let normals: Vec<Normal> = read_csv(&folder.join(NORMALS))?;
    let areas: HashMap<&str, usize> = normals
        .iter()
        .map(|normal| (normal.image.as_str(), normal.false_positive_area))
        .collect();
    for row in &mut rows {
        name.clone_into(&mut row.dataset);
        row.false_positive_area = areas.get(row.image.as_str()).copied();
    }
    Ok(rows)
}

fn measured(out: &Path, runs: &[Run], sets: &[Opened]) -> Result<Vec<Measured>> {
    let mut measured = Vec::new();
    for run in runs {
        for (set, opened) in sets.iter().enumerate() {
            let results = run.folder(out).join(&opened.name).join(RESULTS);
            if !results.is_file() {
                continue;
            }
            measured.push(Measured {
                run: run.clone(),
                set,
                rows: rows(&run.folder(out), &opened.name)?,
            });
        }
    }
    Ok(measured)
}

/// What happened in training, by run.
pub(crate) type Histories = BTreeMap<Run, Vec<Epoch>>;

fn histories(out: &Path, runs: &[Run]) -> Result<Histories> {
    let history = |run: &Run| Ok((run.clone(), read_csv(&run.folder(out).join(METRICS))?));
    runs.iter().map(history).collect()
}

fn write_rows(out: &Path, measured: &[Measured]) -> Result<()> {
    let of_run = |m: &Measured| -> Vec<(Run, PerImage)> {
        let row = |row: &PerImage| (m.run.clone(), row.clone());
        m.rows.iter().map(row).collect()
    };
    let rows: Vec<(Run, PerImage)> = measured.iter().flat_map(of_run).collect();
    write_csv(&out.join(PER_IMAGE), &rows)?;
    let of_run = |m: &Measured| -> Vec<(Run, Normal)> {
        let normals = normals(&m.rows).into_iter();
        normals.map(|normal| (m.run.clone(), normal)).collect()
    };
    let normals: Vec<(Run, Normal)> = measured.iter().flat_map(of_run).collect();
    write_csv(&out.join(NORMALS), &normals)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::caused(path, "cannot be written as JSON", e))?;
    json.push(b'\n');
    write_atomically(path, &json)
}

/// Reads what [`write_json`] wrote; `problem` is what a file that is missing or of another form says.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path, problem: &str) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| Error::caused(path, problem, e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::caused(path, problem, e))
}
