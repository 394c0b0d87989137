//! Draws a run's progress: bars on a terminal, a line every ten seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::output::thousands;
use crate::pipeline::{Phase, Progress};

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
        Phase::Survey => (load(&progress.chunks), None, "chunks"),
        Phase::Sample => (progress.sample.items(), Some(load(&progress.sample_total)), "chunks"),
        Phase::Train => (load(&progress.train_steps), Some(load(&progress.train_steps_total)), "codebooks"),
        Phase::Compile => {
            let done = progress.write.items() + load(&progress.chunks_shared);
            (done, Some(load(&progress.chunks_total)), "chunks")
        }
        Phase::Open | Phase::Publish | Phase::Done => (0, None, ""),
    }
}

fn draw_bars(progress: &Progress, done: &AtomicBool) {
    let bars = MultiProgress::new();
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
            match total {
                Some(total) => {
                    bar.set_length(total);
                    bar.set_position(position);
                    bar.set_message(if phase == Phase::Compile { stage_shares(progress) } else { unit.to_owned() });
                }
                None if position > 0 => bar.set_message(format!("{} chunks", thousands(position))),
                None => {}
            }
            bar.tick();
        }
        thread::park_timeout(DRAW_INTERVAL);
    }
    if let Some((_, bar)) = current {
        bar.finish_and_clear();
    }
}

/// How far each stage has come, for example `chunks (encode 512  embed 448)`.
fn stage_shares(progress: &Progress) -> String {
    let stages = [&progress.encode, &progress.quantize, &progress.embed, &progress.write];
    let shares = stages.map(|meter| format!("{} {}", meter.name, thousands(meter.items()))).join("  ");
    format!("chunks ({shares})")
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
    text += &format!(": {} {unit}, {rate:.1}/s", thousands(position));
    if let Some(total) = total.filter(|&total| total >= position && position > 0) {
        #[allow(clippy::cast_precision_loss)]
        let left = (total - position) as f64 / rate;
        text += &format!(", {left:.0} s left of {} {unit}", thousands(total));
    }
    text
}
