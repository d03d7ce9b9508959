//! The API's part for moving services to other nodes.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};

use super::{
    App, Refusal,
    server::{Body_, parse},
};
use crate::migrate::{Progress, Refused, Request, Side};

/// A line is sent at least this often, so that who waits knows that somebody is there.
const ALIVE: Duration = Duration::from_secs(5);
/// And not more often than this.
const PAUSE: Duration = Duration::from_millis(50);

/// `POST /v1/migrate/decide`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decide {
    /// The workload, or one of its units.
    pub what: String,
    /// Where it is to run.
    pub side: Side,
}

/// The answer to a `dry_run`: nothing is in the way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Possible {
    /// The workload.
    pub workload: String,
    /// Its units.
    pub units: Vec<String>,
}

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/migrate", post(migrate))
        .route("/v1/migrate", get(all))
        .route("/v1/migrate/decide", post(decide))
}

fn refuse(Refused { error, mend }: Refused) -> Refusal {
    Refusal { error, mend }
}

async fn all(State(app): State<Arc<App>>) -> Json<Vec<Progress>> {
    Json(app.migrations.all())
}

async fn decide(State(app): State<Arc<App>>, body: Body_<Decide>) -> Result<Json<()>, Refusal> {
    let Decide { what, side } = parse(body)?;
    app.migrations.decide(&what, side).map(Json).map_err(refuse)
}

/// Answers with a line of JSON for each step of the way; the last has the outcome. A client that hangs up changes nothing.
async fn migrate(State(app): State<Arc<App>>, body: Body_<Request>) -> Result<Response, Refusal> {
    let request = parse(body)?;
    if request.dry_run {
        let (workload, units) = app.migrations.check(&request).await.map_err(refuse)?;
        return Ok(Json(Possible { workload, units }).into_response());
    }
    let migrations = app.migrations.clone();
    // A task of its own: a client that hangs up must not leave a move half begun.
    let begun = tokio::spawn(async move { migrations.begin(&request).await }).await;
    let progress = begun.map_err(|error| Refusal {
        error: error.to_string(),
        mend: "see the log: journalctl -u ftd".into(),
    })?;
    let lines = lines(progress.map_err(refuse)?);
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

fn lines(
    progress: watch::Receiver<Progress>,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send {
    stream::unfold(Some((progress, true)), |state| async {
        let (mut progress, first) = state?;
        let mut ended = false;
        if !first {
            ended = matches!(timeout(ALIVE, progress.changed()).await, Ok(Err(_)));
            tokio::time::sleep(PAUSE).await;
        }
        let now = progress.borrow_and_update().clone();
        let over = ended || now.outcome.is_some();
        let mut line = serde_json::to_vec(&now).unwrap_or_default();
        line.push(b'\n');
        Some((Ok(line.into()), (!over).then_some((progress, false))))
    })
}
