#!/usr/bin/env bash
# Installs what a build and its tests need and a fresh Debian machine lacks: a C++ tool chain, OpenBLAS, a Python
# environment in .venv (NumPy and FAISS, for the independent reader), and the default text encoder.
# Everything already there is left alone. The Rust tool chain must be present.
set -euo pipefail
cd "$(dirname "$0")/.."

need=()
command -v cmake >/dev/null || need+=(cmake)
command -v make >/dev/null || need+=(make)
command -v g++ >/dev/null || need+=(g++)
command -v pkg-config >/dev/null || need+=(pkg-config)
command -v python3 >/dev/null || need+=(python3)
dpkg -s libopenblas-dev >/dev/null 2>&1 || need+=(libopenblas-dev)
python3 -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv)
python3 -m pip --version >/dev/null 2>&1 || need+=(python3-pip)
if [ ${#need[@]} -gt 0 ]; then
    echo "installing ${need[*]}"
    as_root=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || { echo "not root and no sudo: install ${need[*]} by hand" >&2; exit 2; }
        as_root=sudo
    fi
    $as_root apt-get update -qq
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
fi
command -v cargo >/dev/null || { echo "cargo is missing: install a Rust tool chain first" >&2; exit 2; }

if ! .venv/bin/python -c 'import numpy, faiss, zstandard' 2>/dev/null; then
    echo "making the Python environment .venv"
    python3 -m venv .venv
    .venv/bin/python -m pip install -q -r tools/requirements.txt
fi

tools/get_default_embedder.sh
