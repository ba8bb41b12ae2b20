//! The driver's end of the device layer on machines without a GPU: a C library that behaves like the
//! driver (`driver/fake.c`) takes its place. It does all work as late as the real one may, checks every
//! argument, and reports what is not released.
#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use assert_cmd::cargo::cargo_bin;
use echograd::Result;
use echograd::device::cpu::Io;
use echograd::device::gpu::launch::{Argument, Arguments, Full, Grid, Launches, Word};
use echograd::device::gpu::{Gpu, Session};
use echograd::device::{Aside, Backend, Session as _};
use echograd::ops::pointwise::Scale;
use echograd::ops::{Kernel, Op};
use echograd::tape::{Options, Plan, Tape};
use echograd::tensor::{Real, Shape};
use echograd::train::config::{Config, Device, Preset};
use tempfile::TempDir;

/// Folders of libraries, each with a driver of its own.
static LIBRARIES: LazyLock<&Path> = LazyLock::new(|| {
    let root = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/fake_driver"));
    let build = |name: &str, folder: &str, libraries: &[&str], flags: &[&str]| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/driver")
            .join(name);
        let folder = root.join(folder);
        fs::create_dir_all(&folder).unwrap();
        let made = tempfile::Builder::new().tempfile_in(&folder).unwrap();
        let output = Command::new(std::env::var("CC").unwrap_or("cc".into()))
            .args([
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-O1",
                "-shared",
                "-fPIC",
            ])
            .args(["-fvisibility=hidden", "-o"])
            .args([made.path(), &source])
            .args(flags)
            .output()
            .expect("the C compiler that Rust links with");
        assert!(output.status.success(), "{}", text(&output.stderr));
        for library in libraries {
            // Other tests may be using the one before.
            let copy = tempfile::Builder::new().tempfile_in(&folder).unwrap();
            fs::copy(made.path(), copy.path()).unwrap();
            copy.persist(folder.join(library)).unwrap();
        }
    };
    // A real driver would be found by its other name.
    let names = ["libcuda.so.1", "libcuda.so"];
    build("fake.c", "driver", &names, &[]);
    build("fake.c", "old", &names, &["-DWITHOUT_PARAMETERS"]);
    build("fake.c", "crippled", &names, &["-DWITHOUT_GRAPHS"]);
    build("fake_nvrtc.c", "nvrtc", &["libnvrtc.so.13"], &[]);
    // What a machine without a driver may have in its place.
    fs::create_dir_all(root.join("broken")).unwrap();
    for name in names {
        fs::write(root.join("broken").join(name), "no library").unwrap();
    }
    root
});

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("UTF-8")
}

/// A run of a program that finds a fake driver.
struct Run {
    command: Command,
    folder: TempDir,
}

impl Run {
    /// `driver` is one of the folders of [`LIBRARIES`].
    fn new(program: &Path, driver: &str, args: &[&str]) -> Self {
        let root = *LIBRARIES;
        let folder = TempDir::new().unwrap();
        let mut command = Command::new(program);
        for variable in [
            "CUDA_VISIBLE_DEVICES",
            "CUDA_LAUNCH_BLOCKING",
            "ECHOGRAD_GPU",
            "ECHOGRAD_WGMMA",
        ] {
            command.env_remove(variable);
        }
        command
            .args(args)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .env("RUST_BACKTRACE", "1")
            .env("LD_LIBRARY_PATH", root.join(driver))
            .env("ECHOGRAD_NVRTC", root.join("nvrtc"))
            .env("ECHOGRAD_CACHE", folder.path().join("cache"))
            .env("FAKE_REPORT", folder.path().join("report"));
        Self { command, folder }
    }

    fn echograd(driver: &str, args: &[&str]) -> Self {
        Self::new(cargo_bin!("echograd"), driver, args)
    }

    /// This program again, to run one of the tests that need a driver.
    fn inside(test: &str) -> Self {
        let program = std::env::current_exe().unwrap();
        Self::new(&program, "driver", &["--ignored", "--exact", test])
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    fn output(&mut self) -> Output {
        self.command.output().unwrap()
    }

    /// Runs it, and returns the driver's report on how it was used.
    fn passes(mut self) -> String {
        let output = self.output();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{out}\n{err}");
        fs::read_to_string(self.folder.path().join("report")).unwrap()
    }

    /// Holds it to failing with a result that has all of `parts`.
    fn reports(mut self, parts: &[&str]) {
        let output = self.output();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{out}\n{err}");
        assert!(!err.contains("panicked"), "{err}");
        for part in parts {
            assert!(out.contains(part), "no {part:?} in {out}");
        }
    }

    /// Holds it to failing with one line that has all of `parts`, and to releasing everything.
    fn fails(mut self, parts: &[&str]) {
        let output = self.output();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert_eq!(text(&output.stdout), "", "{error}");
        let line = error.strip_suffix('\n').unwrap_or(error);
        assert!(
            line.starts_with("error: ") && !line.contains('\n'),
            "{error}"
        );
        for part in parts {
            assert!(line.contains(part), "no {part:?} in {line:?}");
        }
        let report = fs::read_to_string(self.folder.path().join("report")).unwrap_or_default();
        let launches = |line: &str| line.starts_with("scale_") || line.starts_with("copy_");
        let wrong: Vec<&str> = report.lines().filter(|line| !launches(line)).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

const CHECK: [&str; 7] = [
    "gradcheck",
    "--device",
    "cuda",
    "--op",
    "scale",
    "--cases",
    "3",
];

#[test]
fn operations_run_through_the_driver_and_release_everything() {
    // Compute capability 7.5 has f32 alone.
    for (driver, capability, kernels) in [
        (
            "driver",
            "90",
            &["copy_bf16", "copy_f32", "scale_bf16", "scale_f32"][..],
        ),
        (
            "old",
            "90",
            &["copy_bf16", "copy_f32", "scale_bf16", "scale_f32"],
        ),
        ("driver", "75", &["copy_f32", "scale_f32"]),
    ] {
        let run = Run::echograd(driver, &CHECK).with("FAKE_CAPABILITY", capability);
        let report = run.passes();
        let mut launched: Vec<&str> = report
            .lines()
            .map(|l| l.split(':').next().unwrap())
            .collect();
        launched.sort_unstable();
        assert_eq!(launched, kernels, "{driver}, {capability}: {report}");
    }
}

#[test]
fn each_thing_that_a_machine_lacks_has_its_line() {
    let fails = |driver: &str, variables: &[(&str, &str)], parts: &[&str]| {
        let run = Run::echograd(driver, &CHECK);
        let set = |run: Run, &(name, value): &(&str, &str)| run.with(name, value);
        variables.iter().fold(run, set).fails(parts);
    };
    fails(
        "crippled",
        &[],
        &["cuda: the driver's library has no cuGraphInstantiateWithFlags"],
    );
    fails(
        "driver",
        &[("FAKE_VERSION", "11080")],
        &[
            "cuda: the NVIDIA driver is too old",
            "CUDA 12.0 (525 or newer), found one of CUDA 11.8",
        ],
    );
    fails("driver", &[("FAKE_DEVICES", "0")], &["cuda: no NVIDIA GPU"]);
    fails(
        "driver",
        &[("CUDA_VISIBLE_DEVICES", "")],
        &["cuda: no NVIDIA GPU (CUDA_VISIBLE_DEVICES is \"\")"],
    );
    fails(
        "driver",
        &[("FAKE_INIT", "999")],
        &[
            "cuda: the NVIDIA driver does not start",
            "CUDA_ERROR_UNKNOWN",
        ],
    );
    // An answer that only a driver of the future gives.
    fails(
        "driver",
        &[("FAKE_INIT", "4321")],
        &["does not start: error 4321 of the driver"],
    );
    fails(
        "driver",
        &[("FAKE_CAPABILITY", "61")],
        &["cuda: Imaginary GPU 0 has compute capability 6.1, 7.5 (Turing) or newer is needed"],
    );
    fails(
        "driver",
        &[("FAKE_OPEN", "46")],
        &[
            "cuda: Imaginary GPU 0 cannot be opened",
            "CUDA_ERROR_DEVICE_UNAVAILABLE",
        ],
    );
    Run::echograd("driver", &CHECK)
        .with("FAKE_LOAD", "209")
        .reports(&["CUDA_ERROR_NO_BINARY_FOR_GPU"]);
    for index in ["2", "-1", "first", ""] {
        fails(
            "driver",
            &[("ECHOGRAD_GPU", index), ("FAKE_DEVICES", "2")],
            &[
                "ECHOGRAD_GPU: expected the number of a GPU, 0 to 1, found",
                index,
            ],
        );
    }
    fails(
        "driver",
        &[
            ("ECHOGRAD_GPU", "1"),
            ("FAKE_DEVICES", "2"),
            ("FAKE_CAPABILITY", "70"),
        ],
        &["Imaginary GPU 1 has compute capability 7.0"],
    );
    for value in ["2", "yes"] {
        fails(
            "driver",
            &[("ECHOGRAD_WGMMA", value)],
            &["ECHOGRAD_WGMMA: expected 0 or 1, found", value],
        );
    }
    fails(
        "driver",
        &[("ECHOGRAD_WGMMA", "1"), ("FAKE_CAPABILITY", "80")],
        &["ECHOGRAD_WGMMA: expected a GPU of compute capability 9.0, found Imaginary GPU 0 of 8.0"],
    );
}

#[test]
fn a_library_that_is_none_counts_as_no_driver() {
    // A real driver would be found where this one is not.
    if ["libcuda.so.1", "libcuda.so"].iter().any(|name| {
        // SAFETY: initialisers of a driver have no demands.
        unsafe { libloading::Library::new(*name) }.is_ok()
    }) {
        return;
    }
    Run::echograd("broken", &CHECK).fails(&["cuda: no NVIDIA driver: libcuda.so.1 was not found"]);
}

#[test]
fn a_kernel_that_fails_is_named() {
    let failing = || Run::echograd("driver", &CHECK).with("FAKE_CRASH", "scale_f32");
    failing().reports(&[
        "cuda: a kernel failed",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_LAUNCH_BLOCKING=1",
    ]);
    failing().with("CUDA_LAUNCH_BLOCKING", "1").reports(&[
        "cuda: the kernel scale_f32 failed",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
    ]);
    // Whatever failed before, all that is checked has its line.
    Run::echograd("driver", &["gradcheck", "--device", "cuda", "--cases", "1"])
        .with("FAKE_CRASH", "scale_f32")
        .reports(&["\nscale ", "\nadamw ", "\naugment ", " failed\n"]);
    Run::echograd("driver", &CHECK)
        .with("FAKE_REFUSE", "scale_f32")
        .reports(&[
            "cuda: launching scale_f32",
            "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        ]);
}

#[test]
fn training_opens_the_device_before_anything_else() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("run");
    let args = [
        "train",
        "--data",
        "busi:nowhere",
        "--device",
        "cuda",
        "--out",
    ];
    let args = [&args[..], &[out.to_str().unwrap()]].concat();
    let failing = || Run::echograd("driver", &args);
    failing()
        .with("FAKE_DEVICES", "0")
        .fails(&["cuda: no NVIDIA GPU"]);
    failing().with("FAKE_MEMORY", "50000000").fails(&[
        "cuda: Imaginary GPU 0 is out of memory: ",
        " MiB wanted, 47 MiB free of 47 MiB",
    ]);
    assert!(!out.exists());
}

/// Runs a test of the kind below; returns the driver's report.
fn inside(test: &str) -> String {
    Run::inside(test).passes()
}

#[test]
fn copies_of_any_length_arrive() {
    assert_eq!(inside("copies"), "");
}

#[test]
#[ignore = "run by copies_of_any_length_arrive, with a driver"]
fn copies() {
    let gpu = Gpu::cuda().unwrap();
    let piece = 4 << 20;
    // The last comes back to pieces whose copies wait.
    let sizes = [
        1,
        piece - 1,
        piece,
        piece + 1,
        3 * piece,
        5 * piece + 17,
        17 * piece + 5,
    ];
    let bytes = |seed: usize, len: usize| -> Vec<u8> {
        (0..len)
            .map(|i| (i.wrapping_mul(31) + i / 251 + seed) as u8)
            .collect()
    };
    let memories: Vec<_> = sizes
        .iter()
        .map(|&size| gpu.memory(size + 3).unwrap())
        .collect();
    for (seed, (memory, &size)) in memories.iter().zip(&sizes).enumerate() {
        // The vector is gone as soon as the call returns.
        memory.write(3, &bytes(seed, size)).unwrap();
    }
    for (seed, (memory, &size)) in memories.iter().zip(&sizes).enumerate() {
        let mut found = vec![0xff; size + 3];
        memory.read(0, &mut found).unwrap();
        assert!(found[..3] == [0; 3], "cleared");
        assert!(found[3..] == bytes(seed, size), "{size} bytes");
    }
    let problem = gpu.memory(1 << 40).unwrap_err().to_string();
    assert!(
        problem.contains("out of memory: 1048576 MiB wanted"),
        "{problem}"
    );
    // No harm was done.
    memories[0].write(0, &[1]).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn graphs_replay_what_was_captured() {
    // Two launches run, two timed, two replayed twice.
    assert_eq!(inside("graphs"), "scale_f32: 8\n");
    // The refused capture, then everything as before.
    let report = Run::inside("graphs")
        .with("FAKE_REFUSE", "scale_f32")
        .passes();
    assert_eq!(report, "scale_f32: 8\n");
}

/// `4·x`, in two steps.
fn session(gpu: &Gpu) -> (Session, [echograd::tape::Var; 2]) {
    let mut tape = Tape::new();
    let x = tape.input("x", Shape::new(1, 3, 5, 7));
    let y = tape.push(Scale { factor: 2.0 }, &[x]).unwrap();
    let y = tape.push(Scale { factor: 2.0 }, &[y]).unwrap();
    tape.keep(y);
    let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
    (Session::new(gpu, plan).unwrap(), [x, y])
}

#[test]
#[ignore = "run by graphs_replay_what_was_captured, with a driver"]
fn graphs() {
    let gpu = Gpu::cuda().unwrap();
    let (mut session, [x, y]) = session(&gpu);
    let write = |session: &mut Session, value: f32| session.write(x, &[value; 105]).unwrap();
    let read = |session: &Session| session.read(y).unwrap()[104];
    write(&mut session, 1.0);
    if std::env::var_os("FAKE_REFUSE").is_some() {
        let problem = session.capture().err().expect("refused").to_string();
        assert!(
            problem.contains("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
            "{problem}"
        );
    }
    let graph = session.capture().unwrap();
    assert_eq!(read(&session), 0.0, "captured, not run");
    session.run().unwrap();
    assert_eq!(read(&session), 4.0);
    write(&mut session, 2.0);
    graph.replay().unwrap();
    write(&mut session, 3.0);
    assert_eq!(read(&session), 8.0, "in the order of the calls");
    let times = session.run_timed(|| Ok(())).unwrap();
    assert_eq!((times.len(), times[1].step), (2, 1));
    assert_eq!(read(&session), 12.0);
    let launch = &session.launches()[0];
    assert_eq!(
        (launch.function.registers, launch.function.max_threads),
        (32, 1024)
    );
    assert_eq!(
        gpu.occupancy(launch).unwrap(),
        2048 / launch.grid.threads[0]
    );
    // A graph keeps the memory of its session.
    write(&mut session, 5.0);
    drop(session);
    graph.replay().unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn steps_are_queued_ahead_and_read_late() {
    // Five steps of two launches, of which one is not read.
    assert_eq!(inside("steps"), "scale_f32: 10\n");
}

#[test]
#[ignore = "run by steps_are_queued_ahead_and_read_late, with a driver"]
fn steps() {
    let gpu = Gpu::cuda().unwrap();
    let before = gpu.allocated();
    let (mut session, [x, y]) = session(&gpu);
    assert_eq!(gpu.allocated() - before, session.bytes());
    let mut expected = Vec::new();
    for step in 1..=5u8 {
        let value = f32::from(step);
        session.write(x, &[value; 105]).unwrap();
        session.replay().unwrap();
        session.fetch(y).unwrap();
        expected.push(vec![4.0 * value; 105]);
        if step > 1 {
            assert_eq!(session.fetched().unwrap(), Some(expected.remove(0)));
        }
    }
    drop(session);
    gpu.synchronize().unwrap();
    assert_eq!(gpu.allocated(), before);
}

#[test]
fn what_is_set_aside_is_read_beside_later_work() {
    // Two steps of two launches.
    assert_eq!(inside("aside"), "scale_f32: 4\n");
}

#[test]
#[ignore = "run by what_is_set_aside_is_read_beside_later_work, with a driver"]
fn aside() {
    let gpu = Gpu::cuda().unwrap();
    let (mut session, [x, y]) = session(&gpu);
    let mut aside = Aside::default();
    session.write(x, &[1.0; 105]).unwrap();
    session.replay().unwrap();
    session.set_aside(&mut aside).unwrap();
    let allocated = gpu.allocated();
    session.write(x, &[2.0; 105]).unwrap();
    session.replay().unwrap();
    // Another thread reads; this one may go on.
    let words = std::thread::scope(|scope| scope.spawn(|| aside.take()).join().unwrap()).unwrap();
    let slot = session.plan().slot(x);
    assert_eq!(words.len(), session.plan().persistent());
    assert_eq!(words[slot.offset..][..slot.len], [1.0; 105]);
    assert_eq!(session.read(y).unwrap(), [8.0; 105]);
    session.set_aside(&mut aside).unwrap();
    assert_eq!(gpu.allocated(), allocated, "the same memory again");
    assert_eq!(aside.take().unwrap()[slot.offset], 2.0);
    gpu.synchronize().unwrap();
}

#[test]
fn activations_are_stored_as_the_gpu_can() {
    for capability in ["75", "90"] {
        let run = Run::inside("storage").with("FAKE_CAPABILITY", capability);
        assert_eq!(run.passes(), "");
    }
}

#[test]
#[ignore = "run by activations_are_stored_as_the_gpu_can, with a driver"]
fn storage() {
    let has_bf16 = std::env::var("FAKE_CAPABILITY").unwrap() != "75";
    let backend = Config::preset(Preset::Tiny).backend(Device::Cuda).unwrap();
    assert!(matches!(backend, Backend::Gpu { narrow, .. } if narrow == has_bf16));
}

#[test]
fn shared_memory_beyond_the_usual_is_asked_for() {
    assert_eq!(inside("shared_memory"), "fake_shared: 1\n");
}

#[test]
#[ignore = "run by shared_memory_beyond_the_usual_is_asked_for, with a driver"]
fn shared_memory() {
    let gpu = Gpu::cuda().unwrap();
    let session = |shared: usize, threads: u32| {
        let mut tape = Tape::new();
        let x = tape.input("x", Shape::new(1, 1, 1, 1));
        let y = tape
            .push(
                Wants {
                    shared,
                    threads,
                    with: None,
                },
                &[x],
            )
            .unwrap();
        tape.keep(y);
        let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
        Session::new(&gpu, plan).unwrap()
    };
    let mut fits = session(100_000, 256);
    fits.run().unwrap();
    assert_eq!(
        gpu.occupancy(&fits.launches()[0]).unwrap(),
        233_472 / 101_024
    );
    let problem = session(232_000, 256).run().unwrap_err().to_string();
    let expected = "wants 233024 bytes of shared memory for a block, a block of Imaginary GPU 0 can have 232448";
    assert!(problem.contains(expected), "{problem}");
    let problem = session(0, 2048).run().unwrap_err().to_string();
    assert!(
        problem.contains("a block of 2048 threads, expected at most 1024"),
        "{problem}"
    );
}

#[test]
fn kernels_and_their_parameters_are_compared() {
    assert_eq!(inside("parameters"), "");
}

#[test]
#[ignore = "run by kernels_and_their_parameters_are_compared, with a driver"]
fn parameters() {
    let gpu = Gpu::cuda().unwrap();
    let problem = |with: &'static str| {
        let mut tape = Tape::new();
        let x = tape.input("x", Shape::new(1, 1, 1, 1));
        let op = Wants {
            shared: 0,
            threads: 32,
            with: Some(with),
        };
        let y = tape.push(op, &[x]).unwrap();
        tape.keep(y);
        let plan = Plan::new(&tape, Options::gpu(false)).unwrap();
        Session::new(&gpu, plan).err().expect("refused").to_string()
    };
    let text = problem("copy_f32");
    assert!(
        text.contains("parameters of [8, 8, 8] bytes, arguments of [8]"),
        "{text}"
    );
    let text = problem("nowhere_f32");
    assert!(
        text.contains("nowhere_f32: no kernel of this name in this build"),
        "{text}"
    );
}

/// An operation that launches `fake_shared`, or another kernel with its input alone.
#[derive(Clone, Copy, Debug)]
struct Wants {
    shared: usize,
    threads: u32,
    with: Option<&'static str>,
}

struct Nothing;
// SAFETY: the fake driver's kernel takes and touches nothing.
unsafe impl Arguments for Nothing {
    const KERNEL: &'static str = "fake_shared";
    fn words(&self) -> Vec<Word> {
        Vec::new()
    }
}

struct Copy(Full);
// SAFETY: of the wrong length on purpose; refused before anything is launched.
unsafe impl Arguments for Copy {
    const KERNEL: &'static str = "copy_f32";
    fn words(&self) -> Vec<Word> {
        vec![self.0.word()]
    }
}

struct Nowhere(Full);
// SAFETY: there is no such kernel to be launched.
unsafe impl Arguments for Nowhere {
    const KERNEL: &'static str = "nowhere_f32";
    fn words(&self) -> Vec<Word> {
        vec![self.0.word()]
    }
}

impl<T: Real> Kernel<T> for Wants {
    fn run(&self, _: &mut Io<'_, T>) {}
}

impl Op for Wants {
    fn name(&self) -> &'static str {
        "wants"
    }
    fn outputs(&self, inputs: &[Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0]])
    }
    fn launch(&self, at: &mut Launches<'_>) -> Result<()> {
        let (grid, x) = (Grid::new(1, self.threads), at.input(0));
        match self.with {
            None => at.launch(grid.with_shared(self.shared), &Nothing),
            Some(Copy::KERNEL) => at.launch(grid, &Copy(x.into())),
            Some(_) => at.launch(grid, &Nowhere(x.into())),
        }
    }
}

/// What `doctor --json` says of a machine.
fn doctor(run: Run) -> serde_json::Value {
    let mut run = run;
    let output = run.output();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && err.is_empty(), "{out}\n{err}");
    serde_json::from_str(out).unwrap()
}

#[test]
fn doctor_says_what_is_there_and_what_would_run() {
    let found = doctor(Run::echograd("driver", &["doctor", "--json"]).with("FAKE_DEVICES", "2"));
    assert_eq!(found["driver"]["version"], "13.0");
    assert_eq!(found["gpus"][1]["name"], "Imaginary GPU 1");
    assert_eq!(found["gpus"][0]["mig"], false);
    assert_eq!(found["devices"]["cuda"]["usable"], true, "{found}");
    assert_eq!(found["devices"]["cpu"]["usable"], true);

    let reason = |wgmma: &str| {
        let run = Run::echograd("driver", &["doctor", "--json"]).with("FAKE_CAPABILITY", "90");
        let found = doctor(run.with("ECHOGRAD_WGMMA", wgmma));
        found["devices"]["cuda"]["reason"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert!(reason("1").starts_with("Imaginary GPU 0 with wgmma runs"));
    assert!(reason("0").ends_with("; ECHOGRAD_WGMMA=1 for convolutions by wgmma"));

    let found =
        doctor(Run::echograd("driver", &["doctor", "--json"]).with("FAKE_VERSION", "11040"));
    assert_eq!(found["devices"]["cuda"]["usable"], false);
    let reason = found["devices"]["cuda"]["reason"].as_str().unwrap();
    assert!(reason.contains("driver is too old"), "{reason}");
    assert_eq!(found["gpus"].as_array().unwrap().len(), 0);

    // Its NVRTC is that of CUDA 13.
    let found =
        doctor(Run::echograd("driver", &["doctor", "--json"]).with("FAKE_VERSION", "12040"));
    let problem = found["nvrtc"]["problem"].as_str().unwrap();
    assert!(
        problem.contains("newer than the driver; one of CUDA 12 is needed"),
        "{problem}"
    );
    let found = doctor(Run::echograd("driver", &["doctor", "--json"]).with("FAKE_NVRTC", "11080"));
    let problem = found["nvrtc"]["problem"].as_str().unwrap();
    assert!(
        problem.contains("is of CUDA 11.8, older than 12.1; one of CUDA 13 is needed"),
        "{problem}"
    );

    let mut run = Run::echograd("driver", &["doctor"]).with("ECHOGRAD_EXAMPLE", "a value");
    let output = run.output();
    assert_eq!(output.status.code(), Some(0));
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    for begin in [
        "--device cpu: ",
        "--device cuda: ",
        "--device emulator: ",
        "GPU 0: ",
        "ECHOGRAD_EXAMPLE: ",
    ] {
        assert!(
            lines.iter().any(|line| line.starts_with(begin)),
            "{begin} in {lines:#?}"
        );
    }
    for line in lines {
        // A path cannot be broken.
        assert!(line.chars().count() <= 80 || line.contains('/'), "{line}");
    }
}
