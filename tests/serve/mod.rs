//! `memory3 serve` over real sockets: the binary, and a client of some lines.

mod answers;
mod chats;
mod client;
mod limits;
mod operate;
mod refusals;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::compile::program::{Program, repository, tiny_encoder};
use client::Client;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; dropped, it is killed.
pub struct Server {
    child: Child,
    pub client: Client,
    log: std::path::PathBuf,
}

/// A folder with a tiny model of long contexts, so that requests can last, and a bank of the example corpus.
pub fn program() -> Program {
    let program = Program::new();
    edit_json(&program.path().join("model/config.json"), |config| config["max_position_embeddings"] = json!(1 << 17));
    let corpus = repository().join("examples/corpus");
    program.compile("bank", &[corpus.to_str().unwrap(), "--codec", "none"]).expect(0);
    program
}

pub fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

impl Server {
    /// Starts a server on the folder's bank and waits until it listens.
    pub fn start(program: &Program, args: &[&str]) -> Self {
        Self::start_with(program, args, &[])
    }

    /// [`Server::start`] with environment variables.
    pub fn start_with(program: &Program, args: &[&str], variables: &[(&str, &str)]) -> Self {
        let log = program.path().join(format!("serve-{:?}.log", Instant::now()));
        let mut command = program.command(&["serve", "--bank", "bank", "--model", "model"]);
        command.arg("--embedder").arg(tiny_encoder()).args(args).envs(variables.iter().copied());
        for (flag, value) in [("--listen", "127.0.0.1:0"), ("--max-context", "100000"), ("--max-tokens", "90000")] {
            if !args.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command.stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").and_then(|address| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("{line:?}\n{}", std::fs::read_to_string(&log).unwrap()));
        Self { child, client: Client::new(address), log }
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status =
            std::process::Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end; gives exit code and log.
    pub fn wait(mut self) -> (i32, String) {
        let code = wait_for("the server's end", || self.child.try_wait().unwrap()).code().unwrap_or(-1);
        (code, std::fs::read_to_string(&self.log).unwrap())
    }

    /// A number of `/metrics`, with its labels; 0 if it is not there.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.client.get("/metrics").expect(200).text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.parse().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again and again until there is an answer.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A request that lasts until somebody ends it.
pub fn endless() -> Value {
    json!({"prompt": "Veyra", "max_tokens": 90_000, "ignore_eos": true, "stream": true, "temperature": 1.0})
}
