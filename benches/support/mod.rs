//! What benchmarks of whole networks share.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use echograd::device::cpu::Session;

/// Prints milliseconds, calls, GFLOP/s and GB/s of each operation; the least of so many replays for each step.
pub fn print_table(session: &mut Session<f32>, replays: usize) {
    let mut least = vec![Duration::MAX; session.plan().steps().len()];
    for _ in 0..replays {
        let mut start = Instant::now();
        session.run_observed(|i| {
            least[i] = least[i].min(start.elapsed());
            start = Instant::now();
        });
    }
    let mut sums: BTreeMap<&str, (Duration, usize, u64, u64)> = BTreeMap::new();
    for (step, &time) in session.plan().steps().iter().zip(&least) {
        let sum = sums.entry(step.op.name()).or_default();
        sum.0 += time;
        sum.1 += 1;
        sum.2 += step.cost.flops;
        sum.3 += step.cost.elements;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.0));
    let total: Duration = least.iter().sum();
    println!(
        "{:<28} {:>5} {:>10} {:>6} {:>9} {:>7}",
        "operation", "calls", "ms", "%", "GFLOP/s", "GB/s"
    );
    for (name, (time, calls, flops, elements)) in sums {
        let seconds = time.as_secs_f64();
        println!(
            "{name:<28} {calls:>5} {:>10.3} {:>6.1} {:>9.1} {:>7.1}",
            seconds * 1e3,
            100.0 * seconds / total.as_secs_f64(),
            flops as f64 / seconds / 1e9,
            4.0 * elements as f64 / seconds / 1e9,
        );
    }
    println!(
        "{:<28} {:>5} {:>10.3}",
        "all",
        least.len(),
        total.as_secs_f64() * 1e3
    );
}
