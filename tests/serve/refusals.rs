//! What is refused, and how: statuses, OpenAI's error object, the field that is to blame.

use serde_json::{Value, json};

use super::{Server, program};
use crate::compile::program::tiny_encoder;

#[test]
fn bad_requests_are_refused_by_field_and_change_nothing() {
    let program = program();
    let server = Server::start(&program, &["--max-context", "200", "--max-tokens", "100", "--max-sequences", "4"]);
    let with = |field: &str, value: Value| {
        let mut body = json!({"prompt": "Veyra", "max_tokens": 2});
        body[field] = value;
        body
    };
    let cases = [
        (json!({}), "prompt", "none"),
        (json!({"prompt": []}), "prompt", "nothing"),
        (with("prompt", json!(7)), "", "prompt: a text"),
        (with("prompt", json!([1, 1_000_000])), "prompt", "token 1000000"),
        (with("prompt", json!("word ".repeat(500))), "prompt", "room for 200 in all"),
        (with("max_tokens", json!(0)), "max_tokens", "choose 1 to 100"),
        (with("max_tokens", json!(101)), "max_tokens", "choose 1 to 100"),
        (with("max_tokens", json!(-1)), "", "invalid value"),
        (with("max_completion_tokens", json!(101)), "max_completion_tokens", "choose 1 to 100"),
        (with("temperature", json!(2.5)), "temperature", "choose 0 to 2"),
        (with("top_p", json!(-0.1)), "top_p", "choose 0 to 1"),
        (with("n", json!(0)), "n", "choose 1"),
        (with("n", json!(5)), "n", "at most 4"),
        (with("n", json!(u64::MAX)), "n", "at most 4"),
        (with("stop", json!(3)), "", "stop: a text"),
        (with("stop", json!(vec!["x"; 17])), "stop", "at most 16"),
        (with("logprobs", json!(0)), "logprobs", "does not do that"),
        (with("echo", json!(true)), "echo", "does not do that"),
        (with("tools", json!([{"type": "function"}])), "tools", "does not do that"),
        (with("response_format", json!({"type": "json_object"})), "response_format", "does not do that"),
        (with("presence_penalty", json!(0.5)), "presence_penalty", "does not do that"),
        (with("best_of", json!(2)), "best_of", "does not do that"),
        (with("memory3", json!({"memory": 3})), "", "unknown field `memory`"),
        (with("memory3", json!({"memories": 65})), "memory3", "choose 0 to 64"),
    ];
    for (body, param, message) in &cases {
        let error = server.client.post("/v1/completions", body).expect(400).json()["error"].clone();
        let param = if param.is_empty() { Value::Null } else { json!(param) };
        assert_eq!((&error["param"], &error["type"]), (&param, &json!("invalid_request_error")), "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {error}");
    }
    let long = server.client.post("/v1/completions", &with("prompt", json!("word ".repeat(500)))).json();
    assert_eq!(long["error"]["code"], "context_length_exceeded");
    // What means nothing is passed over.
    let nothing = json!({"prompt": "Veyra", "max_tokens": 2, "logprobs": null, "echo": false, "tools": [], "suffix": "",
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "user": "ada", "novel": [1],
        "response_format": {"type": "text"}, "stop": null, "stream": null, "seed": null, "memory3": null});
    assert_eq!(server.client.complete(&nothing)["choices"].as_array().unwrap().len(), 1);
    let chats = [
        (json!({}), "there are none"),
        (json!({"messages": []}), "there are none"),
        (json!({"messages": [{"content": "x"}]}), "a role"),
        (json!({"messages": [{"role": "wizard", "content": "x"}]}), "wizard"),
        (json!({"messages": [{"role": "user", "content": 3}]}), "content is"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "reads text"),
    ];
    for (body, message) in &chats {
        let error = server.client.post("/v1/chat/completions", body).expect(400).json()["error"].clone();
        assert_eq!(error["param"], "messages");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {error}");
    }
    let searches = [json!({"query": "x", "k": 0}), json!({"query": "x", "k": 101}), json!({"q": "x"}), json!({})];
    searches.iter().for_each(|body| drop(server.client.post("/v1/memories/search", body).expect(400)));
    assert_eq!(server.metric("memory3_sequences"), 0.0);
}

#[test]
fn requests_that_are_no_requests_have_statuses_of_their_own() {
    let program = program();
    let server = Server::start_with(&program, &["--max-body-bytes", "1K"], &[]);
    let client = &server.client;
    let error = |response: super::client::Response, status| response.expect(status).json()["error"].clone();
    assert_eq!(error(client.get("/v1/nowhere"), 404)["param"], Value::Null);
    assert_eq!(error(client.get("/v1/completions"), 405)["type"], "invalid_request_error");
    let other = json!({"model": "gpt-x", "prompt": "x"});
    assert_eq!(error(client.post("/v1/completions", &other), 404)["code"], "model_not_found");
    for body in ["{", "[]", "\"x\"", "{\"prompt\": \"x\"} more", "\u{0}"] {
        error(client.request("POST", "/v1/completions", body), 400);
    }
    let large = json!({"prompt": "x".repeat(2000)}).to_string();
    error(client.request("POST", "/v1/completions", &large), 413);
    error(client.with("content-type: text/plain").request("POST", "/v1/completions", "{}"), 415);
    // A body without a length, in chunks, is measured as it comes.
    let chunk = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let chunked = client.with("transfer-encoding: chunked\r\ncontent-type: application/json");
    let mut stream = chunked.send("POST", "/v1/completions", "");
    std::io::Write::write_all(&mut stream, chunk.as_bytes()).unwrap();
    error(super::client::Response::read(stream), 413);
    // A page that a browser shows cannot reach the server by a name of its own.
    let forged = client.with("host: example.org:80").get("/v1/models");
    assert_eq!(error(forged, 403)["type"], "permission_error");
    client.with("host: localhost:8377").get("/v1/models").expect(200);
    assert!(client.get("/v1/models").header("access-control-allow-origin").is_none());
}

#[test]
fn a_token_is_wanted_where_there_is_one_and_for_other_machines() {
    let program = program();
    let token = "0123456789abcdef-token";
    let path = program.write("token", format!("{token}\n"));
    let server =
        Server::start(&program, &["--token-file", path.to_str().unwrap(), "--cors-origin", "https://a.example"]);
    let client = &server.client;
    let refused = client.get("/v1/models").expect(401);
    assert_eq!(refused.header("www-authenticate"), Some("bearer"));
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    for shown in [token[1..].to_owned(), format!("{token}x"), String::new(), token.to_uppercase()] {
        client.with(&format!("authorization: Bearer {shown}")).get("/metrics").expect(401);
    }
    client.with(&format!("authorization: Basic {token}")).get("/metrics").expect(401);
    let known = client.with(&format!("authorization: bearer {token}"));
    // With a token any name will do; health needs none.
    known.with("host: example.org").get("/v1/models").expect(200);
    known.complete(&json!({"prompt": "Veyra", "max_tokens": 2}));
    client.get("/health").expect(200);
    client.get("/ready").expect(200);
    let origin = |origin: &str| known.with(&format!("origin: {origin}")).get("/v1/models");
    assert_eq!(origin("https://a.example").header("access-control-allow-origin"), Some("https://a.example"));
    assert!(origin("https://b.example").header("access-control-allow-origin").is_none());
    let preflight = client.with("origin: https://a.example").with("access-control-request-method: POST");
    preflight.request("OPTIONS", "/v1/completions", "").expect(200);
    drop(server);

    let encoder = tiny_encoder();
    let args = ["serve", "--bank", "bank", "--model", "model", "--embedder", encoder.to_str().unwrap(), "--listen"];
    let open = program.run(&[&args[..], &["0.0.0.0:0"]].concat()).expect(2);
    assert!(open.stderr.contains("--token-file"), "{}", open.stderr);
    program.write("short", "secret");
    let short = program.run(&[&args[..], &["127.0.0.1:0", "--token-file", "short"]].concat()).expect(2);
    assert!(short.stderr.contains("at least 16") && !short.stderr.contains("secret"), "{}", short.stderr);
    let server = Server::start_with(&program, &["--listen", "0.0.0.0:0"], &[("MEMORY3_TOKEN", token)]);
    let port = server.client.address.port();
    let client = super::client::Client::new(([127, 0, 0, 1], port).into());
    client.get("/v1/models").expect(401);
    client.with(&format!("authorization: Bearer {token}")).get("/v1/models").expect(200);
}
