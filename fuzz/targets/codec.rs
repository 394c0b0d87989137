//! See `src/codec.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| memory3_fuzz::codec::run(input));
