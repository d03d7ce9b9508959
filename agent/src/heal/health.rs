//! Asking a service whether it serves.

use std::{process::Stdio, sync::Arc, time::Duration};

use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, process::Command, time::timeout};

use super::{
    machine::Input,
    supervisor::{Supervisor, boot_now},
};
use crate::{
    config::{Check, HealthConfig},
    probe::Slot,
};

/// Asks for ever, while the unit is up, and feeds the verdicts to the supervisor.
pub async fn watch(supervisor: Arc<Supervisor>, slot: Slot, health: HealthConfig) {
    let mut turns = tokio::time::interval(health.every);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        if supervisor.is_up(slot) {
            let at = boot_now();
            let verdict = ask(&health.check, health.deadline).await;
            supervisor.feed(slot, at, Input::Health(verdict));
        }
    }
}

/// One question: `Err` says why the answer is no.
pub async fn ask(check: &Check, deadline: Duration) -> Result<(), String> {
    let answer = async {
        match check {
            Check::Http { authority, path } => http(authority, path).await,
            Check::Tcp(authority) => connect(authority).await.map(drop),
            Check::Exec(words) => exec(words).await,
        }
    };
    match timeout(deadline, answer).await {
        Ok(verdict) => verdict,
        Err(_) => Err(format!("no answer within {}", humantime::format_duration(deadline))),
    }
}

async fn connect(authority: &str) -> Result<TcpStream, String> {
    TcpStream::connect(authority).await.map_err(|error| error.to_string())
}

async fn http(authority: &str, path: &str) -> Result<(), String> {
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
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(format!("HTTP {status}")) }
}

async fn exec(words: &[String]) -> Result<(), String> {
    let Some((program, arguments)) = words.split_first() else { return Err("no command".into()) };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Past the deadline the future is dropped, and the child with it.
    let output = command.kill_on_drop(true).output().await.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(format!("{}{}{last}", output.status, if last.is_empty() { "" } else { ": " }))
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

    async fn get(reply: &'static str) -> Result<(), String> {
        let check = Check::Http { authority: server(reply).await, path: "/".into() };
        ask(&check, LIMIT).await
    }

    #[tokio::test]
    async fn http_success_and_redirection_are_good_the_rest_is_not() {
        assert_eq!(get("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await, Ok(()));
        assert_eq!(get("HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n").await, Ok(()));
        let error = get("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await.unwrap_err();
        assert_eq!(error, "HTTP 503 Service Unavailable");
        assert!(get("nonsense\r\n\r\n").await.is_err());
    }

    #[tokio::test]
    async fn silence_is_a_failure_at_the_deadline() {
        let check = Check::Http { authority: server("").await, path: "/".into() };
        let error = ask(&check, Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error, "no answer within 50ms");
    }

    #[tokio::test]
    async fn tcp_needs_somebody_who_listens() {
        assert_eq!(ask(&Check::Tcp(server("").await), LIMIT).await, Ok(()));
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        assert!(ask(&Check::Tcp(closed), LIMIT).await.unwrap_err().contains("refused"));
    }

    #[tokio::test]
    async fn a_command_says_yes_no_or_why() {
        let run = |text: &str| {
            let check = Check::Exec(text.split('|').map(str::to_owned).collect());
            async move { ask(&check, LIMIT).await }
        };
        assert_eq!(run("/bin/true").await, Ok(()));
        let error = run("/bin/sh|-c|echo broken pipe >&2; exit 3").await.unwrap_err();
        assert_eq!(error, "exit status: 3: broken pipe");
        assert!(run("/nonexistent").await.unwrap_err().starts_with("/nonexistent: "));
    }
}
