#!/usr/bin/env python3
"""`memory3 compile` against tools/peer_compile.py: the same chunks, model, embedder and codec, in turn.

    benches/end_to_end.py --memory3 target/release/memory3 --model DIR --embedder DIR --corpus FILE.jsonl[.zst]
                          [--chunks N] [--rounds R] [--dtypes f32 bf16] [--python PYTHON] [--json FILE]

In: a program, a decoder, an encoder, a corpus. Out: chunks/s of both, of the whole run and by stage, ratios of medians,
peak memory; with --json every round too. Both take whole documents until N chunks are reached.

What is compared, and what is not:
  program  From start to exit: what a user waits for, but not the same work. memory3 loads and surveys the corpus; the
           peer imports its libraries, loads, and tries batch sizes.
  CPU      The same by processor time, of whole programs. It is what other work on the machine changes least.
  run      Between loading and exit. For memory3 its report's `seconds` less the survey, which the peer does not do: the
           survey's busy time is one measurement on the wall, before the stages begin. Codec training is in no measured
           run: a first compile, not counted, trains, and each new bank begins with its draft, as an interrupted run
           does. Opening model and embedder stays in memory3's time and is in none of the peer's.
  stage    Chunks per core-second. memory3 adds up the time of all threads in a stage, the peer's wall time of a stage
           is taken times its threads. Both count waiting for a core.
Where `cores busy` is far from the threads, or unlike on the two sides, the machine was not free: only CPU means much.
A run that sampled, trained or stopped, or that made other records than the peer, is an error.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["encode", "quantize", "embed", "write"]
CODEC = "index/codec.faiss"


def measured(command, accepted=(0,), **options):
    """(wall seconds, processor seconds of all threads, standard output) of a program."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    # One reader for both: a full pipe would stop the program.
    out, err = process.communicate()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode not in accepted:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {process.returncode}\n{err[-3000:]}")
    return wall, cpu, out


def compile_bank(options, bank, dtype):
    command = [options.memory3, "compile", options.corpus, "--bank", bank, "--model", options.model]
    command += ["--embedder", options.embedder, "--dtype", dtype, "--embedder-dtype", dtype]
    command += ["--max-chunks", options.chunks, "--threads", options.threads, "--codec", options.codec]
    # Neither a settings file nor the caller's variables may change what is measured. Exit 1: documents were rejected.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY3_")}
    wall, cpu, _ = measured([str(part) for part in command] + ["--quiet"], (0, 1), cwd=bank.parent, env=environment)
    return wall, cpu, json.loads((bank / "index/report.json").read_text())


def train_codec(options, folder, dtype):
    """The codec of a bank that memory3 makes, and the draft with which another compile takes it as its own."""
    bank = folder / f"trained-{dtype}"
    *_, report = compile_bank(options, bank, dtype)
    manifest = json.loads((bank / "index/manifest.json").read_text())
    entry = manifest["codec"]
    if not (bank / CODEC).exists() or len(entry["files"]) != 1:
        raise SystemExit(f"memory3 made {report['codec']}: no codec file for the peer; take more chunks, or --codec")
    # What the program itself writes before its first record, and an interrupted run goes on with (bank/draft.rs).
    draft = {"format": "memory3 draft", "version": manifest["version"]}
    draft |= {name: manifest[name] for name in ("fingerprint", "embedder", "codec")}
    # The settings of the command in `compile_bank`, as the program writes them.
    draft["trained_by"] = f"spec {options.codec}, scope shared, training_vectors 262144, seed 1234"
    return bank, draft, report


def memory3_round(options, folder, dtype, trained, draft):
    bank = folder / "bank"
    shutil.rmtree(bank, ignore_errors=True)
    (bank / "index").mkdir(parents=True)
    for entry in draft["codec"]["files"].values():
        shutil.copy(trained / "index" / entry["file"], bank / "index")
    (bank / "index/draft.json").write_text(json.dumps(draft))
    wall, cpu, report = compile_bank(options, bank, dtype)
    stages = {stage["name"]: stage for stage in report["stages"]}
    if report["stopped"] or "sample" in stages or "train" in stages:
        raise SystemExit(f"memory3 did not take the codec it was given: {sorted(stages)}")
    chunks = report["chunks"]["encoded"]
    run = report["seconds"] - stages["survey"]["busy_seconds"]
    rates = {name: stages[name]["items"] / max(stages[name]["busy_seconds"], 1e-9) for name in STAGES}
    return {
        "chunks": chunks,
        "program_s": wall,
        "run_s": run,
        "program": chunks / wall,
        "run": chunks / run,
        "cpu_s": cpu,
        "cores": cpu / wall,
        "per_cpu_s": chunks / cpu,
        "stages": rates,
        "peak_bytes": report["peak_memory_bytes"],
    }


def peer_round(options, folder, dtype, trained):
    command = [options.python, ROOT / "tools/peer_compile.py", "--model", options.model, "--embedder", options.embedder]
    command += ["--corpus", options.corpus, "--codec", trained / CODEC, "--out", folder / "peer"]
    command += ["--max-chunks", options.chunks, "--dtype", dtype, "--embed-dtype", dtype]
    command += ["--threads", options.threads, "--json"]
    wall, cpu, out = measured([str(part) for part in command])
    report = json.loads(out)
    rates = {name: report["stages"][name]["chunks_per_s"] / report["threads"] for name in STAGES}
    return {
        "chunks": report["records"],
        "program_s": wall,
        "run_s": report["run_s"],
        "program": report["records"] / wall,
        "run": report["chunks_per_s"],
        "cpu_s": cpu,
        "cores": cpu / wall,
        "per_cpu_s": report["records"] / cpu,
        "run_per_cpu_s": report["chunks_per_cpu_s"],
        "stages": rates,
        "peak_bytes": report["peak_rss_bytes"],
        "batch": report["batch"],
        "versions": report["versions"],
    }


def text_of(command):
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor():
    lines = (text_of(["lscpu"]) or "").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name:")]
    return names[0] if names else platform.processor()


def summary(rounds):
    """Medians of both sides and the ratio of the medians: rows of (name, memory3, peer, ratio)."""

    def median(side, pick):
        return statistics.median(pick(round_[side]) for round_ in rounds)

    rows = []
    for name, pick in [
        ("cores busy", lambda side: side["cores"]),
        ("program", lambda side: side["program"]),
        ("run", lambda side: side["run"]),
        ("program, CPU", lambda side: side["per_cpu_s"]),
        *((f"stage {stage}", lambda side, stage=stage: side["stages"][stage]) for stage in STAGES),
    ]:
        ours, theirs = median("memory3", pick), median("peer", pick)
        rows.append({"name": name, "memory3": ours, "peer": theirs, "ratio": ours / theirs})
    ours, theirs = (max(round_[side]["peak_bytes"] for round_ in rounds) / 2**20 for side in ("memory3", "peer"))
    rows.append({"name": "peak MiB", "memory3": ours, "peer": theirs, "ratio": ours / theirs})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory3", type=Path, required=True, metavar="PROGRAM")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--embedder", type=Path, required=True, metavar="DIR")
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE")
    parser.add_argument("--chunks", type=int, default=2000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="R")
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--codec", default="auto", help="which codec memory3 trains for both")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", default=sys.executable, help="one that has what the peer needs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    for name in ("memory3", "model", "embedder", "corpus"):
        setattr(options, name, getattr(options, name).resolve())

    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": options.threads}
    result = {"machine": machine, "git": text_of(["git", "describe", "--always", "--dirty", "--tags"])}
    result |= {"memory3": text_of([str(options.memory3), "--version"]), "chunks": options.chunks, "dtypes": {}}
    print(__doc__.split("What is compared, and what is not:\n")[1].rstrip())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for dtype in options.dtypes:
            trained, draft, first = train_codec(options, folder, dtype)
            rounds = []
            for number in range(options.rounds):
                print(f"{dtype}: round {number + 1} of {options.rounds}", file=sys.stderr)
                sides = {
                    "memory3": lambda: memory3_round(options, folder, dtype, trained, draft),
                    "peer": lambda: peer_round(options, folder, dtype, trained),
                }
                # Who goes first changes, so that neither always finds the files in memory.
                order = list(sides) if number % 2 == 0 else list(sides)[::-1]
                rounds.append({side: sides[side]() for side in order})
                if rounds[-1]["memory3"]["chunks"] != rounds[-1]["peer"]["chunks"]:
                    counts = {side: rounds[-1][side]["chunks"] for side in sides}
                    raise SystemExit(f"not the same records: {counts}")
            rows = summary(rounds)
            chunks = rounds[0]["memory3"]["chunks"]
            print(f"\n{dtype} against {dtype}: {chunks} records, {options.threads} threads, {options.rounds} rounds")
            print(f"codec of both: {first['codec']}")
            print(f"{'chunks/s, medians':18} {'memory3':>10} {'peer':>10} {'ratio':>7}")
            for row in rows:
                print(f"{row['name']:18} {row['memory3']:10.2f} {row['peer']:10.2f} {row['ratio']:7.2f}")
            result["dtypes"][dtype] = {"codec": first["codec"], "summary": rows, "rounds": rounds}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
