//! `memory3 serve`: an HTTP server that goes on with texts, reading memories of a bank that may change under it.
//!
//! In: a loaded model with tokenizer and text encoder, an open bank, settings. Out: OpenAI's completions and chat
//! completions, searches, metrics. A request goes from `routes.rs`, where `request.rs` says what it means, to `batch.rs`, the one
//! thread that runs the model, over all texts that grow (`sequence.rs`), while `finder.rs` looks for their memories; what
//! happens to them comes back as events, of which `answer.rs` makes responses.
//!
//! What always holds: a request reads one generation from its beginning to its end; the model never runs on the async
//! threads; a request that nobody waits for any more ends; without a token only this machine is served.

mod answer;
mod app;
mod banks;
mod batch;
mod chat;
mod finder;
mod guard;
mod job;
mod listen;
mod metrics;
mod refusal;
mod request;
mod routes;
mod sequence;
mod server;
mod stops;

pub use chat::TemplateError;
pub use server::{Ended, Parts, ServeError, Server};
