//! Publishing: from finished shards to a new generation.
//!
//! Comes in: a writer and what only the caller knows (codec files, prefix, figures). Goes out: the manifest. Order of
//! durable steps: shards; codec, prefix, tombstones and retrieval index under names made of their content; the
//! generation's own copy of the manifest; then the one rename that commits. Whatever stops before it leaves the old
//! generation; what comes after it (fixed names for other tools, the catalog) can be lost without harm. Publishing
//! what is published already changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::bank::documents::RowId;
use crate::bank::error::BankError;
use crate::bank::io::{Io, content_name, hash_file, store, write_file};
use crate::bank::layout::FORMAT_VERSION;
use crate::bank::live::Live;
use crate::bank::manifest::{CodecDescription, CodecEntry, FileEntry, Manifest, RetrievalEntry, TombstonesEntry};
use crate::bank::retrieval::{METRIC, Plan, build};
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
    /// Document rows that die with this generation, beside those that are dead.
    pub tombstones: Vec<RowId>,
    /// Figures for the manifest. No times: equal input must give an equal manifest.
    pub quality: BTreeMap<String, serde_json::Value>,
}

impl BankWriter {
    /// Publishes everything that was pushed and adopted as the next generation; returns its manifest. If nothing
    /// differs from the published generation, that one stays.
    ///
    /// # Errors
    /// [`BankError::BadInput`] if codec and bank do not fit, [`BankError::Faiss`], [`BankError::Io`]. After an error
    /// the old generation stands, and the finished shards wait for the next writer.
    pub fn publish(mut self, input: PublishInput) -> Result<Manifest, BankError> {
        if input.codec.code_bytes != self.spec.code_bytes as u64 {
            return Err(BankError::bad_input("code bytes", self.spec.code_bytes, input.codec.code_bytes));
        }
        self.close_shard()?;
        let dead = self.tombstones.rows().iter().chain(&input.tombstones).copied().collect();
        let tombstones = Tombstones::new(dead);
        let exists = |row: &&RowId| self.shards.get(&row.shard).is_some_and(|shard| row.row < shard.documents());
        if let Some(row) = tombstones.rows().iter().find(|row| !exists(row)) {
            return Err(BankError::bad_input("tombstone", "a document row of this bank", row));
        }
        let live = Live::of(&self.shards, &tombstones)?;
        let index_dir = self.index_dir();
        let files = self.store_codec(&input.codec_files)?;
        let prefix = self.prefix(&input.prefix, &index_dir)?;
        let tombstones_entry = self.store_tombstones(&tombstones, &index_dir)?;
        let retrieval = self.retrieval(&input.retrieval, &live, tombstones_entry.as_ref(), &index_dir)?;
        let mut manifest = Manifest {
            format: Manifest::format_name(),
            version: FORMAT_VERSION,
            generation: 1,
            parent: None,
            next_shard: self.next_shard,
            shape: self.spec.shape.clone(),
            chunk_tokens: self.spec.chunk_tokens,
            fingerprint: self.spec.fingerprint.clone(),
            embedder: self.spec.embedder.clone(),
            codec: CodecEntry { description: input.codec, files },
            retrieval,
            prefix,
            shards: std::mem::take(&mut self.entries),
            tombstones: tombstones_entry,
            counts: live.counts,
            quality: input.quality,
        };
        if let Some(published) = &self.published {
            (manifest.generation, manifest.parent) = (published.generation, published.parent);
            if manifest == *published {
                self.remove_draft();
                self.refresh_fixed_names(&manifest, &index_dir);
                self.catalog.close()?;
                return Ok(manifest);
            }
            (manifest.generation, manifest.parent) = (published.generation + 1, Some(published.generation));
        }
        self.commit(&manifest, &index_dir)?;
        self.remove_draft();
        self.refresh_fixed_names(&manifest, &index_dir);
        self.catalog.close()?;
        Ok(manifest)
    }

    /// The prefix's file: the published one while it is whole. The fingerprint says that the prefix is the same, but
    /// another device may have rounded it otherwise.
    fn prefix(&self, bytes: &[u8], index_dir: &Path) -> Result<FileEntry, BankError> {
        match self.published.as_ref().map(|published| &published.prefix) {
            Some(entry) if is_whole(entry, index_dir) => Ok(entry.clone()),
            _ => store(&*self.io, index_dir, "prefix", "safetensors", bytes),
        }
    }

    fn store_tombstones(
        &self,
        tombstones: &Tombstones,
        index_dir: &Path,
    ) -> Result<Option<TombstonesEntry>, BankError> {
        if tombstones.rows().is_empty() {
            return Ok(None);
        }
        let file = store(&*self.io, index_dir, "tombstones", "bin", &tombstones.to_bytes())?;
        Ok(Some(TombstonesEntry { count: tombstones.rows().len() as u64, file }))
    }

    /// Builds the retrieval index, or keeps the published one if it is of the same records.
    fn retrieval(
        &self,
        spec: &RetrievalSpec,
        live: &Live,
        tombstones: Option<&TombstonesEntry>,
        index_dir: &Path,
    ) -> Result<RetrievalEntry, BankError> {
        let dim = self.spec.vector_dim;
        let plan = Plan::new(spec, live.counts.records, dim);
        let same = self.published.as_ref().filter(|published| {
            published.shards == self.entries
                && published.tombstones.as_ref() == tombstones
                && published.retrieval.factory == plan.factory
        });
        // The file is looked at, so that compiling again mends an index that was lost or damaged.
        if let Some(published) = same.filter(|published| is_whole(&published.retrieval.file, index_dir)) {
            return Ok(published.retrieval.clone());
        }
        // FAISS writes the file itself; it gets its name, which is its hash, when it is there.
        let scratch = index_dir.join("retrieval.faiss.tmp");
        let count = build(&plan, dim, self.shards.values(), live, &scratch)?;
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

    /// The commit.
    fn commit(&self, manifest: &Manifest, index_dir: &Path) -> Result<(), BankError> {
        let path = Manifest::path(self.lock.dir());
        let bytes = manifest.to_bytes(&path)?;
        // A manifest that this program could not read again must not replace one that it can.
        Manifest::parse(&path, &bytes)?;
        let copy = format!("{:06}.json", manifest.generation);
        write_file(&*self.io, &index_dir.join("generations"), &copy, &bytes)?;
        write_file(&*self.io, index_dir, "manifest.json", &bytes)
    }

    /// Gives the files of this generation their fixed names, for tools that know nothing of manifests. Never read by
    /// us.
    fn refresh_fixed_names(&self, manifest: &Manifest, index_dir: &Path) {
        let mut names: Vec<(String, &FileEntry)> = vec![
            ("retrieval.faiss".to_owned(), &manifest.retrieval.file),
            ("prefix.safetensors".to_owned(), &manifest.prefix),
        ];
        let single = manifest.codec.files.len() == 1;
        for (name, file) in &manifest.codec.files {
            names.push((if single { "codec.faiss".to_owned() } else { format!("codec.{name}.faiss") }, file));
        }
        for (name, file) in names {
            if let Err(error) = link(&*self.io, index_dir, &file.file, &name) {
                tracing::warn!("{}: {error}; only other tools use this name", index_dir.join(name).display());
            }
        }
    }
}

/// Whether a file is there with the bytes that its entry promises.
fn is_whole(entry: &FileEntry, index_dir: &Path) -> bool {
    hash_file(&index_dir.join(&entry.file)).is_ok_and(|(hash, _)| hash.to_hex().as_str() == entry.blake3)
}

/// Makes `name` a second name of `file`, or a copy where the file system has no links.
fn link(io: &dyn Io, dir: &Path, file: &str, name: &str) -> std::io::Result<()> {
    let (from, to, temporary) = (dir.join(file), dir.join(name), dir.join(format!("{name}.tmp")));
    if io.link(&from, &temporary).is_err() {
        fs::copy(&from, &temporary)?;
    }
    io.rename(&temporary, &to)?;
    // Renaming a name onto another name of the same file does nothing: the temporary one is still there.
    if temporary.exists() { io.remove(&temporary) } else { Ok(()) }
}
