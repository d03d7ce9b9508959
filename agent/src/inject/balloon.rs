//! The helper process of the OOM fault: it fills the memory cgroup that it is in until the kernel kills
//! the chosen victim (or itself), then ends.
//!
//! It is ftd's own executable, called as `ftd balloon`; it waits for a word on its standard input before
//! it allocates anything, so that it can be moved into the right cgroup first, and the kernel ends it
//! together with the ftd that started it. It writes into a file in memory that it does not map: that is charged to
//! its cgroup and does not count as its own resident memory, so the killer's choice falls on the victim.

use std::{
    fs::File,
    io::{self, BufRead as _, Write as _},
    process::Stdio,
};

use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        prctl::set_pdeathsig,
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, ChildStdin, Command},
};

/// The most it ever fills: a limit that is not reached by then is not where it was thought to be.
const MOST: usize = 4 << 30;
const STEP: usize = 1 << 20;

/// A running helper.
#[derive(Debug)]
pub struct Balloon {
    /// Its process id.
    pub pid: u32,
    child: Child,
    stdin: ChildStdin,
}

impl Balloon {
    /// Starts the helper; it waits.
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("balloon").stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let gone = || io::Error::other("it ended at once");
        let (pid, stdin) = (child.id().ok_or_else(gone)?, child.stdin.take().ok_or_else(gone)?);
        Ok(Self { pid, child, stdin })
    }

    /// Lets it fill memory until `victim` is gone.
    pub async fn inflate(&mut self, victim: u32) -> io::Result<()> {
        self.stdin.write_all(format!("{victim}\n").as_bytes()).await
    }

    /// Returns when it has ended.
    pub async fn ended(&mut self) {
        // An error means that it has been waited for already.
        let _ = self.child.wait().await;
    }
}

/// The helper's own main function.
pub fn main() -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    let mut word = String::new();
    io::stdin().lock().read_line(&mut word)?;
    let Ok(victim) = word.trim().parse::<i32>() else { return Ok(()) };
    let mut file = File::from(memfd_create(c"ftd-fault", MFdFlags::MFD_CLOEXEC)?);
    let (piece, mut filled) = (vec![1_u8; STEP], 0);
    while filled < MOST && kill(Pid::from_raw(victim), None).is_ok() {
        file.write_all(&piece)?;
        filled += STEP;
    }
    Ok(())
}
