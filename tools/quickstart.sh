#!/usr/bin/env bash
# Sets everything up and runs the main job on the embedded default: compiles examples/corpus into this checkout's
# own bank (shards/ and index/), then asks it a question.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
cargo build --release --locked
memory3=target/release/memory3
[ -n "${CARGO_TARGET_DIR:-}" ] && memory3=$CARGO_TARGET_DIR/release/memory3

if [ ! -f models/small/config.json ]; then
    "$memory3" init-model --preset small --seed 1 --tokenizer-corpus examples/corpus models/small
fi
"$memory3" compile
"$memory3" search "How high is the summit of Mount Corran?" -k 3
