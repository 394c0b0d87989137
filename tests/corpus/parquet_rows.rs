//! Parquet files, whole and damaged, written by the parquet library's own writer.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use memory3::corpus::{Corpus, CorpusOptions, Entry};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::{input, open, summaries};

/// The values of a column, nulls left out, and for optional columns where they stand (1) or are null (0).
enum Values {
    Strings(Vec<Vec<u8>>, Option<Vec<i16>>),
    Ints(Vec<i32>),
    Longs(Vec<i64>),
}

/// Writes a file with one entry of `groups` per row group, columns in the schema's order.
fn write(path: &Path, schema: &str, groups: &[Vec<Values>]) {
    write_compressed(path, schema, groups, Compression::SNAPPY);
}

fn write_compressed(path: &Path, schema: &str, groups: &[Vec<Values>], compression: Compression) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_dictionary_enabled(false)
        .set_data_page_size_limit(2000)
        .set_write_batch_size(16)
        .build();
    let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
    for group in groups {
        let mut row_group = writer.next_row_group().unwrap();
        for values in group {
            let mut column = row_group.next_column().unwrap().unwrap();
            match values {
                Values::Strings(values, levels) => {
                    let values: Vec<ByteArray> = values.iter().cloned().map(ByteArray::from).collect();
                    column.typed::<ByteArrayType>().write_batch(&values, levels.as_deref(), None).unwrap()
                }
                Values::Ints(values) => column.typed::<Int32Type>().write_batch(values, None, None).unwrap(),
                Values::Longs(values) => column.typed::<Int64Type>().write_batch(values, None, None).unwrap(),
            };
            column.close().unwrap();
        }
        row_group.close().unwrap();
    }
    writer.close().unwrap();
}

fn strings(values: &[&str]) -> Values {
    Values::Strings(values.iter().map(|value| value.as_bytes().to_vec()).collect(), None)
}

#[test]
fn rows_are_documents_with_string_or_integer_ids() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let text = || strings(&["one", "two"]);
    write(
        &root.join("a.parquet"),
        "message m { required binary text (UTF8); required binary id (UTF8); }",
        &[vec![text(), strings(&["a", "b"])]],
    );
    write(
        &root.join("b.parquet"),
        "message m { required int32 id; required binary text; }",
        &[vec![Values::Ints(vec![-1, 7]), text()]],
    );
    write(
        &root.join("c.parquet"),
        "message m { required int64 id; required binary text (UTF8); }",
        &[vec![Values::Longs(vec![i64::MIN, i64::MAX]), text()]],
    );
    write(
        &root.join("d.parquet"),
        "message m { required int32 id (UINT_32); required binary text (UTF8); }",
        &[vec![Values::Ints(vec![-1, 7]), text()]],
    );
    let expected = [
        "a.parquet:1 a",
        "a.parquet:2 b",
        "b.parquet:1 -1",
        "b.parquet:2 7",
        "c.parquet:1 -9223372036854775808",
        "c.parquet:2 9223372036854775807",
        "d.parquet:1 4294967295",
        "d.parquet:2 7",
    ];
    let corpus = open(root);
    assert_eq!(summaries(root, &corpus), expected);
    assert_eq!(summaries(root, &corpus), expected);
}

#[test]
fn nulls_bad_text_and_large_values_cost_one_row_each() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let ids: Vec<Vec<u8>> = ["a", "c", "d", "e", "", "g"].iter().map(|id| id.as_bytes().to_vec()).collect();
    let texts = vec![b"x".to_vec(), b"y".to_vec(), b"bad \xff".to_vec(), vec![b'z'; 101], b"f".to_vec(), b" ".to_vec()];
    write(
        &path,
        "message m { optional binary id (UTF8); optional binary text (UTF8); }",
        &[vec![
            Values::Strings(ids, Some(vec![1, 0, 1, 1, 1, 1, 1])),
            Values::Strings(texts, Some(vec![1, 1, 0, 1, 1, 1, 1])),
        ]],
    );
    let options = CorpusOptions { max_document_bytes: 100, ..CorpusOptions::default() };
    let corpus = Corpus::open(&[input(&path)], options).unwrap();
    let expected = [
        "a.parquet:1 a",
        "a.parquet:2 !missing-field",
        "a.parquet:3 !missing-field c",
        "a.parquet:4 !invalid-utf8 d",
        "a.parquet:5 !too-large e",
        "a.parquet:6 !empty-id ",
        "a.parquet:7 !empty g",
    ];
    assert_eq!(summaries(folder.path(), &corpus), expected);
}

#[test]
fn a_file_without_fitting_columns_is_one_rejection_that_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let detail = |schema: &str, columns: Vec<Values>| {
        let path = folder.path().join("a.parquet");
        write(&path, schema, &[columns]);
        let entries: Vec<Entry> = open(&path).entries().collect();
        assert_eq!(entries.len(), 1);
        let Entry::Rejected(rejection) = &entries[0] else { panic!("{entries:?}") };
        rejection.reason.to_string()
    };
    assert_eq!(
        detail(
            "message m { required binary name (UTF8); required binary text (UTF8); }",
            vec![strings(&["a", "b"]), strings(&["a", "b"])]
        ),
        "no column \"id\" among [\"name\", \"text\"]; 2 rows not read"
    );
    assert_eq!(
        detail(
            "message m { required int64 id (TIMESTAMP_MILLIS); required binary text (UTF8); }",
            vec![Values::Longs(vec![1]), strings(&["a"])]
        ),
        "field \"id\" is a column of type INT64 (TIMESTAMP_MILLIS), expected a string or integer column"
    );
    assert_eq!(
        detail(
            "message m { required int32 id; required int32 text; }",
            vec![Values::Ints(vec![1]), Values::Ints(vec![1])]
        ),
        "field \"text\" is a column of type INT32, expected a string column"
    );
    assert_eq!(
        detail(
            "message m { required int32 id; required group text { required binary text (UTF8); } }",
            vec![Values::Ints(vec![1]), strings(&["a"])]
        ),
        "field \"text\" is a nested column, expected a string column"
    );
}

/// Three row groups of 300 rows, several pages each.
fn three_groups(path: &Path, compression: Compression) {
    let groups: Vec<Vec<Values>> = (0..3)
        .map(|group| {
            let ids: Vec<i32> = (group * 300..(group + 1) * 300).collect();
            let texts = ids.iter().map(|id| format!("text of row {id}, {:x}", id * 7919).into_bytes()).collect();
            vec![Values::Ints(ids), Values::Strings(texts, None)]
        })
        .collect();
    let schema = "message m { required int32 id; required binary text (UTF8); }";
    write_compressed(path, schema, &groups, compression);
}

#[test]
fn a_broken_row_group_is_one_rejection_and_the_others_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    three_groups(&path, Compression::UNCOMPRESSED);
    assert_eq!(open(&path).entries().filter(|entry| matches!(entry, Entry::Document(_))).count(), 900);
    let mut bytes = fs::read(&path).unwrap();
    // Inside the second row group's texts: its third page or so.
    let place = bytes.windows(16).position(|window| window == b"text of row 480,").unwrap();
    bytes[place - 60..place + 200].fill(0xee);
    fs::write(&path, &bytes).unwrap();
    let found = summaries(folder.path(), &open(&path));
    let damage: Vec<&String> = found.iter().filter(|entry| entry.contains('!')).collect();
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert!(found.contains(&"a.parquet:300 299".to_owned()));
    assert!(found.contains(&"a.parquet:601 600".to_owned()));
    assert!(found.contains(&"a.parquet:900 899".to_owned()));
    assert!(found.len() > 600 && found.len() < 901, "{}", found.len());
}

#[test]
fn no_flipped_byte_and_no_cut_makes_the_reader_panic_or_run_on() {
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        three_groups(&path, compression);
        let whole = fs::read(&path).unwrap();
        let check = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            // A footer may lie about its row groups, but nobody believes it forever.
            assert!(open(&path).entries().take(10_000).count() < 10_000);
        };
        // The footer densely, the pages sparsely.
        let footer = whole.len().saturating_sub(900);
        for place in (0..footer).step_by(61).chain(footer..whole.len()) {
            for flip in [0xff, 0x01, 0x80] {
                let mut bytes = whole.clone();
                bytes[place] ^= flip;
                check(&bytes);
            }
        }
        for length in (0..whole.len()).step_by(97) {
            check(&whole[..length]);
        }
    }
}
