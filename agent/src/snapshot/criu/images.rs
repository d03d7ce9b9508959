//! What ftd reads of CRIU's images: which PIDs they will need, what the dump cost, and the name of the
//! network lock. All else in them is CRIU's own business.
//!
//! An image is one or two magic numbers, then records: a length in 4 bytes, and a message of so many
//! (magic.h, protobuf.c of CRIU). They come from a store or another host, so nothing in them is trusted: lengths
//! are held against what is there.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use prost::Message;

use super::messages::{
    DumpStatsEntry, FileEntry, InventoryEntry, PstreeEntry, RemapFilePathEntry, StatsEntry,
};

const COMMON: u32 = 0x5456_4319;
const SERVICE: u32 = 0x5510_5940;
const PSTREE: u32 = 0x5027_3030;
const STATS: u32 = 0x5709_3306;
const INVENTORY: u32 = 0x5831_3116;
const FILES: u32 = 0x5630_3138;
const REMAP: u32 = 0x5913_3954;

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
    let needed = named.map(|file| NeededFile { path: Path::new("/").join(&file.name), size: file.size });
    let mut needed: Vec<_> = needed.collect();
    needed.sort();
    needed.dedup();
    Ok(needed)
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
        all.push(M::decode(record)?);
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
            let reg = RegFileEntry { id, name: name.into(), size, ext, mode: None };
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
