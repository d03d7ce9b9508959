//! Asking a service whether it serves.

use std::{io, process::Stdio, sync::Arc, time::Duration};

use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::TcpStream,
    process::{Child, Command},
    time::timeout,
};

use super::{
    machine::Input,
    supervisor::{Supervisor, boot_now},
};
use crate::{
    config::{Check, HealthConfig},
    event::{Kind, bus::Bus},
    probe::Slot,
};

/// As much of what a command says is read; the rest is thrown away.
const SAID: u64 = 64 << 10;
/// As many characters of it go into events.
const TOLD: usize = 200;
/// How long what a command has said may take to arrive after its end: it is in the pipe, unless a child
/// that it left behind holds that open.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Why the answer is not yes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum No {
    /// The service does not serve.
    Service(String),
    /// ftd could not ask, for lack of something of its own: that says nothing of the service.
    NotAsked(String),
}

impl No {
    /// The verdict when asking failed with `error`; `what` goes before it.
    fn of(what: &str, error: &io::Error) -> Self {
        let text = format!("{what}{error}");
        let own = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EAGAIN];
        let code = error.raw_os_error().map(Errno::from_raw);
        if code.is_some_and(|code| own.contains(&code)) { Self::NotAsked(text) } else { Self::Service(text) }
    }
}

impl From<String> for No {
    fn from(text: String) -> Self {
        Self::Service(text)
    }
}

/// Asks for ever, while the unit is up, and feeds the verdicts to the supervisor.
pub async fn watch(supervisor: Arc<Supervisor>, bus: Arc<Bus>, slot: Slot, health: HealthConfig) {
    let mut turns = tokio::time::interval(health.every);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut bout = Bout::default();
    loop {
        turns.tick().await;
        if supervisor.is_up(slot) {
            let at = boot_now();
            let verdict = match ask(&health.check, health.deadline).await {
                Ok(()) => Ok(()),
                Err(No::Service(error)) => Err(error),
                Err(No::NotAsked(error)) => {
                    tracing::warn!(check = %health.check, error, "ftd cannot ask");
                    if let Some(kind) = bout.not_asked(&health.check, error) {
                        let unit = supervisor.status().into_iter().nth(slot.0 as usize).map(|unit| unit.unit);
                        bus.emit(unit.as_deref(), None, kind);
                    }
                    continue;
                }
            };
            bout = Bout::default();
            supervisor.feed(slot, at, Input::Health(verdict));
        }
    }
}

/// Questions in a row that could not be asked: one event for all of them.
#[derive(Debug, Default)]
struct Bout(bool);

impl Bout {
    fn not_asked(&mut self, check: &Check, error: String) -> Option<Kind> {
        let mend = "ftd or the host lacks descriptors, memory or processes: see LimitNOFILE= and TasksMax= \
                    of ftd.service, and who uses them up; nothing is restarted for it";
        let told = std::mem::replace(&mut self.0, true);
        (!told).then(|| Kind::HealthNotAsked { check: check.to_string(), error, mend: mend.into() })
    }
}

/// One question: `Err` says why the answer is not yes.
pub async fn ask(check: &Check, deadline: Duration) -> Result<(), No> {
    let answer = async {
        match check {
            Check::Http { authority, path } => http(authority, path).await,
            Check::Tcp(authority) => connect(authority).await.map(drop),
            Check::Exec(words) => exec(words).await,
        }
    };
    match timeout(deadline, answer).await {
        Ok(verdict) => verdict,
        Err(_) => Err(No::Service(format!("no answer within {}", humantime::format_duration(deadline)))),
    }
}

async fn connect(authority: &str) -> Result<TcpStream, No> {
    TcpStream::connect(authority).await.map_err(|error| No::of("", &error))
}

async fn http(authority: &str, path: &str) -> Result<(), No> {
    let io = TokioIo::new(connect(authority).await?);
    let (mut sender, connection) = http1::handshake(io).await.map_err(|error| error.to_string())?;
    let request = Request::get(path).header(HOST, authority).header("user-agent", "ftd");
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
    let answer = sender.send_request(request);
    tokio::pin!(answer, connection);
    // The connection does the work; it is dropped, and so closed, with the answer's head.
    let response = tokio::select! {
        response = &mut answer => response,
        ended = &mut connection => match ended {
            Ok(()) => answer.await,
            Err(error) => Err(error),
        },
    };
    let status = response.map_err(|error| error.to_string())?.status();
    if status.is_success() || status.is_redirection() {
        Ok(())
    } else {
        Err(No::Service(format!("HTTP {status}")))
    }
}

async fn exec(words: &[String]) -> Result<(), No> {
    let Some((program, arguments)) = words.split_first() else { return Err("no command".to_owned().into()) };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.process_group(0).kill_on_drop(true).spawn();
    let mut child = Group(child.map_err(|error| No::of(&format!("{program}: "), &error))?);
    let stderr = child.0.stderr.take();
    let mut said = Vec::new();
    let ended = {
        let reading = read_some(stderr, &mut said);
        tokio::pin!(reading);
        let mut read = false;
        let ended = loop {
            tokio::select! {
                ended = child.0.wait() => break ended,
                () = &mut reading, if !read => read = true,
            }
        };
        if !read {
            let _ = timeout(LAST_WORDS, reading).await;
        }
        ended
    };
    let status = ended.map_err(|error| No::of(&format!("{program}: "), &error))?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let colon = if last.is_empty() { "" } else { ": " };
    Err(No::Service(format!("{status}{colon}{}", shortened(last))))
}

/// Reads as much as is of use, and lets the writer go on to his end.
async fn read_some(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    // An error ends what can be read, as the end does.
    let _ = (&mut from).take(SAID).read_to_end(into).await;
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(TOLD) {
        Some((end, _)) => format!("{}\u{2026}", &text[..end]),
        None => text.to_owned(),
    }
}

/// A command and what it has started, ended together when nobody waits any more. Only as long as the
/// command has not been waited for: then its number is still its own.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0.id()
            && let Err(error) = killpg(Pid::from_raw(leader.cast_signed()), Signal::SIGKILL)
        {
            tracing::debug!(leader, %error, "the processes of a health check");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A server that answers each connection with `reply`, or never when it is empty.
    async fn server(reply: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    if reply.is_empty() {
                        std::future::pending::<()>().await;
                    }
                    let _ = stream.write_all(reply.as_bytes()).await;
                });
            }
        });
        address
    }

    fn why(no: No) -> String {
        match no {
            No::Service(text) => text,
            No::NotAsked(text) => panic!("not asked: {text}"),
        }
    }

    async fn get(reply: &'static str) -> Result<(), No> {
        let check = Check::Http { authority: server(reply).await, path: "/".into() };
        ask(&check, LIMIT).await
    }

    #[tokio::test]
    async fn http_success_and_redirection_are_good_the_rest_is_not() {
        assert_eq!(get("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await, Ok(()));
        assert_eq!(get("HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n").await, Ok(()));
        let error = get("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
            .await
            .map_err(why)
            .unwrap_err();
        assert_eq!(error, "HTTP 503 Service Unavailable");
        assert!(get("nonsense\r\n\r\n").await.is_err());
    }

    #[tokio::test]
    async fn silence_is_a_failure_at_the_deadline() {
        let check = Check::Http { authority: server("").await, path: "/".into() };
        let error = ask(&check, Duration::from_millis(50)).await.map_err(why).unwrap_err();
        assert_eq!(error, "no answer within 50ms");
    }

    #[tokio::test]
    async fn tcp_needs_somebody_who_listens() {
        assert_eq!(ask(&Check::Tcp(server("").await), LIMIT).await, Ok(()));
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        assert!(ask(&Check::Tcp(closed), LIMIT).await.map_err(why).unwrap_err().contains("refused"));
    }

    #[tokio::test]
    async fn a_command_says_yes_no_or_why() {
        let run = |text: &str| {
            let check = Check::Exec(text.split('|').map(str::to_owned).collect());
            async move { ask(&check, LIMIT).await.map_err(why) }
        };
        assert_eq!(run("/bin/true").await, Ok(()));
        let error = run("/bin/sh|-c|echo broken pipe >&2; exit 3").await.unwrap_err();
        assert_eq!(error, "exit status: 3: broken pipe");
        assert!(run("/nonexistent").await.unwrap_err().starts_with("/nonexistent: "));
    }

    fn shell(text: &str) -> Check {
        Check::Exec(["/bin/sh", "-c", text].map(str::to_owned).to_vec())
    }

    #[tokio::test]
    async fn what_ftd_itself_lacks_is_no_verdict_on_the_service() {
        for code in [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::EAGAIN] {
            let no = No::of("", &io::Error::from_raw_os_error(code as i32));
            assert!(matches!(no, No::NotAsked(_)), "{code}");
        }
        let no = No::of("", &io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert!(matches!(no, No::Service(_)));
        let mut bout = Bout::default();
        let check = Check::Tcp("db:5432".into());
        assert!(bout.not_asked(&check, "too many open files".into()).is_some());
        assert!(bout.not_asked(&check, "too many open files".into()).is_none());
    }

    #[tokio::test]
    async fn a_command_that_says_too_much_is_cut_short_and_ends() {
        let loud = shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1");
        let error = ask(&loud, LIMIT).await.map_err(why).unwrap_err();
        assert_eq!(error, format!("exit status: 1: {}\u{2026}", "x".repeat(TOLD)));
    }

    #[tokio::test]
    async fn a_child_that_a_command_leaves_behind_does_not_delay_the_answer() {
        let begun = std::time::Instant::now();
        let error = ask(&shell("sleep 3 & echo no >&2; exit 1"), LIMIT).await.map_err(why).unwrap_err();
        assert_eq!(error, "exit status: 1: no");
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[tokio::test]
    async fn at_the_deadline_the_command_ends_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        // The shell's child, not the shell.
        let check = shell(&format!("sleep 300 & echo $! > {}; wait", file.display()));
        let error = ask(&check, Duration::from_millis(500)).await.map_err(why).unwrap_err();
        assert!(error.starts_with("no answer within"), "{error}");
        let pid = std::fs::read_to_string(file).unwrap();
        let end = std::time::Instant::now() + LIMIT;
        // Gone, or a zombie where nobody reaps orphans.
        while std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            assert!(std::time::Instant::now() < end, "{pid} lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
