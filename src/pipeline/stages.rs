//! The main pass: read -> encode -> quantize -> embed -> write, a thread each, joined by bounded channels.
//!
//! In: a corpus and everything opened. Out: finished and open shards in the writer, and counts. Batches keep their
//! order from the first stage to the last, so that records get the same places in every run. A stage that fails
//! drops its channel ends: those before it stop sending, those after it drain, and the first error is returned.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded};
use rayon::prelude::*;

use super::lookup::{claim, forget_claim};
use super::plan::Mode;
use super::progress::{Progress, StageMeter, StopFlag};
use super::report::{ChunkCounts, DocumentCounts};
use super::survey::{Chunked, for_each_chunked};
use super::{Origin, PipelineError};
use crate::bank::{self, BankWriter, NewDocument, NewRecord};
use crate::codec::{CodecSet, GpuCodecSet};
use crate::corpus::{Chunk, Chunker, Corpus, Document, Ledger};
use crate::cost::{self, Lengths, ModelShape};
use crate::embed::TextEmbedder;
use crate::memory::{ContentHash, Memory, MemoryShape};
use crate::model::{GpuModel, MemoryEncoder, ModelError};

/// Batches that may wait between two stages. Two keep both sides busy; more only takes memory.
pub(super) const CHANNEL_BATCHES: usize = 2;
/// Documents that may gather in a batch that gets no new chunk.
const MAX_BATCH_DOCUMENTS: usize = 4096;

/// What the stages work with.
pub struct Stages<'a> {
    /// The documents.
    pub corpus: &'a Corpus,
    /// Cuts them.
    pub chunker: &'a Chunker,
    /// Stop at the end of the document in which this many chunks are reached.
    pub max_chunks: Option<u64>,
    /// What the bank is to become.
    pub mode: Mode,
    /// Chunks of a batch.
    pub batch_chunks: usize,
    /// The model and the selection.
    pub encoder: &'a dyn MemoryEncoder,
    /// The quantizer.
    pub codec: &'a CodecSet,
    /// Model and quantizer, if both are on one GPU: memories become codes there.
    pub gpu: Option<(&'a GpuModel, GpuCodecSet)>,
    /// The retrieval encoder.
    pub embedder: &'a dyn TextEmbedder,
    /// The model's sizes, for counting its arithmetic.
    pub model_shape: &'a ModelShape,
    /// Where everything is counted.
    pub progress: &'a Progress,
    /// Ends the pass early.
    pub stop: &'a StopFlag,
}

/// What the main pass did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Documents.
    pub documents: DocumentCounts,
    /// Chunks.
    pub chunks: ChunkCounts,
    /// Tokens of accepted documents.
    pub tokens: u64,
    /// Arithmetic of the encoded chunks.
    pub flop: f64,
}

/// A chunk without a record yet.
struct NewChunk {
    document: Arc<Origin>,
    /// Number of the chunk in the document, from 0.
    ordinal: usize,
    content: ContentHash,
    tokens: Vec<u32>,
    text: String,
}

/// A document whose chunks are all in this batch or an earlier one.
struct FinishedDocument {
    id: String,
    text_hash: ContentHash,
    chunks: Vec<(ContentHash, Range<u64>)>,
}

/// What happens to the bank, in this order.
enum Event {
    /// The next new chunk of the batch becomes a record.
    Chunk,
    /// A document is complete.
    Document(FinishedDocument),
}

#[derive(Default)]
struct Batch {
    chunks: Vec<NewChunk>,
    events: Vec<Event>,
    documents: usize,
}

/// A batch on its way from stage to stage, with what the stages so far have made of it.
struct Work<T> {
    batch: Batch,
    made: T,
}

/// What the forward pass of a batch gives.
enum Encoded {
    /// Memories, to be quantized.
    Dense(Vec<Memory>),
    /// Codes already.
    Quantized(Quantized),
}

/// Codes, selected tokens and counts of a batch.
#[derive(Default)]
struct Quantized {
    codes: Vec<u8>,
    memories: Vec<(Vec<u8>, u8)>,
}

impl Stages<'_> {
    /// Runs the main pass.
    ///
    /// # Errors
    /// The first error of any stage; what was written until then stays in the writer's finished shards.
    pub fn run(&self, writer: &Mutex<BankWriter>, ledger: &mut Ledger) -> Result<Totals, PipelineError> {
        let in_flight = Mutex::new(HashSet::new());
        let (to_encode, batches) = bounded::<Batch>(CHANNEL_BATCHES);
        let (to_quantize, encoded) = bounded::<Work<Encoded>>(CHANNEL_BATCHES);
        let (to_embed, quantized) = bounded::<Work<Quantized>>(CHANNEL_BATCHES);
        let (to_write, embedded) = bounded::<Work<(Quantized, Vec<f32>)>>(CHANNEL_BATCHES);

        thread::scope(|scope| {
            let read = scope.spawn(|| self.read(writer, &in_flight, ledger, to_encode));
            let encode = scope.spawn(|| each(batches, to_quantize, |batch| self.encode(batch)));
            let quantize = scope.spawn(|| each(encoded, to_embed, |work| self.quantize(work)));
            let embed = scope.spawn(|| each(quantized, to_write, |work| self.embed(work)));
            let write = scope.spawn(|| self.write(writer, &in_flight, embedded));

            let join = |handle: thread::ScopedJoinHandle<'_, Result<(), PipelineError>>| {
                handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            let totals = read.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let rest = [join(encode), join(quantize), join(embed), join(write)];
            for result in rest {
                result?;
            }
            totals
        })
    }

    /// Reads, chunks and looks up; sends batches of new chunks.
    fn read(
        &self,
        writer: &Mutex<BankWriter>,
        in_flight: &Mutex<HashSet<ContentHash>>,
        ledger: &mut Ledger,
        output: Sender<Batch>,
    ) -> Result<Totals, PipelineError> {
        let mut totals = Totals::default();
        let mut batch = Batch::default();
        let mut started = Instant::now();
        lock(writer).begin_pass()?;
        let look = |document: &Document, text_hash| claim(&mut lock(writer), self.mode, &document.id, text_hash);
        for_each_chunked(self.corpus, self.chunker, self.max_chunks, None, look, |entry| {
            totals.documents.read += 1;
            match entry {
                Chunked::Rejected(rejection) => {
                    forget_claim(&lock(writer), &rejection)?;
                    totals.documents.rejected += 1;
                    ledger.reject(&rejection)?;
                }
                Chunked::Present { chunks, tokens } => self.count_present(&mut totals, chunks, tokens),
                Chunked::Document { document, text_hash, replaces, chunks } => {
                    totals.documents.changed += u64::from(replaces.is_some());
                    let mut send = |batch: &mut Batch| {
                        // Only the work counts, not the wait for a free place in the channel.
                        self.progress.read.add(batch.chunks.len(), started.elapsed());
                        let sent = output.send(std::mem::take(batch)).is_ok();
                        started = Instant::now();
                        sent
                    };
                    let (totals, batch) = (&mut totals, &mut batch);
                    let more =
                        self.add_document(totals, batch, &mut send, writer, in_flight, document, text_hash, chunks)?;
                    if !more {
                        return Ok(false);
                    }
                }
            }
            if batch.chunks.len() >= self.batch_chunks || batch.documents >= MAX_BATCH_DOCUMENTS {
                self.progress.read.add(batch.chunks.len(), started.elapsed());
                let sent = output.send(std::mem::take(&mut batch)).is_ok();
                started = Instant::now();
                return Ok(sent && !self.stop.is_set());
            }
            Ok(!self.stop.is_set())
        })?;
        self.progress.read.add(batch.chunks.len(), started.elapsed());
        if !batch.events.is_empty() {
            // A closed channel means that a later stage has failed; its own error is the one to report.
            let _ = output.send(batch);
        }
        Ok(totals)
    }

    /// A document that the bank or an interrupted run has already, with the same text.
    fn count_present(&self, totals: &mut Totals, chunks: u64, tokens: u64) {
        totals.documents.unchanged += 1;
        totals.chunks.total += chunks;
        totals.chunks.unchanged += chunks;
        totals.tokens += tokens;
        self.progress.documents.fetch_add(1, Ordering::Relaxed);
        self.progress.chunks.fetch_add(chunks, Ordering::Relaxed);
        self.progress.chunks_shared.fetch_add(chunks, Ordering::Relaxed);
    }

    /// Looks up a document's chunks and puts the new ones into batches; `false` if nobody takes batches any more.
    #[allow(clippy::too_many_arguments)] // the reader's whole state, used in one place
    fn add_document(
        &self,
        totals: &mut Totals,
        batch: &mut Batch,
        send: &mut dyn FnMut(&mut Batch) -> bool,
        writer: &Mutex<BankWriter>,
        in_flight: &Mutex<HashSet<ContentHash>>,
        document: Document,
        text_hash: ContentHash,
        chunks: Vec<Chunk>,
    ) -> Result<bool, PipelineError> {
        let origin = Arc::new(Origin { id: document.id.clone(), source: document.source });
        let mut row = FinishedDocument { id: document.id, text_hash, chunks: Vec::with_capacity(chunks.len()) };
        let mut new = 0u64;
        for (ordinal, chunk) in chunks.into_iter().enumerate() {
            let content = ContentHash::of_tokens(&chunk.tokens);
            totals.chunks.total += 1;
            totals.tokens += chunk.tokens.len() as u64;
            row.chunks.push((content, chunk.span.start as u64..chunk.span.end as u64));
            // In this order: the writer adds a record to the catalog before it takes it out of the set.
            let known = !lock(in_flight).insert(content);
            if known || lock(writer).find(content)?.is_some() {
                if !known {
                    lock(in_flight).remove(&content);
                }
                totals.chunks.shared += 1;
                self.progress.chunks_shared.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            new += 1;
            let lengths = Lengths { chunk: chunk.tokens.len(), kept: self.encoder.shape().slots, ..Lengths::default() };
            totals.flop += cost::write_flop(self.model_shape, &lengths);
            let text = document.text[chunk.span].to_owned();
            batch.chunks.push(NewChunk { document: Arc::clone(&origin), ordinal, content, tokens: chunk.tokens, text });
            batch.events.push(Event::Chunk);
            // A long document is many batches: its row comes with the last, when all its records are there.
            if batch.chunks.len() >= self.batch_chunks && !send(batch) {
                return Ok(false);
            }
        }
        totals.chunks.encoded += new;
        if new > 0 {
            totals.documents.compiled += 1;
        } else {
            totals.documents.duplicate += 1;
        }
        self.progress.documents.fetch_add(1, Ordering::Relaxed);
        self.progress.chunks.fetch_add(row.chunks.len() as u64, Ordering::Relaxed);
        batch.events.push(Event::Document(row));
        batch.documents += 1;
        Ok(true)
    }

    fn encode(&self, batch: Batch) -> Result<Work<Encoded>, PipelineError> {
        let chunks: Vec<&[u32]> = batch.chunks.iter().map(|chunk| chunk.tokens.as_slice()).collect();
        let named = |first: usize, source: ModelError| match source.chunk() {
            Some(chunk) => {
                let NewChunk { document, ordinal, .. } = &batch.chunks[first + chunk];
                PipelineError::Encode { origin: Arc::clone(document), chunk: *ordinal, source }
            }
            None => source.into(),
        };
        let per_call = self.encoder.chunks_per_call();
        let made = if let Some((model, codec)) = &self.gpu {
            let mut made = Quantized::default();
            for (number, chunks) in chunks.chunks(per_call).enumerate() {
                self.encode_on_gpu(model, codec, chunks, &mut made)
                    .map_err(|source| named(number * per_call, source))?;
            }
            Encoded::Quantized(made)
        } else {
            Encoded::Dense(on_all(&self.progress.encode, &chunks, per_call, |first, chunks| {
                self.encoder.encode(chunks).map_err(|source| named(first, source))
            })?)
        };
        Ok(Work { batch, made })
    }

    fn encode_on_gpu(
        &self,
        model: &GpuModel,
        codec: &GpuCodecSet,
        chunks: &[&[u32]],
        made: &mut Quantized,
    ) -> Result<(), ModelError> {
        let memories = self.progress.encode.measure(chunks.len(), || model.encode_on_gpu(chunks))?;
        let codes = self.progress.quantize.measure(chunks.len(), || codec.encode(memories.vectors()))?;
        made.codes.extend(codes);
        let tokens = memories.tokens()?;
        let tokens = tokens.chunks_exact(self.encoder.shape().token_indices()).map(<[u8]>::to_vec);
        made.memories.extend(tokens.zip(memories.counts().iter().copied()));
        Ok(())
    }

    fn quantize(&self, work: Work<Encoded>) -> Result<Work<Quantized>, PipelineError> {
        let Work { batch, made } = work;
        let memories = match made {
            Encoded::Dense(memories) => memories,
            Encoded::Quantized(made) => return Ok(Work { batch, made }),
        };
        let shape = self.encoder.shape();
        let codes = on_all(&self.progress.quantize, &memories, 1, |_, memories| {
            let mut codes = Vec::new();
            self.codec.encode_memories(memories, &shape, &mut codes);
            Ok(codes)
        })?;
        let memories = memories.into_iter().map(|memory| (memory.tokens, memory.count)).collect();
        Ok(Work { batch, made: Quantized { codes, memories } })
    }

    fn embed(&self, work: Work<Quantized>) -> Result<Work<(Quantized, Vec<f32>)>, PipelineError> {
        let Work { batch, made: quantized } = work;
        let texts: Vec<&str> = batch.chunks.iter().map(|chunk| chunk.text.as_str()).collect();
        let vectors = on_all(&self.progress.embed, &texts, self.embedder.texts_per_call(), |_, texts| {
            Ok(self.embedder.embed(texts)?)
        })?;
        Ok(Work { batch, made: (quantized, vectors) })
    }

    fn write(
        &self,
        writer: &Mutex<BankWriter>,
        in_flight: &Mutex<HashSet<ContentHash>>,
        input: Receiver<Work<(Quantized, Vec<f32>)>>,
    ) -> Result<(), PipelineError> {
        let dim = self.embedder.dim();
        let bytes_per_memory = code_bytes_per_memory(self.codec, &self.encoder.shape());
        for Work { batch, made: (quantized, vectors) } in input {
            let chunks = batch.chunks.len();
            let parts = quantized
                .memories
                .iter()
                .zip(quantized.codes.chunks_exact(bytes_per_memory))
                .zip(vectors.chunks_exact(dim));
            let mut records = batch.chunks.iter().zip(parts);
            let mut writer = lock(writer);
            let started = Instant::now();
            for event in batch.events {
                match event {
                    Event::Chunk => {
                        let Some((chunk, (((tokens, count), codes), vector))) = records.next() else {
                            return Err(PipelineError::StageOutput { stage: "embed", chunks });
                        };
                        writer.push_record(&NewRecord {
                            content: chunk.content,
                            count: *count,
                            tokens_selected: tokens,
                            codes,
                            token_ids: &chunk.tokens,
                            text: &chunk.text,
                            vector,
                        })?;
                        lock(in_flight).remove(&chunk.content);
                    }
                    Event::Document(row) => push_document(&mut writer, row)?,
                }
            }
            self.progress.write.add(chunks, started.elapsed());
        }
        Ok(())
    }
}

/// Writes a document row; all its records are there by now, because batches keep their order.
fn push_document(writer: &mut BankWriter, row: FinishedDocument) -> Result<(), PipelineError> {
    let chunks = row.chunks.into_iter().map(|(content, span)| {
        let record = writer.find(content)?.ok_or(PipelineError::LostRecord { content })?;
        Ok(bank::Chunk { record, start: span.start, end: span.end })
    });
    let chunks = chunks.collect::<Result<_, PipelineError>>()?;
    writer.push_document(&NewDocument { id: row.id, text_hash: row.text_hash, chunks })?;
    Ok(())
}

fn code_bytes_per_memory(codec: &CodecSet, shape: &MemoryShape) -> usize {
    shape.vectors() * codec.code_bytes()
}

/// Feeds everything that comes in through `work`, and passes it on, until the input ends or nobody takes the output.
fn each<I, O>(
    input: Receiver<I>,
    output: Sender<O>,
    mut work: impl FnMut(I) -> Result<O, PipelineError>,
) -> Result<(), PipelineError> {
    for item in input {
        if output.send(work(item)?).is_err() {
            break;
        }
    }
    Ok(())
}

/// Does `work` on items, `per_call` at a time, and strings the results together. One at a time means: on all threads of
/// rayon's pool, so that stages share the cores. `work` also gets the index of its first item.
pub(super) fn on_all<I: Sync, O: Send>(
    meter: &StageMeter,
    items: &[I],
    per_call: usize,
    work: impl Fn(usize, &[I]) -> Result<Vec<O>, PipelineError> + Sync,
) -> Result<Vec<O>, PipelineError> {
    let call = |(index, items): (usize, &[I])| meter.measure(items.len(), || work(index * per_call, items));
    let made: Vec<Vec<O>> = if per_call == 1 {
        items.par_chunks(1).enumerate().map(call).collect::<Result<_, _>>()?
    } else {
        items.chunks(per_call).enumerate().map(call).collect::<Result<_, _>>()?
    };
    Ok(made.into_iter().flatten().collect())
}

/// Locks; a poisoned lock means that a stage has panicked, and that panic is what ends the run.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
