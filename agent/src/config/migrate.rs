//! `[migrate]`: services that move to other nodes.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[migrate]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Migrate {
    /// How long CRIU may take to freeze and dump one unit; then it is thawed.
    #[serde(with = "humantime_serde")]
    pub dump_within: Duration,
    /// How long making its processes on the target may take; then that is undone.
    #[serde(with = "humantime_serde")]
    pub restore_within: Duration,
    /// A target that hears nothing of the source for so long, and was not told to go, undoes what it has prepared.
    #[serde(with = "humantime_serde")]
    pub silent_for: Duration,
}

impl Default for Migrate {
    fn default() -> Self {
        Self {
            dump_within: Duration::from_mins(2),
            restore_within: Duration::from_mins(1),
            silent_for: Duration::from_secs(30),
        }
    }
}

/// Says what is wrong with it: the key, what, and the mend.
pub(super) fn check(migrate: &Migrate, mut say: impl FnMut(&'static str, String, String)) {
    for (name, value, default) in [
        ("dump_within", migrate.dump_within, "2min"),
        ("restore_within", migrate.restore_within, "1min"),
        ("silent_for", migrate.silent_for, "30s"),
    ] {
        let allowed = Duration::from_secs(1)..=Duration::from_mins(20);
        if !allowed.contains(&value) {
            let time = humantime::format_duration(value);
            let error = format!("migrate.{name} is {time}: it must be from 1s to 20min");
            say(name, error, format!("leave it out for its default, {default}"));
        }
    }
}
