//! What differs between two captures, in words a person would use.
//!
//! Contents were hashed when they were captured ([`super::look`] reads only what it does not know), so nothing is
//! read here, with one exception: whether a shorter file is the start of the longer one, for which that much of the old
//! content is hashed. Times are no difference: a file that was only touched is the same file.

use std::{
    cmp::Ordering,
    fmt,
    io::{self, Read as _},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{Bytes, Contents, Entry, Kind, entry};

/// All that differs at one path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Where.
    #[serde(with = "entry::path")]
    pub path: PathBuf,
    /// What, at least one.
    pub changes: Vec<Change>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path.display())?;
        for (n, change) in self.changes.iter().enumerate() {
            write!(f, "{}{change}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// One thing that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Change {
    /// Was not there.
    Created {},
    /// Is not there any more.
    Deleted {},
    /// A file where a directory was, and the like. Nothing else is said then.
    Kind {
        /// What it was.
        from: String,
        /// What it is.
        to: String,
    },
    /// Nothing is left of the content.
    Emptied {
        /// Bytes that were there.
        from: u64,
    },
    /// The content is the first part of what it was.
    Truncated {
        /// Bytes.
        from: u64,
        /// Bytes.
        to: u64,
    },
    /// Other content.
    Content {
        /// Bytes.
        from: u64,
        /// Bytes.
        to: u64,
    },
    /// The symlink leads elsewhere.
    Target {
        /// Where to.
        from: Bytes,
        /// Where to.
        to: Bytes,
    },
    /// Permissions.
    Mode {
        /// 12 bits.
        from: u32,
        /// 12 bits.
        to: u32,
    },
    /// User or group.
    Owner {
        /// User, group.
        from: (u32, u32),
        /// User, group.
        to: (u32, u32),
    },
    /// Extended attributes, access control lists.
    Xattrs {
        /// Those that are new, gone or different.
        names: Vec<Bytes>,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Created {} => f.write_str("created"),
            Self::Deleted {} => f.write_str("deleted"),
            Self::Kind { from, to } => write!(f, "was a {from}, is a {to}"),
            Self::Emptied { from } => write!(f, "emptied (had {from} bytes)"),
            Self::Truncated { from, to } => write!(f, "truncated from {from} to {to} bytes"),
            Self::Content { from, to } if from == to => write!(f, "other content ({to} bytes)"),
            Self::Content { from, to } => write!(f, "other content ({from} -> {to} bytes)"),
            Self::Target { from, to } => write!(f, "leads to {to}, led to {from}"),
            Self::Mode { from, to } => write!(f, "mode {from:04o} -> {to:04o}"),
            Self::Owner { from, to } => write!(f, "owner {}:{} -> {}:{}", from.0, from.1, to.0, to.1),
            Self::Xattrs { names } => {
                f.write_str("attributes")?;
                names
                    .iter()
                    .enumerate()
                    .try_for_each(|(n, name)| write!(f, "{}{name}", if n == 0 { " " } else { ", " }))
            }
        }
    }
}

/// What has changed from `old` to `new`, by path. Both are sorted by path, as in [`super::Captured`]. `contents` has
/// those of `old`; without it, or where it fails, a truncated file is one with other content.
pub fn compare(old: &[Entry], new: &[Entry], contents: Option<&dyn Contents>) -> Vec<Difference> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let mut differences = Vec::new();
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return differences,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) => a.path.cmp(&b.path),
        };
        let before = if order.is_le() { old.next() } else { None };
        let after = if order.is_ge() { new.next() } else { None };
        let changes = match (before, after) {
            (Some(a), Some(b)) => changes(a, b, contents),
            (Some(_), None) => vec![Change::Deleted {}],
            _ => vec![Change::Created {}],
        };
        if let Some(entry) = after.or(before)
            && !changes.is_empty()
        {
            differences.push(Difference { path: entry.path.clone(), changes });
        }
    }
}

/// What has changed at one path.
pub(super) fn changes(old: &Entry, new: &Entry, contents: Option<&dyn Contents>) -> Vec<Change> {
    let mut changes = Vec::new();
    match (&old.kind, &new.kind) {
        (Kind::Dir, Kind::Dir) => {}
        (Kind::Symlink { target: from }, Kind::Symlink { target: to }) => {
            if from != to {
                let bytes = |path: &PathBuf| Bytes(path.as_os_str().as_encoded_bytes().to_vec());
                changes.push(Change::Target { from: bytes(from), to: bytes(to) });
            }
        }
        (Kind::File { size: from, hash: a }, Kind::File { size: to, hash: b }) => {
            let (from, to) = (*from, *to);
            if to == 0 && from > 0 {
                changes.push(Change::Emptied { from });
            } else if to < from && contents.is_some_and(|contents| starts_with(contents, old, to, b)) {
                changes.push(Change::Truncated { from, to });
            } else if a != b {
                changes.push(Change::Content { from, to });
            }
        }
        (from, to) => {
            return vec![Change::Kind { from: from.name().to_owned(), to: to.name().to_owned() }];
        }
    }
    if old.mode != new.mode {
        changes.push(Change::Mode { from: old.mode, to: new.mode });
    }
    if (old.uid, old.gid) != (new.uid, new.gid) {
        changes.push(Change::Owner { from: (old.uid, old.gid), to: (new.uid, new.gid) });
    }
    if old.xattrs != new.xattrs {
        let lost = old.xattrs.iter().filter(|xattr| !new.xattrs.contains(xattr));
        let won = new.xattrs.iter().filter(|xattr| !old.xattrs.contains(xattr));
        let mut names: Vec<_> = lost.chain(won).map(|xattr| xattr.name.clone()).collect();
        names.sort_unstable();
        names.dedup();
        changes.push(Change::Xattrs { names });
    }
    changes
}

/// Whether the first `size` bytes of the old content have this hash.
fn starts_with(contents: &dyn Contents, old: &Entry, size: u64, hash: &blake3::Hash) -> bool {
    let start = || -> io::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(contents.open(old)?.take(size))?;
        Ok(hasher.finalize())
    };
    start().is_ok_and(|start| start == *hash)
}
