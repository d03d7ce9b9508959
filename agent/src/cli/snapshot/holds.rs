//! What a command that takes units apart and puts them together says to a running ftd: leave them alone meanwhile, and
//! what has become of them. Where none runs, there is nobody to tell.

use std::time::Duration;

use super::super::client::{Client, Failure};
use crate::{
    config::unit_name,
    control::{Hold, Release, Status, millis},
    event,
    unit::alias,
};

/// Holds with a reason that begins so are this program's own, and end with what they were for.
const OURS: &str = "ftctl ";

/// Units that are held.
#[derive(Debug)]
pub(super) struct Holds<'a> {
    client: &'a Client,
    units: Vec<String>,
}

impl<'a> Holds<'a> {
    /// Holds those of these units that ftd cares for, and that nobody else holds; at most for `limit`, should this program
    /// end before it can release them.
    pub(super) async fn take(
        client: &'a Client,
        units: &[String],
        why: &str,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let mut holds = Self { client, units: Vec::new() };
        let status: Status = match client.get("/v1/status").await {
            // Nobody is there who could interfere.
            Err(Failure::Down { .. }) => return Ok(holds),
            status => status?,
        };
        for name in units.iter().map(|unit| unit_name(unit)) {
            let is_it = |known: &str| known == name || alias::others(&name).any(|other| other == known);
            let Some(unit) = status.units.iter().find(|unit| is_it(&unit.unit)) else { continue };
            let reason = unit.held.as_ref().map(|held| held.reason.as_deref().unwrap_or_default());
            if reason.is_none_or(|reason| reason.starts_with(OURS)) {
                holds.units.push(unit.unit.clone());
            }
        }
        holds.hold(why, Some(limit)).await.map(|()| holds)
    }

    async fn hold(&self, why: &str, limit: Option<Duration>) -> Result<(), Failure> {
        for unit in &self.units {
            let hold =
                Hold { unit: unit.clone(), for_ms: limit.map(millis), reason: Some(format!("{OURS}{why}")) };
            self.client.post("/v1/hold", &hold).await?;
        }
        Ok(())
    }

    /// Holds them for good, until they are restored or a person releases them.
    pub(super) async fn keep(self, why: &str) -> Result<(), Failure> {
        self.hold(why, None).await
    }

    /// Gives them back to ftd.
    pub(super) async fn release(self) -> Result<(), Failure> {
        for unit in &self.units {
            self.client.post("/v1/release", &Release { unit: unit.clone() }).await?;
        }
        Ok(())
    }
}

/// Tells ftd what was done, for its events. It is done, whether that reaches anybody or not.
pub(super) async fn tell(client: &Client, what: &event::Kind) {
    match client.post("/v1/snapshots", what).await {
        Ok(_) | Err(Failure::Down { .. }) => {}
        Err(failure) => eprintln!("ftctl: it is done, but ftd was not told: {failure}"),
    }
}
