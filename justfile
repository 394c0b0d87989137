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
