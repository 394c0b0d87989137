//! What the server counts, as Prometheus reads it.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::banks::Banks;
use crate::read::Times;

/// The form of [`Metrics::text`].
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Seconds = Counter<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tokens {
    kind: &'static str,
}

/// All counters; a clone counts the same.
#[derive(Clone, Debug)]
pub(super) struct Metrics {
    requests: Family<Answered, Counter>,
    request_seconds: Family<Route, Histogram>,
    /// Requests whose answer has not gone out to its end.
    in_flight: Gauge,
    /// Requests that wait for their turn.
    pub(super) waiting: Gauge,
    /// Texts that grow.
    pub(super) sequences: Gauge,
    tokens: Family<Tokens, Counter>,
    first_token_seconds: Histogram,
    work_seconds: Family<Part, Seconds>,
    passes: Counter,
    pass_rows: Counter,
    retrievals: Counter,
    pub(super) cancelled: Counter,
    pub(super) reloads: Counter,
    pub(super) refused_reloads: Counter,
}

fn request_seconds() -> Histogram {
    Histogram::new([0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0])
}

impl Metrics {
    /// New counters, and the registry that gives them out.
    pub(super) fn new() -> (Self, Registry) {
        let metrics = Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(request_seconds),
            in_flight: Gauge::default(),
            waiting: Gauge::default(),
            sequences: Gauge::default(),
            tokens: Family::default(),
            first_token_seconds: request_seconds(),
            work_seconds: Family::default(),
            passes: Counter::default(),
            pass_rows: Counter::default(),
            retrievals: Counter::default(),
            cancelled: Counter::default(),
            reloads: Counter::default(),
            refused_reloads: Counter::default(),
        };
        let registry = metrics.registry();
        (metrics, registry)
    }

    fn registry(&self) -> Registry {
        let mut all = Registry::with_prefix("memory3");
        all.register("http_requests", "Requests answered, or left by their client", self.requests.clone());
        let seconds = "From a request's arrival to the end of its answer";
        all.register_with_unit("http_request", seconds, Unit::Seconds, self.request_seconds.clone());
        all.register("http_requests_in_flight", "Requests whose answer has not ended", self.in_flight.clone());
        all.register("requests_waiting", "Requests that wait for their turn", self.waiting.clone());
        all.register("sequences", "Texts that grow", self.sequences.clone());
        all.register("tokens", "Tokens read (prompt) and written (completion)", self.tokens.clone());
        let first = "From a request's arrival to its first piece of text";
        all.register_with_unit("first_token", first, Unit::Seconds, self.first_token_seconds.clone());
        all.register_with_unit("work", "Time by part of the work", Unit::Seconds, self.work_seconds.clone());
        all.register("forward_passes", "Passes through the model", self.passes.clone());
        all.register("forward_rows", "Tokens in these passes", self.pass_rows.clone());
        all.register("retrievals", "Searches for memories while texts were read or grew", self.retrievals.clone());
        all.register("cancelled_sequences", "Texts that nobody waited for any more", self.cancelled.clone());
        all.register("bank_reloads", "Generations taken into service since the start", self.reloads.clone());
        all.register("bank_reloads_refused", "Generations that could not be served", self.refused_reloads.clone());
        all
    }

    /// A request has come.
    pub(super) fn arrived(&self, route: String) -> InFlight {
        self.in_flight.inc();
        // 499, as nginx has it, stays if the client leaves before there is an answer.
        InFlight { metrics: self.clone(), route, status: 499, since: Instant::now() }
    }

    /// Requests whose answer has not ended.
    pub(super) fn requests_in_flight(&self) -> i64 {
        self.in_flight.get()
    }

    /// Tokens of a pass.
    pub(super) fn count_tokens(&self, prompt: usize, completion: usize) {
        for (kind, tokens) in [("prompt", prompt), ("completion", completion)] {
            self.tokens.get_or_create(&Tokens { kind }).inc_by(tokens as u64);
        }
    }

    /// The first piece of a text.
    pub(super) fn first_token(&self, after: Duration) {
        self.first_token_seconds.observe(after.as_secs_f64());
    }

    /// Memories were found for so many texts.
    pub(super) fn found(&self, texts: usize, times: Times) {
        self.retrievals.inc_by(texts as u64);
        self.worked(times);
    }

    /// A pass of so many tokens, and the time that tokens were chosen in.
    pub(super) fn passed(&self, rows: usize, times: Times, choosing: Duration) {
        self.passes.inc();
        self.pass_rows.inc_by(rows as u64);
        self.worked(times);
        self.work_seconds.get_or_create(&Part { part: "choose" }).inc_by(choosing.as_secs_f64());
    }

    /// Time went.
    pub(super) fn worked(&self, times: Times) {
        let Times { embed, search, load, decode, attend, model, .. } = times;
        let parts = [
            ("embed", embed),
            ("search", search),
            ("load", load),
            ("decode", decode),
            ("attend", attend),
            ("model", model),
        ];
        for (part, seconds) in parts {
            self.work_seconds.get_or_create(&Part { part }).inc_by(seconds);
        }
    }

    /// Everything in OpenMetrics' text form.
    pub(super) fn text(registry: &Registry) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, registry)?;
        Ok(text)
    }
}

/// A request until the end of its answer.
#[derive(Debug)]
pub(super) struct InFlight {
    metrics: Metrics,
    route: String,
    pub(super) status: u16,
    since: Instant,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let (metrics, route) = (&self.metrics, std::mem::take(&mut self.route));
        metrics.in_flight.dec();
        let seconds = self.since.elapsed().as_secs_f64();
        tracing::debug!("{route}: status {} after {seconds:.3} s", self.status);
        metrics.request_seconds.get_or_create(&Route { route: route.clone() }).observe(seconds);
        metrics.requests.get_or_create(&Answered { route, status: self.status }).inc();
    }
}

/// The bank at hand: its generation, its records, what its cache did.
#[derive(Debug)]
pub(super) struct BankCollector(pub(super) std::sync::Arc<Banks>);

impl Collector for BankCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let reader = self.0.current();
        let (manifest, cache) = (reader.bank().manifest(), reader.counters());
        let refused = self.0.refused().map_or(0, |refused| refused.generation);
        let now = |number: u64| ConstGauge::new(i64::try_from(number).unwrap_or(i64::MAX));
        let mut tell = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        tell("bank_generation", "Generation that new requests get.", &now(manifest.generation))?;
        tell("bank_refused_generation", "Published, but not served: see /health; 0: none.", &now(refused))?;
        tell("bank_records", "Its records.", &now(manifest.counts.records))?;
        tell("cache_hits", "Memories found in RAM, of this generation.", &ConstCounter::new(cache.hits))?;
        tell("cache_misses", "Memories decoded, of this generation.", &ConstCounter::new(cache.misses))?;
        tell("cache_evictions", "Memories that made room, of this generation.", &ConstCounter::new(cache.evictions))?;
        tell("cache_memories", "Memories in RAM.", &now(cache.memories as u64))?;
        tell("cache_bytes", "Their bytes.", &now(cache.bytes as u64))?;
        tell("cache_capacity_bytes", "Bytes there may be.", &now(cache.capacity as u64))
    }
}
