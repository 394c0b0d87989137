//! JSONL: a document per line.
//!
//! In: lines of a plain, zstd or gzip file. Out: an entry for every line that is not blank. A line over the limit is
//! never held; a torn archive ends the file with one rejection behind the documents that came before. Of each object
//! only the two fields are kept, the rest is checked as JSON and dropped. Of a repeated key the last one counts.

use std::fmt;
use std::io::BufRead;
use std::path::PathBuf;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::entry::{Entry, RejectReason, Rejection, Source, finish};
use super::lines::{Line, LineReader};
use super::reader::CorpusOptions;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The documents of one JSONL file.
pub(super) struct JsonLines {
    lines: LineReader<Box<dyn BufRead + Send>>,
    path: PathBuf,
    limit: u64,
    ended: bool,
}

impl JsonLines {
    pub fn new(reader: Box<dyn BufRead + Send>, path: PathBuf, limit: u64) -> Self {
        Self { lines: LineReader::new(reader, limit), path, limit, ended: false }
    }

    /// The next document or rejection; `None` at the end of the file.
    pub fn next_entry(&mut self, options: &CorpusOptions) -> Option<Entry> {
        while !self.ended {
            let line = self.lines.read();
            let source = || Source { path: self.path.clone(), line: Some(self.lines.number()) };
            let reason = match line {
                Ok(Line::Kept) => {
                    let mut bytes = self.lines.bytes();
                    if self.lines.number() == 1 {
                        bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
                    }
                    if bytes.trim_ascii().is_empty() {
                        continue;
                    }
                    return Some(entry(source(), bytes, options));
                }
                Ok(Line::TooLong { bytes }) => RejectReason::TooLarge { bytes, limit: self.limit },
                Ok(Line::End) => break,
                Err(error) => {
                    self.ended = true;
                    RejectReason::Unreadable { cause: format!("the rest of the file is lost: {error}") }
                }
            };
            return Some(Entry::Rejected(Rejection { source: source(), id: None, reason }));
        }
        self.ended = true;
        None
    }
}

/// One line, judged.
fn entry(source: Source, bytes: &[u8], options: &CorpusOptions) -> Entry {
    let (id, reason) = match parse(bytes, options) {
        Err(reason) => (None, reason),
        Ok(Fields { id, text }) => {
            let id = id.into_id(&options.id_field);
            let text = text.into_text(&options.text_field);
            match (id, text) {
                (Ok(id), Ok(text)) => return finish(source, id, text),
                (Err(reason), _) => (None, reason),
                (Ok(id), Err(reason)) => (Some(id), reason),
            }
        }
    };
    Entry::Rejected(Rejection { source, id, reason })
}

fn parse(bytes: &[u8], options: &CorpusOptions) -> Result<Fields, RejectReason> {
    let text =
        std::str::from_utf8(bytes).map_err(|error| RejectReason::InvalidUtf8 { offset: error.valid_up_to() as u64 })?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let fields = FieldsSeed(options).deserialize(&mut deserializer);
    fields.and_then(|fields| deserializer.end().map(|()| fields)).map_err(|error| {
        // The place is in the column; the parser's own "at line 1" would contradict the source.
        let message = error.to_string();
        let cause = message.split(" at line ").next().unwrap_or_default().to_owned();
        RejectReason::InvalidJson { column: error.column() as u64, cause }
    })
}

/// The two fields that count.
struct Fields {
    id: Value,
    text: Value,
}

/// What stands in a field.
enum Value {
    Missing,
    String(String),
    Integer(String),
    Other(&'static str),
}

impl Value {
    fn into_id(self, field: &str) -> Result<String, RejectReason> {
        match self {
            Self::String(id) | Self::Integer(id) => Ok(id),
            other => Err(other.into_reason(field, "a string or an integer")),
        }
    }

    fn into_text(self, field: &str) -> Result<String, RejectReason> {
        match self {
            Self::String(text) => Ok(text),
            other => Err(other.into_reason(field, "a string")),
        }
    }

    fn into_reason(self, field: &str, expected: &'static str) -> RejectReason {
        let field = field.to_owned();
        let found = match self {
            Self::Missing => return RejectReason::MissingField { field },
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Other(found) => found,
        };
        RejectReason::WrongType { field, expected, found: found.to_owned() }
    }
}

struct FieldsSeed<'a>(&'a CorpusOptions);

impl<'de> DeserializeSeed<'de> for FieldsSeed<'_> {
    type Value = Fields;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Fields, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FieldsSeed<'_> {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields { id: Value::Missing, text: Value::Missing };
        while let Some(key) = map.next_key_seed(KeySeed(self.0))? {
            match key {
                Key::Id => fields.id = map.next_value_seed(ValueSeed)?,
                Key::Text => fields.text = map.next_value_seed(ValueSeed)?,
                Key::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(fields)
    }
}

enum Key {
    Id,
    Text,
    Other,
}

struct KeySeed<'a>(&'a CorpusOptions);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Key, E> {
        Ok(match key {
            key if key == self.0.id_field => Key::Id,
            key if key == self.0.text_field => Key::Text,
            _ => Key::Other,
        })
    }
}

struct ValueSeed;

impl<'de> DeserializeSeed<'de> for ValueSeed {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value.to_string()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(value.to_string()))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other("a number that is no 64-bit integer"))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Other("a boolean"))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Missing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an array"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an object"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn judge(line: &[u8]) -> Result<(String, String), (Option<String>, RejectReason)> {
        let source = Source { path: Path::new("x.jsonl").to_owned(), line: Some(1) };
        match entry(source, line, &CorpusOptions::default()) {
            Entry::Document(document) => Ok((document.id, document.text)),
            Entry::Rejected(rejection) => Err((rejection.id, rejection.reason)),
        }
    }

    #[test]
    fn ids_are_strings_or_integers_and_other_fields_do_not_matter() {
        let ok = |id: &str, text: &str| Ok((id.to_owned(), text.to_owned()));
        assert_eq!(judge(br#"{"id":"a","text":"b"}"#), ok("a", "b"));
        assert_eq!(judge(br#" {"x":[{"id":3}],"text":"\u4e16","id":-7} "#), ok("-7", "\u{4e16}"));
        assert_eq!(judge(br#"{"id":18446744073709551615,"te\u0078t":"b","y":null}"#), ok("18446744073709551615", "b"));
        assert_eq!(judge(br#"{"id":1,"id":"2","text":"b"}"#), ok("2", "b"));
        assert_eq!(judge("{\"id\":1,\"text\":\"a\\u0000b\\r\\n\"}\r".as_bytes()), ok("1", "a\0b\r\n"));
    }

    #[test]
    fn every_defect_of_a_line_has_its_reason() {
        let code = |line: &[u8]| judge(line).unwrap_err().1.code();
        assert_eq!(code(br#"{"text":"b"}"#), "missing-field");
        assert_eq!(code(br#"{"id":null,"text":"b"}"#), "missing-field");
        assert_eq!(code(br#"{"id":1.5,"text":"b"}"#), "wrong-type");
        assert_eq!(code(br#"{"id":18446744073709551616,"text":"b"}"#), "wrong-type");
        assert_eq!(code(br#"{"id":[1],"text":"b"}"#), "wrong-type");
        assert_eq!(code(br#"{"id":"","text":"b"}"#), "empty-id");
        assert_eq!(code(br#"[1,2]"#), "invalid-json");
        assert_eq!(code(br#"{"id":1,"text":"b"} x"#), "invalid-json");
        assert_eq!(code(br#"{"id":1,"text":"\ud800"}"#), "invalid-json");
        assert_eq!(code(br#"{"id":1,"text":"#), "invalid-json");
        assert_eq!(code(&[b"{\"id\":1,\"text\":", &[b'['; 10_000][..]].concat()), "invalid-json");
        assert_eq!(code(format!("{{\"id\":\"{}\",\"text\":\"b\"}}", "i".repeat(5000)).as_bytes()), "id-too-long");
        let (id, reason) = judge(br#"{"id":7,"text":12}"#).unwrap_err();
        assert_eq!(id.as_deref(), Some("7"));
        assert_eq!(reason.to_string(), "field \"text\" is an integer, expected a string");
        let (id, reason) = judge(br#"{"id":"e","text":" \n\u3000"}"#).unwrap_err();
        assert_eq!((id.as_deref(), reason), (Some("e"), RejectReason::Empty));
        let (_, reason) = judge(b"{\"id\":1,\"text\":\"a\xffb\"}").unwrap_err();
        assert_eq!(reason, RejectReason::InvalidUtf8 { offset: 17 });
        let (_, reason) = judge(b"{\"id\":1,,}").unwrap_err();
        assert_eq!(reason.to_string(), "not a JSON object: key must be a string at column 9");
    }
}
