# Recipes for people; each is a command that also works by hand. `just check` is what CI runs.

default:
    @just --list

# Install what is missing, compile the example corpus, ask it a question
quickstart:
    tools/quickstart.sh

# Format, lints, tests: what CI runs
check:
    .ci/run

# The quick part of `check`, for the edit loop
quick:
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings
    cargo test --locked --lib

# On a machine with an NVIDIA GPU: the tests that compare it with the CPU, and its bench
gpu:
    MEMORY3_GPU=required cargo test --locked --test suite gpu::
    cargo bench --locked --bench suite -- gpu

# A bank of 400 000 records, for figures: too long for `check`
scale:
    cargo test --locked --test suite scale -- --ignored --nocapture

# Kill compiles at random moments for some minutes, with a reader beside them; nothing may be lost
soak:
    cargo build --locked
    python3 tools/soak.py --memory3 target/debug/memory3 --codec none
    python3 tools/soak.py --memory3 target/debug/memory3 --codec PQ10x4 --seed 2

# Fuzz one target (shard, manifest, tombstones, codec, model, documents) for some seconds; needs cargo-fuzz and a nightly.
# What it finds lies in fuzz/artifacts; `cargo fuzz cmin -s none TARGET` shrinks the corpus before it is committed
fuzz TARGET SECONDS="600":
    #!/usr/bin/env bash
    set -euo pipefail
    scratch=$(mktemp -d); trap 'rm -rf "$scratch"' EXIT
    options=(-max_total_time={{SECONDS}} -max_len=8192 -rss_limit_mb=1024 -malloc_limit_mb=64 -timeout=20)
    dictionary=fuzz/dictionaries/{{TARGET}}.dict
    if [ -e "$dictionary" ]; then options+=("-dict=$dictionary"); fi
    # Only these need the whole crate; the others build without burn.
    case {{TARGET}} in model | documents) features=(--features compile) ;; *) features=() ;; esac
    export TMPDIR=$scratch
    cargo +nightly fuzz run -s none "${features[@]}" {{TARGET}} -- "${options[@]}"
