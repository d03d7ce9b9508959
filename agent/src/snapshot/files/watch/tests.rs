//! Real changes of real files, each of which must be told.

use std::{
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;

const TIMING: Timing = Timing { settle: Duration::from_millis(60), at_most: Duration::from_millis(600) };
const PATIENCE: Duration = Duration::from_secs(10);

struct Watched {
    dir: TempDir,
    told: mpsc::Receiver<Batch>,
}

impl Watched {
    /// Watches patterns in a directory that `make` has filled.
    async fn new(patterns: &[&str], make: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let patterns: Vec<_> = patterns.iter().map(|p| format!("{}/{p}", dir.path().display())).collect();
        let selection = Selection::parse(patterns.iter().map(String::as_str)).unwrap();
        let told = watch(selection, TIMING).await.unwrap();
        Self { dir, told }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The next batch, relative to the directory.
    async fn next(&mut self) -> Vec<String> {
        let batch = timeout(PATIENCE, self.told.recv()).await.expect("nothing was told").unwrap();
        assert_eq!(batch.everything, None);
        batch
            .paths
            .iter()
            .map(|path| path.strip_prefix(self.dir.path()).unwrap().to_str().unwrap().to_owned())
            .collect()
    }

    /// Nothing is told for a while.
    async fn quiet(&mut self) {
        let told = timeout(TIMING.settle * 4, self.told.recv()).await;
        assert!(told.is_err(), "{told:?}");
    }
}

fn write(path: impl AsRef<Path>, content: &str) {
    fs::write(path, content).unwrap();
}

#[tokio::test]
async fn whatever_happens_to_a_file_is_told() {
    let mut w = Watched::new(&["etc/a.conf"], |dir| {
        fs::create_dir(dir.join("etc")).unwrap();
        write(dir.join("etc/a.conf"), "one");
        write(dir.join("etc/b.conf"), "other");
    })
    .await;
    let (file, other) = (w.path("etc/a.conf"), w.path("etc/b.conf"));
    let new = w.path("etc/a.conf.new");
    let changes: &[(&str, &dyn Fn())] = &[
        ("write", &|| write(&file, "two")),
        ("truncate", &|| nix::unistd::truncate(&file, 1).unwrap()),
        ("append", &|| File::options().append(true).open(&file).unwrap().write_all(b"x").unwrap()),
        ("chmod", &|| fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap()),
        ("chown", &|| std::os::unix::fs::chown(&file, None, Some(nix::unistd::getegid().as_raw())).unwrap()),
        ("xattr", &|| rustix::fs::setxattr(&file, "user.a", b"1", rustix::fs::XattrFlags::empty()).unwrap()),
        ("rename over", &|| {
            write(&new, "three");
            fs::rename(&new, &file).unwrap();
        }),
        ("after that", &|| write(&file, "four")),
        ("delete", &|| fs::remove_file(&file).unwrap()),
        ("make", &|| write(&file, "five")),
        ("a link instead", &|| {
            fs::remove_file(&file).unwrap();
            symlink("b.conf", &file).unwrap();
        }),
    ];
    for (what, change) in changes {
        change();
        assert_eq!(w.next().await, ["etc/a.conf"], "{what}");
    }
    write(&other, "not selected");
    w.quiet().await;
}

#[tokio::test]
async fn a_file_is_told_when_the_directories_above_come_and_go() {
    let mut w = Watched::new(&["a/b/file"], |_| ()).await;
    fs::create_dir(w.path("a")).unwrap();
    w.next().await;
    fs::create_dir(w.path("a/b")).unwrap();
    write(w.path("a/b/file"), "at once");
    assert_eq!(w.next().await, ["a/b/file"]);
    write(w.path("a/b/file"), "later");
    assert_eq!(w.next().await, ["a/b/file"]);
    fs::remove_dir_all(w.path("a")).unwrap();
    assert_eq!(w.next().await, ["a/b/file"]);
    fs::create_dir_all(w.path("a/b")).unwrap();
    assert_eq!(w.next().await, ["a/b/file"]);
    write(w.path("a/b/file"), "made again");
    assert_eq!(w.next().await, ["a/b/file"]);
    fs::rename(w.path("a"), w.path("old")).unwrap();
    assert_eq!(w.next().await, ["a/b/file"]);
    write(w.path("old/b/file"), "not ours any more");
    w.quiet().await;
    // Away and back at once: another inode by the same name.
    fs::create_dir_all(w.path("new/b")).unwrap();
    write(w.path("new/b/file"), "new");
    fs::rename(w.path("new"), w.path("a")).unwrap();
    assert_eq!(w.next().await, ["a/b/file"]);
    write(w.path("a/b/file"), "and watched");
    assert_eq!(w.next().await, ["a/b/file"]);
}

#[tokio::test]
async fn a_directory_is_watched_with_all_below_it() {
    let mut w = Watched::new(&["d"], |dir| fs::create_dir_all(dir.join("d/e")).unwrap()).await;
    fs::create_dir_all(w.path("d/e/f/g")).unwrap();
    write(w.path("d/e/f/g/file"), "at once");
    let told = w.next().await;
    assert!(told.contains(&"d/e/f/g/file".into()), "{told:?}");
    write(w.path("d/e/f/g/file"), "later");
    assert_eq!(w.next().await, ["d/e/f/g/file"]);
    fs::set_permissions(w.path("d"), Permissions::from_mode(0o700)).unwrap();
    assert_eq!(w.next().await, ["d"]);
    fs::rename(w.path("d/e"), w.path("e")).unwrap();
    let told = w.next().await;
    assert!(told.contains(&"d/e".into()), "{told:?}");
    write(w.path("e/f/g/file"), "not selected any more");
    w.quiet().await;
    write(w.path("d/.ftd-restore-1-0"), "ftd's own");
    w.quiet().await;
}

#[tokio::test]
async fn a_new_file_that_fits_a_pattern_is_told() {
    let mut w = Watched::new(&["conf.d/*.conf", "*/on.conf"], |_| ()).await;
    fs::create_dir(w.path("conf.d")).unwrap();
    write(w.path("conf.d/a.conf"), "a");
    let told = w.next().await;
    assert!(told.contains(&"conf.d/a.conf".into()), "{told:?}");
    write(w.path("conf.d/b.txt"), "no");
    w.quiet().await;
    write(w.path("conf.d/b.conf"), "b");
    fs::rename(w.path("conf.d/a.conf"), w.path("conf.d/a.off")).unwrap();
    assert_eq!(w.next().await, ["conf.d/a.conf", "conf.d/b.conf"]);
    fs::create_dir(w.path("x")).unwrap();
    write(w.path("x/on.conf"), "on");
    assert_eq!(w.next().await, ["x/on.conf"]);
}

#[tokio::test]
async fn a_link_on_the_way_that_is_turned_elsewhere_is_told() {
    let mut w = Watched::new(&["current/a"], |dir| {
        for version in ["v1", "v2"] {
            fs::create_dir(dir.join(version)).unwrap();
            write(dir.join(version).join("a"), version);
        }
        symlink("v1", dir.join("current")).unwrap();
    })
    .await;
    write(w.path("v1/a"), "through the link");
    assert_eq!(w.next().await, ["current/a"]);
    symlink("v2", w.path("next")).unwrap();
    fs::rename(w.path("next"), w.path("current")).unwrap();
    assert_eq!(w.next().await, ["current/a"]);
    write(w.path("v1/a"), "not there any more");
    w.quiet().await;
    write(w.path("v2/a"), "there now");
    assert_eq!(w.next().await, ["current/a"]);
    // What the link leads to is replaced, the link is not.
    fs::rename(w.path("v2"), w.path("v3")).unwrap();
    assert_eq!(w.next().await, ["current/a"]);
    fs::rename(w.path("v3"), w.path("v2")).unwrap();
    assert_eq!(w.next().await, ["current/a"]);
}

#[tokio::test]
async fn changes_are_told_once_they_settle_and_never_too_late() {
    let mut w = Watched::new(&["a"], |dir| write(dir.join("a"), "")).await;
    let begun = Instant::now();
    let path = w.path("a");
    let writer = tokio::spawn(async move {
        while begun.elapsed() < TIMING.at_most * 2 {
            write(&path, "again and again");
            tokio::time::sleep(TIMING.settle / 6).await;
        }
    });
    w.next().await;
    let first = begun.elapsed();
    assert!(first >= TIMING.at_most && first < TIMING.at_most * 2, "{first:?}");
    writer.await.unwrap();
    let quiet_since = Instant::now();
    w.next().await;
    // On a busy machine the batch may have been there already.
    assert!(quiet_since.elapsed() < PATIENCE / 2);
}

#[tokio::test]
async fn more_than_the_kernel_keeps_is_everything() {
    let mut w = Watched::new(&["d"], |dir| fs::create_dir(dir.join("d")).unwrap()).await;
    let most: usize =
        fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
    // The only thread of this runtime is here: nobody reads the queue.
    for n in 0..most / 3 {
        let path = w.path("d").join(n.to_string());
        write(&path, "x");
        fs::remove_file(path).unwrap();
    }
    let batch = timeout(PATIENCE, w.told.recv()).await.unwrap().unwrap();
    assert!(batch.everything.is_some());
    while timeout(TIMING.settle * 4, w.told.recv()).await.is_ok() {}
    write(w.path("d/after"), "still watching");
    assert_eq!(w.next().await, ["d/after"]);
}

#[tokio::test]
async fn it_ends_with_its_receiver() {
    let w = Watched::new(&["a"], |_| ()).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert_eq!(tasks(), 1);
    drop(w);
    timeout(PATIENCE, async {
        while tasks() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}
