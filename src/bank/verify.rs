//! Checks a bank: every checksum, every id, every reference.
//!
//! Comes in: a folder. Goes out: a list of findings, each naming file, record or row, and offset. What always holds:
//! no damage stops the check of what is not damaged, and nothing is repaired. Only a manifest that cannot be read is
//! an error instead of a finding.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::bank::adopt::read_tombstones;
use crate::bank::catalog::Catalog;
use crate::bank::documents::{RowId, use_ordinal, use_row};
use crate::bank::error::BankError;
use crate::bank::finding::Finding;
use crate::bank::io::hash_file;
use crate::bank::layout::SectionKind;
use crate::bank::live::Live;
use crate::bank::lock::BankLock;
use crate::bank::manifest::Manifest;
use crate::bank::retrieval::RetrievalIndex;
use crate::bank::shard::Shard;
use crate::bank::tombstones::Tombstones;
use crate::memory::{ContentHash, RecordId};

/// What to check beside the shards and the hashes of all files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Load the retrieval index and compare it with the shards.
    pub retrieval: bool,
    /// Open the catalog and compare it with the shards.
    pub catalog: bool,
    /// Open the codec and compare it with the fingerprint.
    pub codec: bool,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { retrieval: true, catalog: true, codec: false }
    }
}

/// The result of a check.
#[derive(Debug, Default)]
pub struct Report {
    /// Shards that could be opened.
    pub shards: u64,
    /// Records checked.
    pub records: u64,
    /// Document rows checked.
    pub documents: u64,
    /// Bytes of shards and index files.
    pub bytes: u64,
    /// Damage.
    pub findings: Vec<Finding>,
    /// What could not be checked, and why; not damage.
    pub skipped: Vec<String>,
}

impl Report {
    /// Was no damage found?
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }
}

/// Checks the published generation of the bank in `dir`.
///
/// # Errors
/// Only if the manifest cannot be read: then there is nothing to compare with.
pub fn verify(dir: &Path, options: VerifyOptions) -> Result<Report, BankError> {
    let mut manifest = Manifest::read(dir)?;
    loop {
        let report = verify_generation(dir, &manifest, options);
        if report.is_clean() {
            return Ok(report);
        }
        // What is missing may have gone with its generation while it was checked.
        let now = Manifest::read(dir)?;
        if now.generation == manifest.generation {
            return Ok(report);
        }
        manifest = now;
    }
}

fn verify_generation(dir: &Path, manifest: &Manifest, options: VerifyOptions) -> Report {
    let mut check = Check { dir, manifest, report: Report::default(), shards: BTreeMap::new() };
    check.manifest_copy();
    check.shard_files();
    check.index_files();
    if options.codec {
        check.codec();
    }
    let tombstones = check.tombstones();
    check.shard_contents(&tombstones);
    // What follows needs all shards.
    if check.shards.len() != manifest.shards.len() {
        check.skip("counts, retrieval index and catalog: not all shards could be opened");
        return check.report;
    }
    let live = match Live::of(&check.shards, &tombstones) {
        Ok(live) => live,
        Err(_) => {
            check.skip("counts, retrieval index and catalog: a document names a record that there is not");
            return check.report;
        }
    };
    check.counts(&live);
    if options.retrieval {
        check.retrieval(&live, !tombstones.rows().is_empty());
    }
    if options.catalog {
        check.catalog();
    }
    check.report
}

struct Check<'a> {
    dir: &'a Path,
    manifest: &'a Manifest,
    report: Report,
    shards: BTreeMap<u32, Shard>,
}

impl Check<'_> {
    fn find(&mut self, finding: Finding) {
        self.report.findings.push(finding);
    }

    fn skip(&mut self, what: impl Into<String>) {
        self.report.skipped.push(what.into());
    }

    fn manifest_copy(&mut self) {
        let (path, copy) = (Manifest::path(self.dir), Manifest::generation_path(self.dir, self.manifest.generation));
        match (fs::read(&path), fs::read(&copy)) {
            (Ok(published), Ok(kept)) if published == kept => {}
            (_, Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                self.find(Finding::MissingFile { path: copy, role: "copy of the manifest".to_owned() });
            }
            _ => self.find(Finding::ManifestCopy { path, copy }),
        }
    }

    /// Length and BLAKE3 of a file; false if it is not there.
    fn file(&mut self, path: PathBuf, role: String, bytes: u64, blake3: &str) -> bool {
        match hash_file(&path) {
            Err(_) => {
                self.find(Finding::MissingFile { path, role });
                return false;
            }
            Ok((_, found)) if found != bytes => self.find(Finding::FileLength { path, expected: bytes, found }),
            Ok((hash, _)) if hash.to_hex().as_str() != blake3 => {
                let found = hash.to_hex().to_string();
                self.find(Finding::FileHash { path, expected: blake3.to_owned(), found });
            }
            Ok(_) => {}
        }
        self.report.bytes += bytes;
        true
    }

    fn index_files(&mut self) {
        for (role, entry) in self.manifest.index_files() {
            self.file(self.dir.join("index").join(&entry.file), role, entry.bytes, &entry.blake3);
        }
    }

    /// The codec's files may be whole and still be another codec's.
    fn codec(&mut self) {
        let (path, manifest) = (Manifest::path(self.dir), self.manifest);
        match manifest.codec.open(self.dir, &path, manifest.shape.memory) {
            Err(error) => self.find(Finding::CodecUnreadable { error }),
            Ok(codec) => {
                let (expected, found) = (manifest.fingerprint.get("codec").unwrap_or_default(), codec.fingerprint());
                if expected != found {
                    self.find(Finding::ForeignCodec { path, expected: expected.to_owned(), found });
                }
            }
        }
    }

    fn shard_files(&mut self) {
        let manifest = self.manifest;
        for entry in &manifest.shards {
            let path = self.dir.join("shards").join(&entry.file);
            if !self.file(path.clone(), format!("shard {}", entry.number), entry.bytes, &entry.blake3) {
                continue;
            }
            let shard = match Shard::open(&path) {
                Ok(shard) => shard.inspected(),
                Err(error) => {
                    self.find(Finding::ShardUnreadable { error });
                    continue;
                }
            };
            self.report.shards += 1;
            let header = shard.header();
            let hex = |id: [u8; 32]| blake3::Hash::from_bytes(id).to_hex().to_string();
            let code_bytes = manifest.codec.description.code_bytes;
            let facts = [
                ("shard number", entry.number.to_string(), shard.number().to_string()),
                ("fingerprint", manifest.fingerprint.id_hex(), hex(header.fingerprint)),
                ("embedder's fingerprint", manifest.embedder.id_hex(), hex(header.embedder)),
                ("shape", format!("{:?}", manifest.shape.memory), format!("{:?}", header.shape)),
                ("code bytes", code_bytes.to_string(), header.code_bytes.to_string()),
                ("width of vectors", manifest.retrieval.dim.to_string(), header.vector_dim.to_string()),
            ];
            for (what, expected, found) in facts {
                if expected != found {
                    self.find(Finding::ForeignShard { path: path.clone(), what, expected, found });
                }
            }
            for (what, expected, found) in [
                ("records of the shard", entry.records, u64::from(shard.records())),
                ("documents of the shard", entry.documents, u64::from(shard.documents())),
            ] {
                if expected != found {
                    self.find(Finding::Count { path: path.clone(), what, expected, found });
                }
            }
            // Under its own number: a shard in another's place is found by its header, its records are still checked.
            self.shards.insert(entry.number, shard);
        }
    }

    fn shard_contents(&mut self, tombstones: &Tombstones) {
        let shards = std::mem::take(&mut self.shards);
        for shard in shards.values() {
            self.sections(shard);
            self.records(shard);
            self.documents(shard, &shards, tombstones);
        }
        self.shards = shards;
    }

    fn sections(&mut self, shard: &Shard) {
        for kind in SectionKind::ALL {
            if shard.check_section(kind).is_err() {
                let (path, range) = (shard.path().to_owned(), shard.section_range(kind));
                let (offset, length) = (range.start, range.end - range.start);
                self.find(Finding::SectionHash { path, section: kind.name(), offset, length });
            }
        }
        for (start, bytes) in shard.gaps() {
            if let Some(at) = bytes.iter().position(|&byte| byte != 0) {
                let (path, offset) = (shard.path().to_owned(), start + at as u64);
                self.find(Finding::Gap { path, offset, found: bytes[at] });
            }
        }
    }

    fn records(&mut self, shard: &Shard) {
        // Texts of neighbouring records share a block: keep the last one.
        let mut block: Option<(u32, Result<Vec<u8>, ()>)> = None;
        for slot in 0..shard.records() {
            self.report.records += 1;
            let id = RecordId { shard: shard.number(), slot };
            match shard.record(slot) {
                Err(error) => self.find(Finding::Record { record: id, error }),
                Ok(record) => {
                    let offset = shard.record_offset(slot);
                    if let Some(reason) = record.selection_fault() {
                        let path = shard.path().to_owned();
                        self.find(Finding::Selection { path, record: id, offset, reason });
                    }
                    if !record.is_of_its_content() {
                        let offset = shard.section_range(SectionKind::Contents).start + 16 * u64::from(slot);
                        self.find(Finding::Content { path: shard.path().to_owned(), record: id, offset });
                    }
                }
            }
            let text = shard.text_entry(slot).and_then(|entry| {
                if block.as_ref().is_none_or(|(number, _)| *number != entry.block) {
                    let raw = shard.text_block(entry.block);
                    block = Some((entry.block, raw.as_ref().map(Clone::clone).map_err(|_| ())));
                    raw?;
                }
                match &block {
                    Some((_, Ok(raw))) => shard.cut_text(slot, entry, raw).map(|_| ()),
                    _ => Ok(()), // reported with the first record of the block
                }
            });
            if let Err(error) = text {
                self.find(Finding::Text { record: id, error });
            }
        }
    }

    fn documents(&mut self, shard: &Shard, shards: &BTreeMap<u32, Shard>, tombstones: &Tombstones) {
        let mut uses = Vec::new();
        let mut whole = true;
        for number in 0..shard.documents() {
            self.report.documents += 1;
            let row = RowId { shard: shard.number(), row: number };
            let document = match shard.document(number) {
                Ok(document) => document,
                Err(error) => {
                    whole = false;
                    self.find(Finding::Document { row, error });
                    continue;
                }
            };
            for (ordinal, chunk) in (0_u32..).zip(document.chunks()) {
                let path = || shard.path().to_owned();
                uses.push([chunk.record.as_u64(), u64::from(number) | u64::from(ordinal) << 32]);
                let exists = shards.get(&chunk.record.shard).is_some_and(|home| chunk.record.slot < home.records());
                // What only dead rows use may be gone: compacting drops it.
                if !exists && !tombstones.contains(row) {
                    self.find(Finding::ChunkRecord { path: path(), row, ordinal, record: chunk.record });
                }
                if chunk.start > chunk.end {
                    let (start, end) = (chunk.start, chunk.end);
                    self.find(Finding::ChunkSpan { path: path(), row, ordinal, start, end });
                }
            }
        }
        uses.sort_unstable_by_key(|entry| (entry[0], use_row(entry), use_ordinal(entry)));
        let stored = shard.uses().unwrap_or(&[]);
        if whole && uses != stored {
            let at = uses.iter().zip(stored).position(|(a, b)| a != b).unwrap_or(uses.len().min(stored.len()));
            let show = |entry: Option<&[u64; 2]>| {
                entry.map_or_else(
                    || "none".to_owned(),
                    |e| format!("record {}, row {}, chunk {}", RecordId::from_u64(e[0]), use_row(e), use_ordinal(e)),
                )
            };
            self.find(Finding::Uses {
                path: shard.path().to_owned(),
                offset: shard.section_range(SectionKind::Uses).start + 16 * at as u64,
                expected: show(uses.get(at)),
                found: show(stored.get(at)),
            });
        }
    }

    fn tombstones(&mut self) -> Tombstones {
        let index_dir = self.dir.join("index");
        match read_tombstones(self.dir, self.manifest) {
            Err(error) => {
                self.find(Finding::TombstonesUnreadable { error });
                Tombstones::default()
            }
            Ok(tombstones) => {
                for &row in tombstones.rows() {
                    let exists = self.shards.get(&row.shard).is_none_or(|shard| row.row < shard.documents());
                    if !exists || !self.manifest.shards.iter().any(|entry| entry.number == row.shard) {
                        let file = self.manifest.tombstones.as_ref().map(|entry| entry.file.file.clone());
                        self.find(Finding::Tombstone { path: index_dir.join(file.unwrap_or_default()), row });
                    }
                }
                tombstones
            }
        }
    }

    fn counts(&mut self, live: &Live) {
        let (stated, found) = (self.manifest.counts, live.counts);
        for (what, expected, found) in [
            ("documents", stated.documents, found.documents),
            ("chunks", stated.chunks, found.chunks),
            ("records", stated.records, found.records),
            ("duplicates", stated.duplicates, found.duplicates),
            ("tokens", stated.tokens, found.tokens),
        ] {
            if expected != found {
                self.find(Finding::Count { path: Manifest::path(self.dir), what, expected, found });
            }
        }
    }

    /// The index must hold every live record. A dead one may be left in it if it died by a tombstone.
    fn retrieval(&mut self, live: &Live, with_tombstones: bool) {
        let entry = &self.manifest.retrieval;
        let path = self.dir.join("index").join(&entry.file.file);
        let index = match RetrievalIndex::open(&path, entry) {
            Ok(index) => index,
            Err(error) => return self.find(Finding::RetrievalUnreadable { error }),
        };
        let mut findings = Vec::new();
        for shard in self.shards.values() {
            let number = shard.number();
            let ids: Vec<RecordId> =
                live.slots(shard).into_iter().map(|slot| RecordId { shard: number, slot }).collect();
            let mut expected = ids.len();
            if index.is_exact() {
                for &record in &ids {
                    let Some(vector) = index.vector(record) else {
                        expected -= 1;
                        findings.push(Finding::RetrievalMissing { path: path.clone(), record });
                        continue;
                    };
                    let stored = shard.vector(record.slot).unwrap_or(&[]);
                    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
                    if let Some(position) = vector.iter().zip(stored).position(differs) {
                        findings.push(Finding::RetrievalVector { path: path.clone(), record, position });
                    }
                }
            }
            match index.remove(&ids) {
                Ok(removed) if removed == expected => {}
                Ok(removed) => {
                    let (expected, found) = (expected as u64, removed as u64);
                    findings.push(Finding::RetrievalShard { path: path.clone(), shard: number, expected, found });
                }
                Err(error) => {
                    // Some index types cannot remove; then the number of vectors is all that can be compared.
                    self.skip(format!("ids of the retrieval index: {error}"));
                    if entry.count < live.counts.records {
                        let (what, expected, found) = ("vectors", live.counts.records, entry.count);
                        self.find(Finding::Count { path: path.clone(), what, expected, found });
                    }
                    return;
                }
            }
        }
        if with_tombstones {
            // Records that a tombstone killed may still be there.
            let dead = |shard: &Shard| {
                let number = shard.number();
                let ids = (0..shard.records()).map(move |slot| RecordId { shard: number, slot });
                ids.filter(|&id| !live.contains(id)).collect::<Vec<_>>()
            };
            for shard in self.shards.values() {
                if let Err(error) = index.remove(&dead(shard)) {
                    return self.find(Finding::RetrievalUnreadable { error });
                }
            }
        }
        match index.rest() {
            Ok((_, 0)) => {}
            Ok((examples, count)) => findings.push(Finding::RetrievalForeign { path, count, examples }),
            Err(error) => findings.push(Finding::RetrievalUnreadable { error }),
        }
        self.report.findings.append(&mut findings);
    }

    fn catalog(&mut self) {
        let path = Catalog::path(self.dir);
        if !path.exists() {
            return self.skip("catalog: there is none; the next compile builds it");
        }
        // The lock is held while the catalog is copied. Where none can be made nobody writes.
        let copy = match BankLock::acquire(self.dir) {
            Err(error @ BankError::Locked { .. }) => return self.skip(format!("catalog: {error}")),
            _lock => Catalog::open_copy(self.dir),
        };
        match copy.and_then(|(_folder, catalog)| self.catalog_entries(&catalog, &path)) {
            Ok(()) => {}
            Err(error @ BankError::Catalog { .. }) => self.find(Finding::CatalogUnreadable { error }),
            Err(error) => self.skip(format!("catalog: {error}")),
        }
    }

    fn catalog_entries(&mut self, catalog: &Catalog, path: &Path) -> Result<(), BankError> {
        let listed: Vec<(u32, &str)> =
            self.manifest.shards.iter().map(|entry| (entry.number, entry.blake3.as_str())).collect();
        let Some(unpublished) = catalog.beyond(&listed, self.manifest.next_shard)? else {
            self.find(Finding::CatalogStale { path: path.to_owned() });
            return Ok(());
        };
        let mut findings = Vec::new();
        let (mut records, mut rows) = (0_u64, BTreeMap::new());
        for shard in self.shards.values() {
            records += u64::from(shard.records());
            for slot in 0..shard.records() {
                let expected = RecordId { shard: shard.number(), slot };
                let content = shard.content(slot)?;
                let found = catalog.record_of(content)?;
                if found != Some(expected) {
                    findings.push(Finding::CatalogRecord { path: path.to_owned(), content, expected, found });
                }
            }
            for row in 0..shard.documents() {
                if let Ok(document) = shard.document(row) {
                    // The last row of an id counts; hashes keep this table small.
                    let place = RowId { shard: shard.number(), row };
                    let found = catalog.row_of(document.id)?;
                    rows.insert(ContentHash::of_text(document.id).0, place);
                    if found.is_none_or(|found| found < place) {
                        let (id, path) = (document.id.to_owned(), path.to_owned());
                        findings.push(Finding::CatalogDocument { path, id, expected: place, found });
                    }
                }
            }
        }
        let (contents, documents) = catalog.sizes();
        for (what, expected, found) in
            [("contents", records, contents as u64), ("documents", rows.len() as u64, documents as u64)]
        {
            if found < expected || (found > expected && unpublished == 0) {
                findings.push(Finding::CatalogCount { path: path.to_owned(), what, expected, found });
            }
        }
        self.report.findings.append(&mut findings);
        Ok(())
    }
}
