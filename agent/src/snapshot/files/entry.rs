//! What a capture says of each file.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A file, a directory or a symlink, as it was when it was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Absolute.
    #[serde(with = "path")]
    pub path: PathBuf,
    /// What it is, with what only this kind has.
    pub kind: Kind,
    /// Permissions with setuid, setgid and sticky: the lower 12 bits of `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of content, nanoseconds since 1970.
    pub mtime: i64,
    /// Extended attributes by name, among them access control lists (`system.posix_acl_access`).
    pub xattrs: Vec<Xattr>,
    /// For a file: how to tell without reading it that it has not changed. `None`: it must be read.
    pub seen: Option<Seen>,
}

/// Kinds of entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Of the content.
        hash: blake3::Hash,
    },
    /// A directory.
    Dir,
    /// A symlink.
    Symlink {
        /// As it is written there.
        #[serde(with = "path")]
        target: PathBuf,
    },
}

impl Kind {
    /// For people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Dir => "directory",
            Self::Symlink { .. } => "symlink",
        }
    }
}

/// One extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Xattr {
    /// With its namespace: `user.origin`.
    pub name: Bytes,
    /// Anything.
    pub value: Bytes,
}

/// A file's identity in the kernel. As long as all three and the size are the same, so is the content. True on this host
/// only; on another one, or after it was restored, the file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Time of the last change of anything, nanoseconds since 1970. Set by the kernel alone.
    pub ctime: i64,
}

/// Bytes that are mostly text: a string in JSON where they are UTF-8, else a list of numbers.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(Visitor)
        } else {
            deserializer.deserialize_byte_buf(Visitor)
        }
    }
}

fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    match std::str::from_utf8(bytes) {
        Ok(text) if serializer.is_human_readable() => serializer.serialize_str(text),
        _ => serializer.serialize_bytes(bytes),
    }
}

struct Visitor;

impl<'de> de::Visitor<'de> for Visitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or bytes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
        Ok(Bytes(text.into()))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
        Ok(Bytes(bytes.to_vec()))
    }

    fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
        Ok(Bytes(bytes))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Bytes, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = seq.next_element()? {
            bytes.push(byte);
        }
        Ok(Bytes(bytes))
    }
}

/// Paths as [`Bytes`]: their names need not be UTF-8. For `#[serde(with = ...)]`.
pub mod path {
    use std::{
        ffi::OsString,
        os::unix::ffi::{OsStrExt as _, OsStringExt as _},
        path::{Path, PathBuf},
    };

    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::Bytes;

    /// Writes a path.
    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        super::serialize(path.as_os_str().as_bytes(), serializer)
    }

    /// Reads a path.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        Bytes::deserialize(deserializer).map(|bytes| PathBuf::from(OsString::from_vec(bytes.0)))
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, os::unix::ffi::OsStringExt as _};

    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..20),
            "[a-zäöü ]{0,9}".prop_map(String::into_bytes)
        ]
    }

    fn kind() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Dir),
            (any::<u64>(), bytes())
                .prop_map(|(size, content)| Kind::File { size, hash: blake3::hash(&content) }),
            bytes().prop_map(|target| Kind::Symlink { target: OsString::from_vec(target).into() }),
        ]
    }

    proptest! {
        #[test]
        fn entries_pass_json_and_postcard(
            path in bytes(), kind in kind(), numbers in any::<(u32, u32, u32, i64)>(),
            xattrs in proptest::collection::vec((bytes(), bytes()), 0..3), seen in any::<Option<(u64, u64, i64)>>(),
        ) {
            let (mode, uid, gid, mtime) = numbers;
            let entry = Entry {
                path: OsString::from_vec(path).into(), kind, mode, uid, gid, mtime,
                xattrs: xattrs.into_iter().map(|(n, v)| Xattr { name: Bytes(n), value: Bytes(v) }).collect(),
                seen: seen.map(|(dev, ino, ctime)| Seen { dev, ino, ctime }),
            };
            let json = serde_json::to_string(&entry).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Entry>(&json).unwrap(), &entry);
            let binary = postcard::to_stdvec(&entry).unwrap();
            prop_assert_eq!(&postcard::from_bytes::<Entry>(&binary).unwrap(), &entry);
        }
    }

    #[test]
    fn a_path_is_a_string_in_json() {
        let target = Kind::Symlink { target: "/usr/lib".into() };
        assert_eq!(serde_json::to_string(&target).unwrap(), r#"{"symlink":{"target":"/usr/lib"}}"#);
    }
}
