//! Inputs of every kind, standard input, and the shared data sets where they are at hand.

use std::fs;
use std::io::Write;
use std::path::Path;

use memory3::corpus::{Corpus, CorpusError, CorpusOptions, Entry, Format, RejectReason};

use super::{input, open, summaries};

fn with_stdin(bytes: &[u8]) -> Corpus {
    Corpus::open_with_stdin(&["-".to_owned()], CorpusOptions::default(), &mut &bytes[..]).unwrap()
}

#[test]
fn folders_are_read_recursively_in_sorted_order_with_relative_ids() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("b/c")).unwrap();
    for (name, text) in [("z.txt", "zed"), ("b/c/x.md", "# x\r\ny"), ("b/a.TXT", "a"), ("b.md", "b"), ("b/skip.rs", "")]
    {
        fs::write(root.join(name), text).unwrap();
    }
    fs::write(root.join("a.jsonl"), "{\"id\":1,\"text\":\"one\"}\n\n{\"id\":\"two\",\"text\":\"2\"}").unwrap();
    let corpus = open(root);
    // By path components: the folder `b` stands before the file `b.md`.
    let expected = ["a.jsonl:1 1", "a.jsonl:3 two", "b/a.TXT b/a.TXT", "b/c/x.md b/c/x.md", "b.md b.md", "z.txt z.txt"];
    assert_eq!(summaries(root, &corpus), expected);
    assert_eq!(summaries(root, &corpus), expected);
    assert_eq!(corpus.skipped().unknown_extension, 1);
    assert_eq!(corpus.files().len(), 5);
    let mut entries = corpus.entries();
    let Some(Entry::Document(document)) = entries.by_ref().nth(3) else { panic!("no document") };
    assert_eq!(document.text, "# x\r\ny");
    assert_eq!(entries.count(), 2);
}

#[test]
fn globs_choose_files_and_ids_start_at_the_fixed_folder() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("x/deep")).unwrap();
    for name in ["x/1.md", "x/2.txt", "x/deep/3.md", "x/deep/4.bin", "y.md"] {
        fs::write(root.join(name), name).unwrap();
    }
    let glob = |pattern: &str| Corpus::open(&[format!("{}/{pattern}", root.display())], CorpusOptions::default());
    let list = |pattern: &str| summaries(root, &glob(pattern).unwrap());
    assert_eq!(list("x/*.md"), ["x/1.md 1.md"]);
    assert_eq!(list("x/**/*.md"), ["x/1.md 1.md", "x/deep/3.md deep/3.md"]);
    assert_eq!(list("**/*.{md,txt}").len(), 4);
    assert_eq!(list("?.md"), ["y.md y.md"]);
    assert!(matches!(glob("x/*.pdf"), Err(CorpusError::NothingToRead { ignored: 0, .. })));
    assert!(matches!(glob("x/deep/*.bin"), Err(CorpusError::NothingToRead { ignored: 1, .. })));
    assert!(matches!(glob("nowhere/*.md"), Err(CorpusError::NotFound { .. })));
    assert!(matches!(glob("x/[*.md"), Err(CorpusError::BadGlob { .. })));
    // A path that exists is no glob.
    fs::write(root.join("[1].md"), "bracket").unwrap();
    assert_eq!(list("[1].md"), ["[1].md [1].md"]);
}

#[test]
fn a_file_that_two_inputs_name_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("a.txt"), "a").unwrap();
    fs::write(root.join("b.txt"), "b").unwrap();
    let inputs = [input(root.join("b.txt")), input(root), format!("{}/*.txt", root.display())];
    let corpus = Corpus::open(&inputs, CorpusOptions::default()).unwrap();
    assert_eq!(summaries(root, &corpus), ["b.txt b.txt", "a.txt a.txt"]);
    assert_eq!(corpus.skipped().repeated, 3);
}

#[test]
fn inputs_that_cannot_be_meant_are_errors_with_a_next_step() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("a.pdf"), "a").unwrap();
    let error = |inputs: &[&str]| {
        let inputs: Vec<String> = inputs.iter().map(|input| (*input).to_owned()).collect();
        Corpus::open_with_stdin(&inputs, CorpusOptions::default(), &mut &b""[..]).unwrap_err().to_string()
    };
    assert!(error(&[&input(root.join("a.pdf"))]).contains("unknown extension; convert it"));
    assert!(error(&[&input(root.join("a.txt"))]).contains("no such file or folder; check"));
    assert!(error(&[&input(root)]).contains("1 others ignored; name another"));
    assert!(error(&[]).contains("none given"));
    assert!(error(&["-", "-"]).contains("twice"));
    let options = CorpusOptions { text_field: "id".to_owned(), ..CorpusOptions::default() };
    assert!(matches!(Corpus::open(&[input(root)], options), Err(CorpusError::SameField { .. })));
}

#[test]
fn standard_input_is_json_lines_or_one_text_and_can_be_read_twice() {
    let none = Path::new("");
    let corpus = with_stdin(b" \n{\"id\":\"a\",\"text\":\"x\"}\n{\"id\":\"b\",\"text\":\"y\"}\nnot json\n");
    let expected = ["-:2 a", "-:3 b", "-:4 !invalid-json"];
    assert_eq!(summaries(none, &corpus), expected);
    assert_eq!(summaries(none, &corpus), expected);
    let corpus = with_stdin(b"\xef\xbb\xbf\n {\"id\":\"a\",\"text\":\"x\"}");
    assert_eq!(summaries(none, &corpus), ["-:2 a"]);
    let corpus = with_stdin("\u{feff}\u{4e16}\u{754c} {".as_bytes());
    assert_eq!(corpus.files()[0].format, Format::Text);
    let Some(Entry::Document(document)) = corpus.entries().next() else { panic!("no document") };
    assert_eq!((document.id.as_str(), document.text.as_str()), ("stdin", "\u{4e16}\u{754c} {"));
    assert_eq!(summaries(none, &with_stdin(b"\n \n")), ["- !empty stdin"]);
    assert_eq!(summaries(none, &with_stdin(b"")), ["- !empty stdin"]);
}

#[test]
fn compressed_lines_read_like_plain_ones_with_windows_of_27_bits_and_several_members() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let lines: String = (0..500).map(|id| format!("{{\"id\":{id},\"text\":\"text {id}\"}}\n")).collect();
    fs::write(root.join("a.jsonl"), &lines).unwrap();
    let mut encoder = zstd::Encoder::new(fs::File::create(root.join("b.jsonl.zst")).unwrap(), 3).unwrap();
    encoder.window_log(27).unwrap();
    encoder.write_all(lines.as_bytes()).unwrap();
    encoder.finish().unwrap();
    let member = |text: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let (front, back) = lines.split_at(1000);
    fs::write(root.join("c.jsonl.gz"), [member(front), member(back)].concat()).unwrap();
    let corpus = open(root);
    let texts: Vec<(String, String)> = corpus
        .entries()
        .map(|entry| match entry {
            Entry::Document(document) => (document.id, document.text),
            Entry::Rejected(rejection) => panic!("{rejection:?}"),
        })
        .collect();
    assert_eq!(texts.len(), 1500);
    assert_eq!(texts[..500], texts[500..1000]);
    assert_eq!(texts[..500], texts[1000..]);
}

#[test]
fn a_line_of_100_megabytes_costs_one_rejection_and_its_neighbours_survive() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.jsonl.zst");
    let mut encoder = zstd::Encoder::new(fs::File::create(&path).unwrap(), 1).unwrap();
    encoder.write_all(b"{\"id\":1,\"text\":\"before\"}\n{\"id\":2,\"text\":\"").unwrap();
    for _ in 0..100 {
        encoder.write_all(&vec![b'x'; 1_000_000]).unwrap();
    }
    encoder.write_all(b"\"}\n{\"id\":3,\"text\":\"after\"}\n").unwrap();
    encoder.finish().unwrap();
    let entries: Vec<Entry> = open(&path).entries().collect();
    assert_eq!(entries.len(), 3);
    let Entry::Rejected(rejection) = &entries[1] else { panic!("{:?}", entries[1]) };
    assert_eq!(rejection.source.line, Some(2));
    assert_eq!(rejection.reason, RejectReason::TooLarge { bytes: 100_000_018, limit: 16 << 20 });
    let Entry::Document(document) = &entries[2] else { panic!("{:?}", entries[2]) };
    assert_eq!((document.id.as_str(), document.source.line), ("3", Some(3)));
}

#[test]
fn progress_runs_up_to_the_size_of_all_files() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.txt"), "abc").unwrap();
    let lines: String = (0..20_000).map(|id| format!("{{\"id\":{id},\"text\":\"text\"}}\n")).collect();
    fs::write(folder.path().join("b.jsonl"), &lines).unwrap();
    let corpus = open(folder.path());
    assert_eq!(corpus.total_bytes(), 3 + lines.len() as u64);
    let mut entries = corpus.entries();
    let mut last = 0;
    while entries.next().is_some() {
        assert!(entries.bytes_read() >= last && entries.bytes_read() <= corpus.total_bytes());
        last = entries.bytes_read();
    }
    assert_eq!(entries.bytes_read(), corpus.total_bytes());
}

/// Row counts of the shared data sets; their folder is named by `MEMORY3_DATA`.
#[test]
fn real_data_sets_have_the_rows_that_their_readme_counts() {
    let Some(data) = std::env::var_os("MEMORY3_DATA") else {
        println!("MEMORY3_DATA is not set: nothing was read");
        return;
    };
    for (name, rows) in [("wiki_en", 11_984), ("text_zh", 10_049), ("factbook_refs", 36_806)] {
        let corpus = open(Path::new(&data).join(format!("{name}.jsonl.zst")));
        let mut bytes = 0;
        let mut documents = 0;
        for entry in corpus.entries() {
            match entry {
                Entry::Document(document) => {
                    documents += 1;
                    bytes += document.text.len();
                }
                Entry::Rejected(rejection) => panic!("{rejection:?}"),
            }
        }
        println!("{name}: {documents} documents, {bytes} bytes of text");
        assert_eq!(documents, rows, "{name}");
    }
}
