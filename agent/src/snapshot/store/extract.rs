//! An entry's content, written to a file by all cores.
//!
//! A memory image is read back as a whole, and the service stands still meanwhile. Its chunks lie where they were
//! first stored, in any order; but each is known to be at its place in the entry, so that any thread can check it
//! and write it there.

use std::{
    fs::File,
    io, mem,
    os::unix::fs::FileExt as _,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use super::{
    error::{Error, Result},
    locked,
    manifest::Chunk,
    read::{Snapshot, Unpacker},
};

/// Chunks that a thread takes at a time: neighbours in the entry, and mostly in a pack.
const STEP: usize = 16;
/// When a thread has written so much, it tells.
const TELL: u64 = 16 << 20;

impl Snapshot {
    /// Writes the content of the entry of this name to a file that is new and empty; where it is zeros, the file has
    /// a hole. Each chunk is checked before it is written. After an error the file is of no use. `progress` is told, now
    /// and then, how many bytes more are done.
    pub fn extract(&self, name: &str, file: &File, progress: &mut (dyn FnMut(u64) + Send)) -> Result<()> {
        let entry = self.manifest().entry(name)?;
        let failed = |source: io::Error| Error::Source { what: format!("cannot write {name:?}"), source };
        file.set_len(entry.size).map_err(failed)?;
        let mut offset = 0;
        let mut places = Vec::with_capacity(entry.chunks.len());
        for chunk in &entry.chunks {
            if let Chunk::Data { id, len } = *chunk {
                places.push((offset, id, len));
            }
            offset += chunk.len();
        }
        let stored: u64 = places.iter().map(|(.., len)| u64::from(*len)).sum();
        progress(entry.size - stored);
        let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let progress = Mutex::new(progress);
        let work = || -> Result<()> {
            let (mut unpacker, mut content, mut done) = (Unpacker::new()?, Vec::new(), 0);
            while !over.load(Ordering::Relaxed) {
                let first = next.fetch_add(STEP, Ordering::Relaxed);
                let Some(step) = places.get(first..places.len().min(first + STEP)) else { break };
                for (offset, id, len) in step {
                    let fetched = unpacker.fetch(self.store(), self.index(), (*id, *len), &mut content);
                    fetched.map_err(|cause| self.error(entry, *offset, cause))?;
                    file.write_all_at(&content, *offset).map_err(failed)?;
                    done += u64::from(*len);
                }
                if done >= TELL {
                    locked(&progress)(mem::take(&mut done));
                }
            }
            locked(&progress)(done);
            Ok(())
        };
        let work = || work().inspect_err(|_| over.store(true, Ordering::Relaxed));
        let threads = self.store().settings().threads().min(places.len().div_ceil(STEP));
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            let others = others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // All are waited for.
            others.fold(own, Result::and)
        })
    }
}
