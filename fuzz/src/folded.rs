//! Shards without their padding and checksums: what a fuzzer can change and still get past the checks.
//!
//! In: a few hundred bytes. Out: a whole shard file, laid out in pages, with right magic numbers, section table and
//! checksums around whatever the fields say. A flag in the first byte turns parts of that off. [`fold`] makes seeds of
//! real shards; a shard that is folded and unfolded is the same shard, byte for byte.
//!
//! ```text
//! flags u8 | header fields from VERSION up to RESERVED | footer fields | 11 x length u16 | sections | patches
//! patch = place u16, xor u8: a byte of footer and section table, changed before the checksum is made
//! ```

use std::ops::Range;

use memory3::bank::layout::{
    FORMAT_VERSION, PAGE, SHARD_END_MAGIC, SHARD_MAGIC, SectionKind, footer, header, record, section, text_block,
    trailer,
};

/// The rest of the input is the file itself.
pub const RAW: u8 = 1;
/// Records keep their checksums and ids as they are.
pub const OPEN_RECORDS: u8 = 2;
/// The hashes of the sections are zero.
pub const NO_HASHES: u8 = 4;
/// The texts are not compressed yet: they become one frame, and the first block names it.
pub const PLAIN_TEXTS: u8 = 8;

const FIELDS: Range<usize> = header::VERSION.start..header::RESERVED.start;

/// The shard file that an input stands for; `None` for an input that is too short to be one.
pub fn unfold(input: &[u8]) -> Option<Vec<u8>> {
    let (&flags, rest) = input.split_first()?;
    if flags & RAW != 0 {
        return Some(rest.to_vec());
    }
    let (fields, rest) = rest.split_at_checked(FIELDS.len())?;
    let (counts, rest) = rest.split_at_checked(footer::SIZE)?;
    let (lengths, mut rest) = rest.split_at_checked(2 * SectionKind::ALL.len())?;

    // 1. Header.
    let mut file = vec![0; PAGE];
    put(&mut file, header::MAGIC, &SHARD_MAGIC);
    put(&mut file, FIELDS, fields);
    let crc = crc32fast::hash(&file[..header::CRC.start]);
    put(&mut file, header::CRC, &crc.to_le_bytes());

    // 2. Sections on pages of their own, and their table.
    let mut end = counts.to_vec();
    let mut blocks_at = 0;
    for (kind, length) in SectionKind::ALL.into_iter().zip(lengths.as_chunks::<2>().0) {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (bytes, left) = rest.split_at(length);
        let mut bytes = bytes.to_vec();
        rest = left;
        file.resize(file.len().next_multiple_of(PAGE), 0);
        match kind {
            SectionKind::Records if flags & OPEN_RECORDS == 0 => close_records(&file, &mut bytes),
            SectionKind::TextBlocks => blocks_at = file.len(),
            SectionKind::Texts if flags & PLAIN_TEXTS != 0 => {
                let raw = u32::try_from(length).ok()?;
                bytes = zstd::bulk::compress(&bytes, 1).ok()?;
                // There may be no block.
                if let Some(block) = file.get_mut(blocks_at..blocks_at + text_block::SIZE) {
                    put(block, text_block::STORED, &u32::try_from(bytes.len()).ok()?.to_le_bytes());
                    put(block, text_block::RAW, &raw.to_le_bytes());
                }
            }
            _ => {}
        }
        let mut entry = [0; section::SIZE];
        put(&mut entry, section::KIND, &kind.number().to_le_bytes());
        put(&mut entry, section::OFFSET, &(file.len() as u64).to_le_bytes());
        put(&mut entry, section::LENGTH, &(bytes.len() as u64).to_le_bytes());
        end.extend_from_slice(&entry);
        file.extend_from_slice(&bytes);
    }
    if flags & NO_HASHES == 0 {
        for entry in end[footer::SIZE..].chunks_exact_mut(section::SIZE) {
            let (start, length) = (number(entry, section::OFFSET), number(entry, section::LENGTH));
            put(entry, section::BLAKE3, blake3::hash(&file[start..start + length]).as_bytes());
        }
    }

    // 3. Footer, with the patches, and trailer.
    for patch in rest.as_chunks::<3>().0 {
        let place = usize::from(u16::from_le_bytes([patch[0], patch[1]])) % end.len();
        end[place] ^= patch[2];
    }
    file.resize(file.len().next_multiple_of(PAGE), 0);
    let mut last = [0; trailer::SIZE];
    put(&mut last, trailer::FOOTER_BYTES, &(end.len() as u64).to_le_bytes());
    put(&mut last, trailer::VERSION, &FORMAT_VERSION.to_le_bytes());
    put(&mut last, trailer::MAGIC, &SHARD_END_MAGIC);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&end);
    crc.update(&last[trailer::FOOTER_BYTES]);
    crc.update(&last[trailer::VERSION]);
    put(&mut last, trailer::CRC, &crc.finalize().to_le_bytes());
    file.extend_from_slice(&end);
    file.extend_from_slice(&last);
    Some(file)
}

/// The input that stands for a sound shard file whose sections are below 64 KiB; the shard itself, as raw bytes, if
/// it is not one.
pub fn fold(file: &[u8]) -> Vec<u8> {
    folded(file).unwrap_or_else(|| [&[RAW], file].concat())
}

fn folded(file: &[u8]) -> Option<Vec<u8>> {
    let end = file.len().checked_sub(trailer::SIZE + footer::SIZE + SectionKind::ALL.len() * section::SIZE)?;
    let (counts, table) = file.get(end..file.len() - trailer::SIZE)?.split_at(footer::SIZE);
    let mut input = vec![0];
    input.extend_from_slice(file.get(FIELDS)?);
    input.extend_from_slice(counts);
    let mut sections = Vec::new();
    for entry in table.chunks_exact(section::SIZE) {
        let (start, length) = (number(entry, section::OFFSET), number(entry, section::LENGTH));
        input.extend_from_slice(&u16::try_from(length).ok()?.to_le_bytes());
        sections.extend_from_slice(file.get(start..start.checked_add(length)?)?);
    }
    input.extend_from_slice(&sections);
    Some(input)
}

/// Gives records their ids and checksums, where the header's stride cuts them.
fn close_records(page: &[u8], records: &mut [u8]) {
    let stride = number(page, header::RECORD_STRIDE);
    if !(record::SIZE..=records.len()).contains(&stride) {
        return;
    }
    let shard = &page[header::SHARD];
    for (slot, bytes) in records.chunks_exact_mut(stride).enumerate() {
        let slot = u32::try_from(slot).expect("records of one byte at least").to_le_bytes();
        put(bytes, record::ID, &[slot, [shard[0], shard[1], shard[2], shard[3]]].concat());
        let crc = crc32fast::hash(&bytes[record::CRC.end..]);
        put(bytes, record::CRC, &crc.to_le_bytes());
    }
}

fn put(bytes: &mut [u8], at: Range<usize>, value: &[u8]) {
    bytes[at].copy_from_slice(value);
}

/// A number of eight bytes; too large for memory counts as the largest.
fn number(bytes: &[u8], at: Range<usize>) -> usize {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at]);
    usize::try_from(u64::from_le_bytes(number)).unwrap_or(usize::MAX)
}
