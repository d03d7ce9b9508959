//! What CRIU's log says: the error that mattered, and what to do about those that are known.
//!
//! A line of the log is `(00.021345) 17:  Error (criu/files-reg.c:2267): Can't open file /x: No such file …`:
//! the time, the process that it is about where there is one, the place in CRIU's source, the words. The first
//! error is nearly always the cause, and those after it its consequences; but a few are printed by a CRIU
//! that works well, and these are passed over.

/// Errors after which CRIU goes on.
const HARMLESS: [&str; 4] = [
    // It would like to have more descriptors than it may.
    "RLIMIT_NOFILE",
    // Before it tries another way.
    "kerndat: Can't",
    "Can't load kerndat cache",
    "netlink: Failed to",
];

/// Known errors: some of their words, and the mend. The first that fits is taken.
const KNOWN: &[(&[&str], &str)] = &[
    (
        &["Can't fork for", "File exists"],
        "Another process has this PID: wait for its end, or end it; or start the service without its memory: \
         `ftctl restore UNIT --files-only`",
    ),
    (
        &["has bad size"],
        "The file has changed since the snapshot: put its old contents back, or choose a newer snapshot, or start \
         the service without its memory",
    ),
    (
        &["has bad mode"],
        "The file has another mode than at the time of the snapshot: give it the old one (chmod)",
    ),
    (
        &["bad build-ID"],
        "The program or library is of another build than at the time of the snapshot: install the same package \
         version, or start the service without its memory",
    ),
    (
        &["Can't open file"],
        "The file is missing here, or may not be opened: bring it back, or start the service without its memory",
    ),
    (
        &["io_uring"],
        "CRIU cannot dump io_uring: set the service to use another way of input and output (`aio off`, \
         `use_io_uring=0`, UV_USE_IO_URING=0), or use restart instead of migrate",
    ),
    (
        &["Can't get rlimit"],
        "CRIU lacks CAP_SYS_RESOURCE, which it needs for processes of other users: give this machine or container \
         that capability",
    ),
    (
        &["Operation not permitted", "ptrace"],
        "CRIU lacks CAP_SYS_PTRACE, or a security module forbids it: run it with full root capabilities",
    ),
    (
        &["CAP_SYS_ADMIN"],
        "CRIU lacks its capabilities: it needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, and CAP_SYS_PTRACE",
    ),
    (&["vdso"], "This CRIU is too old for this kernel: install a newer package criu, 4.2 or later"),
    (
        &["1:16 opt"],
        "Kernels from 6.16 on need CRIU 4.2 or newer to dump internet sockets: install a newer package criu",
    ),
    (
        &["External socket is used"],
        "A process talks to another service over a unix socket: have it close that connection before, or use \
         restart instead of migrate",
    ),
    (
        &["half of stream unix connection"],
        "A process talks to another service over a unix socket: have it close that connection before, or use \
         restart instead of migrate",
    ),
    (
        &["Can't dump ghost file"],
        "A deleted file that is still open is larger than what goes into images: make the service close it \
         (a reload after log rotation, often)",
    ),
    (&["of that type"], "A process holds something open that CRIU cannot dump: `ftctl check` names it"),
    (&["file locks are hold"], "A file lock is shared with a process that is not part of the service"),
    (
        &["session leader", "outside of its pid namespace"],
        "The process's session was begun by a process outside of the service: run it as a systemd service",
    ),
    (&["is traced"], "A debugger is attached: let it detach"),
    (&["No space left on device"], "Make room where the images go"),
    (&["soft-dirty"], "This kernel does not tell which pages are written: dump without rounds"),
];

/// The words of the first error that matters.
pub fn first_error(text: &str) -> Option<&str> {
    let mut errors = text.lines().filter_map(words).peekable();
    let first = errors.peek().copied();
    errors.find(|words| !HARMLESS.iter().any(|harmless| words.contains(harmless))).or(first)
}

/// The words of a line if it is an error.
fn words(line: &str) -> Option<&str> {
    let rest = &line[line.find("Error (")?..];
    let (_, words) = rest.split_once("): ")?;
    Some(words.trim()).filter(|words| !words.is_empty())
}

/// What to do about an error, where that is known.
pub fn mend(words: &str) -> Option<&'static str> {
    let fits = |parts: &&[&str]| parts.iter().all(|part| words.contains(part));
    KNOWN.iter().find(|(parts, _)| fits(parts)).map(|(_, mend)| *mend)
}

/// The PID that was taken, of an error that says so.
pub fn taken_pid(words: &str) -> Option<u32> {
    let (pid, why) = words.strip_prefix("Can't fork for ")?.split_once(':')?;
    why.contains("File exists").then(|| pid.trim().parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_that_matters_is_found_and_harmless_ones_are_passed_over() {
        let log = "(00.000000) Version: 4.2.1 (gitid 0)\n\
                   (00.000101) Error (criu/util.c:1453): Can't set RLIMIT_NOFILE for self 9: Operation not permitted\n\
                   (00.021345)    812: Error (criu/files-reg.c:2267): Can't open file /var/x: No such file or directory\n\
                   (00.021400) Error (criu/cr-restore.c:2300): Restoring FAILED.\n";
        assert_eq!(first_error(log), Some("Can't open file /var/x: No such file or directory"));
        // What is only harmless, as far as is known, is better than nothing.
        let log = log.lines().take(2).collect::<Vec<_>>().join("\n");
        assert!(first_error(&log).unwrap().contains("RLIMIT_NOFILE"));
        assert_eq!(first_error("(00.1) Dumping finished successfully\n"), None);
        assert_eq!(first_error(""), None);
    }

    #[test]
    fn known_errors_have_a_mend_of_their_own() {
        for (words, mend_part) in [
            ("Can't fork for 812: File exists", "Another process has this PID"),
            ("File /usr/sbin/nginx has bad size 5 (expect 4)", "changed since the snapshot"),
            ("File /lib/x.so has bad build-ID", "another build"),
            ("Can't open file /var/x on restore: No such file or directory", "missing here"),
            ("Can't dump file 7 of that type [0] (anon anon_inode:[io_uring])", "io_uring"),
            ("Can't get rlimit 0: Operation not permitted", "CAP_SYS_RESOURCE"),
            ("vdso: Not all dynamic entries are present", "too old for this kernel"),
            ("Can't get 1:16 opt: Operation not supported", "6.16"),
            ("Can't dump file 7 of that type [20666] (chr 10:232)", "`ftctl check`"),
            ("Can't write page: No space left on device", "Make room"),
        ] {
            assert!(mend(words).is_some_and(|mend| mend.contains(mend_part)), "{words}");
        }
        assert_eq!(mend("something new"), None);
    }

    #[test]
    fn the_taken_pid_is_read_from_the_error() {
        assert_eq!(taken_pid("Can't fork for 812: File exists"), Some(812));
        assert_eq!(taken_pid("Can't fork for 812: Resource temporarily unavailable"), None);
    }
}
