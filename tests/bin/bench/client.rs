//! The one client of all measurements: how soon does nginx answer a new connection?

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::clock;

/// How long one try may take. A SYN that nobody answered is sent anew, not waited for.
const TRY: Duration = Duration::from_millis(200);
/// When waiting is given up.
const LIMIT: Duration = Duration::from_secs(30);
/// The header in which nginx names its worker process; the site's configuration adds it.
pub(crate) const WORKER: &str = "x-worker";

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// When its head had been read.
    pub(crate) at: u64,
    /// The worker process that gave it.
    pub(crate) worker: u32,
}

/// Opens new connections, one after another and without a pause, until one is answered with status 200 by
/// a worker that is not one of `not_by` (a process that has been killed may still answer for microseconds).
pub(crate) fn first_answer(address: Ipv4Addr, not_by: &[u32]) -> Result<Answer> {
    let server = SocketAddr::from((address, 80));
    let give_up = clock::now() + u64::try_from(LIMIT.as_nanos())?;
    loop {
        // Refused, reset, closed: nobody is there yet. Which of these it is depends on the moment.
        if let Ok(Some(answer)) = ask(server)
            && !not_by.contains(&answer.worker)
        {
            return Ok(answer);
        }
        ensure!(clock::now() < give_up, "nginx at {server} does not answer within {LIMIT:?}");
    }
}

/// One connection, one question: `None` for any answer but 200.
fn ask(server: SocketAddr) -> std::io::Result<Option<Answer>> {
    let mut stream = TcpStream::connect_timeout(&server, TRY)?;
    stream.set_read_timeout(Some(TRY))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    while !text.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Ok(None),
            n => text.extend_from_slice(&piece[..n]),
        }
    }
    let at = clock::now();
    let head = String::from_utf8_lossy(&text).to_ascii_lowercase();
    let ok = head.starts_with("http/1.1 200 ");
    let worker = head.lines().find_map(|line| line.strip_prefix(WORKER)?.strip_prefix(": ")?.parse().ok());
    Ok(ok.then_some(at).zip(worker).map(|(at, worker)| Answer { at, worker }))
}

/// Whether it answers at all, now.
pub(crate) fn answers(address: Ipv4Addr) -> Result<()> {
    first_answer(address, &[]).map(drop).context("before the measurement")
}
