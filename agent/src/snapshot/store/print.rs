//! Knowing a chunk again without hashing it.
//!
//! A chunk's name is the blake3 hash of its content. Of a service whose memory has hardly changed, finding these names
//! is most of the work, and nearly all of them come out as they did the time before. A *print* says so in a fifth
//! of the time: as long as a store is open, it remembers the prints and the names of the chunks of the newest
//! generation that it has taken of each workload, and a chunk that has a print of these has its name.
//!
//! # Why that is safe
//!
//! A print is a hash by a secret key, of a family for which it is proved, and not only believed, that contents are
//! hardly ever mistaken for each other (NH: Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: fast and secure message
//! authentication", 1999):
//!
//! - Any two different blocks of one length have the same NH sum under at most one in 2⁶⁴ keys; with two sums, by
//!   keys that are shifted against each other, under one in 2¹²⁸.
//! - The sums of a chunk's blocks, and its length, are hashed by blake3 to 128 bits.
//!
//! The key is made anew for each opening of a store, and neither it nor any print leaves this process's memory. So
//! nobody can look for two contents with the same print, not even somebody who chooses what is in the memory of the
//! service; and to happen by chance, it would take some 2¹²⁸ changed chunks.
//!
//! Nothing else depends on it: whatever is stored is hashed, and whatever is read is checked by its hash.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
};

use super::manifest::Id;

/// Words in a block: a page. Its key stays in the first-level cache.
const WORDS: usize = 512;

/// A print of a chunk's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Print(u128);

/// The names of chunks by their prints.
pub(super) type Known = HashMap<Print, Id>;

/// Makes prints, by a key of its own: those of different ones have nothing to do with each other.
pub(super) struct Printer {
    /// For a block, and for the second sum two words more.
    key: Box<[u64; WORDS + 2]>,
    last_key: [u8; 32],
}

impl Printer {
    pub(super) fn new() -> Self {
        // What std gives to each table against chosen keys, 128 bits from the system, by a keyed hash.
        let secret = (0..8_u64).flat_map(|number| {
            let mut hasher = RandomState::new().build_hasher();
            hasher.write_u64(number);
            hasher.finish().to_le_bytes()
        });
        Self::by(&secret.collect::<Vec<_>>())
    }

    fn by(secret: &[u8]) -> Self {
        let mut stream =
            blake3::Hasher::new_derive_key("ftd 2026-11 prints of chunks").update(secret).finalize_xof();
        let mut key = Box::new([0; WORDS + 2]);
        for word in key.iter_mut() {
            let mut bytes = [0; 8];
            stream.fill(&mut bytes);
            *word = u64::from_le_bytes(bytes);
        }
        let mut last_key = [0; 32];
        stream.fill(&mut last_key);
        Self { key, last_key }
    }

    pub(super) fn print(&self, content: &[u8]) -> Print {
        let mut last = blake3::Hasher::new_keyed(&self.last_key);
        let (blocks, rest) = content.as_chunks::<{ 8 * WORDS }>();
        for block in blocks {
            last.update(&self.sums(block));
        }
        if !rest.is_empty() {
            // Zeros at the end are told apart by the length.
            let mut block = [0; 8 * WORDS];
            block[..rest.len()].copy_from_slice(rest);
            last.update(&self.sums(&block));
        }
        last.update(&(content.len() as u64).to_le_bytes());
        let mut print = [0; 16];
        last.finalize_xof().fill(&mut print);
        Print(u128::from_le_bytes(print))
    }

    /// Both NH sums of a block.
    fn sums(&self, block: &[u8; 8 * WORDS]) -> [u8; 32] {
        let (mut one, mut other) = (0_u128, 0_u128);
        let pairs = block.as_chunks::<16>().0.iter().zip(self.key.windows(4).step_by(2));
        for (pair, key) in pairs {
            let pair = u128::from_le_bytes(*pair);
            let (low, high) = (pair as u64, (pair >> 64) as u64);
            one = one.wrapping_add(product(low.wrapping_add(key[0]), high.wrapping_add(key[1])));
            other = other.wrapping_add(product(low.wrapping_add(key[2]), high.wrapping_add(key[3])));
        }
        let mut sums = [0; 32];
        sums[..16].copy_from_slice(&one.to_le_bytes());
        sums[16..].copy_from_slice(&other.to_le_bytes());
        sums
    }
}

fn product(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

impl std::fmt::Debug for Printer {
    /// The key stays secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Printer").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::store::tests::noise;

    #[test]
    fn every_flipped_bit_and_every_length_gives_another_print() {
        let printer = Printer::new();
        let mut bytes = vec![0; 3 * 8 * WORDS + 100];
        noise(1, &mut bytes);
        bytes[5000..9000].fill(0);
        let mut seen = std::collections::HashSet::from([printer.print(&bytes)]);
        for at in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            bytes[at] ^= 1 << (at % 8);
            assert!(seen.insert(printer.print(&bytes)), "{at}");
            bytes[at] ^= 1 << (at % 8);
        }
        assert!(!seen.insert(printer.print(&bytes)));
        let zeros = vec![0; bytes.len()];
        for len in 0..zeros.len() {
            assert!(seen.insert(printer.print(&zeros[..len])), "{len}");
        }
    }

    #[test]
    fn each_printer_has_its_own_key() {
        let [one, other] = [Printer::new(), Printer::new()];
        assert_ne!(one.print(b"abc"), other.print(b"abc"));
        // Nor is the key one that anybody knows.
        assert_ne!(one.print(b"abc"), Printer::by(b"").print(b"abc"));
    }

    proptest! {
        /// The sum as the paper has it, word by word.
        #[test]
        fn the_sums_are_those_of_the_paper(seed: u64) {
            let mut block = [0; 8 * WORDS];
            noise(seed, &mut block);
            let printer = Printer::by(&seed.to_le_bytes());
            let words: Vec<u64> = block.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
            let nh = |key: &[u64]| {
                (0..WORDS / 2).fold(0_u128, |sum, i| {
                    let a = words[2 * i].wrapping_add(key[2 * i]);
                    let b = words[2 * i + 1].wrapping_add(key[2 * i + 1]);
                    sum.wrapping_add(u128::from(a) * u128::from(b))
                })
            };
            let wanted = [nh(&printer.key[..]), nh(&printer.key[2..])].map(u128::to_le_bytes).concat();
            prop_assert_eq!(printer.sums(&block).to_vec(), wanted);
        }
    }
}
