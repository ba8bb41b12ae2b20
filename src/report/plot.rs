//! Plots as SVG: small enough to read on a phone, in colours of the page around them, in the light and in the dark,
//! and by [`standalone`] as files of their own.

use std::fmt::Write as _;

use super::number::fixed;

/// Width of a plot in its own units, about those of a phone's screen.
const WIDTH: f64 = 420.0;
/// Height of a plot without its legend.
const HEIGHT: f64 = 290.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 44.0;
/// Height of a line of the legend.
const LEGEND: f64 = 18.0;
/// Width of a letter, roughly.
const LETTER: f64 = 6.4;

/// Number of colours; further ones repeat them.
pub const COLOURS: usize = 6;

/// Names and values of the colours in the light. Data's are those of Okabe and Ito, which stay apart for readers with
/// colour-vision deficiencies.
const LIGHT: [(&str, &str); 10] = [
    ("--ink", "#1c2430"),
    ("--paper", "#ffffff"),
    ("--line", "#d5dae1"),
    ("--soft", "#5c6675"),
    ("--c0", "#0072b2"),
    ("--c1", "#d55e00"),
    ("--c2", "#009e73"),
    ("--c3", "#b8558c"),
    ("--c4", "#3d9bd1"),
    ("--c5", "#8a6d00"),
];

/// The same in the dark.
const DARK: [(&str, &str); 10] = [
    ("--ink", "#e4e8ee"),
    ("--paper", "#14181e"),
    ("--line", "#333b46"),
    ("--soft", "#9aa5b4"),
    ("--c0", "#4aa8e0"),
    ("--c1", "#f08a3c"),
    ("--c2", "#2fc79a"),
    ("--c3", "#e08fbd"),
    ("--c4", "#8ccbf0"),
    ("--c5", "#d0b040"),
];

/// How the parts of a plot look.
const STYLE: &str = "\
.plot text { fill: var(--ink); font: 11.5px system-ui, -apple-system, sans-serif; }
.plot .tick { fill: var(--soft); }
.plot .axis { fill: none; stroke: var(--soft); stroke-width: 1; }
.plot .grid { fill: none; stroke: var(--line); stroke-width: .7; }
.plot .dash { fill: none; stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
.plot .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.plot .dot { stroke: none; fill-opacity: .6; }
.plot .box { fill-opacity: .22; stroke-width: 1.3; }
.plot .band { stroke: none; fill-opacity: .16; }
.plot .s0 { stroke: var(--c0); } .plot .f0 { fill: var(--c0); }
.plot .s1 { stroke: var(--c1); } .plot .f1 { fill: var(--c1); }
.plot .s2 { stroke: var(--c2); } .plot .f2 { fill: var(--c2); }
.plot .s3 { stroke: var(--c3); } .plot .f3 { fill: var(--c3); }
.plot .s4 { stroke: var(--c4); } .plot .f4 { fill: var(--c4); }
.plot .s5 { stroke: var(--c5); } .plot .f5 { fill: var(--c5); }
";

/// The style sheet of a page with plots: colours for the light, the dark and paper.
pub fn style() -> String {
    let of = |colours: &[(&str, &str)]| -> String {
        let each = colours.iter();
        each.map(|(name, value)| format!("{name}: {value}; "))
            .collect()
    };
    format!(
        ":root {{ color-scheme: light dark; {} }}\n\
         @media screen and (prefers-color-scheme: dark) {{ :root {{ {} }} }}\n{STYLE}",
        of(&LIGHT),
        of(&DARK)
    )
}

/// A plot as a file of its own, for a paper: its style inside, every colour by value.
pub fn standalone(svg: &str) -> String {
    let mut style = STYLE.to_owned();
    for (name, value) in LIGHT {
        style = style.replace(&format!("var({name})"), value);
    }
    let background = "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>";
    let namespace = "xmlns=\"http://www.w3.org/2000/svg\"";
    match svg.split_once('>') {
        Some((head, rest)) => {
            format!("{head} {namespace}><style>{style}</style>{background}{rest}\n")
        }
        None => svg.to_owned(),
    }
}

/// A colour of plots, as it is in the dark, for drawing on images.
pub fn rgb(colour: usize) -> [u8; 3] {
    let (_, value) = DARK[4 + colour % COLOURS];
    let value = u32::from_str_radix(&value[1..], 16).unwrap_or_default();
    [value >> 16, value >> 8, value].map(|byte| byte as u8)
}

/// Text as it stands in HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// An axis: its label, its ends, and where its marks are.
#[derive(Clone, Debug)]
pub struct Axis {
    label: String,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From `low` to `high`, with round numbers marked.
    pub fn new(label: &str, low: f64, high: f64) -> Self {
        let high = if high > low {
            high
        } else {
            low + 1e-9 + low.abs() * 1e-6
        };
        // 4 to 8 marks, at 1, 2 or 5 times a power of ten.
        let raw = (high - low) / 5.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|m| m * power)
            .into_iter()
            .find(|step| *step >= raw)
            .unwrap_or(power * 10.0);
        let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
        let first = (low / step).ceil() as i64;
        let ticks = (first..)
            .map(|k| k as f64 * step)
            .take_while(|at| *at <= high + step * 1e-9)
            .map(|at| (at, fixed(at, decimals)))
            .take(20)
            .collect();
        Self {
            label: label.to_owned(),
            low,
            high,
            ticks,
        }
    }

    /// Around the finite ones of `values`, with a little room; `None` if there are none.
    pub fn around(label: &str, values: impl Iterator<Item = f64>) -> Option<Self> {
        let finite = values.filter(|v| v.is_finite());
        let ends = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
            (a.min(v), b.max(v))
        });
        let size = ends.0.abs().max(ends.1.abs());
        let room = ((ends.1 - ends.0) * 0.04).max(size * 1e-3).max(1e-9);
        (ends.0 <= ends.1).then(|| Self::new(label, ends.0 - room, ends.1 + room))
    }

    /// From 0 to 1.
    pub fn unit(label: &str) -> Self {
        Self::new(label, 0.0, 1.0)
    }

    /// Places 0, 1, … with names.
    pub fn places(label: &str, names: &[String]) -> Self {
        let names = names.iter().enumerate();
        let ticks: Vec<_> = names.map(|(i, name)| (i as f64, name.clone())).collect();
        Self {
            label: label.to_owned(),
            low: -0.5,
            high: ticks.len() as f64 - 0.5,
            ticks,
        }
    }

    fn share(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(-0.02, 1.02)
    }
}

/// A plot in the making; [`Plot::finish`] gives the SVG.
#[derive(Clone, Debug)]
pub struct Plot {
    x: Axis,
    y: Axis,
    /// Room for the marks and the label of the vertical axis.
    left: f64,
    body: String,
    legend: Vec<(usize, String)>,
}

impl Plot {
    /// An empty plot.
    pub fn new(x: Axis, y: Axis) -> Self {
        let longest = y.ticks.iter().map(|(_, text)| text.chars().count()).max();
        let label = if y.label.is_empty() { 6.0 } else { 22.0 };
        Self {
            left: label + 6.0 + longest.unwrap_or(0) as f64 * LETTER,
            x,
            y,
            body: String::new(),
            legend: Vec::new(),
        }
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (width, height) = (WIDTH - self.left - RIGHT, HEIGHT - TOP - BOTTOM);
        (
            self.left + self.x.share(x) * width,
            TOP + (1.0 - self.y.share(y)) * height,
        )
    }

    fn path(&self, points: &[(f64, f64)]) -> String {
        let mut path = String::new();
        let finite = points
            .iter()
            .filter(|(x, y)| x.is_finite() && y.is_finite());
        for (i, point) in finite.enumerate() {
            let (x, y) = self.at(*point);
            let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
        }
        path
    }

    /// Names a colour.
    pub fn name(&mut self, colour: usize, name: &str) -> &mut Self {
        self.legend.push((colour, name.to_owned()));
        self
    }

    /// A line through points in order of x; those that are not finite are left out.
    pub fn line(&mut self, colour: usize, points: &[(f64, f64)]) -> &mut Self {
        let path = self.path(points);
        let _ = write!(
            self.body,
            "<path class=\"line s{}\" d=\"{path}\"/>",
            colour % COLOURS
        );
        self
    }

    /// A dashed line for comparison.
    pub fn guide(&mut self, points: &[(f64, f64)]) -> &mut Self {
        let path = self.path(points);
        let _ = write!(self.body, "<path class=\"dash\" d=\"{path}\"/>");
        self
    }

    /// Points with their radius.
    pub fn dots(&mut self, colour: usize, points: &[(f64, f64)], radius: f64) -> &mut Self {
        for point in points
            .iter()
            .filter(|(x, y)| x.is_finite() && y.is_finite())
        {
            let (x, y) = self.at(*point);
            let _ = write!(
                self.body,
                "<circle class=\"dot f{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>",
                colour % COLOURS
            );
        }
        self
    }

    /// A box from quartile to quartile with the median, lines to the 5th and the 95th percentile, and the mean as a
    /// dot, `width` wide around `x`. `values` are the 5th, 25th, 50th, 75th, 95th percentiles and the mean.
    pub fn bar(&mut self, colour: usize, x: f64, width: f64, values: [f64; 6]) -> &mut Self {
        let [p5, q1, median, q3, p95, mean] = values;
        let c = colour % COLOURS;
        let at = |v: f64| self.at((x, v));
        let (left, _) = self.at((x - width / 2.0, q1));
        let (right, _) = self.at((x + width / 2.0, q1));
        let middle = at(median).0;
        let [y5, y1, y2, y3, y95] = [p5, q1, median, q3, p95].map(|v| at(v).1);
        let (mx, my) = at(mean);
        let _ = write!(
            self.body,
            "<path class=\"line s{c}\" d=\"M{middle:.1} {y5:.1}L{middle:.1} {y1:.1}M{middle:.1} {y3:.1}L{middle:.1} {y95:.1}\"/>\
             <rect class=\"box s{c} f{c}\" x=\"{left:.1}\" y=\"{y3:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\
             <path class=\"line s{c}\" d=\"M{left:.1} {y2:.1}L{right:.1} {y2:.1}\"/>\
             <circle class=\"f{c}\" cx=\"{mx:.1}\" cy=\"{my:.1}\" r=\"2.4\"/>",
            right - left,
            (y1 - y3).max(0.5),
        );
        self
    }

    /// A value with its interval, across: `low`, `value`, `high` at height `y`.
    pub fn range(&mut self, colour: usize, y: f64, [low, value, high]: [f64; 3]) -> &mut Self {
        self.line(colour, &[(low, y), (high, y)]);
        self.dots(colour, &[(value, y)], 4.0)
    }

    /// The SVG text, told to those who cannot see it by `about`.
    pub fn finish(&self, about: &str) -> String {
        let rows = self.legend_rows();
        let head = rows.len() as f64 * LEGEND;
        let height = HEIGHT + head;
        let about = escape(about);
        let mut svg = format!(
            "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {height}\" \
             role=\"img\" aria-label=\"{about}\">"
        );
        for (row, entries) in rows.iter().enumerate() {
            let y = 13.0 + row as f64 * LEGEND;
            for (x, colour, name) in entries {
                let _ = write!(
                    svg,
                    "<rect class=\"f{}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\"/>\
                     <text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                    colour % COLOURS,
                    y - 9.0,
                    x + 14.0,
                    escape(name)
                );
            }
        }
        let (x0, y0) = (self.left, HEIGHT - BOTTOM);
        let _ = write!(svg, "<g transform=\"translate(0 {head})\">");
        for (value, text) in &self.y.ticks {
            let (_, y) = self.at((self.x.low, *value));
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{x0} {y:.1}H{}\"/><text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                x0 - 5.0,
                y + 4.0,
                escape(text)
            );
        }
        // Names that would run into each other stand slanted.
        let space = (WIDTH - self.left - RIGHT) / self.x.ticks.len().max(1) as f64;
        let longest = self
            .x
            .ticks
            .iter()
            .map(|(_, text)| text.chars().count())
            .max();
        let slanted = longest.unwrap_or(0) as f64 * LETTER > space;
        for (value, text) in &self.x.ticks {
            let (x, _) = self.at((*value, self.y.low));
            let (y, text) = (y0 + 15.0, escape(text));
            let placed = match slanted {
                true => format!("text-anchor=\"end\" transform=\"rotate(-22 {x:.1} {y})\""),
                false => "text-anchor=\"middle\"".to_owned(),
            };
            let _ = write!(
                svg,
                "<path class=\"axis\" d=\"M{x:.1} {y0}v4\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{y}\" {placed}>{text}</text>"
            );
        }
        let (middle, high) = ((self.left + WIDTH - RIGHT) / 2.0, (TOP + y0) / 2.0);
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{x0} {TOP}V{y0}H{}\"/>{}\
             <text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text x=\"12\" y=\"{high}\" text-anchor=\"middle\" transform=\"rotate(-90 12 {high})\">{}</text></g></svg>",
            WIDTH - RIGHT,
            self.body,
            HEIGHT - 8.0,
            escape(&self.x.label),
            escape(&self.y.label)
        );
        svg
    }

    /// Names and colours in lines that fit the width: x, colour, name.
    fn legend_rows(&self) -> Vec<Vec<(f64, usize, &str)>> {
        let mut rows: Vec<Vec<(f64, usize, &str)>> = Vec::new();
        let mut x = WIDTH;
        for (colour, name) in &self.legend {
            let width = 26.0 + name.chars().count() as f64 * LETTER;
            if x + width > WIDTH {
                rows.push(Vec::new());
                x = self.left;
            }
            if let Some(row) = rows.last_mut() {
                row.push((x, *colour, name));
            }
            x += width;
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_mark_round_numbers() {
        let marks = |low, high| -> Vec<String> {
            let axis = Axis::new("", low, high);
            axis.ticks.into_iter().map(|(_, text)| text).collect()
        };
        assert_eq!(marks(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(
            marks(-0.012, 0.021),
            ["\u{2212}0.01", "0.00", "0.01", "0.02"]
        );
        assert_eq!(marks(1.0, 50.0), ["10", "20", "30", "40", "50"]);
        assert!(!marks(3.0, 3.0).is_empty());
        assert!(Axis::around("", [f64::NAN].into_iter()).is_none());
    }

    #[test]
    fn a_plot_alone_needs_nothing_of_a_page() {
        let mut plot = Plot::new(Axis::unit("x < y"), Axis::unit("y"));
        plot.name(0, "a & b")
            .line(0, &[(0.0, 0.0), (0.5, f64::NAN), (1.0, 1.0)]);
        plot.dots(7, &[(0.5, 0.5)], 2.0);
        let svg = plot.finish("a \"line\"");
        assert!(svg.contains("x &lt; y") && svg.contains("a &amp; b") && !svg.contains("NaN"));
        assert!(svg.contains("f1"), "colours repeat");
        let alone = standalone(&svg);
        assert!(!alone.contains("var(") && alone.contains("#0072b2"));
        assert!(!style().contains("http") && !svg.contains("http"));
        assert_eq!(rgb(0), [0x4a, 0xa8, 0xe0]);
    }
}
