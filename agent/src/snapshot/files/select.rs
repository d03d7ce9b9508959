//! What of the file system belongs to a workload.
//!
//! A pattern is an absolute path in which `*`, `?` and `[…]` stand for parts of one name, and `**` for any number of
//! directories. As in a shell, they do not match a dot in front. What a pattern names is taken whole: a directory with
//! everything below it, a symlink as the symlink. Links are followed only in a pattern's fixed part, before
//! the first `*`, and there only where root put them.
//!
//! Not selected by a pattern or a directory: what editors and package managers put beside a file while they work on it
//! ([`is_passing`]). It would be taken for a change, twice, and the second time, when it goes, for damage.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
};

use super::pin::{self, Pin};

/// Directories below directories. No configuration is this deep; what is, is a loop of mounts or a mistake.
const MAX_DEPTH: usize = 200;

const GLOB: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Why a pattern makes no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// Relative to what?
    #[error(
        "files pattern {0:?} is not an absolute path: write it from the root, as in /etc/nginx/nginx.conf"
    )]
    Relative(String),
    /// `.` or `..`.
    #[error("files pattern {0:?} contains '..': write the path that is meant")]
    Dots(String),
    /// `/`, or something that may match all that is in it.
    #[error("files pattern {0:?} selects the whole file system: name the directories of the service")]
    Everything(String),
    /// Bad brackets or stars.
    #[error(
        "files pattern {pattern:?}: {source} (a name that contains a '[' or a '*' itself: write [[] or [*])"
    )]
    Glob {
        /// As it was given.
        pattern: String,
        /// Where and what.
        source: glob::PatternError,
    },
}

/// One path or pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<Part>,
    /// Whether somebody expects that there is something.
    expected: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Name(OsString),
    Glob(glob::Pattern),
    /// `**`: any number of directories, also none.
    AnyDepth,
}

impl Pattern {
    /// Reads a pattern as people write it.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if !text.contains(['*', '?', '[']) {
            return Self::exact(Path::new(text));
        }
        Self::new(text, Path::new(text), |name| match name.to_str() {
            Some("**") => Ok(Part::AnyDepth),
            Some(name) if name.contains(['*', '?', '[']) => glob::Pattern::new(name)
                .map(Part::Glob)
                .map_err(|source| PatternError::Glob { pattern: text.to_owned(), source }),
            _ => Ok(Part::Name(name.to_owned())),
        })
    }

    /// This very path, whatever characters are in it: a unit's own file, a drop-in.
    pub fn exact(path: &Path) -> Result<Self, PatternError> {
        Self::new(&path.to_string_lossy(), path, |name| Ok(Part::Name(name.to_owned())))
    }

    fn new(
        text: &str,
        path: &Path,
        part: impl Fn(&OsStr) -> Result<Part, PatternError>,
    ) -> Result<Self, PatternError> {
        if !path.is_absolute() {
            return Err(PatternError::Relative(text.to_owned()));
        }
        let mut parts = Vec::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => parts.push(part(name)?),
                Component::ParentDir => return Err(PatternError::Dots(text.to_owned())),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        if !matches!(parts.first(), Some(Part::Name(_))) {
            return Err(PatternError::Everything(text.to_owned()));
        }
        Ok(Self { text: text.to_owned(), parts, expected: true })
    }

    /// As it was given.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it is worth telling that there is nothing.
    pub(super) fn is_expected(&self) -> bool {
        self.expected
    }

    /// The directory that the fixed part leads to, and what is to be found in it.
    fn split(&self) -> (PathBuf, &[Part]) {
        let fixed = self.parts.iter().take_while(|part| matches!(part, Part::Name(_))).count();
        let (fixed, rest) = self.parts.split_at(fixed.min(self.parts.len() - 1));
        let names = fixed.iter().filter_map(|part| match part {
            Part::Name(name) => Some(name.as_os_str()),
            Part::Glob(_) | Part::AnyDepth => None,
        });
        (Path::new("/").components().map(Component::as_os_str).chain(names).collect(), rest)
    }

    /// The path up to the first part that is not fixed: nothing outside is ever selected.
    pub(super) fn root(&self) -> PathBuf {
        match self.split() {
            (dir, [Part::Name(name)]) => dir.join(name),
            (dir, _) => dir,
        }
    }

    /// Whether it selects `path`, itself or as something below what it names.
    pub fn covers(&self, path: &Path) -> bool {
        fn matches(parts: &[Part], names: &[&OsStr]) -> bool {
            let Some((part, parts_left)) = parts.split_first() else {
                return !names.iter().any(|name| is_passing(name));
            };
            let Some((name, names_left)) = names.split_first() else { return false };
            match part {
                Part::AnyDepth if parts_left.is_empty() => part.fits(name),
                Part::AnyDepth => {
                    matches(parts_left, names) || (part.fits(name) && matches(parts, names_left))
                }
                Part::Name(_) | Part::Glob(_) => part.fits(name) && matches(parts_left, names_left),
            }
        }
        let names: Vec<_> = path.iter().skip(1).collect();
        !names.iter().any(|name| pin::is_temporary(name)) && matches(&self.parts, &names)
    }
}

impl Part {
    fn fits(&self, name: &OsStr) -> bool {
        match self {
            Self::Name(wanted) => wanted == name,
            // A byte that is not UTF-8 becomes one character that `*` and `?` match.
            Self::Glob(pattern) => !is_passing(name) && pattern.matches_with(&name.to_string_lossy(), GLOB),
            Self::AnyDepth => !is_hidden(name) && !is_passing(name),
        }
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".")
}

/// Whether a file of this name is there only for the time of an edit or an upgrade: vim's swap files and the one with which it
/// tries whether it may write, emacs' locks and autosaved files, backups (`~`), and what dpkg has unpacked and not put in place yet.
fn is_passing(name: &OsStr) -> bool {
    let name = name.as_bytes();
    let swap = || name.len() > 4 && name[..name.len() - 1].ends_with(b".sw");
    name.ends_with(b"~")
        || name.starts_with(b".") && swap()
        || name == b"4913"
        || name.starts_with(b".#")
        || name.starts_with(b"#") && name.ends_with(b"#")
        || [&b".dpkg-new"[..], b".dpkg-tmp"].iter().any(|end| name.ends_with(end))
}

/// All patterns of a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    patterns: Vec<Pattern>,
}

impl Selection {
    /// What any of these names.
    pub fn new(patterns: impl IntoIterator<Item = Pattern>) -> Self {
        Self { patterns: patterns.into_iter().collect() }
    }

    /// Reads patterns as people write them.
    pub fn parse<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, PatternError> {
        patterns.into_iter().map(Pattern::parse).collect::<Result<_, _>>().map(|patterns| Self { patterns })
    }

    /// And these very paths, whether there is anything or not: where a unit's own files lie, or may lie one day.
    pub fn with_places<P: AsRef<Path>>(
        mut self,
        paths: impl IntoIterator<Item = P>,
    ) -> Result<Self, PatternError> {
        for path in paths {
            self.patterns.push(Pattern { expected: false, ..Pattern::exact(path.as_ref())? });
        }
        Ok(self)
    }

    /// Only what lies outside of these paths.
    #[must_use]
    pub fn without(&self, paths: &[&Path]) -> Self {
        let keep = |pattern: &&Pattern| !paths.iter().any(|path| pattern.root() == *path);
        Self { patterns: self.patterns.iter().filter(keep).cloned().collect() }
    }

    /// The patterns.
    pub fn patterns(&self) -> &[Pattern] {
        &self.patterns
    }

    /// Whether any pattern selects `path`.
    pub fn covers(&self, path: &Path) -> bool {
        self.patterns.iter().any(|pattern| pattern.covers(path))
    }
}

/// Something that was found.
pub(super) struct Found<'a> {
    pub(super) dir: &'a Pin,
    pub(super) name: &'a OsStr,
    pub(super) path: &'a Path,
    pub(super) pin: &'a Pin,
}

/// What a walk over a selection tells as it goes. Each is told before the kernel is asked, so that
/// somebody who starts to watch there and then misses nothing.
pub(super) trait Visit {
    type Error;
    /// `name` is going to be looked up in `dir`, on behalf of `path`. `last`: it is selected, not only on the way.
    fn lookup(&mut self, dir: &Pin, name: &OsStr, path: &Path, last: bool) -> Result<(), Self::Error>;
    /// The names in `dir` are going to be listed.
    fn list(&mut self, dir: &Pin, path: &Path) -> Result<(), Self::Error>;
    /// A selected thing was found; each once, a directory before what is in it.
    fn found(&mut self, found: &Found<'_>) -> Result<(), Self::Error>;
    /// Something cannot be looked at.
    fn failed(&mut self, path: &Path, error: io::Error) -> Result<(), Self::Error>;
    /// The way to `path` leads over a symlink that is not followed.
    fn astray(&mut self, _path: &Path) {}
}

/// Walks over all that is selected. Answers for each pattern whether anything is there.
pub(super) fn walk<V: Visit>(selection: &Selection, visit: &mut V) -> Result<Vec<bool>, V::Error> {
    let mut walk = Walk { visit, seen: BTreeSet::new(), depth: 0 };
    selection.patterns.iter().map(|pattern| walk.pattern(pattern)).collect()
}

struct Walk<'v, V> {
    visit: &'v mut V,
    /// Patterns may overlap.
    seen: BTreeSet<PathBuf>,
    depth: usize,
}

impl<V: Visit> Walk<'_, V> {
    fn pattern(&mut self, pattern: &Pattern) -> Result<bool, V::Error> {
        let (base, parts) = pattern.split();
        let mut refused = None;
        let dir = pin::directory(&base, &mut |dir, name, path| {
            let told = self.visit.lookup(dir, name, path, false);
            told.map_err(|error| {
                refused = Some(error);
                io::Error::other("refused")
            })
        });
        match (dir, refused) {
            (_, Some(error)) => Err(error),
            (Ok(dir), None) => self.parts(&dir, &base, parts),
            (Err(error), None) => self.nothing(&base, error),
        }
    }

    /// Nothing at `path`, or an error.
    fn nothing(&mut self, path: &Path, error: io::Error) -> Result<bool, V::Error> {
        if error.raw_os_error() == Some(libc::ELOOP) {
            self.visit.astray(path);
        } else if !pin::leads_nowhere(&error) {
            self.visit.failed(path, error)?;
        }
        Ok(false)
    }

    /// What fits the first of `parts` in `dir`, and on from there.
    fn parts(&mut self, dir: &Pin, path: &Path, parts: &[Part]) -> Result<bool, V::Error> {
        let Some((part, rest)) = parts.split_first() else { return Ok(false) };
        if let Part::Name(name) = part {
            let path = path.join(name);
            self.visit.lookup(dir, name, &path, rest.is_empty())?;
            return self.step(dir, name, &path, rest);
        }
        let mut any = false;
        let deeper = matches!(part, Part::AnyDepth);
        if deeper && !rest.is_empty() {
            any |= self.parts(dir, path, rest)?;
        }
        self.visit.list(dir, path)?;
        let names = match dir.names() {
            Ok(names) => names,
            Err(error) => return Ok(self.nothing(path, error)? || any),
        };
        for name in names.iter().filter(|name| part.fits(name) && !pin::is_temporary(name)) {
            // `**` goes on below each directory; at the end of a pattern it takes all there is.
            let next = if deeper && !rest.is_empty() { parts } else { rest };
            any |= self.step(dir, name, &path.join(name), next)?;
        }
        Ok(any)
    }

    /// Takes what is called `name`, or goes on below it if there is more to the pattern.
    fn step(&mut self, dir: &Pin, name: &OsStr, path: &Path, rest: &[Part]) -> Result<bool, V::Error> {
        let pin = match dir.child(name) {
            Ok(pin) => pin,
            Err(error) => return self.nothing(path, error),
        };
        if rest.is_empty() {
            return self.take(&Found { dir, name, path, pin: &pin }).map(|()| true);
        }
        if !pin.is_dir() {
            return Ok(false);
        }
        self.deeper(path, |walk| walk.parts(&pin, path, rest))
    }

    fn take(&mut self, found: &Found<'_>) -> Result<(), V::Error> {
        if !self.seen.insert(found.path.to_owned()) {
            return Ok(());
        }
        self.visit.found(found)?;
        if !found.pin.is_dir() {
            return Ok(());
        }
        self.visit.list(found.pin, found.path)?;
        let names = match found.pin.names() {
            Ok(names) => names,
            Err(error) => return self.nothing(found.path, error).map(|_| ()),
        };
        for name in names.iter().filter(|name| !pin::is_temporary(name) && !is_passing(name)) {
            let path = found.path.join(name);
            self.deeper(&path, |walk| walk.step(found.pin, name, &path, &[]))?;
        }
        Ok(())
    }

    fn deeper(
        &mut self,
        path: &Path,
        go: impl FnOnce(&mut Self) -> Result<bool, V::Error>,
    ) -> Result<bool, V::Error> {
        if self.depth >= MAX_DEPTH {
            let error = io::Error::other(format!("more than {MAX_DEPTH} directories deep"));
            return self.visit.failed(path, error).map(|()| false);
        }
        self.depth += 1;
        let result = go(self);
        self.depth -= 1;
        result
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("/etc/nginx/nginx.conf", "/etc/nginx/nginx.conf", true)]
    #[case("/etc/nginx", "/etc/nginx/conf.d/a.conf", true)]
    #[case("/etc/nginx/", "/etc/nginx", true)]
    #[case("/etc/nginx", "/etc/nginx2", false)]
    #[case("/etc/nginx", "/etc", false)]
    #[case("/etc/*.conf", "/etc/a.conf", true)]
    #[case("/etc/*.conf", "/etc/.a.conf", false)]
    #[case("/etc/*.conf", "/etc/b/a.conf", false)]
    #[case("/etc/.*.conf", "/etc/.a.conf", true)]
    #[case("/etc/*", "/etc/b/.hidden", true)]
    #[case("/etc/**/a.conf", "/etc/a.conf", true)]
    #[case("/etc/**/a.conf", "/etc/b/c/a.conf", true)]
    #[case("/etc/**/a.conf", "/etc/.b/a.conf", false)]
    #[case("/etc/**/a.conf", "/etc/b/c", false)]
    #[case("/etc/**", "/etc/b", true)]
    #[case("/etc/**", "/etc", false)]
    #[case("/etc/a[[]1]", "/etc/a[1]", true)]
    #[case("/etc/a\\x2db.service", "/etc/a\\x2db.service", true)]
    #[case("/etc", "/etc/.ftd-restore-1-2", false)]
    #[case("/etc", "/etc/.a.conf.swp", false)]
    #[case("/etc", "/etc/a.swp", true)]
    #[case("/etc", "/etc/d/4913", false)]
    #[case("/etc", "/etc/d/a.conf~", false)]
    #[case("/etc/*", "/etc/#a.conf#", false)]
    #[case("/etc/**/*.conf", "/etc/.#d/a.conf", false)]
    #[case("/etc", "/etc/a.conf.dpkg-new", false)]
    #[case("/etc", "/etc/a.conf.dpkg-dist", true)]
    #[case("/etc/a.conf~", "/etc/a.conf~", true)]
    fn what_a_pattern_covers(#[case] pattern: &str, #[case] path: &str, #[case] covers: bool) {
        assert_eq!(Pattern::parse(pattern).unwrap().covers(Path::new(path)), covers);
    }

    #[rstest]
    #[case("etc/nginx", "not an absolute path")]
    #[case("", "not an absolute path")]
    #[case("/etc/../root", "contains '..'")]
    #[case("/", "whole file system")]
    #[case("/**/a", "whole file system")]
    #[case("/etc/[a", "[[]")]
    #[case("/etc/a**", "recursive wildcards")]
    fn a_pattern_that_makes_no_sense(#[case] pattern: &str, #[case] says: &str) {
        let error = Pattern::parse(pattern).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn the_root_of_a_pattern() {
        let root = |pattern| Pattern::parse(pattern).unwrap().root();
        assert_eq!(root("/etc/nginx/nginx.conf"), Path::new("/etc/nginx/nginx.conf"));
        assert_eq!(root("/etc/*/a"), Path::new("/etc"));
        assert_eq!(root("/etc"), Path::new("/etc"));
    }
}
