//! Completions, streams, searches: what a server says is what the other verbs say.

use serde_json::{Value, json};

use super::{Server, program};
use crate::compile::program::{Program, repository, tiny_encoder};

/// A text of several chunks of the tiny model.
fn long_text() -> String {
    let text = std::fs::read_to_string(repository().join("examples/README.md")).unwrap();
    text.chars().take(700).collect()
}

/// What `memory3 generate` makes of a prompt.
fn generated(program: &Program, prompt: &str, args: &[&str]) -> Value {
    let encoder = tiny_encoder();
    let fixed = ["generate", "--json", "--quiet", "--bank", "bank", "--model", "model", "--prompt", prompt];
    let found = program.run(&[&fixed[..], &["--embedder", encoder.to_str().unwrap()], args].concat()).expect(0).json();
    found["texts"][0].clone()
}

/// Where each retrieval comes into force, and its records; `memory3 generate` tells of memories that are inherited, too.
fn retrievals(readings: &[Value], first: impl Fn(&Value) -> &Value, records: &str) -> Vec<(u64, Vec<String>)> {
    let of = |one: &Value| {
        let records = one[records].as_array().unwrap().iter();
        let records = records.map(|record| record["record"].as_str().unwrap().to_owned()).collect();
        (first(one).as_u64().unwrap(), records)
    };
    let mut found: Vec<(u64, Vec<String>)> = readings.iter().map(of).collect();
    found.dedup_by(|next, before| next.1 == before.1);
    found
}

/// The pieces of a text in a stream, and the reasons why it ended.
fn joined(events: &[Value], index: usize, piece: impl Fn(&Value) -> &Value) -> (String, Vec<String>) {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    let own: Vec<&Value> = choices.filter(|choice| choice["index"] == index).collect();
    let text = own.iter().filter_map(|choice| piece(choice).as_str()).collect();
    let reasons = own.iter().filter_map(|choice| choice["finish_reason"].as_str().map(str::to_owned)).collect();
    (text, reasons)
}

#[test]
fn completions_are_those_of_generate_whatever_is_read_beside_them() {
    let program = program();
    let server = Server::start(&program, &[]);
    let (long, sampled) = (long_text(), ["--temperature", "0.9", "--top-p", "0.95", "--seed", "7"]);
    let cases = [("Veyra", true), ("Veyra", false), (long.as_str(), true), (long.as_str(), false)];
    let asked: Vec<(Value, Value)> = cases
        .iter()
        .map(|&(prompt, memory)| {
            let fixed: &[&str] =
                if memory { &["--max-tokens", "150"] } else { &["--max-tokens", "150", "--no-memory"] };
            let expected = generated(&program, prompt, &[fixed, &sampled].concat());
            let body = json!({"prompt": prompt, "max_tokens": 150, "temperature": 0.9, "top_p": 0.95, "seed": 7,
                "memory3": {"no_memory": !memory, "trace": true}});
            (body, expected)
        })
        .collect();
    let check = |body: &Value, expected: &Value| {
        let found = server.client.complete(body);
        let choice = &found["choices"][0];
        assert_eq!(choice["text"], expected["text"]);
        let tokens = expected["tokens"].as_array().unwrap().len();
        assert_eq!(found["usage"]["completion_tokens"], tokens);
        let reason = if expected["stopped"] == true { "stop" } else { "length" };
        assert_eq!((&choice["finish_reason"], &found["object"]), (&json!(reason), &json!("text_completion")));
        if body["memory3"]["no_memory"] == true {
            assert!(choice["memory3"].is_null(), "{choice}");
            return;
        }
        let references = choice["memory3"]["references"].as_array().unwrap();
        let readings = expected["readings"].as_array().unwrap();
        assert_eq!(
            retrievals(references, |one| &one["first_token"], "records"),
            retrievals(readings, |one| &one["tokens"][0], "references")
        );
        assert_eq!(references.len() as u64, expected["retrievals"].as_u64().unwrap());
        assert_eq!(references[0]["query"], readings[0]["query"]);
        let record = &references[0]["records"][0];
        assert!(record["text"].is_string() && record["documents"][0]["document"].is_string(), "{record}");
    };
    asked.iter().for_each(|(body, expected)| check(body, expected));
    // All of them at once, twice: the same.
    std::thread::scope(|scope| {
        for (body, expected) in asked.iter().chain(&asked) {
            scope.spawn(move || check(body, expected));
        }
    });
    let [passes, rows] = ["forward_passes", "forward_rows"].map(|name| server.metric(&format!("memory3_{name}_total")));
    assert!(rows > passes && server.metric("memory3_sequences") == 0.0, "{rows} rows in {passes} passes");
}

#[test]
fn several_prompts_choices_and_token_ids_give_each_its_text() {
    let program = program();
    let server = Server::start(&program, &[]);
    let chunker = memory3::corpus::Chunker::from_dir(&program.path().join("model"), 128).unwrap();
    let tokens = |text: &str| chunker.chunk(text).unwrap()[0].tokens.clone();
    let texts = |body: Value| {
        let found = server.client.complete(&body);
        let choices = found["choices"].as_array().unwrap();
        assert!(choices.iter().enumerate().all(|(at, choice)| choice["index"] == at));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let body = |prompt: Value| json!({"prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": true});
    let [one, other] = ["Veyra is", "The rack line"].map(|prompt| texts(body(json!(prompt))).remove(0));
    assert_eq!(texts(body(json!(["Veyra is", "The rack line"]))), [one.as_str(), &other]);
    assert_eq!(texts(body(json!(tokens("Veyra is")))), [one.as_str()]);
    assert_eq!(texts(body(json!([tokens("The rack line"), tokens("Veyra is")]))), [other.as_str(), &one]);
    // Choices share their prompt, not their random numbers; the same seed gives the same.
    let mut body = json!({"prompt": long_text(), "max_tokens": 20, "temperature": 1, "seed": -3, "n": 3});
    let three = texts(body.clone());
    assert_eq!(texts(body.clone()), three);
    assert!(three[0] != three[1] && three[1] != three[2], "{three:?}");
    body["n"] = json!(1);
    assert_eq!(texts(body.clone()), three[..1]);
    body["seed"] = Value::Null;
    assert_ne!(texts(body.clone()), texts(body), "without a seed chance is chance");
    // Usage counts BOS and a prompt once, whatever grows from it.
    let found = server.client.complete(&json!({"prompt": "Veyra is", "max_tokens": 4, "n": 3, "ignore_eos": true}));
    let prompt = tokens("Veyra is").len() + 1;
    let expected = json!({"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12});
    assert_eq!(found["usage"], expected);
    assert_eq!(found["choices"][2]["memory3"]["references"].as_array().unwrap().len(), 1);
}

#[test]
fn a_text_ends_before_its_stop_string_in_a_stream_too() {
    let program = program();
    let server = Server::start(&program, &[]);
    let mut body = json!({"prompt": "Veyra", "max_tokens": 60, "temperature": 1, "seed": 5, "ignore_eos": true});
    let whole = server.client.complete(&body)["choices"][0]["text"].as_str().unwrap().to_owned();
    let (start, _) = whole.char_indices().nth(25).unwrap();
    let stop: String = whole[start..].chars().take(3).collect();
    let expected = &whole[..whole.find(&stop).unwrap()];
    body["stop"] = json!(["never written, that is certain", stop]);
    let found = server.client.complete(&body);
    assert_eq!(found["choices"][0]["text"], expected);
    assert_eq!(found["choices"][0]["finish_reason"], "stop");
    assert!(found["usage"]["completion_tokens"].as_u64().unwrap() < 60);
    body["stream"] = json!(true);
    let events = server.client.post("/v1/completions", &body).expect(200).events();
    assert_eq!(joined(&events, 0, |choice| &choice["text"]), (expected.to_owned(), vec!["stop".to_owned()]));
}

#[test]
fn streams_give_the_same_texts_piece_by_piece_with_their_references_and_usage() {
    let program = program();
    let server = Server::start(&program, &[]);
    let mut body = json!({"prompt": ["Veyra", long_text()], "max_tokens": 130, "temperature": 1, "seed": 5, "n": 2,
        "ignore_eos": true});
    let whole = server.client.complete(&body);
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let mut events = server.client.post("/v1/completions", &body).expect(200).events();
    let last = events.pop().unwrap();
    assert_eq!((&last["usage"], &last["choices"]), (&whole["usage"], &json!([])));
    assert!(events.len() > 100 && events.iter().all(|event| event["usage"].is_null() && event["id"] == last["id"]));
    for index in 0..4 {
        let choice = &whole["choices"][index];
        let (text, reasons) = joined(&events, index, |choice| &choice["text"]);
        assert_eq!((text.as_str(), reasons), (choice["text"].as_str().unwrap(), vec!["length".to_owned()]));
        let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
        let own = choices.filter(|choice| choice["index"] == index);
        let references: Vec<&Value> =
            own.filter_map(|choice| choice["memory3"]["references"].as_array()).flatten().collect();
        assert_eq!(json!(references), choice["memory3"]["references"]);
        // Text and query only for those who ask for them.
        assert!(references.iter().all(|one| one["query"].is_null() && one["records"][0]["text"].is_null()));
    }
    assert!(whole["choices"][3]["memory3"]["references"].as_array().unwrap().len() > 4);
}

#[test]
fn searches_are_those_of_the_verb_and_models_are_listed() {
    let program = program();
    let server = Server::start(&program, &["--name", "org/tiny"]);
    let (encoder, query) = (tiny_encoder(), "How high is Mount Corran?");
    let args = ["search", query, "-k", "3", "--json", "--bank", "bank", "--embedder", encoder.to_str().unwrap()];
    let expected = program.run(&args).expect(0).json();
    let found = server.client.ask("/v1/memories/search", &json!({"query": query, "k": 3}));
    assert_eq!((&found["hits"], &found["query"], &found["generation"]), (&expected["hits"], &json!(query), &json!(1)));
    let listed = server.client.get("/v1/models").expect(200).json();
    let one = server.client.get("/v1/models/org/tiny").expect(200).json();
    assert_eq!(listed, json!({"object": "list", "data": [one]}));
    assert_eq!(
        (&one["id"], &one["object"], &one["memory3"]["generation"]),
        (&json!("org/tiny"), &json!("model"), &json!(1))
    );
    server.client.get("/v1/models/other").expect(404);
    let named = server.client.complete(&json!({"prompt": "Veyra", "model": "org/tiny"}));
    assert_eq!((&named["model"], &named["usage"]["completion_tokens"]), (&json!("org/tiny"), &json!(16)));
    let health = server.client.get("/health").expect(200).json();
    assert_eq!((&health["status"], &health["generation"], &health["refused"]), (&json!("ok"), &json!(1), &Value::Null));
    assert_eq!(server.client.get("/ready").expect(200).text(), "ready\n");
    assert_eq!(server.metric("memory3_http_requests_total{route=\"/v1/models/{*name}\",status=\"404\"}"), 1.0);
    assert_eq!(server.metric("memory3_tokens_total{kind=\"completion\"}"), 16.0);
    assert_eq!(server.metric("memory3_cache_hits_total") + server.metric("memory3_cache_misses_total"), 5.0);
    assert!(server.metric("memory3_work_seconds_total{part=\"model\"}") > 0.0);
}
