//! Mends a bank: restores a lost manifest from the kept ones, rebuilds what is derived (retrieval index, catalog), and,
//! when asked, publishes a generation without what is damaged.
//!
//! Comes in: a bank's folder. Goes out: what was mended, what is damaged, and which documents lose by it. What always
//! holds: nothing that can be read is given up; a record is kept if its checksum, its token ids' hash, its text and its
//! vector are right, whatever else in its shard is not. Documents that are dropped are new to the next compile.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::bank::adopt::{names, open_listed, read_tombstones, set_aside_unpublished, sweep};
use crate::bank::catalog::Catalog;
use crate::bank::documents::RowId;
use crate::bank::edit::BankEditor;
use crate::bank::error::BankError;
use crate::bank::io::{DiskIo, Io, hash_file, write_file};
use crate::bank::layout::SectionKind;
use crate::bank::lock::BankLock;
use crate::bank::manifest::{FileEntry, Manifest};
use crate::bank::publish::{Parts, Publication, is_whole};
use crate::bank::retention::{kept_generations, read_kept};
use crate::bank::retrieval::RetrievalIndex;
use crate::bank::rewrite::{Choice, Leftovers};
use crate::bank::sequence::ShardSequence;
use crate::bank::shard::Shard;
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::BankSpec;
use crate::memory::RecordId;

/// How to mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepairOptions {
    /// Publish a generation without what is damaged.
    pub drop_damaged: bool,
    /// Most records of a new shard.
    pub records_per_shard: u32,
    /// Generations that stay on disk.
    pub keep: u32,
    /// What to do with unpublished shards when damage is dropped.
    pub leftovers: Leftovers,
}

/// What was mended, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Repair {
    /// What was done, for people.
    pub done: Vec<String>,
    /// What is still damaged, or was dropped.
    pub damage: Vec<String>,
    /// What is damaged and can neither be made again nor dropped.
    pub lost: Vec<String>,
    /// Ids of the documents that use damaged records.
    pub documents: Vec<String>,
    /// Document rows whose ids cannot be read.
    pub unreadable_documents: u64,
    /// The generation that is published now.
    pub generation: u64,
    /// What is damaged was dropped.
    pub dropped: bool,
}

/// What is wrong with a shard.
#[derive(Default)]
struct Damage {
    /// Slots whose records cannot be kept.
    records: BTreeSet<u32>,
    /// Whether its document rows cannot be trusted.
    rows: bool,
}

/// Mends the bank in `dir`.
///
/// # Errors
/// [`BankError::NotABank`] if there is not even a kept manifest; [`BankError::Locked`]; [`BankError::Io`].
pub fn repair(dir: &Path, options: RepairOptions) -> Result<Repair, BankError> {
    if !dir.join("index").is_dir() {
        return Err(BankError::NotABank { path: dir.to_owned() });
    }
    let io: Arc<dyn Io> = Arc::new(DiskIo);
    let lock = BankLock::acquire(dir)?;
    let mut repair = Repair::default();
    // 1. The manifest, and its copy.
    let manifest = restore_manifest(&*io, dir, &mut repair)?;
    repair.generation = manifest.generation;
    sweep(&*io, dir, &manifest)?;
    // 2. Files that have a second name.
    let index_dir = dir.join("index");
    for (role, entry) in manifest.index_files() {
        if !is_whole(entry, &index_dir) && restore_from_fixed_name(&*io, &index_dir, &role, entry)? {
            repair.done.push(format!("{}: restored from its other name ({role})", entry.file));
        } else if !is_whole(entry, &index_dir) && entry != &manifest.retrieval.file {
            repair.lost.push(format!(
                "index/{}: missing or damaged ({role}), and cannot be made again; restore it from a copy, or see \
                 memory3 rollback",
                entry.file
            ));
        }
    }
    let tombstones = match read_tombstones(dir, &manifest) {
        Ok(tombstones) => tombstones,
        // Without them dead documents would come back: nothing can be rebuilt.
        Err(_) => return Ok(repair),
    };
    // 3. The shards.
    let (shards, damaged) = inspect(dir, &manifest, &tombstones, &mut repair);
    if damaged.is_empty() {
        mend_derived(&*io, dir, &manifest, shards, tombstones, options.keep, &mut repair)?;
        return Ok(repair);
    }
    if !options.drop_damaged {
        return Ok(repair);
    }
    let choice = Choice {
        shards: damaged.keys().copied().collect(),
        goes_along: &|record| damaged.get(&record.shard).is_some_and(|damage| !damage.records.contains(&record.slot)),
        untrusted_rows: damaged.iter().filter(|(_, damage)| damage.rows).map(|(&number, _)| number).collect(),
        may_lose: true,
        check: false,
    };
    let editor = BankEditor { lock, io, manifest, shards, tombstones, keep: options.keep };
    let (next, _) = editor.rewrite(choice, options.records_per_shard, options.leftovers, None)?;
    repair.done.push(format!("generation {}: published without what is damaged", next.generation));
    (repair.generation, repair.dropped) = (next.generation, true);
    Ok(repair)
}

/// The published manifest, or the newest kept one that can be read.
fn restore_manifest(io: &dyn Io, dir: &Path, repair: &mut Repair) -> Result<Manifest, BankError> {
    let (index_dir, path) = (dir.join("index"), Manifest::path(dir));
    let manifest = match Manifest::read(dir) {
        Ok(manifest) => manifest,
        Err(error @ (BankError::NotABank { .. } | BankError::Json { .. } | BankError::Corrupt { .. })) => {
            let numbers = kept_generations(dir)?;
            let newest = numbers.iter().rev().find_map(|&number| read_kept(dir, number).ok());
            let Some(mut manifest) = newest else { return Err(error) };
            let from = manifest.generation;
            if numbers.last() != Some(&from) {
                // A newer one is lost. Its number and those of its shards stay its own, and its shards are not taken
                // for an interrupted compile's: they may be copies of records that this one has.
                manifest.parent = Some(from);
                manifest.generation = numbers.last().copied().unwrap_or(from) + 1;
                set_aside_unpublished(io, dir, &manifest, Leftovers::SetAside)?;
                manifest.next_shard = manifest.next_shard.max(highest_shard(dir)? + 1);
            }
            if path.exists() {
                let aside = index_dir.join("manifest.json.aside");
                io.rename(&path, &aside).map_err(BankError::io(&aside, "rename to"))?;
                repair.done.push("index/manifest.json: damaged, kept as manifest.json.aside".to_owned());
            }
            let bytes = manifest.to_bytes(&path)?;
            let copy = Manifest::generation_name(manifest.generation);
            write_file(io, &index_dir.join("generations"), &copy, &bytes)?;
            write_file(io, &index_dir, "manifest.json", &bytes)?;
            repair.done.push(format!("index/manifest.json: restored from the kept manifest of generation {from}"));
            manifest
        }
        Err(error) => return Err(error),
    };
    let bytes = manifest.to_bytes(&path)?;
    let copy = Manifest::generation_path(dir, manifest.generation);
    if !fs::read(&copy).is_ok_and(|kept| Manifest::parse(&copy, &kept).is_ok_and(|kept| kept == manifest)) {
        let (folder, name) = (index_dir.join("generations"), Manifest::generation_name(manifest.generation));
        io.create_dir(&folder).map_err(BankError::io(&folder, "create"))?;
        write_file(io, &folder, &name, &bytes)?;
        repair.done.push(format!("index/generations/{name}: written again from index/manifest.json"));
    }
    Ok(manifest)
}

/// The highest number in the names of the folder `shards`, of files set aside too.
fn highest_shard(dir: &Path) -> Result<u32, BankError> {
    let number = |name: &String| name.split('.').next()?.parse().ok().filter(|&number| number < u32::MAX);
    Ok(names(&dir.join("shards"))?.iter().filter_map(number).max().unwrap_or(0))
}

/// A file that was deleted may still have its fixed name.
fn restore_from_fixed_name(io: &dyn Io, index_dir: &Path, role: &str, entry: &FileEntry) -> Result<bool, BankError> {
    let names = match role.strip_prefix("codec ") {
        Some(name) => vec!["codec.faiss".to_owned(), format!("codec.{name}.faiss")],
        None if role == "prefix" => vec!["prefix.safetensors".to_owned()],
        None => vec!["retrieval.faiss".to_owned()],
    };
    for name in names {
        let path = index_dir.join(name);
        if hash_file(&path).is_ok_and(|(hash, _)| hash.to_hex().as_str() == entry.blake3) {
            let bytes = fs::read(&path).map_err(BankError::io(&path, "read"))?;
            write_file(io, index_dir, &entry.file, &bytes)?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Rebuilds the retrieval index if it is not whole, and the catalog in any case.
fn mend_derived(
    io: &dyn Io,
    dir: &Path,
    manifest: &Manifest,
    shards: BTreeMap<u32, Shard>,
    tombstones: Tombstones,
    keep: u32,
    repair: &mut Repair,
) -> Result<(), BankError> {
    let catalog = Catalog::path(dir);
    if catalog.exists() {
        fs::remove_dir_all(&catalog).map_err(BankError::io(&catalog, "remove"))?;
    }
    let hashes: Vec<(&Shard, &str)> =
        shards.values().zip(manifest.shards.iter().map(|entry| entry.blake3.as_str())).collect();
    Catalog::open(dir)?.bring_up_to_date(&hashes)?.0.close()?;
    repair.done.push(format!("index/catalog: built from {} shards", hashes.len()));
    let index_dir = dir.join("index");
    if is_whole(&manifest.retrieval.file, &index_dir) {
        return Ok(());
    }
    let sequence = ShardSequence::new(
        Arc::new(DiskIo),
        dir,
        BankSpec::of(manifest),
        shards,
        manifest.shards.clone(),
        manifest.next_shard,
    );
    let publication = Publication { io, dir, published: Some(manifest) };
    let next = publication.publish(&sequence, tombstones, Parts::of(manifest), keep)?;
    repair.done.push(format!("index/{}: built from the shards", next.retrieval.file.file));
    repair.generation = next.generation;
    Ok(())
}

/// Opens the shards and finds out what of them can be kept.
fn inspect(
    dir: &Path,
    manifest: &Manifest,
    tombstones: &Tombstones,
    repair: &mut Repair,
) -> (BTreeMap<u32, Shard>, BTreeMap<u32, Damage>) {
    let index_path = dir.join("index").join(&manifest.retrieval.file.file);
    let index = RetrievalIndex::open(&index_path, &manifest.retrieval).ok().filter(RetrievalIndex::is_exact);
    let (mut shards, mut damaged) = (BTreeMap::new(), BTreeMap::new());
    for entry in &manifest.shards {
        let path = dir.join("shards").join(&entry.file);
        let whole = is_whole(&entry.file_entry(), &dir.join("shards"));
        match open_listed(&dir.join("shards"), entry) {
            Ok(shard) => {
                let shard = shard.inspected();
                if !whole {
                    let damage = damage_of(&shard, index.as_ref());
                    repair.damage.push(format!(
                        "{}: damaged: {} of {} records cannot be kept{}",
                        path.display(),
                        damage.records.len(),
                        shard.records(),
                        if damage.rows { ", nor its documents' rows (their records can)" } else { "" }
                    ));
                    if damage.rows {
                        repair.unreadable_documents += u64::from(shard.documents());
                    }
                    damaged.insert(entry.number, damage);
                }
                shards.insert(entry.number, shard);
            }
            Err(error) => {
                repair.damage.push(error.to_string());
                repair.unreadable_documents += entry.documents;
                let records = 0..u32::try_from(entry.records).unwrap_or(u32::MAX);
                damaged.insert(entry.number, Damage { records: records.collect(), rows: true });
            }
        }
    }
    let bad = |record: RecordId| damaged.get(&record.shard).is_some_and(|damage| damage.records.contains(&record.slot));
    for (&number, shard) in &shards {
        if damaged.get(&number).is_some_and(|damage| damage.rows) {
            continue;
        }
        for row in (0..shard.documents()).filter(|&row| !tombstones.contains(RowId { shard: number, row })) {
            if let Ok(document) = shard.document(row)
                && document.chunks().any(|chunk| bad(chunk.record))
            {
                repair.documents.push(document.id.to_owned());
            }
        }
    }
    (shards, damaged)
}

/// Which records of a damaged shard cannot be kept, and whether its rows can.
fn damage_of(shard: &Shard, index: Option<&RetrievalIndex>) -> Damage {
    let sound = |kind: SectionKind| shard.check_section(kind).is_ok();
    // Where a text lies has no checksum of its own.
    let texts = sound(SectionKind::TextIndex) && sound(SectionKind::TextBlocks);
    let vectors = sound(SectionKind::Vectors);
    let keep = |slot: u32| {
        let Ok(record) = shard.record(slot) else { return false };
        let in_index = || index.and_then(|index| index.vector(record.id)).is_some_and(|vector| vector == record.vector);
        texts && record.is_of_its_content() && shard.text(slot).is_ok() && (vectors || in_index())
    };
    Damage {
        records: (0..shard.records()).filter(|&slot| !keep(slot)).collect(),
        rows: !(sound(SectionKind::DocumentOffsets) && sound(SectionKind::Documents)),
    }
}
