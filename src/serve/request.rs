//! What clients send to `/v1/completions` and `/v1/chat/completions`, and what it means.
//!
//! In: a JSON body. Out: an [`Ask`], complete and within the server's limits, or a [`Refusal`] that names the field. Fields
//! that OpenAI has and this server does not do are refused where they would change the answer; fields that nobody knows are
//! passed over. What is ours stands in the field `memory3`.

use std::hash::{BuildHasher, RandomState};

use serde::Deserialize;
use serde_json::Value;

use super::chat::{ChatTemplate, Message};
use super::refusal::Refusal;
use crate::config::ServeConfig;
use crate::corpus::Chunker;
use crate::read::Sampling;

/// New tokens of a completion that does not say how many, as OpenAI has it.
const COMPLETION_TOKENS: usize = 16;
/// Stop strings of a request.
const MOST_STOPS: usize = 16;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Texts that go on.
    Completion,
    /// An answer to messages.
    Chat,
}

/// What a request is measured by.
#[derive(Clone, Copy)]
pub(super) struct Measure<'a> {
    pub(super) name: &'a str,
    pub(super) chunker: &'a Chunker,
    pub(super) template: &'a ChatTemplate,
    pub(super) vocabulary: usize,
    pub(super) config: &'a ServeConfig,
}

/// A request that can be met.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) prompts: Vec<Prompted>,
    /// Texts for each prompt.
    pub(super) choices: usize,
    pub(super) sampling: Sampling,
    pub(super) stops: Vec<String>,
    pub(super) ignore_eos: bool,
    /// Memories of a chunk; `None`: the plain model.
    pub(super) memories: Option<usize>,
    /// References come with query and text.
    pub(super) trace: bool,
    pub(super) stream: bool,
    /// A stream ends with the usage.
    pub(super) include_usage: bool,
}

/// A prompt, and how far it may go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prompted {
    /// Without BOS.
    pub(super) tokens: Vec<u32>,
    pub(super) max_tokens: usize,
}

#[derive(Debug, Deserialize)]
struct Request {
    model: Option<String>,
    prompt: Option<Prompt>,
    messages: Option<Vec<Message>>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    n: Option<usize>,
    stop: Option<Stop>,
    seed: Option<i64>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    ignore_eos: Option<bool>,
    memory3: Option<Extension>,
    #[serde(flatten)]
    others: Message,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "prompt: a text, texts, token ids, or lists of token ids")]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "stop: a text or texts")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// The field `memory3`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extension {
    memories: Option<usize>,
    no_memory: Option<bool>,
    trace: Option<bool>,
}

impl Ask {
    /// Texts that will grow together.
    pub(super) fn sequences(&self) -> usize {
        self.prompts.len() * self.choices
    }

    /// Reads a body. Tokenizes: not for the async threads.
    ///
    /// # Errors
    /// A body that is no request, a field that does not do, more than there is room for.
    pub(super) fn read(body: &[u8], kind: Kind, measure: Measure<'_>) -> Result<Self, Refusal> {
        let request: Request = serde_json::from_slice(body).map_err(|error| Refusal::body(error.to_string()))?;
        request.check_model(measure.name)?;
        request.refuse_others()?;
        let prompts = request.prompts(kind, measure)?;
        let choices = request.choices(prompts.len(), measure.config)?;
        let extension = request.memory3.as_ref();
        let memories = extension.and_then(|own| own.memories).unwrap_or(measure.config.memories);
        if memories > ServeConfig::MOST_MEMORIES {
            let message = format!("memory3.memories is {memories}; choose 0 to {}", ServeConfig::MOST_MEMORIES);
            return Err(Refusal::field("memory3", message));
        }
        let is_plain = extension.and_then(|own| own.no_memory).unwrap_or(false);
        let mut stops = request.stops()?;
        if kind == Kind::Chat {
            stops.extend(measure.template.stops());
        }
        Ok(Self {
            choices,
            sampling: request.sampling()?,
            stops,
            ignore_eos: request.ignore_eos.unwrap_or(false),
            memories: (!is_plain).then_some(memories),
            trace: extension.and_then(|own| own.trace).unwrap_or(false),
            stream: request.stream.unwrap_or(false),
            include_usage: request.stream_options.as_ref().is_some_and(|options| options.include_usage == Some(true)),
            prompts: request.with_room(prompts, kind, measure)?,
        })
    }
}

impl Request {
    fn check_model(&self, served: &str) -> Result<(), Refusal> {
        match &self.model {
            Some(asked) if asked != served => Err(Refusal::model(asked, served)),
            _ => Ok(()),
        }
    }

    /// Refuses what would change the answer and is not done here.
    fn refuse_others(&self) -> Result<(), Refusal> {
        let given = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(text) => !text.is_empty(),
            Value::Array(values) => !values.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            Value::Bool(true) => true,
        };
        let is_asked = |name: &str, value: &Value| match name {
            // 0 alternatives is still the log probability of the token.
            "logprobs" => !matches!(value, Value::Null | Value::Bool(false)),
            "response_format" => given(value) && value["type"] != "text",
            "best_of" => value.as_u64().is_none_or(|best| best > self.n.unwrap_or(1) as u64) && given(value),
            _ => given(value),
        };
        const REFUSED: [&str; 13] = [
            "logprobs",
            "top_logprobs",
            "echo",
            "suffix",
            "best_of",
            "logit_bias",
            "presence_penalty",
            "frequency_penalty",
            "tools",
            "functions",
            "response_format",
            "audio",
            "web_search_options",
        ];
        for name in REFUSED {
            if self.others.get(name).is_some_and(|value| is_asked(name, value)) {
                return Err(Refusal::field(name, format!("{name}: this server does not do that; leave it out")));
            }
        }
        Ok(())
    }

    /// The prompts' tokens, without BOS.
    fn prompts(&self, kind: Kind, measure: Measure<'_>) -> Result<Vec<Vec<u32>>, Refusal> {
        let Measure { chunker, .. } = measure;
        if kind == Kind::Chat {
            let messages = self.messages.as_deref().unwrap_or_default();
            if messages.is_empty() {
                return Err(Refusal::field("messages", "messages: there are none"));
            }
            let messages: Vec<Message> = messages.iter().map(with_text).collect::<Result<_, _>>()?;
            let text = measure.template.render(&messages).map_err(|error| Refusal::field("messages", error))?;
            let mut tokens = tokens_of(chunker, &text, "messages")?;
            // Many templates begin with BOS, which stands in front of every prompt anyway.
            if chunker.bos().is_some() && tokens.first().copied() == chunker.bos() {
                tokens.remove(0);
            }
            return Ok(vec![tokens]);
        }
        let text = |text: &String| tokens_of(chunker, text, "prompt");
        let prompts = match &self.prompt {
            None => Err(Refusal::field("prompt", "prompt: there is none")),
            Some(Prompt::Text(one)) => Ok(vec![text(one)?]),
            Some(Prompt::Texts(several)) => several.iter().map(text).collect(),
            Some(Prompt::Tokens(tokens)) => Ok(vec![tokens.clone()]),
            Some(Prompt::Lists(lists)) => Ok(lists.clone()),
        }?;
        let mut tokens = prompts.iter().flatten();
        if let Some(outside) = tokens.find(|token| **token as usize >= measure.vocabulary) {
            let message = format!("prompt: token {outside}; the model has {} of them", measure.vocabulary);
            return Err(Refusal::field("prompt", message));
        }
        if prompts.is_empty() || (chunker.bos().is_none() && prompts.iter().any(Vec::is_empty)) {
            return Err(Refusal::field("prompt", "prompt: nothing to go on from"));
        }
        Ok(prompts)
    }

    fn choices(&self, prompts: usize, config: &ServeConfig) -> Result<usize, Refusal> {
        let choices = self.n.unwrap_or(1);
        if choices == 0 {
            return Err(Refusal::field("n", "n is 0; choose 1 or more"));
        }
        if prompts.checked_mul(choices).is_none_or(|texts| texts > config.max_sequences) {
            let message = format!("{prompts} prompts times n = {choices}: at most {} texts", config.max_sequences);
            return Err(Refusal::field("n", message));
        }
        Ok(choices)
    }

    fn sampling(&self) -> Result<Sampling, Refusal> {
        let within = |value: Option<f64>, most: f64, name: &'static str| match value.unwrap_or(1.0) {
            value if (0.0..=most).contains(&value) => Ok(value),
            value => Err(Refusal::field(name, format!("{name} is {value}; choose 0 to {most}"))),
        };
        Ok(Sampling {
            temperature: within(self.temperature, 2.0, "temperature")?,
            top_p: within(self.top_p, 1.0, "top_p")?,
            top_k: self.top_k.unwrap_or(0),
            // A hasher's keys come from the system's random numbers.
            seed: self.seed.map_or_else(|| RandomState::new().hash_one(0), i64::cast_unsigned),
        })
    }

    fn stops(&self) -> Result<Vec<String>, Refusal> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(one)) => vec![one.clone()],
            Some(Stop::Several(several)) => several.clone(),
        };
        if stops.len() > MOST_STOPS {
            return Err(Refusal::field("stop", format!("stop: {} texts; at most {MOST_STOPS}", stops.len())));
        }
        Ok(stops)
    }

    /// How far each prompt may go on.
    fn with_room(&self, prompts: Vec<Vec<u32>>, kind: Kind, measure: Measure<'_>) -> Result<Vec<Prompted>, Refusal> {
        let Measure { config, chunker, .. } = measure;
        let (field, asked) = match (self.max_completion_tokens, self.max_tokens) {
            (Some(tokens), _) => ("max_completion_tokens", Some(tokens)),
            (None, tokens) => ("max_tokens", tokens),
        };
        if let Some(tokens) = asked.filter(|tokens| !(1..=config.max_tokens).contains(tokens)) {
            return Err(Refusal::field(field, format!("{field} is {tokens}; choose 1 to {}", config.max_tokens)));
        }
        let bos = usize::from(chunker.bos().is_some());
        let with_room = |tokens: Vec<u32>| {
            let room = config.max_context.saturating_sub(bos + tokens.len());
            let wanted = asked.unwrap_or(1);
            if wanted > room {
                let message = format!(
                    "the prompt has {} tokens, and {wanted} more are asked for; this server has room for {} in all",
                    bos + tokens.len(),
                    config.max_context
                );
                return Err(Refusal::too_long(if kind == Kind::Chat { "messages" } else { "prompt" }, message));
            }
            let most = if kind == Kind::Chat { config.max_tokens } else { COMPLETION_TOKENS.min(config.max_tokens) };
            Ok(Prompted { max_tokens: asked.unwrap_or(most).min(room), tokens })
        };
        prompts.into_iter().map(with_room).collect()
    }
}

fn tokens_of(chunker: &Chunker, text: &str, field: &'static str) -> Result<Vec<u32>, Refusal> {
    chunker.tokens(text).map_err(|error| Refusal::field(field, error.to_string()))
}

/// The message with its content as one text.
fn with_text(message: &Message) -> Result<Message, Refusal> {
    let refused = |what: &str| Err(Refusal::field("messages", format!("messages: {what}")));
    if !message.get("role").is_some_and(Value::is_string) {
        return refused("each has a role, a text");
    }
    let text = match message.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts: Option<Vec<&str>> =
                parts.iter().map(|part| part["text"].as_str().filter(|_| part["type"] == "text")).collect();
            match texts {
                Some(texts) => texts.join("\n"),
                None => return refused("this model reads text; leave other parts out"),
            }
        }
        Some(_) => return refused("content is a text, or a list of parts"),
    };
    let mut message = message.clone();
    message.insert("content".to_owned(), Value::String(text));
    Ok(message)
}
