//! Rates of things that are measured in turn, so that all see the same machine.
//!
//! In: closures and how much work one call of each does. Out: rates in work per second of the thread's own processor
//! time, which other processes on the machine hardly change. Always holds: each turn times every thing once, so that
//! ratios within a turn compare like with like. Nothing that leaves the calling thread can be measured here.

use std::time::Duration;

use cpu_time::ThreadTime;

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Tiny sizes: a test of the bench.
    pub quick: bool,
    /// Processor time for all things of a case together.
    case: Duration,
    /// Processor time of one thing in a turn, at least. Long enough for its data to come back into the second cache.
    turn: Duration,
}

impl Effort {
    /// For figures.
    pub const FULL: Self = Self { quick: false, case: Duration::from_millis(2500), turn: Duration::from_millis(2) };
    /// For tests.
    pub const QUICK: Self = Self { quick: true, case: Duration::ZERO, turn: Duration::ZERO };

    /// The sizes of a case: real ones, or tiny ones.
    pub fn choose<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Turns that a case has at least.
const LEAST_TURNS: usize = 5;

/// Work of one call, and the call; it gets the number of calls before it.
type Thing<'a> = (f64, Box<dyn FnMut(usize) + 'a>);

/// Things to be measured in turn.
#[derive(Default)]
pub struct Turns<'a> {
    things: Vec<Thing<'a>>,
}

impl<'a> Turns<'a> {
    /// Adds a thing whose call does `work`; [`Turns::measure`] gives its rates at the index returned here.
    pub fn add(&mut self, work: f64, run: impl FnMut(usize) + 'a) -> usize {
        self.things.push((work, Box::new(run)));
        self.things.len() - 1
    }

    /// Adds a peak, where this processor has it.
    pub fn add_peak(&mut self, peak: Option<super::peak::Peak>) -> Option<usize> {
        peak.map(|peak| self.add(peak.flop, move |_| peak.run()))
    }

    /// Measures until the time is over.
    pub fn measure(mut self, effort: Effort) -> Vec<Rates> {
        // 1. Calls of a turn: the second call is timed, the first may fill caches and buffers.
        let mut calls = vec![2; self.things.len()];
        let times = |(_, run): &mut Thing<'a>| {
            run(0);
            let start = ThreadTime::now();
            run(1);
            (effort.turn.as_secs_f64() / start.elapsed().as_secs_f64().max(1e-9)).ceil().max(1.0) as usize
        };
        let in_turn: Vec<usize> = self.things.iter_mut().map(times).collect();
        // 2. The turns.
        let mut rates = vec![Rates(Vec::new()); self.things.len()];
        let start = ThreadTime::now();
        while start.elapsed() < effort.case || rates.iter().any(|rates| rates.0.len() < LEAST_TURNS) {
            for (thing, (work, run)) in self.things.iter_mut().enumerate() {
                let start = ThreadTime::now();
                for _ in 0..in_turn[thing] {
                    run(calls[thing]);
                    calls[thing] += 1;
                }
                let seconds = start.elapsed().as_secs_f64().max(1e-9);
                rates[thing].0.push(*work * in_turn[thing] as f64 / seconds);
            }
        }
        rates
    }
}

/// Work per second of one thing, turn by turn; never empty.
#[derive(Clone, Debug)]
pub struct Rates(Vec<f64>);

impl Rates {
    /// The highest.
    pub fn best(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    /// The median.
    pub fn median(&self) -> f64 {
        median(&self.0)
    }

    /// The median of the ratios to another thing in the same turn.
    pub fn ratio(&self, to: &Self) -> f64 {
        median(&self.0.iter().zip(&to.0).map(|(own, other)| own / other).collect::<Vec<_>>())
    }
}

/// The middle one; the higher of two. 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}
