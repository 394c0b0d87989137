#!/usr/bin/env python3
"""Recall of `memory3 search` beside an independent one: sentence-transformers vectors in a flat Python FAISS index.

A question is answered if one of the k texts found holds an answer and the subject, both word for word. The independent
search embeds the texts of the bank's own records, so that both look through the same chunks.

    tools/recall.py BANK QUESTIONS.jsonl[.zst] --memory3 target/release/memory3 --embedder models/all-MiniLM-L6-v2

Needs numpy, faiss-cpu, zstandard, sentence-transformers.
"""

import argparse
import io
import json
import subprocess
import tempfile
from pathlib import Path

import faiss
import numpy as np
import zstandard
from read_bank import Bank


def read_lines(path):
    raw = Path(path).read_bytes()
    if str(path).endswith(".zst"):
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(raw))
        raw = reader.read()
    return [json.loads(line) for line in raw.decode().splitlines() if line.strip()]


def answered(question, texts):
    subject = (question.get("subject") or "").lower()
    answers = [answer.lower() for answer in question["answers"]]
    return any(subject in text and any(answer in text for answer in answers) for text in map(str.lower, texts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("questions")
    parser.add_argument("--memory3", default="target/release/memory3")
    parser.add_argument("--embedder", default="models/all-MiniLM-L6-v2")
    parser.add_argument("-k", type=int, default=5)
    args = parser.parse_args()

    questions = read_lines(args.questions)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for question in questions:
            file.write(json.dumps({"query": question["question"]}, ensure_ascii=False) + "\n")
        file.flush()
        command = [args.memory3, "search", "--queries", file.name, "--json", "-k", str(args.k)]
        command += ["--bank", args.bank, "--embedder", args.embedder]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = [[hit["text"] for hit in json.loads(line)["hits"]] for line in output.splitlines()]
    assert len(ours) == len(questions)

    # The texts of all records, through the independent reader.
    bank = Bank(Path(args.bank))
    shards = [shard for _, shard in sorted(bank.shards.items())]
    texts = [shard.text(slot) for shard in shards for slot in range(shard.records)]

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.embedder, device="cpu")
    embed = lambda batch: model.encode(batch, batch_size=64, normalize_embeddings=True, convert_to_numpy=True)
    vectors = np.ascontiguousarray(embed(texts), dtype=np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    _, found = index.search(np.ascontiguousarray(embed([q["question"] for q in questions]), dtype=np.float32), args.k)
    theirs = [[texts[i] for i in row if i >= 0] for row in found]

    def rate(results):
        return sum(answered(q, t) for q, t in zip(questions, results)) / len(questions)

    same = sum(set(a) == set(b) for a, b in zip(ours, theirs)) / len(questions)
    report = {
        "questions": len(questions),
        "records": len(texts),
        "k": args.k,
        "recall_memory3": round(rate(ours), 4),
        "recall_independent": round(rate(theirs), 4),
        "difference_points": round(100 * (rate(ours) - rate(theirs)), 2),
        "same_texts_found": round(same, 4),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
