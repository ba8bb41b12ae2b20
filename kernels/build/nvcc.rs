//! Puts the kernels into the crate: as one fatbin per file where there is an nvcc, else as sources for
//! NVRTC to compile at first use.
//!
//! nvcc is taken from `ECHOGRAD_NVCC` (a path; empty for none), `CUDA_HOME` or `PATH`.

#[path = "../../src/device/nvcc.rs"]
mod compiler;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use compiler::Nvcc;

/// GPUs that get machine code, as far as the compiler knows them; others translate the PTX.
const ARCHITECTURES: [&str; 7] = ["75", "80", "86", "89", "90a", "100", "120"];
const PTX: &str = "80";

pub fn build(sources: &[PathBuf], headers: &[PathBuf]) {
    for variable in ["ECHOGRAD_NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let compiled = Nvcc::find().and_then(|nvcc| {
        let compiled = nvcc.and_then(|nvcc| {
            let compiled = fatbins(&nvcc, sources, &out);
            compiled.map_err(|problem| (nvcc.path, problem))
        });
        match compiled {
            Ok(compiled) => Some(compiled),
            Err((path, problem)) => {
                println!(
                    "cargo::warning={}: {problem}; the kernels' sources are embedded",
                    path.display()
                );
                None
            }
        }
    });
    let mut text = String::from("/// All modules, by name.\npub static MODULES: &[Module] = &[\n");
    for (i, source) in sources.iter().enumerate() {
        let name = source.file_stem().expect("a .cu file").to_string_lossy();
        let code = match &compiled {
            Some(compiled) => format!("Code::Fatbin(include_bytes!({:?}))", compiled.files[i]),
            None => format!("Code::Source(include_str!({source:?}))"),
        };
        writeln!(text, "    Module {{ name: {name:?}, code: {code} }},").expect("a String");
    }
    text.push_str(
        "];\n/// What the modules include, by name.\npub static HEADERS: &[(&str, &str)] = &[\n",
    );
    for header in headers {
        let name = header.file_name().expect("a .cuh file").to_string_lossy();
        writeln!(text, "    ({name:?}, include_str!({header:?})),").expect("a String");
    }
    let compiler = compiled.map(|compiled| {
        let (version, known) = (compiled.version, compiled.architectures);
        format!("Compiler {{ version: {version:?}, architectures: &{known:?}, ptx: {PTX:?} }}")
    });
    let compiler = compiler.map_or("None".to_owned(), |compiler| format!("Some({compiler})"));
    writeln!(
        text,
        "];\n/// What compiled the modules, if they are machine code.\n\
         pub static COMPILER: Option<Compiler> = {compiler};"
    )
    .expect("a String");
    fs::write(out.join("modules.rs"), text).expect("OUT_DIR is writable");
}

/// What nvcc made.
struct Compiled {
    files: Vec<PathBuf>,
    version: (u32, u32),
    architectures: Vec<&'static str>,
}

/// Compiles each source, all at once.
fn fatbins(nvcc: &Nvcc, sources: &[PathBuf], out: &Path) -> Result<Compiled, String> {
    let known = ARCHITECTURES.into_iter().filter(|arch| nvcc.knows(arch));
    let architectures: Vec<&str> = known.collect();
    let mut children = Vec::new();
    for source in sources {
        let fatbin = out.join(
            source
                .with_extension("fatbin")
                .file_name()
                .expect("a .cu file"),
        );
        let mut command = Command::new(&nvcc.path);
        // Machine code is compressed only if asked: to a quarter.
        command
            .args(["-std=c++17", "-O3", "-lineinfo", "-fatbin"])
            .args(["-Xfatbin", "-compress-all", "-o"])
            .arg(&fatbin)
            .arg(source);
        for arch in &architectures {
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
    Ok(Compiled {
        files,
        version: nvcc.version,
        architectures,
    })
}
