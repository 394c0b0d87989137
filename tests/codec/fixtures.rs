//! Against files, codes and decoded vectors that Python FAISS wrote (tools/make_codec_fixtures.py).

use std::path::PathBuf;

use memory3::codec::{Codec, CodecSpec};

use super::{assert_close, assert_codes_agree, decode, encode};

const FIXTURES: [(&str, &str, usize); 10] = [
    ("d80_small", "OPQ8_80,Residual2x8,PQ8x8", 80),
    ("d80_ten_bits", "OPQ20_80,Residual2x6,PQ8x10", 80),
    ("d64_nine_bits", "OPQ8_64,Residual2x7,PQ8x9", 64),
    ("d96_seven_bits", "OPQ16_96,Residual2x5,PQ16x7", 96),
    ("d128_six_bits", "OPQ16_128,Residual2x6,PQ16x6", 128),
    ("d8_thirteen_bits", "Residual2x5,PQ2x13", 8),
    ("d32_four_parts", "Residual4x6,PQ8x5", 32),
    ("d32_one_level", "OPQ4_32,PQ8x6", 32),
    ("d20_wider", "OPQ4_24,Residual2x4,PQ6x5", 20),
    ("d16_no_opq_one_level", "PQ4x4", 16),
];

struct Fixture {
    name: &'static str,
    file: Vec<u8>,
    codec: Codec,
    vectors: Vec<f32>,
    codes: Vec<u8>,
    decoded: Vec<f32>,
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

fn fixtures() -> impl Iterator<Item = Fixture> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/codec");
    FIXTURES.into_iter().map(move |(name, spec, dim)| {
        let path = folder.join(format!("{name}.faiss"));
        let spec = CodecSpec::Faiss(spec.parse().unwrap());
        let codec = Codec::open(&path).unwrap().with_spec(spec).unwrap();
        assert_eq!(codec.dim(), dim, "{name}");
        let data = std::fs::read(folder.join(format!("{name}.bin"))).unwrap();
        let (count, data) = data.split_first_chunk::<4>().unwrap();
        let count = usize::try_from(u32::from_le_bytes(*count)).unwrap();
        let (vectors, data) = data.split_at(count * dim * 4);
        let (codes, decoded) = data.split_at(count * codec.code_bytes());
        assert_eq!(decoded.len(), vectors.len(), "{name}");
        Fixture {
            name,
            file: std::fs::read(path).unwrap(),
            codec,
            vectors: floats(vectors),
            codes: codes.to_vec(),
            decoded: floats(decoded),
        }
    })
}

#[test]
fn our_codes_are_those_of_stock_faiss() {
    for fixture in fixtures() {
        let codes = encode(&fixture.codec, &fixture.vectors);
        assert_codes_agree(&codes, &fixture.codes, fixture.codec.code_bytes(), fixture.name);
    }
}

#[test]
fn our_decoder_agrees_with_stock_faiss() {
    for fixture in fixtures() {
        assert_close(&decode(&fixture.codec, &fixture.codes), &fixture.decoded, fixture.name);
    }
}

#[test]
fn our_file_is_the_file_of_stock_faiss_byte_for_byte() {
    for fixture in fixtures() {
        let Codec::Faiss(codec) = &fixture.codec else { panic!("{} is bf16", fixture.name) };
        assert!(codec.parts().to_bytes() == fixture.file, "{}", fixture.name);
    }
}
