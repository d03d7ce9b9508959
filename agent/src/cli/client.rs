//! HTTP over ftd's unix socket.

use std::{io, path::PathBuf, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

use crate::control::{EventsQuery, Refusal};

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Nobody answers on the socket: ftd does not run.
    #[error("ftd cannot be reached at {}: {cause}\n  mend: {mend}", socket.display())]
    Down { socket: PathBuf, cause: String, mend: &'static str },
    /// This user may not use the socket.
    #[error(
        "you may not talk to ftd at {}: permission denied\n  mend: use sudo, or become a member of the group \
         ftd (sudo adduser YOU ftd) and log in anew",
        socket.display()
    )]
    Forbidden { socket: PathBuf },
    /// ftd is there, and talking to it went wrong.
    #[error("ftd cannot be reached at {}: {cause}\n  mend: {mend}", socket.display())]
    Broken { socket: PathBuf, cause: String, mend: &'static str },
    /// ftd says no.
    #[error("{}\n  mend: {}", .0.error, .0.mend)]
    Refused(Refusal),
    /// Something went wrong on this side.
    #[error("{0}")]
    Local(String),
}

impl Failure {
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Down { .. } | Self::Forbidden { .. } | Self::Broken { .. } => 3,
            Self::Refused(_) | Self::Local(_) => 1,
        }
    }
}

#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
    limit: Duration,
}

impl Client {
    /// A client that waits for an answer at most for `limit`.
    pub(super) fn new(socket: &std::path::Path, limit: Duration) -> Self {
        Self { socket: socket.into(), limit }
    }

    fn unreachable(&self, cause: &io::Error) -> Failure {
        let socket = self.socket.clone();
        let start = "start it: systemctl start ftd (and see: journalctl -u ftd)";
        match cause.kind() {
            io::ErrorKind::NotFound => {
                let cause = "there is no such socket: ftd is not running".to_owned();
                Failure::Down { socket, cause, mend: start }
            }
            io::ErrorKind::ConnectionRefused => {
                let cause = "nobody listens there: ftd is not running".to_owned();
                Failure::Down { socket, cause, mend: start }
            }
            io::ErrorKind::PermissionDenied => Failure::Forbidden { socket },
            _ => {
                let mend = "see how ftd is: systemctl status ftd, journalctl -u ftd";
                Failure::Broken { socket, cause: cause.to_string(), mend }
            }
        }
    }

    /// What `work` brings, if it does in time.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        match timeout(self.limit, work).await {
            Ok(done) => done,
            Err(_) => Err(Failure::Broken {
                socket: self.socket.clone(),
                cause: format!("no answer within {}", humantime::format_duration(self.limit)),
                mend: "what was asked for may still be done: see ftctl events; wait longer with --timeout; \
                       see: journalctl -u ftd",
            }),
        }
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let broken = |error: hyper::Error| self.unreachable(&io::Error::other(error));
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // It ends when the response has been read or the program does.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "ftd")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Failure::Local(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let text = response.into_body().collect().await.map_err(broken)?.to_bytes();
        let refusal = serde_json::from_slice(&text).unwrap_or_else(|_| Refusal {
            error: format!("{status}: {}", String::from_utf8_lossy(&text)),
            mend: "ftctl and ftd are of different versions?".into(),
        });
        Err(Failure::Refused(refusal))
    }

    async fn answer<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, Failure> {
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| self.unreachable(&io::Error::other(error)))?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| {
            Failure::Local(format!("ftd's answer makes no sense: {error}; are ftctl and ftd of one version?"))
        })
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.in_time(async { self.answer(self.request(Method::GET, path, Vec::new()).await?).await }).await
    }

    pub(super) async fn post(&self, path: &str, body: &impl Serialize) -> Result<serde_json::Value, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::Local(error.to_string()))?;
        self.in_time(async { self.answer(self.request(Method::POST, path, body).await?).await }).await
    }

    /// Posts, and reads a stream of lines to its end.
    pub(super) async fn post_lines(
        &self,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(&str),
    ) -> Result<(), Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::Local(error.to_string()))?;
        let mut body = self.in_time(self.request(Method::POST, path, body)).await?.into_body();
        let mut rest = Vec::new();
        loop {
            let frame = self.in_time(async {
                body.frame().await.transpose().map_err(|error| self.unreachable(&io::Error::other(error)))
            });
            // What was said before it broke off was said.
            let Ok(Some(frame)) = frame.await else { return Ok(()) };
            let Ok(data) = frame.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                each(String::from_utf8_lossy(&line).trim_end());
            }
        }
    }

    /// Reads a stream of lines to its end.
    pub(super) async fn lines(
        &self,
        path: &str,
        query: &EventsQuery,
        mut each: impl FnMut(&str),
    ) -> Result<(), Failure> {
        let mut parameters = vec![format!("follow={}", query.follow)];
        parameters.extend(query.since.map(|since| format!("since={since}")));
        parameters.extend(query.unit.as_ref().map(|unit| format!("unit={}", percent(unit))));
        parameters.extend(query.last.map(|last| format!("last={last}")));
        let path = format!("{path}?{}", parameters.join("&"));
        let mut body = self.in_time(self.request(Method::GET, &path, Vec::new())).await?.into_body();
        let mut rest = Vec::new();
        loop {
            let frame = async {
                body.frame().await.transpose().map_err(|error| self.unreachable(&io::Error::other(error)))
            };
            // Who follows waits for what happens, however long nothing does.
            let frame = if query.follow { frame.await } else { self.in_time(frame).await };
            let Some(frame) = frame? else { break };
            let Ok(data) = frame.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                each(String::from_utf8_lossy(&line).trim_end());
            }
        }
        Ok(())
    }
}

/// Everything but letters, digits and `-_.@:` as %XX: enough for names of units.
pub(super) fn percent(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@:".contains(&byte);
    let each = text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_units_go_through_a_query() {
        assert_eq!(percent("getty@tty1.service"), "getty@tty1.service");
        assert_eq!(percent("a b\\x2d&c"), "a%20b%5Cx2d%26c");
    }

    #[tokio::test]
    async fn without_ftd_it_says_so_and_how_to_start_it() {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::new(&dir.path().join("ftd.sock"), Duration::from_secs(5));
        let failure = client.get::<serde_json::Value>("/v1/status").await.unwrap_err();
        assert_eq!(failure.exit_code(), 3);
        let text = failure.to_string();
        assert!(text.contains("ftd is not running") && text.contains("systemctl start ftd"), "{text}");
    }

    #[test]
    fn a_user_who_may_not_is_told_so() {
        let client = Client::new("/run/ftd/ftd.sock".as_ref(), Duration::from_secs(5));
        let failure = client.unreachable(&io::ErrorKind::PermissionDenied.into());
        assert!(matches!(failure, Failure::Forbidden { .. }) && failure.exit_code() == 3);
        let text = failure.to_string();
        assert!(text.contains("you may not") && text.contains("member of the group ftd"), "{text}");
        assert!(!text.contains("systemctl start"), "{text}");
    }

    #[tokio::test]
    async fn an_ftd_that_does_not_answer_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("ftd.sock");
        let _mute = tokio::net::UnixListener::bind(&socket).unwrap();
        let client = Client::new(&socket, Duration::from_millis(50));
        let failure = client.get::<serde_json::Value>("/v1/status").await.unwrap_err();
        assert!(failure.to_string().contains("no answer within 50ms"), "{failure}");
        let failure = client.lines("/v1/events", &EventsQuery::default(), |_| {}).await.unwrap_err();
        assert_eq!(failure.exit_code(), 3);
    }
}
