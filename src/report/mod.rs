//! Self-contained HTML pages: text, tables, curves as SVG, images embedded as PNG. Nothing is
//! fetched when one is opened, so a page can be mailed or kept.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use plotters::prelude::*;

use crate::data::image::Gray;
use crate::error::{Error, Result};
use crate::metrics::Mask;

/// Readable on a phone, on paper, in the light and in the dark.
const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2430; --paper: #ffffff; --line: #d5dae1; --soft: #5c6675; --plot: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181e; --line: #333b46; --soft: #9aa5b4; --plot: #f4f6f8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; font: 1rem/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p { max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
.caption { color: var(--soft); margin: 1rem 0 .2rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; background: var(--plot); border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 44rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; height: auto; display: block; border-radius: 4px; background: #000; }
code { font-size: .9em; }
@media print { body { max-width: none; padding: 0; } .gallery { grid-template-columns: repeat(3, 1fr); } figure { break-inside: avoid; } }
";

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

    /// A table; the first column is left-aligned, the others hold numbers.
    pub fn table(&mut self, caption: &str, head: &[&str], rows: &[Vec<String>]) -> &mut Self {
        let row = |cells: Vec<String>, tag: &str| {
            let cells: String = cells
                .iter()
                .map(|c| format!("<{tag}>{c}</{tag}>"))
                .collect();
            format!("<tr>{cells}</tr>")
        };
        let head = row(head.iter().map(|c| escape(c)).collect(), "th");
        let rows: Vec<String> = rows
            .iter()
            .map(|r| row(r.iter().map(|c| escape(c)).collect(), "td"))
            .collect();
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
             <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
        )
    }

    fn push(&mut self, html: &str) -> &mut Self {
        self.body.push_str(html);
        self.body.push('\n');
        self
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A named line of a plot: points (x, y); non-finite ones are left out.
#[derive(Clone, Debug)]
pub struct Series {
    /// Text of the legend.
    pub name: String,
    /// Points in order of x.
    pub points: Vec<(f64, f64)>,
}

/// Colours that stay apart for readers with colour-vision deficiencies (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(150, 110, 0),
];

/// Line plot as SVG text; axes fit the data.
///
/// # Errors
/// [`Error::Argument`] if there is not a single finite point, or the plot cannot be drawn.
pub fn curves(x_label: &str, y_label: &str, series: &[Series]) -> Result<String> {
    let failed = |problem: String| Error::argument("plot", problem);
    let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
    let points = || {
        series
            .iter()
            .flat_map(|s| s.points.iter().copied().filter(finite))
    };
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
            (a.min(v), b.max(v))
        })
    };
    let (x0, x1) = bounds(&mut points().map(|p| p.0));
    let (y0, y1) = bounds(&mut points().map(|p| p.1));
    if x0 > x1 {
        return Err(failed(format!("no finite points for {y_label}")));
    }
    let margin = ((y1 - y0) * 0.05).max(1e-3);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (860, 340)).into_drawing_area();
        let draw = || -> std::result::Result<(), Box<dyn std::error::Error + '_>> {
            let mut chart = ChartBuilder::on(&area)
                .margin(12)
                .x_label_area_size(42)
                .y_label_area_size(58)
                .build_cartesian_2d(x0..x1.max(x0 + 1e-9), (y0 - margin)..(y1 + margin))?;
            chart
                .configure_mesh()
                .x_desc(x_label)
                .y_desc(y_label)
                .x_label_formatter(&|x| format!("{}", (x * 1e3).round() / 1e3))
                .light_line_style(TRANSPARENT)
                .bold_line_style(BLACK.mix(0.12))
                .label_style(("sans-serif", 15))
                .draw()?;
            for (i, s) in series.iter().enumerate() {
                let colour = COLOURS[i % COLOURS.len()];
                chart
                    .draw_series(LineSeries::new(
                        s.points.iter().copied().filter(finite),
                        colour.stroke_width(2),
                    ))?
                    .label(s.name.clone())
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3))
                    });
            }
            // The legend goes where the lines do not end.
            let ends = || series.iter().filter_map(|s| s.points.last()).map(|p| p.1);
            let high = ends().sum::<f64>() > ends().count() as f64 * (y0 + y1) / 2.0;
            let corner = match high {
                true => SeriesLabelPosition::LowerRight,
                false => SeriesLabelPosition::UpperRight,
            };
            chart
                .configure_series_labels()
                .position(corner)
                .background_style(WHITE.mix(0.85))
                .border_style(BLACK.mix(0.2))
                .label_font(("sans-serif", 15))
                .draw()?;
            area.present()?;
            Ok(())
        };
        draw().map_err(|e| failed(e.to_string()))?;
    }
    Ok(svg)
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
        page.gallery(&[(vec![1, 2, 3], "caption".into())]);
        let html = page.finish();
        assert!(html.contains("<title>a &lt; b &amp; c</title>"));
        assert!(html.contains("<td>&lt;i&gt;</td>"));
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
