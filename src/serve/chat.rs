//! Chats become prompts, by the model's own template.
//!
//! In: the model's directory, messages. Out: one text. The template is `chat_template.jinja`, or `chat_template` of
//! tokenizer_config.json, and is rendered as the transformers library renders it. A model without one gets
//! `System: ...`, `User: ...` and `Assistant: ...`, a line each, and its text ends where it would write `User:` itself.
//! Tools and documents are not offered to templates, and what they print as JSON has its keys sorted.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// One message as it came, with its content as one text.
pub(super) type Message = serde_json::Map<String, Value>;

/// Why a model's template cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is damaged.
    #[error("{}: {source}; the file is damaged, fetch it again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where the parser stopped.
        #[source]
        source: serde_json::Error,
    },
    /// The template does not parse.
    #[error("{}: chat template: {source}; mend it, or remove it to use the plain form", path.display())]
    Syntax {
        /// Where it stands.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: Error,
    },
}

/// How a model's chats are written.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    /// `None`: the plain form.
    environment: Option<Environment<'static>>,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Reads the template of a model's directory.
    ///
    /// # Errors
    /// A file that is damaged, a template that does not parse.
    pub(super) fn from_dir(dir: &Path) -> Result<Self, TemplateError> {
        let path = dir.join("tokenizer_config.json");
        let config = match read(&path)? {
            Some(text) => {
                serde_json::from_str(&text).map_err(|source| TemplateError::Json { path: path.clone(), source })?
            }
            None => Value::Null,
        };
        let token = |name: &str| text_of(&config[name]).or(text_of(&config[name]["content"])).unwrap_or_default();
        let own_path = dir.join("chat_template.jinja");
        let (path, source) = match read(&own_path)? {
            Some(source) => (own_path, Some(source)),
            None => (path, template_of(&config["chat_template"])),
        };
        let environment = source.map(|source| environment(&source)).transpose();
        let environment = environment.map_err(|source| TemplateError::Syntax { path, source })?;
        Ok(Self { environment, bos_token: token("bos_token"), eos_token: token("eos_token") })
    }

    /// The prompt that lets the assistant answer.
    ///
    /// # Errors
    /// What the template says to these messages, or why it cannot be rendered.
    pub(super) fn render(&self, messages: &[Message]) -> Result<String, String> {
        let Some(environment) = &self.environment else { return plain(messages) };
        let rendered = environment.get_template(NAME).and_then(|template| {
            template.render(context! {
                messages => Serde(messages),
                tools => (),
                documents => (),
                add_generation_prompt => true,
                bos_token => &self.bos_token,
                eos_token => &self.eos_token,
            })
        });
        rendered.map_err(|error| match error.detail() {
            Some(detail) => format!("the model's chat template: {detail}"),
            None => format!("the model's chat template: {error}"),
        })
    }

    /// Where a text ends beside the model's own end: nowhere, if the model has a template.
    pub(super) fn stops(&self) -> Vec<String> {
        if self.environment.is_some() { Vec::new() } else { vec!["\nUser:".to_owned()] }
    }
}

fn read(path: &Path) -> Result<Option<String>, TemplateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TemplateError::File { path: path.to_owned(), source }),
    }
}

fn text_of(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// A template, or that named `default` of several.
fn template_of(value: &Value) -> Option<String> {
    let Value::Array(several) = value else { return text_of(value) };
    several.iter().find(|one| one["name"] == "default").and_then(|one| text_of(&one["template"]))
}

/// Jinja as the transformers library sets it up.
fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_function("raise_exception", |text: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_template_owned(NAME, without_generation_tags(source))?;
    Ok(environment)
}

fn strftime_now(format: String) -> Result<String, Error> {
    let mut text = String::new();
    let written = write!(text, "{}", chrono::Local::now().format(&format));
    written
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): no such format")))?;
    Ok(text)
}

/// As Python's `json.dumps`: nothing is escaped for HTML, and a space stands behind `,` and `:`.
fn tojson(Serde(value): Serde<Value>, arguments: Kwargs) -> Result<String, Error> {
    let failed = |error| Error::new(ErrorKind::InvalidOperation, "tojson").with_source(error);
    let indent: Option<usize> = arguments.get("indent")?;
    let _ascii: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let mut bytes = Vec::new();
    match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent];
            let formatter = PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)).map_err(failed)?,
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` and `{% endgeneration %}`, which mark answers for training, as comments: they trim white space alike.
fn without_generation_tags(source: &str) -> String {
    let (mut text, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}").map(|at| at + 2) else { break };
        let (before, tag) = (&rest[..start], &rest[start..start + length]);
        text += before;
        let inner = &tag[2..tag.len() - 2];
        let name = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        if ["generation", "endgeneration"].contains(&name) {
            let sign = |c: Option<char>| c.filter(|c| "-+".contains(*c)).map(String::from).unwrap_or_default();
            text += &format!("{{#{} {}#}}", sign(inner.chars().next()), sign(inner.chars().next_back()));
        } else {
            text += tag;
        }
        rest = &rest[start + length..];
    }
    text + rest
}

/// A line for each message, and the beginning of the next.
fn plain(messages: &[Message]) -> Result<String, String> {
    let mut text = String::new();
    for message in messages {
        let name = match message["role"].as_str() {
            Some("system" | "developer") => "System",
            Some("user") => "User",
            Some("assistant") => "Assistant",
            _ => return Err(format!("role {}: this model has system, user and assistant", message["role"])),
        };
        text += &format!("{name}: {}\n", message["content"].as_str().unwrap_or_default());
    }
    Ok(text + "Assistant:")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_fixture() -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve/chats.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn messages(value: &Value) -> Vec<Message> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn templates_are_rendered_as_transformers_renders_them() {
        let fixture = read_fixture();
        for case in fixture["cases"].as_array().unwrap() {
            let source = fixture["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
            let environment = Some(environment(source).unwrap());
            let template = ChatTemplate { environment, bos_token: "<s>".to_owned(), eos_token: "</s>".to_owned() };
            let found = template.render(&messages(&case["messages"]));
            match case["error"].as_str() {
                Some(error) => assert!(found.unwrap_err().ends_with(error)),
                None => assert_eq!(found.unwrap(), case["text"], "{} {}", case["template"], case["chat"]),
            }
        }
    }

    #[test]
    fn a_model_says_where_its_template_stands() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let chat = messages(&serde_json::json!([{"role": "user", "content": "Hi"}]));
        let rendered = || ChatTemplate::from_dir(folder.path()).unwrap().render(&chat).unwrap();
        assert_eq!(rendered(), "User: Hi\nAssistant:");
        write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}one"}"#);
        assert_eq!(rendered(), "<s>one");
        let several =
            r#"{"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]}"#;
        write("tokenizer_config.json", several);
        assert_eq!(rendered(), "two");
        write("chat_template.jinja", "three{{ strftime_now('%%') }}");
        assert_eq!(rendered(), "three%");
        write("chat_template.jinja", "{% if %}");
        let error = ChatTemplate::from_dir(folder.path()).unwrap_err().to_string();
        assert!(error.contains("chat_template.jinja: chat template: "), "{error}");
    }

    #[test]
    fn a_format_of_time_that_does_not_exist_is_an_error() {
        assert_eq!(strftime_now("%Y".to_owned()).unwrap().len(), 4);
        assert!(strftime_now("%!".to_owned()).is_err());
    }
}
