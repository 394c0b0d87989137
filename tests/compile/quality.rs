//! The quality gate, through the binary.

use serde_json::Value;

use super::program::{Program, published_files};

const CODEC: [&str; 5] = ["corpus", "--codec", "PQ10x4", "--quality-sample", "5"];

fn write_corpus(program: &Program) {
    let text = |row: usize| (0..40).map(|word| format!("word{} ", (row * 31 + word * 7) % 97)).collect::<String>();
    for row in 0..30 {
        program.write(&format!("corpus/{row:02}.txt"), text(row).repeat(2));
    }
}

fn reading(program: &Program, bank: &str) -> Value {
    let inspected = program.run(&["inspect", "--json", "--bank", bank]).expect(0).json();
    inspected["quality"]["reading"].clone()
}

#[test]
fn a_generation_beyond_its_limit_is_not_published_and_what_was_encoded_stays() {
    let program = Program::new();
    write_corpus(&program);
    let with = |more: &[&'static str]| [&CODEC, more].concat();
    let refused = program.compile("bank", &with(&["--max-kl", "0"])).expect(2);
    assert!(refused.stderr.contains("quality.max_kl is 0"), "{}", refused.stderr);
    let manifest = program.path().join("bank/index/manifest.json");
    assert!(!manifest.exists());
    let error = program.compile("bank", &with(&["--max-attention-error", "0.000001"])).expect(2).stderr;
    assert!(error.contains("attention error of the worst layer"), "{error}");
    let published = program.compile("bank", &with(&["--max-kl", "50", "--max-attention-error", "50"])).expect(0).json();
    assert_eq!(published["chunks"]["encoded"], 0, "what was encoded stays: {published}");
    // As if nothing had happened.
    program.compile("other", &with(&["--threads", "1"])).expect(0);
    assert_eq!(published_files(&program.path().join("bank")), published_files(&program.path().join("other")));

    let figures = reading(&program, "bank");
    assert_eq!(
        (&figures["memories"], figures["quantized"]["kl"].as_array().unwrap().len()),
        (&5.into(), 2),
        "{figures}"
    );
    let loss = |side: &str| figures[side]["kl_together"].as_f64().unwrap();
    assert!(loss("quantized") != loss("selected") && loss("selected") > 0.0, "{figures}");
    let text = program.run(&["inspect", "--bank", "bank"]).expect(0).stdout;
    assert!(text.contains("5 memories read with"), "{text}");
    // What is published stays what it was, and is measured against the limit all the same.
    program.compile("bank", &with(&["--max-kl", "0"])).expect(2);
    let again = program.compile("bank", &with(&[])).expect(0).json();
    assert_eq!(again["bank"]["generation"], 1, "{again}");
    // Stored exactly, only the selection costs.
    program.compile("exact", &["corpus", "--codec", "none", "--quality-sample", "5"]).expect(0);
    let exact = reading(&program, "exact");
    assert_eq!(exact["selected"], figures["selected"], "{exact}");
    let (a, b) = (&exact["quantized"]["kl_together"], &exact["selected"]["kl_together"]);
    let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
    assert!((a - b).abs() < 0.05 * b, "{exact}");
}

#[test]
fn nothing_is_measured_where_no_sample_is_asked_for() {
    let program = Program::new();
    program.write("corpus/a.txt", "A lamp.");
    program.compile("bank", &["corpus", "--codec", "none", "--quality-sample", "0"]).expect(0);
    assert_eq!(reading(&program, "bank"), Value::Null);
    let error = program.compile("bank", &["corpus", "--quality-sample", "0", "--max-kl", "1"]).expect(2).stderr;
    assert!(error.contains("quality.max_kl") && error.contains("quality.sample is 0"), "{error}");
    // A text of few tokens is kept whole, and its only chunk reads itself.
    program.compile("bank", &["corpus", "--codec", "none", "--quality-sample", "3"]).expect(0);
    let figures = reading(&program, "bank");
    assert_eq!((&figures["memories"], &figures["selected"]["kl_together"]), (&1.into(), &0.0.into()), "{figures}");
}
