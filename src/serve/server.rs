//! The server from start to stop: its threads, its signals, its way out.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam::channel;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::app::App;
use super::banks::{Banks, Look};
use super::batch::{Batch, Note};
use super::chat::{ChatTemplate, TemplateError};
use super::finder::Finder;
use super::listen::Door;
use super::metrics::{BankCollector, Metrics};
use super::routes;
use super::sequence::Kit;
use crate::config::ServeConfig;
use crate::corpus::Chunker;
use crate::embed::TextEmbedder;
use crate::read::{MemoryReader, ReadError, ReadModel, stop_tokens};

/// Threads for connections: they only pass things on.
const ASYNC_THREADS: usize = 2;
/// Threads that tokenize and search.
const WORKERS: usize = 4;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The bank or the model's directory.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The model's chat template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Other machines could use the server, and nothing would stop them.
    #[error(
        "{address}: other machines reach this address, and there is no token; give one with --token-file or \
         MEMORY3_TOKEN, or listen to 127.0.0.1"
    )]
    Open {
        /// Where it would listen.
        address: SocketAddr,
    },
    /// The address cannot be had.
    #[error("{address}: {source}; choose another with --listen")]
    Listen {
        /// Where it would listen.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The system refuses a thread or a signal handler.
    #[error("cannot start: {0}")]
    Start(#[source] std::io::Error),
    /// A thread that runs the model or finds memories has ended.
    #[error("a thread of the server has ended, as it said above; start the server again")]
    Thread,
}

/// What a server is made of. Bank, model, tokenizer and encoder belong together.
pub struct Parts {
    /// The model, with room for prefix, memories and `max_context` tokens.
    pub model: ReadModel,
    /// Its tokenizer.
    pub chunker: Chunker,
    /// Its directory.
    pub model_dir: PathBuf,
    /// The text encoder.
    pub embedder: Box<dyn TextEmbedder>,
    /// The bank.
    pub reader: MemoryReader,
    /// The token that clients must show.
    pub token: Option<String>,
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered.
    Clean,
    /// So many were not.
    Cut(i64),
}

/// A server that is ready to run.
pub struct Server {
    app: Arc<App>,
    threads: Vec<JoinHandle<()>>,
    /// Hears of a thread that has ended.
    ends: UnboundedReceiver<()>,
}

/// Tells when it is dropped: a thread that has one has ended, however that came.
struct Alive(UnboundedSender<()>);

impl Drop for Alive {
    fn drop(&mut self) {
        // Nobody listens when the server has ended, too.
        let _ = self.0.send(());
    }
}

impl Server {
    /// Starts the threads that run the model and find memories.
    ///
    /// # Errors
    /// No token for an address that others reach; the bank's index, the model's directory.
    pub fn new(parts: Parts, config: ServeConfig) -> Result<Self, ServeError> {
        if parts.token.is_none() && !config.listen.ip().is_loopback() {
            return Err(ServeError::Open { address: config.listen });
        }
        let template = ChatTemplate::from_dir(&parts.model_dir)?;
        let stop_tokens = stop_tokens(&parts.model_dir)?;
        let (model, chunker) = (Arc::new(parts.model), Arc::new(parts.chunker));
        let embedder: Arc<dyn TextEmbedder> = Arc::from(parts.embedder);
        let cache_bytes = usize::try_from(config.cache_bytes.0).unwrap_or(usize::MAX);
        let banks = Arc::new(Banks::new(parts.reader, cache_bytes, &model, &chunker, &embedder)?);
        let (metrics, mut registry) = Metrics::new();
        registry.register_collector(Box::new(BankCollector(Arc::clone(&banks))));
        let (notes, heard) = channel::unbounded();
        let (questions, asked) = channel::unbounded();
        let (told, ends) = unbounded_channel();
        let kit = Kit { model, chunker, stop_tokens };
        let finder = Finder {
            questions: asked,
            notes: notes.clone(),
            embedder: Arc::clone(&embedder),
            metrics: metrics.clone(),
        };
        let batching = Batch {
            kit: kit.clone(),
            notes: heard,
            questions,
            metrics: metrics.clone(),
            sequences: Vec::new(),
            tickets: 0,
        };
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let alive = Alive(told.clone());
            let work = move || {
                let _alive = alive;
                work();
            };
            thread::Builder::new().name(name.to_owned()).spawn(work).map_err(ServeError::Start)
        };
        let finding = spawn("finder", Box::new(|| finder.run()))?;
        let running = spawn("batch", Box::new(|| batching.run()))?;
        let app = App {
            name: config.name.clone(),
            kit,
            template,
            embedder,
            banks,
            notes,
            places: Arc::new(Semaphore::new(config.max_sequences)),
            workers: Arc::new(Semaphore::new(WORKERS)),
            queue: Semaphore::new(config.max_queue),
            metrics,
            registry,
            token: parts.token.map(|token| blake3::hash(token.as_bytes())),
            is_stopping: AtomicBool::new(false),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            config,
        };
        Ok(Self { app: Arc::new(app), threads: vec![running, finding], ends })
    }

    /// Serves until SIGTERM or Ctrl-C; `announce` hears where it listens. A second signal ends it at once.
    ///
    /// # Errors
    /// The address cannot be had; the model's thread ends.
    pub fn run(self, announce: impl FnOnce(SocketAddr)) -> Result<Ended, ServeError> {
        let Self { app, threads, ends } = self;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(ASYNC_THREADS)
            .max_blocking_threads(WORKERS + 1)
            .thread_name("serve")
            .enable_all()
            .build()
            .map_err(ServeError::Start)?;
        let ended = runtime.block_on(serve(&app, ends, announce));
        let _ = app.notes.send(Note::Stop);
        // What was cut is let go of; nothing of it is awaited.
        runtime.shutdown_background();
        if ended.is_ok() {
            for thread in threads {
                // A thread that panicked has said why.
                let _ = thread.join();
            }
        }
        ended
    }
}

async fn serve(
    app: &Arc<App>,
    mut ends: UnboundedReceiver<()>,
    announce: impl FnOnce(SocketAddr),
) -> Result<Ended, ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Start)?;
    let address = app.config.listen;
    let failed = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    announce(listener.local_addr().map_err(failed)?);
    let door = Door::new(listener, routes::router(app), app.config.max_connections);
    tokio::spawn(watch(Arc::clone(app)));
    tokio::select! {
        () = door.stay_open() => {}
        () = signals.stop() => {}
        _ = ends.recv() => return Err(ServeError::Thread),
    }
    app.is_stopping.store(true, Ordering::Relaxed);
    let patience = Duration::from_secs(app.config.shutdown_seconds);
    tracing::info!("stopping: requests under way may take {} s more", patience.as_secs());
    tokio::select! {
        () = door.close() => return Ok(Ended::Clean),
        () = tokio::time::sleep(patience) => {}
        () = signals.stop() => {}
    }
    Ok(Ended::Cut(app.metrics.requests_in_flight()))
}

/// Looks for new generations for ever: now and then, and on SIGHUP.
async fn watch(app: Arc<App>) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    let time = Duration::from_secs(app.config.reload_seconds);
    loop {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            _ = hangup.recv() => {}
        }
        let banks = Arc::clone(&app.banks);
        match tokio::task::spawn_blocking(move || banks.look()).await {
            Ok(Look::Same) => {}
            Ok(Look::Taken(generation)) => {
                app.metrics.reloads.inc();
                tracing::info!("generation {generation} is served");
            }
            Ok(Look::Refused(refused)) => {
                app.metrics.refused_reloads.inc();
                let served = app.banks.current().bank().manifest().generation;
                tracing::warn!(
                    "generation {} is not served, {served} still is: {}",
                    refused.generation,
                    refused.reason
                );
            }
            // Its cause stands on standard error.
            Err(_) => tracing::error!("looking for a new generation failed"),
        }
    }
}

/// Signals that end the server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for one.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
