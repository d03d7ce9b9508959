//! Where content is cut into chunks, so that what has not changed gives the same chunks again.
//!
//! - An ordinary file is cut by its content ([`by_content`]): an insertion changes the chunks around it, and those
//!   behind it stay what they were, though all their offsets have moved.
//! - A memory image is cut by address ([`ByAddress`]). It holds the pages that a process has at the moment, one
//!   after the other, so that one page more or less moves all that follow. But a page's *address* stays, and the
//!   caller knows it: cuts are made where the address passes a multiple of the chunk size. A page that comes or
//!   goes then changes the one chunk whose window of addresses it is in, and no other.

use fastcdc::v2020::FastCDC;

/// No chunk is larger than this, whatever the settings say: readers need no more memory for one than this.
pub(super) const MAX_CHUNK: u32 = 1 << 20;

/// Cuts by content: the length of the chunk at the beginning of `bytes`, which is not empty. `None`: more bytes are
/// needed to tell; never when these are the `last` ones, or as many as four times the `average` size of a chunk.
pub(super) fn by_content(average: u32, bytes: &[u8], last: bool) -> Option<usize> {
    let (min, max) = (average / 4, average * 4);
    if !last && bytes.len() < max as usize {
        return None;
    }
    if bytes.len() <= min as usize {
        return Some(bytes.len());
    }
    let (_, end) = FastCDC::new(bytes, min as usize, average as usize, max as usize).cut(0, bytes.len());
    Some(end.clamp(1, bytes.len()))
}

/// A run of memory in an image: `len` bytes of the content that lie one after the other from `address` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where the run begins in the process's memory.
    pub address: u64,
    /// Its length in bytes, in the process and in the image.
    pub len: u64,
}

/// Cuts where the address passes a multiple of the chunk size, or goes back: the lengths of the chunks, in order. It
/// takes no look at the content.
#[derive(Debug)]
pub(super) struct ByAddress<'a> {
    /// Chunk size, a power of two.
    size: u64,
    runs: std::slice::Iter<'a, Run>,
    /// The rest of the run that comes next in the content; `None` at the start and past the last run.
    now: Option<Run>,
    /// Of the content that no run covers: how much was cut.
    beyond: u64,
    /// Content that is still to be cut.
    left: u64,
}

impl<'a> ByAddress<'a> {
    /// Of a content of this length that consists of these runs. What is behind the last is cut as if it began at
    /// address 0.
    pub(super) fn new(size: u32, runs: &'a [Run], len: u64) -> Self {
        Self { size: u64::from(size), runs: runs.iter(), now: None, beyond: 0, left: len }
    }

    /// The run whose bytes come next.
    fn run(&mut self) -> Run {
        if self.now.is_none_or(|run| run.len == 0) {
            self.now = self.runs.find(|run| run.len > 0).copied();
        }
        self.now.unwrap_or(Run { address: self.beyond, len: u64::MAX })
    }

    /// Takes `len` bytes of the run that [`Self::run`] gave.
    fn take(&mut self, len: u64) {
        match &mut self.now {
            Some(run) => *run = Run { address: run.address.wrapping_add(len), len: run.len - len },
            None => self.beyond += len,
        }
    }

    /// The length of the next chunk, if the content does not end before.
    fn window(&mut self) -> u64 {
        let first = self.run();
        let end = (first.address / self.size).saturating_add(1).saturating_mul(self.size);
        let (mut at, mut len) = (first.address, 0);
        loop {
            let run = self.run();
            // In another window, back before what was taken, or where the runs end.
            if run.address < at || run.address >= end || (len > 0 && self.now.is_none()) {
                return len;
            }
            let part = run.len.min(end - run.address);
            self.take(part);
            at = run.address + part;
            len += part;
        }
    }
}

impl Iterator for ByAddress<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let len = self.window().max(1).min(self.left);
        self.left -= len;
        (len > 0).then_some(len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The lengths of the chunks when so many bytes more arrive at a time.
    fn by_content_in(bytes: &[u8], step: usize) -> Vec<usize> {
        let (mut at, mut seen, mut all) = (0, 0, Vec::new());
        while at < bytes.len() {
            seen = (seen + step).min(bytes.len());
            while at < seen
                && let Some(len) = by_content(4096, &bytes[at..seen], seen == bytes.len())
            {
                all.push(len);
                at += len;
            }
        }
        all
    }

    #[test]
    fn a_page_that_comes_changes_only_its_own_window() {
        let page = 4096;
        let size = 4 * page;
        let runs =
            |pages: &[u64]| pages.iter().map(|p| Run { address: p * page, len: page }).collect::<Vec<_>>();
        let cuts = |pages: &[u64]| {
            let runs = runs(pages);
            let cut = ByAddress::new(u32::try_from(size).unwrap(), &runs, pages.len() as u64 * page);
            cut.map(|len| len / page).collect::<Vec<_>>()
        };
        assert_eq!(cuts(&[0, 1, 2, 3, 4, 5, 9, 17, 18]), [4, 2, 1, 2]);
        assert_eq!(cuts(&[0, 1, 2, 3, 4, 5, 7, 9, 17, 18]), [4, 3, 1, 2]);
        // Another process's memory begins at a lower address, in the same window or not.
        assert_eq!(cuts(&[2, 3, 1, 0]), [2, 1, 1]);
    }

    #[test]
    fn content_behind_the_runs_is_cut_too() {
        let runs = [Run { address: 4096, len: 4096 }];
        let cut = ByAddress::new(16384, &runs, 4096 + 40000);
        assert_eq!(cut.collect::<Vec<_>>(), [4096, 16384, 16384, 7232]);
    }

    proptest! {
        #[test]
        fn all_is_cut_into_chunks_of_bounded_size_however_it_arrives(
            runs in prop::collection::vec((0u64..64, 0u64..40), 0..20),
            len in 0usize..300_000, step in 1usize..100_000, seed: u64,
        ) {
            let mut bytes = vec![0; len];
            super::super::tests::noise(seed, &mut bytes);
            let runs: Vec<_> =
                runs.iter().map(|(at, len)| Run { address: at * 1000, len: len * 1000 }).collect();
            let by_address: Vec<_> = ByAddress::new(16384, &runs, len as u64).collect();
            prop_assert_eq!(by_address.iter().sum::<u64>(), len as u64);
            prop_assert!(by_address.iter().all(|len| (1..=16384).contains(len)));
            let by_content = by_content_in(&bytes, step);
            prop_assert_eq!(by_content.iter().sum::<usize>(), len);
            prop_assert!(by_content.iter().all(|len| (1..=16384).contains(len)));
            prop_assert_eq!(by_content, by_content_in(&bytes, len.max(1)));
        }
    }
}
