//! Tombstones files: what is accepted is a set, and says the same when it is written again.

use std::path::Path;

use memory3::bank::Tombstones;

/// One input.
pub fn run(input: &[u8]) {
    let Ok(tombstones) = Tombstones::parse(Path::new("input"), input) else { return };
    let rows = tombstones.rows();
    assert!(rows.is_sorted_by(|a, b| a < b));
    assert!(rows.iter().all(|&row| tombstones.contains(row)));
    assert_eq!(Tombstones::new(rows.to_vec()).to_bytes(), input);
}
