//! A small study on phantoms of two hospitals from the first run to the report: the same when it is stopped in between,
//! and clear about what it cannot do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use echograd::Error;
use echograd::data::image::{Gray, write_png};
use echograd::data::phantom::{self, Site};
use echograd::metrics::{Disagreement, PerImage, read_csv};
use echograd::study::compare::compare;
use echograd::study::ensemble::Members;
use echograd::study::protocol::{Overlay, Protocol, Run};
use echograd::study::search::{SearchArgs, search};
use echograd::study::{State, Studied, StudyArgs, Watch, study};
use echograd::train::config::Device;
use echograd::train::evaluate::{EvaluateArgs, evaluate};
use echograd::train::run::{Epoch, TrainArgs, train};
use echograd::train::{Model, Report};
use serde_json::Value;

/// Two hospitals: one to train, one to test on.
fn data() -> &'static [String; 2] {
    static DATA: OnceLock<(tempfile::TempDir, [String; 2])> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let specs = [(Site::A, 30), (Site::B, 16)].map(|(site, count)| {
            let path = folder.path().join(site.to_string());
            phantom::write(&[site], count, 5, &path, &|_| Ok(())).unwrap();
            format!("busi:{}", path.display())
        });
        (folder, specs)
    };
    &DATA.get_or_init(make).1
}

fn plan(arms: &[&str], more: &[(&str, &str)]) -> Protocol {
    let [source, target] = data();
    plan_of(source, &[target], arms, more)
}

fn plan_of(source: &str, targets: &[&str], arms: &[&str], more: &[(&str, &str)]) -> Protocol {
    let overlay = overlay(None, more);
    Protocol {
        source: source.to_owned(),
        targets: targets.iter().map(|target| target.to_string()).collect(),
        folds: 2,
        seeds: vec![0],
        search: None,
        methods: arms
            .iter()
            .map(|arm| overlay.method(arm).unwrap())
            .collect(),
    }
}

/// Settings that take no time, and those of a file.
fn overlay(file: Option<&Path>, more: &[(&str, &str)]) -> Overlay {
    let small = [
        ("preset", "tiny"),
        ("size", "32"),
        ("batch", "8"),
        ("epochs", "2"),
        ("model.widths", "[4, 6]"),
        ("loss.ramp_start", "0"),
        ("loss.ramp_epochs", "1"),
    ];
    let settings = small.iter().chain(more);
    let settings: Vec<_> = settings
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    Overlay::read(file, &settings).unwrap()
}

const ARMS: [&str; 4] = ["segmentation", "classification", "multitask", "consistency"];

fn run(plan: Option<&Protocol>, out: &Path, resume: bool) -> echograd::Result<Studied> {
    study(
        &StudyArgs {
            plan,
            out,
            resume,
            device: None,
        },
        &(),
        &AtomicBool::new(false),
    )
}

/// A study of all arms, made once.
fn whole() -> &'static Path {
    static WHOLE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("study");
        let studied = run(Some(&plan(&ARMS, &[])), &out, false).unwrap();
        assert!(!studied.failed);
        (folder, out)
    };
    &WHOLE.get_or_init(make).1
}

fn message<T>(result: echograd::Result<T>) -> String {
    result.err().expect("this must fail").to_string()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The files whose bytes must not depend on how often a study was stopped.
fn results(out: &Path) -> BTreeMap<&'static str, Vec<u8>> {
    let files = [
        "per_image.csv",
        "normals.csv",
        "ensembles.csv",
        "statistics.json",
        "report.html",
        "manifest.json",
    ];
    files
        .map(|name| (name, fs::read(out.join(name)).unwrap()))
        .into()
}

/// Stops after some epochs, counted over all runs, or when the first test begins.
struct Stopper<'a> {
    interrupt: &'a AtomicBool,
    epochs: usize,
    seen: AtomicUsize,
    at_test: bool,
}

impl Report for Stopper<'_> {
    fn epoch(&self, _: &Epoch, _: u64, _: bool) {
        if self.seen.fetch_add(1, Ordering::SeqCst) + 1 >= self.epochs {
            self.interrupt.store(true, Ordering::SeqCst);
        }
    }
}

impl Watch for Stopper<'_> {
    fn state(&self, _: &Run, state: &State) {
        if self.at_test && matches!(state, State::Testing(_)) {
            self.interrupt.store(true, Ordering::SeqCst);
        }
    }
}

/// Remembers what is said.
#[derive(Default)]
struct Lines(Mutex<Vec<String>>);

impl Report for Lines {
    fn line(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

impl Watch for Lines {}

/// A study, and what was said about it.
fn told(plan: Option<&Protocol>, out: &Path, device: Option<Device>) -> (Studied, Vec<String>) {
    let lines = Lines::default();
    let args = StudyArgs {
        plan,
        out,
        resume: out.exists(),
        device,
    };
    let studied = study(&args, &lines, &AtomicBool::new(false)).unwrap();
    (studied, lines.0.into_inner().unwrap())
}

/// The texts of a page or a figure, behind its one style sheet.
fn texts(markup: &str) -> String {
    let (_, body) = markup.split_once("</style>").unwrap();
    let texts = body.split('<').filter_map(|part| part.split_once('>'));
    texts.map(|(_, text)| text).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_study_leaves_what_it_promises() {
    let out = whole();
    let text = fs::read_to_string(out.join("per_image.csv")).unwrap();
    let header = text.lines().next().unwrap();
    assert_eq!(
        header,
        "arm,fold,seed,dataset,image,patient,label,dice,iou,precision,recall,hd95_px,assd_px,hd95_mm,assd_mm,\
         p,phi,irregularity,orientation,margin,roundness"
    );
    // Every run sees the whole target; of the source, each lesion is held out once, each normal image twice.
    let statistics = json(&out.join("statistics.json"));
    let sets = statistics["datasets"].as_array().unwrap();
    assert_eq!(sets.len(), 2);
    for (set, [role, name]) in sets
        .iter()
        .zip([["source", "busi-A"], ["target", "busi-B"]])
    {
        assert!(
            set["role"] == role && set["dataset"] == name,
            "{role} {name}"
        );
    }
    let rows = |arm: &str, set: &str| {
        let wanted = (arm, set);
        let of = |line: &&str| {
            let fields: Vec<&str> = line.split(',').collect();
            (fields[0], fields[3]) == wanted
        };
        text.lines().skip(1).filter(of).count()
    };
    assert_eq!(rows("multitask", "busi-B"), 32);
    let manifest = json(&out.join("manifest.json"));
    let counts: Vec<usize> = manifest["data"][0]["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap() as usize)
        .collect();
    assert_eq!(
        rows("consistency", "busi-A"),
        counts[0] + counts[1] + 2 * counts[2]
    );

    for set in sets {
        for arm in ARMS {
            let found = &set["arms"][arm];
            assert_eq!(found["runs"], 2);
            let segments = arm != "classification";
            let classifies = arm != "segmentation";
            assert_eq!(found["metrics"]["segmentation"].is_object(), segments);
            assert_eq!(found["metrics"]["classification"].is_object(), classifies);
            assert_eq!(found["roc"].is_array(), classifies);
            assert_eq!(found["strata"]["small"].is_object(), segments);
            assert_eq!(found["dice_by_run"]["runs"].is_array(), segments);
        }
        let pair = |a: &str, b: &str| {
            let all = set["comparisons"].as_array().unwrap();
            all.iter().find(|c| c["a"] == a && c["b"] == b).cloned()
        };
        let dice = pair("multitask", "segmentation").unwrap()["dice"].clone();
        assert_eq!((&set["unit"], &set["units"]), (&"image".into(), &set["n"]));
        assert!(dice["wilcoxon"]["p_value"].is_number());
        // The source chose the epochs, and is no part of a family of tests.
        match set["role"] == "target" {
            true => assert!(dice["holm"].as_f64() >= dice["wilcoxon"]["p_value"].as_f64()),
            false => assert!(dice["holm"].is_null()),
        }
        let by_run = dice["by_run"]["runs"].as_array().unwrap();
        let of_run = [0, 1].map(|run| {
            let mean = |arm: &str| set["arms"][arm]["dice_by_run"]["runs"][run].as_f64();
            mean("multitask").unwrap() - mean("segmentation").unwrap()
        });
        assert_eq!(by_run.len(), of_run.len());
        for (found, expected) in by_run.iter().zip(of_run) {
            assert!((found.as_f64().unwrap() - expected).abs() < 1e-12);
        }
        assert!(pair("consistency", "multitask").unwrap()["dice"].is_object());
        let auc = pair("multitask", "classification").unwrap();
        assert!(auc["dice"].is_null());
        // On the source AUCs are within folds: the mean of the folds' AUCs, by their numbers of pairs.
        let single = &set["arms"]["multitask"]["auc_by_run"]["runs"];
        let [low, high] = [f64::min, f64::max].map(|end| {
            let runs = single.as_array().unwrap().iter();
            runs.map(|run| run.as_f64().unwrap()).reduce(end).unwrap()
        });
        let auc = &set["arms"]["multitask"]["metrics"]["classification"]["auc"]["value"];
        let auc = auc.as_f64().unwrap();
        assert!(set["role"] == "target" || (low - 1e-12..=high + 1e-12).contains(&auc));
        // Interference is the difference of the means over the images that both have.
        let mean = |arm: &str| set["arms"][arm]["metrics"]["segmentation"]["dice"]["mean"].as_f64();
        let expected = mean("multitask").unwrap() - mean("segmentation").unwrap();
        let found = set["interference"]["dice"]["interference"]["value"]
            .as_f64()
            .unwrap();
        assert!((found - expected).abs() < 1e-12);
        let difference = dice["difference"]["mean"].as_f64().unwrap();
        assert!((found - difference).abs() < 1e-12);
    }
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(
        !html.contains("http"),
        "a page must not refer to the network"
    );
    for part in [
        "Beside the paper",
        "busi-B, never seen",
        "<svg",
        "data:image/png",
        "Weights of φ",
        "ROC on busi-B",
        "4 methods trained on busi-A (",
        "Every method saw the same folds, starting weights and steps",
        "the held-out part of each fold chose the epoch, and if settings were chosen",
        "<li>Dice, consistency − multitask: ",
        "<li>AUC, consistency − multitask: ",
        "<li>Dice, multitask − segmentation: ",
        "<li>AUC, multitask − classification: ",
        "<li>busi-B is the only target: ",
    ] {
        assert!(html.contains(part), "{part}");
    }
    // Numbers below 0 have a minus sign, not a hyphen.
    let figure = fs::read_to_string(out.join("figures/feature-orientation.svg")).unwrap();
    for markup in [&html, &figure] {
        let text: Vec<char> = texts(markup).chars().collect();
        let negative = |sign: char| -> Vec<String> {
            let at = text.windows(3).enumerate();
            let at = at
                .filter(|(_, w)| !w[0].is_alphanumeric() && w[1] == sign && w[2].is_ascii_digit());
            at.map(|(i, _)| text[i..text.len().min(i + 12)].iter().collect())
                .collect()
        };
        assert!(!negative('−').is_empty());
        assert!(negative('-').is_empty(), "{:?}", negative('-'));
    }
    let svg = fs::read_to_string(out.join("figures/dice-busi-B.svg")).unwrap();
    assert!(svg.contains("xmlns") && !svg.contains("var("));

    // All arms of a fold begin with the same images and, where they share them, the same weights.
    let split = |arm: &str| {
        json(
            &out.join("runs")
                .join(arm)
                .join("fold-1_seed-0/manifest.json"),
        )["train"]
            .clone()
    };
    assert!(ARMS.iter().all(|arm| split(arm) == split("segmentation")));
    let epochs =
        fs::read_to_string(out.join("runs/consistency/fold-0_seed-0/metrics.csv")).unwrap();
    assert!(epochs.lines().next().unwrap().contains("prior_margin"));

    // A finished study repeats nothing and ends the same.
    let before = results(out);
    let checkpoint = out.join("runs/multitask/fold-0_seed-0/best.safetensors");
    let written = fs::metadata(&checkpoint).unwrap().modified().unwrap();
    run(None, out, true).unwrap();
    assert!(before == results(out), "the results differ");
    assert_eq!(
        fs::metadata(&checkpoint).unwrap().modified().unwrap(),
        written
    );

    let refused = message(run(Some(&plan(&ARMS, &[])), out, false));
    assert!(refused.contains("already holds a study"), "{refused}");
    let other = plan(&ARMS, &[("epochs", "3")]);
    let refused = message(run(Some(&other), out, true));
    assert!(
        refused.starts_with("segmentation: epochs: expected 2"),
        "{refused}"
    );
}

#[test]
fn an_ensemble_is_the_mean_of_its_networks_on_targets() {
    let out = whole();
    let runs = ["fold-0_seed-0", "fold-1_seed-0"].map(|run| out.join("runs/multitask").join(run));
    let rows: Vec<PerImage> = read_csv(&out.join("ensembles.csv")).unwrap();
    let members: Vec<Members> = read_csv(&out.join("ensembles.csv")).unwrap();
    let apart: Vec<Disagreement> = read_csv(&out.join("ensembles.csv")).unwrap();
    assert!(rows.iter().all(|row| row.dataset == "busi-B"));
    assert!(members.iter().all(|members| members.models == 2));
    let of_multitask: Vec<(&PerImage, &Disagreement)> = rows
        .iter()
        .zip(&apart)
        .zip(&members)
        .filter_map(|(row, members)| (members.arm == "multitask").then_some(row))
        .collect();
    assert_eq!(of_multitask.len(), 16);

    // Averaged at each image's own resolution, by other means than the ensemble's.
    let source = echograd::data::open(&data()[1]).unwrap();
    let cases = source.cases();
    let mut models = runs.map(|run| Model::open(&run, Device::Cpu, 1).unwrap());
    let (mut compared, mut overlap) = (0, 0.0);
    for (row, apart) in of_multitask {
        let i = cases
            .iter()
            .position(|case| case.image == row.image)
            .unwrap();
        let image = echograd::data::letterboxed_image(&*source, i, 32).unwrap();
        let letterbox = cases[i].letterbox(32);
        let mut mean = vec![0.0; cases[i].width * cases[i].height];
        let mut p = Vec::new();
        for model in &mut models {
            let said = model.infer(&[&image]).unwrap().remove(0);
            let soft: Vec<f32> = said
                .logits
                .unwrap()
                .iter()
                .map(|z| 1.0 / (1.0 + (-z).exp()))
                .collect();
            let full = letterbox.inverse(&soft);
            mean.iter_mut()
                .zip(full)
                .for_each(|(mean, p)| *mean += p / 2.0);
            p.push(said.p.unwrap());
        }
        assert!((row.p.unwrap() - (p[0] + p[1]) / 2.0).abs() < 1e-12);
        assert!((apart.p_sd.unwrap() - (p[0] - p[1]).abs() / f64::sqrt(2.0)).abs() < 1e-12);
        assert!((0.0..=1.0).contains(&apart.mask_agreement.unwrap()));
        let Some(dice) = row.dice else {
            continue;
        };
        let truth = source.mask(i).unwrap();
        let (mut both, mut areas) = (0, 0);
        for (&mean, &truth) in mean.iter().zip(&truth.pixels) {
            let (inside, truth) = (mean >= 0.5, truth > 0);
            both += usize::from(inside && truth);
            areas += usize::from(inside) + usize::from(truth);
        }
        // A pixel at the threshold may fall on either side.
        assert!(
            (dice - 2.0 * both as f64 / areas as f64).abs() < 1e-3,
            "{}",
            row.image
        );
        compared += 1;
        overlap += dice;
    }
    assert!(compared > 8 && overlap > 0.0);

    let statistics = json(&out.join("statistics.json"));
    let [source, target] = [0, 1].map(|set| statistics["datasets"][set].clone());
    assert!(source["ensembles"].as_object().unwrap().is_empty());
    let ensemble = &target["ensembles"]["multitask"];
    // The mean of p over runs is what an ensemble says.
    let auc = |of: &Value| {
        of["metrics"]["classification"]["auc"]["value"]
            .as_f64()
            .unwrap()
    };
    assert_eq!(auc(ensemble), auc(&target["arms"]["multitask"]));
    let flags = &ensemble["bad_masks"];
    assert!(flags["wrong"].as_u64() <= flags["n"].as_u64());
    assert_eq!(target["ensembles"].as_object().unwrap().len(), 4);
    let pairs: Vec<String> = target["ensemble_comparisons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| {
            format!(
                "{} − {}",
                c["a"].as_str().unwrap(),
                c["b"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(
        pairs,
        [
            "segmentation, ensemble − segmentation",
            "multitask, ensemble − multitask",
            "consistency, ensemble − consistency",
            "multitask, ensemble − segmentation, ensemble",
            "consistency, ensemble − segmentation, ensemble",
            "consistency, ensemble − multitask, ensemble",
        ]
    );
    for c in target["ensemble_comparisons"].as_array().unwrap() {
        assert!(c["auc"].is_null() && c["dice"]["holm"].is_number());
    }
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("<td>multitask, ensemble</td>"));
}

#[test]
fn methods_that_differ_only_in_how_they_are_tested_share_their_networks() {
    #[derive(Default)]
    struct Trained(Mutex<Vec<String>>);
    impl Report for Trained {}
    impl Watch for Trained {
        fn state(&self, run: &Run, state: &State) {
            if *state == State::Training {
                self.0.lock().unwrap().push(run.arm.clone());
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("study");
    let path = folder.path().join("methods.toml");
    let text = "[methods.multitask.loss]\nclassification = 0.3\n\
                [methods.flipped]\narm = \"multitask\"\ntest_flip = true\n";
    fs::write(&path, text).unwrap();
    let overlay = overlay(Some(&path), &[("epochs", "1")]);
    let mut first = plan(&[], &[]);
    first.methods.push(overlay.method("multitask").unwrap());
    let go = |plan: Option<&Protocol>, resume: bool| {
        let (trained, out) = (Trained::default(), &out);
        let args = StudyArgs {
            plan,
            out,
            resume,
            device: None,
        };
        let studied = study(&args, &trained, &AtomicBool::new(false));
        studied.map(|studied| (studied, trained.0.into_inner().unwrap()))
    };
    let (_, trained) = go(Some(&first), false).unwrap();
    assert_eq!(trained, ["multitask"; 2]);
    // A method is added to the study that is there, and has its networks already.
    let mut more = first.clone();
    more.methods.push(overlay.method("flipped").unwrap());
    assert_eq!(more.methods[1].config.loss.classification, 0.3);
    let (studied, trained) = go(Some(&more), true).unwrap();
    assert!(trained.is_empty(), "{trained:?}");
    assert_eq!(studied.plan, more);
    let comparison = &studied.statistics.datasets[1].comparisons[0];
    assert_eq!((&*comparison.a, &*comparison.b), ("flipped", "multitask"));
    assert!(comparison.dice.as_ref().unwrap().difference.mean != 0.0);
    let [one, other] =
        ["multitask", "flipped"].map(|arm| out.join("runs").join(arm).join("fold-1_seed-0"));
    let read = |run: &Path, name: &str| fs::read(run.join(name)).unwrap();
    for name in ["best.safetensors", "metrics.csv"] {
        assert!(read(&one, name) == read(&other, name), "{name}");
    }
    for name in [
        "busi-A/per_image.csv",
        "busi-B/per_image.csv",
        "validation/per_image.csv",
    ] {
        assert!(read(&one, name) != read(&other, name), "{name}");
    }
    // It is a run like any other.
    let results = folder.path().join("results");
    let args = EvaluateArgs {
        runs: std::slice::from_ref(&other),
        data: &data()[1],
        out: &results,
        drop_duplicates: false,
        include_training: false,
        device: Device::Cpu,
    };
    evaluate(&args, &(), &AtomicBool::new(false)).unwrap();
    assert!(read(&results, "per_image.csv") == read(&other, "busi-B/per_image.csv"));

    // Nothing would go on from the last checkpoint; who tries is told so.
    for run in [&one, &other] {
        assert!(!run.join("last.safetensors").exists());
        let args = TrainArgs {
            out: run,
            config: None,
            settings: &[],
            resume: true,
        };
        let refused = message(train(&args, &(), &AtomicBool::new(false)));
        assert!(
            refused.contains("found none: the run is finished"),
            "{refused}"
        );
    }
    let refused = message(go(Some(&first), true));
    assert!(
        refused.starts_with("--arms: expected [\"multitask\", \"flipped\"]"),
        "{refused}"
    );
}

#[test]
fn a_stopped_study_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("study");
    let plan = plan(&ARMS, &[]);
    // In the middle of the second run, then at the test of a later one, then between runs.
    for (call, (epochs, at_test)) in [(3, false), (100, true), (4, false)]
        .into_iter()
        .enumerate()
    {
        let interrupt = AtomicBool::new(false);
        let stopper = Stopper {
            interrupt: &interrupt,
            epochs,
            seen: AtomicUsize::new(0),
            at_test,
        };
        let args = StudyArgs {
            plan: (call == 0).then_some(&plan),
            out: &out,
            resume: call > 0,
            device: None,
        };
        assert!(matches!(
            study(&args, &stopper, &interrupt),
            Err(Error::Interrupted)
        ));
        assert!(!out.join("statistics.json").exists());
    }
    run(None, &out, true).unwrap();
    assert!(results(&out) == results(whole()), "the results differ");
}

/// The program itself, killed without a warning in the middle of a run.
#[test]
fn a_killed_study_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("study");
    let [source, target] = data();
    let program = || std::process::Command::new(env!("CARGO_BIN_EXE_echograd"));
    let flags = "--folds 2 --preset tiny --size 32 --batch 8 --epochs 2 --set model.widths=[4,6] \
                 --set loss.ramp_start=0 --set loss.ramp_epochs=1";
    let mut child = program()
        .args(["study", "--source", source, "--target", target, "--out"])
        .arg(&out)
        .args(flags.split_whitespace())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begun = out.join("runs/multitask/fold-0_seed-0/metrics.csv");
    while !begun.exists() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was killed"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!out.join("statistics.json").exists());
    let call = |more: &[&str]| {
        let command = ["study", "--resume", "--out"];
        program()
            .args(command)
            .arg(&out)
            .args(more)
            .output()
            .unwrap()
    };
    let part = call(&["--folds", "3"]);
    assert_eq!(part.status.code(), Some(1));
    let text = String::from_utf8(part.stderr).unwrap();
    assert!(
        text.starts_with("error: --resume: expected the command that the study began with"),
        "{text}"
    );
    let done = call(&[]);
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(
        done.status.success() && text.contains("busi-B (target)"),
        "{text}"
    );
    assert!(results(&out) == results(whole()), "the results differ");
}

#[test]
fn targets_that_hold_images_of_the_source_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [source, target] = data();
    let (_, path) = source.split_once(':').unwrap();
    // One image of the source under another name, in a set of its own.
    let shared = folder.path().join("shared");
    for sub in ["images", "masks"] {
        fs::create_dir_all(shared.join(sub)).unwrap();
    }
    let benign = Path::new(path).join("benign");
    fs::copy(benign.join("benign (1).png"), shared.join("images/x.png")).unwrap();
    fs::copy(
        benign.join("benign (1)_mask.png"),
        shared.join("masks/x.png"),
    )
    .unwrap();
    fs::write(shared.join("labels.csv"), "image,label\nx.png,benign\n").unwrap();
    let shared = format!("folder:{}", shared.display());
    let out = folder.path().join("out");
    for targets in [vec![shared.as_str()], vec![target, &shared], vec![source]] {
        let plan = plan_of(source, &targets, &["segmentation"], &[]);
        let refused = message(run(Some(&plan), &out, false));
        assert!(
            refused.contains("expected images that are not in the source"),
            "{refused}"
        );
        assert!(!out.exists(), "nothing is begun");
    }
}

/// `n` images with a lesion in various places, of the classes that `label` gives, other images for another `salt`.
fn blobs(folder: &Path, salt: usize, n: usize, label: impl Fn(usize) -> &'static str) -> String {
    for sub in ["images", "masks"] {
        fs::create_dir_all(folder.join(sub)).unwrap();
    }
    let mut labels = "image,label,patient\n".to_owned();
    for i in 0..n {
        let (mut image, mut mask) = (Gray::zeros(40, 32), Gray::zeros(40, 32));
        for (place, (pixel, inside)) in image.pixels.iter_mut().zip(&mut mask.pixels).enumerate() {
            let (x, y) = ((place % 40) as f64, (place / 40) as f64);
            let lesion =
                (x - 14.0 - (i % 7) as f64).hypot((y - 15.0) * (1.1 + 0.07 * (i % 5) as f64)) < 8.0;
            *pixel = (if lesion { 40 } else { 140 }
                + (place * 7919 + (i + 33 * salt) * 104_729) % 67) as u8;
            *inside = if lesion && label(i) != "normal" {
                255
            } else {
                0
            };
        }
        write_png(&folder.join(format!("images/{i:02}.png")), &image).unwrap();
        write_png(&folder.join(format!("masks/{i:02}.png")), &mask).unwrap();
        labels += &format!("{i:02}.png,{},p{}\n", label(i), i / 2);
    }
    fs::write(folder.join("labels.csv"), labels).unwrap();
    format!("folder:{}", folder.display())
}

#[test]
fn what_can_be_computed_is_and_the_rest_says_why_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // A source of one class trains the mask alone; targets of one class and of normals alone have figures missing.
    let benign = blobs(&path("benign"), 0, 12, |_| "benign");
    let healthy = blobs(&path("healthy"), 1, 3, |_| "normal");
    let [_, target] = data();
    let plan = plan_of(
        &benign,
        &[target, &healthy],
        &["segmentation", "multitask"],
        &[],
    );
    let out = path("out");
    let studied = run(Some(&plan), &out, false).unwrap();
    assert!(!studied.failed, "the data are as they are");
    let missing: Vec<String> = studied
        .statistics
        .not_computed
        .iter()
        .map(|m| format!("{}: {}", m.what, m.reason))
        .collect();
    for part in [
        "multitask fold 0 seed 0: the training part of the fold has 0 malignant of 6 lesions",
        "multitask fold 1 seed 0: ",
        "folder-benign: AUC: 12 benign and 0 malignant lesions",
        "folder-healthy: Dice, AUC, calibration: none of its 3 images shows a lesion",
    ] {
        assert!(
            missing.iter().any(|m| m.contains(part)),
            "{part}: {missing:?}"
        );
    }
    let sets = &studied.statistics.datasets;
    assert!(sets[1].arms["segmentation"].metrics.segmentation.is_some());
    assert_eq!(sets[2].arms["segmentation"].normals.as_ref().unwrap().n, 3);
    assert!(sets.iter().all(|set| !set.arms.contains_key("multitask")));
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("Not computed") && html.contains("0 malignant of 6 lesions"));

    // A target without masks has an AUC, one without labels has Dice; one without both is none.
    let classes = |i: usize| {
        if (i / 2).is_multiple_of(2) {
            "benign"
        } else {
            "malignant"
        }
    };
    let source = blobs(&path("source"), 2, 16, classes);
    let [unmasked, unlabelled] = [("unmasked", 3), ("unlabelled", 4)].map(|(name, salt)| {
        blobs(&path(name), salt, 6, |i| {
            if i == 5 { "normal" } else { classes(i) }
        })
    });
    fs::remove_dir_all(path("unmasked/masks")).unwrap();
    fs::remove_file(path("unlabelled/labels.csv")).unwrap();
    let targets = [unmasked.as_str(), &unlabelled];
    let plan = plan_of(&source, &targets, &["multitask"], &[("epochs", "1")]);
    let studied = run(Some(&plan), &path("parts"), false).unwrap();
    let arm = |set: usize| studied.statistics.datasets[set].arms["multitask"].clone();
    let (first, second) = (arm(1), arm(2));
    assert!(first.metrics.segmentation.is_none() && first.normals.is_some());
    assert_eq!(first.metrics.classification.unwrap().n, 5);
    assert!(second.metrics.classification.is_none() && second.normals.is_some());
    assert_eq!(second.metrics.segmentation.unwrap().dice.n, 5);
    let text = fs::read_to_string(path("parts/per_image.csv")).unwrap();
    let unknown = text
        .lines()
        .filter(|line| line.contains("folder-unlabelled,00.png,,,"));
    assert_eq!(unknown.count(), 2, "{text}");
    for part in ["folder-unmasked: Dice", "folder-unlabelled: AUC"] {
        let mut missing = studied.statistics.not_computed.iter();
        assert!(missing.any(|m| m.what.starts_with(part)), "{part}");
    }
    fs::remove_dir_all(path("unlabelled/masks")).unwrap();
    let plan = plan_of(&source, &[&unlabelled], &["multitask"], &[]);
    let refused = message(run(Some(&plan), &path("neither"), false));
    assert!(refused.contains("labels.csv"), "{refused}");

    // Nothing at all.
    let plan = plan_of(&benign, &[target], &["classification"], &[]);
    let refused = message(run(Some(&plan), &path("nothing"), false));
    assert!(
        refused.contains("expected a run that can be computed, found none"),
        "{refused}"
    );
    // More folds than patients of a class.
    let mut plan = plan_of(&benign, &[target], &["segmentation"], &[]);
    plan.folds = 7;
    let refused = message(run(Some(&plan), &path("folds"), false));
    assert!(
        refused.contains("expected at least 7 benign patients"),
        "{refused}"
    );
}

#[test]
fn data_that_changed_are_noticed_before_going_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let classes = |i: usize| {
        if (i / 2).is_multiple_of(2) {
            "benign"
        } else {
            "malignant"
        }
    };
    let source = blobs(&path("source"), 0, 16, classes);
    let target = blobs(&path("target"), 1, 6, |_| "malignant");
    let plan = plan_of(&source, &[&target], &["segmentation"], &[("epochs", "1")]);
    let out = path("out");
    let first = run(Some(&plan), &out, false).unwrap();

    // A target's mask: its results are computed again, nothing else.
    let dice = |studied: &Studied, set: usize| {
        let arm = &studied.statistics.datasets[set].arms["segmentation"];
        arm.metrics.segmentation.as_ref().unwrap().dice.mean
    };
    let before = fs::read(path("target/masks/03.png")).unwrap();
    let mut whole = Gray::zeros(40, 32);
    whole.pixels.fill(255);
    write_png(&path("target/masks/03.png"), &whole).unwrap();
    let second = run(None, &out, true).unwrap();
    assert_ne!(dice(&first, 1), dice(&second, 1));
    let together = |studied: &Studied| {
        let ensemble = &studied.statistics.datasets[1].ensembles["segmentation"];
        ensemble.metrics.segmentation.as_ref().unwrap().dice.mean
    };
    assert_ne!(together(&first), together(&second));
    assert_eq!(dice(&first, 0), dice(&second, 0));
    fs::write(path("target/masks/03.png"), before).unwrap();
    let third = run(None, &out, true).unwrap();
    assert_eq!(third.statistics, first.statistics);

    // The source's mask: another study.
    write_png(&path("source/masks/05.png"), &whole).unwrap();
    let refused = message(run(None, &out, true));
    assert!(
        refused.contains("expected the images that the study began with, found 05.png with other pixels, label or mask"),
        "{refused}"
    );
}

#[test]
fn a_search_goes_on_and_its_choice_is_what_a_study_takes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("search");
    let mut plan = plan(&["multitask", "consistency"], &[("epochs", "1")]);
    plan.targets.clear();
    let grid = [
        ("loss.classification", vec!["0.2", "1"]),
        ("loss.kappa", vec!["3", "1"]),
    ];
    let grid = grid.map(|(k, v)| (k.to_owned(), v.into_iter().map(str::to_owned).collect()));
    let args = |resume| SearchArgs {
        plan: Some(&plan),
        grid: &grid,
        out: &out,
        resume,
        device: None,
    };
    let interrupt = AtomicBool::new(false);
    let stopper = Stopper {
        interrupt: &interrupt,
        epochs: 3,
        seen: AtomicUsize::new(0),
        at_test: false,
    };
    assert!(matches!(
        search(&args(false), &stopper, &interrupt),
        Err(Error::Interrupted)
    ));
    // What it began with is in its folder.
    let bare = SearchArgs {
        plan: None,
        grid: &[],
        ..args(true)
    };
    let searched = search(&bare, &(), &AtomicBool::new(false)).unwrap();
    // 0.2 and 3 are what the preset has: trial 0. κ is nothing to a multi-task arm.
    let tried: Vec<(&str, &str)> = searched
        .trials
        .iter()
        .map(|t| (t.arm.as_str(), t.key.as_str()))
        .collect();
    assert_eq!(
        tried,
        [
            ("multitask", ""),
            ("multitask", "loss.classification"),
            ("consistency", ""),
            ("consistency", "loss.classification"),
            ("consistency", "loss.kappa"),
        ]
    );
    for method in &searched.methods {
        let mut of = searched.trials.iter().filter(|t| t.arm == method.name);
        let best = of.clone().rfind(|t| t.best).unwrap();
        assert!(of.all(|t| t.score <= best.score));
    }
    let overlay = Overlay::read(Some(&out.join("choice.toml")), &[]).unwrap();
    let trials = &overlay.search().unwrap().trials;
    assert_eq!((trials["multitask"], trials["consistency"]), (2, 3));
    for method in &searched.methods {
        let taken = overlay.method(&method.name).unwrap().config;
        assert_eq!(taken.loss, method.config.loss);
        assert_eq!((taken.size, taken.epochs), (32, 1));
    }
    let refused = message(search(&args(false), &(), &AtomicBool::new(false)));
    assert!(refused.contains("already holds a search"), "{refused}");
    // A key that is unknown stops all, though the first method would not use it.
    let unknown = [("loss.kapa".to_owned(), vec!["1".to_owned()])];
    let nowhere = folder.path().join("nowhere");
    let misspelt = SearchArgs {
        grid: &unknown,
        out: &nowhere,
        ..args(false)
    };
    let refused = message(search(&misspelt, &(), &AtomicBool::new(false)));
    assert!(
        refused.ends_with("did you mean loss.kappa?") && !nowhere.exists(),
        "{refused}"
    );
    let other = SearchArgs {
        grid: &grid[..1],
        ..args(true)
    };
    let refused = message(search(&other, &(), &AtomicBool::new(false)));
    assert!(
        refused.contains("expected the command that the search began with"),
        "{refused}"
    );
    // The same plan on other images is another search.
    let mut elsewhere = plan.clone();
    elsewhere.source.clone_from(&data()[1]);
    let moved = SearchArgs {
        plan: Some(&elsewhere),
        ..args(true)
    };
    let refused = message(search(&moved, &(), &AtomicBool::new(false)));
    assert!(
        refused.contains("expected the images that the search began with, found"),
        "{refused}"
    );
}

#[test]
fn runs_are_compared_on_the_images_that_they_share() {
    let runs = ["multitask", "consistency"]
        .map(|arm| whole().join("runs").join(arm).join("fold-0_seed-0"));
    let compared = compare(&runs).unwrap();
    assert_eq!(compared.settings.keys().collect::<Vec<_>>(), ["arm"]);
    let folders: Vec<&String> = compared.results.keys().collect();
    assert_eq!(folders, ["busi-A", "busi-B", "validation"]);
    let target = &compared.results["busi-B"];
    let [comparison] = &target.comparisons[..] else {
        panic!("expected one comparison");
    };
    let rows =
        |run: &Path| -> Vec<PerImage> { read_csv(&run.join("busi-B/per_image.csv")).unwrap() };
    let dice = |run: &Path| -> Vec<f64> { rows(run).iter().filter_map(|row| row.dice).collect() };
    let (a, b) = (dice(&runs[1]), dice(&runs[0]));
    let difference: f64 = a.iter().zip(&b).map(|(a, b)| a - b).sum::<f64>() / a.len() as f64;
    let found = comparison.dice.as_ref().unwrap();
    assert_eq!(found.difference.n, a.len());
    assert!((found.difference.mean - difference).abs() < 1e-12);

    // The same bytes under other names are the same images; other bytes under the same names are not.
    let folder = tempfile::tempdir().unwrap();
    let results = ["images.csv", "per_image.csv"];
    let [renamed, others] = ["renamed", "others"].map(|name| {
        let run = folder.path().join(name);
        fs::create_dir_all(run.join("busi-B")).unwrap();
        fs::copy(runs[1].join("config.toml"), run.join("config.toml")).unwrap();
        for file in results {
            let mut text = fs::read_to_string(runs[1].join("busi-B").join(file)).unwrap();
            match name {
                "renamed" => text = text.replace("benign (", "another ("),
                _ if file == "images.csv" => text = text.replace(",", ",0"),
                _ => {}
            }
            let header = text.replace("image,0sha256", "image,sha256");
            fs::write(run.join("busi-B").join(file), header).unwrap();
        }
        run
    });
    let compared = compare(&[runs[0].clone(), renamed.clone(), others]).unwrap();
    let target = &compared.results["busi-B"];
    let again = target.comparisons[0].dice.as_ref().unwrap();
    assert_eq!(again.difference.n, a.len());
    assert!((again.difference.mean - difference).abs() < 1e-12);
    assert_eq!(target.comparisons.len(), 1);
    assert_eq!(target.not_compared[0].reason, "no images in common");
    fs::remove_file(renamed.join("busi-B/images.csv")).unwrap();
    let compared = compare(&[runs[0].clone(), renamed]).unwrap();
    let [missing] = &compared.results["busi-B"].not_compared[..] else {
        panic!("expected one that cannot be compared");
    };
    assert!(
        missing.reason.ends_with("evaluate again"),
        "{}",
        missing.reason
    );
    let twice = [runs[0].clone(), runs[0].join("../fold-0_seed-0")];
    assert!(message(compare(&twice)).contains("found this one twice"));

    assert!(message(compare(&runs[..1])).contains("expected two runs or more"));
    let nowhere = [runs[0].clone(), whole().join("figures")];
    assert!(message(compare(&nowhere)).contains("found no config.toml in it"));
}

fn two_classes(i: usize) -> &'static str {
    match (i / 2).is_multiple_of(2) {
        true => "benign",
        false => "malignant",
    }
}

#[test]
fn a_target_that_cannot_be_read_costs_no_more_than_itself() {
    /// Damages an image when the first network is to be tested on the target.
    struct Vandal(PathBuf);
    impl Report for Vandal {}
    impl Watch for Vandal {
        fn state(&self, _: &Run, state: &State) {
            if *state == State::Testing("folder-one".to_owned()) {
                fs::write(&self.0, "no image").unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = blobs(&path("source"), 0, 12, two_classes);
    let [one, two] =
        [("one", 1), ("two", 2)].map(|(name, salt)| blobs(&path(name), salt, 4, two_classes));
    let plan = plan_of(
        &source,
        &[&one, &two],
        &["segmentation"],
        &[("epochs", "1")],
    );

    // What can be known before is said before.
    let image = path("one/images/02.png");
    let whole = fs::read(&image).unwrap();
    fs::write(&image, &whole[..whole.len() / 2]).unwrap();
    let refused = message(run(Some(&plan), &path("early"), false));
    assert!(refused.contains("02.png"), "{refused}");
    fs::write(&image, &whole).unwrap();
    let pack = path("one.pack");
    let opened = echograd::data::open(&one).unwrap();
    echograd::data::pack::write(&*opened, 48, &pack, &|| Ok(())).unwrap();
    let pack = format!("pack:{}", pack.display());
    let packed = plan_of(&source, &[&two, &pack], &["segmentation"], &[]);
    let refused = message(run(Some(&packed), &path("early"), false));
    assert!(
        refused
            .contains("expected a pack of size 32, which segmentation has, found one of size 48"),
        "{refused}"
    );
    let again = plan_of(&source, &[&two, &one, &two], &["segmentation"], &[]);
    let refused = message(run(Some(&again), &path("early"), false));
    assert!(
        refused.contains("expected other images than those of"),
        "{refused}"
    );
    assert!(!path("early").exists());

    // What happens after costs what it concerns, and is made up for.
    let out = path("out");
    let args = StudyArgs {
        plan: Some(&plan),
        out: &out,
        resume: false,
        device: None,
    };
    let vandal = Vandal(image.clone());
    let studied = study(&args, &vandal, &AtomicBool::new(false)).unwrap();
    assert!(studied.failed);
    let missing = studied.statistics.not_computed.iter();
    let missing: Vec<&str> = missing
        .map(|m| m.what.as_str())
        .filter(|what| what.ends_with("on folder-one"))
        .collect();
    assert_eq!(
        missing,
        [
            "segmentation fold 0 seed 0 on folder-one",
            "segmentation fold 1 seed 0 on folder-one",
            "segmentation, ensemble on folder-one",
        ]
    );
    let sets = &studied.statistics.datasets;
    assert!(sets[1].arms.is_empty());
    assert_eq!(sets[2].arms["segmentation"].runs, 2);
    fs::write(&image, &whole).unwrap();
    // A killed call leaves such files.
    fs::write(out.join("runs/segmentation/.tmpAb12Cd"), "half").unwrap();
    // And the data have moved.
    let moved = path("moved");
    fs::create_dir(&moved).unwrap();
    let places = ["source", "one", "two"].map(|name| {
        fs::rename(path(name), moved.join(name)).unwrap();
        format!("folder:{}", moved.join(name).display())
    });
    let [source, one, two] = places.each_ref().map(String::as_str);
    let plan = plan_of(source, &[two, one], &["segmentation"], &[("epochs", "1")]);
    let refused = message(run(Some(&plan), &out, true));
    assert!(
        refused.contains("expected the images that the study began with"),
        "{refused}"
    );
    let plan = plan_of(source, &[one, two], &["segmentation"], &[("epochs", "1")]);
    let studied = run(Some(&plan), &out, true).unwrap();
    assert!(!studied.failed);
    assert_eq!(studied.statistics.datasets[1].arms["segmentation"].runs, 2);
    assert!(!out.join("runs/segmentation/.tmpAb12Cd").exists());
}

#[test]
fn what_a_study_went_on_with_is_told_and_remembered() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // Both have patients of the names p0 to p5, or some of them.
    let source = blobs(&path("source"), 0, 12, two_classes);
    let target = blobs(&path("target"), 1, 6, two_classes);
    let plan = plan_of(&source, &[&target], &["segmentation"], &[("epochs", "1")]);
    let out = path("out");
    let (_, lines) = told(Some(&plan), &out, None);
    let shared = format!(
        "3 patients of {target} have names of the source's, \"p0\" first; if they are the same people, leave them out"
    );
    assert!(lines.contains(&shared), "{lines:?}");
    let resumed = |lines: &[String]| -> Vec<String> {
        let of = lines.iter().filter(|line| line.starts_with("resumed by"));
        of.cloned().collect()
    };
    assert!(resumed(&lines).is_empty());
    let manifest = || json(&out.join("manifest.json"));
    let now = manifest();
    assert_eq!(
        (&now["device"], &now["resumed"]),
        (&"cpu".into(), &serde_json::json!([]))
    );
    let means = |program: &Value, instructions: &str| serde_json::json!({"program": program, "instruction_set": instructions, "device": "cpu"});
    let instructions = now["instruction_set"].as_str().unwrap();
    let own = means(&now["program"], instructions);

    // Begun elsewhere, as a file of an earlier version says it.
    let mut elsewhere = now.clone();
    elsewhere["instruction_set"] = "others".into();
    elsewhere["resumed"] =
        serde_json::json!([{"program": "echograd 0.0", "instruction_set": "older"}]);
    fs::write(out.join("manifest.json"), elsewhere.to_string()).unwrap();
    for call in 0..2 {
        let (_, lines) = told(None, &out, None);
        let program = now["program"].as_str().unwrap();
        let expected = format!(
            "resumed by {program} on cpu with {instructions} instructions, before by echograd 0.0 on cpu with older \
             instructions: results may differ in their last bits or more"
        );
        // Said once, since the next call is by the same.
        assert_eq!(
            resumed(&lines),
            if call == 0 { vec![expected] } else { vec![] }
        );
        let found = manifest();
        assert_eq!(found["instruction_set"], "others");
        assert_eq!(
            found["resumed"],
            serde_json::json!([means(&"echograd 0.0".into(), "older"), own])
        );
    }
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("; resumed by echograd 0.0 on cpu with older instructions; resumed by"));
}

#[test]
fn a_study_and_a_search_are_not_moved_to_a_device_that_is_not_there() {
    if echograd::device::gpu::Gpu::cuda().is_ok() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let source = blobs(&folder.path().join("source"), 0, 12, two_classes);
    let target = blobs(&folder.path().join("target"), 1, 6, two_classes);
    let mut plan = plan_of(&source, &[&target], &["segmentation"], &[("epochs", "1")]);
    let out = folder.path().join("study");
    run(Some(&plan), &out, false).unwrap();
    let files = ["study.toml", "manifest.json"].map(|name| out.join(name));
    let before = files.clone().map(|file| fs::read(file).unwrap());
    let args = StudyArgs {
        plan: None,
        out: &out,
        resume: true,
        device: Some(Device::Cuda),
    };
    let refused = message(study(&args, &(), &AtomicBool::new(false)));
    assert!(refused.starts_with("cuda: "), "{refused}");
    assert!(before == files.map(|file| fs::read(file).unwrap()));

    plan.targets.clear();
    let out = folder.path().join("search");
    let args = SearchArgs {
        plan: Some(&plan),
        grid: &[],
        out: &out,
        resume: false,
        device: None,
    };
    search(&args, &(), &AtomicBool::new(false)).unwrap();
    let before = fs::read(out.join("search.json")).unwrap();
    let args = SearchArgs {
        plan: None,
        resume: true,
        device: Some(Device::Cuda),
        ..args
    };
    let refused = message(search(&args, &(), &AtomicBool::new(false)));
    assert!(refused.starts_with("cuda: "), "{refused}");
    assert!(before == fs::read(out.join("search.json")).unwrap());
}

#[test]
#[cfg(echograd_emulator)]
fn a_study_and_a_search_go_on_elsewhere_and_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = blobs(&path("source"), 0, 12, two_classes);
    let target = blobs(&path("target"), 1, 2, two_classes);
    let small = [("epochs", "1"), ("size", "16"), ("model.widths", "[3, 5]")];
    let mut plan = plan_of(&source, &[&target], &["segmentation"], &small);
    let out = path("study");
    let interrupt = AtomicBool::new(false);
    let stopper = Stopper {
        interrupt: &interrupt,
        epochs: 1,
        seen: AtomicUsize::new(0),
        at_test: true,
    };
    let args = StudyArgs {
        plan: Some(&plan),
        out: &out,
        resume: false,
        device: None,
    };
    assert!(matches!(
        study(&args, &stopper, &interrupt),
        Err(Error::Interrupted)
    ));
    let (_, lines) = told(None, &out, Some(Device::Emulator));
    let said = |lines: &[String], now: &str, before: &str| {
        let of = lines.iter().filter(|line| line.starts_with("resumed by"));
        let of: Vec<&String> = of.collect();
        assert_eq!(of.len(), 1, "{lines:?}");
        assert!(
            of[0].contains(&format!("on {now} with"))
                && of[0].contains(&format!("on {before} with")),
            "{of:?}"
        );
    };
    said(&lines, "emulator", "cpu");
    let device = |fold: usize| {
        let run = out.join(format!(
            "runs/segmentation/fold-{fold}_seed-0/manifest.json"
        ));
        json(&run)["device"].clone()
    };
    assert_eq!(device(0), "cpu");
    assert_ne!(device(1), "cpu", "the second run is trained after the move");
    // From now on it is there, until it is said otherwise, if only by the command that it began with.
    let (studied, lines) = told(None, &out, None);
    assert!(
        !lines.iter().any(|line| line.starts_with("resumed by")),
        "{lines:?}"
    );
    assert_eq!(studied.plan.methods[0].config.device, Device::Emulator);
    let (studied, lines) = told(Some(&plan), &out, None);
    said(&lines, "cpu", "emulator");
    assert_eq!(studied.plan.methods[0].config.device, Device::Cpu);
    let devices = json(&out.join("manifest.json"))["resumed"].clone();
    let devices: Vec<&Value> = devices
        .as_array()
        .unwrap()
        .iter()
        .map(|means| &means["device"])
        .collect();
    assert_eq!(devices, ["emulator", "cpu"]);

    plan.targets.clear();
    let out = path("search");
    let go = |plan: Option<&Protocol>, resume: bool, device: Option<Device>| {
        let lines = Lines::default();
        let (grid, out) = (&[], &*out);
        let args = SearchArgs {
            plan,
            grid,
            out,
            resume,
            device,
        };
        search(&args, &lines, &AtomicBool::new(false)).unwrap();
        let lines = lines.0.into_inner().unwrap();
        lines
            .into_iter()
            .filter(|line| line.starts_with("resumed on"))
            .collect::<Vec<_>>()
    };
    assert!(go(Some(&plan), false, None).is_empty());
    let what = "results may differ in their last bits or more";
    assert_eq!(
        go(None, true, Some(Device::Emulator)),
        [format!("resumed on emulator, before on cpu: {what}")]
    );
    assert!(go(None, true, None).is_empty());
    assert_eq!(
        go(Some(&plan), true, None),
        [format!("resumed on cpu, before on emulator: {what}")]
    );
}

#[test]
fn a_ramp_that_is_longer_than_the_training_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = blobs(&path("source"), 0, 12, two_classes);
    let target = blobs(&path("target"), 1, 2, |_| "benign");
    for (start, length, expected) in [
        (
            "2",
            "0",
            Some("never counts, since loss.ramp_start is 2 and epochs is 2"),
        ),
        (
            "1",
            "4",
            Some(
                "never has its full weight, since loss.ramp_start and loss.ramp_epochs make 5 and epochs is 2",
            ),
        ),
        ("1", "1", None),
    ] {
        let ramp = [("loss.ramp_start", start), ("loss.ramp_epochs", length)];
        let plan = plan_of(&source, &[&target], &["consistency"], &ramp);
        let (_, lines) = told(Some(&plan), &path(&format!("{start}-{length}")), None);
        let said: Vec<&String> = lines
            .iter()
            .filter(|line| line.starts_with("consistency: the "))
            .collect();
        let expected = expected.map(|what| format!("consistency: the consistency term {what}"));
        assert_eq!(said, expected.iter().collect::<Vec<_>>());
    }
}

#[test]
fn what_every_run_has_its_own_of_is_no_setting() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.toml");
    for (key, value, flag) in [
        ("data", "busi:elsewhere", "--source"),
        ("arm", "multitask", "--arms"),
        ("folds", "3", "--folds"),
        ("fold", "1", "--folds"),
        ("seed", "7", "--seed"),
    ] {
        let text = match value.parse::<u64>() {
            Ok(number) => format!("{key} = {number}\n"),
            Err(_) => format!("{key} = {value:?}\n"),
        };
        fs::write(&file, text).unwrap();
        let given = [(key.to_owned(), value.to_owned())];
        let own = "expected a setting that all runs share, found one that each has its own of; use";
        let refused = message(Overlay::read(Some(&file), &[]));
        assert!(
            refused.contains(&format!("mine.toml: {key}: {own} {flag}")),
            "{refused}"
        );
        let refused = message(Overlay::read(None, &given));
        assert!(
            refused.starts_with(&format!("{key}: {own} {flag}")),
            "{refused}"
        );
        // Nor can a search choose it, or anything else that decides what is tested.
        let mut plan = plan(&["multitask"], &[]);
        plan.targets.clear();
        for key in [key, "fold_seed", "drop_duplicates", "device"] {
            let grid = [(key.to_owned(), vec!["1".to_owned()])];
            let args = SearchArgs {
                plan: Some(&plan),
                grid: &grid,
                out: &folder.path().join("search"),
                resume: false,
                device: None,
            };
            let refused = message(search(&args, &(), &AtomicBool::new(false)));
            assert!(
                refused.starts_with(&format!("--grid {key}: expected a setting to choose")),
                "{refused}"
            );
        }
    }
    assert!(!folder.path().join("search").exists());
}

#[test]
fn methods_have_names_of_folders_and_share_what_a_comparison_needs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("study.toml");
    for name in ["../x", "a/b", ".x", "", "a b"] {
        fs::write(&file, format!("[methods.{name:?}]\narm = \"multitask\"\n")).unwrap();
        let overlay = Overlay::read(Some(&file), &[]).unwrap();
        let refused = message(overlay.method(name));
        assert!(
            refused.contains("expected the name of a method"),
            "{refused}"
        );
    }
    for shared in [
        "fold_seed = 3",
        "device = \"cpu\"",
        "drop_duplicates = true",
        "seed = 1",
        "folds = 3",
    ] {
        let text = format!("[methods.mine]\narm = \"multitask\"\n{shared}\n");
        fs::write(&file, text).unwrap();
        let refused = message(Overlay::read(Some(&file), &[]));
        let key = shared.split_once(' ').unwrap().0;
        assert!(
            refused.contains(&format!("methods.mine.{key}: expected")),
            "{refused}"
        );
    }
}

#[test]
fn a_network_to_start_from_must_not_have_seen_the_images() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let source = blobs(&path("source"), 0, 12, two_classes);
    let [unseen, other] =
        [("unseen", 1), ("other", 2)].map(|(name, salt)| blobs(&path(name), salt, 8, two_classes));
    let before = plan_of(&other, &[&unseen], &["segmentation"], &[("epochs", "1")]);
    run(Some(&before), &path("before"), false).unwrap();
    let best = path("before/runs/segmentation/fold-0_seed-0/best.safetensors");
    let init = best.display().to_string();
    let from = |source: &str, target: &str| {
        let settings = [("epochs", "1"), ("init", init.as_str())];
        plan_of(source, &[target], &["segmentation"], &settings)
    };
    let out = path("out");
    for plan in [from(&source, &other), from(&other, &source)] {
        let refused = message(run(Some(&plan), &out, false));
        assert!(
            refused.contains("expected a network that has seen no image of")
                && refused.contains("found 8"),
            "{refused}"
        );
        assert!(!out.exists());
    }
    run(Some(&from(&source, &unseen)), &out, false).unwrap();
    fs::copy(best.with_file_name("config.toml"), &best).unwrap();
    let refused = message(run(None, &out, true));
    assert!(
        refused.contains("expected the file that the study began with, found another"),
        "{refused}"
    );
}

#[test]
fn a_fold_without_a_class_costs_what_classifies() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // One malignant patient among four.
    let label = |i: usize| if i < 2 { "malignant" } else { "benign" };
    let source = blobs(&path("source"), 0, 8, label);
    let target = blobs(&path("target"), 1, 4, two_classes);
    let arms = ["segmentation", "multitask"];
    let plan = plan_of(&source, &[&target], &arms, &[("epochs", "1")]);
    let studied = run(Some(&plan), &path("out"), false).unwrap();
    assert!(!studied.failed);
    let sets = &studied.statistics.datasets;
    assert_eq!(sets[1].arms["segmentation"].runs, 2);
    assert!(!sets[1].arms.contains_key("multitask"));
    let missing = studied.statistics.not_computed.iter();
    let missing = missing.filter(|m| m.what.starts_with("multitask fold"));
    assert_eq!(missing.count(), 2);
}

#[test]
fn all_arms_start_from_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("study");
    // With a rate that changes nothing, the best weights are the first.
    let still = [
        ("epochs", "1"),
        ("optimizer.learning_rate", "0"),
        ("optimizer.ema", "0"),
    ];
    run(Some(&plan(&ARMS, &still)), &out, false).unwrap();
    let weights = |arm: &str| {
        let best = out
            .join("runs")
            .join(arm)
            .join("fold-1_seed-0/best.safetensors");
        let bytes = fs::read(best).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter();
        let values = |data: &[u8]| -> Vec<f32> { bytemuck::pod_collect_to_vec(data) };
        let tensors =
            tensors.filter(|(name, _)| name.ends_with("weight") && !name.contains("adam"));
        let of =
            |(name, view): (String, safetensors::tensor::TensorView)| (name, values(view.data()));
        tensors.map(of).collect::<BTreeMap<_, _>>()
    };
    let all = ARMS.map(weights);
    for (arm, one) in ARMS.iter().zip(&all) {
        for other in &all {
            let shared = one.keys().filter(|name| other.contains_key(*name));
            let shared: Vec<&String> = shared.collect();
            assert!(shared.len() > 2, "{arm}");
            for name in shared {
                assert!(one[name] == other[name], "{arm}: {name}");
            }
        }
    }
}
