//! What clients get: one JSON object, or a stream of them as server-sent events.
//!
//! In: the events of a job. Out: responses in OpenAI's form. What is ours stands in fields `memory3`: the generation that was
//! read, and with each text the references of its memories. In a stream references go with the next piece of their text.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::http::header;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::job::{Event, FinishReason, References};
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::request::{Ask, Kind};

/// The last event of every stream.
const DONE: &str = "[DONE]";

/// A response of one JSON object.
pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => Refusal::failed(error.to_string()).into_response(),
    }
}

/// What hears of a job: dropped, it ends the job.
pub(super) struct Hearing {
    pub(super) events: UnboundedReceiver<Event>,
    pub(super) metrics: Metrics,
    /// When the request came; until the first piece of text has come.
    pub(super) arrived: Option<Instant>,
    pub(super) until: tokio::time::Instant,
    /// What `until` is, for people.
    pub(super) seconds: u64,
}

impl Hearing {
    /// The next event.
    async fn next(&mut self) -> Result<Event, Refusal> {
        let heard = tokio::time::timeout_at(self.until, self.events.recv()).await;
        match heard.map_err(|_| Refusal::too_slow(self.seconds))? {
            None => Err(Refusal::stopping()),
            Some(Event::Failed(error)) => Err(Refusal::failed(error)),
            Some(event) => {
                if let (Event::Piece { .. }, Some(arrived)) = (&event, self.arrived) {
                    self.metrics.first_token(arrived.elapsed());
                    self.arrived = None;
                }
                Ok(event)
            }
        }
    }
}

/// What all answers to one request have in common.
pub(super) struct Answer {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    generation: u64,
    include_usage: bool,
    /// With BOS, of all prompts.
    prompt_tokens: usize,
    texts: Vec<Text>,
}

/// One text of an answer.
#[derive(Clone, Default)]
struct Text {
    /// All of it, or what has not gone out.
    text: String,
    references: Vec<Arc<References>>,
    finished: Option<FinishReason>,
    tokens: usize,
    /// Whether its role was told.
    begun: bool,
}

impl Answer {
    /// Nothing has happened yet.
    pub(super) fn new(kind: Kind, ask: &Ask, model: &str, generation: u64, has_bos: bool) -> Self {
        let bos = usize::from(has_bos);
        let name = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let number = || RandomState::new().hash_one(0);
        Self {
            kind,
            id: format!("{name}-{:016x}{:08x}", number(), number() >> 32),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            model: model.to_owned(),
            generation,
            include_usage: ask.include_usage,
            prompt_tokens: ask.prompts.iter().map(|prompt| bos + prompt.tokens.len()).sum(),
            texts: vec![Text::default(); ask.sequences()],
        }
    }

    /// Waits for all texts.
    ///
    /// # Errors
    /// The job fails or takes too long.
    pub(super) async fn whole(mut self, mut hearing: Hearing) -> Result<Response, Refusal> {
        while !self.is_complete() {
            let event = hearing.next().await?;
            self.hear(event);
        }
        let choices = (0..self.texts.len()).map(|index| self.choice(index, None)).collect();
        let mut object = self.object(choices);
        object["usage"] = self.usage();
        Ok(self::json(&object))
    }

    /// Answers as the texts grow. Waits for the first event, so that what fails at once has a status of its own.
    ///
    /// # Errors
    /// The job fails before its first event.
    pub(super) async fn stream(self, mut hearing: Hearing) -> Result<Response, Refusal> {
        let event = hearing.next().await?;
        let mut streaming = Streaming { answer: self, hearing, going: VecDeque::new(), is_over: false };
        streaming.put(event);
        let events = stream::unfold(streaming, |mut streaming| async {
            let data = streaming.next().await?;
            Some((Ok::<_, Infallible>(sse::Event::default().data(data)), streaming))
        });
        Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
    }

    /// Notes an event; gives the text that it is about.
    fn hear(&mut self, event: Event) -> usize {
        match event {
            Event::References { text, references } => {
                self.texts[text].references.push(references);
                text
            }
            Event::Piece { text, piece } => {
                self.texts[text].text += &piece;
                text
            }
            Event::Finished { text, reason, tokens } => {
                self.texts[text].finished = Some(reason);
                self.texts[text].tokens = tokens;
                text
            }
            // [`Hearing::next`] makes an error of it.
            Event::Failed(_) => 0,
        }
    }

    fn is_complete(&self) -> bool {
        self.texts.iter().all(|text| text.finished.is_some())
    }

    fn usage(&self) -> Value {
        let completion: usize = self.texts.iter().map(|text| text.tokens).sum();
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        })
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        let object = match self.kind {
            Kind::Completion => "text_completion",
            Kind::Chat => "chat.completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": format!("memory3-{}-g{}", env!("CARGO_PKG_VERSION"), self.generation),
            "memory3": {"generation": self.generation},
            "choices": choices,
        })
    }

    /// A text, or in a stream, with its `delta`, what is new of it.
    fn choice(&self, index: usize, delta: Option<Value>) -> Value {
        let Text { text, references, finished, .. } = &self.texts[index];
        let mut choice = json!({"index": index, "finish_reason": finished, "logprobs": null});
        match (self.kind, delta) {
            (Kind::Completion, _) => choice["text"] = json!(text),
            (Kind::Chat, None) => choice["message"] = json!({"role": "assistant", "content": text}),
            (Kind::Chat, Some(delta)) => choice["delta"] = delta,
        }
        if !references.is_empty() {
            let references: Vec<&References> = references.iter().map(|references| &**references).collect();
            choice["memory3"] = json!({"references": references});
        }
        choice
    }
}

/// An answer that goes out piece by piece.
struct Streaming {
    answer: Answer,
    hearing: Hearing,
    /// What goes out next.
    going: VecDeque<String>,
    is_over: bool,
}

impl Streaming {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.going.pop_front() {
                return Some(data);
            }
            if self.is_over {
                return None;
            }
            match self.hearing.next().await {
                Ok(event) => self.put(event),
                Err(refusal) => {
                    self.going.extend([refusal.to_json().to_string(), DONE.to_owned()]);
                    self.is_over = true;
                }
            }
        }
    }

    /// Turns an event into what goes out.
    fn put(&mut self, event: Event) {
        let waits = matches!(event, Event::References { .. });
        let index = self.answer.hear(event);
        if waits {
            return;
        }
        let text = &self.answer.texts[index];
        let mut delta = json!({});
        if !text.begun {
            delta["role"] = json!("assistant");
        }
        if !text.begun || !text.text.is_empty() {
            delta["content"] = json!(text.text);
        }
        let choice = self.answer.choice(index, Some(delta));
        self.send(vec![choice]);
        let text = &mut self.answer.texts[index];
        text.begun = true;
        text.text.clear();
        text.references.clear();
        if self.answer.is_complete() {
            self.is_over = true;
            if self.answer.include_usage {
                let mut object = self.answer.object(Vec::new());
                object["usage"] = self.answer.usage();
                self.send_object(object);
            }
            self.going.push_back(DONE.to_owned());
        }
    }

    fn send(&mut self, choices: Vec<Value>) {
        let mut object = self.answer.object(choices);
        if self.answer.include_usage {
            object["usage"] = Value::Null;
        }
        self.send_object(object);
    }

    fn send_object(&mut self, mut object: Value) {
        if self.answer.kind == Kind::Chat {
            object["object"] = json!("chat.completion.chunk");
        }
        self.going.push_back(object.to_string());
    }
}
