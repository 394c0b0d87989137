//! Lines of any length in bounded memory.
//!
//! In: a buffered reader. Out: one line at a time, without its line feed; of a line over the limit only the length.
//! The buffer never grows past the limit, so that a 100-MB line costs no more than the longest line that is kept.

use std::io::{self, BufRead, ErrorKind};

use memchr::memchr;

/// What stands at the reader's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line; its bytes are in [`LineReader::bytes`] until the next call.
    Kept,
    /// A line over the limit, read past and gone.
    TooLong { bytes: u64 },
    /// No more lines.
    End,
}

pub(super) struct LineReader<R> {
    reader: R,
    buffer: Vec<u8>,
    limit: usize,
    number: u64,
}

impl<R: BufRead> LineReader<R> {
    /// Lines of at most `limit` bytes are kept.
    pub fn new(reader: R, limit: u64) -> Self {
        Self { reader, buffer: Vec::new(), limit: usize::try_from(limit).unwrap_or(usize::MAX), number: 0 }
    }

    /// Number of the line that was read last, or that reading failed in; from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The line that was read last.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// Reads one line.
    ///
    /// # Errors
    /// When the reader fails; the begun line is lost.
    pub fn read(&mut self) -> io::Result<Line> {
        self.buffer.clear();
        self.number += 1;
        let mut length = 0_u64;
        loop {
            let available = match self.reader.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if available.is_empty() {
                // The last line needs no line feed.
                return Ok(if length == 0 { Line::End } else { self.line(length) });
            }
            let feed = memchr(b'\n', available);
            let part = &available[..feed.unwrap_or(available.len())];
            length += part.len() as u64;
            let total = self.buffer.len() + part.len();
            if length <= self.limit as u64 {
                if total > self.buffer.capacity() {
                    // Doubling, but never past the limit.
                    let capacity = (self.buffer.capacity() * 2).clamp(total, self.limit.max(total));
                    self.buffer.reserve_exact(capacity - self.buffer.len());
                }
                self.buffer.extend_from_slice(part);
            } else {
                self.buffer.clear();
            }
            let consumed = part.len() + usize::from(feed.is_some());
            self.reader.consume(consumed);
            if feed.is_some() {
                return Ok(self.line(length));
            }
        }
    }

    fn line(&self, length: u64) -> Line {
        if length > self.limit as u64 { Line::TooLong { bytes: length } } else { Line::Kept }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Read};

    use proptest::prelude::*;

    use super::*;

    /// Naive oracle: split the whole input.
    fn naive(input: &[u8], limit: usize) -> Vec<Result<Vec<u8>, u64>> {
        let mut lines: Vec<&[u8]> = input.split(|byte| *byte == b'\n').collect();
        if lines.last().is_some_and(|line| line.is_empty()) {
            lines.pop();
        }
        lines.iter().map(|line| if line.len() > limit { Err(line.len() as u64) } else { Ok(line.to_vec()) }).collect()
    }

    proptest! {
        #[test]
        fn lines_are_those_of_a_naive_split(
            input in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'a'), Just(b'\r'), any::<u8>()], 0..200),
            limit in 0_u64..20,
            buffer in 1_usize..9,
        ) {
            let mut reader = LineReader::new(BufReader::with_capacity(buffer, &input[..]), limit);
            let mut lines = vec![];
            loop {
                match reader.read().unwrap() {
                    Line::Kept => lines.push(Ok(reader.bytes().to_vec())),
                    Line::TooLong { bytes } => lines.push(Err(bytes)),
                    Line::End => break,
                }
                prop_assert_eq!(reader.number(), lines.len() as u64);
                prop_assert!(reader.buffer.capacity() <= usize::try_from(limit).unwrap().max(8));
            }
            prop_assert_eq!(lines, naive(&input, usize::try_from(limit).unwrap()));
        }
    }

    /// A file that exists nowhere: one line of `x`, then a short one.
    struct Endless {
        left: u64,
        tail: &'static [u8],
    }

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.left == 0 {
                return self.tail.read(buffer);
            }
            let length = buffer.len().min(usize::try_from(self.left).unwrap());
            buffer[..length].fill(b'x');
            self.left -= length as u64;
            Ok(length)
        }
    }

    #[test]
    fn a_line_of_100_megabytes_is_measured_in_one_megabyte_of_buffer() {
        const LIMIT: u64 = 1 << 20;
        let endless = Endless { left: 100_000_000, tail: b"\n{\"id\":1}\n" };
        let mut reader = LineReader::new(BufReader::new(endless), LIMIT);
        assert_eq!(reader.read().unwrap(), Line::TooLong { bytes: 100_000_000 });
        assert!(reader.buffer.capacity() <= usize::try_from(LIMIT).unwrap(), "{}", reader.buffer.capacity());
        assert_eq!(reader.read().unwrap(), Line::Kept);
        assert_eq!((reader.number(), reader.bytes()), (2, &b"{\"id\":1}"[..]));
        assert_eq!(reader.read().unwrap(), Line::End);
    }
}
