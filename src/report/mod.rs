//! Self-contained HTML pages: text, tables, curves as SVG, images embedded as PNG. Nothing is
//! fetched when one is opened, so a page can be mailed or kept.

pub mod number;
pub mod plot;

use std::fmt::Write as _;

use crate::data::image::Gray;
use crate::error::{Error, Result};
use crate::metrics::Mask;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use plot::{Axis, Plot, escape};

/// Readable on a phone, on paper, in the light and in the dark.
const STYLE: &str = "
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 44rem; }
ul { padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
.caption { color: var(--soft); margin: 1rem 0 .2rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; position: sticky; left: 0; background: var(--paper); }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 44rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem 1.5rem; }
.plots figure { margin: 0; max-width: 40rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; height: auto; display: block; border-radius: 4px; background: #000; }
code { font-size: .9em; }
@media (max-width: 30rem) { body { padding: 1rem; } th, td { padding-right: .6rem; font-size: .9rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 7.5pt; } th, td { padding-right: .5rem; } .plots { grid-template-columns: repeat(2, 1fr); } .gallery { grid-template-columns: repeat(3, 1fr); } .scroll { overflow: visible; } figure, .scroll, tr { break-inside: avoid; } h2, h2 + p, .caption { break-after: avoid; } }
";

/// Letters of a table's heading that take no more room than numbers do.
const NARROW: usize = 8;

/// A page in the making; [`Page::finish`] gives the HTML.
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with its title as heading.
    pub fn new(title: &str) -> Self {
        Self {
            title: escape(title),
            body: String::new(),
        }
    }

    /// A section heading.
    pub fn section(&mut self, heading: &str) -> &mut Self {
        self.push(&format!("<h2>{}</h2>", escape(heading)))
    }

    /// A paragraph of plain text.
    pub fn paragraph(&mut self, text: &str) -> &mut Self {
        self.push(&format!("<p>{}</p>", escape(text)))
    }

    /// A table, if it has rows; the first column is left-aligned, the others hold numbers.
    pub fn table(&mut self, caption: &str, head: &[&str], rows: &[Vec<String>]) -> &mut Self {
        let row = |cells: Vec<String>, tag: &str| {
            let cells: String = cells
                .iter()
                .map(|c| format!("<{tag}>{c}</{tag}>"))
                .collect();
            format!("<tr>{cells}</tr>")
        };
        let head = row(head.iter().map(|c| in_two_lines(c)).collect(), "th");
        let rows: Vec<String> = rows
            .iter()
            .map(|r| row(r.iter().map(|c| escape(c)).collect(), "td"))
            .collect();
        if rows.is_empty() {
            return self;
        }
        self.push(&format!(
            "<p class=\"caption\">{}</p><div class=\"scroll\"><table><thead>{head}</thead><tbody>{}</tbody></table></div>",
            escape(caption),
            rows.join("\n")
        ))
    }

    /// A figure from SVG text, as [`curves`] makes it.
    pub fn figure(&mut self, svg: &str, caption: &str) -> &mut Self {
        self.push(&format!(
            "<figure>{svg}<figcaption>{}</figcaption></figure>",
            escape(caption)
        ))
    }

    /// A list of plain texts.
    pub fn list(&mut self, items: &[String]) -> &mut Self {
        let item = |text: &String| format!("<li>{}</li>", escape(text));
        let items: String = items.iter().map(item).collect();
        self.push(&format!("<ul>{items}</ul>"))
    }

    /// Figures beside each other where there is room, each SVG text with its caption.
    pub fn plots(&mut self, plots: &[(String, String)]) -> &mut Self {
        self.push("<div class=\"plots\">");
        for (svg, caption) in plots {
            self.figure(svg, caption);
        }
        self.push("</div>")
    }

    /// Images side by side, each PNG bytes with its caption.
    pub fn gallery(&mut self, images: &[(Vec<u8>, String)]) -> &mut Self {
        let mut html = String::from("<div class=\"gallery\">");
        for (png, caption) in images {
            let (data, caption) = (STANDARD.encode(png), escape(caption));
            let _ = write!(
                html,
                "<figure><img alt=\"{caption}\" src=\"data:image/png;base64,{data}\"><figcaption>{caption}</figcaption></figure>"
            );
        }
        html.push_str("</div>");
        self.push(&html)
    }

    /// The whole document.
    pub fn finish(&self) -> String {
        let Self { title, body } = self;
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>{}{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n",
            plot::style()
        )
    }

    fn push(&mut self, html: &str) -> &mut Self {
        self.body.push_str(html);
        self.body.push('\n');
        self
    }
}

/// A heading of a table as HTML, broken once where that makes it narrowest: its column is as wide as its numbers then, and
/// no narrower.
fn in_two_lines(text: &str) -> String {
    let width = |text: &str| text.chars().count();
    if width(text) <= NARROW {
        return escape(text);
    }
    let breaks = text.match_indices(' ');
    let halves = breaks.map(|(at, space)| (&text[..at], &text[at + space.len()..]));
    let narrowest = halves.min_by_key(|(first, second)| width(first).max(width(second)));
    narrowest.map_or_else(
        || escape(text),
        |(first, second)| format!("{}<br>{}", escape(first), escape(second)),
    )
}

/// A named line of a plot: points (x, y); non-finite ones are left out.
#[derive(Clone, Debug)]
pub struct Series {
    /// Text of the legend.
    pub name: String,
    /// Points in order of x.
    pub points: Vec<(f64, f64)>,
}

/// Line plot as SVG text; axes fit the data.
///
/// # Errors
/// [`Error::Argument`] if there is not a single finite point.
pub fn curves(x_label: &str, y_label: &str, series: &[Series]) -> Result<String> {
    let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
    let points = || {
        let points = series.iter().flat_map(|s| s.points.iter().copied());
        points.filter(finite)
    };
    let x = Axis::around(x_label, points().map(|p| p.0));
    let y = Axis::around(y_label, points().map(|p| p.1));
    let (Some(x), Some(y)) = (x, y) else {
        let problem = format!("no finite points for {y_label}");
        return Err(Error::argument("plot", problem));
    };
    let mut plot = Plot::new(x, y);
    for (colour, line) in series.iter().enumerate() {
        plot.name(colour, &line.name).line(colour, &line.points);
    }
    Ok(plot.finish(&format!("{y_label} by {x_label}")))
}

/// Colour of a predicted outline.
pub const PREDICTION: [u8; 3] = [255, 221, 0];
/// Colour of a true outline.
pub const TRUTH: [u8; 3] = [64, 200, 255];

/// The image with outlines of masks of its size drawn over it, later ones on top, as
/// `height × width × 3` bytes. Lines grow with the image, a pixel for every 800 of its longer side, so
/// that they stay visible where it is shown.
pub fn overlay(image: &Gray, outlines: &[(&Mask, [u8; 3])]) -> Vec<u8> {
    let (width, height) = (image.width, image.height);
    let reach = width.max(height).div_ceil(800);
    let mut rgb: Vec<u8> = image.pixels.iter().flat_map(|&v| [v; 3]).collect();
    for (mask, colour) in outlines {
        let surface = mask.surface();
        for (i, _) in surface
            .pixels()
            .iter()
            .enumerate()
            .filter(|(_, line)| **line)
        {
            let (x, y) = (i % width, i / width);
            for y in y..height.min(y + reach) {
                for x in x..width.min(x + reach) {
                    rgb[3 * (y * width + x)..][..3].copy_from_slice(colour);
                }
            }
        }
    }
    rgb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_nothing_is_fetched() {
        let mut page = Page::new("a < b & c");
        page.section("s").paragraph("\"quoted\"").table(
            "t",
            &["x", "y"],
            &[vec!["<i>".into(), "1".into()]],
        );
        page.table(
            "t",
            &["Dice of runs", "|p − φ| less a & b", "HD95 px", "ambiguity"],
            &[vec!["1".into(); 4]],
        );
        page.gallery(&[(vec![1, 2, 3], "caption".into())]);
        let html = page.finish();
        assert!(html.contains("<title>a &lt; b &amp; c</title>"));
        assert!(html.contains("<td>&lt;i&gt;</td>"));
        let head = "<th>Dice<br>of runs</th><th>|p − φ|<br>less a &amp; b</th><th>HD95 px</th><th>ambiguity</th>";
        assert!(html.contains(head), "{html}");
        assert!(html.contains("data:image/png;base64,AQID"));
        assert!(
            !html.contains("http"),
            "a page must not refer to the network"
        );
    }

    #[test]
    fn curves_skip_gaps_and_refuse_nothing_to_draw() {
        let series = |points: &[(f64, f64)]| Series {
            name: "a".into(),
            points: points.to_vec(),
        };
        let svg = curves(
            "epoch",
            "loss",
            &[series(&[(0.0, 1.0), (1.0, f64::NAN), (2.0, 0.5)])],
        )
        .unwrap();
        assert!(svg.contains("<svg") && !svg.contains("NaN"));
        assert!(curves("epoch", "loss", &[series(&[(0.0, f64::NAN)])]).is_err());
        assert!(curves("epoch", "loss", &[series(&[(3.0, 1.0)])]).is_ok());
    }
}
