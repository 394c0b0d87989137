//! Sequences with memories of a real bank that change every 64 tokens.

use memory3::corpus::Chunker;
use memory3::embed::{self, TextEmbedder};
use memory3::memory::RecordId;
use memory3::model::{DType, Device};
use memory3::read::{
    Condition, DenseMemories, LoadedMemory, MemoryReader, MemorySource, Prompt, ReadModel, Retrieval, Retriever,
    Session, SessionOptions, Times, Turn, Wanted,
};

use super::memories::bank;
use crate::compile::program::{Program, repository, tiny_encoder};

/// A bank with all that reads it.
struct Opened {
    /// Its folder goes with it.
    _program: Program,
    reader: MemoryReader,
    embedder: Box<dyn TextEmbedder>,
    chunker: Chunker,
    model: ReadModel,
}

impl Opened {
    fn new() -> Self {
        let program = Program::new();
        let reader = MemoryReader::open(&bank(&program, "none"), 1 << 20).unwrap();
        let embedder = embed::open(&tiny_encoder(), Device::Cpu, DType::F32).unwrap();
        let dir = program.path().join("model");
        let chunker = Chunker::from_dir(&dir, 128).unwrap();
        let model = ReadModel::load_for(reader.bank(), &dir, &chunker, DType::F32, 512).unwrap();
        Self { _program: program, reader, embedder, chunker, model }
    }

    fn retriever(&self) -> Retriever<'_> {
        Retriever {
            bank: self.reader.bank(),
            source: &self.reader,
            embedder: &*self.embedder,
            settings: Retrieval::default(),
        }
    }

    /// The first tokens of a text from a place on.
    fn prompt(&self, from: usize, tokens: usize) -> Prompt {
        let text = std::fs::read_to_string(repository().join("examples/README.md")).unwrap();
        let tokens = self.chunker.tokens(&text).unwrap()[from..from + tokens].to_vec();
        Prompt { guarded: tokens.clone(), tokens, ..Prompt::default() }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_sequence_gives_the_same_bits_alone_in_a_batch_at_once_or_token_by_token_with_memories_ahead_or_not() {
    let opened = Opened::new();
    let retriever = opened.retriever();
    let prompts = [opened.prompt(0, 150), opened.prompt(100, 0), opened.prompt(200, 64), opened.prompt(30, 70)];
    let further = [opened.prompt(150, 130), opened.prompt(7, 65), opened.prompt(264, 1), opened.prompt(100, 129)];
    for condition in [Condition::Memories(&retriever), Condition::Plain] {
        let run = |numbers: &[usize], ahead: bool, step: usize| {
            let options = SessionOptions { ahead, watch: false };
            let mut session = Session::new(&opened.model, &opened.chunker, condition, options);
            let chosen: Vec<Prompt> = numbers.iter().map(|number| prompts[*number].clone()).collect();
            let mut found = session.read(&chosen).unwrap();
            let most = numbers.iter().map(|number| further[*number].tokens.len()).max().unwrap();
            for start in (0..most).step_by(step) {
                let next: Vec<&[u32]> = (numbers.iter())
                    .map(|number| further[*number].tokens.chunks(step).nth(start / step).unwrap_or_default())
                    .collect();
                for (found, rows) in found.iter_mut().zip(session.go_on(&next, Wanted::All).unwrap()) {
                    found.extend(rows);
                }
            }
            let retrievals = (0..numbers.len()).map(|number| session.retrievals(number)).collect::<Vec<_>>();
            (found.iter().map(|rows| bits(rows)).collect::<Vec<_>>(), retrievals)
        };
        let (together, retrievals) = run(&[0, 1, 2, 3], true, 1000);
        let expected = if matches!(condition, Condition::Plain) { [0; 4] } else { [3 + 2, 1, 1, 2 + 2] };
        assert_eq!(retrievals, expected);
        for (ahead, step) in [(false, 1000), (true, 1), (false, 37)] {
            assert!(run(&[0, 1, 2, 3], ahead, step).0 == together, "{ahead} {step}");
        }
        for (number, together) in together.iter().enumerate() {
            assert!(run(&[number], true, 1000).0[0] == *together, "alone: {number}");
        }
        assert!(run(&[3, 0], true, 64).0 == [together[3].clone(), together[0].clone()], "in another order");
    }
}

#[test]
fn a_session_is_the_model_with_the_memories_that_the_retriever_finds() {
    let opened = Opened::new();
    let retriever = opened.retriever();
    let (prompt, further) = (opened.prompt(0, 100), opened.prompt(150, 70));
    let mut session =
        Session::new(&opened.model, &opened.chunker, Condition::Memories(&retriever), SessionOptions::default());
    let mut found = session.read(std::slice::from_ref(&prompt)).unwrap().remove(0);
    found.extend(session.go_on(&[&further.tokens], Wanted::All).unwrap().remove(0));
    // By hand: BOS and 64 tokens, 36 and the first 64 further ones, the other 6.
    let mut context = opened.model.context().unwrap();
    let mut set = |query: &[u32], tokens: &[u32]| {
        let vector = opened.embedder.embed(&[&opened.chunker.decode(query).unwrap()]).unwrap();
        let hits = opened.reader.bank().search(&vector, 5).unwrap();
        let ids: Vec<RecordId> = hits.iter().map(|hit| hit.record).collect();
        let memories = opened.reader.load(&ids).unwrap().memories.into_iter().map(Into::into).collect();
        opened.model.set_memories(&mut context, memories).unwrap();
        opened.model.forward(&mut [Turn { context: &mut context, tokens }], Wanted::All).unwrap()
    };
    let bos = opened.chunker.bos().unwrap();
    set(&prompt.tokens[..64], &[&[bos], &prompt.tokens[..64]].concat());
    let rows = set(&prompt.tokens[64..], &[&prompt.tokens[64..], &further.tokens[..64]].concat());
    let mut expected = rows[35 * opened.model.config().vocab_size..].to_vec();
    expected.extend(set(&further.tokens[..64], &further.tokens[64..]));
    assert!(bits(&found) == bits(&expected));
    session.close();
    let readings = session.take_readings(0);
    let spans: Vec<_> = readings.iter().map(|reading| reading.tokens.clone()).collect();
    assert_eq!(spans, [0..64, 64..100, 100..164, 164..170]);
}

#[test]
fn stored_memories_are_the_same_tokens_of_dense_ones_rounded_to_bf16() {
    let opened = Opened::new();
    let bank = opened.reader.bank();
    let dense = DenseMemories { bank, model: &opened.model };
    let ids: Vec<RecordId> = bank.record_ids().step_by(13).collect();
    let pairs = opened.reader.load(&ids).unwrap().memories.into_iter().zip(dense.load(&ids).unwrap().memories);
    for (stored, dense) in pairs {
        let tokens = bank.record(stored.id()).unwrap().token_ids.len();
        assert_eq!((dense.id(), dense.count()), (stored.id(), tokens));
        let (shape, dim) = (stored.shape(), stored.shape().head_dim);
        let vector = |memory: &LoadedMemory, side: usize, layer: usize, head: usize, slot: usize| {
            let all = if side == 0 { memory.keys(layer) } else { memory.values(layer) };
            all[(head * memory.shape().slots + slot) * dim..][..dim].to_vec()
        };
        for (at, token) in stored.tokens().iter().enumerate() {
            let (layer, head, slot) = (at / shape.slots / shape.kv_heads, at / shape.slots % shape.kv_heads, at % 8);
            for side in 0..2 {
                let full = vector(&dense, side, layer, head, usize::from(*token));
                let rounded: Vec<f32> = full.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
                assert!(slot >= stored.count() || vector(&stored, side, layer, head, slot) == rounded);
            }
        }
    }
    // They are read like others.
    let retriever = Retriever { source: &dense, ..opened.retriever() };
    let run = |retriever: &Retriever<'_>| {
        let condition = Condition::Memories(retriever);
        let mut session = Session::new(&opened.model, &opened.chunker, condition, SessionOptions::default());
        session.read(&[opened.prompt(0, 70)]).unwrap().remove(0)
    };
    assert_ne!(run(&retriever), run(&opened.retriever()));
}

#[test]
fn references_as_text_stand_in_front_of_the_prompt_and_conditions_need_their_positions() {
    let opened = Opened::new();
    let retriever = opened.retriever();
    let text = "The lighthouse of Thole";
    let mut times = Times::default();
    let prompt = Condition::Text(&retriever).prompt(&opened.chunker, text, &mut times).unwrap();
    assert!(prompt.text.starts_with("Reference: ") && prompt.text.ends_with(&format!("\n\n{text}")), "{}", prompt.text);
    assert_eq!(prompt.references.len(), 5);
    assert_eq!(prompt.guarded, opened.chunker.tokens(text).unwrap());
    assert!(times.embed > 0.0 && times.search > 0.0);
    let plain = Condition::Plain.prompt(&opened.chunker, text, &mut times).unwrap();
    assert_eq!((plain.text.as_str(), &plain.tokens), (text, &plain.guarded));
    assert_eq!(Condition::Plain.positions(&opened.chunker), 1);
    let before = 1 + 128 + opened.chunker.prefix().len();
    assert_eq!(Condition::Memories(&retriever).positions(&opened.chunker), before);
}
