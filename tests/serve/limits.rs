//! How much a server takes on, and what becomes of requests that nobody waits for.

use std::net::TcpStream;

use serde_json::{Value, json};

use super::client::Response;
use super::{Server, endless, program, wait_for};

fn short() -> Value {
    json!({"prompt": "Veyra", "max_tokens": 2})
}

/// Starts a request that lasts, and waits for its first piece.
fn started(server: &Server) -> Response {
    let mut response = server.client.post("/v1/completions", &endless()).expect(200);
    response.event().unwrap();
    response
}

#[test]
fn who_finds_no_place_waits_and_who_finds_no_room_to_wait_is_told_when_to_come_back() {
    let program = program();
    program.write("limits.toml", "[serve]\nqueue_seconds = 2\n");
    let server = Server::start(&program, &["--config", "limits.toml", "--max-sequences", "2", "--max-queue", "1"]);
    let first = started(&server);
    let second = started(&server);
    let post = |body: &Value| server.client.send("POST", "/v1/completions", &body.to_string());
    let waiting = post(&short());
    wait_for("a request that waits", || (server.metric("memory3_requests_waiting") == 1.0).then_some(()));
    let refused = server.client.post("/v1/completions", &short()).expect(429);
    assert_eq!(refused.header("retry-after"), Some("2"));
    let error = refused.json()["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("queue_full")));
    // Searches do not wait behind texts.
    server.client.ask("/v1/memories/search", &json!({"query": "Veyra"}));
    let late = Response::read(waiting).expect(503);
    assert_eq!(late.header("retry-after"), Some("2"));
    assert_eq!(late.json()["error"]["code"], "queue_timeout");
    // A place that becomes free goes to who waits.
    let waiting = post(&short());
    drop(first);
    assert_eq!(Response::read(waiting).expect(200).json()["usage"]["completion_tokens"], 2);
    drop(second);
    server.client.complete(&short());
}

#[test]
fn a_request_that_takes_too_long_ends_and_leaves_its_place() {
    let program = program();
    program.write("limits.toml", "[serve]\nrequest_seconds = 1\n");
    let server = Server::start(&program, &["--config", "limits.toml", "--max-sequences", "1"]);
    let mut body = endless();
    let mut streamed = server.client.post("/v1/completions", &body).expect(200);
    let events: Vec<String> = std::iter::from_fn(|| streamed.event()).collect();
    let [.., error, done] = &events[..] else { panic!("{events:?}") };
    let error: Value = serde_json::from_str(error).unwrap();
    assert_eq!((error["error"]["code"].as_str(), done.as_str()), (Some("timeout"), "[DONE]"));
    body["stream"] = json!(false);
    let error = server.client.post("/v1/completions", &body).expect(504).json();
    assert_eq!(error["error"]["type"], "server_error");
    server.client.complete(&short());
    assert_eq!(server.metric("memory3_cancelled_sequences_total"), 2.0);
}

#[test]
fn a_client_that_goes_away_ends_its_texts() {
    let program = program();
    let server = Server::start(&program, &["--max-sequences", "4"]);
    let gone = |start: &dyn Fn() -> Vec<TcpStream>| {
        let before = server.metric("memory3_cancelled_sequences_total");
        let streams = start();
        wait_for("texts that grow", || (server.metric("memory3_sequences") == 4.0).then_some(()));
        drop(streams);
        wait_for("their end", || (server.metric("memory3_sequences") == 0.0).then_some(()));
        assert_eq!(server.metric("memory3_cancelled_sequences_total"), before + 4.0);
        let tokens = || server.metric("memory3_tokens_total{kind=\"completion\"}");
        let now = tokens();
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert_eq!(tokens(), now);
    };
    let mut body = endless();
    let start = |body: Value| move |server: &Server| server.client.send("POST", "/v1/completions", &body.to_string());
    let streaming = start(body.clone());
    gone(&|| (0..4).map(|_| streaming(&server)).collect());
    // Whoever waits for a whole answer can leave, too; all texts of a request go with it.
    body["stream"] = json!(false);
    body["n"] = json!(4);
    let whole = start(body);
    let left = || server.metric("memory3_http_requests_total{route=\"/v1/completions\",status=\"499\"}");
    let before = left();
    gone(&|| vec![whole(&server)]);
    wait_for("the note that a client left", || (left() == before + 1.0).then_some(()));
    server.client.complete(&short());
}

#[test]
fn a_client_that_sends_nothing_keeps_nobody_from_being_served() {
    let program = program();
    program.write("limits.toml", "[serve]\nmax_connections = 3\n");
    let server = Server::start(&program, &["--config", "limits.toml"]);
    let silent: Vec<TcpStream> = (0..2).map(|_| TcpStream::connect(server.client.address).unwrap()).collect();
    server.client.complete(&short());
    // One more than there may be waits until one of them leaves.
    let third = TcpStream::connect(server.client.address).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    let waiting = server.client.send("POST", "/v1/completions", &short().to_string());
    waiting.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    assert!(waiting.peek(&mut [0]).is_err());
    waiting.set_read_timeout(Some(super::PATIENCE)).unwrap();
    drop(third);
    Response::read(waiting).expect(200);
    drop(silent);
}
