//! The API's server side.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{
        Query, State,
        rejection::{JsonRejection, QueryRejection},
    },
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt as _, stream};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::{
    sys::socket::{setsockopt, sockopt},
    unistd::{Group, chown},
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    sync::{
        Semaphore,
        broadcast::{Receiver, error::RecvError},
    },
};

use super::{App, CheckQuery, EventsQuery, Hold, Recover, Refusal, Release, doctor, migrate, peers};
use crate::{
    config::{self, Api, Config},
    event::{Event, Kind, bus::Bus, journal},
    heal::{machine::Input, supervisor::boot_now},
    inject::{InjectError, Request},
    probe::BootNs,
    snapshot::criu::{check::Report, unit},
    telemetry,
};

/// Serves the whole API on `listener` for ever.
pub async fn serve_unix(app: Arc<App>, listener: UnixListener) -> io::Result<()> {
    axum::serve(listener, whole().with_state(app)).await
}

/// Serves what only reads, on TCP, for ever. Anybody may connect, so all that a client can hold is
/// bounded: connections, the time until a request is there, and the time in which nothing is taken of
/// the answer.
pub async fn serve_tcp(app: Arc<App>, listener: TcpListener) {
    let status = app.config.status.clone();
    serve_bounded(reading().with_state(app), listener, &status).await;
}

async fn serve_bounded(routes: Router, listener: TcpListener, limits: &config::Status) {
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.idle);
    loop {
        // Who comes too many waits in the kernel's queue, where he costs no descriptor.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "no connection accepted for the status on TCP");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        if let Err(error) = end_if_deaf(&stream, limits.idle) {
            tracing::debug!(%error, "a connection without a time limit for what is sent");
        }
        let connection =
            http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes.clone()));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the status on TCP");
            }
            drop(place);
        });
    }
}

/// How long to wait when no connection can be accepted, for lack of descriptors most likely.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Lets the kernel end a connection whose other side takes nothing, or is gone, for `limit`.
fn end_if_deaf(stream: &TcpStream, limit: Duration) -> nix::Result<()> {
    let millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
    setsockopt(stream, sockopt::TcpUserTimeout, &millis)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &(millis / 1000).max(1))
}

/// Listens for [`serve_tcp`]. An address that cannot be had is told once, and tried again until it can: it
/// may be one that comes later.
pub async fn listen(bus: &Bus, address: SocketAddr, first: io::Result<TcpListener>) -> TcpListener {
    let mut told = false;
    let mut listener = first;
    loop {
        match listener {
            Ok(listener) => {
                if told {
                    bus.emit(None, None, Kind::StatusBack { address: address.to_string() });
                }
                return listener;
            }
            Err(error) if !std::mem::replace(&mut told, true) => {
                tracing::error!(%address, %error, "no status on TCP; it is tried again");
                let mend = match error.kind() {
                    io::ErrorKind::AddrInUse => "another program listens there: end it",
                    io::ErrorKind::AddrNotAvailable => "give a network interface this address",
                    io::ErrorKind::PermissionDenied => "choose a port from 1024 up",
                    _ => "see the cause",
                };
                let mend = format!("{mend}, or set another status.listen; ftd tries again by itself");
                let (address, cause) = (address.to_string(), error.to_string());
                bus.emit(None, None, Kind::StatusBlocked { address, cause, mend });
            }
            Err(_) => {}
        }
        tokio::time::sleep(LISTEN_AGAIN).await;
        listener = TcpListener::bind(address).await;
    }
}

/// How often an address that cannot be had is tried.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);

/// Binds the API's socket, for root and the configured group only. A socket that a dead ftd left is
/// replaced; one that still answers is an error.
pub fn bind(api: &Api) -> io::Result<UnixListener> {
    let path = &api.socket;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another ftd answers there"));
        }
        fs::remove_file(path)?;
    }
    // Nobody but us until owner and mode are right.
    let umask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(umask);
    let listener = listener?;
    give_to_group(path, &api.group);
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

fn give_to_group(path: &Path, name: &str) {
    match Group::from_name(name) {
        Ok(Some(group)) => {
            if let Err(error) = chown(path, None, Some(group.gid)) {
                tracing::warn!(group = name, %error, "the API's socket stays with root's group");
            }
        }
        Ok(None) => tracing::warn!(group = name, "there is no such group: only root may use the API"),
        Err(error) => tracing::warn!(group = name, %error, "the group cannot be looked up"),
    }
}

fn reading() -> Router<Arc<App>> {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .fallback(unknown)
}

fn whole() -> Router<Arc<App>> {
    reading()
        .route("/v1/doctor", get(run_doctor))
        .route("/v1/check", get(check))
        .route("/v1/config", get(show_config))
        .route("/v1/hold", post(hold))
        .route("/v1/release", post(release))
        .route("/v1/inject", post(inject))
        .route("/v1/recover", post(recover))
        .route("/v1/snapshots", post(told_of_snapshot))
        .merge(peers::routes())
        .merge(migrate::routes())
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (StatusCode::UNPROCESSABLE_ENTITY, Json(self)).into_response()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller has an error or a text to give away")]
fn refuse(error: impl ToString, mend: &str) -> Refusal {
    Refusal { error: error.to_string(), mend: mend.into() }
}

async fn unknown() -> Response {
    let text = refuse("there is no such path in the API", "ftctl and ftd are of different versions?");
    (StatusCode::NOT_FOUND, Json(text)).into_response()
}

async fn healthz(State(app): State<Arc<App>>) -> Response {
    let troubles = app.status().troubles();
    let code = if troubles.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let well = troubles.is_empty();
    (code, Json(serde_json::json!({ "well": well, "troubles": troubles }))).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(CONTENT_TYPE, telemetry::text::CONTENT_TYPE)], app.metrics()).into_response()
}

async fn status(State(app): State<Arc<App>>) -> Response {
    Json(app.status()).into_response()
}

async fn show_config(State(app): State<Arc<App>>) -> Json<Config> {
    Json(app.config.clone())
}

async fn run_doctor(State(app): State<Arc<App>>) -> Response {
    Json(doctor::of_daemon(&app).await).into_response()
}

/// Any unit, not only those under care: a person may want to know before he puts it there.
async fn check(
    State(app): State<Arc<App>>,
    query: Result<Query<CheckQuery>, QueryRejection>,
) -> Result<Json<Report>, Refusal> {
    let Query(CheckQuery { unit }) =
        query.map_err(|error| refuse(error.body_text(), "ftctl and ftd are of different versions?"))?;
    let name = app.supervisor.find(&unit).map_or_else(|_| config::unit_name(&unit), |(_, id)| id);
    unit::check(&app.systemd, &name).await.map(Json).map_err(|error| {
        refuse(error, "name a service that systemd knows: systemctl list-units --type=service")
    })
}

pub(super) type Body_<T> = Result<Json<T>, JsonRejection>;

pub(super) fn parse<T>(body: Body_<T>) -> Result<T, Refusal> {
    body.map(|Json(value)| value)
        .map_err(|error| refuse(error.body_text(), "ftctl and ftd are of different versions?"))
}

async fn hold(State(app): State<Arc<App>>, body: Body_<Hold>) -> Result<Json<serde_json::Value>, Refusal> {
    let Hold { unit, for_ms, reason } = parse(body)?;
    let (slot, id) = app.supervisor.find(&unit).map_err(|e| refuse(e, "see: ftctl status"))?;
    let now = boot_now();
    let until = for_ms.map(|ms| {
        let wall = jiff::Timestamp::now().saturating_add(Duration::from_millis(ms));
        let wall = wall.unwrap_or(jiff::Timestamp::MAX);
        (BootNs(now.0.saturating_add(ms.saturating_mul(1_000_000))), wall)
    });
    app.supervisor.feed(slot, now, Input::Hold { until, reason });
    settled(&app, "held").await?;
    Ok(Json(serde_json::json!({ "unit": id, "until": until.map(|(_, wall)| wall) })))
}

/// What a person was promised must be on disk before he is told.
async fn settled(app: &App, what: &str) -> Result<(), Refusal> {
    let change = *app.supervisor.changes().borrow();
    app.saving.settled(change).await.map_err(|cause| {
        let error = format!("the unit is {what}, but only until ftd restarts: that cannot be saved: {cause}");
        refuse(error, "make room, or mend the disk; ftd keeps trying, see: ftctl events")
    })
}

async fn release(
    State(app): State<Arc<App>>,
    body: Body_<Release>,
) -> Result<Json<serde_json::Value>, Refusal> {
    let Release { unit } = parse(body)?;
    let (slot, id) = app.supervisor.find(&unit).map_err(|e| refuse(e, "see: ftctl status"))?;
    app.supervisor.feed(slot, boot_now(), Input::Release);
    settled(&app, "released").await?;
    Ok(Json(serde_json::json!({ "unit": id })))
}

fn refuse_fault(error: &InjectError) -> Refusal {
    let mut text = error.to_string();
    if let InjectError::Unfit { unit, cause, .. } = error
        && cause.starts_with(unit.as_str())
    {
        text.clone_from(cause);
    }
    Refusal { error: text, mend: error.mend() }
}

async fn inject(State(app): State<Arc<App>>, body: Body_<Request>) -> Result<Response, Refusal> {
    let request = parse(body)?;
    // A task of its own: a client that hangs up must not leave a fault half made.
    let faults = Arc::clone(&app.faults);
    let injected = tokio::spawn(async move { faults.inject(&request).await }).await;
    match injected {
        Ok(Ok(record)) => Ok(Json(record).into_response()),
        Ok(Err(error)) => Err(refuse_fault(&error)),
        Err(error) => Err(refuse(error, "see the log: journalctl -u ftd")),
    }
}

async fn recover(
    State(app): State<Arc<App>>,
    body: Body_<Recover>,
) -> Result<Json<serde_json::Value>, Refusal> {
    let Recover { id } = parse(body)?;
    let ended = app.faults.recover(id.as_deref()).map_err(|error| refuse_fault(&error))?;
    Ok(Json(serde_json::json!({ "ended": ended })))
}

/// What a command has done with snapshots, by itself, becomes known to all.
async fn told_of_snapshot(
    State(app): State<Arc<App>>,
    body: Body_<Kind>,
) -> Result<Json<serde_json::Value>, Refusal> {
    let kind = parse(body)?;
    let (Kind::SnapshotTaken { workload, .. } | Kind::Restored { workload, .. }) = &kind else {
        return Err(refuse("that is no event of a snapshot", "ftctl and ftd are of different versions?"));
    };
    let units = app.supervisor.status();
    let first = units.iter().find(|unit| unit.workload == *workload);
    let first = first.ok_or_else(|| {
        refuse(format!("there is no workload {workload}"), "restart ftd if the configuration has changed")
    })?;
    app.bus.emit(Some(&first.unit), None, kind);
    Ok(Json(serde_json::json!({})))
}

async fn events(State(app): State<Arc<App>>, Query(query): Query<EventsQuery>) -> Result<Response, Refusal> {
    // A unit that is no longer under care may still be asked for.
    let id_of =
        |name: &String| app.supervisor.find(name).map_or_else(|_| config::unit_name(name), |(_, id)| id);
    let unit = query.unit.as_ref().map(id_of);
    let (recent, follower) = app.bus.recent_and_follow();
    let oldest = recent.first().map(|event| event.seq);
    let wanted = journal::Query { since: query.since, unit, before: None };
    let mut recent: Vec<_> = recent.into_iter().filter(|event| wanted.wants(event)).collect();
    let on_disk = match query.last {
        Some(last) => {
            recent.drain(..recent.len().saturating_sub(last));
            Some((last - recent.len()) as u64)
        }
        None => None,
    };
    let node = app.bus.node().to_owned();
    let past = if on_disk == Some(0) || oldest == Some(0) {
        None
    } else {
        let dir = app.config.node.state_dir.join("journal");
        let before = journal::Query { before: oldest, ..wanted.clone() };
        let open = move || match on_disk {
            Some(count) => journal::Reader::last(&dir, before, count),
            None => journal::Reader::new(&dir, before),
        };
        let reader = on_the_disk(open).await;
        let reader = reader.map_err(|error| refuse(error, "check the disk under the state directory"))?;
        Some(from_disk(reader, node.clone()))
    };
    let past = stream::iter(past).flatten();
    let past = past.chain(stream::iter(recent).map(|event| Ok(line(&event))));
    let body = if query.follow {
        Body::from_stream(past.chain(live(follower, wanted, node)))
    } else {
        Body::from_stream(past)
    };
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// So many requests may be at the journal's files at a time; the others wait for their turn.
static DISK: Semaphore = Semaphore::const_new(2);

/// Does something on the disk, on a thread where it may take its time.
async fn on_the_disk<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let _turn = DISK.acquire().await.map_err(io::Error::other)?;
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// What the journal's files hold, as fast as the client takes it; at the end, how many of the lines were
/// damaged.
fn from_disk(
    reader: journal::Reader,
    node: String,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some((reader, node)), |state| async {
        let (mut reader, node) = state?;
        let step = on_the_disk(move || Ok((reader.step()?, reader))).await;
        match step {
            Ok((Some(lines), reader)) => Some((Ok(lines.into()), Some((reader, node)))),
            Ok((None, reader)) if reader.damaged() > 0 => {
                Some((Ok(dropped(node, "damaged in the journal", reader.damaged())), None))
            }
            Ok((None, _)) => None,
            Err(error) => {
                tracing::error!(%error, "the journal cannot be read");
                Some((Err(error), None))
            }
        }
    })
}

/// Tells one reader what is missing from his stream. No event of the node: it has number 0.
fn dropped(node: String, place: &str, count: u64) -> Bytes {
    let kind = Kind::EventsDropped { place: place.into(), count };
    line(&Event { seq: 0, time: jiff::Timestamp::now(), node, unit: None, op: None, kind })
}

fn line(event: &Event) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// What happens from now on; a follower that is too slow is told how many he missed.
fn live(
    follower: Receiver<Arc<Event>>,
    wanted: journal::Query,
    node: String,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold((follower, wanted, node), |(mut follower, wanted, node)| async move {
        loop {
            let line = match follower.recv().await {
                Ok(event) if wanted.wants(&event) => line(&event),
                Ok(_) => continue,
                Err(RecvError::Lagged(count)) => dropped(node.clone(), "this follower", count),
                Err(RecvError::Closed) => return None,
            };
            return Some((Ok(line), (follower, wanted, node)));
        }
    })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn bounded(max_connections: usize, idle: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = config::Status { listen: None, max_connections, idle };
        let routes = Router::new().route("/", get(|| async { "well" }));
        tokio::spawn(async move { serve_bounded(routes, listener, &limits).await });
        address
    }

    async fn ask(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn who_asks_nothing_is_sent_away() {
        let address = bounded(4, Duration::from_millis(100)).await;
        let mut mute = TcpStream::connect(address).await.unwrap();
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(b"GET / HT").await.unwrap();
        // An answered client that keeps the connection and asks nothing more.
        let mut kept = TcpStream::connect(address).await.unwrap();
        kept.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        for stream in [&mut mute, &mut half, &mut kept] {
            let mut rest = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
            assert!(ended.is_ok(), "it is still open");
        }
    }

    #[tokio::test]
    async fn who_comes_too_many_waits_for_a_place() {
        let address = bounded(2, Duration::from_millis(300)).await;
        let _mute = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        // Let them take the two places.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begun = std::time::Instant::now();
        assert!(ask(address).await.ends_with("well"));
        assert!(begun.elapsed() > Duration::from_millis(100), "{:?}", begun.elapsed());
        assert!(ask(address).await.ends_with("well"));
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_is_told_once_and_tried_again() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let (bus, _queue) = Bus::new("n".into(), 0);
        let first = TcpListener::bind(address).await;
        let listening = listen(&bus, address, first);
        tokio::pin!(listening);
        assert!(tokio::time::timeout(LISTEN_AGAIN * 5 / 2, &mut listening).await.is_err());
        drop(taken);
        assert_eq!(listening.await.local_addr().unwrap(), address);
        let told: Vec<_> = bus.recent_and_follow().0.into_iter().map(|event| event.kind.clone()).collect();
        assert!(
            matches!(&told[..], [Kind::StatusBlocked { mend, .. }, Kind::StatusBack { .. }]
                if mend.starts_with("another program listens there")),
            "{told:?}"
        );
    }
}
