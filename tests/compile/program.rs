//! Runs the binary in a folder of its own and shows everything when a run does not end as expected.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A temporary folder with a tiny model, where `memory3` is run.
pub struct Program {
    folder: TempDir,
}

/// What a run printed, and how it ended.
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    command: String,
}

impl Program {
    /// A folder with nothing but a tiny random model in `model/` and a link to the tiny encoder in `embedder/`.
    pub fn new() -> Self {
        let program = Self { folder: tempfile::tempdir().unwrap() };
        let corpus = repository().join("examples/corpus");
        program
            .run(&[
                "init-model",
                "--preset",
                "tiny",
                "--seed",
                "7",
                "--tokenizer-corpus",
                corpus.to_str().unwrap(),
                "model",
            ])
            .expect(0);
        program
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file below the folder.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A command that is ready to run in the folder, free of settings from outside.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memory3"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MEMORY3_")) {
            command.env_remove(name);
        }
        command.args(args).current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// Runs to the end.
    pub fn run(&self, args: &[&str]) -> Finished {
        finished(args, self.command(args).output().unwrap())
    }

    /// `compile` with the tiny model and the tiny encoder.
    pub fn compile(&self, bank: &str, args: &[&str]) -> Finished {
        finished(args, self.compile_command(bank, args).output().unwrap())
    }

    /// Kills a compile when it has finished its first shard.
    pub fn kill_after_a_shard(&self, bank: &str, args: &[&str]) {
        let folder = self.path().join(bank);
        let next = memory3::bank::Manifest::read(&folder).map_or(1, |manifest| manifest.next_shard);
        let shard = folder.join(format!("shards/{next:06}.m3s"));
        let mut child = self.compile_command(bank, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !shard.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the run was over before it could be killed");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Another verb with the arguments of `compile`.
    pub fn compile_verb(&self, verb: &str, bank: &str, args: &[&str]) -> Finished {
        finished(args, self.verb_command(verb, bank, args).output().unwrap())
    }

    /// [`Program::compile`], ready to run.
    pub fn compile_command(&self, bank: &str, args: &[&str]) -> Command {
        self.verb_command("compile", bank, args)
    }

    fn verb_command(&self, verb: &str, bank: &str, args: &[&str]) -> Command {
        let mut command = self.command(&[verb, "--model", "model", "--quiet", "--json", "--bank", bank]);
        command.arg("--embedder").arg(tiny_encoder()).args(args);
        command
    }
}

impl Finished {
    /// Panics with everything there is to know unless the exit code is `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "{}\nexit code {}, expected {code}\n--- stdout\n{}\n--- stderr\n{}",
            self.command, self.code, self.stdout, self.stderr
        );
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{}: {error}\n{}", self.command, self.stdout))
    }
}

fn finished(args: &[&str], output: Output) -> Finished {
    Finished {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: format!("memory3 {}", args.join(" ")),
    }
}

/// The checkout.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A random BERT of 32 dimensions: fast, and good for everything but meaning.
pub fn tiny_encoder() -> PathBuf {
    repository().join("tests/fixtures/embed/tiny-bert-cls")
}

/// Name and bytes of every file of a bank that must not differ between two runs: all but the catalog, the lock, the
/// ledger and the run report.
pub fn published_files(bank: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![bank.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(bank).unwrap().to_string_lossy().into_owned();
            if ["index/catalog", "index/lock", "index/ledger.jsonl", "index/report.json"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() { folders.push(path) } else { files.push((name, std::fs::read(&path).unwrap())) }
        }
    }
    files.sort();
    files
}
