//! Inputs become a list of files, each with its format.
//!
//! In: folders, globs, files. Out: [`CorpusFile`]s, inputs in the order given, each input sorted by path components
//! (bytes, not locale). Links are followed. A file that two inputs name is listed once. Nothing is opened here: what
//! cannot be listed (a folder without permission, a link that leads nowhere, a loop) becomes a [`Rejection`], what has
//! an unknown extension is counted.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use serde::Serialize;
use walkdir::WalkDir;

use super::entry::{RejectReason, Rejection, Source};
use super::error::CorpusError;

/// How a file holds its documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `.txt`, `.md`: the file is one document.
    Text,
    /// `.jsonl`: a JSON object per line.
    JsonLines(Compression),
    /// `.parquet`: a document per row.
    Parquet,
}

/// How a JSONL file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// `.zst`, windows up to 128 MiB.
    Zstd,
    /// `.gz`, several members too.
    Gzip,
}

impl Format {
    /// The format that a file name promises, whatever the case of its extension.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let (stem, extension) = name.rsplit_once('.')?;
        match extension {
            "txt" | "md" => Some(Self::Text),
            "jsonl" => Some(Self::JsonLines(Compression::None)),
            "zst" if stem.ends_with(".jsonl") => Some(Self::JsonLines(Compression::Zstd)),
            "gz" if stem.ends_with(".jsonl") => Some(Self::JsonLines(Compression::Gzip)),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// One file of the corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorpusFile {
    /// The path as the input gives it; `-` is standard input.
    pub path: PathBuf,
    /// How it holds its documents.
    pub format: Format,
    /// Its size when it was listed, compressed.
    pub bytes: u64,
    /// The id of its one document if it is a text; `None` where the name is not UTF-8.
    pub(super) id: Option<String>,
}

/// What a corpus does not read, by intention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Files of folders and globs whose extension is not known.
    pub unknown_extension: u64,
    /// Files that an earlier input already names.
    pub repeated: u64,
}

/// All that the inputs name.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub files: Vec<CorpusFile>,
    pub rejected: Vec<Rejection>,
    pub skipped: Skipped,
}

/// Lists every file of one input after another; `-` is not for this function.
pub(super) struct Lister {
    listing: Listing,
    /// Resolved paths so far; only kept where two inputs could name the same file.
    seen: Option<HashSet<PathBuf>>,
}

impl Lister {
    pub fn new(several_inputs: bool) -> Self {
        Self { listing: Listing::default(), seen: several_inputs.then(HashSet::new) }
    }

    pub fn finish(self) -> Listing {
        self.listing
    }

    /// Adds standard input, whose bytes are already known.
    pub fn add_stdin(&mut self, format: Format, bytes: u64) {
        let id = (format == Format::Text).then(|| "stdin".to_owned());
        self.listing.files.push(CorpusFile { path: PathBuf::from("-"), format, bytes, id });
    }

    /// Adds a folder, a file or a glob.
    pub fn add(&mut self, input: &str) -> Result<(), CorpusError> {
        let path = Path::new(input);
        // An existing path wins over a glob: its name may hold brackets.
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => self.add_folder(input, path, None),
            Ok(metadata) => {
                if Format::of(path).is_none() {
                    return Err(CorpusError::UnknownExtension { path: path.to_owned() });
                }
                let root = path.parent().unwrap_or(Path::new(""));
                self.add_file(root, path.to_owned(), &metadata);
                Ok(())
            }
            Err(_) if input.contains(['*', '?', '[', '{']) => self.add_glob(input),
            Err(_) if std::fs::symlink_metadata(path).is_ok() && Format::of(path).is_some() => {
                // It is there but cannot be followed: a document that cannot be read, like any other.
                self.reject(path, "link leads nowhere");
                Ok(())
            }
            Err(_) => Err(CorpusError::NotFound { path: path.to_owned() }),
        }
    }

    fn add_glob(&mut self, pattern: &str) -> Result<(), CorpusError> {
        let (root, rest) = split_glob(pattern);
        let glob = GlobBuilder::new(&rest)
            .literal_separator(true)
            .build()
            .map_err(|source| CorpusError::BadGlob { pattern: pattern.to_owned(), source })?;
        let depth = if rest.contains("**") { usize::MAX } else { rest.split('/').count() };
        let root = if root.as_os_str().is_empty() { PathBuf::from(".") } else { root };
        if !root.is_dir() {
            return Err(CorpusError::NotFound { path: root });
        }
        self.add_folder(pattern, &root, Some((glob.compile_matcher(), depth)))
    }

    /// Walks a folder; with a glob, only what matches below it counts.
    fn add_folder(&mut self, input: &str, root: &Path, glob: Option<(GlobMatcher, usize)>) -> Result<(), CorpusError> {
        let found = |listing: &Listing| listing.files.len() + listing.rejected.len();
        let before = (found(&self.listing), self.listing.skipped);
        let depth = glob.as_ref().map_or(usize::MAX, |(_, depth)| *depth);
        let matches = |path: &Path| {
            let relative = path.strip_prefix(root).unwrap_or(path);
            glob.as_ref().is_none_or(|(glob, _)| glob.is_match(relative))
        };
        for item in WalkDir::new(root).follow_links(true).max_depth(depth).sort_by_file_name() {
            match item {
                Ok(item) if item.file_type().is_dir() || !matches(item.path()) => {}
                Ok(item) if Format::of(item.path()).is_none() => self.listing.skipped.unknown_extension += 1,
                Ok(item) => match item.metadata() {
                    Ok(metadata) => self.add_file(root, item.into_path(), &metadata),
                    Err(error) => self.reject_walk(item.path(), &error),
                },
                Err(error) => {
                    let path = error.path().unwrap_or(root).to_owned();
                    let is_link = std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
                    if is_link && error.loop_ancestor().is_none() && Format::of(&path).is_none() {
                        self.listing.skipped.unknown_extension += 1;
                    } else if glob.is_none() || matches(&path) || !is_link {
                        self.reject_walk(&path, &error);
                    }
                }
            }
        }
        if (found(&self.listing), self.listing.skipped.repeated) == (before.0, before.1.repeated) {
            let ignored = self.listing.skipped.unknown_extension - before.1.unknown_extension;
            return Err(CorpusError::NothingToRead { input: input.to_owned(), ignored });
        }
        Ok(())
    }

    fn add_file(&mut self, root: &Path, path: PathBuf, metadata: &std::fs::Metadata) {
        let Some(format) = Format::of(&path) else { return };
        if !metadata.is_file() {
            // A named pipe or a device would block, or never end.
            return self.reject(&path, "not a regular file");
        }
        if let Some(seen) = &mut self.seen
            && let Ok(resolved) = path.canonicalize()
            && !seen.insert(resolved)
        {
            self.listing.skipped.repeated += 1;
            return;
        }
        let id = if format == Format::Text { relative_id(root, &path) } else { None };
        // On its way back from the walk of `.`, a path loses the dot: it is only noise in messages.
        let path = path.strip_prefix(".").map(Path::to_owned).unwrap_or(path);
        self.listing.files.push(CorpusFile { path, format, bytes: metadata.len(), id });
    }

    fn reject_walk(&mut self, path: &Path, error: &walkdir::Error) {
        let cause = match (error.loop_ancestor(), error.io_error()) {
            (Some(ancestor), _) => format!("link loops back to {}", ancestor.display()),
            (None, Some(error)) => error.to_string(),
            (None, None) => error.to_string(),
        };
        self.reject(path, &cause);
    }

    fn reject(&mut self, path: &Path, cause: &str) {
        let source = Source { path: path.to_owned(), line: None };
        let reason = RejectReason::Unreadable { cause: cause.to_owned() };
        self.listing.rejected.push(Rejection { source, id: None, reason });
    }
}

/// The path below the root, with forward slashes; `None` if it is not UTF-8.
fn relative_id(root: &Path, path: &Path) -> Option<String> {
    let relative = path.strip_prefix(root).unwrap_or(path);
    let parts: Option<Vec<&str>> = relative
        .components()
        .filter(|component| *component != Component::CurDir)
        .map(|component| component.as_os_str().to_str())
        .collect();
    Some(parts?.join("/"))
}

/// The folder before the first component with a wildcard, and the pattern from there on.
fn split_glob(pattern: &str) -> (PathBuf, String) {
    let parts: Vec<&str> = pattern.split('/').collect();
    let wild = |part: &&str| part.contains(['*', '?', '[', '{', '\\']);
    let first = parts.iter().position(wild).unwrap_or(parts.len() - 1);
    let mut root = parts[..first].join("/");
    if first > 0 && root.is_empty() {
        root.push('/'); // the pattern starts at the file system's root
    }
    let rest: Vec<&str> = parts[first..].iter().copied().filter(|part| !part.is_empty() && *part != ".").collect();
    (PathBuf::from(root), rest.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_follow_the_extension_whatever_its_case() {
        let of = |name: &str| Format::of(Path::new(name));
        assert_eq!(of("a/b.TXT"), Some(Format::Text));
        assert_eq!(of("x.md"), Some(Format::Text));
        assert_eq!(of("x.jsonl.zst"), Some(Format::JsonLines(Compression::Zstd)));
        assert_eq!(of("x.JSONL.gz"), Some(Format::JsonLines(Compression::Gzip)));
        assert_eq!(of("x.parquet"), Some(Format::Parquet));
        for unknown in ["x.zst", "x.txt.gz", "x.json", "x", "txt", "x.", ".."] {
            assert_eq!(of(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn globs_split_before_the_first_wildcard() {
        let split = |pattern: &str| {
            let (root, rest) = split_glob(pattern);
            (root.to_str().unwrap().to_owned(), rest)
        };
        assert_eq!(split("docs/a/**/*.md"), ("docs/a".into(), "**/*.md".into()));
        assert_eq!(split("*.md"), (String::new(), "*.md".into()));
        assert_eq!(split("/*.md"), ("/".into(), "*.md".into()));
        assert_eq!(split("/data/x[0-9]/./a.txt"), ("/data".into(), "x[0-9]/a.txt".into()));
        assert_eq!(split("./x?/y"), (".".into(), "x?/y".into()));
    }
}
