//! Tombstones: the document rows that are dead, as a sorted list in one small immutable file.
//!
//! Comes in: row ids. Goes out: the answer whether a row is dead. Eight bytes a tombstone, in the file and in memory.

use std::path::Path;

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::layout::{FORMAT_VERSION, TOMBSTONES_MAGIC, array_at, put, tombstone, tombstones, u32_at, u64_at};

/// A set of dead document rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tombstones {
    rows: Vec<RowId>,
}

impl Tombstones {
    /// The set of these rows; order and repetition do not matter.
    pub fn new(mut rows: Vec<RowId>) -> Self {
        rows.sort_unstable();
        rows.dedup();
        Self { rows }
    }

    /// Is this row dead?
    pub fn contains(&self, row: RowId) -> bool {
        !self.rows.is_empty() && self.rows.binary_search(&row).is_ok()
    }

    /// The dead rows, ascending.
    pub fn rows(&self) -> &[RowId] {
        &self.rows
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; tombstones::SIZE];
        put(&mut bytes, tombstones::MAGIC, &TOMBSTONES_MAGIC);
        put(&mut bytes, tombstones::VERSION, &FORMAT_VERSION.to_le_bytes());
        put(&mut bytes, tombstones::COUNT, &(self.rows.len() as u64).to_le_bytes());
        for row in &self.rows {
            bytes.extend_from_slice(&row.shard.to_le_bytes());
            bytes.extend_from_slice(&row.row.to_le_bytes());
        }
        bytes
    }

    /// Parses the bytes of a file.
    ///
    /// # Errors
    /// [`BankError::Corrupt`], [`BankError::NewerVersion`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BankError> {
        let Some((head, rows)) = bytes.split_at_checked(tombstones::SIZE) else {
            let expected = format!("at least {} bytes", tombstones::SIZE);
            return Err(BankError::corrupt(path, 0, "length", expected, bytes.len()));
        };
        let magic: [u8; 8] = array_at(head, tombstones::MAGIC);
        if magic != TOMBSTONES_MAGIC {
            let (expected, found) = (TOMBSTONES_MAGIC.escape_ascii(), magic.escape_ascii());
            return Err(BankError::corrupt(path, 0, "magic", expected, found));
        }
        let version = u32_at(head, tombstones::VERSION);
        if version > FORMAT_VERSION {
            let found = u64::from(version);
            return Err(BankError::NewerVersion {
                path: path.to_owned(),
                what: "the tombstones file",
                found,
                supported: FORMAT_VERSION,
            });
        }
        let (reserved, count) = (u32_at(head, tombstones::RESERVED), u64_at(head, tombstones::COUNT));
        if version == 0 || reserved != 0 {
            let found = format!("{version} and {reserved}");
            let at = tombstones::VERSION.start as u64;
            return Err(BankError::corrupt(path, at, "version and reserved bytes", "at least 1, and 0", found));
        }
        if !rows.len().is_multiple_of(tombstone::SIZE) || (rows.len() / tombstone::SIZE) as u64 != count {
            let found = format!("{} bytes of rows", rows.len());
            let at = tombstones::COUNT.start as u64;
            return Err(BankError::corrupt(path, at, "count", format!("{count} rows"), found));
        }
        let rows: Vec<RowId> = rows
            .chunks_exact(tombstone::SIZE)
            .map(|entry| RowId { shard: u32_at(entry, tombstone::SHARD), row: u32_at(entry, tombstone::ROW) })
            .collect();
        if let Some(at) = rows.windows(2).position(|pair| pair[0] >= pair[1]) {
            let offset = (tombstones::SIZE + (at + 1) * tombstone::SIZE) as u64;
            return Err(BankError::corrupt(path, offset, "rows", "ascending rows", "a row out of order"));
        }
        Ok(Self { rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tombstones_survive_their_file_and_answer_in_any_number() {
        let rows: Vec<RowId> = (0..200_000).rev().map(|i| RowId { shard: 1 + i % 7, row: i }).collect();
        let set = Tombstones::new(rows.iter().chain(&rows[..5]).copied().collect());
        let read = Tombstones::parse(Path::new("t"), &set.to_bytes()).unwrap();
        assert_eq!(read, set);
        assert_eq!(read.rows().len(), 200_000);
        assert!(rows.iter().all(|&row| read.contains(row)));
        assert!(!read.contains(RowId { shard: 8, row: 0 }));
        assert!(!Tombstones::default().contains(rows[0]));
    }

    #[test]
    fn damaged_tombstones_are_errors() {
        let bytes = Tombstones::new(vec![RowId { shard: 1, row: 2 }, RowId { shard: 1, row: 3 }]).to_bytes();
        for length in 0..bytes.len() {
            assert!(Tombstones::parse(Path::new("t"), &bytes[..length]).is_err(), "{length}");
        }
        let mut swapped = bytes[..24].to_vec();
        swapped.extend_from_slice(&bytes[32..]);
        swapped.extend_from_slice(&bytes[24..32]);
        assert!(Tombstones::parse(Path::new("t"), &swapped).is_err());
        for (at, value) in [(8, 0), (12, 1)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(Tombstones::parse(Path::new("t"), &bad).is_err(), "{at}");
        }
        let mut newer = bytes;
        newer[8] = 2;
        assert!(matches!(Tombstones::parse(Path::new("t"), &newer), Err(BankError::NewerVersion { found: 2, .. })));
    }
}
