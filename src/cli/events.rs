//! What a run tells machines while it goes on and when it has ended: events as JSON lines (`--events`), and metrics for
//! Prometheus' node exporter (`--metrics`).
//!
//! Comes in: a [`Progress`], and how the run ended. Goes out: lines in a file that is only appended to, and a text file
//! that is replaced in one step. Events carry times; nothing of them goes into the bank.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use crate::pipeline::{Phase, Progress, RunReport};

/// Time between two events of progress.
const INTERVAL: Duration = Duration::from_secs(5);
/// Time between two looks at the phase.
const LOOK: Duration = Duration::from_millis(200);

/// Where a run is told of.
#[derive(Clone, Debug, Args)]
pub struct TellArgs {
    /// Append events of the run to this file, as JSON lines
    #[arg(long, env = "MEMORY3_EVENTS", help_heading = "Run", value_name = "FILE")]
    events: Option<PathBuf>,
    /// Write metrics for Prometheus to this file when the run ends
    #[arg(long, env = "MEMORY3_METRICS", help_heading = "Run", value_name = "FILE")]
    metrics: Option<PathBuf>,
}

/// A run that is being told of.
pub struct Telling {
    events: Option<Arc<Mutex<File>>>,
    metrics: Option<PathBuf>,
    started: Instant,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TellArgs {
    /// Starts to tell of the run of `verb` on the bank in `bank`, as far as that is known.
    ///
    /// # Errors
    /// A file that cannot be written: better now than after hours.
    pub fn start(&self, verb: &str, bank: Option<&Path>, progress: &Arc<Progress>) -> anyhow::Result<Telling> {
        if let Some(path) = &self.metrics {
            drop(scratch(path).with_context(|| format!("{}: cannot be written", path.display()))?);
        }
        let done = Arc::new(AtomicBool::new(false));
        let mut telling =
            Telling { events: None, metrics: self.metrics.clone(), started: Instant::now(), done, thread: None };
        if let Some(path) = &self.events {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file = file.with_context(|| format!("{}: cannot be written", path.display()))?;
            let file = Arc::new(Mutex::new(file));
            let bank = bank.map(|bank| bank.display().to_string());
            let version = env!("CARGO_PKG_VERSION");
            write_event(
                &file,
                json!({"event": "started", "verb": verb, "bank": bank, "version": version, "pid": std::process::id()}),
            );
            telling.events = Some(Arc::clone(&file));
            let (progress, done) = (Arc::clone(progress), Arc::clone(&telling.done));
            telling.thread = Some(thread::spawn(move || watch(&file, &progress, &done)));
        }
        Ok(telling)
    }
}

impl Telling {
    /// Tells how the run ended.
    ///
    /// # Errors
    /// The metrics cannot be written.
    pub fn finish(mut self, result: Result<&RunReport, &str>, exit_code: u8) -> anyhow::Result<()> {
        self.done.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A watcher that panicked has nothing more to say.
            let _ = thread.join();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        if let Some(file) = &self.events {
            match result {
                Ok(report) => {
                    if let Some(bank) = &report.bank {
                        write_event(
                            file,
                            json!({"event": "published", "generation": bank.generation, "records": bank.records}),
                        );
                    }
                    let documents = &report.documents;
                    write_event(
                        file,
                        json!({"event": "finished", "exit_code": exit_code, "seconds": seconds, "stopped": report.stopped,
                            "documents": documents, "chunks": report.chunks}),
                    );
                }
                Err(error) => {
                    write_event(
                        file,
                        json!({"event": "failed", "exit_code": exit_code, "seconds": seconds, "error": error}),
                    );
                }
            }
        }
        let Some(path) = &self.metrics else { return Ok(()) };
        let mut file = scratch(path).with_context(|| format!("{}: cannot be written", path.display()))?;
        // A missing file is that of a first run.
        let before = std::fs::read_to_string(path).unwrap_or_default();
        file.write_all(metrics(result.ok(), exit_code, seconds, &before).as_bytes())?;
        // The exporter runs as another user.
        #[cfg(unix)]
        std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.persist(path).with_context(|| format!("{}: cannot be written", path.display()))?;
        Ok(())
    }
}

/// A file beside `path` that takes its name when it is complete.
fn scratch(path: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::Builder::new().prefix(".memory3-").suffix(".tmp").tempfile_in(folder)
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// Writes one line, in one piece; a file that cannot be written any more does not end the run.
fn write_event(file: &Mutex<File>, mut event: Value) {
    event["time"] = json!(unix_time());
    let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = file.write_all(format!("{event}\n").as_bytes()) {
        tracing::warn!("an event is lost: {error}");
    }
}

/// Tells of phases, of the plan, and every few seconds how far the run is.
fn watch(file: &Mutex<File>, progress: &Progress, done: &AtomicBool) {
    let mut phase: Option<Phase> = None;
    let mut planned = false;
    let mut next = Instant::now() + INTERVAL;
    loop {
        // In this order: what came before the end is told.
        let last = done.load(Ordering::SeqCst);
        if !planned && let Some(plan) = progress.plan.get() {
            planned = true;
            write_event(file, json!({"event": "plan", "plan": plan}));
        }
        let now = progress.phase();
        if phase != Some(now) {
            phase = Some(now);
            write_event(file, json!({"event": "phase", "phase": now.name()}));
        }
        if last {
            return;
        }
        if Instant::now() >= next {
            next = Instant::now() + INTERVAL;
            write_event(file, state(progress));
        }
        thread::park_timeout(LOOK);
    }
}

fn state(progress: &Progress) -> Value {
    let stages = progress.meters().into_iter().filter(|meter| meter.items() > 0);
    let stages: Vec<Value> = stages
        .map(|meter| json!({"name": meter.name, "items": meter.items(), "busy_seconds": meter.busy().as_secs_f64()}))
        .collect();
    json!({
        "event": "progress",
        "phase": progress.phase().name(),
        "documents": progress.documents.load(Ordering::Relaxed),
        "chunks": progress.chunks.load(Ordering::Relaxed),
        "chunks_total": progress.chunks_total.load(Ordering::Relaxed),
        "stages": stages,
    })
}

/// What a run that published nothing leaves as it was.
const LASTING: [&str; 2] = ["memory3_run_last_success_timestamp_seconds", "memory3_bank_"];

/// The lines of a metrics file that a run without a publication leaves as they were.
fn lasting(before: &str) -> String {
    let name = |line: &str| {
        let rest = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE ")).unwrap_or(line);
        LASTING.iter().any(|lasting| rest.starts_with(lasting))
    };
    before.lines().filter(|line| name(line)).map(|line| format!("{line}\n")).collect()
}

/// The text format of Prometheus; `before`: the file of the run before.
fn metrics(report: Option<&RunReport>, exit_code: u8, seconds: f64, before: &str) -> String {
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, values: &[(&str, f64)]| {
        text += &format!("# HELP memory3_{name} {help}\n# TYPE memory3_{name} gauge\n");
        for (labels, value) in values {
            text += &format!("memory3_{name}{labels} {value}\n");
        }
    };
    // Counts below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let n = |count: u64| count as f64;
    gauge("run_exit_code", "Exit code of the last run.", &[("", f64::from(exit_code))]);
    gauge("run_end_timestamp_seconds", "When the last run ended.", &[("", unix_time())]);
    gauge("run_duration_seconds", "How long the last run took.", &[("", seconds)]);
    let Some(report) = report else { return text + &lasting(before) };
    let (documents, chunks) = (&report.documents, &report.chunks);
    gauge(
        "run_documents",
        "Documents of the last run by what became of them.",
        &[
            ("{state=\"compiled\"}", n(documents.compiled)),
            ("{state=\"changed\"}", n(documents.changed)),
            ("{state=\"unchanged\"}", n(documents.unchanged)),
            ("{state=\"duplicate\"}", n(documents.duplicate)),
            ("{state=\"rejected\"}", n(documents.rejected)),
            ("{state=\"vanished\"}", n(documents.vanished)),
            ("{state=\"kept\"}", n(documents.kept)),
        ],
    );
    gauge(
        "run_chunks",
        "Chunks of the last run by what became of them.",
        &[
            ("{state=\"encoded\"}", n(chunks.encoded)),
            ("{state=\"unchanged\"}", n(chunks.unchanged)),
            ("{state=\"shared\"}", n(chunks.shared)),
        ],
    );
    if let Some(bank) = &report.bank {
        gauge(
            "run_last_success_timestamp_seconds",
            "When the last run ended that came to its end.",
            &[("", unix_time())],
        );
        gauge("bank_generation", "Number of the published generation.", &[("", n(bank.generation))]);
        gauge("bank_records", "Live records of the bank.", &[("", n(bank.records))]);
        gauge("bank_bytes", "Bytes of shards and index files of the generation.", &[("", n(bank.bytes))]);
        gauge("bank_shards", "Shards of the bank.", &[("", n(bank.shards as u64))]);
        return text;
    }
    text + &lasting(before)
}
