//! Tables of figures, for people and as JSON with all that a figure needs to mean something.

use std::fmt;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};

use super::blas;
use super::measure::Effort;

/// What a bench found. All rows have the same columns; a figure is missing where this machine cannot give it.
pub struct Table {
    name: &'static str,
    /// What is compared with what, and units.
    about: &'static str,
    columns: Vec<&'static str>,
    rows: Vec<(String, Vec<Option<f64>>)>,
}

impl Table {
    /// A table without rows.
    pub fn new(name: &'static str, about: &'static str) -> Self {
        Self { name, about, columns: Vec::new(), rows: Vec::new() }
    }

    /// Adds a row: a case and its figures. They also go to stderr at once, for a bench takes its time.
    pub fn row(&mut self, case: String, figures: &[(&'static str, Option<f64>)]) {
        let columns: Vec<&str> = figures.iter().map(|(column, _)| *column).collect();
        if self.rows.is_empty() {
            self.columns.clone_from(&columns);
        }
        assert_eq!(self.columns, columns, "{}: {case}", self.name);
        let texts: Vec<String> = figures.iter().map(|(name, figure)| format!("{name} {}", text_of(*figure))).collect();
        eprintln!("{}: {case}: {}", self.name, texts.join(", "));
        self.rows.push((case, figures.iter().map(|(_, figure)| *figure).collect()));
    }

    fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|(case, figures)| {
            let figures =
                self.columns.iter().zip(figures).map(|(column, figure)| ((*column).to_owned(), json!(figure)));
            Value::Object([("case".to_owned(), json!(case))].into_iter().chain(figures).collect::<Map<_, _>>())
        });
        json!({ "bench": self.name, "about": self.about, "rows": rows.collect::<Vec<_>>() })
    }
}

/// Four significant digits, more where a share is next to 1.
fn text_of(figure: Option<f64>) -> String {
    match figure {
        None => "-".to_owned(),
        Some(x) if x == x.round() && x.abs() < 1e15 => format!("{x:.0}"),
        Some(x) if x.abs() >= 1000.0 => format!("{x:.0}"),
        Some(x) if x.abs() >= 100.0 => format!("{x:.1}"),
        Some(x) if x.abs() >= 10.0 => format!("{x:.2}"),
        Some(x) if x.abs() < 1.0 && x.abs() > 0.999 => format!("{x:.6}"),
        Some(x) if x.abs() >= 1e-3 => format!("{x:.3}"),
        Some(x) => format!("{x:.1e}"),
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}: {}", self.name, self.about)?;
        let cases = self.rows.iter().map(|(case, _)| case.len()).max().unwrap_or(0);
        let cells: Vec<Vec<String>> =
            self.rows.iter().map(|(_, figures)| figures.iter().map(|figure| text_of(*figure)).collect()).collect();
        let widths: Vec<usize> = (self.columns.iter().enumerate())
            .map(|(at, column)| cells.iter().map(|row| row[at].len()).max().unwrap_or(0).max(column.len()))
            .collect();
        write!(f, "{:cases$}", "")?;
        for (column, width) in self.columns.iter().zip(&widths) {
            write!(f, "  {column:>width$}")?;
        }
        writeln!(f)?;
        for ((case, _), row) in self.rows.iter().zip(&cells) {
            write!(f, "{case:cases$}")?;
            for (cell, width) in row.iter().zip(&widths) {
                write!(f, "  {cell:>width$}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Writes all tables with machine, commit and versions.
///
/// # Errors
/// The file cannot be written.
pub fn write_json(path: &Path, tables: &[Table], effort: Effort) -> std::io::Result<()> {
    let crates: Map<String, Value> =
        ["burn", "faiss", "faiss-sys", "rayon"].into_iter().filter_map(version_of).collect();
    let report = json!({
        "machine": {
            "processor": processor(),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
        },
        "git": output_of("git", &["describe", "--always", "--dirty", "--tags"]),
        "versions": {
            "memory3": env!("CARGO_PKG_VERSION"),
            "rustc": output_of("rustc", &["--version"]),
            "openblas": blas::version(),
            "crates": crates,
        },
        "quick": effort.quick,
        "benches": tables.iter().map(Table::to_json).collect::<Vec<_>>(),
    });
    std::fs::write(path, format!("{report:#}\n"))
}

/// The model name that `lscpu` prints.
fn processor() -> Option<String> {
    let text = output_of("lscpu", &[])?;
    text.lines().find_map(|line| Some(line.strip_prefix("Model name:")?.trim().to_owned()))
}

/// What a program prints, trimmed; none where it is not there or fails.
fn output_of(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The version of a crate in Cargo.lock.
fn version_of(name: &str) -> Option<(String, Value)> {
    let lock = include_str!("../../Cargo.lock");
    let rest = lock.split_once(&format!("\nname = \"{name}\"\nversion = \""))?.1;
    Some((name.to_owned(), json!(rest.split_once('"')?.0)))
}
