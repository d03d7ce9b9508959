//! What the two nodes of a move say to each other.

use serde::{Deserialize, Serialize};

use crate::peer::{Bulk, Call, service};

/// Offers are not longer: a tree of ten thousand threads is half of this.
const LONGEST_OFFER: u32 = 1 << 20;
/// Of each unit so many files of images, at most: some for each process and thread.
pub(super) const FILES: usize = 200_000;

/// A unit that is to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OfferedUnit {
    /// systemd's name.
    pub(super) unit: String,
    /// Its main process.
    pub(super) main_pid: u32,
    /// Numbers that must be free.
    pub(super) ids: Vec<u32>,
    /// Programs and libraries, and their build-ids where they have one.
    pub(super) files: Vec<(String, Option<Vec<u8>>)>,
}

/// Can you take this? Unless `dry_run`, there is room for it when the answer is yes, and its units are held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    pub(super) id: String,
    pub(super) dry_run: bool,
    pub(super) workload: String,
    pub(super) units: Vec<OfferedUnit>,
    /// Bytes of memory, about.
    pub(super) bytes: u64,
    /// The machine's kind.
    pub(super) machine: String,
    /// CRIU's version.
    pub(super) criu: crate::snapshot::criu::Version,
    /// The service's address, with its prefix, which moves along.
    pub(super) address: Option<String>,
}

/// All that is in the way, each with its mend; nothing: yes.
pub(super) type InTheWay = Vec<(String, String)>;

impl Call for Offer {
    type Answer = InTheWay;
    const SERVICE: u16 = service::MIGRATE;
    const LONGEST: u32 = LONGEST_OFFER;
}

/// Pieces of images follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Images {
    pub(super) id: String,
}

impl Bulk for Images {
    const SERVICE: u16 = service::MIGRATE + 1;
}

/// All images are there: go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Go {
    pub(super) id: String,
    /// They came on so many streams.
    pub(super) streams: usize,
    /// Of which unit, what, and how long.
    pub(super) files: Vec<(u8, String, u64)>,
    /// Open connections go along; else they are closed.
    pub(super) connections: bool,
}

/// The target's word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Word {
    /// It runs there.
    Serving {
        /// How long the processes' making took, microseconds.
        restore_us: u64,
    },
    /// It does not, and will not by this move.
    NotServing {
        /// Why, where it was tried.
        why: Option<(String, String)>,
    },
}

impl Call for Go {
    type Answer = Word;
    const SERVICE: u16 = service::MIGRATE + 2;
    const LONGEST: u32 = 16 << 20;
}

/// What has become of it? If it has not begun, it must not begin any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ask {
    pub(super) id: String,
}

impl Call for Ask {
    type Answer = Word;
    const SERVICE: u16 = service::MIGRATE + 3;
}

/// What was here is ended: it is yours alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Confirm {
    pub(super) id: String,
}

impl Call for Confirm {
    type Answer = ();
    const SERVICE: u16 = service::MIGRATE + 4;
}

/// Whether a text can be the id of a move: it becomes part of a path.
pub(super) fn is_id(id: &str) -> bool {
    id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// For fuzzing: nothing that can come is to do harm.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let _ = postcard::from_bytes::<Offer>(bytes);
    let _ = postcard::from_bytes::<Images>(bytes);
    let _ = postcard::from_bytes::<Go>(bytes);
    let _ = postcard::from_bytes::<Ask>(bytes).map(|ask| is_id(&ask.id));
    let _ = super::stream::Piece::read(&mut &*bytes, &mut Vec::new());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_id_is_no_path() {
        assert!(is_id("0123456789abcdef"));
        for bad in ["", "../../../etc/pas", "0123456789abcdeg", "0123456789abcdef0"] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn rubbish_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz(&bytes);
        }
    }
}
