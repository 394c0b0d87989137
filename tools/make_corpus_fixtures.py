"""Writes tests/fixtures/corpus/ids.json: the token ids that the Python tokenizers library gives for texts.json.

Usage: python tools/make_corpus_fixtures.py tests/fixtures/corpus

Reads `tokenizer.json` (made by `init_model` from training.txt with 600 tokens; the test
`the_committed_tokenizer_is_what_training_gives` compares it) and `texts.json` in that folder. Needs `pip install
tokenizers`; the fixture was made with 0.23.3.
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = json.loads((folder / "texts.json").read_text())
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    rows = ",\n".join(json.dumps(row) for row in ids)
    (folder / "ids.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
