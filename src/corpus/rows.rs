//! Parquet: a document per row.
//!
//! In: a Parquet file with a string or integer column for the id and a string column for the text, both at the top
//! level. Out: an entry for every row. Only the two columns are read, page by page and a few rows at a time, through
//! the column readers: they give raw bytes, so that one value that is not UTF-8 costs one row. A row group that does
//! not decode is one rejection; the rows before it and the row groups after it are kept.

use std::collections::VecDeque;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType, DataType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::entry::{Entry, RejectReason, Rejection, Source, finish};
use super::reader::CorpusOptions;

/// Rows decoded at once. Values are slices of their page, so that a batch holds a page or two, whatever its rows.
const BATCH_ROWS: usize = 64;

/// The documents of one Parquet file.
pub(super) struct Rows {
    file: SerializedFileReader<File>,
    path: PathBuf,
    id: Column,
    text: Column,
    /// The row group that is read, or read next.
    group: usize,
    /// Rows in the row groups before it, as the file says.
    rows_before: u64,
    /// Rows of it that were read.
    rows_read: u64,
    open: Option<Group>,
    batch: VecDeque<Entry>,
}

/// A column that was found: its place among the leaves.
#[derive(Clone, Copy)]
struct Column {
    leaf: usize,
    unsigned: bool,
}

/// The readers of one row group.
struct Group {
    id: ColumnReader,
    text: ColumnReaderImpl<ByteArrayType>,
}

/// One row: nulls are `None`.
type RawRow = (Option<RawId>, Option<ByteArray>);

/// An id as it stands in the file.
enum RawId {
    Bytes(ByteArray),
    Integer(String),
}

impl Rows {
    /// Reads the footer and finds the columns.
    #[allow(clippy::result_large_err)] // once a file
    pub fn open(file: File, path: PathBuf, options: &CorpusOptions) -> Result<Self, Rejection> {
        let rejection = |reason| Rejection { source: Source { path: path.clone(), line: None }, id: None, reason };
        let file = guarded(|| SerializedFileReader::new(file))
            .map_err(|cause| rejection(RejectReason::Unreadable { cause }))?;
        let metadata = file.metadata().file_metadata();
        let rows = u64::try_from(metadata.num_rows()).unwrap_or(0);
        let schema = metadata.schema_descr();
        let id = find(schema, &options.id_field, rows, Kind::Id).map_err(rejection)?;
        let text = find(schema, &options.text_field, rows, Kind::Text).map_err(rejection)?;
        Ok(Self { file, path, id, text, group: 0, rows_before: 0, rows_read: 0, open: None, batch: VecDeque::new() })
    }

    /// The next document or rejection; `None` at the end of the file.
    pub fn next_entry(&mut self, options: &CorpusOptions) -> Option<Entry> {
        loop {
            if let Some(entry) = self.batch.pop_front() {
                return Some(entry);
            }
            if self.group >= self.file.num_row_groups() {
                return None;
            }
            match guarded(|| self.read_batch()) {
                Ok(rows) if !rows.is_empty() => {
                    for (id, text) in rows {
                        self.rows_read += 1;
                        let line = self.rows_before.saturating_add(self.rows_read);
                        let source = Source { path: self.path.clone(), line: Some(line) };
                        self.batch.push_back(entry(source, id, text, options));
                    }
                }
                Ok(_) => {
                    if let Some(damage) = self.finish_group("it ends too early") {
                        return Some(damage);
                    }
                }
                Err(cause) => {
                    if let Some(damage) = self.finish_group(&cause) {
                        return Some(damage);
                    }
                }
            }
        }
    }

    /// Up to [`BATCH_ROWS`] rows of the row group; none at its end.
    fn read_batch(&mut self) -> Result<Vec<RawRow>, ParquetError> {
        let group = match &mut self.open {
            Some(group) => group,
            None => {
                let metadata = self.file.metadata().row_group(self.group);
                for leaf in [self.id.leaf, self.text.leaf] {
                    // The decoder takes this for granted.
                    let column = metadata.columns().get(leaf);
                    let start =
                        column.map(|column| column.dictionary_page_offset().unwrap_or(column.data_page_offset()));
                    if start.is_none_or(|start| start < 0) || column.is_none_or(|column| column.compressed_size() < 0) {
                        return Err(ParquetError::General("a column lies outside of the file".to_owned()));
                    }
                }
                let readers = self.file.get_row_group(self.group)?;
                let id = readers.get_column_reader(self.id.leaf)?;
                let ColumnReader::ByteArrayColumnReader(text) = readers.get_column_reader(self.text.leaf)? else {
                    return Err(ParquetError::General("text column changes its type".to_owned()));
                };
                self.open.insert(Group { id, text })
            }
        };
        let ids = match &mut group.id {
            ColumnReader::ByteArrayColumnReader(reader) => read_column(reader, RawId::Bytes)?,
            ColumnReader::Int32ColumnReader(reader) if self.id.unsigned => {
                read_column(reader, |id| RawId::Integer(id.cast_unsigned().to_string()))?
            }
            ColumnReader::Int32ColumnReader(reader) => read_column(reader, |id| RawId::Integer(id.to_string()))?,
            ColumnReader::Int64ColumnReader(reader) if self.id.unsigned => {
                read_column(reader, |id| RawId::Integer(id.cast_unsigned().to_string()))?
            }
            ColumnReader::Int64ColumnReader(reader) => read_column(reader, |id| RawId::Integer(id.to_string()))?,
            _ => return Err(ParquetError::General("id column changes its type".to_owned())),
        };
        let texts = read_column(&mut group.text, |text| text)?;
        if ids.len() != texts.len() {
            return Err(ParquetError::General("columns of different length".to_owned()));
        }
        Ok(ids.into_iter().zip(texts).collect())
    }

    /// Goes on to the next row group. Rows that were promised and did not come are one rejection.
    fn finish_group(&mut self, cause: &str) -> Option<Entry> {
        let promised = u64::try_from(self.file.metadata().row_group(self.group).num_rows()).unwrap_or(0);
        let read = self.rows_read;
        let first_lost = self.rows_before.saturating_add(read).saturating_add(1);
        let number = self.group + 1;
        self.open = None;
        self.group += 1;
        self.rows_read = 0;
        self.rows_before = self.rows_before.saturating_add(promised);
        if read == promised {
            return None;
        }
        let lost = promised.saturating_sub(read);
        let cause = format!("{lost} rows of row group {number} are lost: {cause}");
        let source = Source { path: self.path.clone(), line: Some(first_lost) };
        Some(Entry::Rejected(Rejection { source, id: None, reason: RejectReason::Unreadable { cause } }))
    }
}

/// Runs the decoder. It reports damage as errors; should it panic on bytes that nobody foresaw, that is damage too.
fn guarded<T>(work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the Parquet decoder gave up".to_owned()),
    }
}

/// Up to [`BATCH_ROWS`] values of a column at the top level, nulls as `None`.
fn read_column<T: DataType, V>(
    reader: &mut ColumnReaderImpl<T>,
    convert: impl Fn(T::T) -> V,
) -> Result<Vec<Option<V>>, ParquetError> {
    let mut values = Vec::with_capacity(BATCH_ROWS);
    let mut levels = Vec::with_capacity(BATCH_ROWS);
    let (records, _, _) = reader.read_records(BATCH_ROWS, Some(&mut levels), None, &mut values)?;
    let mut values = values.into_iter().map(convert);
    if levels.is_empty() {
        return Ok(values.map(Some).collect()); // a required column
    }
    if levels.len() != records {
        return Err(ParquetError::General("levels do not fit the rows".to_owned()));
    }
    Ok(levels.into_iter().map(|level| if level > 0 { values.next() } else { None }).collect())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Id,
    Text,
}

/// Finds a column of a fitting type at the top level.
fn find(schema: &SchemaDescriptor, name: &str, rows: u64, kind: Kind) -> Result<Column, RejectReason> {
    let fields = schema.root_schema().get_fields();
    if !fields.iter().any(|field| field.name() == name) {
        let columns = fields.iter().map(|field| field.name().to_owned()).collect();
        return Err(RejectReason::MissingColumn { column: name.to_owned(), columns, rows });
    }
    let expected = match kind {
        Kind::Id => "a string or integer column",
        Kind::Text => "a string column",
    };
    let wrong = |found: String| RejectReason::WrongType { field: name.to_owned(), expected, found };
    let leaf = schema
        .columns()
        .iter()
        .position(|column| column.path().parts() == [name] && column.max_rep_level() == 0)
        .ok_or_else(|| wrong("a nested column".to_owned()))?;
    let column = schema.column(leaf);
    let plain_integer = matches!(column.logical_type_ref(), None | Some(LogicalType::Integer { .. }))
        && matches!(
            column.converted_type(),
            ConvertedType::NONE
                | ConvertedType::INT_8
                | ConvertedType::INT_16
                | ConvertedType::INT_32
                | ConvertedType::INT_64
                | ConvertedType::UINT_8
                | ConvertedType::UINT_16
                | ConvertedType::UINT_32
                | ConvertedType::UINT_64
        );
    let unsigned = matches!(
        column.converted_type(),
        ConvertedType::UINT_8 | ConvertedType::UINT_16 | ConvertedType::UINT_32 | ConvertedType::UINT_64
    );
    match column.physical_type() {
        Type::BYTE_ARRAY if column.converted_type() != ConvertedType::DECIMAL => Ok(Column { leaf, unsigned }),
        Type::INT32 | Type::INT64 if kind == Kind::Id && plain_integer => Ok(Column { leaf, unsigned }),
        other => Err(wrong(match column.converted_type() {
            ConvertedType::NONE => format!("a column of type {other}"),
            converted => format!("a column of type {other} ({converted})"),
        })),
    }
}

/// One row, judged.
fn entry(source: Source, id: Option<RawId>, text: Option<ByteArray>, options: &CorpusOptions) -> Entry {
    let missing = |field: &str| RejectReason::MissingField { field: field.to_owned() };
    let id = match id {
        None => Err(missing(&options.id_field)),
        Some(RawId::Integer(id)) => Ok(id),
        Some(RawId::Bytes(bytes)) => utf8(&bytes),
    };
    let text = match text {
        None => Err(missing(&options.text_field)),
        Some(bytes) if bytes.len() as u64 > options.max_document_bytes => {
            Err(RejectReason::TooLarge { bytes: bytes.len() as u64, limit: options.max_document_bytes })
        }
        Some(bytes) => utf8(&bytes),
    };
    let (id, reason) = match (id, text) {
        (Ok(id), Ok(text)) => return finish(source, id, text),
        (Err(reason), _) => (None, reason),
        (Ok(id), Err(reason)) => (Some(id), reason),
    };
    Entry::Rejected(Rejection { source, id, reason })
}

fn utf8(bytes: &ByteArray) -> Result<String, RejectReason> {
    std::str::from_utf8(bytes.data())
        .map(str::to_owned)
        .map_err(|error| RejectReason::InvalidUtf8 { offset: error.valid_up_to() as u64 })
}
