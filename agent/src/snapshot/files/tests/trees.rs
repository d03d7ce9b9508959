//! Random trees: what was captured comes back, whatever is there by then.

use std::{
    ffi::OsString,
    os::unix::{
        ffi::OsStringExt as _,
        fs::{DirBuilderExt as _, lchown},
    },
};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::*;

#[derive(Debug, Clone)]
struct Node {
    names: Vec<OsString>,
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: Vec<(&'static str, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum What {
    File(Vec<u8>),
    Dir,
    Link(OsString),
}

const ODD_NAMES: &[&[u8]] =
    &[b"a", b"b", b"c d", b".x", b"\xff\xfe", b"*", b"-rf", b"a\nb", b"\\x2d", "ü".as_bytes()];

fn name() -> impl Strategy<Value = OsString> {
    prop_oneof![
        9 => proptest::sample::select(ODD_NAMES).prop_map(|name| OsString::from_vec(name.to_vec())),
        1 => Just(OsString::from("n".repeat(255))),
    ]
}

/// `user::rw-`, `user:33:rwx`, `group::r--`, `mask::rwx`, `other::---`, as acl(5) and linux/posix_acl_xattr.h have it.
fn acl() -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    let none = u32::MAX;
    for (tag, permissions, id) in
        [(0x01, 6, none), (0x02, 7, 33), (0x04, 4, none), (0x10, 7, none), (0x20, 0, none)]
    {
        acl.extend(u16::to_le_bytes(tag));
        acl.extend(u16::to_le_bytes(permissions));
        acl.extend(u32::to_le_bytes(id));
    }
    acl
}

fn node() -> impl Strategy<Value = Node> {
    let what = prop_oneof![
        4 => proptest::collection::vec(any::<u8>(), 0..300).prop_map(What::File),
        1 => Just(What::File(Vec::new())),
        3 => Just(What::Dir),
        2 => prop_oneof![name(), Just(OsString::from("../../etc")), Just(OsString::from("/nonexistent/x"))].prop_map(What::Link),
    ];
    let xattr = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..50).prop_map(|value| ("user.a", value)),
        Just(("trusted.b", b"1".to_vec())),
        Just(("system.posix_acl_access", acl())),
        Just(("system.posix_acl_default", acl())),
    ];
    let ids = || proptest::sample::select(&[0_u32, 1, 33, 65_534, 4_000_000_000][..]);
    (
        proptest::collection::vec(name(), 1..6),
        what,
        0..=0o7777_u32,
        (ids(), ids()),
        (-1_000_000..4_000_000_000_i64, 0..1_000_000_000_i64),
        proptest::collection::vec(xattr, 0..3),
    )
        .prop_map(|(names, what, mode, owner, mtime, xattrs)| Node {
            names,
            what,
            mode,
            owner,
            mtime,
            xattrs,
        })
}

/// Makes what can be made: where something else is, the node is left out.
fn grow(root: &Path, nodes: &[Node]) {
    for node in nodes {
        let mut path = root.to_owned();
        path.extend(&node.names);
        let _ = fs::DirBuilder::new().recursive(true).mode(0o755).create(path.parent().unwrap());
        let made = match &node.what {
            // Also into what is there, and through links inside of the tree.
            What::File(_) if path.is_symlink() => continue,
            What::File(content) => fs::write(&path, content),
            What::Dir => fs::create_dir(&path),
            What::Link(target) => symlink(target, &path),
        };
        if made.is_err() {
            continue;
        }
        if is_root() {
            lchown(&path, Some(node.owner.0), Some(node.owner.1)).unwrap();
        }
        let is_link = matches!(node.what, What::Link(_));
        for (name, value) in &node.xattrs {
            // Links have no attributes of users, files no default list, others than root no trusted ones.
            if !is_link || name.starts_with("trusted") {
                let _ = rustix::fs::lsetxattr(&path, *name, value, XattrFlags::empty());
            }
        }
        if !is_link {
            chmod(&path, if is_root() { node.mode } else { node.mode | 0o700 });
        }
        let time = Timespec { tv_sec: node.mtime.0, tv_nsec: node.mtime.1 };
        let times = Timestamps { last_access: time, last_modification: time };
        utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

proptest! {
    // Each case syncs dozens of files.
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 5, ..ProptestConfig::default() })]

    /// Over an empty place, and over another tree: with `exact` the same again; without, at least all that was there.
    #[test]
    fn what_was_captured_comes_back(
        tree in proptest::collection::vec(node(), 0..12),
        other in proptest::collection::vec(node(), 0..12),
        keep_tree in any::<bool>(),
    ) {
        let site = Site::new(|site| grow(site, &tree));
        let wanted = plain(site.captured.clone());

        fs::remove_dir_all(site.path("")).unwrap();
        site.restore(false).unwrap();
        prop_assert_eq!(&plain(take(&site.selection).0), &wanted);

        for exact in [false, true] {
            if !keep_tree {
                fs::remove_dir_all(site.path("")).unwrap();
                fs::create_dir(site.path("")).unwrap();
            }
            grow(&site.path(""), &other);
            site.restore(exact).unwrap();
            let now = plain(take(&site.selection).0);
            if exact {
                prop_assert_eq!(&now, &wanted);
            } else {
                prop_assert!(wanted.iter().all(|entry| now.contains(entry)));
            }
            prop_assert!(Plan::new(&site.captured, exact.then_some(&site.selection)).unwrap().steps().is_empty());
        }
    }

    /// What is said to differ between two trees is nothing, or something, as they are the same or not.
    #[test]
    fn trees_that_differ_are_told_apart(
        tree in proptest::collection::vec(node(), 0..8), more in proptest::collection::vec(node(), 0..3),
    ) {
        let site = Site::new(|site| grow(site, &tree));
        grow(&site.path(""), &more);
        let now = look(&site.selection, &site.captured.entries).unwrap();
        let timeless = |captured: &Captured| {
            plain(captured.clone()).into_iter().map(|entry| Entry { mtime: 0, ..entry }).collect::<Vec<_>>()
        };
        let differences = compare(&site.captured.entries, &now.entries, Some(&site.vault));
        prop_assert_eq!(differences.is_empty(), timeless(&site.captured) == timeless(&now));
        let back = compare(&now.entries, &site.captured.entries, None);
        let paths = |differences: &[super::super::Difference]| {
            differences.iter().map(|difference| difference.path.clone()).collect::<Vec<_>>()
        };
        prop_assert_eq!(paths(&differences), paths(&back));
    }
}

#[test]
fn a_deep_tree() {
    let deep: PathBuf = ["d"; 150].iter().collect();
    let site = Site::new(|site| {
        fs::create_dir_all(site.join(&deep)).unwrap();
        write(site.join(&deep).join("a"), "a");
    });
    fs::remove_dir_all(site.path("d")).unwrap();
    site.restore(true).unwrap();
    assert_eq!(plain(take(&site.selection).0), plain(site.captured.clone()));
    let deeper: PathBuf = ["d"; 100].iter().collect();
    fs::create_dir_all(site.path("").join(&deep).join(deeper)).unwrap();
    let error = look(&site.selection, &[]).unwrap_err().to_string();
    assert!(error.ends_with("more than 200 directories deep"), "{error}");
}
