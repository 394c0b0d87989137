#!/usr/bin/env python3
"""The yardstick of `memory3 compile`: the same records, made with what an engineer would reach for today.

Hugging Face transformers for keys and values, torch for the selection, FAISS `sa_encode` for the codes,
sentence-transformers for the retrieval vectors, a flat FAISS index. No code of ours below Python.

    tools/peer_compile.py --model DIR --embedder DIR --corpus FILE.jsonl[.zst] --codec CODEC.faiss --out DIR
    tools/peer_compile.py ... --chunks-from BANK --compare BANK        the bank's own chunks, then compared with it

In: a corpus (JSON lines with id and text) or the chunks of a bank, a decoder, an encoder, a trained codec. Out, in DIR:
    codes.bin u8 [record][layer][K, V][head][slot][byte]     tokens.bin u8 [record][layer][head][slot]
    counts.bin u8 [record]
    vectors.bin f32 [record][dim]     token_ids.bin u32 and token_offsets.bin u64     texts.bin and text_offsets.bin u64
    documents.jsonl     prefix.npz     index.faiss (inner product, flat, row = record)     meta.json, written last
What is measured: `chunks_per_s` counts records from the first byte read to the last byte synced. Loading and
calibration, which a run pays once, are reported beside it. `forward` and `select` are the parts of `encode`.
Codes of slots from `count` on mean nothing. Not done here: hashes, resuming, appending, a bank's checks.
Needs torch, transformers, sentence-transformers, tokenizers, faiss-cpu, zstandard, numpy; for banks read_bank.py.
"""

import argparse
import ctypes
import io
import json
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

STARTED = time.perf_counter()

import faiss
import numpy as np
import torch
import transformers
import zstandard
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX_TEXT = "Reference:"
CHUNK_TOKENS = 128
MAX_LINE_BYTES = 16 << 20
SLOTS = 8
GROUP_DOCUMENTS, GROUP_CHARS = 256, 1 << 18  # documents that are tokenized together
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CALIBRATION_CHUNKS = 64
BATCHES = (8, 16, 32)
MOST_WORKERS = 8  # more threads than this go into the workers' own operators: Python's lock would be in the way
FILES = "codes tokens counts vectors token_ids token_offsets texts text_offsets".split()


class Clock:
    """Seconds by stage, on the wall and of the processor; those of several workers add up."""

    def __init__(self):
        self.seconds, self.cpu, self.lock = {}, {}, threading.Lock()

    def add(self, name, seconds, cpu):
        with self.lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.cpu[name] = self.cpu.get(name, 0.0) + cpu

    @contextmanager
    def stage(self, name, cpu_clock=time.process_time):
        start, cpu = time.perf_counter(), cpu_clock()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start, cpu_clock() - cpu)


# ---- corpus -> chunks ----


def read_documents(path):
    """(id, text) of each usable line."""
    with open(path, "rb") as file:
        if path.endswith(".zst"):
            file = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file)
        for line in io.BufferedReader(file, 1 << 20):
            if len(line) > MAX_LINE_BYTES:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if not isinstance(row, dict):
                continue
            name, text = row.get("id"), row.get("text")
            if isinstance(name, (str, int)) and str(name) and isinstance(text, str) and text.strip():
                yield str(name), text


def groups(documents):
    group, chars, seen = [], 0, set()
    for name, text in documents:
        if name in seen:
            continue
        seen.add(name)
        group.append((name, text))
        chars += len(text)
        if len(group) >= GROUP_DOCUMENTS or chars >= GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


class Chunker:
    """Cuts a document into runs of at most 128 tokens that begin between characters (src/corpus/chunker.rs)."""

    def __init__(self, folder):
        settings = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        settings |= {"padding": None, "truncation": None, "post_processor": None}
        if settings["model"].get("type") == "BPE":
            settings["model"]["dropout"] = None
        self.tokenizer = Tokenizer.from_str(json.dumps(settings))
        self.prefix = self._bos(folder) + self.tokenizer.encode(PREFIX_TEXT, add_special_tokens=False).ids

    def _bos(self, folder):
        def read(name):
            return json.loads((folder / name).read_text("utf-8")) if (folder / name).exists() else {}

        token = read("tokenizer_config.json").get("bos_token")
        if token is not None:
            return [self.tokenizer.token_to_id(token if isinstance(token, str) else token["content"])]
        number = read("config.json").get("bos_token_id")
        if isinstance(number, list):
            number = number[0] if number else None
        return [] if number is None else [number]

    def chunk_batch(self, texts):
        """For each text [(token ids u32, start, end)], start and end in characters."""
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._split(text, encoding) for text, encoding in zip(texts, encodings)]

    def _split(self, text, encoding):
        ids = np.array(encoding.ids, np.uint32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        starts = offsets[:, 0]
        # ends[i]: where the tokens before i have all ended; a cut before token i is clean if it starts there or later.
        ends = np.concatenate([[0], np.maximum.accumulate(offsets[:, 1])[:-1]]) if len(ids) else starts
        clean = starts >= ends
        chunks, first, begin = [], 0, 0
        while first < len(ids):
            if len(ids) - first <= CHUNK_TOKENS:
                chunks.append((ids[first:], begin, len(text)))
                break
            cuts = np.arange(first + 1, first + CHUNK_TOKENS + 1)
            cuts = cuts[clean[cuts] & (starts[cuts] > begin)]
            if len(cuts):
                cut = int(cuts[-1])
                chunks.append((ids[first:cut], begin, int(starts[cut])))
            else:  # a stretch without a clean cut is encoded piece by piece
                rest = np.arange(first + CHUNK_TOKENS + 1, len(ids))
                rest = rest[clean[rest] & (starts[rest] > begin)]
                cut = int(rest[0]) if len(rest) else len(ids)
                end = int(starts[cut]) if len(rest) else len(text)
                at = begin
                while at < end:
                    tokens, piece_end = self._piece(text, at, end)
                    chunks.append((tokens, at, piece_end))
                    at = piece_end
            first, begin = cut, chunks[-1][2]
        return chunks

    def _piece(self, text, start, limit):
        """As many characters as give at most 128 tokens, roughly; lengths in bytes as in memory3."""
        raw = text[start:limit].encode()
        size = 4 * CHUNK_TOKENS
        while True:
            piece = raw[:size].decode("utf-8", "ignore")
            tokens = self.tokenizer.encode(piece, add_special_tokens=False).ids
            if 1 <= len(tokens) <= CHUNK_TOKENS:
                return np.array(tokens, np.uint32), start + len(piece)
            size = len(piece.encode()) * CHUNK_TOKENS // max(len(tokens), CHUNK_TOKENS + 1)
            if not raw[:size].decode("utf-8", "ignore"):
                raise ValueError("a character has more tokens than a chunk holds")


def chunks_of_corpus(path, chunker, max_chunks):
    """Groups of (document id, [(token ids, text)]), whole documents until `max_chunks` are reached."""
    total = 0
    for group in groups(read_documents(path)):
        out = []
        for (name, text), chunks in zip(group, chunker.chunk_batch([text for _, text in group])):
            out.append((name, [(ids, text[start:end]) for ids, start, end in chunks]))
            total += len(chunks)
            if max_chunks and total >= max_chunks:
                break
        yield out
        if max_chunks and total >= max_chunks:
            return


def chunks_of_bank(folder, max_chunks):
    from read_bank import Bank

    total = 0
    for number, shard in sorted(Bank(folder).shards.items()):
        for slot in range(shard.records):
            if max_chunks and total >= max_chunks:
                return
            yield [(f"{number}:{slot}", [(shard.token_ids(slot).astype(np.uint32), shard.text(slot))])]
            total += 1


# ---- chunks -> keys and values of the selected tokens ----


class Workers:
    """Threads that each run whole batches. One thread a core with its own batch does without the waiting at the end of
    every operator, and keeps going where another program takes a core; torch lets go of Python's lock in operators."""

    def __init__(self, threads):
        self.count = min(threads, MOST_WORKERS)
        each = threads // self.count
        self.pool = ThreadPoolExecutor(self.count, initializer=lambda: torch.set_num_threads(each))

    def map(self, function, items):
        """Results in any order of work, in the order of the items."""

        def work(item):
            with torch.inference_mode():  # of this thread only
                return function(*item)

        return [future.result() for future in [self.pool.submit(work, item) for item in items]]


class PackedLinear(torch.nn.Module):
    """nn.Linear by oneDNN with its weight laid out once, as torch.compile's freezing does: on AMD EPYC 9004 1.25 times
    as fast as MKL in f32, and the same numbers up to rounding."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 2048)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(module):
    for name, child in list(module.named_children()):
        if type(child) is torch.nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack(child)


class Stop(Exception):
    """Raised in the last memory layer, when its queries, keys and values are there."""


class MemoryModel:
    """The lower half of a decoder with the prefix's keys and values in front of every chunk."""

    def __init__(self, folder, dtype, prefix):
        config = transformers.AutoConfig.from_pretrained(folder)
        layers = max(1, config.num_hidden_layers // 2)
        config.num_hidden_layers = layers  # the upper half is not even loaded
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True) and window < CHUNK_TOKENS + len(prefix):
            raise SystemExit(f"{folder}: a sliding window of {window} tokens is not supported")
        ALL_ATTENTION_FUNCTIONS.register("memory", self._attention)
        config._attn_implementation = "memory"
        transformers.logging.set_verbosity_error()  # it warns of the upper layers' weights
        self.model = transformers.AutoModel.from_pretrained(folder, config=config, dtype=dtype).eval()
        self.layers, self.dtype = layers, dtype
        pack(self.model)
        # Of each worker: before[layer, "q" or "k"], before RoPE, [batch, token, head * dim];
        # after[layer], K after RoPE and V, [batch, kv_head, prefix + token, dim].
        self.seen = threading.local()
        for number, layer in enumerate(self.model.layers):
            attention = layer.self_attn
            self.kv_heads = attention.k_proj.out_features // attention.head_dim
            self.head_dim = attention.head_dim
            for key in "qk":
                module = getattr(attention, key + "_norm", None) or getattr(attention, key + "_proj")
                module.register_forward_hook(self._keeper(number, key))
        self.prefix, self.masks = None, {}
        self.forward(torch.tensor([prefix]))
        self.prefix = [tuple(tensor.clone() for tensor in self.seen.after[layer]) for layer in range(layers)]

    def _keeper(self, number, key):
        def keep(_module, _inputs, output):
            self.seen.before[number, key] = output

        return keep

    def _attention(self, module, query, key, value, attention_mask, scaling=None, **_):
        number = module.layer_idx
        if self.prefix:
            shape = (len(key), -1, -1, -1)
            k, v = self.prefix[number]
            key, value = torch.cat([k.expand(shape), key], 2), torch.cat([v.expand(shape), value], 2)
        self.seen.after[number] = key, value
        if number == self.layers - 1:
            raise Stop
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(query, key, value, attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        return out.transpose(1, 2), None

    def forward(self, ids):
        """Runs [batch, token] ids; padding stands on the right, where causal attention does not see it."""
        tokens, past = ids.shape[1], self.prefix[0][0].shape[2] if self.prefix else 0
        if (tokens, past) not in self.masks:
            mask = torch.full((tokens, past + tokens), float("-inf")).triu(past + 1)
            self.masks[tokens, past] = mask.to(self.dtype)[None, None]
        self.seen.before, self.seen.after = {}, {}
        positions = torch.arange(past, past + tokens)[None]
        mask = self.masks[tokens, past].expand(len(ids), -1, -1, -1)
        try:
            self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        except Stop:
            pass

    def memories(self, ids, lengths, clock):
        """Token indices u8 [batch, layer, head, slot] and vectors f32 [batch, layer, K or V, head, slot, dim]."""
        batch, tokens = ids.shape
        with clock.stage("forward", time.thread_time):
            self.forward(ids)
        with clock.stage("select", time.thread_time):
            past, dim = self.prefix[0][0].shape[2], self.head_dim
            mask = None if int(lengths.min()) == tokens else torch.arange(tokens) < lengths[:, None]  # [batch, token]
            chosen = torch.zeros((batch, self.layers, self.kv_heads, SLOTS), dtype=torch.uint8)
            vectors = torch.empty((batch, self.layers, 2, self.kv_heads, SLOTS, dim))
            slots = torch.arange(SLOTS) < lengths[:, None, None]  # [batch, 1, slot]
            for layer in range(self.layers):
                indices = self.select(self.seen.before[layer, "q"], self.seen.before[layer, "k"], mask)
                indices = torch.where(slots, indices, 0)
                chosen[:, layer] = indices
                place = (indices + past)[..., None].expand(-1, -1, -1, dim)
                for part, tensor in enumerate(self.seen.after[layer]):
                    vectors[:, layer, part] = tensor.gather(2, place)
        return chosen.numpy(), vectors.numpy()

    def select(self, q, k, mask):
        """Indices [batch, kv_head, slot], ascending; unused slots hold `token` numbers at the end."""
        batch, tokens = q.shape[:2]
        dim, kv_heads = self.head_dim, self.kv_heads
        # 1. logits [batch, kv_head, group * token i, token j]
        q = (q.float() * dim**-0.5).reshape(batch, tokens, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
        group = q.shape[2]
        q = q.reshape(batch * kv_heads, group * tokens, dim)
        k = k.float().reshape(batch, tokens, kv_heads, dim).permute(0, 2, 3, 1).reshape(batch * kv_heads, dim, tokens)
        logits = torch.bmm(q, k).view(batch, kv_heads, group * tokens, tokens)
        # 2. weights [batch, kv_head, token j], padding left out as i and as j
        if mask is None:
            weights = logits.softmax(-1).sum(2)
        else:
            logits.masked_fill_(~mask[:, None, None, :], float("-inf"))
            rows = mask[:, None, None, :].expand(-1, kv_heads, group, -1).reshape(batch, kv_heads, 1, -1).float()
            weights = (rows @ logits.softmax(-1)).squeeze(2).masked_fill_(~mask[:, None, :], -1.0)
        # 3. the greatest; stable, so that ties go to the lower index
        if tokens < SLOTS:
            weights = torch.nn.functional.pad(weights, (0, SLOTS - tokens), value=-1.0)
        best = weights.sort(dim=-1, descending=True, stable=True).indices[..., :SLOTS]
        if mask is not None or tokens < SLOTS:  # unused slots go to the end
            best = torch.where(weights.gather(2, best) < 0, tokens, best)
        return best.sort(-1).values


def batches_by_length(chunks, size):
    """(places, ids [batch, longest], lengths) with chunks of about one length together."""
    order = sorted(range(len(chunks)), key=lambda i: -len(chunks[i]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        lengths = np.array([len(chunks[i]) for i in places])
        ids = np.zeros((len(places), lengths.max()), np.int64)
        for row, place in enumerate(places):
            ids[row, : lengths[row]] = chunks[place]
        yield places, torch.from_numpy(ids), torch.from_numpy(lengths)


# ---- the run ----


def encode(model, chunks, batch, workers, clock):
    """Token indices u8 [chunk, layer, head, slot] and vectors f32 [chunk, layer, K or V, head, slot, dim]."""
    shape = (model.layers, model.kv_heads, SLOTS)
    tokens = np.empty((len(chunks), *shape), np.uint8)
    vectors = np.empty((len(chunks), shape[0], 2, *shape[1:], model.head_dim), np.float32)

    def work(places, ids, lengths):
        tokens[places], vectors[places] = model.memories(ids, lengths, clock)

    workers.map(work, batches_by_length(chunks, batch))
    return tokens, vectors


def embed(model, texts, batch, workers):
    """Retrieval vectors f32 [text, dim]: what SentenceTransformer.encode does, on all workers."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors = np.empty((len(texts), model.get_embedding_dimension()), np.float32)

    def work(places, features):
        found = model(features)["sentence_embedding"].float()
        vectors[places] = torch.nn.functional.normalize(found, dim=-1).numpy()

    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    workers.map(work, ((part, model.preprocess([texts[i] for i in part])) for part in parts))
    return vectors


def calibrate(options, prefix, sample, workers):
    """The model in the fastest number format and batch; chunks/s of what was tried."""
    found, best = {}, None
    for name in list(DTYPES) if options.dtype == "auto" else [options.dtype]:
        model = MemoryModel(options.model, DTYPES[name], prefix)
        encode(model, sample[:16], 8, workers, Clock())
        for size in [options.batch] if options.batch else BATCHES:
            start = time.perf_counter()
            encode(model, sample, size, workers, Clock())
            rate = len(sample) / (time.perf_counter() - start)
            found[f"{name} batch {size}"] = round(rate, 2)
            if best is None or rate > best[0]:
                best = rate, model, name, size
    return *best[1:], found


def open_embedder(options, sample, batch, workers):
    found, best = {}, None
    for name in list(DTYPES) if options.embed_dtype == "auto" else [options.embed_dtype]:
        model = SentenceTransformer(str(options.embedder), device="cpu", model_kwargs={"dtype": DTYPES[name]}).eval()
        pack(model)
        embed(model, sample[:16], 8, workers)
        start = time.perf_counter()
        embed(model, sample, batch, workers)
        rate = len(sample) / (time.perf_counter() - start)
        found[name] = round(rate, 2)
        if best is None or rate > best[0]:
            best = rate, model, name
    return *best[1:], found


class Output:
    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        self.folder = folder
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in FILES}
        self.documents = open(folder / "documents.jsonl", "w", encoding="utf-8")
        self.index, self.records, self.tokens, self.text_bytes = None, 0, 0, 0
        self.files["token_offsets"].write(np.zeros(1, np.uint64).tobytes())
        self.files["text_offsets"].write(np.zeros(1, np.uint64).tobytes())

    def add(self, ids, texts, tokens, codes, vectors):
        lengths = np.array([len(row) for row in ids])
        texts = [text.encode() for text in texts]
        text_ends = self.text_bytes + np.cumsum([len(text) for text in texts])
        for name, value in [
            ("codes", codes),
            ("tokens", tokens),
            ("counts", np.minimum(lengths, SLOTS).astype(np.uint8)),
            ("vectors", vectors),
            ("token_ids", np.concatenate(ids).astype(np.uint32)),
            ("token_offsets", (self.tokens + np.cumsum(lengths)).astype(np.uint64)),
            ("text_offsets", text_ends.astype(np.uint64)),
        ]:
            self.files[name].write(np.ascontiguousarray(value).data)
        self.files["texts"].write(b"".join(texts))
        if self.index is None:
            self.index = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)
        self.records += len(ids)
        self.tokens += int(lengths.sum())
        self.text_bytes = int(text_ends[-1])

    def finish(self, meta, prefix):
        np.savez(self.folder / "prefix.npz", *[tensor.float().numpy() for pair in prefix for tensor in pair])
        faiss.write_index(self.index, str(self.folder / "index.faiss"))
        for file in [*self.files.values(), self.documents, open(self.folder / "index.faiss", "rb")]:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        (self.folder / "meta.json").write_text(json.dumps(meta | {"records": self.records}, indent=1) + "\n")


def run(options):
    workers = Workers(options.threads)
    faiss.omp_set_num_threads(options.threads)
    keep_freed_memory()
    codec = faiss.read_index(str(options.codec))
    chunker = Chunker(options.model)
    clock, loading = Clock(), {"imports_s": time.perf_counter() - STARTED}

    # 1. Load and calibrate on the first chunks; they are read once more by the run itself.
    start = time.perf_counter()
    source = lambda limit: (  # noqa: E731
        chunks_of_bank(options.chunks_from, limit)
        if options.chunks_from
        else chunks_of_corpus(str(options.corpus), chunker, limit)
    )
    sample = [chunk for group in source(CALIBRATION_CHUNKS) for _, chunks in group for chunk in chunks]
    sample = sample[:CALIBRATION_CHUNKS]
    if not sample:
        raise SystemExit("no chunks")
    model, dtype, batch, model_rates = calibrate(options, chunker.prefix, [ids for ids, _ in sample], workers)
    embedder, embed_dtype, embed_rates = open_embedder(options, [text for _, text in sample], batch, workers)
    loading["load_and_calibrate_s"] = time.perf_counter() - start

    # 2. The run: windows of chunks through all stages, each stage on all cores.
    output, known, chunks, documents = Output(options.out), {}, 0, 0
    if codec.d != model.head_dim:
        raise SystemExit(f"{options.codec}: {codec.d} dimensions, the model's heads have {model.head_dim}")
    code_bytes = codec.sa_code_size()

    def flush(window):
        ids, texts = [ids for ids, _ in window], [text for _, text in window]
        with clock.stage("encode"):
            tokens, vectors = encode(model, ids, batch, workers, clock)
        with clock.stage("quantize"):
            codes = codec.sa_encode(vectors.reshape(-1, model.head_dim)).reshape(len(window), -1, code_bytes)
        with clock.stage("embed"):
            retrieval = embed(embedder, texts, batch, workers)
        with clock.stage("write"):
            output.add(ids, texts, tokens, codes, retrieval)

    start, start_cpu = time.perf_counter(), time.process_time()
    window, stream = [], source(options.max_chunks)
    while True:
        with clock.stage("read"):
            group = next(stream, None)
            for name, parts in group or []:
                row = []
                for ids, text in parts:
                    record = known.setdefault(ids.tobytes(), len(known))
                    if record == output.records + len(window):  # equal chunks share a record
                        window.append((ids, text))
                    row.append(record)
                    if len(window) >= options.window:
                        pause, cpu = time.perf_counter(), time.process_time()
                        flush(window)
                        window = []
                        clock.add("read", pause - time.perf_counter(), cpu - time.process_time())
                output.documents.write(json.dumps({"id": name, "records": row}, ensure_ascii=False) + "\n")
                chunks += len(parts)
                documents += 1
        if group is None:
            break
    if window:
        flush(window)
    with clock.stage("write"):
        meta = {"layers": model.layers, "kv_heads": model.kv_heads, "slots": SLOTS, "head_dim": model.head_dim}
        meta |= {"code_bytes": code_bytes, "vector_dim": output.index.d, "dtype": dtype, "embed_dtype": embed_dtype}
        output.finish(meta, model.prefix)
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu

    for name in ("forward", "select"):  # parts of encode, by all workers at once
        clock.seconds[name] /= workers.count
    stages = {
        name: {
            "s": round(seconds, 3),
            "share": round(seconds / wall, 3),
            "chunks_per_s": round(output.records / seconds, 2),
            "cpu_s": round(clock.cpu[name], 3),
            "chunks_per_cpu_s": round(output.records / clock.cpu[name], 2),
        }
        for name, seconds in clock.seconds.items()
    }
    return {
        "documents": documents,
        "chunks": chunks,
        "records": output.records,
        "tokens": output.tokens,
        "dtype": dtype,
        "embed_dtype": embed_dtype,
        "batch": batch,
        "threads": options.threads,
        "workers": workers.count,
        "calibration_model_chunks_per_s": model_rates,
        "calibration_embed_chunks_per_s": embed_rates,
        "stages": stages,
        "run_s": round(wall, 3),
        "run_cpu_s": round(cpu, 3),
        "chunks_per_cpu_s": round(output.records / cpu, 2),
        "chunks_per_s": round(output.records / wall, 2),
        **{name: round(seconds, 3) for name, seconds in loading.items()},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, faiss, np)},
    }


def keep_freed_memory():
    """glibc hands large blocks back to the system, and every batch pays for fresh pages; let it keep them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    except OSError:
        pass


# ---- comparing ----


def compare(folder, bank_folder):
    """What `folder` and a memory3 bank have in common, records matched by token ids."""
    from read_bank import Bank

    meta = json.loads((folder / "meta.json").read_text())
    n, layers, heads, slots = (meta[key] for key in ("records", "layers", "kv_heads", "slots"))
    load = lambda name, dtype: np.fromfile(folder / f"{name}.bin", dtype)  # noqa: E731
    codes = load("codes", np.uint8).reshape(n, layers, 2, heads, slots, -1)
    tokens = load("tokens", np.uint8).reshape(n, layers, heads, slots)
    vectors = load("vectors", np.float32).reshape(n, -1)
    ids, ends = load("token_ids", np.uint32), load("token_offsets", np.uint64).astype(np.int64)
    mine = {ids[ends[i] : ends[i + 1]].tobytes(): i for i in range(n)}

    same_sets = np.zeros(layers, np.int64)  # (chunk, head) with the same tokens
    same_kinds = np.zeros(layers, np.int64)  # ... or with other places of the same token ids: ties of equal tokens
    pairs = common_slots = selected = 0  # slots of tokens that both selected
    same_codes = np.zeros(2, np.int64)
    records = texts = 0
    worst, cosine_sum = 0.0, 0.0
    raw_texts, text_ends = (folder / "texts.bin").read_bytes(), load("text_offsets", np.uint64).astype(np.int64)
    for shard in Bank(bank_folder).shards.values():
        for slot in range(shard.records):
            their_ids = shard.token_ids(slot).astype(np.uint32)
            i = mine.get(their_ids.tobytes())
            if i is None:
                continue
            records += 1
            texts += raw_texts[text_ends[i] : text_ends[i + 1]].decode() == shard.text(slot)
            u, v = vectors[i].astype(np.float64), shard.vector(slot).astype(np.float64)
            deviation = 1 - u @ v / np.sqrt((u @ u) * (v @ v))
            worst, cosine_sum = max(worst, deviation), cosine_sum + deviation
            count, their_tokens, their_codes = shard.record(slot)
            selected += layers * heads * count
            compared_codes = codes.shape[-1] == their_codes.shape[-1]  # or another codec, such as "none"
            a, b = tokens[i, ..., :count], their_tokens[..., :count]
            same = (a == b).all(-1)  # both ascend
            same_sets += same.sum(-1)
            same_kinds += (np.sort(their_ids[a], -1) == np.sort(their_ids[b], -1)).all(-1).sum(-1)
            pairs += heads
            # [layer, head, slot of mine, slot of theirs]: one place of the text
            at = np.nonzero(a[..., :, None] == b[..., None, :])
            for part in (0, 1) if compared_codes else ():
                equal = codes[i, at[0], part, at[1], at[2]] == their_codes[at[0], part, at[1], at[3]]
                same_codes[part] += equal.all(-1).sum()
            common_slots += len(at[0])
    if not records:
        raise SystemExit(f"{bank_folder}: no record has the token ids of one in {folder}")
    return {
        "records_here": n,
        "records_matched": records,
        "equal_texts": round(texts / records, 6),
        "equal_top8": round(float(same_sets.sum() / (pairs * layers)), 6),
        "equal_top8_by_layer": [round(float(x), 6) for x in same_sets / pairs],
        "equal_top8_up_to_equal_tokens": round(float(same_kinds.sum() / (pairs * layers)), 6),
        "equal_top8_up_to_equal_tokens_by_layer": [round(float(x), 6) for x in same_kinds / pairs],
        "tokens_selected_by_both": round(common_slots / selected, 6),
        "equal_codes_keys": round(float(same_codes[0] / common_slots), 6) if compared_codes else None,
        "equal_codes_values": round(float(same_codes[1] / common_slots), 6) if compared_codes else None,
        "retrieval_cosine_deviation_max": float(worst),
        "retrieval_cosine_deviation_mean": cosine_sum / records,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--chunks-from", type=Path, metavar="BANK")
    source.add_argument("--corpus", type=Path, metavar="FILE")
    parser.add_argument("--codec", type=Path, required=True, help="a bank's index/codec.faiss")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-chunks", type=int, help="stop at the end of the document that reaches this many")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--embed-dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=0, help="chunks of a forward pass; 0: the fastest of a few")
    parser.add_argument("--window", type=int, default=512, help="chunks that go through the stages together")
    parser.add_argument("--compare", type=Path, metavar="BANK")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    with torch.inference_mode():
        report = run(options)
    if options.compare:
        report["compare"] = compare(options.out, options.compare)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, stage in report.pop("stages").items():
        rates = f"{stage['chunks_per_s']:10.2f} chunks/s {stage['chunks_per_cpu_s']:10.2f} chunks/CPU-s"
        print(f"{name:9} {stage['s']:9.2f} s {100 * stage['share']:5.1f} % {rates}")
    for name, value in report.items():
        for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name} {key}".rstrip() + f": {entry}")


if __name__ == "__main__":
    main()
