//! Connections, and how they end.
//!
//! A connection has a time for each head, and one for bytes that its client does not take. When the server is told to stop it
//! takes no more connections; requests under way go on for a while.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a request's head may take, and a connection without one may stay.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// How long bytes may wait for a client to take them.
const TAKE_TIME: Duration = Duration::from_secs(60);
/// Bytes of a request's head, at most.
const HEAD_BYTES: usize = 64 << 10;
/// After an accept that failed, such as for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes connections.
pub(super) struct Door {
    listener: TcpListener,
    router: Router,
    connections: Arc<Semaphore>,
    graceful: GracefulShutdown,
}

impl Door {
    pub(super) fn new(listener: TcpListener, router: Router, max_connections: usize) -> Self {
        let (connections, graceful) = (Arc::new(Semaphore::new(max_connections)), GracefulShutdown::new());
        Self { listener, router, connections, graceful }
    }

    /// Serves connections for ever. May be dropped at any time: connections that were taken go on.
    pub(super) async fn stay_open(&self) {
        loop {
            // Whoever comes while there are too many waits in the system's queue.
            let Ok(place) = Arc::clone(&self.connections).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => self.serve(stream, place),
                Err(error) => {
                    tracing::warn!("a connection could not be taken: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn serve(&self, stream: TcpStream, place: OwnedSemaphorePermit) {
        if let Err(error) = prepare(&stream) {
            tracing::debug!("socket options: {error}");
        }
        let service = TowerToHyperService::new(self.router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .max_buf_size(HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        let connection = self.graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection broke: {error}");
            }
            drop(place);
        });
    }

    /// Takes no more connections, and waits until those there are have answered what they were asked.
    pub(super) async fn close(self) {
        drop(self.listener);
        self.graceful.shutdown().await;
    }
}

/// Pieces of text go out at once; a client that takes none for long is gone.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    SockRef::from(stream).set_tcp_user_timeout(Some(TAKE_TIME))?;
    Ok(())
}
