//! What a study does: its arms, folds and seeds, and the data it was done on.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use toml::{Table, Value};

use crate::data::{self, Label, Source, hex};
use crate::error::{Error, Result};
use crate::train::Config;
use crate::train::config::{Arm, Device, settings};

/// One method of a study: an arm of the paper, perhaps with something changed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// Its name, also that of its folder.
    pub name: String,
    /// Its configuration; data, fold and seed are those of each run.
    pub config: Config,
}

/// An ablation: its name, what it is, and the settings that it makes on top of the arm `consistency`.
pub struct Ablation {
    /// The name of the method.
    pub name: &'static str,
    /// What is different.
    pub about: &'static str,
    /// Keys of the configuration and their values.
    pub settings: &'static [(&'static str, &'static str)],
}

/// The ablations of the consistency term and its prior.
pub const ABLATIONS: [Ablation; 12] = [
    Ablation {
        name: "stop-classifier",
        about: "consistency moves the mask and the prior, not the classifier",
        settings: &[("loss.stop_gradient", "classifier")],
    },
    Ablation {
        name: "stop-mask",
        about: "consistency moves the classifier and the prior, not the mask",
        settings: &[("loss.stop_gradient", "mask")],
    },
    Ablation {
        name: "no-confidence",
        about: "undecided masks count as much as decided ones",
        settings: &[("loss.confidence", "false")],
    },
    Ablation {
        name: "no-sharpening",
        about: "features of the mask as it is, κ = 1",
        settings: &[("loss.kappa", "1.0")],
    },
    Ablation {
        name: "equal-weights",
        about: "the prior's weights start equal",
        settings: &[("prior.start", "equal")],
    },
    Ablation {
        name: "free-sign",
        about: "the prior's weights may be negative",
        settings: &[("prior.free_sign", "true")],
    },
    Ablation {
        name: "frozen-prior",
        about: "the prior stays as it was fitted",
        settings: &[("prior.frozen", "true")],
    },
    Ablation {
        name: "no-ramp",
        about: "consistency counts from the first step",
        settings: &[("loss.ramp_start", "0.0"), ("loss.ramp_epochs", "0.0")],
    },
    Ablation {
        name: "no-irregularity",
        about: "the prior without irregularity",
        settings: &[(
            "prior.features",
            r#"["orientation", "margin", "roundness"]"#,
        )],
    },
    Ablation {
        name: "no-orientation",
        about: "the prior without orientation",
        settings: &[(
            "prior.features",
            r#"["irregularity", "margin", "roundness"]"#,
        )],
    },
    Ablation {
        name: "no-margin",
        about: "the prior without margin",
        settings: &[(
            "prior.features",
            r#"["irregularity", "orientation", "roundness"]"#,
        )],
    },
    Ablation {
        name: "no-roundness",
        about: "the prior without roundness",
        settings: &[(
            "prior.features",
            r#"["irregularity", "orientation", "margin"]"#,
        )],
    },
];

/// The four arms of the paper, in the order in which they are reported.
pub const ARMS: [(&str, Arm); 4] = [
    ("segmentation", Arm::Segmentation),
    ("classification", Arm::Classification),
    ("multitask", Arm::Multitask),
    ("consistency", Arm::Consistency),
];

/// A configuration file of a study or a search, and what the command line says on top: keys of a run's configuration
/// for every method, and under `[methods.NAME]` for one.
#[derive(Clone, Default, Debug)]
pub struct Overlay {
    all: Vec<(String, String)>,
    methods: BTreeMap<String, Vec<(String, String)>>,
    search: Option<Search>,
}

/// A search that chose settings: `[search]` in its `choice.toml`, and from there in `study.toml`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Search {
    /// The data set that it searched on, `NAME:PATH`.
    pub source: String,
    /// [`DataSet::sha256`] of it.
    pub sha256: String,
    /// Number of configurations that it tried of each method.
    pub trials: BTreeMap<String, usize>,
}

/// What every run of a study or a search has its own of: keys of its configuration, with the flags that say what.
pub(super) const OWN: [(&str, &str); 5] = [
    ("data", "--source"),
    ("arm", "--arms"),
    ("folds", "--folds"),
    ("fold", "--folds, of which each is held out once"),
    ("seed", "--seed and --seeds"),
];

/// What all methods of a study share, or comparing them would compare that.
pub(super) const SHARED: [&str; 7] = [
    "data",
    "device",
    "drop_duplicates",
    "fold",
    "fold_seed",
    "folds",
    "seed",
];

impl Overlay {
    /// Reads `file`, if any, and overlays it by the settings `given`, which hold for every method.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, is no TOML, sets what every run has its own of, or `methods` in it are
    /// no tables or set what all methods share; [`Error::Argument`] if a setting given is one that every run has its own of.
    pub fn read(file: Option<&Path>, given: &[(String, String)]) -> Result<Self> {
        let mut overlay = Self::default();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|e| Error::caused(path, "cannot be read", e))?;
            let mut table: Table = text
                .parse()
                .map_err(|e: toml::de::Error| Error::caused(path, "expected TOML", e))?;
            let methods = table.remove("methods");
            if let Some(search) = table.remove("search") {
                let search = search.try_into();
                let problem = "search: expected the table that `echograd search` writes";
                overlay.search = Some(search.map_err(|e| Error::caused(path, problem, e))?);
            }
            overlay.all = settings(table);
            if let Some((key, problem)) = own(&overlay.all) {
                return Err(Error::file(path, format!("{key}: {problem}")));
            }
            let expected = "methods: expected a table for each method, [methods.NAME]";
            if let Some(methods) = methods {
                let Value::Table(methods) = methods else {
                    return Err(Error::file(path, expected));
                };
                for (name, value) in methods {
                    let Value::Table(table) = value else {
                        return Err(Error::file(path, expected));
                    };
                    if let Some(key) = SHARED.iter().find(|key| table.contains_key(**key)) {
                        let problem = format!(
                            "methods.{name}.{key}: expected a setting that methods may differ in, found one that all share"
                        );
                        return Err(Error::file(path, problem));
                    }
                    overlay.methods.insert(name, settings(table));
                }
            }
        }
        if let Some((key, problem)) = own(given) {
            return Err(Error::argument(key, problem));
        }
        overlay.all.extend_from_slice(given);
        Ok(overlay)
    }

    /// The search that wrote the file, if one did.
    pub fn search(&self) -> Option<&Search> {
        self.search.as_ref()
    }

    /// The configuration of the method of that name. Later settings win: the preset, the file, the command line, the
    /// file's table for its arm, what the method's name says, the file's table for it. A method's own word counts more
    /// than what is said for all, or an ablation would be none under `--set`.
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing of that name is known (an arm, an ablation, or a table of the file that names
    /// its `arm`), if it is no name for a folder, or as [`Config::load`].
    pub fn method(&self, name: &str) -> Result<Method> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            let problem = format!(
                "expected the name of a method, of letters, digits, -, _ and (not first) ., found {name:?}"
            );
            return Err(Error::argument("--arms", problem));
        }
        let own = self.methods.get(name);
        let mut settings = Vec::new();
        let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        if let Some((arm, _)) = ARMS.iter().find(|(arm, _)| *arm == name) {
            settings.push(set("arm", arm));
        } else if let Some(ablation) = ABLATIONS.iter().find(|a| a.name == name) {
            settings.push(set("arm", "consistency"));
            // What holds for the arm holds for its ablation.
            let whole = self.methods.get("consistency");
            settings.extend(whole.into_iter().flatten().cloned());
            settings.extend(ablation.settings.iter().map(|(key, value)| set(key, value)));
        } else if let Some((_, arm)) = own.and_then(|own| own.iter().find(|(key, _)| key == "arm"))
        {
            // What holds for the arm holds for whatever is made of it.
            settings.extend(self.methods.get(arm).into_iter().flatten().cloned());
        } else {
            let known: Vec<&str> = ARMS
                .iter()
                .map(|(name, _)| *name)
                .chain(ABLATIONS.iter().map(|a| a.name))
                .chain(self.methods.keys().map(String::as_str))
                .collect();
            let nearest = known
                .into_iter()
                .min_by_key(|known| strsim::damerau_levenshtein(known, name))
                .unwrap_or_default();
            let problem = format!("unknown method {name:?}, did you mean {nearest:?}?");
            return Err(Error::argument("--arms", problem));
        }
        let own = own.map_or(&[][..], |own| own);
        let settings: Vec<_> = [&self.all[..], &settings, own].concat();
        Ok(Method {
            name: name.to_owned(),
            config: Config::load(None, &settings)?,
        })
    }
}

/// The first of these settings that every run has its own of, and what to do instead.
fn own(settings: &[(String, String)]) -> Option<(&'static str, String)> {
    let given = |key: &str| settings.iter().any(|(given, _)| given == key);
    let (key, flag) = OWN.into_iter().find(|(key, _)| given(key))?;
    let problem = format!(
        "expected a setting that all runs share, found one that each has its own of; use {flag}"
    );
    Some((key, problem))
}

/// A study's plan, `study.toml`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// The data set that trains, `NAME:PATH`.
    pub source: String,
    /// Those that are only tested on.
    pub targets: Vec<String>,
    /// Number of folds of the source.
    pub folds: usize,
    /// Seeds of the runs of each fold.
    pub seeds: Vec<u64>,
    /// The search that chose the methods' settings, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<Search>,
    /// The methods, in the order of reports.
    pub methods: Vec<Method>,
}

/// One run of a study.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The method.
    pub arm: String,
    /// The fold held out.
    pub fold: usize,
    /// The seed.
    pub seed: u64,
}

impl Run {
    /// Where it lies in the study's folder.
    pub fn folder(&self, study: &Path) -> std::path::PathBuf {
        let name = format!("fold-{}_seed-{}", self.fold, self.seed);
        study.join("runs").join(&self.arm).join(name)
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} fold {} seed {}", self.arm, self.fold, self.seed)
    }
}

impl Protocol {
    /// All runs: a fold of every method before the next fold, so that what is there early can be compared.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for &seed in &self.seeds {
            for fold in 0..self.folds {
                runs.extend(self.methods.iter().map(|method| Run {
                    arm: method.name.clone(),
                    fold,
                    seed,
                }));
            }
        }
        runs
    }

    /// The method of a run.
    pub fn method(&self, run: &Run) -> &Method {
        let mut methods = self.methods.iter();
        let found = methods.find(|method| method.name == run.arm);
        found.expect("runs are made from methods")
    }

    /// The configuration of a run.
    pub fn config(&self, run: &Run) -> Config {
        Config {
            data: self.source.clone(),
            folds: self.folds,
            fold: run.fold,
            seed: run.seed,
            ..self.method(run).config.clone()
        }
    }

    /// Has everything computed on `device` from now on.
    pub(super) fn move_to(&mut self, device: Device) {
        for method in &mut self.methods {
            method.config.device = device;
        }
    }

    /// The first method that trains as `method` does: methods that differ only in how they are tested share their
    /// networks.
    pub fn trainer<'a>(&'a self, method: &'a Method) -> &'a Method {
        let mut methods = self.methods.iter();
        let alike = |other: &&Method| method.config.trains_otherwise(&other.config).is_none();
        methods.find(alike).unwrap_or(method)
    }

    /// The run whose network `run` is tested with.
    pub fn training(&self, run: &Run) -> Run {
        Run {
            arm: self.trainer(self.method(run)).name.clone(),
            ..run.clone()
        }
    }

    /// Reads `study.toml`.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or of another form.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::caused(path, "cannot be read", e))?;
        toml::from_str(&text).map_err(|e| Error::caused(path, "expected a study's plan", e))
    }

    /// The text of `study.toml`.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a plan is a TOML table")
    }

    /// What `other` has otherwise: the key, ours, theirs. Threads that prepare batches change no result.
    pub fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let names = |plan: &Self| -> Vec<String> {
            plan.methods
                .iter()
                .map(|method| method.name.clone())
                .collect()
        };
        let pairs = [
            (
                "--source",
                format!("{:?}", self.source),
                format!("{:?}", other.source),
            ),
            (
                "--target",
                format!("{:?}", self.targets),
                format!("{:?}", other.targets),
            ),
            ("--folds", self.folds.to_string(), other.folds.to_string()),
            (
                "--seeds",
                format!("{:?}", self.seeds),
                format!("{:?}", other.seeds),
            ),
            (
                "--arms",
                format!("{:?}", names(self)),
                format!("{:?}", names(other)),
            ),
        ];
        let plain = pairs.into_iter().find(|(_, ours, theirs)| ours != theirs);
        let plain = plain.map(|(key, ours, theirs)| (key.to_owned(), ours, theirs));
        plain.or_else(|| {
            let methods = self.methods.iter().zip(&other.methods);
            methods.into_iter().find_map(|(ours, theirs)| {
                let (key, a, b) = ours.config.difference(&theirs.config)?;
                Some((format!("{}: {key}", ours.name), a, b))
            })
        })
    }
}

/// A data set of a study as it was found, an entry of `manifest.json`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DataSet {
    /// The name under which it is reported.
    pub name: String,
    /// Where it is, `NAME:PATH`.
    pub data: String,
    /// Cases by label: benign, malignant, normal.
    pub cases: [usize; 3],
    /// What it does without.
    pub lacks: data::Lacks,
    /// Images left out, and why.
    pub drops: Vec<data::Drop>,
    /// Every image with the SHA-256 of its file.
    pub images: Vec<crate::train::run::Image>,
    /// For every image the SHA-256 over its hash, label, patient, pixel size and mask.
    pub contents: Vec<String>,
    /// SHA-256 over `contents`.
    pub sha256: String,
    /// For every image the share that is lesion. Not in the file.
    #[serde(skip)]
    pub lesion: Vec<f64>,
}

impl DataSet {
    /// Describes an opened data set; `subset` are the cases used. Every image is decoded, since opening reads headers
    /// alone, and a damaged file should not show after hours of training.
    ///
    /// # Errors
    /// [`Error::File`] for the first image or mask that cannot be read.
    pub fn of(
        name: &str,
        data: &str,
        source: &dyn Source,
        subset: &[usize],
        drops: Vec<data::Drop>,
    ) -> Result<Self> {
        let (cases, lacks) = (source.cases(), source.lacks());
        let contents: Vec<Result<(String, f64)>> = subset
            .par_iter()
            .map(|&i| {
                let case = &cases[i];
                source.image(i)?;
                let mut hash = Sha256::new();
                let known = (case.label.as_str(), &case.patient, case.pixel_mm);
                hash.update(format!("{} {known:?}\n", case.sha256));
                let mut lesion = 0.0;
                if case.label.is_lesion() && !lacks.masks {
                    let mask = source.mask(i)?.pixels;
                    let inside = mask.iter().filter(|&&v| v > 0).count();
                    lesion = inside as f64 / mask.len() as f64;
                    hash.update(&mask);
                }
                Ok((hex(&hash.finalize()), lesion))
            })
            .collect();
        let contents = contents.into_iter().collect::<Result<Vec<_>>>()?;
        let (contents, lesion): (Vec<String>, Vec<f64>) = contents.into_iter().unzip();
        let of_label = |label| subset.iter().filter(|&&i| cases[i].label == label).count();
        Ok(Self {
            name: name.to_owned(),
            data: data.to_owned(),
            cases: Label::ALL.map(of_label),
            lacks,
            drops,
            images: subset
                .iter()
                .map(|&i| crate::train::run::Image {
                    image: cases[i].image.clone(),
                    sha256: cases[i].sha256.clone(),
                })
                .collect(),
            sha256: hex(&Sha256::digest(contents.concat())),
            contents,
            lesion,
        })
    }

    /// What is different in `now`, in words; `None` if nothing is.
    pub fn change(&self, now: &Self) -> Option<String> {
        if self.sha256 == now.sha256 {
            return None;
        }
        let contents = |set: &Self| -> BTreeMap<String, String> {
            let names = set.images.iter().map(|i| i.image.clone());
            names.zip(set.contents.iter().cloned()).collect()
        };
        let (before, after) = (contents(self), contents(now));
        let count = |what: &str, names: Vec<&String>| match names.as_slice() {
            [] => None,
            [one] => Some(format!("{one} {what}")),
            [first, ..] => Some(format!("{} images {what}, {first} first", names.len())),
        };
        let missing = |a: &BTreeMap<String, String>, name: &&String| !a.contains_key(*name);
        let parts = [
            count(
                "gone",
                before.keys().filter(|name| missing(&after, name)).collect(),
            ),
            count(
                "new",
                after.keys().filter(|name| missing(&before, name)).collect(),
            ),
            count(
                "with other pixels, label or mask",
                before
                    .iter()
                    .filter(|(name, hash)| after.get(*name).is_some_and(|now| now != *hash))
                    .map(|(name, _)| name)
                    .collect(),
            ),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        Some(match parts.is_empty() {
            true => "its images in another order".to_owned(),
            false => parts.join("; "),
        })
    }
}

/// Names of data sets in reports: those of their readers; where two would be the same, with the last part of their path,
/// and with a number if that is not enough.
pub fn names(sets: &[(&str, &str)]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (i, (name, spec)) in sets.iter().enumerate() {
        let shared = sets
            .iter()
            .enumerate()
            .any(|(j, (other, _))| j != i && other == name);
        let path = Path::new(spec.split_once(':').map_or(*spec, |(_, path)| path));
        // `.` and `..` have names too.
        let whole = match path.file_name() {
            Some(_) => path.to_owned(),
            None => path.canonicalize().unwrap_or_default(),
        };
        let plain = match whole.file_stem() {
            Some(last) if shared => format!("{name}-{}", last.to_string_lossy()),
            _ => (*name).to_owned(),
        };
        let mut candidate = plain.clone();
        let mut number = 2;
        while names.contains(&candidate) {
            candidate = format!("{plain}-{number}");
            number += 1;
        }
        names.push(candidate);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_sets_of_one_reader_are_told_apart() {
        let sets = [
            ("busi", "busi:/a/A"),
            ("busi", "busi:/a/B"),
            ("busi", "busi:/b/B"),
            ("breast", "breast:/c"),
        ];
        assert_eq!(names(&sets), ["busi-A", "busi-B", "busi-B-2", "breast"]);
        let here = std::env::current_dir().unwrap();
        let here = here.file_stem().unwrap().to_string_lossy();
        let sets = [("folder", "folder:."), ("folder", "folder:/a/C/")];
        assert_eq!(names(&sets), [format!("folder-{here}"), "folder-C".into()]);
    }

    #[test]
    fn a_methods_own_settings_count_most() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.toml");
        let text = "preset = \"tiny\"\nepochs = 3\n[loss]\nclassification = 0.5\n\
                    [methods.consistency.loss]\nclassification = 0.25\n\
                    [methods.mine]\narm = \"multitask\"\nepochs = 4\n";
        std::fs::write(&path, text).unwrap();
        let size = [("size".to_owned(), "32".to_owned())];
        let overlay = Overlay::read(Some(&path), &size).unwrap();
        let of = |name: &str| overlay.method(name).unwrap().config;
        let multitask = of("multitask");
        assert_eq!((multitask.arm, multitask.epochs), (Arm::Multitask, 3));
        assert_eq!((multitask.size, multitask.loss.classification), (32, 0.5));
        assert_eq!(of("consistency").loss.classification, 0.25);
        let blunt = of("no-sharpening");
        assert_eq!((blunt.loss.kappa, blunt.loss.classification), (1.0, 0.25));
        let mine = of("mine");
        assert_eq!((mine.arm, mine.epochs), (Arm::Multitask, 4));
        let unknown = overlay.method("consistancy").unwrap_err().to_string();
        assert!(
            unknown.ends_with("did you mean \"consistency\"?"),
            "{unknown}"
        );
    }

    #[test]
    fn every_ablation_is_a_configuration_of_its_own() {
        let overlay = Overlay::default();
        let whole = overlay.method("consistency").unwrap().config;
        let mut seen = vec![whole.clone()];
        for ablation in &ABLATIONS {
            let config = overlay.method(ablation.name).unwrap().config;
            assert_eq!(config.arm, Arm::Consistency);
            assert!(!seen.contains(&config), "{}", ablation.name);
            seen.push(config);
        }
    }
}
