//! Writes shards anew: without what is dead (`compact`), without what is damaged (`repair`), or with other retrieval
//! vectors (`--re-embed`). Nothing is encoded: codes, tokens and texts are copied.
//!
//! Comes in: a bank and the shards that are to go. Goes out: new shards with their records and rows, and a generation
//! that has these instead. A row of another shard that uses a moved record is written anew too. What always holds: what
//! is copied was checked against its checksums, so that damage is not signed anew; a mark in `index/rewrite.json` tells
//! the next writer that unpublished shards are only copies, and may go.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::bank::adopt::{set_aside_unpublished, sweep};
use crate::bank::catalog::Catalog;
use crate::bank::documents::{Chunk, RowId};
use crate::bank::edit::BankEditor;
use crate::bank::error::BankError;
use crate::bank::layout::SectionKind;
use crate::bank::live::Live;
use crate::bank::lock::BankLock;
use crate::bank::manifest::Manifest;
use crate::bank::mark::Mark;
use crate::bank::publish::{Parts, Publication, RetrievalSpec};
use crate::bank::sequence::ShardSequence;
use crate::bank::shard::Shard;
use crate::bank::text_reader::TextReader;
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::{BankSpec, NewDocument, NewRecord};
use crate::fingerprint::Fingerprint;
use crate::memory::RecordId;

/// Records whose texts are embedded together.
const BATCH: usize = 256;

/// What is done with shards that an interrupted compile left unpublished: they may use records that move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftovers {
    /// Nothing is rewritten.
    Refuse,
    /// They get another name and are not used.
    SetAside,
}

/// Makes retrieval vectors of texts, one after the other; none if it was asked to stop.
pub type Embed<'a> = dyn FnMut(&[&str]) -> Result<Option<Vec<f32>>, Box<dyn std::error::Error + Send + Sync>> + 'a;

/// Other retrieval vectors.
pub struct NewVectors<'a> {
    /// What they depend on.
    pub embedder: Fingerprint,
    /// Width of one.
    pub dim: usize,
    /// Makes them.
    pub embed: &'a mut Embed<'a>,
    /// The index over them.
    pub retrieval: RetrievalSpec,
}

impl BankEditor {
    /// Rewrites all shards with other retrieval vectors, and publishes; also gives the lock back.
    ///
    /// # Errors
    /// As [`BankEditor::compact`]; [`BankError::Embed`]; [`BankError::Stopped`], after which nothing is left of it.
    pub fn re_embed(
        self,
        vectors: NewVectors<'_>,
        records_per_shard: u32,
        leftovers: Leftovers,
    ) -> Result<(Manifest, BankLock), BankError> {
        let live = Live::of(&self.shards, &self.tombstones)?;
        let choice = Choice {
            shards: self.shards.keys().copied().collect(),
            goes_along: &|record| live.contains(record),
            untrusted_rows: BTreeSet::new(),
            may_lose: false,
            check: true,
        };
        match self.rewrite(choice, records_per_shard, leftovers, Some(vectors)) {
            Ok((manifest, _)) => Ok((manifest, self.lock)),
            Err(error @ BankError::Stopped { .. }) => {
                sweep(&*self.io, self.dir(), &self.manifest)?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the chosen shards anew and publishes; also returns the ids of the documents that were lost.
    pub(crate) fn rewrite(
        &self,
        choice: Choice<'_>,
        records_per_shard: u32,
        leftovers: Leftovers,
        mut vectors: Option<NewVectors<'_>>,
    ) -> Result<(Manifest, Vec<String>), BankError> {
        let Self { lock, io, manifest, shards, tombstones, keep } = self;
        let dir = lock.dir();
        set_aside_unpublished(&**io, dir, manifest, leftovers)?;
        if choice.check {
            for (number, shard) in shards {
                check_sections(shard, choice.shards.contains(number))?;
            }
        }
        Mark::write(&**io, dir, manifest.generation)?;

        let mut spec = BankSpec { records_per_shard, ..BankSpec::of(manifest) };
        let mut parts = Parts::of(manifest);
        if let Some(vectors) = &vectors {
            (spec.embedder, spec.vector_dim) = (vectors.embedder.clone(), vectors.dim);
            parts.retrieval = vectors.retrieval.clone();
        }
        let stays = |number: &u32| !choice.shards.contains(number);
        let mut entries = manifest.shards.clone();
        entries.retain(|entry| stays(&entry.number));
        let reopened =
            entries.iter().map(|entry| Ok((entry.number, Shard::open(&dir.join("shards").join(&entry.file))?)));
        let reopened = reopened.collect::<Result<BTreeMap<_, _>, BankError>>()?;
        let sequence = ShardSequence::new(Arc::clone(io), dir, spec, reopened, entries, manifest.next_shard);
        let mut copy = Copy { sequence, moved: HashMap::new(), dead: Vec::new(), lost: Vec::new() };
        copy.dead.extend(tombstones.rows().iter().filter(|row| stays(&row.shard)));
        for (number, shard) in shards {
            if !stays(number) {
                copy.records(shard, &choice, vectors.as_mut())?;
            }
            copy.rows(shard, &choice, tombstones)?;
        }
        copy.sequence.close()?;
        let publication = Publication { io: &**io, dir, published: Some(manifest) };
        let next = publication.publish(&copy.sequence, Tombstones::new(copy.dead), parts, *keep)?;
        Catalog::discard(dir);
        Mark::remove(&**io, dir);
        Ok((next, copy.lost))
    }
}

/// Which shards are written anew, and what of them.
pub(crate) struct Choice<'a> {
    pub(crate) shards: BTreeSet<u32>,
    /// Whether a record of these shards is copied.
    pub(crate) goes_along: &'a dyn Fn(RecordId) -> bool,
    /// Those of the shards whose document rows are not copied.
    pub(crate) untrusted_rows: BTreeSet<u32>,
    /// Documents that use a record which is not copied are dropped; otherwise they are an error.
    pub(crate) may_lose: bool,
    /// Check what is copied against the checksums; the caller has done it otherwise.
    pub(crate) check: bool,
}

/// Everything that is copied from a shard is what was written: all sections, or only those of the documents.
fn check_sections(shard: &Shard, all: bool) -> Result<(), BankError> {
    for kind in SectionKind::ALL {
        let documents = matches!(kind, SectionKind::DocumentOffsets | SectionKind::Documents | SectionKind::Uses);
        if !all && !documents {
            continue;
        }
        shard.check_section(kind)?;
    }
    Ok(())
}

/// A rewriting under way.
struct Copy {
    sequence: ShardSequence,
    moved: HashMap<RecordId, RecordId>,
    dead: Vec<RowId>,
    lost: Vec<String>,
}

impl Copy {
    fn records(
        &mut self,
        shard: &Shard,
        choice: &Choice<'_>,
        mut vectors: Option<&mut NewVectors<'_>>,
    ) -> Result<(), BankError> {
        let id = |slot: u32| RecordId { shard: shard.number(), slot };
        let slots: Vec<u32> = (0..shard.records()).filter(|&slot| (choice.goes_along)(id(slot))).collect();
        let mut reader = TextReader::new(shard);
        for batch in slots.chunks(BATCH) {
            let texts = batch.iter().map(|&slot| Ok(reader.text(slot)?.to_owned()));
            let texts = texts.collect::<Result<Vec<String>, BankError>>()?;
            let made = match vectors.as_deref_mut() {
                None => None,
                Some(NewVectors { dim, embed, .. }) => {
                    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                    let path = shard.path();
                    let made = embed(&texts).map_err(|source| BankError::Embed { path: path.to_owned(), source })?;
                    let made = made.ok_or_else(|| BankError::Stopped { path: path.to_owned() })?;
                    if made.len() != *dim * batch.len() {
                        return Err(BankError::bad_input("numbers of vectors", *dim * batch.len(), made.len()));
                    }
                    Some((*dim, made))
                }
            };
            for (at, (&slot, text)) in batch.iter().zip(&texts).enumerate() {
                let record = shard.record(slot)?;
                let new: NewRecord<'_> = match &made {
                    Some((dim, made)) => NewRecord { vector: &made[at * dim..(at + 1) * dim], ..record.as_new(text) },
                    None => record.as_new(text),
                };
                self.moved.insert(id(slot), self.sequence.push_record(&new)?);
            }
        }
        Ok(())
    }

    /// Writes the live rows of a shard anew that lie in it or use a record that has moved. All records that they use come
    /// before them, because a row's records are in its own shard or an earlier one.
    fn rows(&mut self, shard: &Shard, choice: &Choice<'_>, tombstones: &Tombstones) -> Result<(), BankError> {
        if choice.untrusted_rows.contains(&shard.number()) {
            return Ok(());
        }
        let stays = !choice.shards.contains(&shard.number());
        for row in 0..shard.documents() {
            let place = RowId { shard: shard.number(), row };
            if tombstones.contains(place) {
                continue;
            }
            let document = shard.document(row)?;
            let in_place = |chunk: &Chunk| !choice.shards.contains(&chunk.record.shard);
            if stays && document.chunks().all(|chunk| in_place(&chunk)) {
                continue;
            }
            if stays {
                self.dead.push(place);
            }
            let renamed = |chunk: Chunk| match self.moved.get(&chunk.record) {
                Some(&record) => Some(Chunk { record, ..chunk }),
                None => in_place(&chunk).then_some(chunk),
            };
            match document.chunks().map(renamed).collect::<Option<Vec<Chunk>>>() {
                Some(chunks) => {
                    let (id, text_hash) = (document.id.to_owned(), document.text_hash);
                    self.sequence.push_document(&NewDocument { id, text_hash, chunks })?;
                }
                None if choice.may_lose => self.lost.push(document.id.to_owned()),
                None => {
                    let found = format!("document {:?} with a record that is not copied", document.id);
                    return Err(BankError::bad_input("record of a chunk", "a record that moves", found));
                }
            }
        }
        Ok(())
    }
}
