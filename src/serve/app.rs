//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::Sender;
use prometheus_client::registry::Registry;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::banks::Banks;
use super::batch::Note;
use super::chat::ChatTemplate;
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::request::Measure;
use super::sequence::Kit;
use crate::config::ServeConfig;
use crate::embed::TextEmbedder;

/// The server behind its routes.
pub(super) struct App {
    /// The model's name for clients.
    pub(super) name: String,
    pub(super) config: ServeConfig,
    pub(super) kit: Kit,
    pub(super) template: ChatTemplate,
    pub(super) embedder: Arc<dyn TextEmbedder>,
    pub(super) banks: Arc<Banks>,
    /// To the batch.
    pub(super) notes: Sender<Note>,
    /// One for each sequence that may grow.
    pub(super) places: Arc<Semaphore>,
    /// One for each request that may be tokenized or searched for at a time.
    pub(super) workers: Arc<Semaphore>,
    /// One for each request that may wait.
    pub(super) queue: Semaphore,
    pub(super) metrics: Metrics,
    pub(super) registry: Registry,
    /// Hash of the token that clients must show.
    pub(super) token: Option<blake3::Hash>,
    pub(super) is_stopping: AtomicBool,
    /// Unix time of the start.
    pub(super) created: u64,
}

impl App {
    /// What requests are measured by.
    pub(super) fn measure(&self) -> Measure<'_> {
        Measure {
            name: &self.name,
            chunker: &self.kit.chunker,
            template: &self.template,
            vocabulary: self.kit.model.config().vocab_size,
            config: &self.config,
        }
    }

    /// Waits for places for so many sequences.
    ///
    /// # Errors
    /// Too many wait already, or it takes too long.
    pub(super) async fn admit(&self, sequences: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        self.turn(&self.places, u32::try_from(sequences).unwrap_or(u32::MAX)).await
    }

    /// Runs work that takes its time, apart from the async threads.
    ///
    /// # Errors
    /// Too many wait already, or it takes too long to get to it; what the work refuses.
    pub(super) async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let turn = self.turn(&self.workers, 1).await?;
        let app = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&app)
        });
        // A panic has told its cause on standard error.
        done.await.map_err(|_| Refusal::failed("the server failed at this request"))?
    }

    /// Waits in the order of arrival.
    async fn turn(&self, of: &Arc<Semaphore>, count: u32) -> Result<OwnedSemaphorePermit, Refusal> {
        if let Ok(permit) = Arc::clone(of).try_acquire_many_owned(count) {
            return Ok(permit);
        }
        let _waits = Waiting::new(self)?;
        let patience = Duration::from_secs(self.config.queue_seconds);
        let admitted = tokio::time::timeout(patience, Arc::clone(of).acquire_many_owned(count)).await;
        admitted.map_err(|_| Refusal::no_turn())?.map_err(|_| Refusal::stopping())
    }

    /// Is it about to stop?
    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }
}

/// A request that waits.
struct Waiting<'a> {
    app: &'a App,
    _place: tokio::sync::SemaphorePermit<'a>,
}

impl<'a> Waiting<'a> {
    fn new(app: &'a App) -> Result<Self, Refusal> {
        let place = app.queue.try_acquire().map_err(|_| Refusal::busy())?;
        app.metrics.waiting.inc();
        Ok(Self { app, _place: place })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.app.metrics.waiting.dec();
    }
}
