//! The store as a whole.

mod damage;
pub(super) mod faults;
mod kill;
mod model;
mod parcel;
mod torture;
mod transfer;

use std::io::Read as _;

use super::*;

/// Bytes that do not compress, always the same for a seed.
pub(super) fn noise(seed: u64, bytes: &mut [u8]) {
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(bytes);
}

pub(super) fn about(workload: &str) -> About {
    About {
        workload: workload.into(),
        kind: Kind::Files,
        node: "n".into(),
        boot_id: "b".into(),
        time: jiff::Timestamp::UNIX_EPOCH,
    }
}

/// Small, so that a little content makes several chunks and packs; one thread, so that each run is the same.
pub(super) fn settings() -> Settings {
    Settings {
        image_chunk: 16 << 10,
        file_chunk: 4 << 10,
        threads: 1,
        pack_bytes: 32 << 10,
        ..Settings::default()
    }
}

/// In memory where there is such a place: most tests sync thousands of times, and look at the order alone.
fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A store in a directory of its own, on a disk with faults.
struct Lab {
    dir: tempfile::TempDir,
    store: Store,
}

impl Lab {
    fn new() -> Self {
        Self::with(settings())
    }

    fn with(settings: Settings) -> Self {
        let dir = tempdir();
        let store = Store::open(dir.path(), settings).unwrap();
        Self { dir, store }
    }

    fn faults(&self) -> &faults::Faults {
        &self.store.disk().faults
    }

    /// Nothing that was known in memory is known after it.
    fn reopen(&mut self) {
        self.store = Store::open(self.dir.path(), settings()).unwrap();
    }

    fn files(&self) -> Vec<PathBuf> {
        let dirs = [self.store.packs_dir(), self.store.new_dir(), self.store.workload_dir("w")];
        dirs.iter().flat_map(|dir| index::list(dir).unwrap()).collect()
    }
}

/// A content of several chunks that only this seed has, with zeros in it.
pub(super) fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    noise(seed, &mut bytes[..len / 2]);
    let text = format!("line {seed}\n").repeat(len / 8);
    let rest = len / 4;
    bytes[len - rest..].copy_from_slice(&text.as_bytes()[..rest]);
    bytes
}

fn metadata() -> Metadata {
    Metadata::new("file", &0o644).unwrap()
}

/// A file without a name that holds this.
fn file(bytes: &[u8]) -> File {
    use std::io::Write as _;
    let mut file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn take(store: &Store, workload: &str, entries: &[(&str, &[u8])]) -> Result<u64> {
    take_of(store, about(workload), entries)
}

fn take_of(store: &Store, about: About, entries: &[(&str, &[u8])]) -> Result<u64> {
    let mut draft = store.begin(about)?;
    for (name, bytes) in entries {
        draft.add(name, metadata(), *bytes)?;
    }
    Ok(draft.commit()?.number)
}

fn read(store: &Store, workload: &str, number: u64, entry: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match store.snapshot(workload, number)?.open_entry(entry)?.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(*error.into_inner().unwrap().downcast().unwrap()),
    }
}

/// An entry of workload `w` as it is written to a file.
fn extracted(store: &Store, number: u64, entry: &str) -> Result<Vec<u8>> {
    let mut file = file(b"");
    let mut done = 0;
    store.snapshot("w", number)?.extract(entry, &file, &mut |more| done += more)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(done, bytes.len() as u64);
    Ok(bytes)
}

/// What a node of another name has taken.
fn from_elsewhere(workload: &str) -> About {
    About { node: "elsewhere".into(), ..about(workload) }
}

#[test]
fn what_is_taken_is_read_back_and_unchanged_chunks_are_stored_once() {
    let mut lab = Lab::with(Settings { threads: 0, ..settings() });
    let (a, b) = (content(1, 200_000), content(2, 70_000));
    let first = take(&lab.store, "w", &[("a", &a), ("b", &b), ("empty", b"")]).unwrap();
    let mut changed = a.clone();
    changed[100] ^= 1;
    let second = take(&lab.store, "w", &[("a", &changed), ("b", &b)]).unwrap();
    lab.reopen();
    for (number, entry, bytes) in
        [(first, "a", &a), (first, "b", &b), (first, "empty", &vec![]), (second, "a", &changed)]
    {
        assert!(read(&lab.store, "w", number, entry).unwrap() == *bytes, "{number} {entry}");
        assert!(extracted(&lab.store, number, entry).unwrap() == *bytes, "{number} {entry}");
    }
    let all = lab.store.generations("w").unwrap();
    assert_eq!(all.iter().map(|generation| generation.number).collect::<Vec<_>>(), [1, 2]);
    let (first, second) = (all[0].stats, all[1].stats);
    assert_eq!((first.total, second.total), (270_000, 270_000));
    assert!(first.new > 150_000 && first.stored < first.new, "{first:?}");
    assert!((1..=16 << 10).contains(&second.new) && second.stored < 20 << 10, "{second:?}");
}

#[test]
fn an_image_whose_pages_move_gives_the_same_chunks_and_zeros_cost_nothing() {
    let lab = Lab::new();
    let image = |pages: &[u64]| -> (Vec<u8>, Vec<Run>) {
        let page = |page: &u64| {
            let mut bytes = vec![0; 4096];
            noise(*page, &mut bytes);
            bytes
        };
        let runs = pages.iter().map(|page| Run { address: page * 4096, len: 4096 }).collect();
        (pages.iter().flat_map(page).collect(), runs)
    };
    let taken = |(bytes, runs): (Vec<u8>, Vec<Run>)| {
        let mut draft = lab.store.begin(about("w")).unwrap();
        let mut done = 0;
        draft.add_image("pages", metadata(), file(&bytes), &runs, &mut |more| done += more).unwrap();
        assert_eq!(done, bytes.len() as u64);
        let generation = draft.commit().unwrap();
        assert!(read(&lab.store, "w", generation.number, "pages").unwrap() == bytes);
        assert!(extracted(&lab.store, generation.number, "pages").unwrap() == bytes);
        generation.stats
    };
    let pages: Vec<u64> = (100..200).collect();
    assert_eq!(taken(image(&pages)).new, 100 * 4096);
    // One page less, in the window of pages 100 to 103: three pages are new, and all others have moved.
    assert_eq!(taken(image(&pages[1..])).new, 3 * 4096);
    let zeros = taken((vec![0; 10 << 20], vec![Run { address: 0, len: 10 << 20 }]));
    assert_eq!((zeros.total, zeros.new, zeros.stored), (10 << 20, 0, 0));
    let manifest = lab.store.manifest_path("w", 3);
    assert!(fs::metadata(manifest).unwrap().len() < 200);
}

#[test]
fn a_draft_that_is_dropped_leaves_nothing() {
    let lab = Lab::new();
    take(&lab.store, "w", &[("a", &content(1, 100_000))]).unwrap();
    let before = lab.files();
    let mut draft = lab.store.begin(about("w")).unwrap();
    draft.add("a", metadata(), content(2, 300_000).as_slice()).unwrap();
    drop(draft);
    assert_eq!(lab.files(), before);
}

#[test]
fn an_entry_that_cannot_be_read_is_said_and_the_draft_goes_on_without_it() {
    struct Broken(usize);
    impl std::io::Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(std::io::ErrorKind::ConnectionReset)?;
            buffer.fill(7);
            Ok(buffer.len())
        }
    }
    let lab = Lab::new();
    let mut draft = lab.store.begin(about("w")).unwrap();
    draft.add("a", metadata(), &b"1"[..]).unwrap();
    let error = draft.add("b", metadata(), Broken(3)).unwrap_err();
    assert!(error.to_string().contains("\"b\""), "{error}");
    assert!(matches!(draft.add("a", metadata(), &b"2"[..]), Err(Error::Twice { .. })));
    draft.add("c", metadata(), &b"3"[..]).unwrap();
    draft.commit().unwrap();
    assert_eq!(read(&lab.store, "w", 1, "a").unwrap(), b"1");
    assert_eq!(read(&lab.store, "w", 1, "c").unwrap(), b"3");
    assert!(matches!(read(&lab.store, "w", 1, "b"), Err(Error::NoEntry { .. })));
}

#[test]
fn an_image_whose_chunks_have_been_swept_or_damaged_is_stored_again() {
    let mut lab = Lab::with(Settings { threads: 0, ..settings() });
    let images: Vec<_> = (1..=3).map(|seed| content(seed, 300_000)).collect();
    let taken = |lab: &Lab, bytes: &[u8]| {
        let mut draft = lab.store.begin(about("w")).unwrap();
        draft.add_image("pages", metadata(), file(bytes), &[], &mut |_| ()).unwrap();
        draft.commit().unwrap()
    };
    let new = taken(&lab, &images[0]).stats.new;
    assert!(new > 100_000);
    assert_eq!(taken(&lab, &images[0]).stats.new, 0);
    // Another process sweeps both away.
    let other = Store::open(lab.dir.path(), settings()).unwrap();
    take(&other, "w", &[("a", b"3")]).unwrap();
    other.sweep(&Retention { count: Some(1), ..Retention::default() }, jiff::Timestamp::now()).unwrap();
    let again = taken(&lab, &images[0]);
    assert_eq!(again.stats.new, new);
    assert!(read(&lab.store, "w", again.number, "pages").unwrap() == images[0]);
    // Known by their prints or not: changed and unchanged ones are told apart.
    let mixed = [&images[1][..150_000], &images[0][150_000..]].concat();
    for bytes in [&mixed, &images[2], &images[0], &mixed, &mixed] {
        let number = taken(&lab, bytes).number;
        assert!(read(&lab.store, "w", number, "pages").unwrap() == *bytes, "{number}");
    }
    let newest = lab.store.generations("w").unwrap().pop().unwrap();
    assert_eq!((newest.stats.new, newest.stats.stored), (0, 0));
    lab.store.verify(|_, _| ()).unwrap();
    for pack in index::files(&lab.store.packs_dir(), "pack").unwrap() {
        let mut bytes = fs::read(&pack).unwrap();
        bytes[70] ^= 1;
        fs::write(&pack, bytes).unwrap();
    }
    assert!(!lab.store.verify(|_, _| ()).unwrap().damage.is_empty());
    let healed = taken(&lab, &mixed);
    assert!(healed.stats.new > 0);
    assert!(read(&lab.store, "w", healed.number, "pages").unwrap() == mixed);
    lab.reopen();
    assert!(read(&lab.store, "w", newest.number, "pages").unwrap() == mixed);
}

#[test]
fn an_image_that_cannot_be_read_is_said_and_the_draft_goes_on_without_it() {
    let lab = Lab::with(Settings { threads: 0, ..settings() });
    let mut draft = lab.store.begin(about("w")).unwrap();
    // It has a length, and reading it fails.
    let directory = File::open(lab.dir.path()).unwrap();
    assert!(directory.metadata().unwrap().len() > 0);
    let error = draft.add_image("pages", metadata(), directory, &[], &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("\"pages\""), "{error}");
    let bytes = content(1, 100_000);
    draft.add_image("pages", metadata(), file(&bytes), &[], &mut |_| ()).unwrap();
    let number = draft.commit().unwrap().number;
    assert!(read(&lab.store, "w", number, "pages").unwrap() == bytes);
}

#[test]
fn one_writes_at_a_time_and_marking_does_not_wait_for_it() {
    let lab = Lab::new();
    take(&lab.store, "w", &[("a", b"1")]).unwrap();
    let other = Store::open(lab.dir.path(), settings()).unwrap();
    let draft = lab.store.begin(about("w")).unwrap();
    for error in [other.begin(about("w")).unwrap_err(), other.gc().unwrap_err()] {
        assert!(matches!(error, Error::Busy { .. }), "{error}");
    }
    other.mark_good("w", 1).unwrap();
    assert_eq!(lab.store.last_good("w").unwrap().unwrap().number, 1);
    drop(draft);
    other.begin(about("w")).unwrap();
}

#[test]
fn who_reads_is_not_disturbed_by_what_is_removed_meanwhile() {
    let lab = Lab::new();
    let bytes = content(1, 200_000);
    take(&lab.store, "w", &[("a", &bytes)]).unwrap();
    let reader = Store::open(lab.dir.path(), settings()).unwrap();
    let snapshot = reader.snapshot("w", 1).unwrap();
    let mut entry = snapshot.open_entry("a").unwrap();
    let mut begin = vec![0; 1000];
    entry.read_exact(&mut begin).unwrap();
    take(&lab.store, "w", &[("a", b"2")]).unwrap();
    let one = Retention { count: Some(1), ..Retention::default() };
    let freed = lab.store.sweep(&one, jiff::Timestamp::now()).unwrap();
    assert_eq!(freed.generations, [("w".into(), 1)]);
    assert!(freed.bytes > 100_000);
    let mut rest = Vec::new();
    entry.read_to_end(&mut rest).unwrap();
    assert!([begin, rest].concat() == bytes);
    assert!(matches!(reader.snapshot("w", 1), Err(Error::NoGeneration { .. })));
    // What another process has moved is found where it is now.
    assert_eq!(read(&reader, "w", 2, "a").unwrap(), b"2");
}

#[test]
fn readers_see_whole_generations_while_others_write_and_sweep() {
    let lab = Lab::new();
    let bytes = |number: u64| [content(1, 20_000), content(number + 10, 30_000)].concat();
    take(&lab.store, "w", &[("a", &bytes(1))]).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = || {
            // As another process: nothing is shared but the directory.
            let store = Store::open(lab.dir.path(), settings()).unwrap();
            let mut whole = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                for generation in store.generations("w").unwrap() {
                    match read(&store, "w", generation.number, "a") {
                        Ok(read) => assert!(read == bytes(generation.number)),
                        Err(Error::NoGeneration { .. }) => continue,
                        Err(error) => panic!("{error}"),
                    }
                    whole += 1;
                }
            }
            whole
        };
        let readers = [scope.spawn(reader), scope.spawn(reader)];
        let two = Retention { count: Some(2), ..Retention::default() };
        for number in 2..80 {
            assert_eq!(take(&lab.store, "w", &[("a", &bytes(number))]).unwrap(), number);
            lab.store.sweep(&two, jiff::Timestamp::now()).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > 10);
        }
    });
}

#[test]
fn a_pack_that_is_mostly_dead_is_copied_and_many_small_ones_are_made_one() {
    let lab = Lab::with(Settings { pack_bytes: 64 << 20, ..settings() });
    let keep = content(1, 20_000);
    take(&lab.store, "w", &[("keep", &keep), ("a", &content(2, 300_000))]).unwrap();
    take(&lab.store, "w", &[("keep", &keep)]).unwrap();
    let reader = Store::open(lab.dir.path(), settings()).unwrap();
    reader.refresh().unwrap();
    let one = Retention { count: Some(1), ..Retention::default() };
    lab.store.sweep(&one, jiff::Timestamp::now()).unwrap();
    assert!(lab.store.used().unwrap() < 30_000, "{}", lab.store.used().unwrap());
    assert!(read(&reader, "w", 2, "keep").unwrap() == keep);
    for number in 3..43 {
        let text = number.to_string();
        assert_eq!(take(&lab.store, "w", &[("a", text.as_bytes()), ("keep", &keep)]).unwrap(), number);
    }
    lab.store.gc().unwrap();
    assert_eq!(index::files(&lab.store.packs_dir(), "pack").unwrap().len(), 1);
    for number in 3..43 {
        assert_eq!(read(&lab.store, "w", number, "a").unwrap(), number.to_string().as_bytes());
    }
    assert_eq!(lab.store.verify(|_, _| ()).unwrap().damage, []);
}

#[test]
fn more_than_the_quota_is_refused_with_what_to_do_and_leaves_nothing() {
    let lab = Lab::with(Settings { quota: Some(150_000), ..settings() });
    take(&lab.store, "w", &[("a", &content(1, 100_000))]).unwrap();
    let before = lab.files();
    let error = take(&lab.store, "w", &[("a", &content(2, 300_000))]).unwrap_err();
    assert!(matches!(error, Error::Quota { quota: 150_000, .. }), "{error}");
    assert!(error.to_string().contains("ftctl snapshot gc"));
    assert_eq!(lab.files(), before);
    assert!(lab.store.used().unwrap() <= 150_000);
    // What is there already needs next to nothing.
    take(&lab.store, "w", &[("a", &content(1, 100_000))]).unwrap();
}

#[test]
fn all_can_be_passed_to_another_thread() {
    fn passed<T: Send>() {}
    passed::<Store>();
    passed::<Draft>();
    passed::<Snapshot>();
    passed::<EntryReader>();
}

#[test]
fn what_cannot_be_is_refused() {
    let lab = Lab::new();
    for name in ["", ".", "../x", "a/b", "a\0"] {
        assert!(matches!(lab.store.begin(about(name)), Err(Error::Name { .. })), "{name:?}");
        assert!(matches!(lab.store.manifest(name, 1), Err(Error::NoGeneration { .. })), "{name:?}");
    }
    assert!(matches!(lab.store.mark_good("w", 1), Err(Error::NoGeneration { .. })));
    assert_eq!(lab.store.last_good("w").unwrap(), None);
    let dir = tempfile::tempdir().unwrap();
    for settings in [
        Settings { image_chunk: 20 << 10, ..settings() },
        Settings { image_chunk: 8 << 10, ..settings() },
        Settings { file_chunk: 1 << 20, ..settings() },
        Settings { level: 0, ..settings() },
    ] {
        assert!(matches!(Store::open(dir.path(), settings), Err(Error::Setting { .. })));
    }
    fs::create_dir(dir.path().join("v3")).unwrap();
    let error = Store::open(dir.path(), settings()).unwrap_err();
    assert!(matches!(error, Error::Newer { found: 3, known: 1, .. }), "{error}");
    assert!(!dir.path().join("v1").exists());
}
