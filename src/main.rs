//! The `echograd` program: parses the command line, runs one command, turns its outcome into the
//! exit code (0 done, 1 failed, 2 wrong usage, 130 stopped).

use std::process::ExitCode;

use clap::Parser;
use echograd::Error;
use echograd::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            if let Some(Error::Interrupted) = error.downcast_ref() {
                return ExitCode::from(130);
            }
            // A reader that closes the pipe early (`echograd features … | head`) is no failure of ours
            // to talk about.
            let io = error.downcast_ref::<std::io::Error>();
            if io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
                return ExitCode::FAILURE;
            }
            eprintln!("error: {error}");
            error
                .chain()
                .skip(1)
                .for_each(|cause| eprintln!("  {cause}"));
            ExitCode::FAILURE
        }
    }
}
