//! Every kind of damage is found by `verify` and named by what it is and where.

use std::path::{Path, PathBuf};

use memory3::bank::Shard;
use memory3::bank::layout::SectionKind;
use serde_json::Value;

use super::program::Program;

/// A fresh copy of a bank, without the catalog.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            if entry.file_name() != "catalog" {
                copy(&entry.path(), &target);
            }
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// Changes the manifest and its copy.
fn forge(bank: &Path, change: impl FnOnce(&mut Value)) {
    let path = bank.join("index/manifest.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    let bytes = serde_json::to_vec(&manifest).unwrap();
    std::fs::write(&path, &bytes).unwrap();
    let generation = manifest["generation"].as_u64().unwrap();
    std::fs::write(bank.join(format!("index/generations/{generation:06}.json")), bytes).unwrap();
}

fn manifest(bank: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(bank.join("index/manifest.json")).unwrap()).unwrap()
}

fn first_shard(bank: &Path) -> PathBuf {
    bank.join("shards/000001.m3s")
}

/// Two generations of the bank `name`.
fn make(program: &Program, name: &str, model: &str, more: &[&str]) -> PathBuf {
    for row in 0..40 {
        program.write(&format!("corpus/{row:02}.txt"), format!("Document {row} tells of lamp {}.", row * 7 % 11));
    }
    let _ = std::fs::remove_file(program.path().join("corpus/40.txt"));
    let args = ["corpus", "--codec", "PQ10x4", "--records-per-shard", "16", "--model", model];
    let encoder = super::program::tiny_encoder();
    for text in [None, Some("One more document, about a pier.")] {
        if let Some(text) = text {
            program.write("corpus/40.txt", text);
        }
        let fixed = ["compile", "--bank", name, "--quiet", "--embedder", encoder.to_str().unwrap()];
        program.run(&[&fixed[..], &args, more].concat()).expect(0);
    }
    program.path().join(name)
}

#[test]
fn each_kind_of_damage_is_named_and_no_two_alike() {
    type Damage = Box<dyn Fn(&Path)>;
    let program = Program::new();
    let corpus = super::program::repository().join("examples/corpus");
    let init =
        ["init-model", "--preset", "tiny", "--seed", "8", "--tokenizer-corpus", corpus.to_str().unwrap(), "other"];
    program.run(&init).expect(0);
    let whole = make(&program, "whole", "model", &[]);
    let codec = make(&program, "codec", "model", &["--codec-seed", "5"]);
    let model = make(&program, "model-bank", "other", &[]);

    let mut cases: Vec<(String, Damage, Vec<String>)> = Vec::new();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    for kind in SectionKind::ALL {
        let damage = move |bank: &Path| {
            let range = Shard::open(&first_shard(bank)).unwrap().section_range(kind);
            assert!(!range.is_empty(), "{}", kind.name());
            change(&first_shard(bank), |bytes| bytes[usize::try_from((range.start + range.end) / 2).unwrap()] ^= 1);
        };
        let name = format!("section {} ", kind.name());
        cases.push((name.clone(), Box::new(damage), vec!["000001.m3s".to_owned(), name]));
    }
    let mut case =
        |name: &str, damage: Damage, expected: &[&str]| cases.push((name.to_owned(), damage, words(expected)));
    case(
        "truncated shard",
        Box::new(|bank| change(&first_shard(bank), |bytes| bytes.truncate(bytes.len() - 9))),
        &["000001.m3s", "bytes long, the manifest says"],
    );
    case(
        "swapped records",
        Box::new(|bank| {
            let shard = Shard::open(&first_shard(bank)).unwrap();
            let [a, b] = [2, 3].map(|slot| usize::try_from(shard.record_offset(slot)).unwrap());
            change(&first_shard(bank), |bytes| {
                let (left, right) = bytes.split_at_mut(b);
                left[a..].swap_with_slice(&mut right[..b - a]);
            });
        }),
        &["record 1:2", "record id: expected 1:2, found 1:3"],
    );
    let (theirs, entry) = (codec.clone(), manifest(&codec)["codec"]["files"].clone());
    case(
        "wrong codec",
        Box::new(move |bank| {
            let file = entry["shared"]["file"].as_str().unwrap();
            std::fs::copy(theirs.join("index").join(file), bank.join("index").join(file)).unwrap();
            forge(bank, |manifest| manifest["codec"]["files"] = entry.clone());
        }),
        &["manifest.json", "the records were written with"],
    );
    let (theirs, entry) = (model.clone(), manifest(&model)["shards"][0].clone());
    case(
        "wrong model",
        Box::new(move |bank| {
            std::fs::copy(first_shard(&theirs), first_shard(bank)).unwrap();
            forge(bank, |manifest| manifest["shards"][0] = entry.clone());
        }),
        &["000001.m3s", "fingerprint: expected"],
    );
    let prefix = manifest(&whole)["prefix"]["file"].as_str().unwrap().to_owned();
    let expected = [prefix.as_str(), "missing (prefix)"].map(str::to_owned);
    let name = prefix.clone();
    cases.push((
        "missing file".to_owned(),
        Box::new(move |bank| std::fs::remove_file(bank.join("index").join(&name)).unwrap()),
        expected.to_vec(),
    ));
    let old: Value =
        serde_json::from_slice(&std::fs::read(whole.join("index/generations/000001.json")).unwrap()).unwrap();
    cases.push((
        "stale index".to_owned(),
        Box::new(move |bank| forge(bank, |manifest| manifest["retrieval"] = old["retrieval"].clone())),
        words(&["retrieval-", "no vector of record"]),
    ));
    cases.push((
        "manifest that differs from its copy".to_owned(),
        Box::new(|bank| change(&bank.join("index/manifest.json"), |bytes| bytes.push(b' '))),
        words(&["manifest.json", "differs from its copy"]),
    ));
    cases.push((
        "manifest path escape".to_owned(),
        Box::new(|bank| forge(bank, |manifest| manifest["shards"][0]["file"] = "../../corpus/00.txt".into())),
        words(&["manifest.json", "file name", "../../corpus/00.txt"]),
    ));
    cases.push((
        "bank from a newer version".to_owned(),
        Box::new(|bank| forge(bank, |manifest| manifest["version"] = 99.into())),
        words(&["manifest.json", "version 99", "install a newer memory3"]),
    ));

    let mut seen: Vec<(String, String)> = Vec::new();
    for (name, damage, expected) in &cases {
        let bank = program.path().join("damaged");
        let _ = std::fs::remove_dir_all(&bank);
        copy(&whole, &bank);
        program.run(&["verify", "--bank", "damaged"]).expect(0);
        damage(&bank);
        let run = program.run(&["verify", "--bank", "damaged"]);
        assert!(run.code > 0, "{name}: not found\n{}", run.stdout);
        let said = run.stdout + &run.stderr;
        let line = said.lines().find(|line| expected.iter().all(|word| line.contains(word)));
        let line = line.unwrap_or_else(|| panic!("{name}: no line with {expected:?} in\n{said}")).to_owned();
        for (other, before) in &seen {
            assert!(*before != line, "{name} and {other} are told alike: {line}");
        }
        seen.push((name.clone(), line));
    }
    assert!(seen.len() >= 20, "{}", seen.len());
}
