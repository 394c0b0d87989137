//! Fingerprints: what a bank's bytes depend on, as named values, and the one number that stands for them.
//!
//! Comes in: names and values. Goes out: an id, equal exactly if all names and values are. What always holds: the id
//! is the BLAKE3 of the canonical JSON (one object, keys in byte order, no white space, string values only). Which
//! fields there are is the pipeline's business.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Named values and their id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    fields: BTreeMap<String, String>,
}

/// A field in which two fingerprints differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDifference {
    /// Name of the field.
    pub name: String,
    /// Value in the bank, if it has the field.
    pub bank: Option<String>,
    /// Value asked for, if it has the field.
    pub asked: Option<String>,
}

impl fmt::Display for FieldDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<String>| value.as_ref().map_or_else(|| "none".to_owned(), |v| format!("{v:?}"));
        write!(f, "{} is {} in the bank and {} here", self.name, show(&self.bank), show(&self.asked))
    }
}

impl Fingerprint {
    /// A fingerprint without fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a field.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.set(name, value);
        self
    }

    /// Adds or replaces a field.
    pub fn set(&mut self, name: impl Into<String>, value: impl ToString) {
        self.fields.insert(name.into(), value.to_string());
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }

    /// The fields, in byte order of their names.
    pub fn fields(&self) -> &BTreeMap<String, String> {
        &self.fields
    }

    /// BLAKE3 of the canonical JSON.
    pub fn id(&self) -> [u8; 32] {
        *blake3::hash(self.canonical_json().as_bytes()).as_bytes()
    }

    /// The id in hexadecimal.
    pub fn id_hex(&self) -> String {
        blake3::Hash::from_bytes(self.id()).to_hex().to_string()
    }

    /// The fields of `self` (the bank) and `asked` that are not equal, in name order.
    pub fn differences(&self, asked: &Self) -> Vec<FieldDifference> {
        let names: std::collections::BTreeSet<_> = self.fields.keys().chain(asked.fields.keys()).collect();
        let mut differences = Vec::new();
        for name in names {
            let (bank, asked) = (self.fields.get(name), asked.fields.get(name));
            if bank != asked {
                differences.push(FieldDifference { name: name.clone(), bank: bank.cloned(), asked: asked.cloned() });
            }
        }
        differences
    }

    /// [`Fingerprint::differences`], with `part` and a dot in front of the names, for where two fingerprints are
    /// compared at once.
    pub fn differences_of(&self, part: &str, asked: &Self) -> Vec<FieldDifference> {
        let named = |found: FieldDifference| FieldDifference { name: format!("{part}.{}", found.name), ..found };
        self.differences(asked).into_iter().map(named).collect()
    }

    fn canonical_json(&self) -> String {
        // A map of strings always serializes; `Value` prints without a `Result`.
        let object = self.fields.iter().map(|(name, value)| {
            format!("{}:{}", serde_json::Value::from(name.as_str()), serde_json::Value::from(value.as_str()))
        });
        format!("{{{}}}", object.collect::<Vec<_>>().join(","))
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    id: String,
    fields: BTreeMap<String, String>,
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Stored { id: self.id_hex(), fields: self.fields.clone() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let stored = Stored::deserialize(deserializer)?;
        let fingerprint = Self { fields: stored.fields };
        if fingerprint.id_hex() == stored.id {
            Ok(fingerprint)
        } else {
            Err(serde::de::Error::custom(format!(
                "fingerprint id {} does not belong to its fields, whose id is {}",
                stored.id,
                fingerprint.id_hex()
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_the_blake3_of_the_canonical_json() {
        let fingerprint = Fingerprint::new().with("slots", 8).with("model", "a\"b").with("layers", "0,1");
        let json = r#"{"layers":"0,1","model":"a\"b","slots":"8"}"#;
        assert_eq!(fingerprint.id_hex(), blake3::hash(json.as_bytes()).to_hex().to_string());
        let value: BTreeMap<String, String> = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&value).unwrap(), json);
    }

    #[test]
    fn differences_name_the_field_and_both_values() {
        let bank = Fingerprint::new().with("slots", 8).with("model", "a").with("old", 1);
        let asked = Fingerprint::new().with("slots", 4).with("model", "a").with("new", 2);
        let text: Vec<_> = bank.differences(&asked).iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                r#"new is none in the bank and "2" here"#,
                r#"old is "1" in the bank and none here"#,
                r#"slots is "8" in the bank and "4" here"#
            ]
        );
        assert!(bank.differences(&bank).is_empty());
    }

    #[test]
    fn an_id_that_does_not_fit_its_fields_is_refused() {
        let fingerprint = Fingerprint::new().with("slots", 8);
        let json = serde_json::to_string(&fingerprint).unwrap();
        assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
        assert!(serde_json::from_str::<Fingerprint>(&json.replace("\"8\"", "\"9\"")).is_err());
    }
}
