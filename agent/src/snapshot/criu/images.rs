//! What ftd reads of CRIU's images: which PIDs and files they will need, which memory is where in them, what the
//! dump cost, and the name of the network lock. All else in them is CRIU's own business.
//!
//! An image is one or two magic numbers, then records: a length in 4 bytes, and a message of so many
//! (magic.h, protobuf.c of CRIU). They come from a store or another host, so nothing in them is trusted: lengths
//! are held against what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use prost::Message;

use super::messages::{
    DumpStatsEntry, FileEntry, InventoryEntry, PagemapEntry, PagemapHead, PstreeEntry, RemapFilePathEntry,
    StatsEntry,
};

const COMMON: u32 = 0x5456_4319;
const SERVICE: u32 = 0x5510_5940;
const PSTREE: u32 = 0x5027_3030;
const STATS: u32 = 0x5709_3306;
const INVENTORY: u32 = 0x5831_3116;
const FILES: u32 = 0x5630_3138;
const REMAP: u32 = 0x5913_3954;
const PAGEMAP: u32 = 0x5608_4025;
/// Flags of a run of pages, see pagemap.h of CRIU.
const PE_PARENT: u32 = 1;
const PE_PRESENT: u32 = 4;

/// A process tree as it was dumped, root first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The root process.
    pub root: u32,
    /// Numbers that must be free at restore: of processes, threads, groups and sessions.
    pub ids: BTreeSet<u32>,
}

/// The tree in these images.
pub fn tree(dir: &Path) -> io::Result<Tree> {
    let bytes = fs::read(dir.join("pstree.img"))?;
    let processes = records::<PstreeEntry>(&bytes, &[COMMON, PSTREE])?;
    let root = processes.first().ok_or_else(|| damaged("no process in it"))?.pid;
    let mut ids = BTreeSet::new();
    for process in &processes {
        // Groups and sessions are begun by processes of their number; where these have ended meanwhile, the
        // number is taken all the same.
        ids.extend([process.pid, process.pgid, process.sid]);
        ids.extend(&process.threads);
    }
    ids.remove(&0);
    Ok(Tree { root, ids })
}

/// A file that must be there at restore.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NeededFile {
    /// Where, in the mount namespace of the process.
    pub path: PathBuf,
    /// Its size, where that must not have changed.
    pub size: Option<u64>,
    /// The build-id of a program or library, where it has one; filled up with zeros to a multiple of 4 bytes.
    pub build_id: Vec<u8>,
}

impl NeededFile {
    /// Whether a file with this build-id is the same one, as far as build-ids say.
    pub fn has_build_id(&self, found: Option<&[u8]>) -> bool {
        let mut found = found.unwrap_or_default().to_vec();
        found.resize(found.len().next_multiple_of(4), 0);
        self.build_id.is_empty() || self.build_id == found
    }
}

/// The build-id of a program or library; `None` if it has none, or is none.
pub fn build_id(path: &Path) -> io::Result<Option<Vec<u8>>> {
    use object::Object as _;
    let cache = object::ReadCache::new(fs::File::open(path)?);
    let Ok(file) = object::File::parse(&cache) else { return Ok(None) };
    Ok(file.build_id().ok().flatten().map(<[u8]>::to_vec))
}

/// The files that the images refer to by name: programs, libraries, what was open. Those without a name
/// travel in the images.
pub fn needed_files(dir: &Path) -> io::Result<Vec<NeededFile>> {
    let files = records::<FileEntry>(&fs::read(dir.join("files.img"))?, &[COMMON, FILES])?;
    let remaps = match fs::read(dir.join("remap-fpath.img")) {
        Ok(bytes) => records::<RemapFilePathEntry>(&bytes, &[COMMON, REMAP])?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let nameless: BTreeSet<_> = remaps.into_iter().map(|remap| remap.orig_id).collect();
    let named = files
        .into_iter()
        .filter_map(|file| file.reg)
        .filter(|file| !nameless.contains(&file.id) && file.ext != Some(true));
    let needed = named.map(|file| NeededFile {
        path: Path::new("/").join(&file.name),
        size: file.size,
        build_id: file.build_id.iter().flat_map(|word| word.to_le_bytes()).collect(),
    });
    let mut needed: Vec<_> = needed.collect();
    needed.sort();
    needed.dedup();
    Ok(needed)
}

/// A run of memory in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its address in the process, or its offset in a shared piece of memory.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Of which runs of memory each `pages-N.img` consists, in their order, by the file's name. `page` is the size of a
/// page on the machine that made the images.
pub fn pages(dir: &Path, page: u64) -> io::Result<BTreeMap<String, Vec<Region>>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.strip_prefix("pagemap-").and_then(|rest| rest.strip_suffix(".img")).is_none() {
            continue;
        }
        let bytes = fs::read(entry.path())?;
        let mut found = split(&bytes, &[COMMON, PAGEMAP])?.into_iter();
        let head = PagemapHead::decode(found.next().ok_or_else(|| damaged("no head in it"))?)?;
        let mut regions = Vec::new();
        for record in found {
            let run = PagemapEntry::decode(record)?;
            let there = match run.flags {
                Some(flags) => flags & PE_PRESENT != 0 && flags & PE_PARENT == 0,
                None => run.in_parent != Some(true),
            };
            if there {
                let pages = run.nr_pages.unwrap_or(run.compat_nr_pages.into());
                regions.push(Region { address: run.vaddr, len: pages.saturating_mul(page) });
            }
        }
        all.insert(format!("pages-{}.img", head.pages_id), regions);
    }
    Ok(all)
}

/// What the dump cost.
pub fn dump_stats(dir: &Path) -> io::Result<DumpStatsEntry> {
    let bytes = fs::read(dir.join("stats-dump"))?;
    let stats = records::<StatsEntry>(&bytes, &[SERVICE, STATS])?;
    stats.into_iter().find_map(|stats| stats.dump).ok_or_else(|| damaged("no figures in it"))
}

/// The nftables table that keeps the tree's connections silent, as `nft` names it (family `inet`).
pub fn network_lock(dir: &Path) -> io::Result<String> {
    /// CRIU has room for so much of `inet CRIU-ID`, and cuts the rest.
    const ROOM: usize = 31;
    let bytes = fs::read(dir.join("inventory.img"))?;
    let inventory = records::<InventoryEntry>(&bytes, &[INVENTORY])?;
    let id = inventory.into_iter().find_map(|inventory| inventory.dump_criu_run_id);
    let id = match id {
        // It goes to nft as a word: no more than a word.
        Some(id) if id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') => id,
        Some(_) => return Err(damaged("an odd run id in it")),
        // CRIU before 4.1.
        None => tree(dir)?.root.to_string(),
    };
    let full = format!("inet CRIU-{id}");
    let cut = full.get(..ROOM).unwrap_or(&full);
    Ok(cut.trim_start_matches("inet ").to_owned())
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// All records of an image with these magic numbers.
fn records<M: Message + Default>(bytes: &[u8], magics: &[u32]) -> io::Result<Vec<M>> {
    split(bytes, magics)?.into_iter().map(|record| Ok(M::decode(record)?)).collect()
}

/// The same, as they stand there.
fn split<'a>(bytes: &'a [u8], magics: &[u32]) -> io::Result<Vec<&'a [u8]>> {
    let mut rest = bytes;
    let number = |rest: &mut &[u8]| {
        let (head, tail) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("it is cut short"))?;
        *rest = tail;
        Ok::<_, io::Error>(u32::from_le_bytes(*head))
    };
    for magic in magics {
        if number(&mut rest)? != *magic {
            return Err(damaged("it is not the image that its name says"));
        }
    }
    let mut all = Vec::new();
    while !rest.is_empty() {
        let length = number(&mut rest)? as usize;
        let record = rest.get(..length).ok_or_else(|| damaged("it is cut short"))?;
        all.push(record);
        rest = &rest[length..];
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(magics: &[u32], records: &[&dyn Fn() -> Vec<u8>]) -> Vec<u8> {
        let mut bytes: Vec<u8> = magics.iter().flat_map(|magic| magic.to_le_bytes()).collect();
        for record in records {
            let record = record();
            bytes.extend((record.len() as u32).to_le_bytes());
            bytes.extend(record);
        }
        bytes
    }

    fn process(pid: u32, threads: &[u32]) -> PstreeEntry {
        PstreeEntry { pid, ppid: 0, pgid: 70, sid: 70, threads: threads.to_vec() }
    }

    #[test]
    fn a_tree_names_all_numbers_that_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = image(
            &[COMMON, PSTREE],
            &[&|| process(71, &[71, 75]).encode_to_vec(), &|| process(72, &[72]).encode_to_vec()],
        );
        fs::write(dir.path().join("pstree.img"), &bytes).unwrap();
        let found = tree(dir.path()).unwrap();
        assert_eq!((found.root, found.ids), (71, BTreeSet::from([70, 71, 72, 75])));
        for cut in 0..bytes.len() {
            fs::write(dir.path().join("pstree.img"), &bytes[..cut]).unwrap();
            // It may end between two records, and that cannot be seen.
            if let Ok(found) = tree(dir.path()) {
                assert_eq!(found.root, 71);
            }
        }
        fs::write(dir.path().join("pstree.img"), image(&[COMMON, STATS], &[])).unwrap();
        assert!(tree(dir.path()).unwrap_err().to_string().contains("not the image"));
    }

    #[test]
    fn the_network_lock_is_named_as_criu_cuts_it() {
        let dir = tempfile::tempdir().unwrap();
        let write = |id: Option<&str>| {
            let entry = InventoryEntry { img_version: 2, dump_criu_run_id: id.map(str::to_owned) };
            let bytes = image(&[INVENTORY], &[&|| entry.encode_to_vec()]);
            fs::write(dir.path().join("inventory.img"), bytes).unwrap();
        };
        write(Some("0d4c6c1a-0b5e-4f4c-9d3b-1f2e3d4c5b6a"));
        assert_eq!(network_lock(dir.path()).unwrap(), "CRIU-0d4c6c1a-0b5e-4f4c-9d");
        write(Some("x; flush ruleset"));
        assert!(network_lock(dir.path()).is_err());
        let bytes = image(&[COMMON, PSTREE], &[&|| process(71, &[]).encode_to_vec()]);
        fs::write(dir.path().join("pstree.img"), bytes).unwrap();
        write(None);
        assert_eq!(network_lock(dir.path()).unwrap(), "CRIU-71");
    }

    #[test]
    fn files_with_a_name_are_needed_and_nameless_ones_are_not() {
        use crate::snapshot::criu::messages::RegFileEntry;
        let dir = tempfile::tempdir().unwrap();
        let file = |id, name: &str, size| {
            let ext = Some(name.starts_with("file["));
            let build_id = if id <= 2 { vec![0x0403_0201, 5] } else { Vec::new() };
            let reg = RegFileEntry { id, name: name.into(), size, ext, mode: None, build_id };
            FileEntry { r#type: 1, id, reg: Some(reg) }.encode_to_vec()
        };
        let socket = FileEntry { r#type: 4, id: 9, reg: None }.encode_to_vec();
        let bytes = image(
            &[COMMON, FILES],
            &[
                &|| file(1, "/usr/sbin/x", Some(7)),
                &|| file(2, "/usr/sbin/x", Some(7)),
                &|| file(3, "/tmp/gone", Some(1)),
                &|| file(4, "/var/log/x", None),
                &|| file(5, "file[51:4]", None),
                &|| socket.clone(),
            ],
        );
        fs::write(dir.path().join("files.img"), bytes).unwrap();
        let remap = RemapFilePathEntry { orig_id: 3, remap_id: 1 };
        let bytes = image(&[COMMON, REMAP], &[&|| remap.encode_to_vec()]);
        fs::write(dir.path().join("remap-fpath.img"), bytes).unwrap();
        let needed = needed_files(dir.path()).unwrap();
        let names: Vec<_> = needed.iter().map(|file| (file.path.to_str().unwrap(), file.size)).collect();
        assert_eq!(names, [("/usr/sbin/x", Some(7)), ("/var/log/x", None)]);
        let [program, log] = needed.as_slice() else { panic!("{needed:?}") };
        assert!(
            program.has_build_id(Some(&[1, 2, 3, 4, 5])) && program.has_build_id(Some(&[1, 2, 3, 4, 5, 0]))
        );
        assert!(!program.has_build_id(Some(&[1, 2, 3, 4, 6])) && !program.has_build_id(None));
        assert!(log.has_build_id(None) && log.has_build_id(Some(&[9])));
    }

    #[test]
    fn programs_have_build_ids_and_other_files_have_none() {
        let own = std::env::current_exe().unwrap();
        let id = build_id(&own).unwrap();
        assert!(id.is_none_or(|id| id.len() >= 8));
        assert_eq!(build_id(Path::new("/etc/passwd")).unwrap(), None);
        assert!(build_id(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn memory_is_found_by_its_pagemap() {
        let dir = tempfile::tempdir().unwrap();
        let head = |pages_id| PagemapHead { pages_id }.encode_to_vec();
        let run = |vaddr, pages: u32, in_parent, flags, nr_pages| {
            PagemapEntry { vaddr, compat_nr_pages: pages, in_parent, flags, nr_pages }.encode_to_vec()
        };
        let bytes = image(
            &[COMMON, PAGEMAP],
            &[
                &|| head(3),
                &|| run(0x1000, 2, None, Some(4), None),
                // Not in this file: of the round before, or to come.
                &|| run(0x9000, 1, None, Some(5), None),
                &|| run(0xa000, 1, None, Some(2), None),
                &|| run(0xb000, 1, Some(true), None, None),
                &|| run(0xc000, 9, None, None, Some(1)),
            ],
        );
        fs::write(dir.path().join("pagemap-71.img"), &bytes).unwrap();
        fs::write(dir.path().join("pagemap-shmem-5.img"), image(&[COMMON, PAGEMAP], &[&|| head(4)])).unwrap();
        fs::write(dir.path().join("core-71.img"), "").unwrap();
        let found = pages(dir.path(), 4096).unwrap();
        let regions = [Region { address: 0x1000, len: 8192 }, Region { address: 0xc000, len: 4096 }];
        assert_eq!(
            found,
            BTreeMap::from([("pages-3.img".into(), regions.to_vec()), ("pages-4.img".into(), vec![])])
        );
        fs::write(dir.path().join("pagemap-71.img"), &bytes[..bytes.len() - 1]).unwrap();
        assert!(pages(dir.path(), 4096).is_err());
    }

    #[test]
    fn the_cost_of_a_dump_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let dump = DumpStatsEntry { frozen_time: 16_000, pages_written: 9, ..DumpStatsEntry::default() };
        let bytes = image(&[SERVICE, STATS], &[&|| StatsEntry { dump: Some(dump) }.encode_to_vec()]);
        fs::write(dir.path().join("stats-dump"), bytes).unwrap();
        let stats = dump_stats(dir.path()).unwrap();
        assert_eq!((stats.frozen_time, stats.pages_written), (16_000, 9));
        assert!(dump_stats(Path::new("/nowhere")).is_err());
    }

    proptest! {
        /// Whatever is in a file: an answer or an error.
        #[test]
        fn rubbish_is_an_error_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut image = image(&[COMMON, PSTREE], &[]);
            image.extend(&bytes);
            let _ = records::<PstreeEntry>(&image, &[COMMON, PSTREE]);
            let _ = records::<PstreeEntry>(&bytes, &[COMMON, PSTREE]);
        }
    }
}
