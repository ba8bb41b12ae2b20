//! `echograd compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::metrics_table;
use crate::report::number::{interval, p_value};
use crate::study::compare::compare;

/// Set runs side by side: settings that differ, results on the same data
///
/// Takes the results in the runs' folders: validation, and those of `evaluate RUN --out RUN/NAME`, by their folders'
/// names. Differences are of each later run to the first, on the images that both have: those of the same bytes.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Folders of runs
    #[arg(value_name = "RUN", required = true, num_args = 2..)]
    runs: Vec<PathBuf>,
    /// Print everything as one JSON document
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Runs the command.
    ///
    /// # Errors
    /// As [`compare`].
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let compared = compare(&self.runs)?;
        if self.json {
            super::print_json(&compared)?;
            return Ok(ExitCode::SUCCESS);
        }
        let number = |i: usize| format!("[{}]", i + 1);
        for (i, run) in compared.runs.iter().enumerate() {
            outln!("{} {run}", number(i));
        }
        for (key, values) in &compared.settings {
            outln!("{key}: {}", values.join(" | "));
        }
        for (folder, results) in &compared.results {
            outln!("\n{folder}");
            let numbers: Vec<String> = (0..compared.runs.len()).map(number).collect();
            let rows: Vec<_> = numbers
                .iter()
                .zip(&results.metrics)
                .filter_map(|(name, metrics)| Some((name.as_str(), metrics.as_ref()?)))
                .collect();
            super::print(format_args!("{}", metrics_table(&rows)))?;
            let pair = |run: &String| {
                let place = compared.runs.iter().position(|other| other == run);
                format!("{} − [1]", number(place.unwrap_or_default()))
            };
            for comparison in &results.comparisons {
                let pair = pair(&comparison.a);
                if let Some(dice) = &comparison.dice {
                    outln!(
                        "{pair}: Dice {}, Wilcoxon p {}, n {} ({} images)",
                        interval(Some(dice.difference.mean), dice.difference.ci95),
                        p_value(Some(dice.wilcoxon.p_value)),
                        dice.difference.clusters,
                        dice.difference.n
                    );
                }
                if let Some(auc) = &comparison.auc {
                    outln!(
                        "{pair}: AUC {}, DeLong p {}",
                        interval(Some(auc.delong.value), auc.ci95),
                        p_value(Some(auc.delong.p_value))
                    );
                }
            }
            for missing in &results.not_compared {
                outln!("{}: {}", pair(&missing.what), missing.reason);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
