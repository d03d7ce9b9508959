//! The store's decoders, for a fuzzer: none may panic, or take memory beyond what its input is long.

use std::path::Path;

use super::{manifest::Manifest, pack, read::Unpacker, transfer::Incoming};

/// A manifest.
pub fn manifest(bytes: &[u8]) {
    let _ = Manifest::decode(bytes, Path::new("fuzz"));
}

/// The index of a pack.
pub fn pack_index(bytes: &[u8]) {
    let _ = pack::decode_index(bytes, bytes.len() as u64);
}

/// An exported stream.
pub fn stream(bytes: &[u8]) {
    let (Ok((mut incoming, ..)), Ok(mut unpacker)) = (Incoming::begin(bytes), Unpacker::new()) else {
        return;
    };
    let mut content = Vec::new();
    while let Ok(Some(record)) = incoming.next(&mut unpacker.stored) {
        let _ = unpacker.check(&record, &mut content);
    }
    let _ = incoming.end();
}
