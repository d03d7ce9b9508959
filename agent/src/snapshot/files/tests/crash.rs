//! A restore that is killed at any point leaves each file the old or the new one, and the next one mends all.
//!
//! The restore runs in a process of its own, this test binary again, and ends there without a word: nothing is
//! unwound, nothing is cleaned up.

use std::collections::BTreeMap;

use super::*;
use crate::snapshot::files::TEMPORARY;

const DIR: &str = "FTD_TEST_RESTORE_DIR";
const KILL_AT: &str = "FTD_TEST_RESTORE_KILL_AT";
const KILLED: i32 = 99;

fn wanted(site: &Path) {
    write(site.join("changed"), "good content");
    write(site.join("dressed"), "same");
    write(site.join("deleted"), "deleted");
    fs::create_dir_all(site.join("gone/deep")).unwrap();
    write(site.join("gone/deep/file"), "deep");
    write(site.join("was_file"), "a file");
    fs::create_dir(site.join("was_dir")).unwrap();
    write(site.join("was_dir/in"), "in");
    symlink("good", site.join("link")).unwrap();
}

fn spoil(site: &Path) {
    write(site.join("changed"), "bad");
    chmod(site.join("dressed"), 0o600);
    fs::remove_file(site.join("deleted")).unwrap();
    fs::remove_dir_all(site.join("gone")).unwrap();
    fs::remove_file(site.join("was_file")).unwrap();
    fs::create_dir(site.join("was_file")).unwrap();
    write(site.join("was_file/below"), "below");
    fs::remove_dir_all(site.join("was_dir")).unwrap();
    write(site.join("was_dir"), "a file");
    fs::remove_file(site.join("link")).unwrap();
    symlink("bad", site.join("link")).unwrap();
    write(site.join("extra"), "extra");
}

#[test]
#[ignore = "the process that is killed"]
fn restore_until_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let captured: Captured = serde_json::from_slice(&fs::read(dir.join("captured")).unwrap()).unwrap();
    let kill_at: u32 = std::env::var(KILL_AT).unwrap().parse().unwrap();
    let vault = Vault(
        fs::read_dir(dir.join("vault"))
            .unwrap()
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .map(|content| (blake3::hash(&content), content))
            .collect(),
    );
    let selection = Selection::new([Pattern::exact(&dir.join("site")).unwrap()]);
    let passed = Cell::new(0);
    let plan = Plan::new(&captured, Some(&selection)).unwrap();
    plan.apply_until(&vault, &mut |_, _| (), &|_| {
        if passed.get() == kill_at {
            std::process::exit(KILLED);
        }
        passed.set(passed.get() + 1);
    })
    .unwrap();
}

/// All but times of directories, which come last.
fn states(captured: Captured) -> BTreeMap<PathBuf, Entry> {
    plain(captured)
        .into_iter()
        .map(|entry| if entry.kind == Kind::Dir { Entry { mtime: 0, ..entry } } else { entry })
        .map(|entry| (entry.path.clone(), entry))
        .collect()
}

#[test]
fn killed_at_any_point_each_file_is_old_or_new() {
    let site = Site::new(wanted);
    let root = site.dir.path();
    fs::write(root.join("captured"), serde_json::to_vec(&site.captured).unwrap()).unwrap();
    fs::create_dir(root.join("vault")).unwrap();
    for (hash, content) in &site.vault.0 {
        fs::write(root.join("vault").join(hash.to_hex().as_str()), content).unwrap();
    }
    let new = states(site.captured.clone());
    for kill_at in 0.. {
        spoil(&site.path(""));
        let old = states(look(&site.selection, &[]).unwrap());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "snapshot::files::tests::crash::restore_until_killed", "--ignored"])
            .env(DIR, root)
            .env(KILL_AT, kill_at.to_string())
            .output()
            .unwrap();
        let killed = child.status.code() == Some(KILLED);
        assert!(killed || child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        let now = states(look(&site.selection, &[]).unwrap());
        for path in old.keys().chain(new.keys()) {
            let state = now.get(path);
            assert!(state == old.get(path) || state == new.get(path), "killed at {kill_at}: {state:?}");
        }
        assert!(now.keys().all(|path| old.contains_key(path) || new.contains_key(path)));
        site.restore(true).unwrap();
        assert_eq!(
            plain(look(&site.selection, &[]).unwrap()),
            plain(site.captured.clone()),
            "killed at {kill_at}"
        );
        if !killed {
            assert!(kill_at > 20, "passed only {kill_at} points");
            break;
        }
        let left = fs::read_dir(site.path("")).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(
            left.into_iter().all(|name| !name.to_string_lossy().starts_with(TEMPORARY)),
            "killed at {kill_at}"
        );
    }
}
