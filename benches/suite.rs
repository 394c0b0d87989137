//! The benches of the kernels: one binary with a module for each; every further one would link burn and FAISS again.
//!
//!     cargo bench --bench suite -- [NAME]... [--quick] [--json FILE]
//!
//! In: names of benches; none means all. Out: a table for each, and with `--json` the same figures with machine,
//! commit and versions. Each bench checks its answer before it measures, takes the same numbers in every run, and
//! compares with a peer or with the processor's peak, measured in turn with it. `--quick` takes tiny sizes: it tests
//! that the benches work and says nothing about speed. That is also what runs without cargo's `--bench` flag, as in
//! `cargo test --benches`. `end_to_end.py` measures the whole program.
// A bench fails by unwrapping, and its numbers are small.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap
)]

#[path = "suite/blas.rs"]
mod blas;
#[path = "suite/codec.rs"]
mod codec;
#[path = "suite/decoder.rs"]
mod decoder;
#[path = "suite/embed.rs"]
mod embed;
#[path = "suite/forward.rs"]
mod forward;
#[path = "suite/gpu.rs"]
mod gpu;
#[path = "suite/measure.rs"]
mod measure;
#[path = "suite/numbers.rs"]
mod numbers;
#[path = "suite/peak.rs"]
mod peak;
#[path = "suite/peer.rs"]
mod peer;
#[path = "suite/product.rs"]
mod product;
#[path = "suite/read.rs"]
mod read;
#[path = "suite/report.rs"]
mod report;
#[path = "suite/select.rs"]
mod select;
#[path = "suite/training.rs"]
mod training;

use std::path::PathBuf;
use std::process::ExitCode;

use measure::Effort;
use report::Table;

/// A bench, and whether it measures one thread; otherwise it has all cores.
struct Bench {
    name: &'static str,
    one_thread: bool,
    run: fn(Effort) -> Table,
}

const BENCHES: [Bench; 9] = [
    Bench { name: "product", one_thread: true, run: product::run },
    Bench { name: "select", one_thread: true, run: select::run },
    Bench { name: "codec", one_thread: true, run: codec::run },
    Bench { name: "training", one_thread: false, run: training::run },
    Bench { name: "forward", one_thread: true, run: forward::run },
    Bench { name: "decoder", one_thread: true, run: decoder::run },
    Bench { name: "embed", one_thread: true, run: embed::run },
    Bench { name: "read", one_thread: true, run: read::run },
    Bench { name: "gpu", one_thread: false, run: gpu::run },
];

#[derive(Default)]
struct Args {
    names: Vec<String>,
    quick: bool,
    json: Option<PathBuf>,
    /// cargo's `--bench`: somebody wants figures. Without it this is a test run.
    bench: bool,
    list: bool,
}

impl Args {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--quick" | "--test" => parsed.quick = true,
                "--bench" => parsed.bench = true,
                "--list" => parsed.list = true,
                "--json" => parsed.json = Some(args.next().ok_or("--json: name a file")?.into()),
                // Flags of Rust's own test harness that take a value, and those that take none: no harness runs here.
                "--test-threads" | "--format" | "--color" | "--logfile" | "--skip" | "-Z" => drop(args.next()),
                flag if flag.starts_with('-') => {}
                name => parsed.names.push(name.to_owned()),
            }
        }
        parsed.quick |= !parsed.bench;
        let unknown = parsed.names.iter().find(|name| BENCHES.iter().all(|bench| bench.name != name.as_str()));
        match unknown {
            // A test run may be filtered by names of tests elsewhere.
            Some(name) if parsed.bench && !parsed.quick => {
                Err(format!("{name:?}: not a bench; choose from {}", BENCHES.map(|bench| bench.name).join(", ")))
            }
            _ => Ok(parsed),
        }
    }
}

fn main() -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let chosen = || BENCHES.iter().filter(|bench| args.names.is_empty() || args.names.iter().any(|n| n == bench.name));
    if args.list {
        chosen().for_each(|bench| println!("{}: benchmark", bench.name));
        return ExitCode::SUCCESS;
    }
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    // Thread time is what is measured: everything that would go to other threads must stay on this one.
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let mut tables = Vec::new();
    for bench in chosen() {
        let run = || {
            peer::set_threads(if bench.one_thread { 1 } else { rayon::current_num_threads() });
            (bench.run)(effort)
        };
        let table = if bench.one_thread { one_thread.install(run) } else { run() };
        print!("{table}");
        tables.push(table);
    }
    if let Some(path) = &args.json
        && let Err(error) = report::write_json(path, &tables, effort)
    {
        eprintln!("{}: {error}; name another file with --json", path.display());
        return ExitCode::from(2);
    }
    ExitCode::SUCCESS
}
