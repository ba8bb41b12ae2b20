//! Builds the unmodified .cu files with the C++ compiler.
//!
//! Kernels are found in preprocessed text, so that macros may make them; each file gets a wrapper
//! that includes it and lists its kernels, and a Rust file names them all.
//!
//! `ECHOGRAD_EMULATOR_SANITIZE` chooses the checking: unset or `own` for the emulator's own,
//! `address` or `thread` for that sanitizer of the compiler, `off` for none.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The instrumentation whose hooks `runtime.cpp` defines.
const CHECKS: &str =
    "-fsanitize=thread,alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero";

/// A kernel found in a source file.
struct Kernel {
    name: String,
    /// The arguments of its `__launch_bounds__`, if any.
    bounds: Option<String>,
}

pub fn build(files: &[PathBuf]) {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=ECHOGRAD_EMULATOR_SANITIZE");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("emulator");
    match compile(&root, files, &out) {
        Ok(names) => {
            fs::write(out.join("kernels.rs"), registry(&names)).expect("OUT_DIR is writable");
            println!("cargo::rustc-cfg=echograd_emulator");
        }
        Err(Problem::NoCompiler(found)) => {
            let problem = format!("not built: a C++20 compiler is needed, and {found}");
            println!("cargo::warning=emulator {problem}");
            println!("cargo::rustc-env=ECHOGRAD_NO_EMULATOR={problem}");
        }
        Err(Problem::Broken(message)) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
        }
    }
}

enum Problem {
    /// Nothing to build with: the crate does without an emulator.
    NoCompiler(String),
    /// A kernel does not compile: somebody's mistake, to be seen.
    Broken(String),
}

fn compile(root: &Path, files: &[PathBuf], out: &Path) -> Result<Vec<String>, Problem> {
    fs::create_dir_all(out).expect("OUT_DIR is writable");
    let shim = root.join("kernels/emulator/emulator.h");
    let mut base = cc::Build::new();
    base.cpp(true)
        .std("c++20")
        .opt_level(2)
        .cargo_warnings(false)
        .flag("-g1")
        .flag("-fno-exceptions")
        .flag("-fno-rtti")
        .flag("-ffp-contract=off")
        .flag("-Wall")
        .flag("-Wextra")
        .flag("-Wno-unknown-pragmas")
        .flag(format!("-ffile-prefix-map={}/=", root.display()))
        .include(root);

    probe(&base, out)?;
    let chosen = env::var("ECHOGRAD_EMULATOR_SANITIZE").unwrap_or_default();
    let chosen = if chosen.is_empty() { "own" } else { &chosen };
    let (checks, define, link) = match chosen {
        "own" => (Some(CHECKS), Some("ECHOGRAD_CHECKED"), None),
        "address" => (
            Some("-fsanitize=address"),
            Some("ECHOGRAD_ADDRESS"),
            Some("asan"),
        ),
        "thread" => (
            Some("-fsanitize=thread"),
            Some("ECHOGRAD_THREAD"),
            Some("tsan"),
        ),
        "off" => (None, None, None),
        other => {
            return Err(Problem::Broken(format!(
                "ECHOGRAD_EMULATOR_SANITIZE: expected own, address, thread or off, found {other}"
            )));
        }
    };

    let mut kernels = base.clone();
    kernels.cargo_warnings(true);
    kernels.flag("-include").flag(&shim);
    if let Some(flag) = checks {
        kernels.flag(flag);
    }
    let mut names = Vec::new();
    let mut sources = Vec::new();
    for source in files {
        let mut scan = base.clone();
        scan.define("ECHOGRAD_SCAN", None)
            .flag("-include")
            .flag(&shim)
            .flag("-xc++")
            .file(source);
        let text = scan
            .try_expand()
            .map_err(|e| Problem::Broken(format!("{}: {e}", source.display())))?;
        let found = scan_kernels(&String::from_utf8_lossy(&text));
        let mut wrapper = format!("#include \"{}\"\n", source.display());
        for kernel in &found {
            let bounds = kernel.bounds.as_deref().unwrap_or("1024");
            writeln!(wrapper, "ECHOGRAD_KERNEL({}, {bounds})", kernel.name).expect("a String");
        }
        let file = out.join(source.with_extension("cpp").file_name().expect("a file"));
        fs::write(&file, wrapper).expect("OUT_DIR is writable");
        sources.push(file);
        names.extend(found.into_iter().map(|kernel| kernel.name));
    }
    kernels.files(&sources);
    let broken = |e: cc::Error| Problem::Broken(e.to_string());
    let objects = kernels.try_compile_intermediates().map_err(broken)?;

    let compiler = base.get_compiler();
    let mut runtime = base;
    if let Some(define) = define {
        runtime.define(define, None);
    }
    runtime
        .cargo_warnings(true)
        .file(root.join("kernels/emulator/runtime.cpp"))
        .objects(objects)
        .try_compile("echograd_emulator")
        .map_err(broken)?;
    println!("cargo::rustc-cfg=echograd_emulator_checks=\"{chosen}\"");
    if compiler.is_like_clang() {
        println!("cargo::rustc-cfg=echograd_emulator_clang");
    }
    if let Some(library) = link {
        link_sanitizer(library, &compiler);
    }
    Ok(names)
}

/// rustc links with -nodefaultlibs, which keeps the compiler from adding a sanitizer's runtime itself.
/// As a shared library it would come after libc, whose functions it replaces, and without its
/// `preinit` object it would begin after the libraries that call them.
fn link_sanitizer(library: &str, compiler: &cc::Tool) {
    let query = format!("-print-file-name=lib{library}_preinit.o");
    if let Ok(answer) = compiler.to_command().arg(query).output() {
        let object = String::from_utf8_lossy(&answer.stdout);
        println!("cargo::rustc-link-arg={}", object.trim());
    }
    println!("cargo::rustc-link-arg=-Wl,--whole-archive,-l:lib{library}.a,--no-whole-archive");
}

/// Compiles one line of C++20, to tell a missing compiler from a broken kernel.
fn probe(base: &cc::Build, out: &Path) -> Result<(), Problem> {
    let file = out.join("probe.cpp");
    fs::write(
        &file,
        "#include <source_location>\nstd::source_location here;\n",
    )
    .expect("OUT_DIR is writable");
    let mut probe = base.clone();
    if cfg!(windows) || env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return Err(Problem::NoCompiler(
            "the emulator runs on Linux only".into(),
        ));
    }
    let program = probe
        .try_get_compiler()
        .map(|compiler| compiler.path().display().to_string())
        .unwrap_or_else(|e| e.to_string());
    probe.file(&file);
    probe
        .try_compile_intermediates()
        .map(|_| ())
        .map_err(|_| Problem::NoCompiler(format!("`{program}` did not compile a line of it")))
}

/// Finds `extern "C" __global__ void [__launch_bounds__(…)] NAME(` in preprocessed text.
fn scan_kernels(text: &str) -> Vec<Kernel> {
    // Line markers may stand between the words of a declaration.
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line, " "])
        .collect();
    let mut kernels = Vec::new();
    for (at, keyword) in text.match_indices("__global__") {
        let mut rest = text[at + keyword.len()..].trim_start();
        rest = rest.strip_prefix("void").unwrap_or(rest).trim_start();
        let mut bounds = None;
        if let Some(after) = rest.strip_prefix("__launch_bounds__") {
            let after = after.trim_start();
            let end = closing(after);
            bounds = Some(after[1..end].trim().to_owned());
            rest = after[end + 1..].trim_start();
        }
        let end = rest.find('(').unwrap_or(0);
        let name = rest[..end].trim();
        if !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            kernels.push(Kernel {
                name: name.to_owned(),
                bounds,
            });
        }
    }
    kernels
}

/// The index of the bracket that closes the one `text` begins with.
fn closing(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    text.len() - 1
}

/// The Rust side of the list.
fn registry(names: &[String]) -> String {
    let mut text = String::from("unsafe extern \"C\" {\n");
    for name in names {
        writeln!(text, "    static echograd_kernel_{name}: Entry;").expect("a String");
    }
    writeln!(
        text,
        "}}\n\nfn entries() -> [&'static Entry; {}] {{",
        names.len()
    )
    .expect("a String");
    text.push_str("    // SAFETY: constants of the archive that the same build made.\n    unsafe {\n        [\n");
    for name in names {
        writeln!(text, "            &echograd_kernel_{name},").expect("a String");
    }
    text.push_str("        ]\n    }\n}\n");
    text
}
