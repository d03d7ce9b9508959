//! A directory of images of which a share of the pages changes from generation to generation.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::stats::Random;

const PAGE: usize = 4096;

pub(super) struct Images {
    pub(super) dir: PathBuf,
    random: Random,
    /// Files of pages, and how many each has.
    pages: Vec<(String, usize)>,
}

impl Images {
    /// A copy of `from` in `dir`, which must not be there.
    pub(super) fn copy(from: &Path, dir: &Path) -> Result<Self> {
        copy_all(from, dir)?;
        let mut pages = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("pages-") {
                pages.push((name, entry.metadata()?.len() as usize / PAGE));
            }
        }
        pages.sort();
        ensure!(!pages.is_empty(), "{} holds no pages", from.display());
        Ok(Self { dir: dir.to_owned(), random: Random::default(), pages })
    }

    /// Makes the next generation: all files are new ones, as those of a dump are, and `percent` of the pages, here and
    /// there, have another content that is as hard to compress.
    pub(super) fn change(&mut self, percent: usize) -> Result<()> {
        let next = self.dir.with_extension("next");
        copy_all(&self.dir, &next)?;
        for (name, count) in &self.pages {
            let path = next.join(name);
            let mut file = File::options().read(true).write(true).open(&path)?;
            let mut page = [0; PAGE];
            for number in chosen(*count, count * percent / 100, &mut self.random) {
                file.seek(SeekFrom::Start((number * PAGE) as u64))?;
                file.read_exact(&mut page)?;
                // Where the worker has its noise; see there.
                for noise in page.chunks_exact_mut(8).step_by(4) {
                    noise.copy_from_slice(&self.random.next().to_le_bytes());
                }
                file.seek(SeekFrom::Start((number * PAGE) as u64))?;
                file.write_all(&page)?;
            }
        }
        fs::remove_dir_all(&self.dir)?;
        fs::rename(&next, &self.dir)?;
        Ok(())
    }

    /// Whether `other` holds the same files.
    pub(super) fn same(&self, other: &Path) -> Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            // ftd keeps no logs.
            if Path::new(&name).extension().is_some_and(|extension| extension == "log") {
                continue;
            }
            let same = same(&self.dir.join(&name), &other.join(&name));
            ensure!(same?, "{} is not what it was", other.join(&name).display());
        }
        Ok(())
    }
}

/// So many different numbers below `count`, in order: each is taken with the chance that is left to it
/// (Knuth's selection sampling).
fn chosen(count: usize, wanted: usize, random: &mut Random) -> Vec<usize> {
    let mut all = Vec::with_capacity(wanted);
    for number in 0..count {
        if random.below(count - number) < wanted - all.len() {
            all.push(number);
        }
    }
    all
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("{} cannot be made", to.display()))?;
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        fs::copy(from.join(&name), to.join(&name))
            .with_context(|| format!("{} cannot be copied", from.join(&name).display()))?;
    }
    Ok(())
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).with_context(|| format!("{}", path.display()));
    let (mut one, mut other) = (open(one)?, open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let count = one.read(&mut a)?;
        if count == 0 {
            return Ok(true);
        }
        other.read_exact(&mut b[..count])?;
        if a[..count] != b[..count] {
            return Ok(false);
        }
    }
}

/// Bytes of all files below a directory.
pub(super) fn bytes(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("{}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        sum += if meta.is_dir() { bytes(&entry.path())? } else { meta.len() };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_exact_and_its_pages_are_here_and_there() {
        let mut random = Random::default();
        let some = chosen(1000, 10, &mut random);
        assert_eq!(some.len(), 10);
        assert!(some.is_sorted_by(|a, b| a < b) && some[0] < 500 && some[9] >= 500, "{some:?}");
        assert_eq!(chosen(7, 7, &mut random), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(chosen(7, 0, &mut random), [] as [usize; 0]);
    }
}
