//! The direct way to PID 1: the socket on which systemd itself serves root's D-Bus calls.
//!
//! It spares each call the hop through the message bus, and works when the bus does not. Two things set
//! it apart from a bus. There is no `Hello`: the two sides are peers. And systemd signs what it sends
//! with its well-known name, `org.freedesktop.systemd1`, where the D-Bus specification ("Header Fields",
//! SENDER) wants a unique name, which begins with a colon; zbus, rightly, refuses such a header.
//! [`Signature`] follows the framing of the incoming stream and makes the first letter of that name a colon,
//! in headers only: `:rg.freedesktop.systemd1` is a valid unique name of the same length.

use std::{io, os::fd::BorrowedFd, path::Path, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use zbus::{
    Connection,
    connection::socket::{ReadHalf, Split, WriteHalf},
};

/// How long PID 1 may take to let us in.
const LIMIT: Duration = Duration::from_secs(5);

/// Connects to systemd's own socket.
pub(super) async fn connect(path: &Path) -> zbus::Result<Connection> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let (reader, writer, guid) = timeout(LIMIT, authenticate(path)).await.map_err(late)??;
    let read: Box<dyn ReadHalf> = Box::new(Incoming { reader, signature: Signature::default() });
    let write: Box<dyn WriteHalf> = Box::new(Outgoing(writer));
    let socket = Split::new(read, write);
    zbus::connection::Builder::authenticated_socket(socket, guid.as_str()).p2p().build().await
}

/// The handshake of the D-Bus specification, "Authentication Protocol": EXTERNAL, that is, the kernel
/// vouches for our user id. BEGIN goes out with it, and the first call only after the answer: PID 1 leaves a
/// call that it reads together with BEGIN lying until something else comes.
async fn authenticate(path: &Path) -> io::Result<(BufReader<OwnedReadHalf>, OwnedWriteHalf, String)> {
    let (reader, mut writer) = UnixStream::connect(path).await?.into_split();
    let mut reader = BufReader::new(reader);
    let uid = nix::unistd::geteuid().to_string();
    let uid: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
    writer.write_all(format!("\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n").as_bytes()).await?;
    let mut answer = String::new();
    reader.read_line(&mut answer).await?;
    match answer.trim_end().strip_prefix("OK ") {
        Some(guid) => Ok((reader, writer, guid.to_owned())),
        None => Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("PID 1 says {answer:?}"))),
    }
}

#[derive(Debug)]
struct Incoming {
    reader: BufReader<OwnedReadHalf>,
    signature: Signature,
}

#[async_trait::async_trait]
impl ReadHalf for Incoming {
    async fn recvmsg(&mut self, buf: &mut [u8]) -> io::Result<(usize, Vec<std::os::fd::OwnedFd>)> {
        let n = self.reader.read(buf).await?;
        self.signature.correct(&mut buf[..n]);
        Ok((n, Vec::new()))
    }
}

#[derive(Debug)]
struct Outgoing(OwnedWriteHalf);

#[async_trait::async_trait]
impl WriteHalf for Outgoing {
    async fn sendmsg(&mut self, buffer: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        if fds.is_empty() {
            self.0.write(buffer).await
        } else {
            Err(io::Error::new(io::ErrorKind::Unsupported, "no call of ftd's passes file descriptors"))
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}

/// Bytes of the fixed part of a header, see the specification's "Message Format".
const FIXED: usize = 16;
/// How a SENDER field of 24 letters begins: field code 7, a variant of signature `s`, the length.
const SENDER: [u8; 8] = [7, 1, b's', 0, 24, 0, 0, 0];

/// Follows the messages in a stream of bytes, however it is cut, and corrects their SENDER.
#[derive(Debug, Default)]
struct Signature {
    fixed: Vec<u8>,
    fields_left: usize,
    body_left: usize,
    matched: usize,
}

impl Signature {
    fn correct(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            if self.fields_left == 0 && self.body_left == 0 {
                self.fixed.push(*byte);
                if self.fixed.len() == FIXED {
                    self.begin();
                }
            } else if self.fields_left > 0 {
                self.fields_left -= 1;
                if self.matched == SENDER.len() {
                    self.matched = 0;
                    if *byte == b'o' {
                        *byte = b':';
                    }
                } else if *byte == SENDER[self.matched] {
                    self.matched += 1;
                } else {
                    self.matched = usize::from(*byte == SENDER[0]);
                }
            } else {
                self.body_left -= 1;
            }
        }
    }

    /// The fixed part is whole: it says how long the fields and the body are. systemd is on this host,
    /// so its byte order is ours.
    fn begin(&mut self) {
        let number = |at: usize| {
            let bytes = [self.fixed[at], self.fixed[at + 1], self.fixed[at + 2], self.fixed[at + 3]];
            u32::from_ne_bytes(bytes) as usize
        };
        let (body, fields) = (number(4), number(12));
        self.fields_left = fields.next_multiple_of(8);
        self.body_left = body;
        self.matched = 0;
        self.fixed.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAME: &[u8] = b"org.freedesktop.systemd1";

    /// A message with a SENDER field and a body that looks like one.
    fn message(body: &[u8]) -> Vec<u8> {
        let mut fields = vec![1, 1, b'o', 0, 2, 0, 0, 0, b'/', b'a', 0];
        fields.resize(16, 0);
        fields.extend(SENDER);
        fields.extend(NAME);
        fields.push(0);
        let mut all = vec![b'l', 4, 0, 1];
        all.extend((body.len() as u32).to_ne_bytes());
        all.extend(7_u32.to_ne_bytes());
        all.extend((fields.len() as u32).to_ne_bytes());
        fields.resize(fields.len().next_multiple_of(8), 0);
        all.extend(fields);
        all.extend(body);
        all
    }

    proptest! {
        /// However the stream is cut into pieces: each header is corrected, no body is touched.
        #[test]
        fn headers_are_corrected_and_bodies_left(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..6),
            cuts in proptest::collection::vec(1_usize..50, 1..20),
        ) {
            let lure = [&SENDER[..], NAME].concat();
            let bodies: Vec<Vec<u8>> = bodies.into_iter().map(|b| [&b[..], &lure].concat()).collect();
            let mut stream: Vec<u8> = bodies.iter().flat_map(|b| message(b)).collect();
            let wanted: Vec<u8> = bodies.iter().flat_map(|b| {
                let mut m = message(b);
                let at = m.windows(NAME.len()).position(|w| w == NAME).unwrap();
                m[at] = b':';
                m
            }).collect();
            let (mut signature, mut at, mut cuts) = (Signature::default(), 0, cuts.iter().cycle());
            while at < stream.len() {
                let end = (at + cuts.next().unwrap()).min(stream.len());
                signature.correct(&mut stream[at..end]);
                at = end;
            }
            prop_assert_eq!(stream, wanted);
        }
    }
}
