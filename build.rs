//! Turns the environment variable `ECHOGRAD_DATA` (the folder that holds real data sets) into
//! `cfg(echograd_data)`, so that tests on real data show as ignored where there is none.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=ECHOGRAD_DATA");
    println!("cargo::rustc-check-cfg=cfg(echograd_data)");
    if std::env::var_os("ECHOGRAD_DATA").is_some_and(|folder| !folder.is_empty()) {
        println!("cargo::rustc-cfg=echograd_data");
    }
}
