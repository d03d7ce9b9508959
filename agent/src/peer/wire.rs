//! What goes over a connection between nodes, byte by byte.
//!
//! ```text
//! request  (bidirectional)   version u8, service u16, length u32, body
//! answer   (same stream)     outcome u8, length u32, body
//! bulk     (unidirectional)  version u8, service u16, length u32, head, and then bytes as long as there are any
//! heartbeat (datagram)       kind u8, number u64
//! ```
//!
//! Numbers are little-endian; bodies and heads are postcard. A length is compared with what the service allows before
//! a byte of memory is taken for it. The other side has shown a certificate of the cluster, and all the same nothing
//! that it sends is trusted to make sense: it may be another version, or a bug.

use quinn::{ReadExactError, RecvStream, SendStream};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Version of all that is above. What a body means is the services' business: they get new numbers.
pub(super) const VERSION: u8 = 1;
/// What no service may exceed: requests and answers are held in memory whole. What is larger goes as bulk.
pub const LONGEST: u32 = 64 << 20;

/// A kind of request to another node.
pub trait Call: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// What comes back.
    type Answer: Serialize + DeserializeOwned + Send + 'static;
    /// Its number on the wire: one of [`service`]'s.
    const SERVICE: u16;
    /// The longest request, in bytes as encoded.
    const LONGEST: u32 = 64 << 10;
    /// The longest answer.
    const LONGEST_ANSWER: u32 = 64 << 10;
}

/// A kind of bulk transfer: its head says what comes behind it.
pub trait Bulk: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Its number on the wire: one of [`service`]'s.
    const SERVICE: u16;
    /// The longest head, in bytes as encoded.
    const LONGEST: u32 = 64 << 10;
}

/// Numbers of services. One that was used once does not get another meaning.
pub mod service {
    /// Who is there; the first on each connection.
    pub const HELLO: u16 = 1;
    /// A new certificate.
    pub const RENEW: u16 = 2;
    /// The newest list of revoked certificates.
    pub const REVOKED: u16 = 3;
    /// Another connection, please.
    pub const DIAL_ANEW: u16 = 4;
    /// Replication of snapshots: 16 to 31.
    pub const REPLICATE: u16 = 16;
    /// Consensus, leases: 32 to 63.
    pub const CLUSTER: u16 = 32;
    /// Moving services: 64 to 95.
    pub const MIGRATE: u16 = 64;
    /// What tests use: never registered by ftd itself.
    pub const TEST: u16 = 0xfff0;
}

/// Why another node does not do what it was asked for, in its own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct Refusal {
    /// The thing and the cause.
    pub error: String,
    /// The mend.
    pub mend: String,
}

impl Refusal {
    /// A refusal for this reason.
    #[expect(clippy::needless_pass_by_value, reason = "every caller has an error or a text to give away")]
    pub fn new(error: impl ToString, mend: impl Into<String>) -> Self {
        Self { error: error.to_string(), mend: mend.into() }
    }
}

/// How a request ended, as it stands before the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Outcome {
    Answer = 0,
    Refusal = 1,
    /// Nobody does that here: a node of another version, or one that is just starting.
    Unknown = 2,
    /// The request does not fit what is expected.
    Nonsense = 3,
}

impl Outcome {
    fn of(byte: u8) -> Option<Self> {
        [Self::Answer, Self::Refusal, Self::Unknown, Self::Nonsense]
            .into_iter()
            .find(|one| *one as u8 == byte)
    }
}

/// Refusals are not longer.
pub(super) const LONGEST_REFUSAL: u32 = 16 << 10;

/// Why nothing can be made of what came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream ended too early, or was broken off.
    #[error("it was cut short: {0}")]
    Short(String),
    /// Of another version.
    #[error("it is of version {0} of the protocol, and version {VERSION} is spoken here")]
    Version(u8),
    /// A length that is not allowed.
    #[error("it is {length} bytes long, and {most} are allowed")]
    Long {
        /// Its length.
        length: u32,
        /// The bound.
        most: u32,
    },
    /// Bytes that mean nothing.
    #[error("it makes no sense: {0}")]
    Nonsense(String),
}

fn short(error: &ReadExactError) -> WireError {
    WireError::Short(error.to_string())
}

/// What stands before a request or bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) service: u16,
    pub(super) length: u32,
}

impl Head {
    const SIZE: usize = 7;

    fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0] = VERSION;
        bytes[1..3].copy_from_slice(&self.service.to_le_bytes());
        bytes[3..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; Self::SIZE]) -> Result<Self, WireError> {
        let [version, low, high, length @ ..] = bytes;
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        Ok(Self { service: u16::from_le_bytes([low, high]), length: u32::from_le_bytes(length) })
    }
}

/// The head and body of a request or bulk, ready to be sent.
pub(super) fn encode(service: u16, longest: u32, body: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let mut bytes = Head { service, length: 0 }.encode().to_vec();
    bytes = postcard::to_extend(body, bytes).map_err(|error| WireError::Nonsense(error.to_string()))?;
    let length = within(bytes.len() - Head::SIZE, longest)?;
    bytes[3..Head::SIZE].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// An answer, ready to be sent.
pub(super) fn encode_answer(
    outcome: Outcome,
    longest: u32,
    body: &impl Serialize,
) -> Result<Vec<u8>, WireError> {
    let mut bytes = vec![outcome as u8, 0, 0, 0, 0];
    bytes = postcard::to_extend(body, bytes).map_err(|error| WireError::Nonsense(error.to_string()))?;
    let length = within(bytes.len() - 5, longest)?;
    bytes[1..5].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

fn within(length: usize, most: u32) -> Result<u32, WireError> {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    if length > most { Err(WireError::Long { length, most }) } else { Ok(length) }
}

/// What is in the body, all of it.
pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(WireError::Nonsense("there is something behind its end".into())),
        Err(error) => Err(WireError::Nonsense(error.to_string())),
    }
}

/// Reads what stands before a request or bulk.
pub(super) async fn read_head(stream: &mut RecvStream) -> Result<Head, WireError> {
    let mut bytes = [0; Head::SIZE];
    stream.read_exact(&mut bytes).await.map_err(|error| short(&error))?;
    Head::decode(bytes)
}

/// Reads a body of this length, if it may be that long.
pub(super) async fn read_body(stream: &mut RecvStream, length: u32, most: u32) -> Result<Vec<u8>, WireError> {
    within(length as usize, most)?;
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).await.map_err(|error| short(&error))?;
    Ok(body)
}

/// Reads how a request ended, and the body that belongs to that.
pub(super) async fn read_answer(stream: &mut RecvStream, most: u32) -> Result<(Outcome, Vec<u8>), WireError> {
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).await.map_err(|error| short(&error))?;
    let [outcome, length @ ..] = bytes;
    let outcome = Outcome::of(outcome)
        .ok_or_else(|| WireError::Nonsense(format!("outcome {outcome} is not known here")))?;
    let most = if outcome == Outcome::Answer { most } else { LONGEST_REFUSAL };
    Ok((outcome, read_body(stream, u32::from_le_bytes(length), most).await?))
}

/// Sends all of it, and that this is all.
pub(super) async fn send(stream: &mut SendStream, bytes: &[u8]) -> Result<(), WireError> {
    stream.write_all(bytes).await.map_err(|error| WireError::Short(error.to_string()))?;
    stream.finish().map_err(|error| WireError::Short(error.to_string()))
}

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beat {
    /// Wants an answer.
    Ping(u64),
    /// The answer to the ping of this number.
    Pong(u64),
}

impl Beat {
    pub(super) fn encode(self) -> [u8; 9] {
        let (kind, number) = match self {
            Self::Ping(number) => (0, number),
            Self::Pong(number) => (1, number),
        };
        let mut bytes = [kind; 9];
        bytes[1..].copy_from_slice(&number.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, number) = bytes.split_first()?;
        let number = u64::from_le_bytes(number.try_into().ok()?);
        match kind {
            0 => Some(Self::Ping(number)),
            1 => Some(Self::Pong(number)),
            _ => None,
        }
    }
}

/// For fuzzing: nothing that can come is to do harm.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let _ = Beat::decode(bytes);
    if let Some(head) = bytes.first_chunk() {
        let _ = Head::decode(*head);
    }
    let _ = decode::<Refusal>(bytes);
    let _ = decode::<super::connection::Hello>(bytes);
    let _ = decode::<super::join::Request>(bytes);
    let _ = decode::<super::join::Answer>(bytes);
    let _ = super::token::Token::parse(&String::from_utf8_lossy(bytes));
    let _ = super::x509::facts(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_too_long_is_not_even_sent() {
        let text = "x".repeat(100);
        let error = encode(1, 50, &text).unwrap_err();
        assert!(matches!(error, WireError::Long { length: 101, most: 50 }), "{error}");
        encode_answer(Outcome::Answer, 50, &text).unwrap_err();
    }

    #[test]
    fn another_version_is_refused_as_such() {
        let mut head = Head { service: 7, length: 9 }.encode();
        assert_eq!(Head::decode(head).unwrap(), Head { service: 7, length: 9 });
        head[0] = 2;
        assert!(matches!(Head::decode(head), Err(WireError::Version(2))));
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_comes(error in ".*", mend in ".*", service: u16, number: u64, ping: bool) {
            let refusal = Refusal { error, mend };
            let bytes = encode(service, LONGEST, &refusal).unwrap();
            let head = Head::decode(*bytes.first_chunk().unwrap()).unwrap();
            prop_assert_eq!((head.service, head.length as usize), (service, bytes.len() - Head::SIZE));
            prop_assert_eq!(decode::<Refusal>(&bytes[Head::SIZE..]).unwrap(), refusal);
            let beat = if ping { Beat::Ping(number) } else { Beat::Pong(number) };
            prop_assert_eq!(Beat::decode(&beat.encode()), Some(beat));
        }

        #[test]
        fn rubbish_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz(&bytes);
        }
    }
}
