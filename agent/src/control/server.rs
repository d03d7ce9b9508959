//! The API's server side.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Query, State, rejection::JsonRejection},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt as _, stream};
use nix::unistd::{Group, chown};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{
        Semaphore,
        broadcast::{Receiver, error::RecvError},
    },
};

use super::{App, EventsQuery, Hold, Recover, Refusal, Release, doctor};
use crate::{
    config::{Api, Config},
    event::{Event, Kind, journal},
    heal::{machine::Input, supervisor::boot_now},
    inject::{InjectError, Request},
    probe::BootNs,
};

/// Serves the whole API on `listener` for ever.
pub async fn serve_unix(app: Arc<App>, listener: UnixListener) -> io::Result<()> {
    axum::serve(listener, whole().with_state(app)).await
}

/// Serves what only reads, on TCP, for ever.
pub async fn serve_tcp(app: Arc<App>, address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    axum::serve(listener, reading().with_state(app)).await
}

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
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .fallback(unknown)
}

fn whole() -> Router<Arc<App>> {
    reading()
        .route("/v1/doctor", get(run_doctor))
        .route("/v1/config", get(config))
        .route("/v1/hold", post(hold))
        .route("/v1/release", post(release))
        .route("/v1/inject", post(inject))
        .route("/v1/recover", post(recover))
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (StatusCode::UNPROCESSABLE_ENTITY, Json(self)).into_response()
    }
}

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

async fn status(State(app): State<Arc<App>>) -> Response {
    Json(app.status()).into_response()
}

async fn config(State(app): State<Arc<App>>) -> Json<Config> {
    Json(app.config.clone())
}

async fn run_doctor(State(app): State<Arc<App>>) -> Response {
    Json(doctor::of_daemon(&app).await).into_response()
}

type Body_<T> = Result<Json<T>, JsonRejection>;

fn parse<T>(body: Body_<T>) -> Result<T, Refusal> {
    body.map(|Json(value)| value)
        .map_err(|error| refuse(error.body_text(), "ftctl and ftd are of different versions?"))
}

async fn hold(State(app): State<Arc<App>>, body: Body_<Hold>) -> Result<Json<serde_json::Value>, Refusal> {
    let Hold { unit, for_ms, reason } = parse(body)?;
    let (slot, id) = app.supervisor.find(&unit).map_err(|e| refuse(e, "see: ftctl status"))?;
    let now = boot_now();
    let until = for_ms.map(|ms| {
        let wall = jiff::Timestamp::now().saturating_add(std::time::Duration::from_millis(ms));
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

async fn events(State(app): State<Arc<App>>, Query(query): Query<EventsQuery>) -> Result<Response, Refusal> {
    let unit = match &query.unit {
        // A unit that is no longer under care may still be asked for.
        Some(name) => {
            Some(app.supervisor.find(name).map_or_else(|_| crate::config::unit_name(name), |(_, id)| id))
        }
        None => None,
    };
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
