//! What verbs print: text or JSON on standard output, notes on standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use indicatif::MultiProgress;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::read::Place;

/// Sends the library's notes to standard error; `MEMORY3_LOG` takes a `tracing` filter such as `memory3=debug`.
pub fn start_logging(quiet: bool) {
    let default = if quiet { "error" } else { "warn,memory3=info" };
    let filter = EnvFilter::try_from_env("MEMORY3_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // A second start, as in tests, keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Notes)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .try_init();
}

/// The bars that are being drawn on standard error.
static BARS: Mutex<Option<MultiProgress>> = Mutex::new(None);

/// Tells [`Notes`] which bars to lift out of the way; `None` when there are no more.
pub fn share_terminal(bars: Option<MultiProgress>) {
    *BARS.lock().unwrap_or_else(PoisonError::into_inner) = bars;
}

/// Standard error for whole notes: a progress bar is taken away before, and drawn again after.
struct Notes;

impl Write for Notes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bars = BARS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match bars {
            Some(bars) => bars.suspend(|| io::stderr().write_all(bytes))?,
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Writes text to standard output.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// Writes a value to standard output as one JSON document.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Whether an error says that nobody reads our output any more.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Three significant digits, as the paper prints its figures: `2.24`, `0.308`, `1.44e-4`, `13400`.
pub fn significant(number: f64) -> String {
    if number == 0.0 || !number.is_finite() {
        return number.to_string();
    }
    // `{:e}` rounds to the digits asked for; what it prints parses again.
    let rounded = format!("{number:.2e}");
    match rounded.parse::<f64>() {
        Ok(value) if (1e-3..1e15).contains(&value.abs()) => {
            let decimals = if value.abs() >= 100.0 {
                0
            } else if value.abs() >= 10.0 {
                1
            } else if value.abs() >= 1.0 {
                2
            } else {
                3
            };
            format!("{value:.decimals$}")
        }
        _ => rounded,
    }
}

/// An error and its causes; a cause that a message quotes already is not said twice.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let message = cause.to_string();
        if text.is_empty() {
            text = message;
        } else if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
    }
    text
}

/// Where a text stands: `islands/veyra.md, chunk 0 (bytes 0 to 535)`.
pub fn place(place: &Place) -> String {
    format!("{}, chunk {} (bytes {} to {})", place.document, place.chunk, place.start, place.end)
}

/// A text on one line, not longer than so many characters.
pub fn one_line(text: &str, most: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

/// `1234567` as `1,234,567`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `12.3 s`, or `1 h 02 min 03 s`.
pub fn duration(seconds: f64) -> String {
    if seconds < 100.0 {
        return format!("{seconds:.1} s");
    }
    let whole = std::time::Duration::from_secs_f64(seconds).as_secs();
    let (hours, minutes) = (whole / 3600, whole / 60 % 60);
    if hours > 0 {
        format!("{hours} h {minutes:02} min {:02} s", whole % 60)
    } else {
        format!("{minutes} min {:02} s", whole % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_significant_digits() {
        let figures =
            [(2.2385, "2.24"), (0.30818, "0.308"), (1.4418e-4, "1.44e-4"), (13_388.0, "13400"), (99.95, "100")];
        for (number, text) in figures {
            assert_eq!(significant(number), text);
        }
    }

    #[test]
    fn a_cause_that_is_quoted_is_not_repeated() {
        let error =
            anyhow::anyhow!("no such file").context("a.txt: cannot be read: no such file; try b.txt").context("corpus");
        assert_eq!(describe(&error), "corpus: a.txt: cannot be read: no such file; try b.txt");
    }

    #[test]
    fn thousands_are_separated() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(thousands(number), text);
        }
    }
}
