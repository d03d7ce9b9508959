//! Records of the ring buffer become [`ProbeEvent`]s.

use std::collections::{HashSet, VecDeque};

use agent_ebpf::{ExecRecord, ExitRecord, ForkRecord, Header, NO_SLOT, OomRecord, SignalRecord, Who, kind};

use super::{BootNs, ProbeEvent, Slot};
use crate::event::{ExitStatus, Process};

/// How many ends of processes are remembered to tell a second report of the same from a new one.
/// Two threads that both seem the last exit within microseconds of each other.
const REMEMBERED: usize = 1024;

/// A record that is none of ours: wrong length or kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Remembers what is needed to report a process's end once.
#[derive(Debug)]
pub(super) struct Decoder {
    page_size: u64,
    ended: HashSet<(u32, u64)>,
    order: VecDeque<(u32, u64)>,
}

impl Decoder {
    /// `page_size` in bytes.
    pub(super) fn new(page_size: u64) -> Self {
        Self { page_size, ended: HashSet::new(), order: VecDeque::new() }
    }

    /// `Ok(None)` for the second report of one process's end.
    pub(super) fn decode(&mut self, bytes: &[u8]) -> Result<Option<ProbeEvent>, Malformed> {
        let mut reader = Words(bytes);
        let header = Header { kind: reader.u32()?, slot: reader.u32()?, at: reader.u64()? };
        let at = BootNs(header.at);
        let watched = (header.slot != NO_SLOT).then_some(Slot(header.slot));
        let expected = match header.kind {
            kind::EXIT => size_of::<ExitRecord>(),
            kind::OOM => size_of::<OomRecord>(),
            kind::SIGNAL => size_of::<SignalRecord>(),
            kind::FORK => size_of::<ForkRecord>(),
            kind::EXEC => size_of::<ExecRecord>(),
            _ => return Err(Malformed),
        };
        // The kernel rounds records up to eight bytes; these are multiples already.
        if bytes.len() != expected {
            return Err(Malformed);
        }
        Ok(Some(match header.kind {
            kind::EXIT => {
                let who = reader.who()?;
                let (ppid, status, tgid, _reserved) =
                    (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
                let (started, max_rss_pages) = (reader.u64()?, reader.u64()?);
                if !self.is_first_end(tgid, started) {
                    return Ok(None);
                }
                ProbeEvent::Exit {
                    at,
                    slot: watched,
                    process: process(&who),
                    ppid,
                    status: Some(ExitStatus::from_wait(status.cast_signed())),
                    run_ns: header.at.saturating_sub(started),
                    max_rss: max_rss_pages.saturating_mul(self.page_size),
                }
            }
            kind::OOM => {
                let who = reader.who()?;
                let mut rss = [0; 3];
                for bytes in &mut rss {
                    *bytes = reader.u64()?.saturating_mul(self.page_size);
                }
                ProbeEvent::Oom { at, slot: watched, process: process(&who), rss }
            }
            kind::SIGNAL => {
                let who = reader.who()?;
                ProbeEvent::Signal {
                    at,
                    slot: watched.ok_or(Malformed)?,
                    sender: process(&who),
                    target: reader.u32()?,
                    signal: reader.u32()?.cast_signed(),
                }
            }
            kind::FORK => ProbeEvent::Fork {
                at,
                slot: watched.ok_or(Malformed)?,
                parent: reader.u32()?,
                child: reader.u32()?,
            },
            _ => ProbeEvent::Exec { at, slot: watched.ok_or(Malformed)?, process: process(&reader.who()?) },
        }))
    }

    fn is_first_end(&mut self, tgid: u32, started: u64) -> bool {
        let identity = (tgid, started);
        if !self.ended.insert(identity) {
            return false;
        }
        self.order.push_back(identity);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ended.remove(&oldest);
        }
        true
    }
}

fn process(who: &Who) -> Process {
    let len = who.comm.iter().position(|&byte| byte == 0).unwrap_or(who.comm.len());
    Process { pid: who.pid, comm: String::from_utf8_lossy(&who.comm[..len]).into_owned(), uid: who.uid }
}

/// Takes fields off the front, in the order in which the structures declare them.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*first)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }

    fn who(&mut self) -> Result<Who, Malformed> {
        Ok(Who { pid: self.u32()?, uid: self.u32()?, comm: self.take()? })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit_bytes(slot: u32, status: u32, tgid: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [kind::EXIT, slot] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(5_000_u64.to_ne_bytes());
        for word in [12_u32, 33] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(b"nginx\0garbage\0\0\0");
        for word in [1_u32, status, tgid, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(4_000_u64.to_ne_bytes());
        bytes.extend(3_u64.to_ne_bytes());
        bytes
    }

    #[test]
    fn an_exit_record_is_read_whole() {
        let event = Decoder::new(4096).decode(&exit_bytes(2, 0x8b, 77)).unwrap().unwrap();
        assert_eq!(
            event,
            ProbeEvent::Exit {
                at: BootNs(5_000),
                slot: Some(Slot(2)),
                process: Process { pid: 12, comm: "nginx".into(), uid: 33 },
                ppid: 1,
                status: Some(ExitStatus::Signal { signal: 11, core: true }),
                run_ns: 1_000,
                max_rss: 3 * 4096,
            }
        );
    }

    #[test]
    fn no_slot_is_none() {
        let event = Decoder::new(4096).decode(&exit_bytes(NO_SLOT, 0x0700, 77)).unwrap().unwrap();
        let ProbeEvent::Exit { slot, status, .. } = event else { panic!("{event:?}") };
        assert_eq!((slot, status), (None, Some(ExitStatus::Code(7))));
    }

    #[test]
    fn one_end_is_told_once() {
        let mut decoder = Decoder::new(4096);
        assert!(decoder.decode(&exit_bytes(0, 0, 1)).unwrap().is_some());
        assert!(decoder.decode(&exit_bytes(0, 0, 1)).unwrap().is_none());
        for tgid in 2..=REMEMBERED as u32 + 1 {
            assert!(decoder.decode(&exit_bytes(0, 0, tgid)).unwrap().is_some());
        }
        assert_eq!(decoder.ended.len(), REMEMBERED);
        assert!(decoder.decode(&exit_bytes(0, 0, 1)).unwrap().is_some(), "the oldest is forgotten");
    }

    #[test]
    fn wrong_lengths_and_kinds_are_malformed() {
        let mut decoder = Decoder::new(4096);
        let bytes = exit_bytes(0, 0, 1);
        for len in 0..bytes.len() {
            assert_eq!(decoder.decode(&bytes[..len]), Err(Malformed));
        }
        let mut unknown = bytes;
        unknown[0] = 99;
        assert_eq!(decoder.decode(&unknown), Err(Malformed));
    }

    proptest! {
        #[test]
        fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..128), of in 0_u8..7) {
            let mut noise = noise;
            if let Some(first) = noise.first_mut() { *first = of; }
            if let Some(rest) = noise.get_mut(1..4) { rest.fill(0); }
            let _ = Decoder::new(4096).decode(&noise);
        }
    }
}
