//! The files of a workload as a generation in the store, and back.
//!
//! A generation of files is one entry that lists them ([`Captured`], with the name of each content), and one entry
//! for each content. The list comes last, so that it names what was really stored: a file that was written to while
//! it was read has been read again, and only its last content counts.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{
    files::{self, CaptureError, Captured, Contents, Entry, PatternError, Selection},
    store::{self, About, Draft, Generation, Metadata, Snapshot, Store},
};
use crate::{config::Workload, unit::definition::Definition};

/// The entry that lists the files.
const LIST: &str = "files";
/// Metadata of the entries.
const KIND_LIST: &str = "files";
const KIND_CONTENT: &str = "content";

/// Why a generation could not be taken or opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The files.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Nothing is selected that is there.
    #[error(
        "none of the files of {workload} is there ({}). Correct files = [...] of the workload",
        unmatched.join(", ")
    )]
    Nothing {
        /// The workload.
        workload: String,
        /// Its patterns.
        unmatched: Vec<String>,
    },
    /// The list of files is damaged, or of a newer ftd.
    #[error(
        "generation {number} of {workload}: its list of files makes no sense ({cause}). See: ftctl snapshot verify"
    )]
    List {
        /// The workload.
        workload: String,
        /// The generation.
        number: u64,
        /// What is wrong.
        cause: String,
    },
}

/// The list, as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct List {
    captured: Captured,
    /// Path and name of its content, by path.
    contents: Vec<(files::Bytes, String)>,
}

fn key(path: &std::path::Path) -> files::Bytes {
    files::Bytes(path.as_os_str().as_encoded_bytes().to_vec())
}

/// The files of a workload whose units are defined so: those that it names, and, if it says so, those of its units.
pub fn selection(workload: &Workload, definitions: &[Definition]) -> Result<Selection, PatternError> {
    let named = Selection::parse(workload.files.iter().map(|file| file.as_ref().as_str()))?;
    let units = definitions.iter().filter(|_| workload.unit_files);
    named.with_places(units.flat_map(Definition::paths))
}

/// Takes the selected files into the store: a generation that is there, durable, when this returns. Waits for disks.
pub fn take(store: &Store, about: About, selection: &Selection) -> Result<(Generation, Captured), Error> {
    let workload = about.workload.clone();
    let mut draft = store.begin(about)?;
    let captured = add(&mut draft, &workload, selection)?;
    Ok((draft.commit()?, captured))
}

/// Adds the selected files to a generation that is being taken.
pub(super) fn add(draft: &mut Draft, workload: &str, selection: &Selection) -> Result<Captured, Error> {
    let (mut contents, mut count) = (BTreeMap::new(), 0_u64);
    let captured = files::capture(selection, &[], &mut |path, _, reader| {
        count += 1;
        let name = format!("{KIND_CONTENT}/{count}");
        let metadata = Metadata::new(KIND_CONTENT, &()).map_err(io::Error::other)?;
        draft.add(&name, metadata, reader).map_err(io::Error::other)?;
        contents.insert(key(path), name);
        Ok(())
    })?;
    if captured.entries.is_empty() {
        return Err(Error::Nothing { workload: workload.to_owned(), unmatched: captured.unmatched });
    }
    let list = List { captured, contents: contents.into_iter().collect() };
    let odd = |error: serde_json::Error| Error::List {
        workload: workload.to_owned(),
        number: 0,
        cause: error.to_string(),
    };
    let json = serde_json::to_vec(&list).map_err(odd)?;
    draft.add(LIST, Metadata::new(KIND_LIST, &()).map_err(odd)?, json.as_slice())?;
    Ok(list.captured)
}

/// The files of a generation.
#[derive(Debug)]
pub struct Files {
    snapshot: Snapshot,
    captured: Captured,
    names: BTreeMap<PathBuf, String>,
}

impl Files {
    /// Opens a generation; what is removed from the store meanwhile can be read all the same.
    pub fn open(store: &Store, workload: &str, number: u64) -> Result<Self, Error> {
        let snapshot = store.snapshot(workload, number)?;
        let odd = |cause: String| Error::List { workload: workload.to_owned(), number, cause };
        let mut json = Vec::new();
        snapshot.open_entry(LIST)?.read_to_end(&mut json).map_err(|error| odd(error.to_string()))?;
        let List { captured, contents } =
            serde_json::from_slice(&json).map_err(|error| odd(error.to_string()))?;
        let contents: BTreeMap<_, _> = contents.into_iter().collect();
        let names = captured
            .entries
            .iter()
            .filter_map(|entry| Some((entry.path.clone(), contents.get(&key(&entry.path))?.clone())));
        let names = names.collect();
        Ok(Self { snapshot, captured, names })
    }

    /// Whether a generation holds files: one of processes alone does not.
    pub fn any(store: &Store, workload: &str, number: u64) -> Result<bool, Error> {
        let manifest = store.manifest(workload, number)?;
        Ok(manifest.entries.iter().any(|entry| entry.name == LIST))
    }

    /// What was captured.
    pub fn captured(&self) -> &Captured {
        &self.captured
    }
}

impl Contents for Files {
    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Read + '_>> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "its content is not in the generation");
        let name = self.names.get(&entry.path).ok_or_else(missing)?;
        Ok(Box::new(self.snapshot.open_entry(name).map_err(io::Error::other)?))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::snapshot::{
        files::{Plan, compare, look},
        store::{Kind, Settings},
    };

    fn about() -> About {
        let (node, boot_id) = ("vm1".into(), "boot".into());
        About { workload: "web".into(), kind: Kind::Files, node, boot_id, time: jiff::Timestamp::now() }
    }

    #[test]
    fn files_come_back_from_the_store_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, store) = (dir.path().join("etc"), dir.path().join("store"));
        fs::create_dir_all(etc.join("conf.d")).unwrap();
        fs::write(etc.join("main.conf"), "listen 80\n").unwrap();
        fs::write(etc.join("conf.d/a.conf"), "a\n").unwrap();
        fs::write(etc.join("conf.d/b.conf"), "").unwrap();
        let selection = Selection::parse([etc.to_str().unwrap()]).unwrap();
        let store = Store::open(&store, Settings::default()).unwrap();
        let (generation, captured) = take(&store, about(), &selection).unwrap();
        assert_eq!(generation.number, 1);

        fs::write(etc.join("main.conf"), "nonsense\n").unwrap();
        fs::remove_dir_all(etc.join("conf.d")).unwrap();
        let kept = Files::open(&store, "web", 1).unwrap();
        assert_eq!(kept.captured(), &captured);
        let now = look(&selection, &[]).unwrap();
        assert_eq!(compare(&captured.entries, &now.entries, Some(&kept)).len(), 4);
        let plan = Plan::new(kept.captured(), Some(&selection)).unwrap();
        plan.apply(&kept, &mut |_, _| {}).unwrap();
        let now = look(&selection, &[]).unwrap();
        assert!(compare(&captured.entries, &now.entries, None).is_empty());
        assert_eq!(fs::read_to_string(etc.join("main.conf")).unwrap(), "listen 80\n");
    }

    #[test]
    fn an_unchanged_second_generation_stores_no_content_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("big");
        let content: Vec<u8> =
            (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(&file, content).unwrap();
        let selection = Selection::parse([file.to_str().unwrap()]).unwrap();
        let store = Store::open(&dir.path().join("store"), Settings::default()).unwrap();
        let first = take(&store, about(), &selection).unwrap().0.stats;
        let second = take(&store, about(), &selection).unwrap().0.stats;
        assert!(first.new >= 4_000_000 && second.new < 10_000, "{first:?} {second:?}");
    }

    #[test]
    fn files_of_which_none_is_there_are_an_error_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let selection = Selection::parse(["/nonexistent/a", "/nonexistent/b/*.conf"]).unwrap();
        let store = Store::open(&dir.path().join("store"), Settings::default()).unwrap();
        let error = take(&store, about(), &selection).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/b/*.conf"), "{error}");
        assert!(store.generations("web").unwrap().is_empty());
    }
}
