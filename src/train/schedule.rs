//! What changes from step to step: learning rate, ramp of the consistency term, decay of the average.
//! All are functions of the step's number alone, so a resumed run needs no memory of them.

use super::config::{Arm, Config, Schedule};
use crate::ops::control;

/// The control vector of training step `step`, counted from 1, of a run with `per_epoch` steps an
/// epoch.
pub fn control(config: &Config, step: u64, per_epoch: u64) -> [f32; control::LEN] {
    let mut values = [0.0; control::LEN];
    values[control::STEP] = step as f32;
    values[control::LEARNING_RATE] = learning_rate(config, step, per_epoch * config.epochs) as f32;
    values[control::RAMP] = ramp(config, step, per_epoch) as f32;
    values[control::EMA_DECAY] = ema_decay(config.optimizer.ema, step) as f32;
    values
}

/// Rises linearly over the first `warmup` share of all `total` steps, then follows the schedule.
pub fn learning_rate(config: &Config, step: u64, total: u64) -> f64 {
    let optimizer = &config.optimizer;
    let (step, total) = (step as f64, total as f64);
    let warmup = (optimizer.warmup * total).floor();
    let share = if step <= warmup {
        step / warmup
    } else {
        match optimizer.schedule {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let done = (step - warmup) / (total - warmup).max(1.0);
                let wave = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
                optimizer.final_rate + (1.0 - optimizer.final_rate) * wave
            }
        }
    };
    optimizer.learning_rate * share
}

/// 0 for `ramp_start` epochs, then linearly to 1 over `ramp_epochs`.
pub fn ramp(config: &Config, step: u64, per_epoch: u64) -> f64 {
    let epochs = (step - 1) as f64 / per_epoch as f64 - config.loss.ramp_start;
    if config.loss.ramp_epochs == 0.0 {
        f64::from(u8::from(epochs >= 0.0))
    } else {
        (epochs / config.loss.ramp_epochs).clamp(0.0, 1.0)
    }
}

/// Why the consistency term never counts, or never in full: its ramp is longer than the training. `None` if it is not, or
/// if the arm has no such term.
pub fn cut_short(config: &Config) -> Option<String> {
    let (loss, epochs) = (&config.loss, config.epochs);
    let end = loss.ramp_start + loss.ramp_epochs;
    if config.arm != Arm::Consistency || end <= epochs as f64 && loss.ramp_start < epochs as f64 {
        return None;
    }
    Some(match loss.ramp_start >= epochs as f64 {
        true => format!(
            "the consistency term never counts, since loss.ramp_start is {} and epochs is {epochs}",
            loss.ramp_start
        ),
        false => format!(
            "the consistency term never has its full weight, since loss.ramp_start and loss.ramp_epochs make {end} and \
             epochs is {epochs}"
        ),
    })
}

/// The average forgets its random start: the decay rises to `decay` as `(1 + step)/(10 + step)`.
pub fn ema_decay(decay: f64, step: u64) -> f64 {
    let step = step as f64;
    decay.min((1.0 + step) / (10.0 + step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::config::Preset;

    #[test]
    fn a_ramp_is_cut_short_where_it_ends_behind_the_last_epoch() {
        let of = |start: f64, length: f64, arm: Arm| {
            let mut config = Config::preset(Preset::Tiny);
            (config.arm, config.epochs) = (arm, 10);
            (config.loss.ramp_start, config.loss.ramp_epochs) = (start, length);
            cut_short(&config)
        };
        assert_eq!(of(4.0, 6.0, Arm::Consistency), None);
        assert_eq!(of(9.0, 0.0, Arm::Consistency), None);
        assert_eq!(of(20.0, 20.0, Arm::Multitask), None);
        let part = of(4.0, 6.5, Arm::Consistency).unwrap();
        assert!(
            part.contains("never has its full weight") && part.contains("10.5"),
            "{part}"
        );
        for length in [0.0, 5.0] {
            let none = of(10.0, length, Arm::Consistency).unwrap();
            assert!(
                none.contains("never counts, since loss.ramp_start is 10"),
                "{none}"
            );
        }
    }

    #[test]
    fn the_rate_rises_to_its_peak_and_falls_to_its_end() {
        let config = Config::preset(Preset::Tiny);
        let peak = config.optimizer.learning_rate;
        let rate = |step| learning_rate(&config, step, 100);
        assert_eq!(rate(1), peak / 10.0);
        assert_eq!(rate(10), peak);
        assert!((rate(55) - peak * 0.505).abs() < 1e-12);
        assert!((rate(100) - peak * 0.01).abs() < 1e-12);
        assert!((10..100).all(|step| rate(step + 1) < rate(step)));
    }

    #[test]
    fn without_warm_up_the_first_step_is_already_near_the_peak() {
        let mut config = Config::preset(Preset::Tiny);
        config.optimizer.warmup = 0.0;
        let rate = learning_rate(&config, 1, 100) / config.optimizer.learning_rate;
        assert!(rate > 0.999 && rate < 1.0);
        config.optimizer.schedule = Schedule::Constant;
        assert_eq!(
            learning_rate(&config, 100, 100),
            config.optimizer.learning_rate
        );
    }

    #[test]
    fn the_ramp_waits_then_rises() {
        let mut config = Config::preset(Preset::Tiny);
        config.loss.ramp_start = 2.0;
        config.loss.ramp_epochs = 4.0;
        let at = |step| ramp(&config, step, 10);
        assert_eq!(
            [at(1), at(21), at(41), at(61), at(200)],
            [0.0, 0.0, 0.5, 1.0, 1.0]
        );
        config.loss.ramp_epochs = 0.0;
        assert_eq!([ramp(&config, 20, 10), ramp(&config, 21, 10)], [0.0, 1.0]);
    }

    #[test]
    fn the_average_starts_by_following() {
        assert!(ema_decay(0.98, 1) < 0.2);
        assert_eq!(ema_decay(0.98, 1000), 0.98);
    }
}
