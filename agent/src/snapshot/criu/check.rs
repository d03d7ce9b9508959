//! `ftctl check`: what would keep a running unit from being dumped or restored, all of it, before anything is
//! touched.
//!
//! CRIU finds a blocker when it comes to it, with the service already frozen, and only the first. Here all of
//! them are named at once, by looking from outside. That takes two steps: [`facts`](super::facts) reads,
//! judging nothing; [`judge`] is pure, and judges by rules that are CRIU's (what its file types, sockets and
//! namespaces can be) and systemd's. A check that finds nothing is no promise: files come and go. It is as
//! right as CRIU's own answer for all that a service holds for long.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::{
    Abilities, GHOST_LIMIT, Version,
    facts::{CriuFacts, Facts, OpenFile, Peer, ProcessFacts},
};

/// How much a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Note,
    /// It works, but less well, or perhaps not.
    Warning,
    /// It cannot work.
    Blocker,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How much it weighs.
    pub severity: Severity,
    /// What: `nginx (pid 812), descriptor 7`.
    pub thing: String,
    /// Why it is in the way.
    pub cause: String,
    /// What to do; empty where there is nothing to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mend: String,
}

/// The answer to `ftctl check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The unit, by systemd's name.
    pub unit: String,
    /// Its main process.
    pub main_pid: u32,
    /// How many processes it has.
    pub processes: usize,
    /// CRIU here, where it works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<Abilities>,
    /// Findings, the gravest first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether nothing is in the way, as far as can be seen.
    pub fn ready(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity < Severity::Blocker)
    }

    /// The blockers in one text.
    pub fn blockers(&self) -> String {
        let blockers = self.findings.iter().filter(|finding| finding.severity == Severity::Blocker);
        let texts = blockers.map(|Finding { thing, cause, mend, .. }| format!("{thing}: {cause}. {mend}"));
        texts.collect::<Vec<_>>().join("; ")
    }
}

/// The oldest CRIU that ftd works with.
const OLDEST: Version = Version::new(3, 19);
/// From this kernel on, `SO_PASSCRED` of internet sockets cannot be asked for, which older CRIUs do.
const PASSCRED_KERNEL: (u32, u32) = (6, 16);
const PASSCRED_CRIU: Version = Version::new(4, 2);
/// What CRIU needs at the least, with its numbers in capability.h.
const NEEDED: [(u8, &str); 5] = [
    (21, "CAP_SYS_ADMIN"),
    (19, "CAP_SYS_PTRACE"),
    (12, "CAP_NET_ADMIN"),
    (7, "CAP_SETUID"),
    (6, "CAP_SETGID"),
];
const SYS_RESOURCE: u8 = 24;
/// Kinds of anonymous inodes that CRIU knows, by what /proc calls them.
const ANON_KNOWN: [&str; 9] = [
    "[eventfd]",
    "[eventpoll]",
    "[signalfd]",
    "[timerfd]",
    "[fanotify]",
    "[pidfd]",
    "inotify",
    "bpf-map",
    "[secretmem]",
];
/// /dev/null, zero, full, random, urandom, kmsg.
const MEMORY_DEVICES: [u32; 6] = [3, 5, 7, 8, 9, 11];
/// Where journald takes the output of services.
pub(super) const JOURNAL: &str = "/run/systemd/journal/stdout";

/// Judges what was read.
pub fn judge(facts: &Facts) -> Report {
    let mut all = Findings::default();
    of_criu(facts, &mut all);
    of_unit(facts, &mut all);
    for process in &facts.processes {
        of_process(facts, process, &mut all);
    }
    let Findings(mut findings) = all;
    // Workers are alike: what is true of all of them need not be said for each.
    findings.sort_by_key(|finding| Reverse(finding.severity));
    findings.dedup();
    let criu = match &facts.criu {
        CriuFacts::Found(abilities) => Some(*abilities),
        CriuFacts::Missing | CriuFacts::Broken { .. } => None,
    };
    let processes = facts.processes.len();
    Report { unit: facts.unit.clone(), main_pid: facts.main_pid, processes, criu, findings }
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, severity: Severity, thing: &str, cause: impl Into<String>, mend: &str) {
        self.0.push(Finding { severity, thing: thing.into(), cause: cause.into(), mend: mend.into() });
    }

    fn blocker(&mut self, thing: &str, cause: impl Into<String>, mend: &str) {
        self.add(Severity::Blocker, thing, cause, mend);
    }

    fn warning(&mut self, thing: &str, cause: impl Into<String>, mend: &str) {
        self.add(Severity::Warning, thing, cause, mend);
    }
}

/// Whether a process with these capabilities can run CRIU.
pub(super) fn has_needed(capabilities: u64) -> bool {
    NEEDED.iter().all(|(number, _)| capabilities >> number & 1 == 1)
}

/// CRIU itself, as `doctor` and `check` both say it.
pub fn of_criu_alone(criu: &CriuFacts, kernel: (u32, u32), capabilities: u64) -> Vec<Finding> {
    const THING: &str = "CRIU";
    let mut all = Findings::default();
    match criu {
        CriuFacts::Missing => {
            let cause = "it is not installed: snapshots hold files, and no processes";
            all.blocker(THING, cause, "install the package criu, 4.2 or newer");
            return all.0;
        }
        CriuFacts::Broken { cause } => {
            let mend = "install a newer package criu, 4.2 or later";
            all.blocker(THING, format!("it does not work here: {cause}"), mend);
        }
        CriuFacts::Found(abilities) => {
            let version = abilities.version;
            if version < OLDEST {
                let cause = format!("version {version} is too old: ftd needs {OLDEST}");
                all.blocker(THING, cause, "install a newer package criu, 4.2 or later");
            } else if kernel >= PASSCRED_KERNEL && version < PASSCRED_CRIU {
                let cause = format!(
                    "version {version} cannot dump internet sockets on kernel {}.{}",
                    kernel.0, kernel.1
                );
                all.blocker(THING, cause, "install a newer package criu, 4.2 or later");
            }
            if !abilities.mem_track {
                let cause = "this kernel does not tell which pages are written: memory is copied in one round, \
                             while the service stands still";
                all.add(Severity::Note, THING, cause, "");
            }
        }
    }
    let lacks = |number: u8| capabilities >> number & 1 == 0;
    let missing: Vec<_> = NEEDED.iter().filter(|(number, _)| lacks(*number)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        let cause = format!("it would run without {}", missing.join(", "));
        all.blocker(THING, cause, "give ftd.service, or the container, these capabilities");
    }
    if lacks(SYS_RESOURCE) {
        let cause = "it would run without CAP_SYS_RESOURCE: processes of other users cannot be dumped";
        all.warning(THING, cause, "give ftd.service, or the container, this capability");
    }
    all.0
}

fn of_criu(facts: &Facts, all: &mut Findings) {
    all.0.extend(of_criu_alone(&facts.criu, facts.kernel, facts.capabilities));
}

fn of_unit(facts: &Facts, all: &mut Findings) {
    let unit = &facts.unit;
    if facts.main_pid == 0 {
        let cause = format!("it is {}: there is no process to dump", facts.active_state);
        all.blocker(
            unit,
            cause,
            &format!("start it: systemctl start {unit}; its files can be saved as it is"),
        );
        return;
    }
    if facts.active_state != "active" {
        let cause = format!("it is {} just now", facts.active_state);
        all.blocker(unit, cause, "wait until it is active");
    }
    if let Some(root) = &facts.root_directory {
        let cause = format!("it has a root directory of its own, {root}, in which there is no CRIU");
        all.blocker(
            unit,
            cause,
            "run it without RootDirectory= or RootImage=, or use restart instead of migrate",
        );
    }
    if let Some(socket) = &facts.socket_unit {
        let cause =
            format!("its sockets are {socket}'s, which keeps them open: they cannot be made a second time");
        all.blocker(
            unit,
            cause,
            &format!("have the service open them itself (systemctl disable --now {socket})"),
        );
    }
    if facts.dynamic_user {
        let cause = "DynamicUser= may give its user another number at the next start";
        all.warning(unit, cause, "give it a user of its own (User=)");
    }
    if facts.no_proc_sys {
        let cause = "ProcSubset=pid hides from CRIU what it must read of the kernel";
        all.blocker(unit, cause, "set ProcSubset=all for it");
    }
    if !facts.unreadable.is_empty() {
        let cause = format!("not everything could be looked at: {}", facts.unreadable.join("; "));
        all.warning(unit, cause, "see the cause; ftd needs CAP_SYS_PTRACE to look at other users' processes");
    }
    let mounts: std::collections::BTreeSet<_> =
        facts.processes.iter().filter_map(|process| process.namespaces.get("mnt")).collect();
    if mounts.len() > 1 {
        let cause = format!("its processes live in {} different mount namespaces", mounts.len());
        all.blocker(unit, cause, "let the whole unit live in one; or use restart instead of migrate");
    }
}

fn of_process(facts: &Facts, process: &ProcessFacts, all: &mut Findings) {
    let name = format!("{} (pid {})", process.comm, process.pid);
    if !descends(facts, process) {
        let cause = format!("it is no descendant of the unit's main process {}", facts.main_pid);
        all.blocker(&name, cause, "have the unit's main process start it, or run it as a unit of its own");
    }
    if process.tracer != 0 {
        let cause = format!("process {} traces it, and only one can", process.tracer);
        all.blocker(&name, cause, "let the debugger detach");
    }
    if process.state == 'D' {
        let cause = "it waits in the kernel, where it cannot be stopped";
        all.warning(
            &name,
            cause,
            "look at its disk or network file system; a moment later it may have gone on",
        );
    }
    if process.seccomp == 1 {
        let cause = "it is in seccomp's strict mode, in which CRIU's code cannot run";
        all.blocker(&name, cause, "use a seccomp filter instead (SystemCallFilter=)");
    }
    match &process.exe {
        Some(exe) if exe.deleted => {
            let cause = format!("its program {} has been replaced or removed since it started", exe.path);
            all.warning(&name, cause, "restart the service, so that it runs what is installed");
        }
        None if process.state != 'Z' => {
            all.warning(&name, "its program cannot be looked at", "ftd needs CAP_SYS_PTRACE for that");
        }
        _ => {}
    }
    of_namespaces(facts, process, &name, all);
    for (fd, file) in &process.files {
        of_file(&format!("{name}, descriptor {fd}"), file, all);
    }
    for mapping in &process.mappings {
        let thing = format!("{name}, mapping of {mapping}");
        if let Some(kind) = mapping.strip_prefix("anon_inode:") {
            let cause = format!("CRIU cannot dump memory that is shared with the kernel ({kind})");
            all.blocker(&thing, cause, mend_of_anon(kind));
        } else if mapping.starts_with("/dev/") {
            all.blocker(&thing, "CRIU cannot dump a device's memory", DEVICE_MEND);
        } else if mapping.starts_with("/anon_hugepage") || mapping.contains("hugepages") {
            let cause = "as many free huge pages must be there when it is restored";
            all.add(Severity::Note, &thing, cause, "");
        }
    }
}

/// Whether it is the main process or comes of it.
fn descends(facts: &Facts, process: &ProcessFacts) -> bool {
    let mut pid = process.pid;
    // At most so many steps lead up to it: /proc was not read in one moment, and may show a circle.
    for _ in 0..=facts.processes.len() {
        if pid == facts.main_pid {
            return true;
        }
        match facts.processes.iter().find(|process| process.pid == pid) {
            Some(process) => pid = process.parent,
            None => return false,
        }
    }
    false
}

fn of_namespaces(facts: &Facts, process: &ProcessFacts, name: &str, all: &mut Findings) {
    let own = |kind: &str| match (process.namespaces.get(kind), facts.namespaces.get(kind)) {
        (Some(process), Some(host)) => process != host,
        _ => false,
    };
    let restart = "or use restart instead of migrate";
    if own("user") {
        let cause = "it lives in a user namespace of its own";
        all.blocker(name, cause, &format!("run it without PrivateUsers=, {restart}"));
    }
    if own("pid") {
        let cause = "it lives in a PID namespace of its own, which can be dumped but not restored as a unit";
        all.blocker(name, cause, &format!("run it without PrivatePIDs=, {restart}"));
    }
}

const DEVICE_MEND: &str = "have the service close the device, or use restart instead of migrate";

fn mend_of_anon(kind: &str) -> &'static str {
    match kind {
        "[io_uring]" => {
            "switch io_uring off in the service (nginx: `aio off`; Node: UV_USE_IO_URING=0), or use restart \
             instead of migrate"
        }
        "[perf_event]" => "end the profiler",
        "bpf-prog" | "bpf_link" | "bpf-link" | "btf" => {
            "BPF programs cannot be dumped: use restart instead of migrate"
        }
        _ => "use restart instead of migrate",
    }
}

fn of_file(thing: &str, file: &OpenFile, all: &mut Findings) {
    match file {
        OpenFile::Anon(kind) if !ANON_KNOWN.contains(&kind.as_str()) => {
            let name = kind.trim_matches(['[', ']']);
            all.blocker(thing, format!("CRIU cannot dump {name}"), mend_of_anon(kind));
        }
        OpenFile::Unseen { path, .. } if path != "/dev/null" => {
            let cause = format!("{path} was opened on a mount that the process does not see now");
            all.blocker(thing, cause, "have the service open it itself, after its start");
        }
        OpenFile::Char { major: 1, minor, .. } if MEMORY_DEVICES.contains(minor) => {}
        OpenFile::Char { major: 10, minor: 200, .. } => {
            all.warning(
                thing,
                "a network tunnel is open; CRIU dumps it only with its network namespace",
                DEVICE_MEND,
            );
        }
        OpenFile::Char { major: 4 | 5 | 136..=143, path, .. } => {
            let mend = "run it as a service without a terminal (StandardInput=null)";
            all.blocker(thing, format!("the terminal {path} is open"), mend);
        }
        OpenFile::Char { major, minor, path } | OpenFile::Block { major, minor, path } => {
            let cause = format!("the device {path} ({major}:{minor}) is open");
            all.blocker(thing, cause, DEVICE_MEND);
        }
        OpenFile::Deleted { path, size } if *size > u64::from(GHOST_LIMIT) => {
            let cause = format!("{path} is deleted, and {} MiB are more than travel in images", size >> 20);
            all.blocker(thing, cause, "have the service close it (a reload, after log rotation)");
        }
        OpenFile::Unix { peer: Peer::Foreign { name, stream: true }, .. } => {
            let who = if name.is_empty() { String::new() } else { format!(" at {name}") };
            let cause = format!("it is connected with a process outside of the unit{who} by a unix socket");
            let mend = "have the service close that connection before (idle connections to a database, often), or \
                        use restart instead of migrate";
            all.blocker(thing, cause, mend);
        }
        OpenFile::Socket { protocol } if !KNOWN_SOCKETS.contains(&protocol.as_str()) => {
            let cause = format!("CRIU cannot dump {protocol} sockets");
            all.blocker(thing, cause, "use restart instead of migrate");
        }
        OpenFile::Pipe { shared: true, .. } => {
            let cause = "the other end of the pipe is held by a process outside of the unit";
            all.blocker(thing, cause, "have it write to the journal or a file instead, or use restart");
        }
        _ => {}
    }
}

/// Names of protocols in /proc/net that CRIU knows.
const KNOWN_SOCKETS: [&str; 10] =
    ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "netlink", "packet", "raw", "raw6"];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::snapshot::criu::facts::Exe;

    fn namespaces() -> BTreeMap<String, u64> {
        ["mnt", "net", "pid", "user", "ipc", "uts", "time", "cgroup"]
            .into_iter()
            .zip(1..)
            .map(|(kind, inode)| (kind.to_owned(), inode))
            .collect()
    }

    fn process(pid: u32, parent: u32) -> ProcessFacts {
        ProcessFacts {
            pid,
            parent,
            comm: "nginx".into(),
            state: 'S',
            exe: Some(Exe { path: "/usr/sbin/nginx".into(), deleted: false }),
            namespaces: namespaces(),
            ..ProcessFacts::default()
        }
    }

    fn well() -> Facts {
        Facts {
            unit: "nginx.service".into(),
            active_state: "active".into(),
            main_pid: 10,
            kernel: (6, 18),
            criu: CriuFacts::Found(Abilities {
                version: Version { major: 4, minor: 2, sublevel: 1 },
                mem_track: true,
                lazy_pages: true,
                pidfd_store: true,
            }),
            capabilities: u64::MAX,
            namespaces: namespaces(),
            processes: vec![process(10, 1), process(11, 10), process(12, 11)],
            ..Facts::default()
        }
    }

    /// What is found when one thing is different.
    fn found(change: impl FnOnce(&mut Facts)) -> Vec<(Severity, String)> {
        let mut facts = well();
        change(&mut facts);
        let report = judge(&facts);
        for finding in &report.findings {
            assert!(finding.severity < Severity::Warning || !finding.mend.is_empty(), "no mend: {finding:?}");
        }
        report.findings.into_iter().map(|f| (f.severity, format!("{}: {}", f.thing, f.cause))).collect()
    }

    fn one(severity: Severity, words: &str, change: impl FnOnce(&mut Facts)) {
        let all = found(change);
        assert_eq!(all.len(), 1, "{words}: {all:#?}");
        assert!(all[0].0 == severity && all[0].1.contains(words), "{words}: {all:?}");
    }

    fn open(file: OpenFile) -> impl FnOnce(&mut Facts) {
        move |facts| facts.processes[1].files.push((7, file))
    }

    #[test]
    fn a_usual_service_has_nothing_against_it() {
        assert_eq!(found(|_| {}), []);
        let usual = |facts: &mut Facts| {
            let char = |major, minor| OpenFile::Char { major, minor, path: "/dev/x".into() };
            let files = [
                char(1, 3),
                char(1, 9),
                OpenFile::Anon("[eventpoll]".into()),
                OpenFile::Anon("inotify".into()),
                OpenFile::Regular { path: "/var/log/nginx/access.log".into() },
                OpenFile::Deleted { path: "/tmp/x".into(), size: 100 },
                OpenFile::Socket { protocol: "tcp".into() },
                OpenFile::Unix { inode: 5, peer: Peer::Journal },
                OpenFile::Unix { inode: 6, peer: Peer::None },
                OpenFile::Unix { inode: 7, peer: Peer::Unit },
                // syslog: connected again by name
                OpenFile::Unix { inode: 8, peer: Peer::Foreign { name: "/dev/log".into(), stream: false } },
                OpenFile::Pipe { inode: 1, shared: false },
            ];
            facts.processes[1].files.extend((3..).zip(files));
        };
        assert_eq!(found(usual), []);
    }

    #[test]
    fn what_criu_cannot_dump_is_named_with_process_and_descriptor() {
        use Severity::Blocker;
        one(
            Blocker,
            "pid 11), descriptor 7: CRIU cannot dump io_uring",
            open(OpenFile::Anon("[io_uring]".into())),
        );
        one(Blocker, "perf_event", open(OpenFile::Anon("[perf_event]".into())));
        one(Blocker, "bpf-prog", open(OpenFile::Anon("bpf-prog".into())));
        let fuse = OpenFile::Char { major: 10, minor: 229, path: "/dev/fuse".into() };
        one(Blocker, "the device /dev/fuse (10:229) is open", open(fuse));
        let disk = OpenFile::Block { major: 8, minor: 0, path: "/dev/sda".into() };
        one(Blocker, "/dev/sda", open(disk));
        let terminal = OpenFile::Char { major: 136, minor: 1, path: "/dev/pts/1".into() };
        one(Blocker, "the terminal /dev/pts/1", open(terminal));
        let database = Peer::Foreign { name: "/run/mysqld/mysqld.sock".into(), stream: true };
        one(Blocker, "/run/mysqld/mysqld.sock", open(OpenFile::Unix { inode: 9, peer: database }));
        let log = OpenFile::Deleted { path: "/var/log/x".into(), size: 1 << 30 };
        one(Blocker, "1024 MiB", open(log));
        let unseen = |path: &str| OpenFile::Unseen { key: "file[51:4]".into(), path: path.into() };
        one(Blocker, "/var/log/x was opened on a mount", open(unseen("/var/log/x")));
        assert_eq!(found(open(unseen("/dev/null"))), []);
        one(Blocker, "sctp", open(OpenFile::Socket { protocol: "sctp".into() }));
        one(Blocker, "pipe", open(OpenFile::Pipe { inode: 1, shared: true }));
        one(Blocker, "io_uring", |f| f.processes[0].mappings.push("anon_inode:[io_uring]".into()));
        one(Blocker, "/dev/dri/card0", |f| f.processes[0].mappings.push("/dev/dri/card0".into()));
        one(Severity::Note, "huge pages", |f| {
            f.processes[0].mappings.push("/anon_hugepage (deleted)".into());
        });
    }

    #[test]
    fn processes_that_cannot_be_dumped_are_named() {
        use Severity::{Blocker, Warning};
        one(Blocker, "process 99 traces it", |f| f.processes[1].tracer = 99);
        one(Blocker, "strict mode", |f| f.processes[1].seccomp = 1);
        one(Warning, "waits in the kernel", |f| f.processes[1].state = 'D');
        one(Blocker, "pid 12): it is no descendant", |f| f.processes[2].parent = 1);
        one(Warning, "replaced or removed", |f| {
            f.processes[1].exe = Some(Exe { path: "/x".into(), deleted: true });
        });
        // A filter of system calls is restored with the process.
        assert_eq!(found(|f| f.processes[1].seccomp = 2), []);
        // Two that claim to be each other's parents.
        one(Blocker, "no descendant", |f| {
            f.processes[1].parent = 12;
            f.processes[2].parent = 11;
            f.processes[2].comm = "nginx".into();
            f.processes.remove(2);
            f.processes[1].parent = 11;
        });
    }

    #[test]
    fn namespaces_of_its_own_are_named() {
        use Severity::Blocker;
        let own = |kind: &'static str| {
            move |f: &mut Facts| {
                f.processes.truncate(1);
                f.processes[0].namespaces.insert(kind.into(), 99);
            }
        };
        one(Blocker, "user namespace", own("user"));
        one(Blocker, "PID namespace", own("pid"));
        // systemd makes these anew; CRIU gives the last to all that it restores, so that their clock goes on.
        for kind in ["mnt", "net", "ipc", "uts", "time"] {
            assert_eq!(found(own(kind)), [], "{kind}");
        }
        one(Blocker, "2 different mount namespaces", |f| {
            f.processes[2].namespaces.insert("mnt".into(), 99);
        });
    }

    #[test]
    fn criu_missing_broken_old_and_crippled_are_told_apart() {
        use Severity::{Blocker, Note, Warning};
        one(Blocker, "not installed", |f| f.criu = CriuFacts::Missing);
        one(Blocker, "vdso", |f| f.criu = CriuFacts::Broken { cause: "vdso: odd".into() });
        let version = |version| {
            move |f: &mut Facts| {
                let CriuFacts::Found(abilities) = &mut f.criu else { unreachable!() };
                abilities.version = version;
            }
        };
        one(Blocker, "too old", version(Version::new(3, 17)));
        one(Blocker, "cannot dump internet sockets on kernel 6.18", version(Version::new(4, 1)));
        assert_eq!(
            found(|f| {
                f.kernel = (6, 12);
                version(Version::new(4, 1))(f);
            }),
            []
        );
        one(Note, "one round", |f| {
            let CriuFacts::Found(abilities) = &mut f.criu else { unreachable!() };
            abilities.mem_track = false;
        });
        one(Blocker, "CAP_SYS_PTRACE", |f| f.capabilities &= !(1 << 19));
        one(Warning, "CAP_SYS_RESOURCE", |f| f.capabilities &= !(1 << SYS_RESOURCE));
    }

    #[test]
    fn a_unit_that_does_not_run_has_one_finding() {
        one(Severity::Blocker, "it is inactive", |f| {
            f.main_pid = 0;
            f.active_state = "inactive".into();
            f.processes.clear();
        });
        one(Severity::Blocker, "reloading just now", |f| f.active_state = "reloading".into());
        one(Severity::Blocker, "root directory", |f| f.root_directory = Some("/srv/x".into()));
        one(Severity::Blocker, "a.socket's", |f| f.socket_unit = Some("a.socket".into()));
        one(Severity::Blocker, "ProcSubset", |f| f.no_proc_sys = true);
    }

    #[test]
    fn blockers_come_first_and_the_same_is_said_once() {
        let mut facts = well();
        facts.dynamic_user = true;
        facts.processes[2].tracer = 5;
        facts.processes[2].files = vec![(3, OpenFile::Anon("[io_uring]".into())); 2];
        let report = judge(&facts);
        assert!(!report.ready());
        let severities: Vec<_> = report.findings.iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Blocker, Severity::Blocker, Severity::Warning]);
        assert!(report.blockers().contains("io_uring") && !report.blockers().contains("DynamicUser"));
    }
}
