//! Numbers as people read them, on pages and on a terminal: one way to write each kind of figure. A negative one has the
//! minus sign, U+2212, which is as wide as a plus and breaks no line; files that programs read are written elsewhere.

/// What stands for a figure that is not there.
pub const ABSENT: &str = "–";

/// A number with so many decimals. One that is rounded to zero keeps its sign, which a zero has not.
pub fn fixed(value: f64, decimals: usize) -> String {
    // −0 is 0.
    let value = if value == 0.0 { 0.0 } else { value };
    format!("{value:.decimals$}").replace('-', "\u{2212}")
}

/// A figure with so many decimals.
pub fn rounded(value: Option<f64>, decimals: usize) -> String {
    value.map_or(ABSENT.into(), |value| fixed(value, decimals))
}

/// A figure with three decimals.
pub fn figure(value: Option<f64>) -> String {
    rounded(value, 3)
}

/// A figure with its interval, if it has one.
pub fn interval(value: Option<f64>, ci95: Option<[f64; 2]>) -> String {
    match (value, ci95.map(|ends| ends.map(|end| fixed(end, 3)))) {
        (Some(_), Some([low, high])) => format!("{} ({low} to {high})", figure(value)),
        (value, _) => figure(value),
    }
}

/// A p-value with four decimals; one that these would round to nothing is a bound.
pub fn p_value(p: Option<f64>) -> String {
    match p {
        None => ABSENT.into(),
        Some(p) if p < 1e-4 => "< 0.0001".into(),
        Some(p) => fixed(p, 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_sign_of_a_minus_and_dashes_where_there_are_none() {
        assert_eq!(fixed(-1.25, 1), "\u{2212}1.2");
        assert_eq!(fixed(-0.0, 3), "0.000");
        assert_eq!(fixed(-0.0004, 3), "\u{2212}0.000");
        assert_eq!(figure(None), "–");
        let ends = Some([-0.002, 0.0021]);
        assert_eq!(
            interval(Some(-0.5), ends),
            "\u{2212}0.500 (\u{2212}0.002 to 0.002)"
        );
        assert_eq!(interval(Some(0.5), None), "0.500");
        assert_eq!(interval(None, ends), "–");
        let ps = [None, Some(0.0), Some(9.9e-5), Some(1e-4), Some(0.04996)].map(p_value);
        assert_eq!(ps, ["–", "< 0.0001", "< 0.0001", "0.0001", "0.0500"]);
    }
}
