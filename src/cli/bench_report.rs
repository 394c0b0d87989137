//! What `memory3 bench-read` found: a table for people, and all of it as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::bench_read::{Case, Kind, Run};
use crate::model::DType;
use crate::read::Times;

/// All cases.
#[derive(Debug, Serialize)]
pub struct Report {
    batch: usize,
    runs: usize,
    threads: usize,
    dtype: String,
    cases: Vec<Figures>,
}

/// A case's figures: means over the runs.
#[derive(Debug, Serialize)]
struct Figures {
    #[serde(flatten)]
    case: Case,
    tokens_per_second: f64,
    seconds: f64,
    /// Standard deviation.
    seconds_spread: f64,
    processor_seconds: f64,
    /// How much longer than the plain model with prompts of this length, on the wall and by processor time.
    slower: f64,
    slower_by_processor: f64,
    times: Times,
    /// Choosing and spelling tokens.
    other: f64,
    all: Vec<Run>,
}

impl Report {
    /// Of runs of each case.
    pub fn new(batch: usize, runs: usize, dtype: DType, cases: Vec<Case>, all: Vec<Vec<Run>>) -> Self {
        let mut cases: Vec<Figures> =
            cases.into_iter().zip(all).map(|(case, runs)| Figures::new(case, batch, runs)).collect();
        let plain: Vec<(usize, f64, f64)> = (cases.iter())
            .filter(|found| found.case.kind == Kind::Plain)
            .map(|found| (found.case.input, found.seconds, found.processor_seconds))
            .collect();
        for found in &mut cases {
            if let Some((_, seconds, processor)) = plain.iter().find(|plain| plain.0 == found.case.input) {
                found.slower = found.seconds / seconds - 1.0;
                found.slower_by_processor = found.processor_seconds / processor - 1.0;
            }
        }
        Self { batch, runs, threads: rayon::current_num_threads(), dtype: dtype.to_string(), cases }
    }

    /// For people.
    pub fn text(&self) -> String {
        let output = self.cases.first().map_or(0, |found| found.case.output);
        let mut text = format!(
            "{} prompts, {output} tokens behind each; means of {} runs; {} threads, {}\n\n",
            self.batch, self.runs, self.threads, self.dtype
        );
        let width = self.cases.iter().map(|found| found.name().len()).max().unwrap_or(0);
        let _ = writeln!(
            text,
            "{:width$}  {:>8} {:>8} {:>7} {:>7}  {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}   {:>7}",
            "",
            "tokens/s",
            "s a run",
            "slower",
            "by CPU",
            "embed",
            "search",
            "load",
            "decode",
            "attend",
            "model",
            "wait",
            "other",
            "beside"
        );
        for found in &self.cases {
            let Times { embed, search, load, decode, attend, model, wait, beside } = found.times;
            let _ = write!(
                text,
                "{:width$}  {:>8.0} {:>8.3} {:>6.1}% {:>6.1}% ",
                found.name(),
                found.tokens_per_second,
                found.seconds,
                found.slower * 100.0,
                found.slower_by_processor * 100.0,
            );
            for seconds in [embed, search, load, decode, attend, model, wait, found.other] {
                let _ = write!(text, " {seconds:>7.3}");
            }
            let _ = writeln!(text, "   {beside:>7.3}");
        }
        text += "\nStages are seconds of a run, and add up to it; what runs beside the model is apart.\n";
        text
    }
}

impl Figures {
    fn new(case: Case, batch: usize, all: Vec<Run>) -> Self {
        let count = all.len() as f64;
        let mean = |of: &dyn Fn(&Run) -> f64| all.iter().map(of).sum::<f64>() / count;
        let (seconds, processor_seconds) = (mean(&|run| run.seconds), mean(&|run| run.processor_seconds));
        let seconds_spread = mean(&|run| (run.seconds - seconds).powi(2)).sqrt();
        let times = all.iter().fold(Times::default(), |sum, run| sum + run.times) * (1.0 / count);
        Self {
            tokens_per_second: (batch * case.output) as f64 / seconds,
            slower: 0.0,
            slower_by_processor: 0.0,
            other: seconds - times.sum(),
            case,
            seconds,
            seconds_spread,
            processor_seconds,
            times,
            all,
        }
    }

    fn name(&self) -> String {
        self.case.to_string()
    }
}
