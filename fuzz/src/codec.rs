//! Codec files: parsed, and used for codes that a shard might hold.
//!
//! ```text
//! codes u8 | that many bytes of codes | codec file
//! ```
//! What always holds: what is accepted is written again as the same file, and any code decodes.

use memory3::codec::{Codec, CodecParts};

/// Longer inputs say nothing new.
const MAX_BYTES: usize = 64 << 10;

/// One input.
pub fn run(input: &[u8]) {
    let Some((&codes, rest)) = input.split_first().filter(|_| input.len() <= MAX_BYTES) else { return };
    let Some((codes, file)) = rest.split_at_checked(usize::from(codes)) else { return };
    let Ok(parts) = CodecParts::parse(file) else { return };
    let floats = |level: &memory3::codec::Codebooks| level.centroids.len() * 4;
    let held = floats(&parts.level2) + parts.level1.as_ref().map_or(0, floats);
    assert!(held <= file.len(), "{held} bytes of centroids in a file of {}", file.len());
    assert_eq!(parts.to_bytes().len(), file.len());
    let again = CodecParts::parse(&parts.to_bytes()).expect("what was written is read");
    assert_eq!(again, parts);

    let codec = Codec::from_faiss_bytes(file.to_vec()).expect("the parts could be read");
    let codes: Vec<u8> = codes.iter().copied().cycle().take(codec.code_bytes() * 3).collect();
    if codes.len() < codec.code_bytes() {
        return;
    }
    let vectors = codes.len() / codec.code_bytes();
    let mut decoded = vec![0.0; vectors * codec.dim()];
    codec.decode(&codes, &mut decoded);
    let mut encoded = vec![0; codes.len()];
    codec.encode(&decoded, &mut encoded);
}
