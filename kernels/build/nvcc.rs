//! Puts the kernels into the crate: as one fatbin per file where there is an nvcc, else as sources for
//! NVRTC to compile at first use.
//!
//! nvcc is taken from `ECHOGRAD_NVCC` (a path; empty for none), `CUDA_HOME` or `PATH`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// GPUs that get machine code, as far as the compiler knows them; others translate the PTX.
const ARCHITECTURES: [&str; 7] = ["75", "80", "86", "89", "90a", "100", "120"];
const PTX: &str = "80";

pub fn build(sources: &[PathBuf]) {
    for variable in ["ECHOGRAD_NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let compiled = find().and_then(|nvcc| match fatbins(&nvcc, sources, &out) {
        Ok(files) => Some(files),
        Err(problem) => {
            println!(
                "cargo::warning={}: {problem}; the kernels' sources are embedded",
                nvcc.display()
            );
            None
        }
    });
    let mut list = String::from("&[\n");
    for (i, source) in sources.iter().enumerate() {
        let name = source.file_stem().expect("a .cu file").to_string_lossy();
        let code = match &compiled {
            Some(files) => format!("Code::Fatbin(include_bytes!({:?}))", files[i]),
            None => format!("Code::Source(include_str!({source:?}))"),
        };
        writeln!(list, "    Module {{ name: {name:?}, code: {code} }},").expect("a String");
    }
    list.push_str("]\n");
    fs::write(out.join("modules.rs"), list).expect("OUT_DIR is writable");
}

fn find() -> Option<PathBuf> {
    if let Some(path) = env::var_os("ECHOGRAD_NVCC") {
        return (!path.is_empty()).then(|| path.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    home.into_iter()
        .chain(env::split_paths(&path))
        .map(|folder| folder.join(if cfg!(windows) { "nvcc.exe" } else { "nvcc" }))
        .find(|nvcc| nvcc.is_file())
}

/// Compiles each source, all at once.
fn fatbins(nvcc: &Path, sources: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>, String> {
    let known = Command::new(nvcc)
        .arg("--list-gpu-code")
        .output()
        .map_err(|e| e.to_string())?;
    let known = String::from_utf8_lossy(&known.stdout);
    let knows = |arch: &str| {
        let base = format!("sm_{}", arch.trim_end_matches('a'));
        known.lines().any(|line| line.trim() == base)
    };
    let mut children = Vec::new();
    for source in sources {
        let fatbin = out.join(
            source
                .with_extension("fatbin")
                .file_name()
                .expect("a .cu file"),
        );
        let mut command = Command::new(nvcc);
        command
            .args(["-std=c++17", "-O3", "-lineinfo", "-fatbin", "-o"])
            .arg(&fatbin)
            .arg(source);
        for arch in ARCHITECTURES.into_iter().filter(|arch| knows(arch)) {
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
        command.arg(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
        command.stderr(std::process::Stdio::piped());
        children.push((fatbin, command.spawn().map_err(|e| e.to_string())?));
    }
    let mut files = Vec::new();
    for (fatbin, child) in children {
        let output = child.wait_with_output().map_err(|e| e.to_string())?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            let error = message.lines().find(|line| line.contains("error"));
            return Err(error.unwrap_or("failed").to_owned());
        }
        files.push(fatbin);
    }
    Ok(files)
}
