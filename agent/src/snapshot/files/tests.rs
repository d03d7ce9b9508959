//! Capture, compare and restore together, on real files.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use proptest::prelude::*;
use rustix::fs::{XattrFlags, setxattr};
use tempfile::TempDir;

use super::{
    CaptureError, Captured, Change, Contents, Entry, Kind, Pattern, Plan, RestoreError, Selection, capture,
    compare, look,
};

mod crash;
mod trees;

/// Contents in memory.
#[derive(Debug, Default)]
struct Vault(HashMap<blake3::Hash, Vec<u8>>);

impl Contents for Vault {
    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Read + '_>> {
        let Kind::File { hash, .. } = &entry.kind else { return Err(io::ErrorKind::InvalidInput.into()) };
        self.0
            .get(hash)
            .map(|content| Box::new(&**content) as Box<dyn Read>)
            .ok_or(io::ErrorKind::NotFound.into())
    }
}

/// A directory with a few files in it, which are captured.
struct Site {
    dir: TempDir,
    selection: Selection,
    vault: Vault,
    captured: Captured,
}

impl Site {
    /// `make` fills the directory `site`, which is selected.
    fn new(make: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let site = dir.path().join("site");
        fs::create_dir(&site).unwrap();
        make(&site);
        let selection = Selection::new([Pattern::exact(&site).unwrap()]);
        let (captured, vault) = take(&selection);
        Self { dir, selection, vault, captured }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("site").join(name)
    }

    fn restore(&self, exact: bool) -> Result<(), RestoreError> {
        Plan::new(&self.captured, exact.then_some(&self.selection))?.apply(&self.vault, &mut |_, _| ())
    }

    /// The only changes there are, of this path.
    fn changes(&self, name: &str) -> Vec<Change> {
        let now = look(&self.selection, &self.captured.entries).unwrap();
        let mut differences = compare(&self.captured.entries, &now.entries, Some(&self.vault));
        assert_eq!(differences.len(), 1, "{differences:?}");
        let difference = differences.remove(0);
        assert_eq!(difference.path, self.path(name));
        difference.changes
    }
}

fn take(selection: &Selection) -> (Captured, Vault) {
    let mut vault = Vault::default();
    let captured = capture(selection, &[], &mut |_, size, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        assert_eq!(bytes.len() as u64, size);
        vault.0.insert(blake3::hash(&bytes), bytes);
        Ok(())
    })
    .unwrap();
    (captured, vault)
}

/// Without what is never the same again.
fn plain(captured: Captured) -> Vec<Entry> {
    captured.entries.into_iter().map(|entry| Entry { seen: None, ..entry }).collect()
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn write(path: impl AsRef<Path>, content: &str) {
    fs::write(path, content).unwrap();
}

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

// === capture ===

#[test]
fn what_is_no_file_is_named_and_what_is_not_there_too() {
    let dir = tempfile::tempdir().unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    write(dir.path().join("a.conf"), "a");
    write(dir.path().join(".b.conf"), "b");
    let dir = dir.path().to_str().unwrap();
    let patterns = ["*.conf", "nothing/*", "socket", "fifo"].map(|name| format!("{dir}/{name}"));
    let (captured, _) = take(&Selection::parse(patterns.iter().map(String::as_str)).unwrap());
    let paths: Vec<_> = captured.entries.iter().map(|entry| entry.path.clone()).collect();
    assert_eq!(paths, [Path::new(dir).join("a.conf")]);
    assert_eq!(captured.unmatched, [patterns[1].clone()]);
    let skipped: Vec<_> = captured.skipped.iter().map(|skipped| skipped.why.as_str()).collect();
    assert_eq!(skipped, ["a socket", "a FIFO"]);
    assert_eq!(captured.parents.last().unwrap().path, Path::new(dir));
}

#[test]
fn links_are_captured_as_links() {
    let secret = tempfile::tempdir().unwrap();
    write(secret.path().join("shadow"), "secret");
    let site = Site::new(|site| {
        symlink(secret.path(), site.join("dir")).unwrap();
        symlink(secret.path().join("shadow"), site.join("file")).unwrap();
        symlink("nowhere", site.join("dangling")).unwrap();
    });
    assert!(site.vault.0.is_empty());
    assert_eq!(site.captured.entries.len(), 4);
    assert!(site.captured.entries[1..].iter().all(|entry| matches!(entry.kind, Kind::Symlink { .. })));
}

#[test]
fn on_the_way_only_links_that_root_put_there_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("real")).unwrap();
    write(dir.path().join("real/a"), "a");
    symlink("./x/../real", dir.path().join("link")).unwrap_or_else(|error| panic!("{error}"));
    fs::create_dir(dir.path().join("x")).unwrap();
    let selection = Selection::new([Pattern::exact(&dir.path().join("link/a")).unwrap()]);
    assert_eq!(take(&selection).0.entries.len(), 1);
    if is_root() {
        std::os::unix::fs::lchown(dir.path().join("link"), Some(33), Some(33)).unwrap();
        let (captured, _) = take(&selection);
        assert!(captured.entries.is_empty());
        assert!(captured.skipped[0].why.contains("symlink"));
    }
}

#[test]
fn overlapping_patterns_capture_once() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    write(dir.path().join("a/b/c"), "c");
    let dir = dir.path().to_str().unwrap();
    let patterns = ["a/b/c", "a/*", "**/c", "a"].map(|name| format!("{dir}/{name}"));
    let (captured, _) = take(&Selection::parse(patterns.iter().map(String::as_str)).unwrap());
    assert_eq!(captured.entries.len(), 3, "{captured:?}");
}

#[test]
fn a_file_that_changes_while_it_is_read_is_read_again_and_at_last_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    write(&path, "one");
    let selection = Selection::new([Pattern::exact(&path).unwrap()]);
    let calls = Cell::new(0);
    let run = |times: u32, change: &dyn Fn()| {
        calls.set(0);
        capture(&selection, &[], &mut |_, _, content| {
            calls.set(calls.get() + 1);
            if calls.get() <= times {
                change();
            }
            io::copy(content, &mut io::sink()).map(|_| ())
        })
    };
    let append = || File::options().append(true).open(&path).unwrap().write_all(b"x").unwrap();
    let captured = run(2, &append).unwrap();
    assert!(
        matches!(captured.entries[0].kind, Kind::File { size: 5, hash } if hash == blake3::hash(b"onexx"))
    );
    assert!(run(1, &|| fs::write(&path, "").unwrap()).is_ok());
    assert!(run(1, &|| chmod(&path, 0o600)).is_ok());
    assert_eq!(calls.get(), 2);
    assert!(run(1, &|| fs::remove_file(&path).unwrap()).unwrap().entries.is_empty());
    write(&path, "one");
    let error = run(99, &append).unwrap_err();
    assert!(matches!(&error, CaptureError::Changing { .. }) && error.to_string().contains("log"), "{error}");
}

#[test]
fn a_keeper_that_fails_is_not_a_file_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path().join("a"), "a");
    let selection = Selection::new([Pattern::exact(dir.path()).unwrap()]);
    let result = capture(&selection, &[], &mut |_, _, _| Err(io::ErrorKind::StorageFull.into()));
    assert!(matches!(result, Err(CaptureError::Keep { .. })));
}

#[test]
fn a_file_that_is_known_is_not_read_again_until_it_changes() {
    let site = Site::new(|site| write(site.join("a"), "one"));
    assert_eq!(site.captured.entries[1].seen, None, "too young to be sure");
    std::thread::sleep(std::time::Duration::from_millis(2200));
    let known = take(&site.selection).0.entries;
    let read = |expected: &str| {
        let seen = RefCell::new(String::new());
        let captured = capture(&site.selection, &known, &mut |_, _, c| {
            c.read_to_string(&mut seen.borrow_mut()).map(|_| ())
        });
        assert_eq!(seen.into_inner(), expected);
        captured.unwrap().entries
    };
    assert_eq!(read(""), known);
    // As long, and with the same time.
    let time = fs::metadata(site.path("a")).unwrap().modified().unwrap();
    write(site.path("a"), "two");
    File::options().write(true).open(site.path("a")).unwrap().set_modified(time).unwrap();
    assert_ne!(read("two"), known);
}

// === compare ===

#[test]
fn every_kind_of_difference_is_found() {
    let make = |site: &Path| {
        write(site.join("file"), "one two three");
        fs::create_dir(site.join("dir")).unwrap();
        symlink("file", site.join("link")).unwrap();
    };
    let changes = |name: &str, change: &dyn Fn(&Path)| {
        let site = Site::new(make);
        change(&site.path(name));
        let changes = site.changes(name);
        site.restore(true).unwrap();
        assert_eq!(plain(look(&site.selection, &[]).unwrap()), plain(site.captured.clone()), "{changes:?}");
        changes
    };
    assert_eq!(changes("new", &|path| write(path, "")), [Change::Created {}]);
    assert_eq!(changes("file", &|path| fs::remove_file(path).unwrap()), [Change::Deleted {}]);
    assert_eq!(changes("dir", &|path| fs::remove_dir(path).unwrap()), [Change::Deleted {}]);
    assert_eq!(changes("file", &|path| write(path, "")), [Change::Emptied { from: 13 }]);
    assert_eq!(changes("file", &|path| write(path, "one two")), [Change::Truncated { from: 13, to: 7 }]);
    assert_eq!(changes("file", &|path| write(path, "one two.")), [Change::Content { from: 13, to: 8 }]);
    assert_eq!(
        changes("file", &|path| write(path, "one two three four")),
        [Change::Content { from: 13, to: 18 }]
    );
    assert_eq!(changes("file", &|path| write(path, "one too three")), [Change::Content { from: 13, to: 13 }]);
    let from = fs::metadata("/proc/self").map_or(0, |meta| meta.uid());
    for (name, mode) in [("file", 0o600), ("dir", 0o711)] {
        let changes = changes(name, &|path| chmod(path, mode));
        assert!(matches!(changes[..], [Change::Mode { to, .. }] if to == mode), "{changes:?}");
    }
    let changes_of_kind = changes("file", &|path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    });
    assert_eq!(changes_of_kind, [Change::Kind { from: "file".into(), to: "directory".into() }]);
    let relinked = changes("link", &|path| {
        fs::remove_file(path).unwrap();
        symlink("dir", path).unwrap();
    });
    assert!(matches!(&relinked[..], [Change::Target { to, .. }] if to.0 == b"dir"), "{relinked:?}");
    if is_root() {
        for name in ["file", "dir", "link"] {
            let changes = changes(name, &|path| std::os::unix::fs::lchown(path, Some(33), None).unwrap());
            assert!(
                matches!(changes[..], [Change::Owner { from: (f, _), to: (33, _) }] if f == from),
                "{changes:?}"
            );
        }
        let changes = changes("file", &|path| setxattr(path, "user.a", b"1", XattrFlags::empty()).unwrap());
        assert!(matches!(&changes[..], [Change::Xattrs { names }] if names[0].0 == b"user.a"), "{changes:?}");
    }
}

#[test]
fn a_file_that_was_only_touched_is_the_same() {
    let site = Site::new(|site| write(site.join("a"), "one"));
    let file = File::options().write(true).open(site.path("a")).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let now = look(&site.selection, &site.captured.entries).unwrap();
    assert_eq!(compare(&site.captured.entries, &now.entries, None), []);
}

#[test]
fn differences_are_said_in_words() {
    let site = Site::new(|site| {
        write(site.join("a"), "one two");
        chmod(site.join("a"), 0o644);
    });
    write(site.path("a"), "one");
    chmod(site.path("a"), 0o600);
    let now = look(&site.selection, &[]).unwrap();
    let text = compare(&site.captured.entries, &now.entries, Some(&site.vault))[0].to_string();
    assert!(text.ends_with("/site/a: truncated from 7 to 3 bytes, mode 0644 -> 0600"), "{text}");
}

// === restore ===

#[test]
fn a_dry_run_says_all_and_does_nothing() {
    let site = Site::new(|site| {
        write(site.join("a"), "one");
        write(site.join("b"), "two");
        chmod(site.join("b"), 0o644);
        fs::create_dir(site.join("d")).unwrap();
        write(site.join("d/c"), "three");
    });
    write(site.path("a"), "");
    chmod(site.path("b"), 0o600);
    fs::remove_dir_all(site.path("d")).unwrap();
    write(site.path("extra"), "");
    let before = plain(look(&site.selection, &[]).unwrap());
    let plan = Plan::new(&site.captured, Some(&site.selection)).unwrap();
    let base = site.path("");
    let base = base.to_str().unwrap();
    let steps: Vec<_> = plan.steps().iter().map(|step| step.to_string().replace(base, "")).collect();
    assert_eq!(
        steps,
        [
            "write a (3 bytes)",
            "set b: mode 0600 -> 0644",
            "make directory d",
            "write d/c (5 bytes)",
            "remove extra"
        ]
    );
    assert_eq!(plan.bytes(), 8);
    drop(plan);
    assert_eq!(plain(look(&site.selection, &[]).unwrap()), before);
    let (mut told, plan) = (Vec::new(), Plan::new(&site.captured, None).unwrap());
    plan.apply(&site.vault, &mut |done, of| told.push((done, of))).unwrap();
    assert_eq!(told, [(3, 8), (8, 8)]);
    assert!(site.path("extra").exists(), "left alone unless asked for");
    site.restore(true).unwrap();
    assert!(!site.path("extra").exists());
    assert!(Plan::new(&site.captured, Some(&site.selection)).unwrap().steps().is_empty());
}

#[test]
fn directories_above_are_made_again_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    chmod(dir.path().join("a"), 0o750);
    write(dir.path().join("a/b/c"), "c");
    let selection = Selection::new([Pattern::exact(&dir.path().join("a/b/c")).unwrap()]);
    let (mut captured, vault) = take(&selection);
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    Plan::new(&captured, None).unwrap().apply(&vault, &mut |_, _| ()).unwrap();
    assert_eq!(fs::read(dir.path().join("a/b/c")).unwrap(), b"c");
    assert_eq!(fs::metadata(dir.path().join("a")).unwrap().mode() & 0o7777, 0o750);
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    captured.parents.pop();
    let error = Plan::new(&captured, None).unwrap_err();
    assert!(
        matches!(&error, RestoreError::ParentMissing { parent, .. } if parent.ends_with("a/b")),
        "{error}"
    );
    // A link that leads nowhere yet is somebody's intention.
    fs::remove_dir_all(dir.path().join("a")).unwrap_or_default();
    symlink("/nonexistent/ftd", dir.path().join("a")).unwrap();
    assert!(matches!(Plan::new(&captured, None), Err(RestoreError::ParentMissing { .. })));
}

#[test]
fn a_damaged_or_missing_content_changes_nothing() {
    let mut site = Site::new(|site| {
        write(site.join("a"), "one");
        write(site.join("b"), "two");
    });
    write(site.path("a"), "");
    write(site.path("b"), "");
    let before = plain(look(&site.selection, &[]).unwrap());
    let hash = blake3::hash(b"two");
    for content in [Some("twO"), Some("tw"), Some("twoo"), None] {
        match content {
            Some(content) => _ = site.vault.0.insert(hash, content.into()),
            None => _ = site.vault.0.remove(&hash),
        }
        let error = site.restore(false).unwrap_err();
        let expected = matches!(
            (&error, content),
            (RestoreError::Damaged { .. }, Some(_)) | (RestoreError::Content { .. }, None)
        );
        assert!(expected, "{error}");
        assert_eq!(fs::read_dir(site.path("")).unwrap().count(), 2, "no temporary files");
        let after = plain(look(&site.selection, &[]).unwrap());
        let files = |entries: &[Entry]| entries[1..].to_vec();
        assert_eq!(files(&after), files(&before));
    }
}

#[test]
fn a_file_with_other_names_elsewhere_is_replaced_and_not_changed() {
    let site = Site::new(|site| {
        write(site.join("a"), "one");
        chmod(site.join("a"), 0o644);
    });
    let elsewhere = site.dir.path().join("elsewhere");
    fs::hard_link(site.path("a"), &elsewhere).unwrap();
    chmod(site.path("a"), 0o600);
    site.restore(false).unwrap();
    assert_eq!(fs::metadata(site.path("a")).unwrap().mode() & 0o777, 0o644);
    assert_eq!(fs::metadata(elsewhere).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn what_an_immutable_file_needs_is_said_before_anything_is_touched() {
    use rustix::fs::{IFlags, ioctl_setflags};
    let site = Site::new(|site| {
        write(site.join("a"), "one");
        write(site.join("b"), "two");
    });
    write(site.path("a"), "");
    write(site.path("b"), "");
    let file = File::open(site.path("b")).unwrap();
    if ioctl_setflags(&file, IFlags::IMMUTABLE).is_err() {
        return; // not root, or a file system without
    }
    let error = site.restore(false);
    ioctl_setflags(&file, IFlags::empty()).unwrap();
    assert!(matches!(error, Err(RestoreError::Immutable { .. })), "{error:?}");
    assert_eq!(fs::read(site.path("a")).unwrap(), b"");
}

#[test]
fn a_file_system_that_is_full_or_read_only_is_not_touched() {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    let site = Site::new(|site| {
        write(site.join("small"), "one");
        write(site.join("large"), &"x".repeat(100 << 10));
    });
    // In a mount namespace of its own, which goes with the thread.
    let test = || {
        let none: Option<&str> = None;
        if unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).is_err() {
            return; // not root
        }
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(none, &site.path(""), Some("tmpfs"), MsFlags::empty(), Some("size=64k,mode=755")).unwrap();
        let error = site.restore(false).unwrap_err();
        assert!(matches!(error, RestoreError::NoSpace { files: 2, .. }), "{error}");
        mount(none, &site.path(""), none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).unwrap();
        let error = site.restore(false).unwrap_err();
        assert!(
            error.to_string().contains("Read-only file system")
                && error.to_string().contains("ReadWritePaths=")
        );
        assert_eq!(fs::read_dir(site.path("")).unwrap().count(), 0);
    };
    std::thread::scope(|scope| scope.spawn(test).join().unwrap());
}

#[test]
fn a_link_put_in_place_of_a_directory_leads_no_write_astray() {
    let site = Site::new(|site| {
        fs::create_dir(site.join("d")).unwrap();
        write(site.join("d/passwd"), "ours");
    });
    let elsewhere = tempfile::tempdir().unwrap();
    write(elsewhere.path().join("passwd"), "theirs");
    fs::remove_dir_all(site.path("d")).unwrap();
    symlink(elsewhere.path(), site.path("d")).unwrap();
    site.restore(true).unwrap();
    assert_eq!(fs::read(elsewhere.path().join("passwd")).unwrap(), b"theirs");
    assert_eq!(plain(look(&site.selection, &[]).unwrap()), plain(site.captured));
}
