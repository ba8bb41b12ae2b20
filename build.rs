//! What the crate's build can find on the machine decides what it contains; nothing that is missing
//! makes it fail.
//!
//! - `ECHOGRAD_DATA` (the folder that holds real data sets) becomes `cfg(echograd_data)`, so that
//!   tests on real data show as ignored where there is none.
//! - With `--features emulator` and a C++ compiler, the CUDA kernels are built for the CPU and
//!   `cfg(echograd_emulator)` is set.

#[cfg(feature = "emulator")]
#[path = "build/emulator.rs"]
mod emulator;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed=ECHOGRAD_DATA");
    println!("cargo::rustc-check-cfg=cfg(echograd_data)");
    if std::env::var_os("ECHOGRAD_DATA").is_some_and(|folder| !folder.is_empty()) {
        println!("cargo::rustc-cfg=echograd_data");
    }
    println!("cargo::rustc-check-cfg=cfg(echograd_emulator)");
    println!(
        r#"cargo::rustc-check-cfg=cfg(echograd_emulator_checks, values("own", "address", "thread", "off"))"#
    );
    #[cfg(feature = "emulator")]
    emulator::build();
}
