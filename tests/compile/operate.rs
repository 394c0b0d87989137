//! A bank over its years, through the binary: verbs that need no model, settings that differ, events and metrics, two
//! writers at once.

use std::path::Path;

use memory3::pipeline::{self, Mode, Progress, RunFiles, StopFlag, Task};
use serde_json::Value;

use super::program::{Program, repository, tiny_encoder};

const NONE: [&str; 5] = ["corpus", "--codec", "none", "--records-per-shard", "8"];

/// A bank of forty short documents.
fn bank(program: &Program, args: &[&str]) -> Value {
    for row in 0..40 {
        program.write(&format!("corpus/{row:02}.txt"), format!("Document {row} tells of lamp {}.", row * 7 % 11));
    }
    program.compile("bank", args).expect(0).json()
}

fn json(program: &Program, args: &[&str]) -> Value {
    program.run(&[args, &["--bank", "bank", "--json"]].concat()).expect(0).json()
}

#[test]
fn remove_compact_generations_and_rollback_go_together() {
    let program = Program::new();
    bank(&program, &NONE);
    program.write("gone.txt", (0..30).map(|row| format!("{row:02}.txt\n")).collect::<String>());
    let unknown = program.run(&["remove", "00.txt", "nobody.txt", "--bank", "bank"]).expect(2);
    assert!(unknown.stderr.contains("nobody.txt") && !unknown.stderr.contains("00.txt"), "{}", unknown.stderr);
    let many = program.run(&["remove", "--ids", "gone.txt", "--bank", "bank"]).expect(2);
    assert!(many.stderr.contains("30 of 40") && many.stderr.contains("--allow-shrink"), "{}", many.stderr);
    let removed = json(&program, &["remove", "--ids", "gone.txt", "nobody.txt", "--ignore-missing", "--allow-shrink"]);
    assert_eq!(
        (&removed["removed"], &removed["generation"], &removed["documents"]),
        (&30.into(), &2.into(), &10.into())
    );
    let hits = json(&program, &["search", "lamp", "-k", "99", "--embedder", tiny_encoder().to_str().unwrap()]);
    assert_eq!(hits["hits"].as_array().unwrap().len(), 10);

    let planned = json(&program, &["compact", "--dry-run"]);
    assert_eq!(planned["generation"], Value::Null);
    let told = program.run(&["compact", "--dry-run", "--bank", "bank"]).expect(0);
    assert!(told.stdout.contains("shard 1: 0 of 8 records live") && told.stdout.contains(", small"), "{}", told.stdout);
    let narrow = json(&program, &["compact", "--dry-run", "--records-per-shard", "8"]);
    assert_eq!(narrow["shards"].as_array().unwrap().len(), planned["shards"].as_array().unwrap().len() - 1, "{narrow}");
    let done = json(&program, &["compact"]);
    assert_eq!((&done["shards"], &done["generation"]), (&planned["shards"], &3.into()));
    assert!(done["bytes_after"].as_u64() < done["bytes_before"].as_u64(), "{done}");
    program.run(&["verify", "--bank", "bank"]).expect(0);

    let listed = json(&program, &["generations"]);
    let of = |field: &str| listed.as_array().unwrap().iter().map(|one| one[field].clone()).collect::<Vec<_>>();
    assert_eq!(of("documents"), [40, 10, 10].map(Value::from));
    assert_eq!(of("current"), [false, false, true].map(Value::from));
    assert!(of("unix_time").iter().all(Value::is_u64), "{listed}");
    let text = program.run(&["generations", "--bank", "bank"]).expect(0).stdout;
    assert!(text.contains("documents -30") && text.contains('*'), "{text}");

    let back = json(&program, &["rollback", "1"]);
    assert_eq!((&back["restored"], &back["generation"], &back["documents"]), (&1.into(), &4.into(), &40.into()));
    program.run(&["verify", "--bank", "bank"]).expect(0);
    // A compile after a rollback: everything is there, so nothing is done.
    let report = program.compile("bank", &NONE).expect(0).json();
    assert_eq!((&report["chunks"]["encoded"], &report["bank"]["generation"]), (&0.into(), &4.into()), "{report}");
    let last = program.run(&["rollback", "77", "--bank", "bank"]).expect(2);
    assert!(last.stderr.contains("1, 2, 3, 4"), "{}", last.stderr);
}

#[test]
fn repair_through_the_binary_drops_what_is_damaged_and_compile_brings_it_back() {
    let program = Program::new();
    bank(&program, &NONE);
    let path = program.path().join("bank/shards/000002.m3s");
    let shard = memory3::bank::Shard::open(&path).unwrap();
    let at = usize::try_from(shard.record_offset(3)).unwrap() + 100;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    // Damage never comes out as data.
    let show = program.run(&["show", "2:3", "--bank", "bank", "--model", "model"]).expect(2);
    assert!(show.stderr.contains("record checksum"), "{}", show.stderr);
    let found = program.run(&["repair", "--bank", "bank"]).expect(1);
    assert!(found.stdout.contains("000002.m3s") && found.stdout.contains("--drop-damaged"), "{}", found.stdout);
    let dropped = json(&program, &["repair", "--drop-damaged"]);
    assert_eq!((&dropped["dropped"], &dropped["generation"]), (&true.into(), &2.into()), "{dropped}");
    assert_eq!(dropped["documents"].as_array().unwrap().len(), 1, "{dropped}");
    program.run(&["verify", "--bank", "bank"]).expect(0);
    let report = program.compile("bank", &NONE).expect(0).json();
    assert_eq!((&report["plan"]["new"], &report["chunks"]["encoded"]), (&1.into(), &1.into()), "{report}");
    std::fs::remove_file(program.path().join("bank/index/manifest.json")).unwrap();
    let lost = program.compile("bank", &NONE).expect(2);
    assert!(lost.stderr.contains("memory3 repair"), "{}", lost.stderr);
    let mended = program.run(&["repair", "--bank", "bank"]).expect(0);
    assert!(mended.stdout.contains("generation 3"), "{}", mended.stdout);
    program.run(&["verify", "--bank", "bank"]).expect(0);
}

#[test]
fn verify_encodes_a_sample_again() {
    let program = Program::new();
    bank(&program, &["corpus", "--codec", "PQ10x4"]);
    let all = json(&program, &["verify", "--reencode", "100%", "--model", "model"]);
    assert_eq!((&all["reencoded"], &all["clean"]), (&all["records"], &true.into()), "{all}");
    let some = json(&program, &["verify", "--reencode", "0.000001", "--model", "model"]);
    assert_eq!(some["reencoded"], 1, "at least one: {some}");
    program.run(&["verify", "--reencode", "7", "--bank", "bank"]).expect(2);
    forge_code(&program.path().join("bank/shards/000001.m3s"));
    let found = program.run(&["verify", "--reencode", "100%", "--model", "model", "--bank", "bank"]).expect(1);
    assert!(
        found.stdout.contains("record 1:2: encoded again, 0 heads") && found.stdout.contains("1 vectors"),
        "{}",
        found.stdout
    );
}

/// Another code in a record, with a record checksum that is right.
fn forge_code(path: &Path) {
    let shard = memory3::bank::Shard::open(path).unwrap();
    let (layout, at) = (*shard.layout(), usize::try_from(shard.record_offset(2)).unwrap());
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at + layout.codes_at] ^= 1;
    let crc = crc32(&bytes[at + 4..at + layout.stride]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

/// CRC-32 of IEEE, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    };
    !bytes.iter().fold(!0, step)
}

/// Flips a bit of a weight: the lowest of the tensor's first number, in bf16 and in f32 its sign and exponent stay.
fn change_weight(model: &Path, tensor: &str) {
    let path = model.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let start = header[tensor]["data_offsets"][0].as_u64().unwrap_or_else(|| panic!("{tensor} in {header}"));
    bytes[8 + length + usize::try_from(start).unwrap()] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

fn copy_model(program: &Program, name: &str) -> std::path::PathBuf {
    let to = program.path().join(name);
    std::fs::create_dir(&to).unwrap();
    for entry in std::fs::read_dir(program.path().join("model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to
}

#[test]
fn other_settings_are_refused_by_compile_and_append_and_named() {
    let program = Program::new();
    bank(&program, &NONE);
    let weight = copy_model(&program, "weight");
    change_weight(&weight, "model.layers.0.self_attn.q_proj.weight");
    let rope = copy_model(&program, "rope");
    edit_json(&rope.join("config.json"), |config| config["rope_theta"] = 20_000.0.into());
    let tokenizer = copy_model(&program, "tokenizer");
    edit_json(&tokenizer.join("tokenizer.json"), |json| {
        json["model"]["merges"].as_array_mut().unwrap().pop();
    });
    let cases: [(&[&str], &str); 6] = [
        (&["--model", "weight"], "weights"),
        (&["--model", "rope"], "rope"),
        (&["--model", "tokenizer"], "tokenizer"),
        (&["--chunk-tokens", "64"], "chunk_tokens"),
        (&["--codec", "PQ10x4"], "codec"),
        (&["--tokens-per-head", "4"], "slots"),
    ];
    let encoder = tiny_encoder();
    for (changed, field) in cases {
        for verb in ["compile", "append"] {
            let mut args = vec![verb, "corpus", "--bank", "bank", "--embedder", encoder.to_str().unwrap()];
            if !changed.contains(&"--model") {
                args.extend(["--model", "model"]);
            }
            if !changed.contains(&"--codec") {
                args.extend(["--codec", "none"]);
            }
            args.extend(changed);
            let refused = program.run(&args).expect(2);
            assert!(refused.stderr.contains(field), "{verb} {changed:?}: {}", refused.stderr);
        }
    }
    for verb in ["show", "verify"] {
        let args: &[&str] = if verb == "show" { &["show", "1:0"] } else { &["verify", "--reencode", "1%"] };
        let refused = program.run(&[args, &["--bank", "bank", "--model", "tokenizer"]].concat()).expect(2);
        assert!(refused.stderr.contains("tokenizer"), "{verb}: {}", refused.stderr);
    }
    assert_eq!(memory3::bank::Manifest::read(&program.path().join("bank")).unwrap().generation, 1);

    // What lies above the memory layers does not matter for writing.
    let above = copy_model(&program, "above");
    change_weight(&above, "model.layers.3.self_attn.q_proj.weight");
    program.write("corpus/new.txt", "A new document about a rope.");
    let args = ["compile", "corpus", "--bank", "bank", "--model", "above", "--codec", "none", "--json", "--embedder"];
    let report = program.run(&[&args[..], &[encoder.to_str().unwrap()]].concat()).expect(0).json();
    assert_eq!((&report["chunks"]["encoded"], &report["bank"]["generation"]), (&1.into(), &2.into()));
}

#[test]
fn another_text_encoder_is_refused_until_the_vectors_are_made_anew() {
    let program = Program::new();
    bank(&program, &NONE);
    let other = repository().join("tests/fixtures/embed/tiny-xlmr");
    let other = other.to_str().unwrap();
    let args = |more: &[&'static str]| -> Vec<String> {
        let args = ["compile", "--model", "model", "--bank", "bank", "--embedder", other, "--json"];
        args.iter().chain(&NONE).chain(more).map(|arg| (*arg).to_owned()).collect()
    };
    let run = |more: &[&'static str]| {
        let args = args(more);
        program.run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let refused = run(&[]).expect(2);
    assert!(refused.stderr.contains("--re-embed") && refused.stderr.contains("weights"), "{}", refused.stderr);
    let before = memory3::bank::Bank::open(&program.path().join("bank")).unwrap();
    program.write("corpus/new.txt", "A new document about a bell.");
    let report = run(&["--re-embed"]).expect(0).json();
    assert_eq!((&report["chunks"]["encoded"], &report["bank"]["generation"]), (&1.into(), &3.into()), "{report}");
    let after = memory3::bank::Bank::open(&program.path().join("bank")).unwrap();
    let codes = |bank: &memory3::bank::Bank| {
        let records = bank.record_ids().map(|id| bank.record(id).unwrap());
        records.map(|record| (record.content.0, record.codes.to_vec())).collect::<std::collections::BTreeMap<_, _>>()
    };
    let (before, after) = (codes(&before), codes(&after));
    assert!(before.iter().all(|(content, codes)| after.get(content) == Some(codes)));
    assert_eq!(after.len(), before.len() + 1);
    program.run(&["verify", "--bank", "bank"]).expect(0);
    program.run(&["search", "bell", "--bank", "bank", "--embedder", other]).expect(0);
    let old =
        program.run(&["search", "bell", "--bank", "bank", "--embedder", tiny_encoder().to_str().unwrap()]).expect(2);
    assert!(old.stderr.contains("embedder"), "{}", old.stderr);
    assert_eq!(run(&["--re-embed"]).expect(0).json()["bank"]["generation"], 3, "there is nothing more to do");
}

#[test]
fn re_embedding_says_what_it_has_published_when_the_rest_is_refused_and_stops_when_asked_to() {
    let program = Program::new();
    bank(&program, &NONE);
    let other = repository().join("tests/fixtures/embed/tiny-xlmr");
    let folder = program.path().join("bank");
    let before = super::program::published_files(&folder);

    let mut config = memory3::config::Config::default();
    config.corpus.inputs = vec![program.path().join("corpus").to_string_lossy().into_owned()];
    (config.model.path, config.embedder.path) = (program.path().join("model"), other.clone());
    (config.bank.path, config.codec.spec) = (folder.clone(), "none".to_owned());
    let (task, stop) = (Task { mode: Mode::Match, dry_run: false, re_embed: true }, StopFlag::default());
    stop.stop();
    let ledger = program.path().join("ledger.jsonl");
    let files = RunFiles { ledger: &ledger, plan: None };
    let report = pipeline::compile(&config, task, files, &Progress::default(), &stop).unwrap();
    assert!(report.stopped && report.re_embedded.is_none(), "{report:?}");
    assert!(before == super::program::published_files(&folder));

    (10..40).for_each(|row| std::fs::remove_file(program.path().join(format!("corpus/{row}.txt"))).unwrap());
    let args = ["compile", "--model", "model", "--bank", "bank", "--re-embed", "--embedder", other.to_str().unwrap()];
    let refused = program.run(&[&args[..], &NONE].concat()).expect(2);
    for word in ["published as generation 2", "30 of 40", "no document was changed"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    let manifest = memory3::bank::Manifest::read(&folder).unwrap();
    assert_eq!((manifest.generation, manifest.counts.documents), (2, 40));
    let encoder = memory3::embed::open(&other, memory3::model::Device::Cpu, memory3::model::DType::F32).unwrap();
    assert_eq!(&manifest.embedder, encoder.fingerprint());
}

#[test]
fn a_damaged_draft_stops_a_compile_until_it_is_put_aside() {
    let program = Program::new();
    for row in 0..300 {
        program.write(&format!("corpus/{row:03}.txt"), format!("Document {row} tells of lamp {}.", row * 7 % 101));
    }
    let args = [&NONE[..], &["--batch-chunks", "4"]].concat();
    program.kill_after_a_shard("bank", &args);
    std::fs::write(program.path().join("bank/index/draft.json"), "{\"format\":").unwrap();
    let refused = program.compile("bank", &args).expect(2);
    assert!(refused.stderr.contains("draft.json") && refused.stderr.contains("memory3 repair"), "{}", refused.stderr);
    let mended = program.run(&["repair", "--bank", "bank"]).expect(0);
    assert!(mended.stdout.contains("draft.json.aside") && mended.stdout.contains("begins anew"), "{}", mended.stdout);
    assert!(program.path().join("bank/shards/000001.m3s.aside").exists());
    program.compile("bank", &args).expect(0);
    program.run(&["verify", "--bank", "bank"]).expect(0);
}

#[test]
fn events_and_metrics_tell_how_a_run_went() {
    let program = Program::new();
    let args = [&NONE[..], &["--events", "events.jsonl", "--metrics", "memory3.prom"]].concat();
    bank(&program, &args);
    let events = || -> Vec<Value> {
        let text = std::fs::read_to_string(program.path().join("events.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let told = events();
    let names: Vec<&str> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!((names[0], names[names.len() - 2], names[names.len() - 1]), ("started", "published", "finished"));
    assert!(names.contains(&"plan") && names.contains(&"phase"), "{names:?}");
    assert!(told.iter().all(|event| event["time"].as_f64().unwrap() > 1e9));
    assert_eq!(told.iter().find(|event| event["event"] == "plan").unwrap()["plan"]["new"], 40);
    let metrics = || std::fs::read_to_string(program.path().join("memory3.prom")).unwrap();
    for line in ["memory3_run_exit_code 0", "memory3_bank_generation 1", "memory3_run_documents{state=\"compiled\"} 40"]
    {
        assert!(metrics().lines().any(|found| found == line), "{line} is missing:\n{}", metrics());
    }
    (10..40).for_each(|row| std::fs::remove_file(program.path().join(format!("corpus/{row}.txt"))).unwrap());
    program.compile("bank", &args).expect(2);
    let told = events();
    let last = told.last().unwrap();
    assert_eq!((&last["event"], &last["exit_code"]), (&"failed".into(), &2.into()), "{last}");
    assert!(last["error"].as_str().unwrap().contains("30 of 40"), "{last}");
    assert!(metrics().lines().any(|line| line == "memory3_run_exit_code 2"), "{}", metrics());

    // What fails before there is a run to speak of is told too, and what was published stays in the metrics.
    let value =
        |name: &str| metrics().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<f64>().ok());
    let success = value("memory3_run_last_success_timestamp_seconds");
    assert!(success.is_some_and(|time| time < value("memory3_run_end_timestamp_seconds").unwrap()), "{}", metrics());
    program.write("bad.toml", "[bank]\nmax_shrink = 7\n");
    program.write("file", "no folder");
    let lock = memory3::bank::BankLock::acquire(&program.path().join("bank")).unwrap();
    let cases: [(&str, &[&str], &str); 6] = [
        ("compile", &["--max-change", "7"], "bank.max_change"),
        ("compile", &["--config", "bad.toml"], "bank.max_shrink"),
        ("compile", &["--config", "nowhere.toml"], "nowhere.toml"),
        ("compile", &["--report", "file/report.json"], "--report"),
        ("compile", &[], "is being written by"),
        ("append", &[], "is being written by"),
    ];
    for (verb, more, why) in cases {
        let before = events().len();
        let refused = program.compile_verb(verb, "bank", &[&args[..], more].concat()).expect(2);
        let told = events().split_off(before);
        let last = told.last().unwrap_or_else(|| panic!("{more:?}: {}", refused.stderr));
        assert_eq!((&told[0]["event"], &told[0]["bank"]), (&"started".into(), &"bank".into()), "{more:?}");
        assert_eq!((&last["event"], &last["exit_code"]), (&"failed".into(), &2.into()), "{last}");
        assert!(last["error"].as_str().unwrap().contains(why), "{more:?}: {last}");
        assert_eq!(value("memory3_run_exit_code"), Some(2.0));
        assert_eq!(value("memory3_run_last_success_timestamp_seconds"), success, "{more:?}");
        assert_eq!((value("memory3_bank_generation"), value("memory3_bank_records")), (Some(1.0), Some(40.0)));
        assert_eq!(metrics().matches("# TYPE memory3_bank_records").count(), 1, "{}", metrics());
    }
    drop(lock);
    let twice = [&args[..], &["--model", "no-model"]].concat();
    let missing: Vec<&str> = ["compile", "--bank", "bank", "--embedder", "nowhere"].into_iter().chain(twice).collect();
    program.run(&missing).expect(2);
    assert!(events().last().unwrap()["error"].as_str().unwrap().contains("no-model"));
    assert_eq!(value("memory3_run_last_success_timestamp_seconds"), success);
}

#[test]
fn verbs_that_change_a_bank_refuse_settings_out_of_range() {
    let program = Program::new();
    bank(&program, &NONE);
    program.write("pipeline.toml", "[bank]\nkeep_generations = 0\n");
    for verb in [&["remove", "00.txt"][..], &["compact"], &["rollback"], &["repair"]] {
        let refused = program.run(&[verb, &["--bank", "bank"]].concat()).expect(2);
        assert!(refused.stderr.contains("bank.keep_generations is 0"), "{verb:?}: {}", refused.stderr);
    }
}

#[test]
fn of_two_writers_one_is_told_who_the_other_is() {
    let program = Program::new();
    bank(&program, &NONE);
    let lock = memory3::bank::BankLock::acquire(&program.path().join("bank")).unwrap();
    let pid = format!("process {}", std::process::id());
    program.write("corpus/new.txt", "A new document.");
    let refused = program.compile("bank", &NONE).expect(2);
    assert!(refused.stderr.contains(&pid), "{}", refused.stderr);
    for verb in [&["remove", "00.txt"][..], &["compact"], &["rollback"], &["repair"]] {
        let refused = program.run(&[verb, &["--bank", "bank"]].concat()).expect(2);
        assert!(refused.stderr.contains(&pid), "{verb:?}: {}", refused.stderr);
    }
    // Readers need no lock.
    for verb in
        [&["search", "lamp", "--embedder", tiny_encoder().to_str().unwrap()][..], &["inspect"], &["generations"]]
    {
        program.run(&[verb, &["--bank", "bank"]].concat()).expect(0);
    }
    drop(lock);
    program.compile("bank", &NONE).expect(0);
}

#[cfg(unix)]
#[test]
fn a_bank_is_read_through_a_link_and_reading_leaves_no_trace() {
    let program = Program::new();
    bank(&program, &NONE);
    std::os::unix::fs::symlink(program.path().join("bank"), program.path().join("link")).unwrap();
    let before = super::program::published_files(&program.path().join("bank"));
    let encoder = tiny_encoder();
    program.run(&["search", "lamp", "--bank", "link", "--embedder", encoder.to_str().unwrap()]).expect(0);
    program.run(&["show", "1:0", "--bank", "link", "--model", "model"]).expect(0);
    program.run(&["inspect", "--bank", "link"]).expect(0);
    program.run(&["verify", "--no-catalog", "--bank", "link"]).expect(0);
    assert!(before == super::program::published_files(&program.path().join("bank")));
    // A name in a manifest leads to no other folder.
    let path = program.path().join("bank/index/manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("000001.m3s", "../../corpus/00.txt", 1)).unwrap();
    let refused = program.run(&["inspect", "--bank", "bank"]).expect(2);
    assert!(refused.stderr.contains("file name") && refused.stderr.contains("../../corpus"), "{}", refused.stderr);
}
