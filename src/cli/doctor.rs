//! `echograd doctor`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::device::cpu;
use crate::device::gpu::Gpu;
use crate::device::simd::Level;
use crate::train::config::Device;

/// Say what this machine and this build have, and what each --device would do
///
/// One line per finding: processor, NVIDIA driver and GPUs, how this build's CUDA kernels reach a GPU, compilers, data sets,
/// variables. Nothing that is missing is an error.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What is known, or why it is not.
#[derive(Serialize)]
#[serde(untagged)]
enum Finding<T> {
    Found(T),
    Problem { problem: String },
}

impl<T> From<crate::Result<T>> for Finding<T> {
    fn from(result: crate::Result<T>) -> Self {
        match result {
            Ok(found) => Self::Found(found),
            Err(e) => Self::Problem {
                problem: e.to_string(),
            },
        }
    }
}

impl<T> Finding<T> {
    /// As a line's text.
    fn text(&self, found: impl FnOnce(&T) -> String) -> String {
        match self {
            Self::Found(value) => found(value),
            Self::Problem { problem } => problem.strip_prefix("cuda: ").unwrap_or(problem).into(),
        }
    }
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    cpu: Cpu,
    driver: Finding<Driver>,
    gpus: Vec<Value>,
    kernels: Kernels,
    nvcc: Finding<Tool>,
    nvrtc: Finding<Tool>,
    cxx: Finding<Tool>,
    emulator: Usable,
    kernel_cache: Option<PathBuf>,
    data: Vec<String>,
    variables: Map<String, Value>,
    devices: Devices,
}

#[derive(Serialize)]
struct Cpu {
    model: String,
    threads: usize,
    memory: Option<u64>,
    instruction_sets: Vec<&'static str>,
    instruction_set: &'static str,
}

#[derive(Serialize)]
struct Driver {
    /// The CUDA version it serves.
    version: String,
    /// Its own version, where the system tells it.
    release: Option<String>,
}

/// How the kernels are in this build.
#[derive(Serialize)]
struct Kernels {
    form: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    compiler: Option<String>,
    architectures: Vec<String>,
}

#[derive(Serialize)]
struct Tool {
    path: PathBuf,
    version: String,
    /// What it makes for the GPU that would be used, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    architecture: Option<Finding<String>>,
}

#[derive(Serialize)]
struct Usable {
    usable: bool,
    reason: String,
}

#[derive(Serialize)]
struct Devices {
    cpu: Usable,
    cuda: Usable,
    emulator: Usable,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// If the findings cannot be printed.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let report = Report::new();
        if self.json {
            super::print_json(&report)?;
        } else {
            for (what, finding) in report.lines() {
                super::print(format_args!("{}", wrap(&what, &finding)))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Report {
    fn new() -> Self {
        let levels = Level::available().map(Level::name);
        let cpu = Cpu {
            model: processor(),
            threads: rayon::current_num_threads(),
            memory: cpu::memory(),
            instruction_sets: levels.collect(),
            instruction_set: Level::current().name(),
        };
        let variables = env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let ours = name.starts_with("ECHOGRAD_");
            let cuda = ["CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING"];
            let value = value.to_string_lossy().into_owned();
            (ours || cuda.contains(&&*name)).then_some((name, Value::String(value)))
        });
        let mut variables: Vec<(String, Value)> = variables.collect();
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        let machine = Machine::new();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            driver: machine.driver,
            gpus: machine.gpus,
            kernels: machine.kernels,
            nvcc: machine.nvcc,
            nvrtc: machine.nvrtc,
            kernel_cache: machine.cache,
            cxx: cxx(),
            emulator: emulator(),
            data: data(),
            variables: variables.into_iter().collect(),
            devices: Devices {
                cpu: Usable {
                    usable: true,
                    reason: format!(
                        "computes with {} on {} threads",
                        cpu.instruction_set, cpu.threads
                    ),
                },
                cuda: tried(Device::Cuda),
                emulator: tried(Device::Emulator),
            },
            cpu,
        }
    }

    /// What was looked at and what was found.
    fn lines(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let mut line = |what: &str, finding: String| lines.push((what.to_owned(), finding));
        line("echograd", self.version.into());
        let cpu = &self.cpu;
        let memory = cpu
            .memory
            .map(|bytes| format!(", {:.1} GiB of memory", gib(bytes)));
        let threads = cpu.threads;
        line(
            "processor",
            format!(
                "{}, {threads} threads{}",
                cpu.model,
                memory.unwrap_or_default()
            ),
        );
        let sets = cpu.instruction_sets.join(", ");
        line(
            "instruction sets",
            format!("{sets}; {} is used", cpu.instruction_set),
        );
        line(
            "NVIDIA driver",
            self.driver.text(|driver| {
                let release = driver
                    .release
                    .as_ref()
                    .map(|r| format!("{r}, "))
                    .unwrap_or_default();
                format!("{release}CUDA {}", driver.version)
            }),
        );
        for (index, gpu) in self.gpus.iter().enumerate() {
            let number = |key: &str| gpu[key].as_u64().unwrap_or_default();
            let mig = if gpu["mig"] == true {
                ", a part of a GPU (MIG)"
            } else {
                ""
            };
            let finding = format!(
                "{}, compute capability {}.{}, {:.1} GiB, {} multiprocessors{mig}",
                gpu["name"].as_str().unwrap_or_default(),
                gpu["capability"][0],
                gpu["capability"][1],
                gib(number("memory")),
                number("multiprocessors"),
            );
            line(&format!("GPU {index}"), finding);
        }
        let kernels = &self.kernels;
        let compiler = kernels
            .compiler
            .iter()
            .map(|version| format!(" by CUDA {version}"));
        let compiler: String = compiler.collect();
        let form = match kernels.architectures.as_slice() {
            [] => kernels.form.to_owned(),
            known => format!("{}{compiler} for {}", kernels.form, known.join(", ")),
        };
        line("kernels in this build", form);
        for (name, tool) in [
            ("nvcc", &self.nvcc),
            ("NVRTC", &self.nvrtc),
            ("C++ compiler", &self.cxx),
        ] {
            let finding = tool.text(|tool| {
                let makes = tool.architecture.as_ref().map(|a| match a {
                    Finding::Found(a) => format!(", makes {a} for the GPU"),
                    Finding::Problem { problem } => format!(", {problem}"),
                });
                format!(
                    "{}, {}{}",
                    tool.version,
                    tool.path.display(),
                    makes.unwrap_or_default()
                )
            });
            line(name, finding);
        }
        line("emulator", self.emulator.reason.clone());
        let cache = self
            .kernel_cache
            .as_ref()
            .map(|folder| folder.display().to_string());
        line("compiled kernels", cache.unwrap_or("not kept".into()));
        line(
            "data sets",
            match (self.data.is_empty(), env::var_os("ECHOGRAD_DATA")) {
                (false, _) => self.data.join(" "),
                (true, None) => "ECHOGRAD_DATA names no folder to look in".into(),
                (true, Some(_)) => "none known in ECHOGRAD_DATA".into(),
            },
        );
        for (name, value) in &self.variables {
            line(name, format!("{:?}", value.as_str().unwrap_or_default()));
        }
        let devices = &self.devices;
        for (name, usable) in [
            ("cpu", &devices.cpu),
            ("cuda", &devices.cuda),
            ("emulator", &devices.emulator),
        ] {
            let verdict = if usable.usable {
                "runs"
            } else {
                "does not run"
            };
            line(
                &format!("--device {name}"),
                format!("{verdict}: {}", usable.reason),
            );
        }
        lines
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// A finding in lines of at most 80 characters, as far as it has spaces.
fn wrap(what: &str, finding: &str) -> String {
    let mut text = format!("{what}:");
    let mut column = text.chars().count();
    for word in finding.split_whitespace() {
        let width = word.chars().count();
        if column + 1 + width > 80 {
            text += "\n   ";
            column = 3;
        }
        text += " ";
        text += word;
        column += 1 + width;
    }
    text + "\n"
}

/// A value of a file like `/proc/cpuinfo`: `key : value` in lines.
fn field(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = pairs.find(|(name, _)| name.trim() == key)?;
    Some(value.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn processor() -> String {
    field("/proc/cpuinfo", "model name").unwrap_or_else(|| env::consts::ARCH.to_owned())
}

/// The compiler that the emulator would be built with.
fn cxx() -> Finding<Tool> {
    let name = env::var_os("CXX").unwrap_or("c++".into());
    let path = Path::new(&name);
    let answer = Command::new(path).arg("--version").output();
    let Ok(answer) = answer else {
        let problem = format!(
            "none ({}); only the emulator's build needs one",
            path.display()
        );
        return Finding::Problem { problem };
    };
    let text = String::from_utf8_lossy(&answer.stdout);
    Finding::Found(Tool {
        path: path.to_owned(),
        version: text
            .lines()
            .next()
            .unwrap_or("no version")
            .trim()
            .to_owned(),
        architecture: None,
    })
}

fn emulator() -> Usable {
    match Gpu::emulator() {
        Ok(_) => Usable {
            usable: true,
            reason: "in this build".into(),
        },
        Err(e) => Usable {
            usable: false,
            reason: without_name(&e, "emulator"),
        },
    }
}

fn without_name(error: &crate::Error, name: &str) -> String {
    let text = error.to_string();
    let prefix = format!("{name}: ");
    text.strip_prefix(&prefix).unwrap_or(&text).to_owned()
}

/// Opens a device and loads a kernel.
fn tried(device: Device) -> Usable {
    let name = super::name_of(&device);
    let ready = device.open().and_then(|gpu| {
        let gpu = gpu.expect("not the CPU");
        gpu.ready()?;
        let without = gpu.wgmma().is_none() && gpu.lacks_wgmma().is_none();
        let more = ["", "; ECHOGRAD_WGMMA=1 for convolutions by wgmma"][usize::from(without)];
        Ok((gpu.name(), more))
    });
    match ready {
        Ok((name, more)) => Usable {
            usable: true,
            reason: format!(
                "{name} runs the kernels that there are (echograd gradcheck lists them){more}"
            ),
        },
        Err(e) => Usable {
            usable: false,
            reason: without_name(&e, &name),
        },
    }
}

/// Data sets under `ECHOGRAD_DATA`, as `--data` takes them.
fn data() -> Vec<String> {
    let Some(root) = env::var_os("ECHOGRAD_DATA").filter(|root| !root.is_empty()) else {
        return Vec::new();
    };
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut found: Vec<String> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .filter_map(|path| {
            let folder = path.file_name()?.to_string_lossy().to_lowercase();
            let names = [
                ("breast", "breast"),
                ("busi", "busi"),
                ("uclm", "uclm"),
                ("udiat", "udiat"),
                ("bus-bra", "busbra"),
                ("busbra", "busbra"),
            ];
            let (_, name) = names.into_iter().find(|(part, _)| folder.contains(part))?;
            Some(format!("{name}:{}", path.display()))
        })
        .collect();
    found.sort();
    found
}

/// What belongs to NVIDIA GPUs.
struct Machine {
    driver: Finding<Driver>,
    gpus: Vec<Value>,
    kernels: Kernels,
    nvcc: Finding<Tool>,
    nvrtc: Finding<Tool>,
    cache: Option<PathBuf>,
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use crate::device::code::{COMPILER, MODULES};
    use crate::device::gpu::driver::compile::{self, Nvrtc};
    use crate::device::gpu::driver::library;
    use crate::device::nvcc::Nvcc;

    impl Machine {
        pub fn new() -> Self {
            let version = library::version();
            let serves = version.as_ref().ok().copied();
            let gpus = library::list().unwrap_or_default();
            let chosen = library::choose().ok();
            let capability = chosen.map(|gpu| gpu.description.capability);
            Self {
                driver: Finding::from(version.map(|(major, minor)| Driver {
                    version: format!("{major}.{minor}"),
                    release: release(),
                })),
                gpus: gpus.iter().map(|gpu| serde_json::json!(gpu)).collect(),
                kernels: kernels(),
                nvcc: nvcc(capability),
                nvrtc: Finding::from(Nvrtc::find(serves).map(|nvrtc| Tool {
                    version: format!("CUDA {}.{}", nvrtc.version.0, nvrtc.version.1),
                    architecture: capability.map(|c| nvrtc.architecture(c).into()),
                    path: nvrtc.path,
                })),
                cache: compile::cache(),
            }
        }
    }

    /// The version of the kernel's module: the second word that looks like one.
    fn release() -> Option<String> {
        let line = field("/proc/driver/nvidia/version", "NVRM version")?;
        let is_version =
            |word: &&str| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit());
        line.split(' ').find(is_version).map(str::to_owned)
    }

    fn kernels() -> Kernels {
        match COMPILER {
            Some(compiler) => Kernels {
                form: "machine code",
                compiler: Some(format!("{}.{}", compiler.version.0, compiler.version.1)),
                architectures: (compiler.architectures.iter().map(|a| format!("sm_{a}")))
                    .chain([format!("PTX of {}", compiler.ptx)])
                    .collect(),
            },
            None if MODULES.is_empty() => Kernels {
                form: "none",
                compiler: None,
                architectures: Vec::new(),
            },
            None => Kernels {
                form: "sources, which NVRTC compiles at first use",
                compiler: None,
                architectures: Vec::new(),
            },
        }
    }

    fn nvcc(capability: Option<(u32, u32)>) -> Finding<Tool> {
        fn problem<T>(problem: String) -> Finding<T> {
            Finding::Problem { problem }
        }
        match Nvcc::find() {
            None => {
                problem("none in ECHOGRAD_NVCC, CUDA_HOME or PATH; only builds need one".into())
            }
            Some(Err((path, text))) => problem(format!("{}: {text}", path.display())),
            Some(Ok(nvcc)) => {
                let architecture = capability.map(|(major, minor)| {
                    let name = format!("{major}{minor}");
                    match nvcc.knows(&name) {
                        true => Finding::Found(format!("sm_{name}")),
                        false => problem(format!("makes no sm_{name} for the GPU")),
                    }
                });
                Finding::Found(Tool {
                    version: format!("CUDA {}.{}", nvcc.version.0, nvcc.version.1),
                    path: nvcc.path,
                    architecture,
                })
            }
        }
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::*;

    fn unused<T>() -> Finding<T> {
        let problem = "not looked for: this build lacks the feature `cuda`".into();
        Finding::Problem { problem }
    }

    impl Machine {
        pub fn new() -> Self {
            Self {
                driver: unused(),
                gpus: Vec::new(),
                kernels: Kernels {
                    form: "none",
                    compiler: None,
                    architectures: Vec::new(),
                },
                nvcc: unused(),
                nvrtc: unused(),
                cache: None,
            }
        }
    }
}
