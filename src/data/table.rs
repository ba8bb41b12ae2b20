//! Tables that describe data sets: the first sheet of an xlsx, or a CSV, with named columns.

use std::fs;
use std::path::{Path, PathBuf};

use calamine::{Data, Reader, Xlsx, open_workbook};

use crate::error::{Error, Result};

/// Rows of text under named columns.
pub(super) struct Table {
    path: PathBuf,
    header: Vec<String>,
    /// Line (or sheet row) number, counted from 1 with the header, and the cells, trimmed.
    rows: Vec<(usize, Vec<String>)>,
}

/// One row of a [`Table`].
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    table: &'a Table,
    line: usize,
    cells: &'a [String],
}

impl Table {
    /// The first sheet of a workbook whose first row names the columns.
    pub fn xlsx(path: &Path) -> Result<Self> {
        let mut rows = first_sheet(path)?;
        if rows.is_empty() {
            return Err(Error::file(path, "expected a table, found an empty sheet"));
        }
        let (_, header) = rows.remove(0);
        Ok(Self {
            path: path.to_owned(),
            header,
            rows,
        })
    }

    /// The first sheet of a workbook whose columns are known by position alone.
    pub fn headless_xlsx(path: &Path, columns: &[&str]) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            header: columns.iter().map(|&c| c.to_owned()).collect(),
            rows: first_sheet(path)?,
        })
    }

    /// A UTF-8 CSV, with or without a byte-order mark, separated by `separator`.
    pub fn csv(path: &Path, separator: u8) -> Result<Self> {
        let text = fs::read_to_string(path)
            .map_err(|e| Error::caused(path, "expected a readable UTF-8 CSV", e))?
            // With CRLF the csv crate counts lines one short.
            .replace("\r\n", "\n");
        let malformed = |e: csv::Error| {
            Error::caused(
                path,
                format!("expected a CSV separated by {:?}", char::from(separator)),
                e,
            )
        };
        // The csv crate skips a byte-order mark itself.
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(separator)
            .trim(csv::Trim::All)
            .from_reader(text.as_bytes());
        let header = reader.headers().map_err(malformed)?;
        let header = header.iter().map(str::to_owned).collect();
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(malformed)?;
            let line = record.position().map_or(0, |p| p.line() as usize);
            rows.push((line, record.iter().map(str::to_owned).collect()));
        }
        Ok(Self {
            path: path.to_owned(),
            header,
            rows,
        })
    }

    /// The position of a column, whatever its case.
    pub fn column(&self, name: &str) -> Result<usize> {
        self.optional(name).ok_or_else(|| {
            Error::file(
                &self.path,
                format!("expected a column {name}, found {}", self.header.join(", ")),
            )
        })
    }

    /// The position of a column that may be missing.
    pub fn optional(&self, name: &str) -> Option<usize> {
        self.header
            .iter()
            .position(|h| h.eq_ignore_ascii_case(name))
    }

    /// All rows in order.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|(line, cells)| Row {
            table: self,
            line: *line,
            cells,
        })
    }
}

/// The rows of the first sheet that are not blank.
fn first_sheet(path: &Path) -> Result<Vec<(usize, Vec<String>)>> {
    let unreadable =
        |e: calamine::XlsxError| Error::caused(path, "expected an xlsx workbook with a sheet", e);
    let mut book: Xlsx<_> = open_workbook(path).map_err(unreadable)?;
    let sheet = match book.worksheet_range_at(0) {
        Some(sheet) => sheet.map_err(unreadable)?,
        None => return Err(Error::file(path, "expected a sheet, found none")),
    };
    let first = sheet.start().map_or(0, |(row, _)| row as usize);
    let text = |cell: &Data| cell.to_string().trim().to_owned();
    Ok(sheet
        .rows()
        .enumerate()
        .map(|(i, row)| (first + i + 1, row.iter().map(text).collect::<Vec<_>>()))
        .filter(|(_, row)| row.iter().any(|cell| !cell.is_empty()))
        .collect())
}

impl<'a> Row<'a> {
    /// The text of a cell; empty if the row is short.
    pub fn get(self, column: usize) -> &'a str {
        self.cells.get(column).map_or("", String::as_str)
    }

    /// The text of a cell, `None` if it is empty.
    pub fn present(self, column: Option<usize>) -> Option<&'a str> {
        column.map(|c| self.get(c)).filter(|text| !text.is_empty())
    }

    /// A cell as what `T` parses from.
    pub fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(self, column: usize) -> Result<T> {
        self.get(column)
            .parse()
            .map_err(|e: T::Err| self.problem(column, e.to_string()))
    }

    /// A cell as a positive length, `None` if it is empty.
    pub fn length(self, column: Option<usize>) -> Result<Option<f64>> {
        let (Some(column), Some(text)) = (column, self.present(column)) else {
            return Ok(None);
        };
        match text.parse::<f64>() {
            Ok(value) if value > 0.0 && value.is_finite() => Ok(Some(value)),
            _ => Err(self.problem(
                column,
                format!("expected a positive number, found {text:?}"),
            )),
        }
    }

    /// An error at this row.
    pub fn problem(self, column: usize, problem: impl std::fmt::Display) -> Error {
        Error::file(
            &self.table.path,
            format!(
                "line {}, {}: {problem}",
                self.line, self.table.header[column]
            ),
        )
    }
}
