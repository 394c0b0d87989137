//! A server over its years: new generations under it, and its end.

use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use super::{Server, endless, program, wait_for};
use crate::compile::program::{Program, repository};

fn publish(program: &Program, name: &str, text: &str) {
    program.write(&format!("new/{name}"), text);
    let args = ["append", "new", "--model", "model", "--bank", "bank", "--quiet", "--embedder"];
    program.run(&[&args[..], &[crate::compile::program::tiny_encoder().to_str().unwrap()]].concat()).expect(0);
}

fn generation(value: &Value) -> u64 {
    value["memory3"]["generation"].as_u64().unwrap()
}

#[test]
fn a_new_generation_is_taken_up_while_requests_go_on_with_theirs() {
    let program = program();
    program.write("serve.toml", "[serve]\nreload_seconds = 1\n");
    let server = Server::start(&program, &["--config", "serve.toml"]);
    let mut old = server.client.post("/v1/completions", &endless()).expect(200);
    let next =
        |response: &mut super::client::Response| -> Value { serde_json::from_str(&response.event().unwrap()).unwrap() };
    assert_eq!(generation(&next(&mut old)), 1);
    let text = "Zorbelin lanterns glow violet over the harbour of Quarn.";
    // The tiny encoder knows no meaning: only the text itself is near.
    let query = json!({"query": text, "k": 1});
    publish(&program, "zorbelin.md", text);
    // Meanwhile no request fails, and each says whom it was served by.
    let mut seen = Vec::new();
    wait_for("the new generation", || {
        let found = server.client.complete(&json!({"prompt": "Veyra", "max_tokens": 2}));
        seen.push(generation(&found));
        (seen.last() == Some(&2)).then_some(())
    });
    assert!(seen.is_sorted() && seen[0] == 1, "{seen:?}");
    let found = server.client.ask("/v1/memories/search", &query);
    assert_eq!((&found["hits"][0]["text"], &found["generation"]), (&json!(text), &json!(2)));
    // The old request goes on with its bank, far beyond its next retrievals.
    let before = server.metric("memory3_retrievals_total");
    wait_for("three more retrievals", || (server.metric("memory3_retrievals_total") > before + 3.0).then_some(()));
    assert_eq!(generation(&next(&mut old)), 1);
    assert_eq!(server.metric("memory3_bank_generation"), 2.0);
    assert_eq!(server.metric("memory3_bank_reloads_total"), 1.0);
    // Its files may go: who reads them has them open.
    program.run(&["compact", "--bank", "bank", "--keep-generations", "1"]).expect(0);
    let before = server.metric("memory3_retrievals_total");
    wait_for("three more retrievals", || (server.metric("memory3_retrievals_total") > before + 3.0).then_some(()));
    assert_eq!(generation(&next(&mut old)), 1);
}

#[test]
fn a_generation_that_does_not_fit_is_refused_and_the_old_one_stays() {
    let program = program();
    let server = Server::start(&program, &[]);
    let other = repository().join("tests/fixtures/embed/tiny-xlmr");
    let corpus = repository().join("examples/corpus");
    let args =
        ["compile", corpus.to_str().unwrap(), "--model", "model", "--bank", "bank", "--quiet", "--codec", "none"];
    let re_embed = ["--re-embed", "--embedder", other.to_str().unwrap()];
    program.run(&[&args[..], &re_embed].concat()).expect(0);
    server.signal("HUP");
    let refused = wait_for("a refusal", || {
        let health = server.client.get("/health").expect(200).json();
        (!health["refused"].is_null()).then_some(health)
    });
    assert_eq!((&refused["generation"], &refused["status"]), (&json!(1), &json!("ok")));
    assert!(refused["refused"]["reason"].as_str().unwrap().contains("embedder."), "{refused}");
    let number = refused["refused"]["generation"].as_f64().unwrap();
    assert!(number > 1.0 && server.metric("memory3_bank_refused_generation") == number);
    assert_eq!(server.metric("memory3_bank_reloads_refused_total"), 1.0);
    assert_eq!(generation(&server.client.complete(&json!({"prompt": "Veyra", "max_tokens": 2}))), 1);
    // An earlier one fits again.
    program.run(&["rollback", "1", "--bank", "bank"]).expect(0);
    server.signal("HUP");
    wait_for("the old contents", || {
        let health = server.client.get("/health").expect(200).json();
        (health["refused"].is_null() && health["generation"].as_f64() == Some(number + 1.0)).then_some(())
    });
    // A manifest that cannot be read is no generation at all.
    let manifest = program.path().join("bank/index/manifest.json");
    std::fs::rename(&manifest, program.path().join("aside")).unwrap();
    server.signal("HUP");
    wait_for("a refusal", || {
        let health = server.client.get("/health").expect(200).json();
        (health["refused"]["generation"] == 0).then_some(())
    });
    server.client.complete(&json!({"prompt": "Veyra", "max_tokens": 2}));
    server.signal("TERM");
    let (code, log) = server.wait();
    assert!(code == 0 && log.contains("is not served, 1 still is"), "{code} {log}");
}

#[test]
fn told_to_stop_a_server_ends_what_is_under_way_and_takes_nothing_new() {
    let program = program();
    let server = Server::start(&program, &["--max-sequences", "1"]);
    let mut body = json!({"prompt": "Veyra", "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let mut running = server.client.post("/v1/completions", &body).expect(200);
    running.event().unwrap();
    // It waits for its turn, and gets it.
    body["max_tokens"] = json!(3);
    let waiting = server.client.send("POST", "/v1/completions", &body.to_string());
    wait_for("a request that waits", || (server.metric("memory3_requests_waiting") == 1.0).then_some(()));
    server.signal("TERM");
    wait_for("the door to close", || std::net::TcpStream::connect(server.client.address).is_err().then_some(()));
    let events = running.events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    let events = super::client::Response::read(waiting).expect(200).events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    let (code, log) = server.wait();
    assert!(code == 0, "{log}");
}

#[test]
fn what_does_not_end_in_time_is_cut_off_and_the_exit_code_says_so() {
    let program = program();
    program.write("serve.toml", "[serve]\nshutdown_seconds = 1\n");
    for signals in [&["TERM"][..], &["INT", "INT"]] {
        let config: &[&str] = if signals.len() == 1 { &["--config", "serve.toml"] } else { &[] };
        let server = Server::start(&program, config);
        let mut running = server.client.post("/v1/completions", &endless()).expect(200);
        running.event().unwrap();
        for signal in signals {
            server.signal(signal);
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let (code, log) = server.wait();
        assert!(code == 1 && log.contains("1 requests were cut off"), "{code} {log}");
    }
}

#[test]
fn a_damaged_record_fails_the_requests_that_read_it_and_no_others() {
    let program = program();
    let server = Server::start(&program, &["--cache-bytes", "0"]);
    let body = json!({"prompt": "Veyra", "max_tokens": 2});
    let found = server.client.complete(&body);
    let record = &found["choices"][0]["memory3"]["references"][0]["records"][0]["record"];
    let id: memory3::memory::RecordId = record.as_str().unwrap().parse().unwrap();
    let bank = memory3::bank::Bank::open(&program.path().join("bank")).unwrap();
    let at = bank.shard(id.shard).unwrap().record_offset(id.slot) + 40;
    let path = program.path().join(format!("bank/shards/{:06}.m3s", id.shard));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    let error = server.client.post("/v1/completions", &body).expect(500).json()["error"].clone();
    assert_eq!(error["type"], "server_error");
    assert!(error["message"].as_str().unwrap().contains("checksum"), "{error}");
    // One that is streamed has its status, too, for nothing has gone out yet.
    server.client.post("/v1/completions", &json!({"prompt": "Veyra", "stream": true})).expect(500);
    server.client.complete(&json!({"prompt": "Veyra", "max_tokens": 2, "memory3": {"no_memory": true}}));
    file.write_all_at(&byte, at).unwrap();
    assert_eq!(server.client.complete(&body)["usage"], found["usage"]);
}
