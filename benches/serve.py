#!/usr/bin/env python3
"""Tokens a second of a running `memory3 serve`, with 1, 4 and 16 requests at once, with memories and without.

    memory3 serve --bank banks/kb --model models/llama &
    python3 benches/serve.py http://127.0.0.1:8377 --corpus docs.jsonl

Each request has a prompt of its own, cut from the corpus, and goes on for --tokens tokens, whatever the model writes.
Nothing but the standard library is needed.
"""

import argparse
import http.client
import json
import os
import statistics
import threading
import time
import urllib.parse


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--corpus", required=True, help="a file of text; JSON lines with a field `text` do, too")
    parser.add_argument("--at-once", default="1,4,16", help="requests at once, one or several numbers")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--prompt-chars", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="measured alternately; medians are given")
    parser.add_argument("--token", default=os.environ.get("MEMORY3_TOKEN"), help="the server's, if it has one")
    return parser.parse_args()


def prompts(path, count, chars):
    """Pieces of the corpus, each of another text."""
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"] if line.startswith("{") else line.strip()
            if len(text) >= chars:
                found.append(text[:chars])
            if len(found) == count:
                return found
    raise SystemExit(f"{path}: {len(found)} texts of {chars} characters, {count} are needed; choose --prompt-chars")


class Client:
    def __init__(self, url, token):
        parts = urllib.parse.urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.headers = {"content-type": "application/json"}
        if token:
            self.headers["authorization"] = f"Bearer {token}"

    def ask(self, body, first):
        """Streams a completion; gives its tokens and the seconds until the first piece of text."""
        connection = http.client.HTTPConnection(*self.address, timeout=600)
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), self.headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {response.read().decode()}")
        seen, usage = None, None
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            if seen is None and chunk["choices"] and chunk["choices"][0]["text"]:
                seen = time.perf_counter() - start
        first.append(seen if seen is not None else time.perf_counter() - start)
        return usage


def measure(client, texts, tokens, memory):
    """All texts at once: new tokens a second in all, and each request's seconds to its first text."""
    first, usages, threads = [], [], []
    start = time.perf_counter()
    for text in texts:
        body = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, "memory3": {"no_memory": not memory}}
        threads.append(threading.Thread(target=lambda body=body: usages.append(client.ask(body, first))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    assert len(usages) == len(texts) and all(usage["completion_tokens"] == tokens for usage in usages), usages
    return sum(usage["completion_tokens"] for usage in usages) / seconds, first


def main():
    args = parse()
    client = Client(args.url, args.token)
    at_once = [int(number) for number in args.at_once.split(",")]
    texts = prompts(args.corpus, max(at_once), args.prompt_chars)
    measure(client, texts[:1], 4, True)  # warm
    found = {}
    for _ in range(args.rounds):
        for number in at_once:
            for memory in (False, True):
                rate, first = measure(client, texts[:number], args.tokens, memory)
                found.setdefault((number, memory), []).append((rate, statistics.median(first)))
    print(f"{'at once':>8}  {'memories':8}  {'tokens/s':>8}  {'each':>7}  {'first text':>10}")
    for (number, memory), rounds in found.items():
        rate = statistics.median(rate for rate, _ in rounds)
        first = statistics.median(first for _, first in rounds)
        print(f"{number:8}  {'yes' if memory else 'no':8}  {rate:8.1f}  {rate / number:7.1f}  {first * 1000:7.0f} ms")


if __name__ == "__main__":
    main()
