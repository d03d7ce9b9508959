//! A service with state in its memory: a queue of numbered tasks, their results, and totals that show at once
//! whether any was lost, done twice or done wrong.
//!
//! ```text
//! POST /task/N    queues task N; answered when it is in the queue
//! GET  /total     {"queued":0,"done":3,"sum":6,"check":"..."}: how many are waiting and done, the sum of the
//!                 numbers done, and a sum of all results
//! GET  /memory    {"pages":256,"writes":17,"bad":0}: looks at every byte of --memory
//! ```
//!
//! The result of a task follows from its number alone, so `check` can be computed by whoever knows which tasks
//! were given. With `--memory` it also holds so much, in pages of the kernel's size and place, and `--dirty` writes
//! to so much of it each second, page after page. A page is a stamp (its number, and how often it was written), and
//! then noise and text in turns, as they are in a program's memory, by its number alone: so it can be told of every byte
//! whether it is the one that was written last, and zstd makes a third to a quarter of the whole.
//!
//! SIGHUP: says `reloaded`. SIGTERM: ends. As a systemd service of type notify it says that it is ready, and feeds
//! the watchdog.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};

/// A queue of tasks, in memory.
#[derive(Parser)]
#[command(name = "worker")]
struct Arguments {
    /// Where to listen, on every address.
    #[arg(long, default_value_t = 7070)]
    port: u16,
    /// How long one task takes, milliseconds.
    #[arg(long, default_value_t = 0)]
    task_ms: u64,
    /// Memory to hold: 1GiB, 64MiB, or a number of MiB.
    #[arg(long, default_value = "0", value_parser = size)]
    memory: u64,
    /// How much of it to write each second: 8MiB/s, or a number of percent.
    #[arg(long, default_value = "0", value_parser = Rate::parse)]
    dirty: Rate,
}

/// Bytes.
fn size(text: &str) -> Result<u64, String> {
    let (number, shift) = match (text.strip_suffix("KiB"), text.strip_suffix("MiB"), text.strip_suffix("GiB"))
    {
        (Some(number), ..) => (number, 10),
        (_, Some(number), _) => (number, 20),
        (.., Some(number)) => (number, 30),
        _ => (text, 20),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("'{text}' is no size: give 64MiB, 1GiB, or a number of MiB"))
}

/// How fast memory is written.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rate {
    Bytes(u64),
    Percent(f64),
}

impl Rate {
    fn parse(text: &str) -> Result<Self, String> {
        if let Some(bytes) = text.strip_suffix("/s") {
            return size(bytes).map(Self::Bytes);
        }
        let percent = text.parse().ok().filter(|percent| (0.0..=1e6).contains(percent));
        percent
            .map(Self::Percent)
            .ok_or_else(|| format!("'{text}' is no rate: give 8MiB/s, or a number of percent"))
    }

    /// Pages a second.
    fn of(self, memory: u64) -> f64 {
        let bytes = match self {
            Self::Bytes(bytes) => bytes as f64,
            Self::Percent(percent) => memory as f64 * percent / 100.0,
        };
        bytes / PAGE as f64
    }
}

const PAGE: usize = 4096;
const STAMP: usize = 16;
/// How often pages are written.
const DIRTY_EVERY: Duration = Duration::from_millis(10);

#[derive(Default)]
struct Queue {
    waiting: VecDeque<u64>,
    done: Vec<(u64, u64)>,
}

/// One page, of the kernel's too.
#[repr(align(4096))]
struct Page([u8; PAGE]);

#[derive(Default)]
struct Memory {
    pages: Vec<Page>,
    /// How often each page was written.
    writes: Vec<u64>,
    next: usize,
}

struct State {
    queue: Mutex<Queue>,
    more: Condvar,
    memory: Mutex<Memory>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<std::convert::Infallible> {
    // Before there are other threads, so that none of them takes a signal.
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGTERM]);
    signals.thread_block()?;
    let listener = TcpListener::bind(("0.0.0.0", arguments.port))
        .with_context(|| format!("port {} cannot be had", arguments.port))?;
    let state = Arc::new(State {
        queue: Mutex::default(),
        more: Condvar::new(),
        memory: Mutex::new(Memory::of(arguments.memory)),
    });
    let task = Duration::from_millis(arguments.task_ms);
    spawn(&state, move |state| work(state, task));
    let pages = arguments.dirty.of(arguments.memory) * DIRTY_EVERY.as_secs_f64();
    if pages > 0.0 {
        spawn(&state, move |state| dirty(state, pages));
    }
    spawn(&state, move |_| obey(&signals));
    spawn(&state, |_| feed_watchdog());
    println!("worker listens on port {}", arguments.port);
    notify("READY=1");
    loop {
        match listener.accept() {
            Ok((stream, _)) => spawn(&state, move |state| {
                // A client may leave at any time.
                let _ = serve(state, &stream);
            }),
            Err(error) => eprintln!("no connection accepted: {error}"),
        }
    }
}

fn spawn(state: &Arc<State>, work: impl FnOnce(&State) + Send + 'static) {
    let state = Arc::clone(state);
    thread::spawn(move || work(&state));
}

/// The result of a task. Any function whose sum would show a task that was lost or done twice (SplitMix64).
fn result(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn work(state: &State, takes: Duration) {
    let mut queue = state.queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match queue.waiting.front().copied() {
            None => queue = state.more.wait(queue).unwrap_or_else(PoisonError::into_inner),
            Some(number) if takes.is_zero() => finish(&mut queue, number),
            Some(number) => {
                // It stays first in the queue until it is done: it is always counted exactly once.
                drop(queue);
                thread::sleep(takes);
                queue = state.queue.lock().unwrap_or_else(PoisonError::into_inner);
                finish(&mut queue, number);
            }
        }
    }
}

fn finish(queue: &mut Queue, number: u64) {
    queue.waiting.pop_front();
    queue.done.push((number, result(number)));
    println!("task {number} done");
}

impl Memory {
    fn of(bytes: u64) -> Self {
        let pages: Vec<_> = (0..bytes as usize / PAGE).map(|index| Page::new(index, 0)).collect();
        Self { writes: vec![0; pages.len()], pages, next: 0 }
    }

    fn write_next(&mut self) {
        let index = self.next;
        self.writes[index] += 1;
        self.pages[index].stamp(index, self.writes[index]);
        self.next = (index + 1) % self.pages.len();
    }

    fn bad(&self) -> usize {
        let pages = self.pages.iter().zip(&self.writes).enumerate();
        pages.filter(|(index, (page, writes))| page.0 != Page::new(*index, **writes).0).count()
    }
}

impl Page {
    fn new(index: usize, writes: u64) -> Self {
        const TEXT: &[u8; 24] = b"a page of the worker's, ";
        let mut page = Self([0; PAGE]);
        for (at, words) in page.0.chunks_exact_mut(32).enumerate() {
            words[..8].copy_from_slice(&result((index * PAGE + at) as u64).to_le_bytes());
            words[8..].copy_from_slice(TEXT);
        }
        page.stamp(index, writes);
        page
    }

    fn stamp(&mut self, index: usize, writes: u64) {
        self.0[..STAMP].copy_from_slice(&(u128::from(writes) << 64 | index as u128).to_le_bytes());
    }
}

/// Writes so many pages each [`DIRTY_EVERY`], one after another.
fn dirty(state: &State, pages: f64) {
    let mut owed = 0.0;
    loop {
        {
            let mut memory = state.memory.lock().unwrap_or_else(PoisonError::into_inner);
            if memory.pages.is_empty() {
                return;
            }
            owed += pages;
            while owed >= 1.0 {
                memory.write_next();
                owed -= 1.0;
            }
        }
        thread::sleep(DIRTY_EVERY);
    }
}

fn serve(state: &State, stream: &TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    // Request after request, on one connection.
    while let Some(request) = lines.next() {
        let request = request?;
        let mut words = request.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut close = false;
        for header in lines.by_ref() {
            let header = header?;
            if header.is_empty() {
                break;
            }
            close |= header.eq_ignore_ascii_case("connection: close");
        }
        let task = path.strip_prefix("/task/").and_then(|number| number.parse::<u64>().ok());
        let (code, body) = match (method, path, task) {
            ("POST", _, Some(number)) => {
                let mut queue = state.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.waiting.push_back(number);
                state.more.notify_one();
                ("200 OK", format!("{{\"task\":{number}}}\n"))
            }
            ("GET", "/total", _) => ("200 OK", total(state)),
            ("GET", "/memory", _) => ("200 OK", memory(state)),
            _ => ("404 Not Found", "{\"error\":\"POST /task/N, GET /total, GET /memory\"}\n".to_owned()),
        };
        let length = body.len();
        let head =
            format!("HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
        let mut stream = stream;
        stream.write_all(format!("{head}{body}").as_bytes())?;
        if close {
            break;
        }
    }
    Ok(())
}

fn total(state: &State) -> String {
    let queue = state.queue.lock().unwrap_or_else(PoisonError::into_inner);
    let sum = queue.done.iter().fold(0_u64, |sum, (number, _)| sum.wrapping_add(*number));
    let check = queue.done.iter().fold(0_u64, |check, (_, result)| check.wrapping_add(*result));
    let (waiting, done) = (queue.waiting.len(), queue.done.len());
    format!("{{\"queued\":{waiting},\"done\":{done},\"sum\":{sum},\"check\":\"{check:016x}\"}}\n")
}

fn memory(state: &State) -> String {
    let memory = state.memory.lock().unwrap_or_else(PoisonError::into_inner);
    let writes: u64 = memory.writes.iter().sum();
    format!("{{\"pages\":{},\"writes\":{writes},\"bad\":{}}}\n", memory.pages.len(), memory.bad())
}

fn obey(signals: &SigSet) {
    loop {
        match signals.wait() {
            Ok(Signal::SIGHUP) => println!("reloaded"),
            Ok(_) => {
                println!("worker ends");
                std::process::exit(0);
            }
            Err(errno) => eprintln!("no signals: {errno}"),
        }
    }
}

fn feed_watchdog() {
    let limit = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
    let Some(limit) = limit.map(Duration::from_micros) else { return };
    loop {
        let fed = Instant::now();
        notify("WATCHDOG=1");
        thread::sleep((limit / 3).saturating_sub(fed.elapsed()));
    }
}

/// Tells systemd, see sd_notify(3). Without one there is nobody to tell.
fn notify(what: &str) {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let place = place.to_string_lossy();
    let address = match place.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&*place),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address));
    if let Err(error) = sent {
        eprintln!("systemd cannot be told {what}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(memory: u64) -> State {
        State { queue: Mutex::default(), more: Condvar::new(), memory: Mutex::new(Memory::of(memory)) }
    }

    #[test]
    fn totals_show_a_task_that_is_lost_or_done_twice() {
        let total_of = |numbers: &[u64]| {
            let state = state(0);
            for number in numbers {
                finish(&mut state.queue.lock().unwrap(), *number);
            }
            total(&state)
        };
        let whole = total_of(&[1, 2, 3]);
        assert!(whole.contains("\"done\":3,\"sum\":6,"), "{whole}");
        assert_eq!(whole, total_of(&[3, 1, 2]));
        assert_ne!(whole, total_of(&[1, 2]));
        assert_ne!(whole, total_of(&[2, 2, 2]));
    }

    #[test]
    fn a_page_that_is_not_the_last_written_is_bad() {
        let state = state(1 << 20);
        {
            let mut memory = state.memory.lock().unwrap();
            assert_eq!(memory.pages.len(), 256);
            (0..300).for_each(|_| memory.write_next());
            assert_eq!((memory.bad(), memory.writes[0], memory.writes[255]), (0, 2, 1));
            memory.pages[7].stamp(7, 1);
            memory.pages.swap(20, 21);
            memory.pages[30].0[PAGE - 1] ^= 1;
        }
        assert_eq!(memory(&state), "{\"pages\":256,\"writes\":300,\"bad\":4}\n");
    }

    #[test]
    fn sizes_and_rates_are_read_and_nonsense_is_refused() {
        assert_eq!((size("1GiB"), size("64MiB"), size("4")), (Ok(1 << 30), Ok(64 << 20), Ok(4 << 20)));
        assert_eq!(
            (Rate::parse("8MiB/s"), Rate::parse("50")),
            (Ok(Rate::Bytes(8 << 20)), Ok(Rate::Percent(50.0)))
        );
        assert_eq!((Rate::Bytes(8 << 20).of(0), Rate::Percent(50.0).of(64 << 20)), (2048.0, 8192.0));
        for wrong in ["", "x", "-1", "1TiB", "99999999999999999999GiB", "18446744073709551615"] {
            assert!(size(wrong).is_err() && Rate::parse(&format!("{wrong}/s")).is_err(), "{wrong}");
        }
        assert!(Rate::parse("-1").is_err() && Rate::parse("NaN").is_err());
    }
}
