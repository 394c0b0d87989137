//! A bank follows its corpus: what is new or changed is encoded, what has vanished dies, a broken input removes nothing.

use serde_json::Value;

use super::program::{Program, published_files};

/// Rows of a corpus: id and text.
type Rows = Vec<(String, String)>;

fn rows(count: usize) -> Rows {
    let words = ["ferry", "island", "storm", "harbour", "lamp", "keeper", "rope", "winter", "bell", "tide"];
    let text = |row: usize| {
        let words: Vec<&str> = (0..30 + row % 150).map(|i| words[(i * (row % 90 + 3) + i / 7) % 10]).collect();
        format!("{} {}.", row % 90, words.join(" "))
    };
    (0..count).map(|row| (format!("doc-{row}"), text(row))).collect()
}

fn write(program: &Program, rows: &Rows) {
    let line = |(id, text): &(String, String)| serde_json::json!({"id": id, "text": text}).to_string() + "\n";
    program.write("corpus/rows.jsonl", rows.iter().map(line).collect::<String>());
}

const ARGS: [&str; 5] = ["corpus", "--codec", "none", "--records-per-shard", "32"];

/// Ids of the documents that a search of everything names, sorted.
fn documents(program: &Program, bank: &str) -> Vec<(String, String)> {
    let bank = memory3::bank::Bank::open(&program.path().join(bank)).unwrap();
    let mut found = Vec::new();
    for shard in bank.shards() {
        for row in 0..shard.documents() {
            let place = memory3::bank::RowId { shard: shard.number(), row };
            if !bank.is_dead(place) {
                let row = bank.document(place).unwrap();
                let text = row.chunks().map(|chunk| bank.record(chunk.record).unwrap().text().unwrap());
                found.push((row.id.to_owned(), text.collect::<String>()));
            }
        }
    }
    found.sort();
    found
}

fn sorted(rows: &Rows) -> Rows {
    let mut rows = rows.clone();
    rows.sort();
    rows
}

#[test]
fn a_second_compile_makes_the_bank_match_the_corpus_and_encodes_only_what_is_new() {
    let program = Program::new();
    let mut corpus = rows(200);
    write(&program, &corpus);
    program.compile("bank", &ARGS).expect(0);

    corpus.remove(17);
    corpus.remove(3);
    corpus[40].1 = "An altogether new text about a well.".to_owned();
    corpus[41].1 = corpus[50].1.clone();
    corpus.push(("new".to_owned(), "A document that was not there before, about a bridge.".to_owned()));
    write(&program, &corpus);
    let plan = program.compile("bank", &[&ARGS[..], &["--dry-run"]].concat()).expect(0).json()["plan"].clone();
    let counts = |plan: &Value| {
        ["new", "changed", "vanished", "unchanged", "kept", "chunks_to_encode"].map(|name| plan[name].as_u64().unwrap())
    };
    assert_eq!(counts(&plan), [1, 2, 2, 196, 0, 2], "{plan}");
    assert_eq!(memory3::bank::Manifest::read(&program.path().join("bank")).unwrap().generation, 1);

    let report = program.compile("bank", &ARGS).expect(0).json();
    assert_eq!(report["plan"], plan);
    assert_eq!(report["chunks"]["encoded"], 2, "{report}");
    assert_eq!((&report["documents"]["changed"], &report["documents"]["vanished"]), (&2.into(), &2.into()));
    assert!(report["saved_seconds"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!(report["bank"]["generation"], 2);
    assert_eq!(documents(&program, "bank"), sorted(&corpus));
    program.run(&["verify", "--bank", "bank"]).expect(0);

    // The catalog is derived: without it the answers are the same, and the generation stays.
    std::fs::remove_dir_all(program.path().join("bank/index/catalog")).unwrap();
    let again = program.compile("bank", &ARGS).expect(0).json();
    assert_eq!((&again["chunks"]["encoded"], &again["bank"]["generation"]), (&0.into(), &2.into()), "{again}");

    // A text that comes back finds its records.
    corpus[40].1 = rows(200)[41].1.clone();
    write(&program, &corpus);
    let back = program.compile("bank", &ARGS).expect(0).json();
    assert_eq!((&back["chunks"]["encoded"], &back["bank"]["generation"]), (&0.into(), &3.into()), "{back}");
    assert_eq!(documents(&program, "bank"), sorted(&corpus));
}

#[test]
fn a_bank_does_not_shrink_unasked() {
    let program = Program::new();
    write(&program, &rows(100));
    program.compile("bank", &ARGS).expect(0);
    write(&program, &rows(80));
    let before = published_files(&program.path().join("bank"));
    let refused = program.compile("bank", &ARGS).expect(2);
    for word in ["20 of 100", "doc-80", "--allow-shrink", "max_shrink"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    let dry = program.compile("bank", &[&ARGS[..], &["--dry-run"]].concat()).expect(1).json();
    assert!(dry["plan"]["refused"].as_str().unwrap().contains("20 of 100"), "{dry}");
    assert!(before == published_files(&program.path().join("bank")));
    program.compile("bank", &[&ARGS[..], &["--max-shrink", "0.2"]].concat()).expect(0);
    assert_eq!(documents(&program, "bank"), sorted(&rows(80)));
    write(&program, &rows(1));
    program.compile("bank", &[&ARGS[..], &["--allow-shrink"]].concat()).expect(0);
    assert_eq!(documents(&program, "bank"), sorted(&rows(1)));
    program.run(&["verify", "--bank", "bank"]).expect(0);
}

#[test]
fn a_broken_input_removes_nothing() {
    let program = Program::new();
    let corpus = rows(60);
    write(&program, &corpus);
    program.write("corpus/note.txt", "A note in a file of its own.");
    program.compile("bank", &ARGS).expect(0);
    let all = documents(&program, "bank");

    // A document that is known is rejected now: it stays, whatever else happens.
    program.write("corpus/note.txt", b"caf\xe9");
    write(&program, &corpus[..58].to_vec());
    let report = program.compile("bank", &ARGS).expect(1).json();
    assert_eq!((&report["plan"]["kept"], &report["plan"]["vanished"]), (&1.into(), &2.into()), "{report}");
    assert_eq!(documents(&program, "bank").len(), all.len() - 2);

    // A line without a readable id may have been any document: nothing is removed.
    let text = std::fs::read_to_string(program.path().join("corpus/rows.jsonl")).unwrap();
    let torn: Vec<&str> = text.lines().take(56).chain(["{\"id\": \"doc-5"]).collect();
    program.write("corpus/rows.jsonl", torn.join("\n"));
    let report = program.compile("bank", &ARGS).expect(1).json();
    assert_eq!((&report["plan"]["kept"], &report["plan"]["vanished"]), (&3.into(), &0.into()), "{report}");
    assert!(report["plan"]["notes"].to_string().contains("doc-57"), "{report}");
    assert_eq!(documents(&program, "bank").len(), all.len() - 2);

    // A file that cannot be read at all, with the same result; the caller may insist.
    program.write("corpus/rows.jsonl.zst", b"\x28\xb5\x2f\xfd torn");
    write(&program, &corpus[..56].to_vec());
    let report = program.compile("bank", &ARGS).expect(1).json();
    assert_eq!(report["plan"]["vanished"], 0, "{report}");
    // That much may vanish says nothing about inputs that hide it.
    let report = program.compile("bank", &[&ARGS[..], &["--allow-shrink"]].concat()).expect(1).json();
    assert_eq!(report["plan"]["vanished"], 0, "{report}");
    assert!(report["plan"]["notes"].to_string().contains("--allow-unreadable"), "{report}");
    let report = program.compile("bank", &[&ARGS[..], &["--allow-unreadable"]].concat()).expect(1).json();
    assert_eq!(report["plan"]["vanished"], 2, "{report}");
    write(&program, &corpus[..55].to_vec());
    program.write(
        "pipeline.toml",
        "[bank]
allow_unreadable = true
",
    );
    assert_eq!(program.compile("bank", &ARGS).expect(1).json()["plan"]["vanished"], 1);
}

/// Rows with a second field, in the place of the first for whoever names it.
fn write_with_titles(program: &Program, rows: &Rows) {
    let line = |(id, text): &(String, String)| {
        serde_json::json!({"id": id, "text": text, "title": format!("The title of {id}")}).to_string() + "\n"
    };
    program.write("corpus/rows.jsonl", rows.iter().map(line).collect::<String>());
}

#[test]
fn another_text_field_does_not_replace_every_document_unasked() {
    let program = Program::new();
    write_with_titles(&program, &rows(100));
    program.compile("bank", &ARGS).expect(0);
    let before = published_files(&program.path().join("bank"));
    let wrong = [&ARGS[..], &["--text-field", "title"]].concat();
    let refused = program.compile("bank", &wrong).expect(2);
    for word in ["100 of 100", "doc-0", "another text", "bank.max_change = 0.5", "--text-field", "--allow-change"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    assert!(before == published_files(&program.path().join("bank")));
    // One guard does not open the other; both speak when both stop.
    program.compile("bank", &[&wrong[..], &["--allow-shrink", "--allow-unreadable"]].concat()).expect(2);
    write_with_titles(&program, &rows(80));
    let plan = program.compile("bank", &[&wrong[..], &["--dry-run"]].concat()).expect(1).json()["plan"].clone();
    let reason = plan["refused"].as_str().unwrap();
    assert!(reason.contains("20 of 100") && reason.contains("80 of 100"), "{reason}");
    assert!(
        program.compile("bank", &[&wrong[..], &["--allow-change"]].concat()).expect(2).stderr.contains("20 of 100")
    );
    program.compile("bank", &[&wrong[..], &["--allow-change", "--max-shrink", "0.2"]].concat()).expect(0);
    // By the settings and by the environment too, there and back.
    program.write("pipeline.toml", "[bank]\nmax_change = 1.0\n");
    assert_eq!(program.compile("bank", &ARGS).expect(0).json()["documents"]["changed"], 80);
    std::fs::remove_file(program.path().join("pipeline.toml")).unwrap();
    program.compile("bank", &wrong).expect(2);
    for (args, name, value) in [(&wrong[..], "MEMORY3_ALLOW_CHANGE", "true"), (&ARGS, "MEMORY3_MAX_CHANGE", "1")] {
        let ended = program.compile_command("bank", args).env(name, value).output().unwrap();
        assert!(ended.status.success(), "{name}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    assert_eq!(documents(&program, "bank"), sorted(&rows(80)));
}

#[test]
fn a_text_that_cannot_be_cut_leaves_the_published_one() {
    let program = Program::new();
    program.write("corpus/a.txt", "bell");
    program.write("corpus/b.txt", "rope");
    let args = ["corpus", "--codec", "none", "--chunk-tokens", "2", "--tokens-per-head", "2"];
    program.compile("bank", &args).expect(0);
    let before = documents(&program, "bank");
    program.write("corpus/a.txt", "\u{1f9ff}");
    let report = program.compile("bank", &args).expect(1).json();
    assert_eq!((&report["plan"]["kept"], &report["documents"]["rejected"]), (&1.into(), &1.into()), "{report}");
    assert_eq!(documents(&program, "bank"), before);
}

#[test]
fn documents_that_cannot_be_seen_stay_as_published_after_an_interrupted_run() {
    let program = Program::new();
    let corpus = rows(150);
    write(&program, &corpus);
    let args = [&ARGS[..], &["--batch-chunks", "4"]].concat();
    program.compile("bank", &args).expect(0);
    let mut changed = corpus.clone();
    for row in (0..150).step_by(3) {
        changed[row].1 = format!("{} and then some words of row {row}", corpus[row].1);
    }
    write(&program, &changed);
    program.kill_after_a_shard("bank", &args);
    // The changed ones are gone from the corpus, and a torn line may be any of them.
    let rest: Rows = corpus.iter().enumerate().filter(|(row, _)| row % 3 > 0).map(|(_, row)| row.clone()).collect();
    write(&program, &rest);
    let text = std::fs::read_to_string(program.path().join("corpus/rows.jsonl")).unwrap();
    program.write("corpus/rows.jsonl", text + "{\"id\": \"doc-");
    let report = program.compile("bank", &args).expect(1).json();
    assert_eq!((&report["plan"]["kept"], &report["plan"]["vanished"]), (&50.into(), &0.into()), "{report}");
    assert_eq!(documents(&program, "bank"), sorted(&corpus));
    program.run(&["verify", "--bank", "bank"]).expect(0);
}

#[test]
fn a_corpus_that_is_cut_says_nothing_about_the_rest() {
    let program = Program::new();
    let corpus: Rows = (0..600).map(|row| (format!("doc-{row}"), format!("A short text, the {row}th."))).collect();
    write(&program, &corpus);
    program.compile("bank", &ARGS).expect(0);
    let report = program.compile("bank", &[&ARGS[..], &["--max-chunks", "10"]].concat()).expect(0).json();
    assert!(report["plan"]["kept"].as_u64().unwrap() > 300, "{report}");
    assert_eq!((&report["plan"]["vanished"], &report["bank"]["generation"]), (&0.into(), &1.into()), "{report}");
    assert_eq!(documents(&program, "bank").len(), 600);
}

#[test]
fn append_adds_and_changes_nothing() {
    let program = Program::new();
    let corpus = rows(40);
    write(&program, &corpus);
    let refused = program.compile_verb("append", "bank", &ARGS).expect(2);
    assert!(refused.stderr.contains("no bank here"), "{}", refused.stderr);
    program.compile("bank", &ARGS).expect(0);
    let more: Rows = vec![
        ("doc-3".to_owned(), "Another text for a document that is there.".to_owned()),
        corpus[4].clone(),
        ("added".to_owned(), "A text about a bell that was added.".to_owned()),
    ];
    write(&program, &more);
    let report = program.compile_verb("append", "bank", &ARGS).expect(1).json();
    assert_eq!(report["documents"]["rejected"], 1, "{report}");
    assert_eq!((&report["documents"]["unchanged"], &report["chunks"]["encoded"]), (&1.into(), &1.into()));
    let ledger = std::fs::read_to_string(program.path().join("bank/index/ledger.jsonl")).unwrap();
    assert!(ledger.contains("other-text") && ledger.contains("doc-3"), "{ledger}");
    let mut expected = corpus;
    expected.push(more[2].clone());
    assert_eq!(documents(&program, "bank"), sorted(&expected));
}

#[test]
fn an_incremental_run_that_was_killed_ends_in_the_same_bytes() {
    let program = Program::new();
    let mut corpus = rows(150);
    write(&program, &corpus);
    let args = [&ARGS[..], &["--batch-chunks", "4"]].concat();
    for bank in ["whole", "killed"] {
        program.compile(bank, &args).expect(0);
    }
    for row in (0..150).step_by(3) {
        corpus[row].1 = format!("{} and then some words of row {row}", corpus[row].1);
    }
    corpus.truncate(145);
    write(&program, &corpus);
    program.compile("whole", &[&ARGS[..], &["--batch-chunks", "64", "--threads", "1"]].concat()).expect(0);
    let before = published_files(&program.path().join("killed"));
    program.kill_after_a_shard("killed", &args);
    let manifest = |files: &[(String, Vec<u8>)]| files.iter().find(|(name, _)| name == "index/manifest.json").cloned();
    assert_eq!(manifest(&before), manifest(&published_files(&program.path().join("killed"))));
    let rest = program.compile("killed", &args).expect(0).json();
    assert!(rest["documents"]["changed"].as_u64().unwrap() < 50, "{rest}");
    let (one, other) =
        (published_files(&program.path().join("whole")), published_files(&program.path().join("killed")));
    for ((name, left), (other, right)) in one.iter().zip(&other) {
        assert_eq!(name, other);
        assert!(left == right, "{name} differs");
    }
    assert_eq!(one.len(), other.len());
    assert_eq!(documents(&program, "killed"), sorted(&corpus));
}

/// A run has done what a plan says.
fn assert_came_true(plan: &Value, report: &Value) {
    assert_eq!(&report["plan"], plan);
    let plan = |names: &[&str]| names.iter().map(|name| plan[name].as_u64().unwrap()).sum::<u64>();
    let done = |part: &str, names: &[&str]| names.iter().map(|name| report[part][name].as_u64().unwrap()).sum::<u64>();
    for (planned, part, names) in [
        (plan(&["new", "changed"]), "documents", &["compiled", "duplicate"][..]),
        (plan(&["changed"]), "documents", &["changed"]),
        (plan(&["unchanged"]), "documents", &["unchanged"]),
        (plan(&["rejected"]), "documents", &["rejected"]),
        (plan(&["vanished"]), "documents", &["vanished"]),
        (plan(&["kept"]), "documents", &["kept"]),
        (plan(&["chunks_to_encode"]), "chunks", &["encoded"]),
        (plan(&["chunks_shared"]), "chunks", &["shared"]),
        (plan(&["chunks_kept"]), "chunks", &["unchanged"]),
    ] {
        assert_eq!(planned, done(part, names), "{names:?}: {report}");
    }
}

/// Lines of a plan file: action, id, why.
fn listed(program: &Program) -> Vec<[String; 3]> {
    let text = std::fs::read_to_string(program.path().join("plan.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| ["action", "id", "why"].map(|field| line[field].as_str().unwrap_or("-").to_owned())).collect()
}

#[test]
fn a_dry_run_says_what_the_run_then_does_and_lists_every_document() {
    let program = Program::new();
    let run = |verb: &str, args: &[&str], code: i32| {
        let dry = [args, &["--dry-run", "--plan-file", "plan.jsonl"]].concat();
        let plan = program.compile_verb(verb, "bank", &dry).expect(code).json()["plan"].clone();
        let list = listed(&program);
        let report = program.compile_verb(verb, "bank", &[args, &["--plan-file", "plan.jsonl"]].concat()).expect(code);
        assert_came_true(&plan, &report.json());
        assert_eq!(list, listed(&program));
        for (action, count) in
            [("add", "new"), ("replace", "changed"), ("remove", "vanished"), ("keep", "kept"), ("reject", "rejected")]
        {
            let lines = list.iter().filter(|[found, ..]| found == action).count() as u64;
            assert_eq!(plan[count], lines, "{action}: {list:?}");
        }
        list
    };
    let hostile = |rows: &Rows| {
        write(&program, rows);
        let text = std::fs::read_to_string(program.path().join("corpus/rows.jsonl")).unwrap();
        let more = [
            "{\"id\": \"doc-7\", \"text\": \"again\"}",
            "{\"id\": \"no-text\"}",
            "{\"id\": \"doc-9\", \"text\": \" \"}",
        ];
        program.write("corpus/rows.jsonl", text + &more.join("\n"));
    };
    // A new bank; equal chunks within it, an id that comes twice, a text that is missing.
    let mut corpus = rows(120);
    corpus[20].1 = corpus[30].1.clone();
    corpus.remove(9);
    hostile(&corpus);
    run("compile", &ARGS, 1);
    // Changed, shared, new, vanished; a document whose text is rejected now.
    corpus.push(("doc-9".to_owned(), "A text for the ninth.".to_owned()));
    write(&program, &corpus);
    run("compile", &ARGS, 0);
    corpus.pop();
    corpus[40].1 = corpus[41].1.clone();
    corpus[42].1 = format!("{} and more about a lamp", corpus[42].1);
    corpus[43].1 = corpus[42].1.clone();
    let gone: Vec<String> = corpus.drain(100..105).map(|(id, _)| id).collect();
    corpus.extend(rows(125).drain(120..));
    hostile(&corpus);
    let list = run("compile", &ARGS, 1);
    let of = |action: &str| -> Vec<String> {
        list.iter().filter(|[found, ..]| found == action).map(|[_, id, _]| id.clone()).collect()
    };
    assert_eq!((of("remove"), of("keep")), (gone, vec!["doc-9".to_owned()]));
    assert_eq!(of("replace"), ["doc-41", "doc-43", "doc-44"]);
    assert!(list.iter().any(|[action, id, why]| action == "reject" && id == "no-text" && why.contains("rows.jsonl:")));
    // Append: another text is rejected, what is not named stays.
    let more: Rows = vec![
        ("doc-3".to_owned(), "Another text.".to_owned()),
        corpus[4].clone(),
        ("added".to_owned(), corpus[5].1.clone()),
        ("longer".to_owned(), format!("{} and a new end", corpus[6].1)),
    ];
    write(&program, &more);
    run("append", &ARGS, 1);
    // What a killed run has left is there already.
    for row in (0..corpus.len()).step_by(3) {
        corpus[row].1 = format!("{} and then some words of row {row}", corpus[row].1);
    }
    corpus.extend(more[2..].iter().cloned());
    write(&program, &corpus);
    program.kill_after_a_shard("bank", &[&ARGS[..], &["--batch-chunks", "4"]].concat());
    run("compile", &ARGS, 0);
    let mut plain = documents(&program, "bank");
    plain.retain(|(id, _)| id != "doc-9");
    assert_eq!(plain, sorted(&corpus));
}

#[test]
fn rejected_entries_are_listed_when_a_run_ends_before_it_encodes() {
    let program = Program::new();
    write(&program, &rows(40));
    program.compile("bank", &ARGS).expect(0);
    let ledger = || std::fs::read_to_string(program.path().join("bank/index/ledger.jsonl")).unwrap();
    let other: Rows = (0..3).map(|row| (format!("doc-{row}"), format!("Another text, the {row}th."))).collect();
    write(&program, &other);
    let refused = program.compile_verb("append", "bank", &ARGS).expect(2);
    assert!(refused.stderr.contains("ledger.jsonl"), "{}", refused.stderr);
    assert_eq!(ledger().matches("other-text").count(), 3, "{}", ledger());
    // Refused by a guard: the rejections are part of the reason.
    let text = std::fs::read_to_string(program.path().join("corpus/rows.jsonl")).unwrap();
    program.write("corpus/rows.jsonl", text + "{\"id\": \"doc-5\"}\n");
    program.compile("bank", &ARGS).expect(2);
    assert!(ledger().lines().count() == 1 && ledger().contains("missing-field"), "{}", ledger());
}
