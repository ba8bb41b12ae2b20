//! The kernels as they are in this program: machine code if the build found nvcc, else sources.

/// One file of `kernels/`.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its name without `.cu`.
    pub name: &'static str,
    /// What to load.
    pub code: Code,
}

/// What a module is loaded from.
#[derive(Clone, Copy, Debug)]
pub enum Code {
    /// Machine code of several GPU generations, and PTX for those to come, by [`COMPILER`].
    Fatbin(&'static [u8]),
    /// CUDA C++ that includes [`HEADERS`], for NVRTC.
    Source(&'static str),
}

/// The nvcc that compiled the modules.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Compiler {
    /// Its version, `(13, 0)`.
    pub version: (u32, u32),
    /// GPUs that have machine code, `90a` for `sm_90a`.
    pub architectures: &'static [&'static str],
    /// The architecture of the PTX, from which drivers translate for GPUs without machine code.
    pub ptx: &'static str,
}

// MODULES, by name; HEADERS, all kernels/*.cuh with their names; COMPILER, if there was one.
include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// All modules, those that can define the kernel `name` first.
///
/// Names of kernels are made by macros, so a source may hold but the beginning of one: the longer the
/// beginning, the likelier.
pub(crate) fn candidates(name: &str) -> Vec<&'static Module> {
    let mut modules: Vec<&Module> = MODULES.iter().collect();
    modules.sort_by_cached_key(|module| match module.code {
        Code::Fatbin(_) => 0,
        Code::Source(text) => usize::MAX - likeness(text, name),
    });
    modules
}

/// Length of the longest beginning of `name`, up to an underscore or its end, that begins a word of
/// `text`.
fn likeness(text: &str, name: &str) -> usize {
    let ends = name.match_indices('_').map(|(at, _)| at + 1);
    let mut ends: Vec<usize> = ends.chain([name.len()]).collect();
    ends.reverse();
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let begins = |end: usize| {
        text.match_indices(&name[..end])
            .any(|(at, _)| !text[..at].ends_with(is_word))
    };
    ends.into_iter().find(|&end| begins(end)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_sought_where_their_names_are() {
        let text =
            "#define COPY(T, s) extern \"C\" __global__ void copy_##s() {}\nvoid scale_add_f32();";
        assert_eq!(likeness(text, "copy_f32"), "copy_".len());
        assert_eq!(likeness(text, "scale_add_f32"), "scale_add_f32".len());
        assert_eq!(likeness(text, "add_f32"), 0, "not the beginning of a word");
    }

    #[test]
    fn headers_are_named_as_they_are_included() {
        let (name, text) = HEADERS
            .iter()
            .find(|(name, _)| *name == "device.cuh")
            .unwrap();
        assert!(text.contains("#pragma once"), "{name}");
        let names: Vec<&str> = MODULES.iter().map(|module| module.name).collect();
        assert!(
            names.is_sorted() && names.contains(&"pointwise"),
            "{names:?}"
        );
    }
}
