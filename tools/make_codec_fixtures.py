#!/usr/bin/env python3
"""Makes tests/fixtures/codec: small codecs trained by stock FAISS, with vectors, their codes, and what those decode to.

For each codec NAME two files:
  NAME.faiss  what faiss.write_index writes for the empty trained index
  NAME.bin    u32 count, f32 vectors [count][d], u8 codes [count][code size], f32 decoded [count][d], little-endian

Run with faiss-cpu 1.15.1: python3 tools/make_codec_fixtures.py
"""
import os
import pathlib
import struct

os.environ["OMP_NUM_THREADS"] = "1"

import faiss  # noqa: E402
import numpy as np  # noqa: E402

# name, width, factory string, training vectors, vectors in the fixture
CODECS = [
    ("d80_small", 80, "OPQ8_80,Residual2x8,PQ8x8", 10000, 128),
    ("d80_ten_bits", 80, "OPQ20_80,Residual2x6,PQ8x10", 10000, 128),
    ("d64_nine_bits", 64, "OPQ8_64,Residual2x7,PQ8x9", 10000, 128),
    ("d96_seven_bits", 96, "OPQ16_96,Residual2x5,PQ16x7", 10000, 128),
    ("d128_six_bits", 128, "OPQ16_128,Residual2x6,PQ16x6", 10000, 128),
    ("d8_thirteen_bits", 8, "Residual2x5,PQ2x13", 10000, 500),
    ("d32_four_parts", 32, "Residual4x6,PQ8x5", 5000, 300),
    ("d32_one_level", 32, "OPQ4_32,PQ8x6np", 5000, 300),
    ("d20_wider", 20, "OPQ4_24,Residual2x4,PQ6x5", 5000, 300),
    ("d16_no_opq_one_level", 16, "PQ4x4np", 5000, 300),
]


def vectors(rng, n, d):
    """Clusters of unequal size around a common mean: neither Gaussian nor centred."""
    centres = rng.standard_normal((64, d)) * 0.7 + 0.3
    which = (rng.random(n) ** 2 * 64).astype(int)
    mix = rng.standard_normal((d, d)) * 0.4 / np.sqrt(d)
    return (centres[which] + rng.standard_normal((n, d)) @ mix + 0.1 * rng.standard_normal((n, d))).astype("<f4")


def main():
    folder = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/codec"
    folder.mkdir(parents=True, exist_ok=True)
    for name, d, spec, train, count in CODECS:
        rng = np.random.default_rng(sum(name.encode()))
        index = faiss.index_factory(d, spec)
        if isinstance(index, faiss.IndexPreTransform):
            opq = faiss.downcast_VectorTransform(index.chain.at(0))
            opq.niter = 8
        data = vectors(rng, train + count, d)
        index.train(data[:train])
        x = np.ascontiguousarray(data[train:])
        codes = index.sa_encode(x)
        decoded = index.sa_decode(codes).astype("<f4")
        faiss.write_index(index, str(folder / f"{name}.faiss"))
        parts = [struct.pack("<I", count), x.tobytes(), codes.tobytes(), decoded.tobytes()]
        (folder / f"{name}.bin").write_bytes(b"".join(parts))
        error = float(((x - decoded) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
        print(f"{name}: {spec}, {index.sa_code_size()} bytes, relative squared error {error:.3f}")


if __name__ == "__main__":
    main()
