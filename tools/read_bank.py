#!/usr/bin/env python3
"""Reads a memory3 bank with numpy and stock FAISS; written from docs/format.md alone.

    read_bank.py BANK                                   list the bank as JSON
    read_bank.py BANK --record 1:42 [--decode OUT.npy]  one record as JSON, its vectors as .npy
    read_bank.py BANK --search-record 1:42 -k 5         search with a record's own retrieval vector
    read_bank.py BANK --all-decoded OUT.npy             the vectors of all records, in id order
    read_bank.py BANK --check                           check what can be checked

Decoded arrays are f32 [layer][K, V][head][slot][dim], with a leading record axis for --all-decoded.
zstandard (texts) and blake3 (hashes) are used if installed; without them texts are null and --check says
what it left out. Exit code 0: done; 1: damage; 2: could not run.
"""

import argparse
import json
import mmap
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

try:
    import zstandard
except ImportError:
    zstandard = None
try:
    import blake3
except ImportError:
    blake3 = None

VERSION = 1
PAGE = 4096
SHARD_MAGIC = bytes.fromhex("894d33530d0a1a0a")
SHARD_END_MAGIC = bytes.fromhex("4d33532d454e440a")
TOMBSTONES_MAGIC = bytes.fromhex("894d33540d0a1a0a")
SECTIONS = (
    "records token_offsets token_ids text_index text_blocks texts vectors contents document_offsets documents uses"
).split()
USE = np.dtype([("record", "<u8"), ("row", "<u4"), ("ordinal", "<u4")])


class Damage(Exception):
    """Bytes that are not what docs/format.md says."""


def expect(path, what, expected, found):
    if expected != found:
        raise Damage(f"{path}: {what}: expected {expected}, found {found}")


def round_up(number, multiple):
    return -(-number // multiple) * multiple


def split_id(number):
    return int(number) >> 32, int(number) & 0xFFFFFFFF


def show_id(number):
    return "{}:{}".format(*split_id(number))


def parse_id(text):
    shard, slot = text.split(":")
    return int(shard), int(slot)


class Shard:
    """One shard file, memory-mapped."""

    def __init__(self, path):
        self.path = path
        if path.stat().st_size < PAGE + 24:
            raise Damage(f"{path}: too short for a shard")
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        head = self.data[:PAGE]
        expect(path, "header magic", SHARD_MAGIC, head[:8])
        version = struct.unpack_from("<I", head, 8)[0]
        if version > VERSION:
            raise Damage(f"{path}: format version {version}, this reader knows {VERSION}")
        expect(path, "header checksum", zlib.crc32(head[:4092]), struct.unpack_from("<I", head, 4092)[0])
        (self.number, self.layers, self.heads, self.slots, self.dim, self.code_bytes, self.vector_dim) = (
            struct.unpack_from("<7I", head, 12)
        )
        self.stride, self.codes_at = struct.unpack_from("<2Q", head, 40)
        self.fingerprint, self.embedder = head[56:88].hex(), head[88:120].hex()
        self.indices = self.layers * self.heads * self.slots
        expect(path, "codes offset", round_up(16 + self.indices, 16), self.codes_at)
        expect(path, "stride", round_up(self.codes_at + 2 * self.indices * self.code_bytes, 64), self.stride)
        self._read_footer()

    def _read_footer(self):
        path, end = self.path, len(self.data) - 24
        trailer = self.data[end:]
        footer_bytes, crc, version = struct.unpack_from("<QII", trailer)
        expect(path, "end magic", SHARD_END_MAGIC, trailer[16:])
        expect(path, "footer version", VERSION, version)
        expect(path, "footer length", 48 + 56 * len(SECTIONS), footer_bytes)
        start = end - footer_bytes
        footer = self.data[start:end]
        expect(path, "footer checksum", zlib.crc32(footer + trailer[:8] + trailer[12:16]), crc)
        self.records, self.documents, self.chunks, self.tokens, self.blocks, count = struct.unpack_from("<5QI", footer)
        expect(path, "number of sections", len(SECTIONS), count)
        lengths = {
            "records": self.records * self.stride,
            "token_offsets": (self.records + 1) * 8,
            "token_ids": self.tokens * 4,
            "text_index": self.records * 12,
            "text_blocks": self.blocks * 16,
            "vectors": self.records * self.vector_dim * 4,
            "contents": self.records * 16,
            "document_offsets": (self.documents + 1) * 8,
            "uses": self.chunks * 16,
        }
        self.sections, position = {}, PAGE
        for index, name in enumerate(SECTIONS):
            kind, _, offset, length, digest = struct.unpack_from("<IIQQ32s", footer, 48 + 56 * index)
            expect(path, "section kind", index + 1, kind)
            expect(path, f"offset of {name}", round_up(position, PAGE), offset)
            expect(path, f"length of {name}", lengths.get(name, length), length)
            position = offset + length
            if position > start:
                raise Damage(f"{path}: section {name} ends at {position}, the footer starts at {start}")
            self.sections[name] = (offset, length, digest)
        expect(path, "footer offset", round_up(position, PAGE), start)

    def array(self, name, dtype):
        offset, length, _ = self.sections[name]
        return np.frombuffer(self.data, dtype, length // np.dtype(dtype).itemsize, offset)

    def bytes(self, name, start, end):
        offset, length, _ = self.sections[name]
        if not 0 <= start <= end <= length:
            raise Damage(f"{self.path}: bytes {start} to {end} of section {name}, which has {length}")
        return self.data[offset + start : offset + end]

    def record(self, slot):
        """(count, token indices [layer][head][slot], codes [layer][K, V][head][slot][byte])"""
        name = f"{self.number}:{slot}"
        if not 0 <= slot < self.records:
            raise Damage(f"{self.path}: no record {name}, there are {self.records}")
        raw = self.bytes("records", slot * self.stride, (slot + 1) * self.stride)
        crc, count, number = struct.unpack("<IB3xQ", raw[:16])
        expect(self.path, f"checksum of record {name}", zlib.crc32(raw[4:]), crc)
        expect(self.path, f"id of record {name}", self.number << 32 | slot, number)
        tokens = np.frombuffer(raw, np.uint8, self.indices, 16)
        codes = np.frombuffer(raw, np.uint8, 2 * self.indices * self.code_bytes, self.codes_at)
        heads = (self.heads, self.slots)
        return count, tokens.reshape(self.layers, *heads), codes.reshape(self.layers, 2, *heads, self.code_bytes)

    def token_ids(self, slot):
        start, end = self.array("token_offsets", "<u8")[slot : slot + 2].tolist()
        return self.array("token_ids", "<u4")[start:end]

    def vector(self, slot):
        return self.array("vectors", "<f4")[slot * self.vector_dim : (slot + 1) * self.vector_dim]

    def content(self, slot):
        return self.bytes("contents", slot * 16, slot * 16 + 16).hex()

    def text(self, slot):
        if zstandard is None:
            return None
        block, offset, length = struct.unpack("<3I", self.bytes("text_index", slot * 12, slot * 12 + 12))
        start, stored, raw = struct.unpack("<QII", self.bytes("text_blocks", block * 16, block * 16 + 16))
        frame = self.bytes("texts", start, start + stored)
        return zstandard.ZstdDecompressor().decompress(frame, raw)[offset : offset + length].decode()

    def document(self, row):
        start, end = self.array("document_offsets", "<u8")[row : row + 2].tolist()
        raw = self.bytes("documents", start, end)
        text_hash, flags, id_bytes, count, _ = struct.unpack_from("<16s4I", raw)
        chunks_at = 32 + round_up(id_bytes, 8)
        expect(self.path, f"length of document row {row}", chunks_at + 24 * count, len(raw))
        chunks = [struct.unpack_from("<3Q", raw, chunks_at + 24 * i) for i in range(count)]
        return {
            "id": raw[32 : 32 + id_bytes].decode(),
            "text_hash": text_hash.hex(),
            "flags": flags,
            "chunks": [{"record": show_id(record), "start": a, "end": b} for record, a, b in chunks],
        }

    def uses_of(self, number):
        """(row, ordinal) of each chunk of this shard's documents that uses a record."""
        uses = self.array("uses", USE)
        start, end = (np.searchsorted(uses["record"], np.uint64(number), side) for side in ("left", "right"))
        return [(int(use["row"]), int(use["ordinal"])) for use in uses[start:end]]


class Bank:
    """The published generation of a bank."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "index" / "manifest.json"
        self.manifest = json.loads(self.path.read_text("utf-8"))
        expect(self.path, "format", "memory3 bank", self.manifest["format"])
        if self.manifest["version"] > VERSION:
            raise Damage(f"{self.path}: format version {self.manifest['version']}, this reader knows {VERSION}")
        self.shards = {}
        for entry in self.manifest["shards"]:
            path = folder / "shards" / entry["file"]
            expect(path, "file length", entry["bytes"], path.stat().st_size)
            shard = Shard(path)
            expect(path, "shard number", entry["number"], shard.number)
            expect(path, "fingerprint", self.manifest["fingerprint"]["id"], shard.fingerprint)
            expect(path, "embedder's fingerprint", self.manifest["embedder"]["id"], shard.embedder)
            self.shards[shard.number] = shard
        self.dead = self._tombstones()
        self.codecs = {}

    def _tombstones(self):
        entry = self.manifest["tombstones"]
        if entry is None:
            return set()
        path = self.folder / "index" / entry["file"]
        raw = path.read_bytes()
        magic, version, _, count = struct.unpack_from("<8sIIQ", raw)
        expect(path, "magic", TOMBSTONES_MAGIC, magic)
        expect(path, "version", VERSION, version)
        expect(path, "length", 24 + 8 * count, len(raw))
        return {tuple(row) for row in np.frombuffer(raw, "<u4", 2 * count, 24).reshape(-1, 2).tolist()}

    def index_file(self, entry):
        import faiss

        return faiss.read_index(str(self.folder / "index" / entry["file"]))

    def shard_of(self, text):
        number, slot = parse_id(text)
        if number not in self.shards:
            raise Damage(f"{self.folder}: no record {text}, there is no shard {number}")
        return self.shards[number], slot

    def documents_of(self, number, slot):
        """Live documents that use a record."""
        found = []
        for shard in sorted(self.shards):
            if shard < number:
                continue
            for row, ordinal in self.shards[shard].uses_of(number << 32 | slot):
                if (shard, row) not in self.dead:
                    name = self.shards[shard].document(row)["id"]
                    found.append({"id": name, "shard": shard, "row": row, "chunk": ordinal})
        return found

    def decode(self, codes, dim):
        """Codes [layer][K, V][head][slot][byte] -> f32 [layer][K, V][head][slot][dim]."""
        shape = codes.shape[:-1] + (dim,)
        codec = self.manifest["codec"]
        if codec["spec"] == "none":
            numbers = np.ascontiguousarray(codes).view("<u2").astype("<u4") << 16
            return numbers.view("<f4").reshape(shape)
        out = np.empty(shape, np.float32)
        for layer in range(codes.shape[0]):
            for part, kind in enumerate(("key", "value")):
                name = {"shared": "shared", "kv": kind, "kv-layer": f"{kind}-{layer}"}[codec["scope"]]
                if name not in self.codecs:
                    self.codecs[name] = self.index_file(codec["files"][name])
                flat = np.ascontiguousarray(codes[layer, part].reshape(-1, codes.shape[-1]))
                out[layer, part] = self.codecs[name].sa_decode(flat).reshape(shape[2:])
        return out

    def search(self, vector, k):
        """The k nearest live records."""
        index = self.index_file(self.manifest["retrieval"])
        wanted = k
        while True:
            wanted = min(wanted, index.ntotal)
            scores, ids = index.search(vector.reshape(1, -1).astype(np.float32), max(wanted, 1))
            hits = []
            for score, number in zip(scores[0].tolist(), ids[0].tolist()):
                if number >= 0 and (not self.dead or self.documents_of(*split_id(number))):
                    shard, slot = self.shard_of(show_id(number))
                    hits.append({"id": show_id(number), "score": score, "text": shard.text(slot)})
            if len(hits) >= k or wanted == index.ntotal:
                return hits[:k]
            wanted *= 2

    def check(self):
        """(damage, what was left out), both as texts."""
        damage, left_out = [], []
        copy = self.folder / "index" / "generations" / f"{self.manifest['generation']:06}.json"
        if copy.read_bytes() != self.path.read_bytes():
            damage.append(f"{self.path}: differs from {copy}")
        if blake3 is None:
            left_out.append("BLAKE3 hashes (pip install blake3)")
        else:
            damage += self._check_hashes()
        if zstandard is None:
            left_out.append("texts (pip install zstandard)")
        live = set()
        counts = dict.fromkeys(("documents", "chunks", "records", "duplicates", "tokens"), 0)
        for number, shard in self.shards.items():
            damage += self._check_records(shard)
            for row in range(shard.documents):
                document = shard.document(row)
                if (number, row) in self.dead:
                    continue
                counts["documents"] += 1
                for chunk in document["chunks"]:
                    home, slot = self.shard_of(chunk["record"])
                    counts["chunks"] += 1
                    counts["tokens"] += len(home.token_ids(slot))
                    live.add((home.number, slot))
        counts["records"] = len(live)
        counts["duplicates"] = counts["chunks"] - len(live)
        if counts != self.manifest["counts"]:
            damage.append(f"{self.path}: counts: expected {counts}, found {self.manifest['counts']}")
        return damage + self._check_retrieval(live), left_out

    def _check_hashes(self):
        damage = []
        entries = [*self.manifest["codec"]["files"].values(), self.manifest["retrieval"], self.manifest["prefix"]]
        if self.manifest["tombstones"]:
            entries.append(self.manifest["tombstones"])
        paths = [(self.folder / "index" / entry["file"], entry) for entry in entries]
        paths += [(self.folder / "shards" / entry["file"], entry) for entry in self.manifest["shards"]]
        for path, entry in paths:
            if blake3.blake3(path.read_bytes()).hexdigest() != entry["blake3"]:
                damage.append(f"{path}: BLAKE3 is not {entry['blake3']}")
        for name in ("fingerprint", "embedder"):
            entry = self.manifest[name]
            text = json.dumps(entry["fields"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            if blake3.blake3(text.encode()).hexdigest() != entry["id"]:
                damage.append(f"{self.path}: the id of {name} does not belong to its fields")
        for shard in self.shards.values():
            for name, (offset, length, digest) in shard.sections.items():
                if blake3.blake3(shard.data[offset : offset + length]).digest() != digest:
                    damage.append(f"{shard.path}: BLAKE3 of section {name} is wrong")
        return damage

    def _check_records(self, shard):
        damage = []
        for slot in range(shard.records):
            name = f"{shard.number}:{slot}"
            try:
                shard.record(slot)
                shard.text(slot)
                if blake3 is not None:
                    content = blake3.blake3(shard.token_ids(slot).astype("<u4").tobytes()).digest()[:16].hex()
                    expect(shard.path, f"content of record {name}", content, shard.content(slot))
            except Damage as error:
                damage.append(str(error))
            except Exception as error:  # whatever zstandard or struct make of damaged bytes
                damage.append(f"{shard.path}: record {name}: {error}")
        return damage

    def _check_retrieval(self, live):
        import faiss

        entry = self.manifest["retrieval"]
        path = self.folder / "index" / entry["file"]
        index = self.index_file(entry)
        if (index.ntotal, index.d, index.metric_type) != (entry["count"], entry["dim"], faiss.METRIC_INNER_PRODUCT):
            return [f"{path}: not the index that the manifest describes"]
        if entry["factory"] != "IDMap2,Flat":
            return []
        ids = {split_id(number) for number in faiss.vector_to_array(index.id_map).tolist()}
        damage = [f"{path}: no vector of record {number}:{slot}" for number, slot in sorted(live - ids)]
        for number, slot in sorted(live & ids):
            if not np.array_equal(index.reconstruct(number << 32 | slot), self.shards[number].vector(slot)):
                damage.append(f"{path}: the vector of record {number}:{slot} differs from the shard's")
        return damage


def show(value):
    print(json.dumps(value, ensure_ascii=False, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--record", metavar="SHARD:SLOT")
    parser.add_argument("--decode", metavar="OUT.npy", help="with --record: write its vectors")
    parser.add_argument("--all-decoded", metavar="OUT.npy")
    parser.add_argument("--search-record", metavar="SHARD:SLOT")
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    bank = Bank(options.bank)
    if options.check:
        damage, left_out = bank.check()
        for line in damage:
            print(line, file=sys.stderr)
        show({"damage": len(damage), "left_out": left_out})
        return 1 if damage else 0
    if options.record:
        shard, slot = bank.shard_of(options.record)
        count, tokens, codes = shard.record(slot)
        if options.decode:
            np.save(options.decode, bank.decode(codes, shard.dim))
        show(
            {
                "id": options.record,
                "count": count,
                "content": shard.content(slot),
                "text": shard.text(slot),
                "token_ids": shard.token_ids(slot).tolist(),
                "tokens": tokens.tolist(),
                "documents": bank.documents_of(shard.number, slot),
            }
        )
    elif options.all_decoded:
        rows = []
        for _, shard in sorted(bank.shards.items()):
            rows += [bank.decode(shard.record(slot)[2], shard.dim) for slot in range(shard.records)]
        np.save(options.all_decoded, np.array(rows, np.float32))
    elif options.search_record:
        shard, slot = bank.shard_of(options.search_record)
        shard.record(slot)
        show(bank.search(shard.vector(slot), options.k))
    else:
        keys = ("version", "generation", "shape", "chunk_tokens", "codec", "retrieval", "counts", "shards")
        show({key: bank.manifest[key] for key in keys})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Damage as damage:
        print(damage, file=sys.stderr)
        sys.exit(1)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
