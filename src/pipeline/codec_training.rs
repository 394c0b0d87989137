//! The codec of a run: trained on keys and values of sampled chunks, and judged on those held out.
//!
//! In: the survey's sample of chunks, the encoder, the settings. Out: a codec set, what there is to say about it, and
//! its held-out error. The sample depends on content and seed alone, and training is reproducible, so that the same
//! corpus gives the same codec.

use std::sync::atomic::Ordering;

use super::PipelineError;
use super::progress::{Phase, Progress, StopFlag};
use super::stages::on_all;
use super::survey::Sampled;
use crate::bank::CodecDescription;
use crate::codec::quality::Quality;
use crate::codec::sample::{MAX_CAPACITY, SampleSize, Sampler, TrainingSample};
use crate::codec::train::{TrainOptions, train_set};
use crate::codec::{CodecChoice, CodecSet, CodecSpec, Scope, factory};
use crate::config::CodecConfig;
use crate::memory::MemoryShape;
use crate::model::MemoryEncoder;

/// Distinct chunks that the survey keeps for training, at most: 16 MiB of token ids.
const MAX_SAMPLE_CHUNKS: usize = 32_768;
/// Sampled chunks that are encoded even if they are more than a tenth of the corpus: encoding them twice is cheap.
const MIN_SAMPLE_CHUNKS: usize = 2_048;
/// Chunks that go through the model together.
const BATCH_CHUNKS: usize = 64;

/// A codec and where it came from.
pub(super) struct ChosenCodec {
    /// The codec.
    pub set: CodecSet,
    /// `none` or the factory string.
    pub spec: String,
    /// Vectors that one codebook was trained on; 0 for bf16.
    pub training_vectors: u64,
    /// Held-out error, if there was anything to measure.
    pub quality: Option<Quality>,
    /// Why it is not what was asked for.
    pub note: Option<String>,
}

impl ChosenCodec {
    /// The codec that a bank's records were written with.
    pub fn of_bank(set: CodecSet, description: &CodecDescription) -> Self {
        let quality = Quality { keys: description.key_mse, values: description.value_mse, vectors: 0 };
        Self {
            set,
            spec: description.spec.clone(),
            training_vectors: description.training_vectors,
            quality: Some(quality),
            note: description.fallback.clone(),
        }
    }

    /// What a manifest says of a codec that nobody will read with.
    pub fn untrained(set: &CodecSet) -> CodecDescription {
        CodecDescription {
            spec: set.codecs().first().map_or_else(String::new, crate::codec::Codec::name),
            scope: set.scope().to_string(),
            code_bytes: set.code_bytes() as u64,
            training_vectors: 0,
            key_mse: None,
            value_mse: None,
            fallback: None,
        }
    }

    /// What the manifest says of it.
    pub fn description(&self) -> CodecDescription {
        CodecDescription {
            spec: self.spec.clone(),
            scope: self.set.scope().to_string(),
            code_bytes: self.set.code_bytes() as u64,
            training_vectors: self.training_vectors,
            key_mse: self.quality.and_then(|quality| quality.keys).map(six_digits),
            value_mse: self.quality.and_then(|quality| quality.values).map(six_digits),
            fallback: self.note.clone(),
        }
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        let bytes = self.set.code_bytes();
        let error = self.quality.and_then(|quality| Some((quality.keys?, quality.values?)));
        let error = error
            .map_or_else(String::new, |(keys, values)| format!(", held-out error keys {keys:.4}, values {values:.4}"));
        format!("{}, {bytes} bytes a vector{error}", self.spec)
    }
}

/// So many digits come back from JSON as they went in, of which a resumed run makes the same manifest; all 17 need not.
fn six_digits(error: f64) -> f64 {
    (error * 1e6).round() / 1e6
}

/// What to sample, known before the survey.
pub(super) struct TrainingPlan {
    choice: CodecChoice,
    scope: Scope,
    /// Vectors to collect, held-out ones included.
    capacity: usize,
    seed: u64,
}

impl TrainingPlan {
    /// Reads the settings for a model with this many memory layers and this head size.
    pub fn new(config: &CodecConfig, layers: usize, head_dim: usize) -> Result<Self, PipelineError> {
        let choice: CodecChoice = config.spec.parse()?;
        let scope: Scope = config.scope.parse()?;
        let best = match choice {
            CodecChoice::Auto => factory::auto_spec(head_dim).map_or(CodecSpec::Bf16, CodecSpec::Faiss),
            _ => choice.resolve(head_dim, usize::MAX)?.0,
        };
        let wanted = config.training_vectors.min(best.useful_vectors()) * scope.codecs(layers);
        // One chunk in sixteen is held out.
        Ok(Self { choice, scope, capacity: (wanted + wanted / 15).min(MAX_CAPACITY), seed: config.seed })
    }

    /// The codec's name if the settings insist on one; `auto` takes what comes.
    pub fn named_codec(&self) -> Option<String> {
        match self.choice {
            CodecChoice::Auto => None,
            CodecChoice::None => Some(CodecSpec::Bf16.to_string()),
            CodecChoice::Paper => Some(factory::PAPER.to_string()),
            CodecChoice::Factory(spec) => Some(spec.to_string()),
        }
    }

    /// Chunks that the survey should sample.
    pub fn sample_chunks(&self) -> usize {
        if self.choice == CodecChoice::None { 0 } else { self.capacity.min(MAX_SAMPLE_CHUNKS) }
    }

    /// The setting.
    pub fn choice(&self) -> CodecChoice {
        self.choice
    }

    /// Which vectors share a codebook.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The codec that text enough would give.
    pub fn best(&self, head_dim: usize) -> Result<CodecSpec, PipelineError> {
        Ok(self.choice.resolve(head_dim, usize::MAX)?.0)
    }

    /// Chunks of the survey's sample that go through the model, and the vectors drawn from each.
    fn extent(&self, sampled: &Sampled, corpus_chunks: u64, shape: &MemoryShape) -> (usize, usize) {
        let share = usize::try_from(corpus_chunks / 10).unwrap_or(usize::MAX);
        let chunks = sampled.len().min(share.max(MIN_SAMPLE_CHUNKS));
        (chunks, self.capacity.div_ceil(chunks.max(1)).min(shape.vectors()))
    }

    /// The chunks that training will encode, and the vectors that they will give.
    pub fn sample_size(&self, sampled: &Sampled, corpus_chunks: u64, shape: &MemoryShape) -> (usize, SampleSize) {
        if self.choice == CodecChoice::None {
            return (0, SampleSize::default());
        }
        let (chunks, vectors_per_chunk) = self.extent(sampled, corpus_chunks, shape);
        let queue = sampled.iter().take(chunks).map(|((_, content), tokens)| (*content, tokens.len()));
        (chunks, SampleSize::of(&self.sampler(vectors_per_chunk), shape, self.scope, queue))
    }

    /// Draws by the configured seed.
    pub fn sampler(&self, vectors_per_chunk: usize) -> Sampler {
        Sampler { seed: self.seed, vectors_per_chunk, capacity: self.capacity }
    }

    /// Encodes the sample, trains and measures.
    ///
    /// # Errors
    /// A chunk cannot be encoded, or a codec cannot be trained.
    pub fn train(
        &self,
        encoder: &dyn MemoryEncoder,
        sampled: &Sampled,
        corpus_chunks: u64,
        progress: &Progress,
        stop: &StopFlag,
    ) -> Result<Option<ChosenCodec>, PipelineError> {
        let shape = encoder.shape();
        if self.choice == CodecChoice::None {
            let empty = TrainingSample::new(self.sampler(1), shape);
            return Ok(Some(ChosenCodec {
                set: self.train_set(CodecSpec::Bf16, &empty, progress)?,
                spec: CodecSpec::Bf16.to_string(),
                training_vectors: 0,
                quality: None,
                note: None,
            }));
        }

        // 1. Few vectors of many chunks: as many chunks as a tenth of the corpus.
        progress.enter(Phase::Sample);
        let (chunks, vectors_per_chunk) = self.extent(sampled, corpus_chunks, &shape);
        progress.sample_total.store(chunks as u64, Ordering::Relaxed);
        let mut sample = TrainingSample::new(self.sampler(vectors_per_chunk), shape);
        let mut queue = sampled.iter().take(chunks);
        loop {
            let batch: Vec<_> = queue.by_ref().take(BATCH_CHUNKS).collect();
            if batch.is_empty() {
                break;
            }
            if stop.is_set() {
                return Ok(None);
            }
            let tokens: Vec<&[u32]> = batch.iter().map(|(_, tokens)| tokens.as_slice()).collect();
            let memories =
                on_all(&progress.sample, &tokens, encoder.chunks_per_call(), |_, tokens| Ok(encoder.encode(tokens)?))?;
            for (((_, content), _), memory) in batch.iter().zip(&memories) {
                sample.add(content, memory);
            }
        }

        // 2. Train one codec for each part of the scope.
        progress.enter(Phase::Train);
        let available = sample.available(self.scope);
        let (spec, note) = self.choice.resolve(shape.head_dim, available)?;
        let set = self.train_set(spec, &sample, progress)?;

        // 3. Measure on the chunks that were held out.
        let quality = Some(sample.quality(&set));
        let training_vectors = if spec == CodecSpec::Bf16 { 0 } else { available as u64 };
        Ok(Some(ChosenCodec { set, spec: spec.to_string(), training_vectors, quality, note }))
    }

    fn train_set(
        &self,
        spec: CodecSpec,
        sample: &TrainingSample,
        progress: &Progress,
    ) -> Result<CodecSet, PipelineError> {
        let options = TrainOptions::default();
        let steps = match spec {
            CodecSpec::Bf16 => 0,
            CodecSpec::Faiss(spec) => spec.training_steps(&options) * self.scope.codecs(sample.shape().layers),
        };
        progress.train_steps_total.store(steps as u64, Ordering::Relaxed);
        let train = || train_set(&spec, self.scope, sample, &options, &|| progress.train_step());
        Ok(progress.train.measure(sample.len(), train)?)
    }
}
