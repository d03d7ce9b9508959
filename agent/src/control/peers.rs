//! The API's part for the cluster: who is in it, and who may come.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};

use super::{
    App, Refusal,
    server::{Body_, parse},
};
use crate::peer::{ClusterError, ClusterStatus, Joined, TokenMade};

/// `POST /v1/cluster/init`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Init {
    /// The cluster's name.
    pub name: String,
}

/// `POST /v1/cluster/token`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MakeToken {
    /// Valid for so long, milliseconds; `cluster.token_for` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_ms: Option<u64>,
    /// Where the new node finds this one, if not where it listens.
    #[serde(default)]
    pub addresses: Vec<SocketAddr>,
}

/// `POST /v1/cluster/join`
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// The token.
    pub token: String,
}

/// `POST /v1/cluster/revoke`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// The node.
    pub node: String,
}

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/cluster/peers", get(peers))
        .route("/v1/cluster/init", post(init))
        .route("/v1/cluster/token", post(token))
        .route("/v1/cluster/join", post(join))
        .route("/v1/cluster/revoke", post(revoke))
}

fn refuse(error: &ClusterError) -> Refusal {
    Refusal { error: error.to_string(), mend: error.mend() }
}

/// A task of its own: a client that hangs up must not leave a change half made.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, ClusterError>> + Send + 'static,
) -> Result<Json<T>, Refusal> {
    match tokio::spawn(work).await {
        Ok(done) => done.map(Json).map_err(|error| refuse(&error)),
        Err(error) => {
            Err(Refusal { error: error.to_string(), mend: "see the log: journalctl -u ftd".into() })
        }
    }
}

async fn peers(State(app): State<Arc<App>>) -> Json<ClusterStatus> {
    Json(app.peers.status())
}

async fn init(State(app): State<Arc<App>>, body: Body_<Init>) -> Result<Json<ClusterStatus>, Refusal> {
    let Init { name } = parse(body)?;
    let peers = app.peers.clone();
    whole(async move { peers.init(&name).await }).await
}

async fn token(State(app): State<Arc<App>>, body: Body_<MakeToken>) -> Result<Json<TokenMade>, Refusal> {
    let MakeToken { for_ms, addresses } = parse(body)?;
    let peers = app.peers.clone();
    whole(async move { peers.token(for_ms.map(Duration::from_millis), &addresses).await }).await
}

async fn join(State(app): State<Arc<App>>, body: Body_<Join>) -> Result<Json<Joined>, Refusal> {
    let Join { token } = parse(body)?;
    let peers = app.peers.clone();
    whole(async move { peers.join(&token).await }).await
}

async fn revoke(State(app): State<Arc<App>>, body: Body_<Revoke>) -> Result<Json<()>, Refusal> {
    let Revoke { node } = parse(body)?;
    let peers = app.peers.clone();
    whole(async move { peers.revoke(&node).await }).await
}
