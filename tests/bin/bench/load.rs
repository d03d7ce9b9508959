//! A small program that makes processes, and asks systemd to start things, when told to.
//!
//! It runs outside of every host to be the innocent bystander whose work ftd might slow down, and on the
//! host as a service under ftd's care whose processes ftd must see. It reads a line for each task and
//! answers with a line of JSON, on its standard streams or on a socket:
//!
//! - `spawns N` runs `/bin/true` N times, one after another, as a shell would.
//! - `exits N THREADS` makes N processes that end at once. They share this program's memory and run no
//!   other program: nothing makes processes end faster.
//! - `systemctl UNIT` runs `systemctl start UNIT`.
//! - `start UNIT` asks PID 1 itself, by one message on a connection that is open already.
#![allow(unsafe_code, reason = "vfork, the fastest way to make a process, shares memory between the two")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::libc::SIGCHLD;
use nix::sched::{CloneFlags, CpuSet, clone, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::clock;

/// The socket on which PID 1 itself takes root's D-Bus calls.
const PRIVATE_SOCKET: &str = "/run/systemd/private";

/// How a task went.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Done {
    /// When it was begun.
    pub(crate) began: u64,
    /// How long it took, nanoseconds.
    pub(crate) took: u64,
    /// Processor time of it and all that it made, nanoseconds.
    pub(crate) cpu: u64,
}

type Outcome = std::result::Result<Done, String>;

// === The program ===

/// Takes tasks until nobody gives any more.
pub(crate) fn serve(socket: Option<&Path>, cpu: Option<usize>) -> Result<()> {
    if let Some(cpu) = cpu {
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(Pid::this(), &only).with_context(|| format!("CPU {cpu} cannot be had alone"))?;
    }
    let Some(path) = socket else {
        return take_tasks(std::io::stdin(), std::io::stdout());
    };
    // An older run may have left it.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("{}", path.display()))?;
    for stream in listener.incoming() {
        let stream = stream?;
        if let Err(error) = take_tasks(stream.try_clone()?, stream) {
            eprintln!("bench load: {error:#}");
        }
    }
    Ok(())
}

fn take_tasks(input: impl Read, mut output: impl Write) -> Result<()> {
    for line in BufReader::new(input).lines() {
        let outcome: Outcome = run(&line?).map_err(|error| format!("{error:#}"));
        writeln!(output, "{}", serde_json::to_string(&outcome)?)?;
        output.flush()?;
    }
    Ok(())
}

fn run(line: &str) -> Result<Done> {
    match line.split(' ').collect::<Vec<_>>()[..] {
        ["spawns", count] => {
            let count: u32 = count.parse()?;
            timed(|| (0..count).try_for_each(|_| succeed(&mut Command::new("/bin/true"))))
        }
        ["exits", count, threads] => {
            let (count, threads): (u32, u32) = (count.parse()?, threads.parse()?);
            ensure!(threads > 0 && count.is_multiple_of(threads), "{count} is no multiple of {threads}");
            timed(|| exits(count, threads))
        }
        ["systemctl", unit] => timed(|| succeed(Command::new("systemctl").args(["start", unit]))),
        ["start", unit] => {
            let mut systemd = Systemd::connect()?;
            timed(|| systemd.start(unit))
        }
        _ => bail!("'{line}' is no task"),
    }
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Done> {
    let (cpu, began) = (cpu_time()?, clock::now());
    work()?;
    Ok(Done { began, took: clock::now() - began, cpu: cpu_time()? - cpu })
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn cpu_time() -> Result<u64> {
    let mut microseconds = 0;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        microseconds += usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    }
    Ok(u64::try_from(microseconds)? * 1000)
}

fn exits(count: u32, threads: u32) -> Result<()> {
    thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|_| scope.spawn(move || exit_often(count / threads))).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => Err(anyhow!("a thread ended by a panic")),
        })
    })
}

fn exit_often(count: u32) -> Result<()> {
    let mut stack = vec![0; 64 * 1024];
    for _ in 0..count {
        let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
        // SAFETY: the child shares this memory, on a stack of its own, and does nothing but end; until it
        // has, the kernel keeps this thread from running (CLONE_VFORK).
        let child = unsafe { clone(Box::new(|| 0), &mut stack, flags, Some(SIGCHLD)) }
            .context("a process cannot be made")?;
        waitpid(child, Some(WaitPidFlag::empty()))?;
    }
    Ok(())
}

/// A connection to PID 1, for one message: the D-Bus specification in as few lines as it takes.
struct Systemd(UnixStream);

impl Systemd {
    fn connect() -> Result<Self> {
        let mut stream = UnixStream::connect(PRIVATE_SOCKET).context(PRIVATE_SOCKET)?;
        // "Authentication Protocol": user id 0, written "0", in hexadecimal.
        // With BEGIN in the same write: PID 1 may read a call together with a BEGIN that comes later, and
        // then leaves it lying until something else comes.
        stream.write_all(b"\0AUTH EXTERNAL 30\r\nBEGIN\r\n")?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            answer.extend(byte);
        }
        ensure!(answer.starts_with(b"OK "), "PID 1 says {:?}", String::from_utf8_lossy(&answer));
        Ok(Self(stream))
    }

    /// Asks for a start and waits for the answer, which comes when the job is queued. Signals, which may come
    /// before it, are passed over: to leave with the call unread would take it back.
    fn start(&mut self, unit: &str) -> Result<()> {
        self.0.write_all(&start_message(unit))?;
        loop {
            let mut fixed = [0; 16];
            self.0.read_exact(&mut fixed)?;
            let number = |at: usize| {
                let bytes = [fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]];
                u64::from(u32::from_le_bytes(bytes))
            };
            let rest = number(12).next_multiple_of(8) + number(4);
            std::io::copy(&mut (&mut self.0).take(rest), &mut std::io::sink())?;
            // "Message Types": 2 is the answer to a call, 3 an error, 4 a signal.
            match fixed[1] {
                2 => return Ok(()),
                4 => {}
                other => bail!("PID 1 answers StartUnit with a message of type {other}"),
            }
        }
    }
}

/// `StartUnit(unit, "replace")`, see "Message Format" and "Marshaling" of the D-Bus specification.
fn start_message(unit: &str) -> Vec<u8> {
    fn align(bytes: &mut Vec<u8>, to: usize) {
        bytes.resize(bytes.len().next_multiple_of(to), 0);
    }
    fn string(bytes: &mut Vec<u8>, text: &str) {
        align(bytes, 4);
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.push(0);
    }
    let mut body = Vec::new();
    string(&mut body, unit);
    string(&mut body, "replace");
    let mut fields = Vec::new();
    for (code, kind, value) in [
        (1, b'o', "/org/freedesktop/systemd1"),
        (2, b's', "org.freedesktop.systemd1.Manager"),
        (3, b's', "StartUnit"),
        (6, b's', "org.freedesktop.systemd1"),
    ] {
        align(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        string(&mut fields, value);
    }
    align(&mut fields, 8);
    fields.extend([8, 1, b'g', 0, 2, b's', b's', 0]);
    let mut message = vec![b'l', 1, 0, 1];
    for number in [body.len() as u32, 1, fields.len() as u32] {
        message.extend(number.to_le_bytes());
    }
    message.extend(fields);
    align(&mut message, 8);
    message.extend(body);
    message
}

// === Its user ===

/// The running program.
pub(crate) struct Load {
    answers: BufReader<Box<dyn Read + Send>>,
    tasks: Box<dyn Write + Send>,
    child: Option<Child>,
}

impl Load {
    /// Runs it on this machine, outside of every host, on one CPU.
    pub(crate) fn here(cpu: usize) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["load", "--cpu", &cpu.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (tasks, answers): (ChildStdin, ChildStdout) =
            child.stdin.take().zip(child.stdout.take()).context("it has no streams")?;
        Ok(Self { answers: BufReader::new(Box::new(answers)), tasks: Box::new(tasks), child: Some(child) })
    }

    /// Talks to the one that listens on a socket.
    pub(crate) fn at(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| format!("{}", socket.display()))?;
        let answers: Box<dyn Read + Send> = Box::new(stream.try_clone()?);
        Ok(Self { answers: BufReader::new(answers), tasks: Box::new(stream), child: None })
    }

    /// Gives it a task and goes on.
    pub(crate) fn begin(&mut self, task: &str) -> Result<()> {
        writeln!(self.tasks, "{task}").with_context(|| format!("the task '{task}' cannot be given"))
    }

    /// Waits for the end of the task that was given.
    pub(crate) fn end(&mut self) -> Result<Done> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let outcome: Outcome = serde_json::from_str(&line).context("the load program ended")?;
        outcome.map_err(|error| anyhow!("the load program: {error}"))
    }

    /// Has a task done.
    pub(crate) fn run(&mut self, task: &str) -> Result<Done> {
        self.begin(task)?;
        self.end()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Ours, and not waited for yet: its id is its own.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_made_and_their_time_is_told() {
        for task in ["spawns 3", "exits 4 2"] {
            let done = run(task).unwrap();
            assert!(done.took > 0, "{task}");
        }
        assert!(run("exits 3 2").is_err() && run("dance").is_err());
    }

    #[test]
    fn the_message_has_the_form_that_the_specification_asks_for() {
        let message = start_message("a.service");
        let number = |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().unwrap()) as usize;
        let (body, fields) = (number(4), number(12));
        assert_eq!(message.len(), (16 + fields).next_multiple_of(8) + body);
        assert_eq!(&message[message.len() - body..][..14], b"\x09\0\0\0a.service\0");
        assert!(message.ends_with(b"\x07\0\0\0replace\0"));
    }
}
