//! Opening data sets for a command, with everything left out or doubtful said aloud.

use crate::data::{self, Label, Source};
use crate::error::Result;

/// Opens `NAME:PATH` and reports on stderr what it holds: cases by label, each drop with its reason,
/// exact duplicates by name.
///
/// # Errors
/// As [`data::open`].
pub fn open(spec: &str) -> Result<Box<dyn Source>> {
    let source = data::open(spec)?;
    let cases = source.cases();
    let counts = Label::ALL.map(|label| {
        let n = cases.iter().filter(|case| case.label == label).count();
        format!("{n} {label}")
    });
    note!(
        "{}: {} images ({})",
        source.name(),
        cases.len(),
        counts.join(", ")
    );
    for drop in source.drops() {
        note!("{}: left out {}: {}", source.name(), drop.file, drop.reason);
    }
    for group in data::duplicates(cases) {
        let names: Vec<&str> = group.iter().map(|&i| cases[i].image.as_str()).collect();
        note!("{}: exact duplicates: {}", source.name(), names.join(", "));
    }
    Ok(source)
}
