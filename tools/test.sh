#!/usr/bin/env bash
# Sets everything up and passes the tests: format, lints, unit and integration tests, the reader without burn,
# and the independent Python reader against a bank made here. Set MEMORY3_DATA to a folder with the real corpora to
# test on them too; a file missing there is then a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
export MEMORY3_PYTHON=$PWD/.venv/bin/python MEMORY3_EMBEDDER=$PWD/models/all-MiniLM-L6-v2

cargo fmt --check
cargo clippy --locked --all-targets -- -D warnings
cargo test --locked
# Every bench once in a tiny size: they check their answers.
cargo test --locked --bench suite -- --quick
# The reader alone must build and pass without burn, tokenizers and the command line.
cargo test --locked --no-default-features --lib
# Everything but the server, too.
cargo check --locked --no-default-features --features compile
