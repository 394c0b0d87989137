//! Chats: by the model's template, or the plain form.

use serde_json::{Value, json};

use super::{Server, program};

const PATH: &str = "/v1/chat/completions";

/// The text that goes on from a prompt, greedily.
fn completed(server: &Server, prompt: &str, stop: &[&str]) -> String {
    let body = json!({"prompt": prompt, "max_tokens": 24, "temperature": 1, "seed": 11, "stop": stop});
    server.client.complete(&body)["choices"][0]["text"].as_str().unwrap().to_owned()
}

fn chat(messages: &Value) -> Value {
    json!({"messages": messages, "max_completion_tokens": 24, "temperature": 1, "seed": 11})
}

#[test]
fn without_a_template_a_chat_is_written_in_the_plain_form() {
    let program = program();
    let server = Server::start(&program, &[]);
    let parts = json!([{"type": "text", "text": "How high"}, {"type": "text", "text": "is it?"}]);
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]);
    let found = server.client.ask(PATH, &chat(&messages));
    let prompt = "System: Be brief.\nUser: How high\nis it?\nAssistant:";
    let message = json!({"role": "assistant", "content": completed(&server, prompt, &["\nUser:"])});
    assert_eq!((&found["choices"][0]["message"], &found["object"]), (&message, &json!("chat.completion")));
    assert!(found["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(found["choices"][0]["memory3"]["references"].as_array().unwrap().len(), 1);
}

#[test]
fn a_template_writes_the_prompt_and_its_bos_is_not_doubled() {
    let program = program();
    let template =
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}[answer]";
    program.write("model/chat_template.jinja", template);
    let server = Server::start(&program, &[]);
    let messages = json!([{"role": "user", "content": "Veyra?"}]);
    let found = server.client.ask(PATH, &chat(&messages));
    let expected = completed(&server, "[user] Veyra?</s>[answer]", &[]);
    assert_eq!(found["choices"][0]["message"]["content"], expected);
    let plain = server.client.complete(&json!({"prompt": "[user] Veyra?</s>[answer]", "max_tokens": 1}));
    assert_eq!(plain["usage"]["prompt_tokens"], found["usage"]["prompt_tokens"]);
}

#[test]
fn a_streamed_chat_tells_the_role_first_and_then_what_is_new() {
    let program = program();
    let server = Server::start(&program, &[]);
    let mut body = chat(&json!([{"role": "user", "content": "Veyra?"}]));
    body["ignore_eos"] = json!(true);
    let whole = server.client.ask(PATH, &body);
    body["stream"] = json!(true);
    let events = server.client.post(PATH, &body).expect(200).events();
    let choices: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).collect();
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["usage"].is_null()));
    assert_eq!(choices[0]["delta"]["role"], "assistant");
    assert!(choices[0]["memory3"]["references"].is_array());
    assert!(choices[1..].iter().all(|choice| choice["delta"]["role"].is_null()));
    let text: String = choices.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    assert_eq!(choices.last().unwrap()["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert!(choices.len() > 4, "{choices:?}");
}
