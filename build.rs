//! What the crate's build can find on the machine decides what it contains; nothing that is missing
//! makes it fail.
//!
//! - `ECHOGRAD_DATA` (the folder that holds real data sets) becomes `cfg(echograd_data)`, so that
//!   tests on real data show as ignored where there is none; `ECHOGRAD_NVRTC` (the run-time compiler)
//!   likewise becomes `cfg(echograd_nvrtc)`, and `ECHOGRAD_PYTHON` (a Python with the packages safetensors and
//!   numpy) `cfg(echograd_python)`.
//! - With `--features emulator` and a C++ compiler, the CUDA kernels are built for the CPU and
//!   `cfg(echograd_emulator)` is set.
//! - With `--features cuda` they are embedded for the GPU: compiled if there is an nvcc, else as
//!   sources.

#[cfg(feature = "emulator")]
#[path = "kernels/build/emulator.rs"]
mod emulator;
#[cfg(feature = "cuda")]
#[path = "kernels/build/nvcc.rs"]
mod nvcc;

/// The files of some folders that end in `.extension`, sorted.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn files(folders: &[&str], extension: &str) -> Vec<std::path::PathBuf> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo");
    let root = std::path::Path::new(&root);
    let mut files: Vec<_> = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(root.join(folder)).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels/build");
    for (variable, cfg) in [
        ("ECHOGRAD_DATA", "echograd_data"),
        ("ECHOGRAD_NVRTC", "echograd_nvrtc"),
        ("ECHOGRAD_PYTHON", "echograd_python"),
    ] {
        println!("cargo::rerun-if-env-changed={variable}");
        println!("cargo::rustc-check-cfg=cfg({cfg})");
        if std::env::var_os(variable).is_some_and(|value| !value.is_empty()) {
            println!("cargo::rustc-cfg={cfg}");
        }
    }
    println!("cargo::rustc-check-cfg=cfg(echograd_emulator)");
    println!("cargo::rustc-check-cfg=cfg(echograd_emulator_clang)");
    println!(
        r#"cargo::rustc-check-cfg=cfg(echograd_emulator_checks, values("own", "address", "thread", "off"))"#
    );
    #[cfg(feature = "emulator")]
    emulator::build(&files(&["kernels", "kernels/selftest"], "cu"));
    #[cfg(feature = "cuda")]
    nvcc::build(&files(&["kernels"], "cu"), &files(&["kernels"], "cuh"));
}
