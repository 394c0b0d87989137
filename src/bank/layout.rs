//! Every byte offset, size and magic number of the bank's own files: the code's side of `docs/format.md`.
//!
//! Comes in: nothing. Goes out: field ranges, from which writers and readers cut their bytes, and the same ranges
//! as tables, which a test compares with the tables in `docs/format.md`. What always holds: fields of a table lie
//! without gap or overlap. All numbers are little-endian. No file is touched here.

use std::ops::Range;

use crate::memory::MemoryShape;

#[cfg(target_endian = "big")]
compile_error!("shards are viewed in place as little-endian numbers; this machine is big-endian");

/// The format version that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// First bytes of a shard. The line ends and the byte above 127 show a transfer in text mode.
pub const SHARD_MAGIC: [u8; 8] = *b"\x89M3S\r\n\x1a\n";
/// Last bytes of a shard.
pub const SHARD_END_MAGIC: [u8; 8] = *b"M3S-END\n";
/// First bytes of a tombstones file.
pub const TOMBSTONES_MAGIC: [u8; 8] = *b"\x89M3T\r\n\x1a\n";
/// Sections start at multiples of this, so that a mapped section is aligned for any number type.
pub const PAGE: usize = 4096;
/// Records start at multiples of this within their section: no record shares a cache line with another.
pub const RECORD_ALIGN: usize = 64;
/// Codes start at a multiple of this within their record.
pub const CODES_ALIGN: usize = 16;
/// Ids of documents are padded with zeros to a multiple of this, so that the numbers after them are aligned.
pub const ID_ALIGN: usize = 8;
/// A text block is closed when it holds this many texts ...
pub const BLOCK_TEXTS: usize = 64;
/// ... or this many bytes of text, whichever comes first.
pub const BLOCK_BYTES: usize = 1 << 20;
/// The longest text of one chunk, in bytes.
pub const MAX_TEXT_BYTES: usize = 16 << 20;
/// The longest id of a document, in bytes.
pub const MAX_ID_BYTES: usize = 4096;
/// The widest key or value vector.
pub const MAX_HEAD_DIM: usize = 1 << 14;
/// The most token ids of one chunk: a token index is one byte.
pub const MAX_RECORD_TOKENS: usize = 256;

/// One field of a table: its name, where it starts, how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, as in `docs/format.md`.
    pub name: &'static str,
    /// Offset from the start of the structure, in bytes.
    pub offset: usize,
    /// Length in bytes.
    pub size: usize,
}

macro_rules! table {
    ($(#[$doc:meta])* $module:ident { $($name:ident: $offset:literal, $size:literal;)* }) => {
        $(#[$doc])*
        pub mod $module {
            use super::{Field, Range};
            $(
                #[doc = concat!("Bytes of the field `", stringify!($name), "`.")]
                pub const $name: Range<usize> = $offset..$offset + $size;
            )*
            /// All fields, in order.
            pub const FIELDS: &[Field] =
                &[$(Field { name: stringify!($name), offset: $offset, size: $size }),*];
            /// Length of the structure in bytes.
            pub const SIZE: usize = 0 $(+ $size)*;
        }
    };
}

table! {
    /// The header page of a shard.
    header {
        MAGIC: 0, 8;
        VERSION: 8, 4;
        SHARD: 12, 4;
        LAYERS: 16, 4;
        KV_HEADS: 20, 4;
        SLOTS: 24, 4;
        HEAD_DIM: 28, 4;
        CODE_BYTES: 32, 4;
        VECTOR_DIM: 36, 4;
        RECORD_STRIDE: 40, 8;
        CODES_AT: 48, 8;
        FINGERPRINT: 56, 32;
        EMBEDDER: 88, 32;
        RESERVED: 120, 3972;
        CRC: 4092, 4;
    }
}

table! {
    /// The fixed first bytes of a record; the token indices follow at once.
    record {
        CRC: 0, 4;
        COUNT: 4, 1;
        RESERVED: 5, 3;
        ID: 8, 8;
    }
}

table! {
    /// One entry of the text index: where a record's text lies.
    text_entry {
        BLOCK: 0, 4;
        OFFSET: 4, 4;
        LENGTH: 8, 4;
    }
}

table! {
    /// One entry of the text block table: where a zstd frame lies.
    text_block {
        OFFSET: 0, 8;
        STORED: 8, 4;
        RAW: 12, 4;
    }
}

table! {
    /// The fixed first bytes of a document row; the id follows, then the chunks.
    document {
        TEXT_HASH: 0, 16;
        FLAGS: 16, 4;
        ID_BYTES: 20, 4;
        CHUNKS: 24, 4;
        RESERVED: 28, 4;
    }
}

table! {
    /// One chunk of a document row.
    chunk {
        RECORD: 0, 8;
        START: 8, 8;
        END: 16, 8;
    }
}

table! {
    /// One entry of the uses table: which document row uses a record, and as its how-manieth chunk.
    record_use {
        RECORD: 0, 8;
        ROW: 8, 4;
        ORDINAL: 12, 4;
    }
}

table! {
    /// The fixed first bytes of the footer; the section table follows.
    footer {
        RECORDS: 0, 8;
        DOCUMENTS: 8, 8;
        CHUNKS: 16, 8;
        TOKENS: 24, 8;
        TEXT_BLOCKS: 32, 8;
        SECTIONS: 40, 4;
        RESERVED: 44, 4;
    }
}

table! {
    /// One entry of the section table.
    section {
        KIND: 0, 4;
        RESERVED: 4, 4;
        OFFSET: 8, 8;
        LENGTH: 16, 8;
        BLAKE3: 24, 32;
    }
}

table! {
    /// The last bytes of a shard.
    trailer {
        FOOTER_BYTES: 0, 8;
        CRC: 8, 4;
        VERSION: 12, 4;
        MAGIC: 16, 8;
    }
}

table! {
    /// The first bytes of a tombstones file; the rows follow.
    tombstones {
        MAGIC: 0, 8;
        VERSION: 8, 4;
        RESERVED: 12, 4;
        COUNT: 16, 8;
    }
}

table! {
    /// One tombstone: a document row that is dead.
    tombstone {
        SHARD: 0, 4;
        ROW: 4, 4;
    }
}

/// Every table with its name in `docs/format.md`.
pub const TABLES: &[(&str, &[Field])] = &[
    ("header", header::FIELDS),
    ("record", record::FIELDS),
    ("text_entry", text_entry::FIELDS),
    ("text_block", text_block::FIELDS),
    ("document", document::FIELDS),
    ("chunk", chunk::FIELDS),
    ("record_use", record_use::FIELDS),
    ("footer", footer::FIELDS),
    ("section", section::FIELDS),
    ("trailer", trailer::FIELDS),
    ("tombstones", tombstones::FIELDS),
    ("tombstone", tombstone::FIELDS),
];

/// The sections of a shard, in file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum SectionKind {
    /// Records at a fixed stride.
    Records = 1,
    /// Start of each record's token ids, in tokens; one entry more than records.
    TokenOffsets = 2,
    /// Token ids of all chunks, one after the other.
    TokenIds = 3,
    /// Where each record's text lies.
    TextIndex = 4,
    /// Where each text block lies.
    TextBlocks = 5,
    /// zstd frames.
    Texts = 6,
    /// Retrieval vectors.
    Vectors = 7,
    /// Content hashes.
    Contents = 8,
    /// Start of each document row; one entry more than rows.
    DocumentOffsets = 9,
    /// Document rows.
    Documents = 10,
    /// Which document rows use a record, sorted by record.
    Uses = 11,
}

impl SectionKind {
    /// All sections, in file order.
    pub const ALL: [Self; 11] = [
        Self::Records,
        Self::TokenOffsets,
        Self::TokenIds,
        Self::TextIndex,
        Self::TextBlocks,
        Self::Texts,
        Self::Vectors,
        Self::Contents,
        Self::DocumentOffsets,
        Self::Documents,
        Self::Uses,
    ];

    /// The name in `docs/format.md` and in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Records => "records",
            Self::TokenOffsets => "token_offsets",
            Self::TokenIds => "token_ids",
            Self::TextIndex => "text_index",
            Self::TextBlocks => "text_blocks",
            Self::Texts => "texts",
            Self::Vectors => "vectors",
            Self::Contents => "contents",
            Self::DocumentOffsets => "document_offsets",
            Self::Documents => "documents",
            Self::Uses => "uses",
        }
    }

    /// The number in the section table.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// Position in file order, from 0.
    pub(crate) const fn index(self) -> usize {
        self as usize - 1
    }
}

/// How the bytes of one record divide up; the same for all records of a bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    /// Bytes of the token indices, which start at [`record::SIZE`].
    pub tokens: usize,
    /// Offset of the codes.
    pub codes_at: usize,
    /// Bytes of the codes.
    pub codes: usize,
    /// Distance between two records.
    pub stride: usize,
}

impl RecordLayout {
    /// The layout for a memory shape and a code size. `None` if a record would not fit into 1 GiB, or would hold
    /// nothing: whoever divides by a number of the shape, or multiplies them all, need not check.
    pub fn new(shape: &MemoryShape, code_bytes: usize) -> Option<Self> {
        let MemoryShape { layers, kv_heads, slots, head_dim } = *shape;
        if [layers, kv_heads, slots, head_dim, code_bytes].contains(&0) || head_dim > MAX_HEAD_DIM {
            return None;
        }
        let tokens = shape.layers.checked_mul(shape.kv_heads)?.checked_mul(shape.slots)?;
        let codes = tokens.checked_mul(2)?.checked_mul(code_bytes)?;
        let codes_at = record::SIZE.checked_add(tokens)?.checked_next_multiple_of(CODES_ALIGN)?;
        let stride = codes_at.checked_add(codes)?.checked_next_multiple_of(RECORD_ALIGN)?;
        (stride <= 1 << 30).then_some(Self { tokens, codes_at, codes, stride })
    }
}

/// Reads a little-endian u32 field. The caller has checked that `bytes` covers the field's structure.
pub(crate) fn u32_at(bytes: &[u8], at: Range<usize>) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at]);
    u32::from_le_bytes(number)
}

/// Reads a little-endian u64 field. The caller has checked that `bytes` covers the field's structure.
pub(crate) fn u64_at(bytes: &[u8], at: Range<usize>) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at]);
    u64::from_le_bytes(number)
}

/// Reads a field of raw bytes. The caller has checked that `bytes` covers the field's structure.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: Range<usize>) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at]);
    array
}

/// Writes a field.
pub(crate) fn put(bytes: &mut [u8], at: Range<usize>, value: &[u8]) {
    bytes[at].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_every_table_lie_without_gap_or_overlap() {
        for (name, fields) in TABLES {
            let mut end = 0;
            for field in *fields {
                assert_eq!(field.offset, end, "{name}.{}", field.name);
                end += field.size;
            }
        }
        assert_eq!(header::SIZE, PAGE);
    }

    #[test]
    fn sections_are_numbered_in_file_order() {
        for (index, kind) in SectionKind::ALL.iter().enumerate() {
            assert_eq!(kind.index(), index);
        }
    }

    #[test]
    fn a_record_of_the_paper_shape_takes_40896_bytes() {
        let shape = MemoryShape { layers: 22, kv_heads: 8, slots: 8, head_dim: 80 };
        let layout = RecordLayout::new(&shape, 14).unwrap();
        assert_eq!((layout.tokens, layout.codes_at, layout.codes, layout.stride), (1408, 1424, 39_424, 40_896));
    }

    #[test]
    fn a_shape_that_overflows_has_no_layout() {
        let shape = MemoryShape { layers: usize::MAX, kv_heads: 8, slots: 8, head_dim: 80 };
        assert_eq!(RecordLayout::new(&shape, 14), None);
        let shape = MemoryShape { layers: 1 << 20, kv_heads: 1 << 10, slots: 8, head_dim: 80 };
        assert_eq!(RecordLayout::new(&shape, 14), None);
        let shape = MemoryShape { layers: 22, kv_heads: 8, slots: 8, head_dim: MAX_HEAD_DIM + 1 };
        assert_eq!(RecordLayout::new(&shape, 14), None);
    }

    #[test]
    fn a_shape_with_a_zero_has_no_layout_however_large_the_rest() {
        let shape = MemoryShape { layers: 22, kv_heads: 8, slots: 8, head_dim: 80 };
        assert!(RecordLayout::new(&shape, 14).is_some());
        for zero in [
            MemoryShape { layers: 0, ..shape },
            MemoryShape { kv_heads: 0, ..shape },
            // The product of all but this one does not fit into a number.
            MemoryShape { layers: 1 << 62, kv_heads: 2, slots: 0, ..shape },
            MemoryShape { head_dim: 0, ..shape },
        ] {
            assert_eq!(RecordLayout::new(&zero, 14), None, "{zero:?}");
        }
        assert_eq!(RecordLayout::new(&shape, 0), None);
    }
}
