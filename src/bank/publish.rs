//! Publishing: from finished shards to a new generation.
//!
//! Comes in: a writer and what only the caller knows (codec files, prefix, figures). Goes out: the manifest. Order of
//! durable steps: shards; codec, prefix, tombstones and retrieval index under names made of their content; the
//! generation's own copy of the manifest; then the one rename that commits. Whatever stops before it leaves the old
//! generation; what comes after it (fixed names for other tools, old generations, the catalog) can be lost without harm.
//! Publishing what is published already changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::io::{Io, content_name, hash_file, store, write_file};
use crate::bank::layout::FORMAT_VERSION;
use crate::bank::live::Live;
use crate::bank::manifest::{CodecDescription, CodecEntry, FileEntry, Manifest, RetrievalEntry, TombstonesEntry};
use crate::bank::retention::retain;
use crate::bank::retrieval::{METRIC, Plan, build};
use crate::bank::sequence::ShardSequence;
use crate::bank::tombstones::Tombstones;
use crate::bank::writer::BankWriter;

/// Which FAISS index the retrieval vectors get.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RetrievalSpec {
    /// By the number of vectors: flat, inverted lists with 8 bits a number, inverted lists with product quantization.
    #[default]
    Auto,
    /// A FAISS factory string. One that takes no ids of its own is wrapped in `IDMap2`.
    Factory(String),
}

/// What a publication needs beyond the shards.
#[derive(Clone, Debug)]
pub struct PublishInput {
    /// What the codec is.
    pub codec: CodecDescription,
    /// Codec files by name (`shared` for the scope `shared`); empty for bf16.
    pub codec_files: BTreeMap<String, Vec<u8>>,
    /// The safetensors file with the prefix's keys and values.
    pub prefix: Vec<u8>,
    /// The retrieval index to build.
    pub retrieval: RetrievalSpec,
    /// Document rows that die with this generation, beside those that are dead or replaced.
    pub tombstones: Vec<RowId>,
    /// Figures for the manifest. No times: equal input must give an equal manifest.
    pub quality: BTreeMap<String, serde_json::Value>,
    /// Generations that stay, this one included: older manifests, and files that none of these names, are removed
    /// after the commit.
    pub keep_generations: u32,
}

impl RetrievalSpec {
    /// What keeps the index of a published generation of the kind that it is.
    pub(crate) fn of(manifest: &Manifest) -> Self {
        let RetrievalEntry { factory, dim, .. } = &manifest.retrieval;
        let dim = usize::try_from(*dim).unwrap_or(usize::MAX);
        if Plan::new(&Self::Auto, manifest.counts.records, dim).factory == *factory {
            return Self::Auto;
        }
        Self::Factory(factory.clone())
    }
}

impl BankWriter {
    /// Publishes everything that was pushed and adopted as the next generation; returns its manifest. Rows that later
    /// ones replace get tombstones. If nothing differs from the published generation, that one stays.
    ///
    /// # Errors
    /// [`BankError::BadInput`] if codec and bank do not fit, [`BankError::Faiss`], [`BankError::Io`]. After an error
    /// the old generation stands, and the finished shards wait for the next writer.
    pub fn publish(mut self, input: PublishInput) -> Result<Manifest, BankError> {
        if input.codec.code_bytes != self.spec().code_bytes as u64 {
            return Err(BankError::bad_input("code bytes", self.spec().code_bytes, input.codec.code_bytes));
        }
        self.close_shard()?;
        let dead = self.dead_rows(&input.tombstones)?;
        let files = self.store_codec(&input.codec_files)?;
        let publication = Publication { io: &*self.io, dir: self.lock.dir(), published: self.published.as_ref() };
        let manifest = publication.publish(
            &self.sequence,
            dead,
            Parts {
                codec: CodecEntry { description: input.codec, files },
                prefix: publication.prefix(&input.prefix)?,
                retrieval: input.retrieval,
                quality: input.quality,
            },
            input.keep_generations,
        )?;
        self.remove_draft();
        self.catalog.close()?;
        Ok(manifest)
    }

    /// The rows that are dead in the next generation: those that were, those that later rows replace, and `more`.
    pub(crate) fn dead_rows(&self, more: &[RowId]) -> Result<Tombstones, BankError> {
        let mut dead: Vec<RowId> = self.superseded()?.into_iter().map(|(old, _)| old).collect();
        dead.extend(self.tombstones.rows().iter().chain(more));
        Ok(Tombstones::new(dead))
    }
}

/// What a generation consists of beside shards and tombstones.
pub(crate) struct Parts {
    pub(crate) codec: CodecEntry,
    pub(crate) prefix: FileEntry,
    pub(crate) retrieval: RetrievalSpec,
    pub(crate) quality: BTreeMap<String, serde_json::Value>,
}

/// The way from a published generation to the next one.
pub(crate) struct Publication<'a> {
    pub(crate) io: &'a dyn Io,
    /// The bank's folder.
    pub(crate) dir: &'a Path,
    pub(crate) published: Option<&'a Manifest>,
}

impl Publication<'_> {
    fn index_dir(&self) -> PathBuf {
        self.dir.join("index")
    }

    /// Publishes finished shards with what belongs to them.
    pub(crate) fn publish(
        &self,
        sequence: &ShardSequence,
        tombstones: Tombstones,
        parts: Parts,
        keep: u32,
    ) -> Result<Manifest, BankError> {
        let ShardSequence { spec, shards, entries, .. } = sequence;
        let exists = |row: &&RowId| shards.get(&row.shard).is_some_and(|shard| row.row < shard.documents());
        if let Some(row) = tombstones.rows().iter().find(|row| !exists(row)) {
            return Err(BankError::bad_input("tombstone", "a document row of this bank", row));
        }
        let live = Live::of(shards, &tombstones)?;
        let tombstones = self.store_tombstones(&tombstones)?;
        let retrieval = self.retrieval(&parts.retrieval, sequence, &live, tombstones.as_ref())?;
        let manifest = Manifest {
            format: Manifest::format_name(),
            version: FORMAT_VERSION,
            generation: 1,
            parent: None,
            next_shard: sequence.next_shard,
            shape: spec.shape.clone(),
            chunk_tokens: spec.chunk_tokens,
            fingerprint: spec.fingerprint.clone(),
            embedder: spec.embedder.clone(),
            codec: parts.codec,
            retrieval,
            prefix: parts.prefix,
            shards: entries.clone(),
            tombstones,
            counts: live.counts,
            quality: parts.quality,
        };
        self.commit(manifest, keep)
    }

    /// Gives a generation its number and publishes it, unless it says what the published one says.
    pub(crate) fn commit(&self, mut manifest: Manifest, keep: u32) -> Result<Manifest, BankError> {
        let index_dir = self.index_dir();
        if let Some(published) = self.published {
            (manifest.generation, manifest.parent) = (published.generation, published.parent);
            if manifest == *published {
                self.clear_up(&manifest, keep);
                return Ok(manifest);
            }
            (manifest.generation, manifest.parent) = (published.generation + 1, Some(published.generation));
        }
        let path = Manifest::path(self.dir);
        let bytes = manifest.to_bytes(&path)?;
        // A manifest that this program could not read again must not replace one that it can.
        Manifest::parse(&path, &bytes)?;
        let copy = Manifest::generation_name(manifest.generation);
        write_file(self.io, &index_dir.join("generations"), &copy, &bytes)?;
        write_file(self.io, &index_dir, "manifest.json", &bytes)?;
        self.clear_up(&manifest, keep);
        Ok(manifest)
    }

    /// What comes after a commit; a failure is only told, because nothing is lost by it.
    fn clear_up(&self, manifest: &Manifest, keep: u32) {
        self.refresh_fixed_names(manifest);
        if let Err(error) = retain(self.io, self.dir, manifest, keep) {
            tracing::warn!("old generations are still there: {error}");
        }
    }

    /// The prefix's file: the published one while it is whole. The fingerprint says that the prefix is the same, but
    /// another device may have rounded it otherwise.
    fn prefix(&self, bytes: &[u8]) -> Result<FileEntry, BankError> {
        let index_dir = self.index_dir();
        match self.published.map(|published| &published.prefix) {
            Some(entry) if is_whole(entry, &index_dir) => Ok(entry.clone()),
            _ => store(self.io, &index_dir, "prefix", "safetensors", bytes),
        }
    }

    fn store_tombstones(&self, tombstones: &Tombstones) -> Result<Option<TombstonesEntry>, BankError> {
        if tombstones.rows().is_empty() {
            return Ok(None);
        }
        let file = store(self.io, &self.index_dir(), "tombstones", "bin", &tombstones.to_bytes())?;
        Ok(Some(TombstonesEntry { count: tombstones.rows().len() as u64, file }))
    }

    /// Builds the retrieval index, or keeps the published one if it is of the same records.
    fn retrieval(
        &self,
        spec: &RetrievalSpec,
        sequence: &ShardSequence,
        live: &Live,
        tombstones: Option<&TombstonesEntry>,
    ) -> Result<RetrievalEntry, BankError> {
        let index_dir = &self.index_dir();
        let dim = sequence.spec.vector_dim;
        let plan = Plan::new(spec, live.counts.records, dim);
        let same = self.published.filter(|published| {
            published.shards == sequence.entries
                && published.tombstones.as_ref() == tombstones
                && published.retrieval.factory == plan.factory
        });
        // The file is looked at, so that compiling again mends an index that was lost or damaged.
        if let Some(published) = same.filter(|published| is_whole(&published.retrieval.file, index_dir)) {
            return Ok(published.retrieval.clone());
        }
        // FAISS writes the file itself; it gets its name, which is its hash, when it is there.
        let scratch = index_dir.join("retrieval.faiss.tmp");
        let count = build(&plan, dim, sequence.shards.values(), live, &scratch)?;
        self.io.sync_file(&scratch).map_err(BankError::io(&scratch, "sync"))?;
        let (hash, bytes) = hash_file(&scratch)?;
        let name = content_name("retrieval", "faiss", &hash);
        let path = index_dir.join(&name);
        self.io.rename(&scratch, &path).map_err(BankError::io(&path, "rename to"))?;
        self.io.sync_dir(index_dir).map_err(BankError::io(index_dir, "sync"))?;
        Ok(RetrievalEntry {
            factory: plan.factory,
            metric: METRIC.to_owned(),
            dim: dim as u64,
            count,
            file: FileEntry { file: name, bytes, blake3: hash.to_hex().to_string() },
        })
    }

    /// Gives the files of this generation their fixed names, for tools that know nothing of manifests. Never read by
    /// us.
    pub(crate) fn refresh_fixed_names(&self, manifest: &Manifest) {
        let index_dir = self.index_dir();
        let mut names: Vec<(String, &FileEntry)> = vec![
            ("retrieval.faiss".to_owned(), &manifest.retrieval.file),
            ("prefix.safetensors".to_owned(), &manifest.prefix),
        ];
        let single = manifest.codec.files.len() == 1;
        for (name, file) in &manifest.codec.files {
            names.push((if single { "codec.faiss".to_owned() } else { format!("codec.{name}.faiss") }, file));
        }
        for (name, file) in names {
            if let Err(error) = link(self.io, &index_dir, &file.file, &name) {
                tracing::warn!("{}: {error}; only other tools use this name", index_dir.join(name).display());
            }
        }
    }
}

/// Whether a file is there with the bytes that its entry promises.
pub(crate) fn is_whole(entry: &FileEntry, folder: &Path) -> bool {
    hash_file(&folder.join(&entry.file))
        .is_ok_and(|(hash, bytes)| bytes == entry.bytes && hash.to_hex().as_str() == entry.blake3)
}

/// Makes `name` a second name of `file`, or a copy where the file system has no links.
fn link(io: &dyn Io, dir: &Path, file: &str, name: &str) -> std::io::Result<()> {
    let (from, to, temporary) = (dir.join(file), dir.join(name), dir.join(format!("{name}.tmp")));
    if io.link(&from, &temporary).is_err() {
        io.create(&temporary)?.write_all(&fs::read(&from)?)?;
    }
    io.rename(&temporary, &to)?;
    // Renaming a name onto another name of the same file does nothing: the temporary one is still there.
    if temporary.exists() { io.remove(&temporary) } else { Ok(()) }
}
