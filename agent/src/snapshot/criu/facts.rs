//! What a running unit is made of, as far as CRIU cares: read from /proc and the kernel's list of unix sockets,
//! judging nothing. See [`check`](super::check) for the judgement.
//!
//! All of it is a look at things that move: processes end while they are looked at, and are left out then.
//! What cannot be looked at for another reason is noted in [`Facts::unreadable`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsStr,
    fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use super::{Abilities, Criu, CriuError, check::JOURNAL, worker};
use crate::unit::{cgroup, manager::Service};

mod sockets;

use sockets::UnixSocket;

/// CRIU, as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CriuFacts {
    /// There is none.
    #[default]
    Missing,
    /// There is one that does not work.
    Broken {
        /// Why.
        cause: String,
    },
    /// It works.
    Found(Abilities),
}

impl CriuFacts {
    /// Asks the installed one; what works is not asked again until it is replaced.
    pub fn read() -> Self {
        /// The program, when it was last changed, and what it can do.
        static KNOWN: Mutex<Option<(PathBuf, SystemTime, Abilities)>> = Mutex::new(None);
        let criu = match Criu::find() {
            Ok(criu) => criu,
            Err(CriuError::Missing) => return Self::Missing,
            Err(error) => return Self::Broken { cause: error.to_string() },
        };
        let changed = fs::metadata(criu.program()).and_then(|meta| meta.modified()).ok();
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((program, then, abilities)) = known.as_ref()
            && program == criu.program()
            && Some(*then) == changed
        {
            return Self::Found(*abilities);
        }
        match criu.abilities() {
            Ok(abilities) => {
                *known = changed.map(|changed| (criu.program().to_owned(), changed, abilities));
                Self::Found(abilities)
            }
            Err(error) => Self::Broken { cause: error.to_string() },
        }
    }
}

/// A unit and its host.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// systemd's name for it.
    pub unit: String,
    /// Its `ActiveState`.
    pub active_state: String,
    /// Its main process; 0 when it has none.
    pub main_pid: u32,
    /// `RootDirectory=` or `RootImage=`.
    pub root_directory: Option<String>,
    /// The socket unit that starts it, where there is one.
    pub socket_unit: Option<String>,
    /// `DynamicUser=`.
    pub dynamic_user: bool,
    /// `ProcSubset=pid`.
    pub no_proc_sys: bool,
    /// The kernel's version.
    pub kernel: (u32, u32),
    /// CRIU.
    pub criu: CriuFacts,
    /// The capabilities that CRIU would have, a bit each.
    pub capabilities: u64,
    /// The namespaces of the host's first process.
    pub namespaces: BTreeMap<String, u64>,
    /// The unit's processes.
    pub processes: Vec<ProcessFacts>,
    /// What could not be looked at, and why.
    pub unreadable: Vec<String>,
}

/// One process.
#[derive(Debug, Clone, Default)]
pub struct ProcessFacts {
    /// Its number.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its name.
    pub comm: String,
    /// `S`, `R`, `D`, `Z`, …
    pub state: char,
    /// Who traces it, 0 for nobody.
    pub tracer: u32,
    /// 0 off, 1 strict, 2 filters.
    pub seccomp: u32,
    /// Its program.
    pub exe: Option<Exe>,
    /// Its namespaces, by kind.
    pub namespaces: BTreeMap<String, u64>,
    /// What it has open.
    pub files: Vec<(u32, OpenFile)>,
    /// Mapped things that are no ordinary files: devices, anonymous inodes, huge pages.
    pub mappings: Vec<String>,
}

/// A program file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exe {
    /// Where it is, or was.
    pub path: String,
    /// It is not there any more.
    pub deleted: bool,
}

/// An open file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenFile {
    /// A file or directory with a name.
    Regular {
        /// Its name.
        path: String,
    },
    /// A file without a name.
    Deleted {
        /// The name that it had.
        path: String,
        /// Bytes.
        size: u64,
    },
    /// What has no file system: `[eventpoll]`, `inotify`, `bpf-map`, …
    Anon(String),
    /// A file on a mount that the process does not see: opened before it had its own view.
    Unseen {
        /// CRIU's word for it: `file[MOUNT:INODE]`.
        key: String,
        /// Its name.
        path: String,
    },
    /// A character device.
    Char {
        /// Driver.
        major: u32,
        /// Device.
        minor: u32,
        /// Name.
        path: String,
    },
    /// A block device.
    Block {
        /// Driver.
        major: u32,
        /// Device.
        minor: u32,
        /// Name.
        path: String,
    },
    /// A unix socket.
    Unix {
        /// Its inode, which is its name for CRIU.
        inode: u64,
        /// Who is at the other end.
        peer: Peer,
    },
    /// Another socket.
    Socket {
        /// `tcp`, `udp6`, `netlink`, …
        protocol: String,
    },
    /// A pipe.
    Pipe {
        /// Its inode.
        inode: u64,
        /// A process outside of the unit has it open too.
        shared: bool,
    },
    /// Something else.
    Other(String),
}

/// The other end of a unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Nobody: it listens, or is not connected.
    None,
    /// A process of the unit.
    Unit,
    /// journald, which takes what the unit prints.
    Journal,
    /// Somebody else.
    Foreign {
        /// The name of the other end, where it has one.
        name: String,
        /// It is a stream, that is, broken for ever once it is cut.
        stream: bool,
    },
    /// The kernel does not say.
    Unknown,
}

impl Facts {
    /// Looks at a unit.
    pub fn read(service: &Service) -> Self {
        let criu = CriuFacts::read();
        let mut facts = Self {
            unit: service.id.clone(),
            active_state: service.active_state.clone(),
            main_pid: service.main_pid,
            root_directory: service.root.clone(),
            socket_unit: service.triggered_by.iter().find(|unit| unit.ends_with(".socket")).cloned(),
            dynamic_user: service.dynamic_user,
            no_proc_sys: service.proc_subset == "pid",
            kernel: kernel(),
            criu,
            capabilities: capabilities(),
            namespaces: namespaces(Path::new("/proc/1")).unwrap_or_default(),
            ..Self::default()
        };
        if service.main_pid != 0 {
            facts.walk(&service.control_group);
        }
        facts
    }

    /// The inodes of the sockets through which the unit prints to the journal.
    pub fn journal_sockets(&self) -> BTreeSet<u64> {
        let files = self.processes.iter().flat_map(|process| &process.files);
        files
            .filter_map(|(_, file)| match file {
                OpenFile::Unix { inode, peer: Peer::Journal } => Some(*inode),
                _ => None,
            })
            .collect()
    }

    /// /dev/null as systemd had opened it for the unit, on a mount that the unit does not see; in CRIU's words.
    pub fn unseen_nulls(&self) -> BTreeSet<String> {
        let files = self.processes.iter().flat_map(|process| &process.files);
        files
            .filter_map(|(_, file)| match file {
                OpenFile::Unseen { key, path } if path == "/dev/null" => Some(key.clone()),
                _ => None,
            })
            .collect()
    }

    /// Whether the main process sees other mounts than the host.
    pub fn own_mounts(&self) -> bool {
        let main = self.processes.iter().find(|process| process.pid == self.main_pid);
        main.is_some_and(|main| main.namespaces.get("mnt") != self.namespaces.get("mnt"))
    }

    fn walk(&mut self, control_group: &str) {
        let pids = cgroup::directory(control_group)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
            .and_then(|dir| cgroup::processes(&dir));
        let pids = match pids {
            Ok(pids) => pids,
            Err(error) => return self.unreadable.push(format!("its control group: {error}")),
        };
        for pid in pids {
            let dir = format!("/proc/{pid}");
            match ProcessFacts::read(Path::new(&dir), pid) {
                Ok(process) => self.processes.push(process),
                Err(error) if is_gone(&error) => {}
                Err(error) => self.unreadable.push(format!("process {pid}: {error}")),
            }
        }
        self.find_peers();
    }

    /// Who is at the other ends of sockets and pipes.
    fn find_peers(&mut self) {
        let inodes = self.processes.iter().flat_map(|process| &process.files);
        let own: BTreeSet<u64> = inodes
            .filter_map(|(_, file)| match file {
                OpenFile::Unix { inode, .. } => Some(*inode),
                _ => None,
            })
            .collect();
        let sockets = match sockets::unix() {
            Ok(sockets) => sockets,
            Err(error) => {
                self.unreadable.push(format!("the kernel's list of unix sockets: {error}"));
                HashMap::new()
            }
        };
        let protocols = sockets::protocols(self.main_pid);
        for (_, file) in self.processes.iter_mut().flat_map(|process| &mut process.files) {
            let OpenFile::Unix { inode, peer } = file else { continue };
            if let Some(protocol) = protocols.get(inode) {
                *file = OpenFile::Socket { protocol: (*protocol).to_owned() };
            } else {
                *peer = find_peer(&sockets, &own, *inode);
            }
        }
        let ours: BTreeSet<u32> = self.processes.iter().map(|process| process.pid).collect();
        let pipes = self.processes.iter().flat_map(|process| &process.files);
        let pipes: BTreeSet<u64> = pipes
            .filter_map(|(_, file)| match file {
                OpenFile::Pipe { inode, .. } => Some(*inode),
                _ => None,
            })
            .collect();
        if pipes.is_empty() {
            return;
        }
        let elsewhere = held_elsewhere(&pipes, &ours);
        for (_, file) in self.processes.iter_mut().flat_map(|process| &mut process.files) {
            if let OpenFile::Pipe { inode, shared } = file {
                *shared = elsewhere.contains(inode);
            }
        }
    }
}

fn find_peer(sockets: &HashMap<u64, UnixSocket>, own: &BTreeSet<u64>, inode: u64) -> Peer {
    let Some(socket) = sockets.get(&inode) else { return Peer::Unknown };
    match socket.peer {
        0 => Peer::None,
        peer if own.contains(&peer) => Peer::Unit,
        peer => {
            let name = sockets.get(&peer).map(|peer| peer.name.clone()).unwrap_or_default();
            if name == JOURNAL { Peer::Journal } else { Peer::Foreign { name, stream: socket.stream } }
        }
    }
}

/// Those of `pipes` that a process other than `ours` has open.
fn held_elsewhere(pipes: &BTreeSet<u64>, ours: &BTreeSet<u32>) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if ours.contains(&pid) {
            continue;
        }
        for fd in fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten() {
            let link = fs::read_link(fd.path()).unwrap_or_default();
            if let Some(inode) = inode_of(&link.to_string_lossy(), "pipe:")
                && pipes.contains(&inode)
            {
                found.insert(inode);
            }
        }
    }
    found
}

impl ProcessFacts {
    fn read(dir: &Path, pid: u32) -> io::Result<Self> {
        let status = fs::read(dir.join("status"))?;
        let mut process = Self { pid, ..Self::of_status(&String::from_utf8_lossy(&status)) };
        process.exe = match fs::read_link(dir.join("exe")) {
            Ok(link) => {
                let path = link.to_string_lossy();
                let left = path.strip_suffix(DELETED);
                Some(Exe { path: left.unwrap_or(&path).to_owned(), deleted: left.is_some() })
            }
            // A zombie has none.
            Err(error) if is_gone(&error) => None,
            Err(error) => return Err(error),
        };
        process.namespaces = namespaces(dir)?;
        let mounts = mounts(&fs::read(dir.join("mountinfo")).unwrap_or_default());
        for entry in fs::read_dir(dir.join("fd"))? {
            let path = entry?.path();
            let number = path.file_name().and_then(OsStr::to_str).and_then(|name| name.parse().ok());
            let Some(number) = number else { continue };
            match open_file(&path) {
                Ok(file) => {
                    let mount = mount_of(&dir.join(format!("fdinfo/{number}")));
                    process.files.push((number, seen(file, &path, mount, &mounts)));
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        process.files.sort_by_key(|(number, _)| *number);
        let maps = fs::read(dir.join("maps"))?;
        process.mappings = odd_mappings(&maps);
        Ok(process)
    }

    /// From `/proc/PID/status`, see proc_pid_status(5).
    fn of_status(text: &str) -> Self {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).unwrap_or_default()
        };
        let number = |name: &str| field(name).parse().unwrap_or(0);
        Self {
            comm: field("Name").to_owned(),
            parent: number("PPid"),
            state: field("State").chars().next().unwrap_or('?'),
            tracer: number("TracerPid"),
            seccomp: number("Seccomp"),
            ..Self::default()
        }
    }
}

/// What /proc appends to names of files that are gone.
const DELETED: &str = " (deleted)";

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn inode_of(link: &str, kind: &str) -> Option<u64> {
    link.strip_prefix(kind)?.strip_prefix('[')?.strip_suffix(']')?.parse().ok()
}

/// Looks at one descriptor, `/proc/PID/fd/N`.
fn open_file(path: &Path) -> io::Result<OpenFile> {
    let link = fs::read_link(path)?;
    let link = link.to_string_lossy().into_owned();
    if let Some(kind) = link.strip_prefix("anon_inode:") {
        return Ok(OpenFile::Anon(kind.to_owned()));
    }
    if let Some(inode) = inode_of(&link, "socket:") {
        // For now: which sockets are of another kind is known once all are.
        return Ok(OpenFile::Unix { inode, peer: Peer::Unknown });
    }
    if let Some(inode) = inode_of(&link, "pipe:") {
        return Ok(OpenFile::Pipe { inode, shared: false });
    }
    // Follows the link to the file itself, even if it has no name any more.
    let meta = fs::metadata(path)?;
    let kind = meta.file_type();
    let device = || (nix::sys::stat::major(meta.rdev()) as u32, nix::sys::stat::minor(meta.rdev()) as u32);
    Ok(if kind.is_char_device() {
        let (major, minor) = device();
        OpenFile::Char { major, minor, path: link }
    } else if kind.is_block_device() {
        let (major, minor) = device();
        OpenFile::Block { major, minor, path: link }
    } else if let Some(left) = link.strip_suffix(DELETED)
        && meta.nlink() == 0
        // That is memory, and goes with the memory.
        && !left.starts_with("/memfd:")
    {
        OpenFile::Deleted { path: left.to_owned(), size: meta.blocks() * 512 }
    } else if link.starts_with('/') {
        OpenFile::Regular { path: link }
    } else {
        OpenFile::Other(link)
    })
}

/// The numbers of the mounts in `/proc/PID/mountinfo`.
fn mounts(mountinfo: &[u8]) -> BTreeSet<u32> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let first = lines.filter_map(|line| line.split(|byte| *byte == b' ').next());
    first.filter_map(|number| std::str::from_utf8(number).ok()?.parse().ok()).collect()
}

/// The number of the mount that a descriptor is on, from its `fdinfo`.
fn mount_of(fdinfo: &Path) -> Option<u32> {
    let text = fs::read_to_string(fdinfo).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

/// The same file, or that it is on none of these mounts. Only what has a path is on one of them.
fn seen(file: OpenFile, fd: &Path, mount: Option<u32>, mounts: &BTreeSet<u32>) -> OpenFile {
    let (OpenFile::Regular { path } | OpenFile::Char { path, .. }) = &file else { return file };
    match (mount, fs::metadata(fd)) {
        (Some(mount), Ok(meta)) if !mounts.is_empty() && !mounts.contains(&mount) => {
            OpenFile::Unseen { key: format!("file[{mount:x}:{:x}]", meta.ino()), path: path.clone() }
        }
        _ => file,
    }
}

/// The mappings in `/proc/PID/maps` that are no ordinary files or memory, once each.
fn odd_mappings(maps: &[u8]) -> Vec<String> {
    let names = maps.split(|byte| *byte == b'\n').filter_map(|line| {
        // address perms offset device inode, then blanks and the name
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let name = fields.nth(5)?.trim_ascii();
        let odd =
            name.starts_with(b"/dev/") && !name.starts_with(b"/dev/shm/") && !name.starts_with(b"/dev/zero")
                || name.starts_with(b"anon_inode:")
                || name.starts_with(b"/anon_hugepage")
                || name.starts_with(b"/dev/hugepages");
        odd.then(|| String::from_utf8_lossy(OsStr::from_bytes(name).as_bytes()).into_owned())
    });
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

/// The namespaces of a process, by kind.
fn namespaces(dir: &Path) -> io::Result<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
        match fs::read_link(dir.join("ns").join(kind)) {
            Ok(link) => {
                if let Some(inode) = inode_of(&link.to_string_lossy(), &format!("{kind}:")) {
                    all.insert(kind.to_owned(), inode);
                }
            }
            // An older kernel lacks a kind; a zombie has none.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// 6 and 18 of `6.18.2-amd64`.
pub fn kernel() -> (u32, u32) {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The capabilities that CRIU gets: behind the door those of the host's first process, else ours.
pub fn capabilities() -> u64 {
    if worker::by_door() { capabilities_of("1") } else { own_capabilities() }
}

/// The capabilities that a child of this process gets.
pub(super) fn own_capabilities() -> u64 {
    capabilities_of("self")
}

fn capabilities_of(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd as _, os::unix::net::UnixStream, path::PathBuf};

    use super::*;

    #[test]
    fn a_status_is_read() {
        let text = "Name:\tng inx\nState:\tS (sleeping)\nPPid:\t7\nTracerPid:\t0\nSeccomp:\t2\nSeccomp_filters:\t5\n";
        let process = ProcessFacts::of_status(text);
        assert_eq!((process.comm.as_str(), process.parent, process.state), ("ng inx", 7, 'S'));
        assert_eq!((process.tracer, process.seccomp), (0, 2));
    }

    #[test]
    fn odd_mappings_are_found_once_and_others_are_not() {
        let maps = b"00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/x\n\
                     7f00-7f01 rw-s 10000000 00:0e 2059                       anon_inode:[io_uring]\n\
                     7f01-7f02 rw-s 10000000 00:0e 2059                       anon_inode:[io_uring]\n\
                     7f02-7f03 rw-s 00000000 00:05 1 /dev/dri/card 0\n\
                     7f03-7f04 rw-s 00000000 00:01 4 /dev/zero (deleted)\n\
                     7f04-7f05 rw-s 00000000 00:01 4 /dev/shm/x\n\
                     7f05-7f06 rw-p 00000000 00:0f 5 /anon_hugepage (deleted)\n\
                     7f06-7f07 rw-p 00000000 00:00 0 \n\
                     7ffc-7ffd rw-p 00000000 00:00 0                          [stack]\n";
        let found = odd_mappings(maps);
        assert_eq!(found, ["/anon_hugepage (deleted)", "/dev/dri/card 0", "anon_inode:[io_uring]"]);
    }

    #[test]
    fn a_file_on_a_mount_that_is_not_seen_is_told() {
        let null = File::open("/dev/null").unwrap();
        let fd = PathBuf::from(format!("/proc/self/fd/{}", null.as_raw_fd()));
        let file = || open_file(&fd).unwrap();
        let own = mounts(&fs::read("/proc/self/mountinfo").unwrap());
        let mount = mount_of(Path::new(&format!("/proc/self/fdinfo/{}", null.as_raw_fd())));
        assert!(own.contains(&mount.unwrap()), "{mount:?}");
        assert_eq!(seen(file(), &fd, mount, &own), file());
        let inode = null.metadata().unwrap().ino();
        let unseen = seen(file(), &fd, Some(0x51), &BTreeSet::from([1]));
        assert_eq!(unseen, OpenFile::Unseen { key: format!("file[51:{inode:x}]"), path: "/dev/null".into() });
        // A kernel that does not tell.
        assert_eq!(seen(file(), &fd, None, &own), file());
    }

    #[test]
    fn this_process_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let null = File::open("/dev/null").unwrap();
        let gone = File::create(dir.path().join("gone")).unwrap();
        fs::remove_file(dir.path().join("gone")).unwrap();
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let read = ProcessFacts::read(Path::new("/proc/self"), std::process::id()).unwrap();
        let of = |fd: i32| read.files.iter().find(|(n, _)| *n == fd.cast_unsigned()).unwrap().1.clone();
        assert_eq!(of(null.as_raw_fd()), OpenFile::Char { major: 1, minor: 3, path: "/dev/null".into() });
        assert!(matches!(of(gone.as_raw_fd()), OpenFile::Deleted { path, .. } if path.ends_with("/gone")));
        assert_eq!(of(epoll.0.as_raw_fd()), OpenFile::Anon("[eventpoll]".into()));
        assert!(matches!(of(one.as_raw_fd()), OpenFile::Unix { .. }));
        assert_eq!(read.exe.unwrap().path, std::env::current_exe().unwrap().to_str().unwrap());
        assert!(read.namespaces.contains_key("mnt") && read.parent != 0);
        drop(other);
    }

    #[test]
    fn ends_of_sockets_are_told_apart() {
        let socket = |peer, name: &str, stream| UnixSocket { peer, name: name.into(), stream };
        let sockets = HashMap::from([
            (1, socket(2, "", true)),
            (2, socket(1, "", true)),
            (3, socket(30, "", true)),
            (30, socket(3, JOURNAL, true)),
            (4, socket(40, "", true)),
            (40, socket(4, "/run/db", true)),
            (5, socket(0, "/run/x", true)),
            (6, socket(60, "", false)),
            (60, socket(0, "/dev/log", false)),
        ]);
        let own = BTreeSet::from([1, 2, 3, 4, 5, 6]);
        let peer = |inode| find_peer(&sockets, &own, inode);
        assert_eq!((peer(1), peer(3), peer(5)), (Peer::Unit, Peer::Journal, Peer::None));
        assert_eq!(peer(4), Peer::Foreign { name: "/run/db".into(), stream: true });
        assert_eq!(peer(6), Peer::Foreign { name: "/dev/log".into(), stream: false });
        assert_eq!(peer(9), Peer::Unknown);
    }
}
