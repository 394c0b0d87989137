//! Which path does what.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

use super::answer::{Answer, Hearing, json};
use super::app::App;
use super::batch::Note;
use super::guard;
use super::job::Job;
use super::metrics::{self, Metrics};
use super::refusal::Refusal;
use super::request::{Ask, Kind};
use crate::memory::RecordId;
use crate::read::{Place, Provenance, Query, ReadError, Retrieval, Retriever, Times};

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);
/// So much later a text ends of which a client takes nothing.
const GRACE: Duration = Duration::from_secs(1);
/// The most records of a search.
const MOST_HITS: usize = 100;

type Shared = State<Arc<App>>;

/// All paths, behind their guards.
pub(super) fn router(app: &Arc<App>) -> Router {
    let router = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/memories/search", post(search))
        .route("/metrics", get(metrics_text))
        .route(guard::HEALTH, get(health))
        .route(guard::READY, get(ready))
        .fallback(|uri: Uri| async move { Refusal::path(uri.path()) })
        .method_not_allowed_fallback(|| async { Refusal::method() });
    guard::guarded(router, app).with_state(Arc::clone(app))
}

async fn completions(State(app): Shared, request: Request) -> Result<Response, Refusal> {
    generate(app, Kind::Completion, request).await
}

async fn chat(State(app): Shared, request: Request) -> Result<Response, Refusal> {
    generate(app, Kind::Chat, request).await
}

async fn generate(app: Arc<App>, kind: Kind, request: Request) -> Result<Response, Refusal> {
    let arrived = Instant::now();
    // 1. what is asked for
    let body = body_of(&app, request).await?;
    let ask = app.work(move |app| Ask::read(&body, kind, app.measure())).await?;
    // 2. its turn, and the bank of that moment
    let places = app.admit(ask.sequences()).await?;
    let reader = app.banks.current();
    let generation = reader.bank().manifest().generation;
    // 3. its way through the batch
    let answer = Answer::new(kind, &ask, &app.name, generation, app.kit.chunker.bos().is_some());
    let (events, heard) = mpsc::unbounded_channel();
    let seconds = app.config.request_seconds;
    let until = Instant::now() + Duration::from_secs(seconds);
    let hearing =
        Hearing { events: heard, metrics: app.metrics.clone(), arrived: Some(arrived), until: until.into(), seconds };
    let streams = ask.stream;
    app.notes
        .send(Note::Job(Job { ask, reader, until: until + GRACE, events, _places: places }))
        .map_err(|_| Refusal::stopping())?;
    if streams { answer.stream(hearing).await } else { answer.whole(hearing).await }
}

/// The body of a request, if it is JSON and not too much.
async fn body_of(app: &App, request: Request) -> Result<Bytes, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    // A page of another origin cannot send this without being asked first.
    let is_json = kind.is_some_and(|kind| {
        kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        return Err(Refusal::not_json());
    }
    let most = app.config.max_body_bytes.0;
    let limit = usize::try_from(most).unwrap_or(usize::MAX);
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if declared.and_then(|length| length.parse::<u64>().ok()).is_some_and(|length| length > most) {
        return Err(Refusal::too_large(most));
    }
    let body = tokio::time::timeout(BODY_TIME, to_bytes(request.into_body(), limit)).await;
    body.map_err(|_| Refusal::slow_body())?.map_err(|error| {
        let is_too_large =
            std::error::Error::source(&error).is_some_and(|source| source.is::<http_body_util::LengthLimitError>());
        if is_too_large { Refusal::too_large(most) } else { Refusal::body("the body did not arrive to its end") }
    })
}

fn describe_model(app: &App) -> Value {
    let reader = app.banks.current();
    let manifest = reader.bank().manifest();
    serde_json::json!({
        "id": app.name,
        "object": "model",
        "created": app.created,
        "owned_by": "memory3",
        "memory3": {
            "generation": manifest.generation,
            "records": manifest.counts.records,
            "max_context": app.config.max_context,
            "max_tokens": app.config.max_tokens,
        },
    })
}

async fn models(State(app): Shared) -> Response {
    json(&serde_json::json!({"object": "list", "data": [describe_model(&app)]}))
}

async fn model(State(app): Shared, Path(name): Path<String>) -> Result<Response, Refusal> {
    if name == app.name { Ok(json(&describe_model(&app))) } else { Err(Refusal::model(&name, &app.name)) }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SearchRequest {
    query: String,
    #[serde(default = "five")]
    k: usize,
}

const fn five() -> usize {
    5
}

#[derive(Serialize)]
struct Found {
    generation: u64,
    query: String,
    hits: Vec<FoundRecord>,
}

#[derive(Serialize)]
struct FoundRecord {
    rank: usize,
    record: RecordId,
    score: f32,
    text: String,
    documents: Vec<Place>,
}

async fn search(State(app): Shared, request: Request) -> Result<Response, Refusal> {
    let body = body_of(&app, request).await?;
    let SearchRequest { query, k } = serde_json::from_slice(&body).map_err(|error| Refusal::body(error.to_string()))?;
    if !(1..=MOST_HITS).contains(&k) {
        return Err(Refusal::field("k", format!("k is {k}; choose 1 to {MOST_HITS}")));
    }
    let found = app.work(move |app| {
        find(app, query, k).map_err(|error| {
            tracing::warn!("a search failed: {error}");
            Refusal::failed(error.to_string())
        })
    });
    found.await.map(|found| json(&found))
}

fn find(app: &App, query: String, k: usize) -> Result<Found, ReadError> {
    let reader = app.banks.current();
    let bank = reader.bank();
    let settings = Retrieval { memories: k, ..Retrieval::default() };
    let retriever = Retriever { bank, source: &*reader, embedder: &*app.embedder, settings };
    let mut times = Times::default();
    let hits = retriever.search(&[Query { text: &query, guarded: &[] }], &mut times)?.pop().unwrap_or_default();
    app.metrics.worked(times);
    let hits = hits.into_iter().enumerate().map(|(index, hit)| {
        let Provenance { text, documents } = Provenance::of(bank, hit.record)?;
        Ok(FoundRecord { rank: index + 1, record: hit.record, score: hit.score, text, documents })
    });
    let hits = hits.collect::<Result<_, ReadError>>()?;
    Ok(Found { generation: bank.manifest().generation, query, hits })
}

async fn metrics_text(State(app): Shared) -> Result<Response, Refusal> {
    let text = Metrics::text(&app.registry).map_err(|error| Refusal::failed(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// How the server is. Whoever shows no token where one is needed is not told why a generation was refused: the reason names
/// paths.
async fn health(State(app): Shared, headers: HeaderMap) -> Response {
    let reader = app.banks.current();
    let refused = app.banks.refused().map(|refused| {
        let reason = guard::shows_token(&app, &headers).then_some(refused.reason);
        serde_json::json!({"generation": refused.generation, "reason": reason})
    });
    json(&serde_json::json!({
        "status": if app.is_stopping() { "stopping" } else { "ok" },
        "model": app.name,
        "generation": reader.bank().manifest().generation,
        "records": reader.bank().manifest().counts.records,
        "refused": refused,
    }))
}

/// Whether new requests are welcome.
async fn ready(State(app): Shared) -> (StatusCode, &'static str) {
    if app.is_stopping() { (StatusCode::SERVICE_UNAVAILABLE, "stopping\n") } else { (StatusCode::OK, "ready\n") }
}

/// A body that keeps something until it has gone out to its end.
pub(super) fn keeping<T: Send + 'static>(body: Body, kept: T) -> Body {
    use http_body_util::BodyExt;
    Body::new(body.map_frame(move |frame| {
        let _kept = &kept;
        frame
    }))
}
