//! Where the files lie that make a unit what it is: its fragment, and its drop-ins.
//!
//! The places are known by rule, see systemd.unit(5), "Unit File Load Path" and the paragraphs on drop-ins, so they
//! include those where nothing is yet, and systemd need not be asked. Left out: all below `/run`, which is gone with
//! the next boot and not a person's work, and drop-ins for all units of a kind (`service.d`), which belong to none
//! of them.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use super::alias;

/// Where systemd looks, first things first.
const DIRS: [&str; 6] = [
    CONTROL,
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// What systemd writes here by itself (`systemctl set-property`) is in force when it is written.
const CONTROL: &str = "/etc/systemd/system.control";
/// A unit that is a link to this is masked.
const MASK: &str = "/dev/null";

/// The files of one unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Definition {
    /// Places of the unit's own file, in the order in which systemd looks.
    pub fragments: Vec<PathBuf>,
    /// Directories of drop-ins.
    pub drop_ins: Vec<PathBuf>,
}

/// Where `unit` is defined, under all of its names, as links are now.
pub fn definition(unit: &str) -> Definition {
    within(&DIRS.map(PathBuf::from), unit)
}

/// [`definition`], and if there is none by that name, under the name of another distribution.
pub fn find(unit: &str) -> Definition {
    let found = definition(unit);
    if found.is_there() {
        return found;
    }
    alias::others(unit).map(definition).find(Definition::is_there).unwrap_or(found)
}

/// Whether this is where units are defined.
pub fn is_unit_file(path: &Path) -> bool {
    DIRS.iter().any(|dir| path.starts_with(dir))
}

/// Whether a package's file lies here, and not an administrator's.
pub fn is_packaged(path: &Path) -> bool {
    path.starts_with("/usr/lib") || path.starts_with("/lib")
}

/// Whether somebody has masked the unit whose fragment this is.
pub fn is_mask(path: &Path) -> bool {
    fs::read_link(path).is_ok_and(|target| target == Path::new(MASK))
}

impl Definition {
    /// All places.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.fragments.iter().chain(&self.drop_ins).map(PathBuf::as_path)
    }

    /// Whether the file belongs to the unit's definition.
    pub fn covers(&self, path: &Path) -> bool {
        self.paths().any(|place| path.starts_with(place))
    }

    /// Whether what was changed there is in force only once the unit is started anew.
    pub fn needs_start(&self, path: &Path) -> bool {
        self.covers(path) && !path.starts_with(CONTROL)
    }

    /// Whether there is a fragment at all.
    pub fn is_there(&self) -> bool {
        self.fragments.iter().any(|path| path.exists())
    }
}

fn within(dirs: &[PathBuf], unit: &str) -> Definition {
    // On most systems `/lib` is `/usr/lib`.
    let mut real = Vec::<PathBuf>::new();
    for dir in dirs {
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.clone());
        if !real.contains(&dir) {
            real.push(dir);
        }
    }
    let (names, elsewhere) = names(&real, unit);
    let in_all = |names: BTreeSet<String>| -> Vec<PathBuf> {
        let in_dir = |dir: &PathBuf| names.iter().map(|name| dir.join(name)).collect::<Vec<_>>();
        real.iter().flat_map(in_dir).collect()
    };
    let fragments =
        in_all(names.iter().flat_map(|name| [Some(name.clone()), template(name)]).flatten().collect());
    let drop_ins = in_all(names.iter().flat_map(|name| drop_in_names(name)).collect());
    Definition { fragments: fragments.into_iter().chain(elsewhere).collect(), drop_ins }
}

/// The unit's names, by links between them; and where its file lies if that is in no directory of units
/// (`systemctl link`).
fn names(dirs: &[PathBuf], unit: &str) -> (BTreeSet<String>, Option<PathBuf>) {
    let mut names = BTreeSet::from([unit.to_owned()]);
    let file = [Some(unit.to_owned()), template(unit)].into_iter().flatten().find_map(|name| {
        let found = dirs.iter().map(|dir| dir.join(&name)).find(|path| fs::symlink_metadata(path).is_ok());
        found.and_then(|path| fs::canonicalize(path).ok())
    });
    let Some(file) = file.filter(|file| file != Path::new(MASK)) else { return (names, None) };
    let in_place = file.parent().is_some_and(|dir| dirs.iter().any(|ours| ours == dir));
    // The instance of a template goes by its own name.
    if in_place && !unit.contains('@') {
        names.extend(file.file_name().and_then(OsStr::to_str).map(str::to_owned));
    }
    if !unit.contains('@') {
        for entry in dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten() {
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            if is_link && fs::canonicalize(entry.path()).is_ok_and(|target| target == file) {
                names.extend(entry.file_name().into_string().ok());
            }
        }
    }
    (names, Some(file).filter(|_| !in_place))
}

/// `a@.service` of `a@b.service`.
fn template(name: &str) -> Option<String> {
    let (stem, rest) = name.split_once('@')?;
    let (instance, suffix) = rest.rsplit_once('.')?;
    (!instance.is_empty()).then(|| format!("{stem}@.{suffix}"))
}

/// `a-b.service.d`, and those of the names that it begins with: `a-.service.d`.
fn drop_in_names(name: &str) -> Vec<String> {
    let mut found: Vec<_> = [Some(name.to_owned()), template(name)].into_iter().flatten().collect();
    if let Some((stem, suffix)) = name.rsplit_once('.') {
        let stem = stem.split('@').next().unwrap_or(stem);
        let ends = stem.match_indices('-').map(|(at, _)| &stem[..=at]);
        found.extend(ends.map(|begin| format!("{begin}.{suffix}")));
    }
    found.into_iter().map(|name| format!("{name}.d")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Rig {
        dir: tempfile::TempDir,
        dirs: Vec<PathBuf>,
    }

    fn rig() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        for name in ["etc", "lib", "opt"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        symlink("lib", root.join("usr-lib")).unwrap();
        let dirs = ["etc", "lib", "usr-lib", "none"].map(|name| root.join(name)).to_vec();
        Rig { dir, dirs }
    }

    impl Rig {
        fn put(&self, path: &str) {
            fs::write(self.dir.path().join(path), "[Service]\n").unwrap();
        }

        fn link(&self, path: &str, target: &str) {
            symlink(target, self.dir.path().join(path)).unwrap();
        }

        fn places(&self, unit: &str) -> (Vec<String>, Vec<String>) {
            let found = within(&self.dirs, unit);
            let root = fs::canonicalize(self.dir.path()).unwrap();
            let text = |paths: &[PathBuf]| -> Vec<String> {
                let short = |path: &PathBuf| path.strip_prefix(&root).unwrap().display().to_string();
                // One directory tells enough.
                paths.iter().map(short).filter(|path| !path.starts_with("none")).collect()
            };
            (text(&found.fragments), text(&found.drop_ins))
        }
    }

    #[test]
    fn each_place_is_there_once_whether_there_is_anything_or_not() {
        let rig = rig();
        let (fragments, drop_ins) = rig.places("a.service");
        assert_eq!(fragments, ["etc/a.service", "lib/a.service"]);
        assert_eq!(drop_ins, ["etc/a.service.d", "lib/a.service.d"]);
    }

    #[test]
    fn names_that_are_links_to_each_other_are_one_unit() {
        let rig = rig();
        rig.put("lib/b.service");
        rig.link("etc/a.service", "../lib/b.service");
        rig.link("lib/c.service", "b.service");
        for name in ["a.service", "b.service", "c.service"] {
            let (_, drop_ins) = rig.places(name);
            assert_eq!(drop_ins[..3], ["etc/a.service.d", "etc/b.service.d", "etc/c.service.d"], "{name}");
        }
    }

    #[test]
    fn a_linked_file_elsewhere_is_part_of_it_and_a_mask_is_not() {
        let rig = rig();
        rig.put("opt/a.service");
        rig.link("etc/a.service", "../opt/a.service");
        rig.link("etc/m.service", MASK);
        assert_eq!(rig.places("a.service").0, ["etc/a.service", "lib/a.service", "opt/a.service"]);
        assert_eq!(rig.places("m.service").0, ["etc/m.service", "lib/m.service"]);
        assert!(is_mask(&rig.dir.path().join("etc/m.service")));
    }

    #[test]
    fn templates_and_the_beginnings_of_names_have_drop_ins_too() {
        let rig = rig();
        let (fragments, _) = rig.places("a@x.service");
        assert_eq!(fragments[..2], ["etc/a@.service", "etc/a@x.service"]);
        assert_eq!(drop_in_names("a@x.service"), ["a@x.service.d", "a@.service.d"]);
        assert_eq!(drop_in_names("a-b-c.service"), ["a-b-c.service.d", "a-.service.d", "a-b-.service.d"]);
    }

    #[test]
    fn what_belongs_to_a_unit_and_when_it_counts() {
        let nginx = definition("nginx.service");
        let at = |path: &str| (nginx.covers(Path::new(path)), nginx.needs_start(Path::new(path)));
        assert_eq!(at("/etc/systemd/system/nginx.service.d/a.conf"), (true, true));
        assert_eq!(at("/etc/systemd/system.control/nginx.service.d/50-CPUWeight.conf"), (true, false));
        assert_eq!(at("/etc/systemd/system/apache2.service"), (false, false));
        assert_eq!(at("/run/systemd/system/nginx.service.d/a.conf"), (false, false));
    }
}
