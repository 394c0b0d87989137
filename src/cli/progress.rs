//! Draws a run's progress: bars on a terminal, a line every ten seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::output::{self, thousands};
use crate::pipeline::{Phase, Progress, StageMeter};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two redraws on a terminal.
const DRAW_INTERVAL: Duration = Duration::from_millis(200);

/// A thread that shows a [`Progress`] until it is finished.
pub struct ProgressDisplay {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ProgressDisplay {
    /// Starts to draw; `quiet` draws nothing.
    pub fn start(progress: Arc<Progress>, quiet: bool) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&done);
        let thread = (!quiet).then(|| {
            thread::spawn(move || {
                if std::io::stderr().is_terminal() {
                    draw_bars(&progress, &flag)
                } else {
                    print_lines(&progress, &flag)
                }
            })
        });
        Self { done, thread }
    }

    /// Stops drawing and waits until the terminal is left clean.
    pub fn finish(self) {
        self.done.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread {
            thread.thread().unpark();
            // A display that panicked has nothing more to show.
            let _ = thread.join();
        }
    }
}

/// What a phase has done, out of how much, in which unit.
fn position(progress: &Progress) -> (u64, Option<u64>, &'static str) {
    let load = |value: &std::sync::atomic::AtomicU64| value.load(Ordering::Relaxed);
    match progress.phase() {
        Phase::ReEmbed => (progress.re_embed.items(), Some(load(&progress.chunks_total)), "chunks"),
        Phase::Survey => {
            let kib = |value| load(value) >> 10;
            (kib(&progress.survey_bytes), Some(kib(&progress.survey_bytes_total)).filter(|&all| all > 0), "KiB")
        }
        Phase::Sample => (progress.sample.items(), Some(load(&progress.sample_total)), "chunks"),
        Phase::Train => (load(&progress.train_steps), Some(load(&progress.train_steps_total)), "steps"),
        Phase::Compile => {
            let done = progress.write.items() + load(&progress.chunks_shared);
            (done, Some(load(&progress.chunks_total)), "chunks")
        }
        Phase::Open | Phase::Publish | Phase::Done => (0, None, ""),
    }
}

fn draw_bars(progress: &Progress, done: &AtomicBool) {
    let bars = MultiProgress::new();
    output::share_terminal(Some(bars.clone()));
    let style = |template: &str| {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
    };
    let counted = style("{prefix:>8} [{bar:32}] {human_pos}/{human_len} {msg}, {per_sec}, {eta} left");
    let open_ended = style("{prefix:>8} {spinner} {elapsed} {msg}");
    let mut current: Option<(Phase, ProgressBar)> = None;
    while !done.load(Ordering::SeqCst) {
        let phase = progress.phase();
        if current.as_ref().is_none_or(|(shown, _)| *shown != phase) {
            if let Some((_, bar)) = current.take() {
                bar.finish_and_clear();
            }
            let (_, total, _) = position(progress);
            let bar = bars.add(total.map_or_else(ProgressBar::new_spinner, ProgressBar::new));
            bar.set_style(if total.is_some() { counted.clone() } else { open_ended.clone() });
            bar.set_prefix(phase.name());
            current = Some((phase, bar));
        }
        if let Some((_, bar)) = &current {
            let (position, total, unit) = position(progress);
            if let Some(total) = total {
                bar.set_length(total);
                bar.set_position(position);
                bar.set_message(message(progress, phase, unit));
            }
            bar.tick();
        }
        thread::park_timeout(DRAW_INTERVAL);
    }
    if let Some((_, bar)) = current {
        bar.finish_and_clear();
    }
    output::share_terminal(None);
}

/// What is counted, with what more there is to say of a phase.
fn message(progress: &Progress, phase: Phase, unit: &str) -> String {
    match phase {
        Phase::Survey => format!("{unit}, {} chunks", thousands(progress.chunks.load(Ordering::Relaxed))),
        Phase::Compile => format!("{unit} ({})", stage_rates(progress)),
        _ => unit.to_owned(),
    }
}

/// Chunks that each stage does in a second of a core, for example `encode 51/s, quantize 900/s`.
fn stage_rates(progress: &Progress) -> String {
    let stages = [&progress.read, &progress.encode, &progress.quantize, &progress.embed, &progress.write];
    let rate = |meter: &StageMeter| {
        // Rates are shown without decimals: the rounding of large counts does not matter.
        #[allow(clippy::cast_precision_loss)]
        let rate = meter.items() as f64 / meter.busy().as_secs_f64().max(1e-9);
        format!("{} {rate:.0}/s", meter.name)
    };
    stages.into_iter().filter(|meter| meter.items() > 0).map(rate).collect::<Vec<_>>().join(", ")
}

fn print_lines(progress: &Progress, done: &AtomicBool) {
    let mut phase = Phase::Open;
    let mut phase_started = Instant::now();
    let mut next_line = Instant::now() + LINE_INTERVAL;
    while !done.load(Ordering::SeqCst) {
        if progress.phase() != phase {
            phase = progress.phase();
            phase_started = Instant::now();
            next_line = phase_started + LINE_INTERVAL;
            if phase != Phase::Done {
                eprintln!("{} ...", phase.name());
            }
        }
        if Instant::now() >= next_line {
            next_line += LINE_INTERVAL;
            eprintln!("{}", line(progress, phase, phase_started.elapsed()));
        }
        thread::park_timeout(DRAW_INTERVAL);
    }
}

fn line(progress: &Progress, phase: Phase, elapsed: Duration) -> String {
    let (position, total, unit) = position(progress);
    let mut text = format!("{} {:.0} s", phase.name(), elapsed.as_secs_f64());
    if unit.is_empty() {
        return text;
    }
    // Rates are shown to one decimal: the rounding of large counts does not matter.
    #[allow(clippy::cast_precision_loss)]
    let rate = position as f64 / elapsed.as_secs_f64().max(1e-9);
    text += &format!(": {}", thousands(position));
    if let Some(total) = total.filter(|&total| total >= position) {
        text += &format!(" of {} {unit}", thousands(total));
        if position > 0 {
            #[allow(clippy::cast_precision_loss)]
            let left = (total - position) as f64 / rate;
            text += &format!(", {left:.0} s left");
        }
    } else {
        text += &format!(" {unit}");
    }
    // Steps are of unlike size: their rate says nothing.
    if phase != Phase::Train {
        text += &format!(", {rate:.1}/s");
    }
    let more = message(progress, phase, "");
    text + more.trim_end()
}
