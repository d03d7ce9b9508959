//! Why a connection did not come about or ended, in words for people; and who was turned away, told without flooding
//! the events.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use quinn::{ConnectionError, VarInt};
use tokio::time::Instant;

use crate::event::{Kind, bus::Bus};

/// Codes with which ftd closes a connection.
pub(super) mod code {
    /// ftd is told to stop.
    pub(in crate::peer) const STOPPING: u32 = 0;
    /// There is another connection between the two.
    pub(in crate::peer) const DOUBLE: u32 = 1;
    /// The other side's certificate was revoked.
    pub(in crate::peer) const REVOKED: u32 = 2;
    /// It has ended.
    pub(in crate::peer) const EXPIRED: u32 = 3;
    /// The other side is not wanted, for the reason that is given.
    pub(in crate::peer) const UNWANTED: u32 = 4;
    /// All is said.
    pub(in crate::peer) const DONE: u32 = 5;
}

/// A cause and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Why {
    pub(super) cause: String,
    pub(super) mend: String,
    /// It does not pass by itself: the other side does not want this one, or this one not the other.
    pub(super) refusal: bool,
}

impl Why {
    pub(super) fn new(cause: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { cause: cause.into(), mend: mend.into(), refusal: false }
    }

    /// The same, as one that does not pass by itself.
    fn for_good(self) -> Self {
        Self { refusal: true, ..self }
    }
}

const JOIN_AGAIN: &str = "let it join again: ftctl cluster token on the node that has the CA, ftctl cluster join \
                          TOKEN on the other";

/// What a connection's end means.
pub(super) fn why(error: &ConnectionError) -> Why {
    match error {
        ConnectionError::TransportError(error) => {
            tls(error.code.into(), false).map_or_else(|| Why::new(error.to_string(), ""), Why::for_good)
        }
        ConnectionError::ConnectionClosed(close) => tls(close.error_code.into(), true).map_or_else(
            || Why::new(format!("the other side ended the connection: {close}"), ""),
            Why::for_good,
        ),
        ConnectionError::ApplicationClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason).into_owned();
            match close.error_code.into_inner() {
                n if n == u64::from(code::STOPPING) => {
                    Why::new("ftd was stopped there", "start it there again")
                }
                n if n == u64::from(code::DOUBLE) => Why::new("there is another connection", ""),
                n if n == u64::from(code::UNWANTED) => {
                    Why::new(format!("it does not want this node: {reason}"), "see the events there")
                        .for_good()
                }
                n if n == u64::from(code::REVOKED) => {
                    Why::new("it says that this node's certificate was revoked", JOIN_AGAIN).for_good()
                }
                n if n == u64::from(code::EXPIRED) => {
                    Why::new("it says that this node's certificate has ended", JOIN_AGAIN).for_good()
                }
                _ => Why::new(format!("the other side ended the connection: {reason}"), ""),
            }
        }
        ConnectionError::TimedOut => Why::new(
            "nothing is heard of it",
            "see whether the host runs, ftd on it, and the network between; UDP to node.listen must be let through",
        ),
        ConnectionError::Reset => Why::new(
            "it knows nothing of the connection: ftd was started anew there",
            "if it does not come back: systemctl status ftd, journalctl -u ftd there",
        ),
        ConnectionError::VersionMismatch => {
            Why::new("it speaks another version of QUIC", "install the same ftd on both")
        }
        ConnectionError::LocallyClosed => Why::new("it was ended here", ""),
        error @ ConnectionError::CidsExhausted => Why::new(error.to_string(), ""),
    }
}

/// What TLS's alerts mean (RFC 8446, 6), as QUIC has them (RFC 9001, 4.8); `there`: the other side refused.
fn tls(code: u64, there: bool) -> Option<Why> {
    let alert = code.checked_sub(0x100).filter(|alert| *alert < 0x100)?;
    let (whose, by) =
        if there { ("this node's certificate", "it says that ") } else { ("its certificate", "") };
    let clocks = "compare the clocks of both nodes";
    Some(match alert {
        44 => Why::new(format!("{by}{whose} was revoked"), JOIN_AGAIN),
        45 => {
            Why::new(format!("{by}{whose} has ended, or has not begun"), format!("{clocks}; or {JOIN_AGAIN}"))
        }
        // 51: of a CA of the same name, but another key.
        48 | 51 => Why::new(
            format!("{by}{whose} is of another cluster"),
            "see that both nodes joined the same cluster: ftctl cluster peers",
        ),
        42 | 43 | 46 | 112 => Why::new(
            format!("{by}{whose} is for another node, or makes no sense"),
            "compare cluster.peers here with node.name there",
        ),
        116 => Why::new(
            if there { "it wants a certificate of the cluster" } else { "it shows no certificate" },
            "only nodes of the cluster are let in: ftctl cluster join",
        ),
        120 => Why::new(
            "it speaks another version of ftd's protocol, or another protocol",
            "install the same ftd on both",
        ),
        alert => Why::new(format!("TLS failed (alert {alert})"), ""),
    })
}

/// The code and reason to close with.
pub(super) fn close(connection: &quinn::Connection, code: u32, reason: &str) {
    connection.close(VarInt::from_u32(code), reason.as_bytes());
}

/// The same is told again after this long, with how often it was.
const AGAIN: Duration = Duration::from_mins(1);
/// So many different ones are told in that time; all others are told together.
const DIFFERENT: usize = 16;

/// Who is turned away, and how often.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    known: Mutex<HashMap<(String, String), Known>>,
}

#[derive(Debug)]
struct Known {
    told: Instant,
    untold: u64,
    mend: String,
}

/// An event that is due.
fn event(from: String, cause: String, mend: String, times: u64) -> Kind {
    Kind::PeerRefused { from, cause, mend, times }
}

impl Refusals {
    /// Somebody was turned away, here or by this peer. Told at once, unless it was just told.
    pub(super) fn tell(&self, bus: &Bus, from: &str, why: &Why) {
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (from.to_owned(), why.cause.clone());
        if known.len() >= DIFFERENT && !known.contains_key(&key) {
            key = ("many".into(), "see the others of this kind".into());
        }
        if let Some(one) = known.get_mut(&key) {
            one.untold += 1;
            return;
        }
        known.insert(key.clone(), Known { told: now, untold: 0, mend: why.mend.clone() });
        drop(known);
        tracing::warn!(from, cause = why.cause, "refused");
        bus.emit(None, None, event(key.0, key.1, why.mend.clone(), 1));
    }

    /// Tells what has come together; to be called now and then. Answers whether there is anything left to tell.
    fn flush(&self, bus: &Bus, now: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut due = Vec::new();
        known.retain(|(from, cause), one| {
            if now - one.told < AGAIN {
                return true;
            }
            if one.untold == 0 {
                return false;
            }
            due.push(event(from.clone(), cause.clone(), one.mend.clone(), one.untold));
            (one.told, one.untold) = (now, 0);
            true
        });
        drop(known);
        for kind in due {
            bus.emit(None, None, kind);
        }
    }

    /// Tells what has come together, for ever.
    pub(super) async fn keep_telling(&self, bus: &Bus) {
        let mut turns = tokio::time::interval(AGAIN);
        loop {
            self.flush(bus, turns.tick().await);
        }
    }
}

/// How an address is named in events: without the port, which is another one each time.
pub(super) fn named(address: IpAddr) -> String {
    address.to_canonical().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_is_told_once_and_then_counted_and_a_flood_is_told_together() {
        let (bus, _queue) = Bus::new("n".into(), 0);
        let refusals = Refusals::default();
        for _ in 0..5 {
            refusals.tell(&bus, "10.0.0.9", &Why::new("no certificate", "join"));
        }
        for n in 0..100 {
            refusals.tell(&bus, &format!("10.1.0.{n}"), &Why::new("rubbish", ""));
        }
        refusals.flush(&bus, Instant::now() + AGAIN);
        let told: Vec<_> = bus.recent_and_follow().0.into_iter().map(|event| event.kind.clone()).collect();
        let times = |from: &str| -> Vec<u64> {
            let of = |kind: &Kind| match kind {
                Kind::PeerRefused { from: who, times, .. } if who == from => Some(*times),
                _ => None,
            };
            told.iter().filter_map(of).collect()
        };
        assert_eq!(times("10.0.0.9"), [1, 4]);
        // Sixteen by name; all that came is accounted for.
        let sum: u64 = (0..100).flat_map(|n| times(&format!("10.1.0.{n}"))).chain(times("many")).sum();
        assert_eq!((sum, told.len()), (100, 19));
    }
}
