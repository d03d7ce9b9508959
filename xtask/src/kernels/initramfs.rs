//! A root file system for a kernel to start with: an archive in the format that cpio(5) calls "new ASCII",
//! which the kernel unpacks into memory (its Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::command;

/// Writes an archive with `init` as `/init`, `ftd` as `/bin/ftd`, the libraries of both where their loader
/// looks for them, and the files in the directory `modules` in `/modules`.
pub(super) fn write(archive: &Path, init: &Path, ftd: &Path, modules: &Path) -> Result<()> {
    let mut files =
        vec![(PathBuf::from("/init"), init.to_owned()), (PathBuf::from("/bin/ftd"), ftd.to_owned())];
    let libraries: BTreeSet<PathBuf> = [libraries(init)?, libraries(ftd)?].into_iter().flatten().collect();
    files.extend(libraries.into_iter().map(|path| (path.clone(), path)));
    let entries = fs::read_dir(modules).with_context(|| format!("{} cannot be read", modules.display()))?;
    files
        .extend(entries.flatten().map(|entry| (Path::new("/modules").join(entry.file_name()), entry.path())));

    let mut directories = BTreeSet::from(["/dev", "/proc", "/run", "/sys", "/tmp"].map(PathBuf::from));
    for (place, _) in &files {
        directories
            .extend(place.ancestors().skip(1).filter(|dir| dir.parent().is_some()).map(Path::to_owned));
    }

    let file =
        fs::File::create(archive).with_context(|| format!("{} cannot be written", archive.display()))?;
    let mut out = Archive { out: io::BufWriter::new(file), inode: 0 };
    for directory in &directories {
        out.entry(directory, DIRECTORY, (0, 0), &[])?;
    }
    // The kernel opens it for /init before that can mount anything.
    out.entry(Path::new("/dev/console"), CONSOLE, (5, 1), &[])?;
    for (place, source) in &files {
        let bytes = fs::read(source).with_context(|| format!("{} cannot be read", source.display()))?;
        out.entry(place, FILE, (0, 0), &bytes)?;
    }
    out.end().with_context(|| format!("{} cannot be written", archive.display()))
}

/// The shared libraries and the loader of a program, as this machine resolves them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let said = command::output(Command::new("ldd").arg(program))?;
    if said.stderr.contains("not a dynamic executable") || said.stdout.contains("statically linked") {
        return Ok(Vec::new());
    }
    let found = paths(&said.clone().ok()?);
    ensure!(!said.stdout.contains("not found"), "{} lacks libraries:\n{}", program.display(), said.stdout);
    Ok(found)
}

/// The paths in what ldd prints: `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`.
fn paths(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

struct Archive<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// One entry: a header of 13 numbers of 8 hexadecimal digits, the name, the data, each padded to 4 bytes.
    fn entry(&mut self, place: &Path, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let name = place.to_string_lossy();
        let name = name.trim_start_matches('/');
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other("a file larger than 4 GiB"))?;
        let numbers =
            [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
        write!(self.out, "070701")?;
        for number in numbers {
            write!(self.out, "{number:08x}")?;
        }
        write!(self.out, "{name}\0")?;
        self.pad(6 + 13 * 8 + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, length: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..length.next_multiple_of(4) - length])
    }

    fn end(mut self) -> io::Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, (0, 0), &[])?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_a_trailer() {
        let mut bytes = Vec::new();
        let mut archive = Archive { out: &mut bytes, inode: 0 };
        archive.entry(Path::new("/bin/a"), FILE, (0, 0), b"hello").unwrap();
        archive.end().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"07070100000001000081ed"));
        // 110 bytes of header and "bin/a\0" are 116, a multiple of 4.
        assert_eq!(&bytes[110..116], b"bin/a\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }

    #[test]
    fn what_ldd_prints_is_read() {
        let text = "\tlinux-vdso.so.1 (0x7)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7)\n\t/lib64/ld.so.2 (0x7)\n";
        assert_eq!(paths(text), [Path::new("/lib/x/libc.so.6"), Path::new("/lib64/ld.so.2")]);
    }
}
