//! Loads and attaches the BPF programs, and keeps their maps.
#![allow(unsafe_code, reason = "aya::Pod is an unsafe trait, and bpf(2) has no safe wrapper for statistics")]

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use agent_ebpf::{Config, NO_NODE, NO_SLOT, NameKey, ROOT_NODE, Watched, counter};
use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader,
    maps::{HashMap, MapData, MapError, PerCpuArray, RingBuf},
    programs::{BtfTracePoint, ProgramError},
};

use super::{
    Drops, Missing, ProbeError, ProbeEvent, ProbeOptions, Realtime, Slot, WatchError,
    btf::{BtfTypes, RUNNING_KERNEL},
    heap,
    names::Names,
    page_size,
    reader::Reader,
};
use crate::unit::cgroup;

/// agent-ebpf, as agent/build.rs built it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/agent-ebpf"));

/// Program, tracepoint, and what is lost without it; `None`: ftd cannot do without.
const PROGRAMS: [(&str, &str, Option<&str>); 7] = [
    ("process_exit", "sched_process_exit", None),
    ("process_fork", "sched_process_fork", Some("new processes of a unit are not reported")),
    ("process_exec", "sched_process_exec", Some("programs that a unit starts are not reported")),
    ("signal_generate", "signal_generate", Some("who sent a signal is not known")),
    ("mark_victim", "mark_victim", Some(OOM_UNSEEN)),
    ("cgroup_mkdir", "cgroup_mkdir", Some(NOT_FOLLOWED)),
    ("cgroup_rmdir", "cgroup_rmdir", Some("cgroups that are gone stay in the filter until it is refreshed")),
];

const NOT_FOLLOWED: &str = "a unit that is started anew is lost from sight until the filter is refreshed";

const OOM_UNSEEN: &str = "OOM kills look like any SIGKILL";

/// Fields that `cgroup_mkdir` needs; without them the program would take no cgroup for a unit's.
const MKDIR_FIELDS: [(&str, &str); 5] = [
    ("cgroup", "root"),
    ("cgroup", "self.parent"),
    ("cgroup_root", "hierarchy_id"),
    ("cgroup_subsys_state", "cgroup"),
    ("kernfs_node", "name"),
];

/// How often a cgroup may be replaced while it is being looked at, before the look is given up.
const REPLACED: usize = 16;

/// How often what is left of a slot is looked for. Twice is usual, more often only while cgroups are
/// made at that very moment.
const FORGETTING: usize = 16;

/// Plain memory for aya, which the orphan rule keeps from the shared types themselves.
#[derive(Clone, Copy, PartialEq)]
#[repr(transparent)]
struct Plain<T: Copy>(T);

// SAFETY: all three are repr(C) structures of integers without padding.
unsafe impl aya::Pod for Plain<Config> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Watched> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<NameKey> {}

struct Maps {
    watched: HashMap<MapData, u64, Plain<Watched>>,
    names: HashMap<MapData, Plain<NameKey>, Plain<Watched>>,
    counters: PerCpuArray<MapData, u64>,
    tree: Names,
}

/// The BPF programs at work. Dropping it stops the reader thread and detaches them.
pub struct Probe {
    // in this order dropped: no event comes after the programs are gone
    reader: Reader,
    ebpf: Ebpf,
    maps: Mutex<Maps>,
    mount: PathBuf,
    missing: Vec<Missing>,
    follows: bool,
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probe")
            .field("mount", &self.mount)
            .field("missing", &self.missing)
            .finish_non_exhaustive()
    }
}

impl Probe {
    /// Loads the programs, attaches them and starts the thread that calls `sink` for each event.
    ///
    /// `sink` decides about healing on that very thread, so it should be quick; while it runs, the
    /// ring buffer holds what comes.
    pub fn start(
        options: &ProbeOptions,
        sink: impl FnMut(ProbeEvent) + Send + 'static,
    ) -> Result<Self, ProbeError> {
        let mount = cgroup::unified_mount().map_err(ProbeError::Cgroup)?;
        let (config, mut missing) = configure(options)?;
        let btf = Btf::from_sys_fs()
            .map_err(|error| ProbeError::NoBtf { path: RUNNING_KERNEL, cause: error.to_string() })?;
        let config = Plain(config);
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf));
        loader.override_global("CONFIG", &config, true);
        loader.map_max_entries("EVENTS", options.ring_entries(page_size() as u32));
        loader.map_max_entries("WATCHED", options.cgroups.max(1));
        let mut ebpf = loader.load(OBJECT).map_err(load_error)?;

        let mut follows = !missing.iter().any(|missing| missing.effect == NOT_FOLLOWED);
        for (name, tracepoint, effect) in PROGRAMS {
            if name == "cgroup_mkdir" && !follows {
                continue;
            }
            match (attach(&mut ebpf, name, tracepoint, &btf), effect) {
                (Ok(()), _) => {}
                (Err(error), None) => return Err(program_error(tracepoint, error)),
                (Err(error), Some(effect)) => {
                    follows &= name != "cgroup_mkdir";
                    let what = format!("tracepoint {tracepoint}: {}", program_error(tracepoint, error));
                    missing.push(Missing { what, effect });
                }
            }
        }
        let ring = RingBuf::try_from(take(&mut ebpf, "EVENTS")?).map_err(map_error)?;
        let maps = Maps {
            watched: HashMap::try_from(take(&mut ebpf, "WATCHED")?).map_err(map_error)?,
            names: HashMap::try_from(take(&mut ebpf, "NAMES")?).map_err(map_error)?,
            counters: PerCpuArray::try_from(take(&mut ebpf, "COUNTERS")?).map_err(map_error)?,
            tree: Names::new(),
        };
        let reader =
            Reader::start(ring, options.realtime_priority, page_size(), sink).map_err(ProbeError::Reader)?;
        drop(btf);
        heap::give_back();
        Ok(Self { reader, ebpf, maps: Mutex::new(maps), mount, missing, follows })
    }

    /// Reports, from now on, what happens to processes in this control group and below it.
    ///
    /// `control_group` is what systemd calls it (`/system.slice/nginx.service`), below the root of
    /// the unified hierarchy. It need not exist yet, and may be removed and made again: the kernel
    /// side knows each new one before a process can be in it.
    ///
    /// A second call with the same pair only looks again. After an error the slot is not watched.
    pub fn watch(&self, slot: Slot, control_group: &str) -> Result<(), WatchError> {
        if slot.0 == NO_SLOT {
            return Err(WatchError::Path {
                path: control_group.to_owned(),
                cause: "its slot is out of range",
            });
        }
        let mut maps = self.maps();
        let nodes = maps.tree.insert(slot, control_group)?;
        let done = maps.follow(&self.mount, slot, &nodes);
        if done.is_err() {
            // the first error is the one to tell
            let _ = maps.forget(&self.mount, slot);
        }
        done
    }

    /// Stops reporting for this slot. A slot that is not watched is no error.
    pub fn unwatch(&self, slot: Slot) -> Result<(), WatchError> {
        self.maps().forget(&self.mount, slot)
    }

    /// Looks through the watched part of the cgroup file system again: enters what is not in the
    /// filter, and takes out what is gone. Needed where [`Probe::follows_in_kernel`] is false, after
    /// a unit has started; and everywhere after the filter was full, see [`Drops::cgroups_full`].
    pub fn refresh(&self) -> Result<(), WatchError> {
        self.maps().refresh(&self.mount)
    }

    /// Whether control groups that are made anew are recognised at once, by the kernel side.
    pub fn follows_in_kernel(&self) -> bool {
        self.follows
    }

    /// What was reported, what was delivered and what was lost since the start.
    pub fn drops(&self) -> Drops {
        let maps = self.maps();
        let sum = |index| {
            maps.counters
                .get(&index, 0)
                .map_or(0, |values| values.iter().fold(0_u64, |a, b| a.wrapping_add(*b)))
        };
        let progress = &self.reader.progress;
        Drops {
            reported: sum(counter::REPORTED),
            delivered: progress.delivered.load(Ordering::Acquire),
            duplicates: progress.duplicates.load(Ordering::Acquire),
            ring_full: sum(counter::RING_FULL),
            cgroups_full: sum(counter::CGROUPS_FULL),
            malformed: progress.malformed.load(Ordering::Acquire),
            skipped: self.skipped(),
        }
    }

    /// Whether the reader thread has real-time priority.
    pub fn realtime(&self) -> &Realtime {
        &self.reader.realtime
    }

    /// What this kernel lacks, and what that means.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs of all programs that the kernel left out.
    fn skipped(&self) -> u64 {
        let misses = PROGRAMS.iter().filter_map(|(name, ..)| {
            let fd = self.ebpf.program(name)?.fd().ok()?;
            recursion_misses(fd.as_fd().as_raw_fd())
        });
        misses.sum()
    }
}

/// A directory of the cgroup file system that is to be entered.
struct Place {
    dir: PathBuf,
    /// Its node in the tree of names, or [`NO_NODE`].
    node: u32,
    /// The slot of what is above it.
    inherited: u32,
}

/// What a walk through the cgroup file system came to.
struct Walk {
    /// Ids of all cgroups that were there.
    met: HashSet<u64>,
    /// Whether all directories could be looked at.
    whole: bool,
    /// The first thing that went wrong.
    error: Option<WatchError>,
}

impl Walk {
    fn done(self) -> Result<(), WatchError> {
        self.error.map_or(Ok(()), Err)
    }
}

impl Maps {
    /// Enters a slot's names, then its cgroups: so that what is made from now on is seen by the
    /// kernel side, and what there is, here.
    fn follow(&mut self, mount: &Path, slot: Slot, nodes: &[u32]) -> Result<(), WatchError> {
        for &node in nodes {
            if let Some(key) = self.tree.key(node) {
                put(&mut self.names, Plain(key), Plain(self.tree.value(node)))?;
            }
        }
        let way = self.tree.way(slot).unwrap_or_default();
        self.place(mount, &way)
    }

    /// Enters the cgroups on this way from the root, and all that is below its end.
    fn place(&mut self, mount: &Path, way: &[(String, u32)]) -> Result<(), WatchError> {
        let mut place = Place { dir: mount.to_owned(), node: ROOT_NODE, inherited: NO_SLOT };
        for (name, node) in way {
            let (_, inherited) = self.enter(&place)?;
            place = Place { dir: place.dir.join(name), node: *node, inherited };
        }
        self.walk(place).done()
    }

    /// Enters a cgroup and all that is below it.
    ///
    /// A cgroup is entered before it is looked into, so a child is seen here or by the kernel side.
    /// One that cannot be entered does not keep the others from being so. Below a unit's own cgroup,
    /// where the unit may make what it likes, that is no error: a path may be too long for any
    /// system call.
    fn walk(&mut self, from: Place) -> Walk {
        let mut walk = Walk { met: HashSet::new(), whole: true, error: None };
        let mut left = vec![from];
        while let Some(place) = left.pop() {
            let mut note = |error| match error {
                WatchError::Io { path, error } if place.node == NO_NODE => {
                    tracing::warn!(path = %path.display(), %error, "a control group is not watched");
                    walk.whole = false;
                }
                error => {
                    walk.whole &= matches!(error, WatchError::Full);
                    walk.error.get_or_insert(error);
                }
            };
            let (id, slot) = match self.enter(&place) {
                Ok((Some(id), slot)) => (id, slot),
                Ok((None, _)) => continue,
                Err(error) => {
                    note(error);
                    continue;
                }
            };
            let below = |name: &OsStr, node| Place { dir: place.dir.join(name), node, inherited: slot };
            let children = self.tree.children(place.node);
            left.extend(children.iter().map(|(name, node)| below(name.as_ref(), *node)));
            if slot != NO_SLOT {
                let mut others = directories(&place.dir).unwrap_or_else(|error| {
                    note(error);
                    Vec::new()
                });
                others.retain(|name| children.iter().all(|(child, _)| name != child.as_str()));
                left.extend(others.iter().map(|name| below(name, NO_NODE)));
            }
            walk.met.insert(id);
        }
        walk
    }

    /// Enters one cgroup; returns its id, if it exists, and the slot that those below it inherit.
    fn enter(&mut self, place: &Place) -> Result<(Option<u64>, u32), WatchError> {
        let mut value = self.tree.value(place.node);
        if value.slot == NO_SLOT {
            value.slot = place.inherited;
        }
        if value == (Watched { slot: NO_SLOT, node: NO_NODE }) {
            return Ok((None, NO_SLOT));
        }
        let mut found = inode(&place.dir)?;
        for _ in 0..REPLACED {
            let Some(id) = found else { break };
            put(&mut self.watched, id, Plain(value))?;
            found = inode(&place.dir)?;
            if found == Some(id) {
                break;
            }
            // It went away in between, maybe before it was entered.
            let _ = self.watched.remove(&id);
        }
        Ok((found, value.slot))
    }

    /// Enters all that is watched, and takes out what is not there any more.
    fn refresh(&mut self, mount: &Path) -> Result<(), WatchError> {
        // What the kernel side enters from now on may not be met, but is not gone.
        let known: HashSet<u64> = self.watched.keys().filter_map(Result::ok).collect();
        let walk = self.walk(Place { dir: mount.to_owned(), node: ROOT_NODE, inherited: NO_SLOT });
        if walk.whole {
            for id in known.difference(&walk.met) {
                let _ = self.watched.remove(id);
            }
        }
        walk.done()
    }

    /// Names first, then cgroups: what another watched path covers becomes its own before the rest
    /// is taken out. A cgroup that is being made may get what its parent was a moment before, so it
    /// is done again until nothing of the slot is left.
    fn forget(&mut self, mount: &Path, slot: Slot) -> Result<(), WatchError> {
        let Some(mut way) = self.tree.way(slot) else { return Ok(()) };
        let mut gone = HashSet::new();
        for (node, key) in self.tree.remove(slot) {
            gone.insert(node);
            let _ = self.names.remove(&Plain(key));
        }
        if let Some((_, own)) = way.last()
            && let Some(key) = self.tree.key(*own)
        {
            put(&mut self.names, Plain(key), Plain(self.tree.value(*own)))?;
        }
        for (_, node) in way.iter_mut().filter(|(_, node)| gone.contains(node)) {
            *node = NO_NODE;
        }
        for _ in 0..FORGETTING {
            let placed = self.place(mount, &way);
            let stale: Vec<u64> = self
                .watched
                .iter()
                .filter_map(Result::ok)
                .filter(|(_, Plain(value))| value.slot == slot.0 || gone.contains(&value.node))
                .map(|(id, _)| id)
                .collect();
            if stale.is_empty() {
                return placed;
            }
            for id in stale {
                let _ = self.watched.remove(&id);
            }
        }
        Err(WatchError::Map("cgroups of a unit that is not watched any more stay in it".into()))
    }
}

/// Enters a value, unless it is there. The memory of a value that is replaced goes to the next one
/// that is entered, which a program that still reads it then takes for its own: so what is right is
/// left as it is.
fn put<K: aya::Pod, V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: V,
) -> Result<(), WatchError> {
    if map.get(&key, 0).is_ok_and(|there| there == value) {
        return Ok(());
    }
    map.insert(key, value, 0).map_err(full)
}

/// A cgroup's id is its directory's inode number (`kernfs_node::id`). `None`: it does not exist.
fn inode(dir: &Path) -> Result<Option<u64>, WatchError> {
    match fs::metadata(dir) {
        Ok(metadata) => Ok(Some(metadata.ino())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(WatchError::Io { path: dir.to_owned(), error }),
    }
}

/// The names of the directories in this one, which is closed again when they are returned.
fn directories(dir: &Path) -> Result<Vec<OsString>, WatchError> {
    let list = || {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.push(entry.file_name());
            }
        }
        Ok(names)
    };
    match list() {
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        names => names.map_err(|error| WatchError::Io { path: dir.to_owned(), error }),
    }
}

/// kernfs says ENODEV of a directory that is on its way out.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn configure(options: &ProbeOptions) -> Result<(Config, Vec<Missing>), ProbeError> {
    let no_btf = |cause: String| ProbeError::NoBtf { path: RUNNING_KERNEL, cause };
    let data = fs::read(RUNNING_KERNEL).map_err(|error| no_btf(error.to_string()))?;
    let types = BtfTypes::parse(&data).map_err(|error| no_btf(error.to_string()))?;
    let (mut needed, mut missing) = (Vec::new(), Vec::new());
    let mut config = Config::empty();
    types.configure(&mut config, |structure, path, is_needed| {
        let what = format!("field {structure}.{path}");
        if is_needed {
            needed.push(what);
        } else if MKDIR_FIELDS.contains(&(structure, path)) {
            missing.push(Missing { what, effect: NOT_FOLLOWED });
        } else {
            missing.push(Missing { what, effect: "what is read from there is reported as 0" });
        }
    });
    if !needed.is_empty() {
        return Err(ProbeError::Fields { missing: needed });
    }
    let namespace = fs::metadata("/proc/self/ns/pid").map_err(ProbeError::Namespace)?.ino();
    config.own_pidns = namespace as u32;
    config.initial_pidns = u32::from(config.own_pidns == PROC_PID_INIT_INO);
    config.signals = options.signals.bits();
    config.unhandled = options.unhandled.bits();
    config.quiet_deaths = options.quiet_deaths.bits();
    config.elsewhere = u32::from(options.elsewhere);
    missing.extend(without_victim(&config));
    Ok((config, missing))
}

/// What is missing where the kernel tells of an OOM victim only its pid in the initial PID namespace.
fn without_victim(config: &Config) -> Option<Missing> {
    (config.oom_has_task == 0).then(|| Missing {
        what: "mark_victim's argument task".to_owned(),
        effect: if config.elsewhere == 1 && config.initial_pidns == 1 {
            "OOM kills are reported without unit, name and sizes"
        } else {
            OOM_UNSEEN
        },
    })
}

/// The initial PID namespace's inode number, `include/linux/proc_ns.h`.
const PROC_PID_INIT_INO: u32 = 0xefff_fffc;

fn attach(ebpf: &mut Ebpf, name: &str, tracepoint: &str, btf: &Btf) -> Result<(), ProgramError> {
    let program = ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?;
    let program: &mut BtfTracePoint = program.try_into()?;
    program.load(tracepoint, btf)?;
    program.attach().map(drop)
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map, ProbeError> {
    ebpf.take_map(name).ok_or_else(|| ProbeError::Object(format!("it has no map {name}")))
}

fn map_error(error: MapError) -> ProbeError {
    match error {
        MapError::SyscallError(error) => ProbeError::from_kernel("a BPF map's memory", error.io_error),
        MapError::CreateError { name, io_error } => {
            ProbeError::from_kernel(&format!("BPF map {name}"), io_error)
        }
        other => ProbeError::Object(other.to_string()),
    }
}

fn load_error(error: EbpfError) -> ProbeError {
    match error {
        EbpfError::MapError(error) => map_error(error),
        other => ProbeError::Object(chain(&other)),
    }
}

fn program_error(tracepoint: &str, error: ProgramError) -> ProbeError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
            // Without a log it was not the verifier who refused.
            if lines.is_empty() || io_error.raw_os_error() == Some(libc::EPERM) {
                ProbeError::from_kernel(&format!("the BPF program on {tracepoint}"), io_error)
            } else {
                let last = lines[lines.len().saturating_sub(12)..].join("\n");
                ProbeError::Verifier { tracepoint: tracepoint.to_owned(), error: io_error, last_lines: last }
            }
        }
        ProgramError::SyscallError(error) => {
            ProbeError::from_kernel(&format!("the BPF program on {tracepoint}"), error.io_error)
        }
        other => ProbeError::Tracepoint { tracepoint: tracepoint.to_owned(), cause: chain(&other) },
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        next = error.source();
    }
    text
}

fn full(error: MapError) -> WatchError {
    match error {
        MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
            WatchError::Full
        }
        other => WatchError::Map(chain(&other)),
    }
}

/// How often the kernel left a program's run out; aya keeps that to itself.
fn recursion_misses(program: i32) -> Option<u64> {
    /// `struct bpf_prog_info` as far as it is needed, `include/uapi/linux/bpf.h`.
    #[repr(C)]
    struct Info {
        before: [u64; 26],
        recursion_misses: u64,
    }
    /// `bpf_attr`, the member `info`.
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

    let mut info = Info { before: [0; 26], recursion_misses: 0 };
    let attr = Attr {
        bpf_fd: u32::try_from(program).ok()?,
        info_len: size_of::<Info>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: attr is whole and says how large info is; the kernel writes no more than that. The
    // pointers and lengths in info are zero: nothing else is asked for.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const attr, size_of::<Attr>()) };
    (done == 0).then_some(info.recursion_misses)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "a test panics where it fails")]
mod tests {
    use super::*;

    /// `None`, and a word, where the programs cannot be loaded.
    fn probe() -> Option<Probe> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: it needs root (BPF programs)");
            return None;
        }
        let options = ProbeOptions { elsewhere: false, realtime_priority: None, ..ProbeOptions::default() };
        Some(Probe::start(&options, |_| ()).unwrap())
    }

    #[test]
    fn what_is_missing_of_an_oom_kill_depends_on_what_its_pid_is_good_for() {
        let of = |oom_has_task, elsewhere, initial_pidns| {
            let config = Config { oom_has_task, elsewhere, initial_pidns, ..Config::empty() };
            without_victim(&config).map(|missing| missing.effect)
        };
        assert_eq!(of(1, 1, 0), None);
        assert_eq!(of(0, 1, 1), Some("OOM kills are reported without unit, name and sizes"));
        assert_eq!([of(0, 1, 0), of(0, 0, 1), of(0, 0, 0)], [Some(OOM_UNSEEN); 3]);
    }

    fn ids(probe: &Probe) -> HashSet<u64> {
        probe.maps().watched.keys().map(Result::unwrap).collect()
    }

    #[test]
    fn a_refresh_takes_out_what_is_gone_and_puts_right_what_is_wrong() {
        let Some(probe) = probe() else { return };
        let root = fs::metadata(&probe.mount).unwrap().ino();
        probe.watch(Slot(0), "/ftd-test-that-is-not-there").unwrap();
        assert_eq!(ids(&probe), HashSet::from([root]));
        let wrong = Plain(Watched { slot: 5, node: NO_NODE });
        for id in [root, u64::MAX] {
            probe.maps().watched.insert(id, wrong, 0).unwrap();
        }
        probe.refresh().unwrap();
        assert_eq!(ids(&probe), HashSet::from([root]));
        let Plain(value) = probe.maps().watched.get(&root, 0).unwrap();
        assert_eq!(value, Watched { slot: NO_SLOT, node: ROOT_NODE });
    }

    #[test]
    fn nothing_is_left_of_a_slot_that_is_forgotten() {
        let Some(probe) = probe() else { return };
        let before = ids(&probe);
        probe.watch(Slot(0), "/a/b").unwrap();
        probe.watch(Slot(1), "/a").unwrap();
        // as if cgroups had been made while it is forgotten
        for id in u64::MAX - 9..=u64::MAX {
            probe.maps().watched.insert(id, Plain(Watched { slot: 1, node: NO_NODE }), 0).unwrap();
        }
        probe.unwatch(Slot(1)).unwrap();
        probe.unwatch(Slot(0)).unwrap();
        let root = fs::metadata(&probe.mount).unwrap().ino();
        assert_eq!(&ids(&probe) - &HashSet::from([root]), before);
        assert_eq!(probe.maps().names.keys().count(), 0);
        probe.unwatch(Slot(0)).unwrap();
    }
}
