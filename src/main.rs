//! The `echograd` program.

fn main() {}
