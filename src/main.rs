//! The `echograd` program: parses the command line, runs one command, turns its outcome into the
//! exit code (0 done, 1 failed, 2 wrong usage, 130 stopped).

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use echograd::Error;
use echograd::cli::Cli;

fn main() -> ExitCode {
    #[cfg(unix)]
    ignore_file_size_signal();
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            if let Some(Error::Interrupted) = error.downcast_ref() {
                return ExitCode::from(130);
            }
            // A reader that closes the pipe early (`echograd features … | head`) is no failure of ours
            // to talk about.
            let mut io = error.chain().filter_map(|e| e.downcast_ref::<io::Error>());
            if io.any(|e| e.kind() == io::ErrorKind::BrokenPipe) {
                return ExitCode::FAILURE;
            }
            // If stderr is closed too, there is nobody left to tell.
            let _ = explain(&error);
            ExitCode::FAILURE
        }
    }
}

/// One line, and below it the causes that the line above them does not quote already.
fn explain(error: &anyhow::Error) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    let mut above = error.to_string();
    writeln!(stderr, "error: {above}")?;
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if !above.ends_with(&text) {
            text.lines()
                .try_for_each(|line| writeln!(stderr, "  {line}"))?;
        }
        above = text;
    }
    Ok(())
}

/// Makes the file size limit (`ulimit -f`) an error of the write that meets it, like a full disk, rather
/// than a signal that ends the program without a word.
#[cfg(unix)]
fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
