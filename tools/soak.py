#!/usr/bin/env python3
"""Kills memory3 at random moments, round after round, and checks that nothing is lost.

    soak.py --memory3 target/debug/memory3 [--rounds 200] [--seed 1] [--codec none]

A corpus of small JSON lines changes from round to round; compile, append, remove, compact and rollback are run on its bank and
killed with SIGKILL after a random time, in most rounds. Meanwhile a reader process searches, shows and verifies without end.
After each round the bank must hold exactly one of the states that the round may leave (the old one or the new one), with
the right texts; when a verb was not killed, the new one. At the end the bank is verified and compiled once more.
Exit code 0: nothing was lost, no reader failed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WORDS = "ferry island storm harbour lamp keeper rope winter bell tide anchor pier gull mist sail".split()


class Soak:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.random = random.Random(args.seed)
        self.bank, self.corpus = folder / "bank", folder / "corpus.jsonl"
        root = Path(__file__).resolve().parent.parent
        self.embedder = root / "tests/fixtures/embed/tiny-bert-cls"
        self.model = folder / "model"
        self.command("init-model", "--preset", "tiny", "--seed", "7", "--tokenizer-corpus",
                     str(root / "examples/corpus"), str(self.model)).check_returncode()
        self.documents, self.next = {}, 0
        self.reads, self.failures, self.generations = 0, [], set()
        self.done = threading.Event()
        self.killed = self.finished = 0
        self.abandoned = False

    def command(self, *args, **more):
        return subprocess.run([self.args.memory3, *map(str, args)], capture_output=True, text=True, **more)

    def text(self):
        return " ".join(self.random.choices(WORDS, k=self.random.randint(5, 200))) + f" {self.random.random()}"

    def grow(self, count):
        for _ in range(count):
            self.documents[f"doc-{self.next}"] = self.text()
            self.next += 1

    def write(self, documents, path=None):
        lines = [json.dumps({"id": name, "text": text}) for name, text in documents.items()]
        (path or self.corpus).write_text("\n".join(lines) + "\n")

    def settings(self):
        return ["--model", self.model, "--embedder", self.embedder, "--bank", self.bank, "--codec", self.args.codec,
                "--records-per-shard", 16, "--batch-chunks", 4, "--keep-generations", 3, "--quiet", "--json"]

    def held(self):
        """Documents of the published generation, each with the texts of its chunks: read by verbs only."""
        found = self.command("search", "lamp", "-k", 100000, "--bank", self.bank, "--embedder", self.embedder, "--json")
        if found.returncode:
            raise SystemExit(f"search failed: {found.stderr}")
        chunks = {}
        for hit in json.loads(found.stdout)["hits"]:
            for place in hit["documents"]:
                chunks.setdefault(place["document"], []).append((place["start"], hit["text"]))
        return {name: "".join(text for _, text in sorted(parts)) for name, parts in chunks.items()}

    def run(self, *args):
        """Runs a verb and kills it after a random time; true if it came to its end."""
        child = subprocess.Popen([self.args.memory3, *map(str, args)], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        wait = self.random.choice([None, self.random.uniform(0, 0.15), self.random.uniform(0, self.args.longest)])
        try:
            _, errors = child.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            self.killed += 1
            return False
        self.finished += 1
        if child.returncode not in (0, 1):
            raise SystemExit(f"{args[0]}: exit code {child.returncode}: {errors}")
        return True

    def read(self):
        """The reader: every answer is whole, whatever is being written."""
        while not self.done.is_set():
            for args in (["search", "lamp keeper", "-k", 8, "--embedder", self.embedder],
                         ["verify", "--no-catalog"], ["inspect"]):
                found = self.command(*args, "--bank", self.bank, "--json")
                self.reads += 1
                if found.returncode:
                    self.failures.append(f"{args[0]}: {found.returncode}: {found.stdout[-2000:]} {found.stderr}")
                    continue
                answer = json.loads(found.stdout)
                if args[0] == "inspect":
                    self.generations.add(answer["generation"])
                if args[0] == "search":
                    for hit in answer["hits"][:2]:
                        shown = self.command("show", hit["record"], "--bank", self.bank, "--model", self.model, "--json")
                        self.reads += 1
                        # A newer generation may have moved the record; what is shown must be that text.
                        if shown.returncode == 0 and json.loads(shown.stdout)["content"] is None:
                            self.failures.append(f"show: {shown.stdout}")
                        if shown.returncode and "no record" not in shown.stderr:
                            self.failures.append(f"show: {shown.stderr}")

    def round(self):
        verbs = ["compile"] * 5 + ["append", "remove", "compact", "compact", "rollback"]
        if self.abandoned:
            # append refuses what an interrupted compile has begun to replace.
            verbs.remove("append")
        listed = self.command("generations", "--bank", self.bank, "--json")
        if len(json.loads(listed.stdout)) < 2:
            verbs.remove("rollback")
        verb = self.random.choice(verbs)
        before = dict(self.documents)
        if verb == "compile":
            for name in self.random.sample(sorted(self.documents), k=len(self.documents) // 20):
                del self.documents[name]
            for name in self.random.sample(sorted(self.documents), k=len(self.documents) // 20 + 1):
                self.documents[name] = self.text()
            self.grow(self.random.randint(0, 6))
            self.write(self.documents)
            command = ["compile", self.corpus, *self.settings(), "--allow-shrink", "--allow-change"]
        elif verb == "append":
            old = set(self.documents)
            self.grow(3)
            path = self.folder / "more.jsonl"
            self.write({name: text for name, text in self.documents.items() if name not in old}, path)
            command = ["append", path, *self.settings()]
        elif verb == "remove":
            gone = self.random.sample(sorted(self.documents), k=2)
            for name in gone:
                del self.documents[name]
            command = ["remove", *gone, "--ignore-missing", "--bank", self.bank, "--keep-generations", 3, "--allow-shrink"]
        elif verb == "compact":
            command = ["compact", "--live-below", 0.8, "--records-per-shard", 16, "--set-aside", "--bank", self.bank, "--keep-generations", 3]
        else:
            command = ["rollback", "--bank", self.bank, "--keep-generations", 3]
        ended = self.run(*command)
        if verb == "rollback":
            # Where it leads is known from the verb's own words only: what counts is that the corpus brings all back.
            self.write(self.documents)
            self.must("compile", self.corpus, *self.settings(), "--allow-shrink", "--allow-change")
            ended = True
        self.abandoned = self.abandoned and not (ended and verb in ("compile", "rollback"))
        held = self.held()
        if held != self.documents:
            if ended or held != before:
                self.differ(verb, held, before)
            if verb in ("compile", "compact") and self.random.random() < 0.3:
                # Nobody goes on with it: what it left must not be in the way.
                self.documents, self.abandoned = before, True
                return
            # The same command again goes on, and ends in the new state.
            self.must(*command)
            self.abandoned = self.abandoned and verb != "compile"
            held = self.held()
            if held != self.documents:
                self.differ(f"{verb}, again", held, before)

    def must(self, *command):
        found = self.command(*command)
        if found.returncode not in (0, 1):
            raise SystemExit(f"{command[0]}: exit code {found.returncode}: {found.stderr}")

    def differ(self, verb, held, before):
        lost = sorted(set(self.documents) - set(held))
        extra = sorted(set(held) - set(self.documents))
        wrong = sorted(name for name in held if name in self.documents and held[name] != self.documents[name])
        old = sorted(name for name in wrong if held[name] == before.get(name))
        raise SystemExit(f"after {verb}: lost {lost[:5]}, extra {extra[:5]}, wrong {wrong[:5]} (of these old: {old[:5]})")

    def soak(self):
        self.grow(60)
        self.write(self.documents)
        self.must("compile", self.corpus, *self.settings())
        reader = threading.Thread(target=self.read)
        reader.start()
        started = time.time()
        try:
            for number in range(self.args.rounds):
                self.round()
                if number % 20 == 19:
                    print(f"round {number + 1}: {len(self.documents)} documents, {self.killed} killed, {self.reads} reads",
                          flush=True)
                if self.failures:
                    break
        finally:
            self.done.set()
            reader.join()
        if self.failures:
            raise SystemExit("the reader failed:\n" + "\n".join(self.failures[:5]))
        self.write(self.documents)
        self.must("compile", self.corpus, *self.settings(), "--allow-shrink", "--allow-change")
        verified = self.command("verify", "--bank", self.bank)
        if verified.returncode or self.held() != self.documents:
            raise SystemExit(f"at the end: {verified.stdout} {verified.stderr}")
        print(f"{self.args.rounds} rounds in {time.time() - started:.0f} s: {self.killed} runs killed, {self.finished} ended, "
              f"{self.reads} reads, {len(self.generations)} generations seen; nothing lost, no reader error")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory3", default="target/debug/memory3")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--codec", default="none")
    parser.add_argument("--longest", type=float, default=0.3, help="seconds until a run is killed, at most")
    args = parser.parse_args()
    args.memory3 = str(Path(args.memory3).resolve())
    with tempfile.TemporaryDirectory(prefix="memory3-soak-") as folder:
        Soak(args, Path(folder)).soak()


if __name__ == "__main__":
    sys.exit(main())
