//! A worker of CRIU, and the socket to it. There are two ways to one.
//!
//! **A child** `criu swrk FD`, where this process has the powers that CRIU needs. Between fork and exec the
//! child does two things that `std` has no words for, with system calls that are safe there (no allocation, no
//! lock): it takes the close-on-exec mark off the descriptors that are for it, and it enters another process's
//! namespaces. To do either in ftd itself would let them leak into whatever else ftd starts at that moment.
//! A child that is dropped is ended and waited for: no zombie, and none that goes on unwatched.
//!
//! **By the door** ([`DOOR`]), where it has not. ftd.service is locked in: few capabilities, a filter of system
//! calls; CRIU needs all of root. So ftd-criu.socket listens, and for each connection systemd starts
//! [`become_criu`] outside of ftd's sandbox, with the connection as descriptor 3. That worker reads, without taking
//! it, which process the first request is about, enters its namespaces, and becomes `criu swrk 3`. It is not
//! in ftd's control group either: an ftd that is killed in the middle of a dump takes no CRIU with it, and CRIU,
//! whose socket has closed, thaws the processes in good order.
#![allow(unsafe_code, reason = "pre_exec, with async-signal-safe system calls only")]

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, connect, recv, send, shutdown,
            socket, socketpair,
        },
    },
};
use prost::Message as _;

use super::{
    Criu, CriuError,
    messages::{Req, ReqType, Resp},
};

/// Where ftd-criu.socket listens.
pub const DOOR: &str = "/run/ftd-criu.sock";
/// The descriptor of a connection that systemd passes on, see sd_listen_fds(3).
const PASSED: RawFd = 3;
/// The longest message that CRIU sends: its error texts have at most 1 KiB.
const LONGEST: usize = 64 << 10;
/// How much of what it prints is kept for errors.
const WORDS: usize = 16 << 10;
/// CRIU calls `nft` and `ip` by name.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug)]
pub(super) struct Worker {
    /// None behind the door.
    child: Option<Child>,
    socket: OwnedFd,
    words: Option<File>,
    inherited: Vec<RawFd>,
}

impl Worker {
    /// Starts one, in the namespaces of process `beside`.
    pub(super) fn start(program: &Path, beside: Option<u32>) -> Result<Self, CriuError> {
        if by_door() { Self::knock() } else { Self::start_with(program, beside, &[]) }
    }

    fn knock() -> Result<Self, CriuError> {
        let failed = |errno: Errno| {
            let what = format!("{DOOR} (systemctl start ftd-criu.socket)");
            CriuError::Place { what, cause: errno.into() }
        };
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None);
        let socket = socket.map_err(failed)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(DOOR).map_err(failed)?).map_err(failed)?;
        Ok(Self { child: None, socket, words: None, inherited: Vec::new() })
    }

    /// A child, with files for the processes that it makes.
    pub(super) fn start_with(
        program: &Path,
        beside: Option<u32>,
        files: &[&File],
    ) -> Result<Self, CriuError> {
        let failed = |cause: io::Error| CriuError::Start { program: program.to_owned(), cause };
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let (socket, theirs) = pair.map_err(|errno| failed(errno.into()))?;
        // Without it the worker is as good, only mute before it has a log.
        let words = memfd_create(c"criu", MFdFlags::MFD_CLOEXEC).ok().map(File::from);
        let stderr = words.as_ref().and_then(|words| words.try_clone().ok());
        let views = beside.map(namespaces).transpose()?.unwrap_or_default();

        let inherited: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        let (theirs_fd, for_child) = (theirs.as_raw_fd(), inherited.clone());
        let mut command = Command::new(program);
        command
            // A file in /etc/criu could ask for another thing than ftd does.
            .args(["--no-default-config", "swrk"])
            .arg(theirs_fd.to_string())
            .env_clear()
            .env("PATH", PATH)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr.map_or_else(Stdio::null, Stdio::from));
        // SAFETY: between fork and exec it makes fcntl and setns calls on descriptors that are open until
        // `spawn` has returned, and builds errors from errno: nothing that allocates or takes a lock.
        unsafe {
            command.pre_exec(move || {
                for fd in std::iter::once(theirs_fd).chain(for_child.iter().copied()) {
                    if libc::fcntl(fd, libc::F_SETFD, 0) == -1 {
                        return Err(io::Error::last_os_error());
                    }
                }
                for (view, kind) in &views {
                    if libc::setns(view.as_raw_fd(), kind.bits()) == -1 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().map_err(failed)?;
        Ok(Self { child: Some(child), socket, words, inherited })
    }

    /// The numbers that the files have in the worker, in order.
    pub(super) fn inherited(&self) -> impl Iterator<Item = RawFd> {
        self.inherited.iter().copied()
    }

    /// Sends one message.
    pub(super) fn send(&self, message: &Req) -> io::Result<()> {
        let bytes = message.encode_to_vec();
        let sent = send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Waits for one message until `end`.
    pub(super) fn receive(&self, end: Instant) -> io::Result<Resp> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // Rounded up, so as not to spin through the last millisecond.
            let left = left.as_micros().div_ceil(1000);
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], left) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let mut bytes = vec![0; LONGEST];
        let length = recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_TRUNC)?;
        match bytes.get(..length) {
            Some([]) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer")),
            Some(message) => Ok(Resp::decode(message)?),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "its message is too long")),
        }
    }

    /// Says nothing more; what it says can still be read.
    pub(super) fn hang_up(&self) {
        // Fails only where the other side is gone.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }

    /// What it has printed, before it had a log.
    pub(super) fn last_words(&self) -> String {
        let mut bytes = vec![0; WORDS];
        let length = self.words.as_ref().and_then(|words| words.read_at(&mut bytes, 0).ok()).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Behind the door systemd watches over it, and the closed socket tells it all that it must know.
        let Some(child) = &mut self.child else { return };
        // Once it has answered it ends by itself, and there is nothing that it could still do wrong.
        let _ = child.kill();
        if let Err(error) = child.wait() {
            tracing::warn!(%error, "a worker of CRIU cannot be waited for");
        }
    }
}

/// Whether CRIU is to be had by the door: this process lacks powers that CRIU needs, and the door is there.
pub fn by_door() -> bool {
    !super::check::has_needed(super::facts::own_capabilities()) && Path::new(DOOR).exists()
}

/// Becomes CRIU for the client on descriptor 3. Comes back only if that fails; whoever is at the other end of
/// the socket sees it close.
pub fn become_criu() -> Result<std::convert::Infallible, CriuError> {
    let place = |what: &str, cause: io::Error| CriuError::Place { what: what.into(), cause };
    let mut bytes = vec![0; LONGEST];
    let first = recv(PASSED, &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC);
    let first = first.map_err(|errno| place("descriptor 3", errno.into()))?;
    let request = bytes.get(..first).map(Req::decode).transpose();
    let request = request.map_err(|error| place("the request", error.into()))?.unwrap_or_default();
    let pid = request.opts.as_ref().and_then(|opts| opts.pid);
    if let (ReqType::Dump | ReqType::SinglePreDump, Some(pid)) = (request.r#type(), pid) {
        for (view, kind) in namespaces(pid.cast_unsigned())? {
            // Allowed, because this process has one thread.
            setns(view, kind).map_err(|errno| place("the process's view of the system", errno.into()))?;
        }
    }
    let criu = Criu::find()?;
    let mut command = Command::new(criu.program());
    command.args(["--no-default-config", "swrk"]).arg(PASSED.to_string());
    command.env_clear().env("PATH", PATH).current_dir("/");
    Err(CriuError::Start { program: criu.program().to_owned(), cause: command.exec() })
}

/// The namespaces in which a process is to be dumped: those that systemd makes anew for its unit, as far as
/// they are not ours.
fn namespaces(pid: u32) -> Result<Vec<(File, CloneFlags)>, CriuError> {
    let mut all = Vec::new();
    for (kind, flag) in [
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        // The last, for with it the paths change.
        ("mnt", CloneFlags::CLONE_NEWNS),
    ] {
        let path = format!("/proc/{pid}/ns/{kind}");
        let failed =
            |cause| CriuError::Place { what: format!("the {kind} namespace of process {pid}"), cause };
        let theirs = fs::read_link(&path).map_err(failed)?;
        if fs::read_link(format!("/proc/self/ns/{kind}")).is_ok_and(|ours| ours == theirs) {
            continue;
        }
        all.push((File::open(path).map_err(failed)?, flag));
    }
    Ok(all)
}
