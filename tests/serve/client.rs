//! An HTTP client: a connection for each request.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use super::PATIENCE;

#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    /// Sent with each request.
    pub headers: Vec<String>,
}

/// A response whose head has come.
pub struct Response {
    pub status: u16,
    pub head: String,
    reader: BufReader<TcpStream>,
    body: Body,
}

enum Body {
    Chunked,
    Length(usize),
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, headers: Vec::new() }
    }

    /// The same with another header.
    pub fn with(&self, header: &str) -> Self {
        let mut headers = self.headers.clone();
        headers.push(header.to_owned());
        Self { headers, ..*self }
    }

    /// Sends a request and leaves the connection as it is.
    pub fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        if !self.headers.iter().any(|header| header.to_lowercase().starts_with("host:")) {
            head += &format!("host: {}\r\n", self.address);
        }
        if !body.is_empty() {
            head += &format!("content-length: {}\r\n", body.len());
            if !self.headers.iter().any(|header| header.to_lowercase().starts_with("content-type:")) {
                head += "content-type: application/json\r\n";
            }
        }
        self.headers.iter().for_each(|header| head += &format!("{header}\r\n"));
        // The server may answer before it has read everything.
        let _ = stream.write_all(format!("{head}\r\n{body}").as_bytes());
        stream
    }

    /// Sends a request and reads the head of its response.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Response {
        Response::read(self.send(method, path, body))
    }

    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path, "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.request("POST", path, &body.to_string())
    }

    /// The JSON that a good request gives.
    #[track_caller]
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        self.post(path, body).expect(200).json()
    }

    /// `/v1/completions`.
    #[track_caller]
    pub fn complete(&self, body: &Value) -> Value {
        self.ask("/v1/completions", body)
    }
}

impl Response {
    pub fn read(stream: TcpStream) -> Self {
        let (mut reader, mut head) = (BufReader::new(stream), String::new());
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "the connection ended after {head:?}");
        }
        let head = head.to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let body = match length {
            Some(length) => Body::Length(length.parse().unwrap()),
            None => Body::Chunked,
        };
        Self { status, head, reader, body }
    }

    /// Panics with the body unless the status is this.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        if self.status == status {
            return self;
        }
        let head = self.head.clone();
        panic!("expected {status}\n{head}{}", self.text());
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")))
    }

    /// Reads the rest.
    pub fn text(mut self) -> String {
        let mut text = Vec::new();
        match self.body {
            Body::Length(length) => {
                text.resize(length, 0);
                self.reader.read_exact(&mut text).unwrap();
            }
            Body::Chunked => {
                while let Some(chunk) = self.chunk() {
                    text.extend(chunk);
                }
            }
        }
        String::from_utf8(text).unwrap()
    }

    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The next chunk of a body that comes in chunks; `None` at its end.
    fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        let length = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("the stream was cut: {line:?}"));
        let mut chunk = vec![0; length + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        chunk.truncate(length);
        (length > 0).then_some(chunk)
    }

    /// The next event of a stream, without what keeps it alive; `None` at its end.
    pub fn event(&mut self) -> Option<String> {
        loop {
            let chunk = String::from_utf8(self.chunk()?).unwrap();
            if let Some(data) = chunk.strip_prefix("data: ") {
                return Some(data.strip_suffix("\n\n").unwrap().to_owned());
            }
        }
    }

    /// All events of a stream, which must end as it should.
    pub fn events(mut self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let mut events: Vec<String> = std::iter::from_fn(|| self.event()).collect();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}
