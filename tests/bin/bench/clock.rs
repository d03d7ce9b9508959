//! Moments, in nanoseconds of `CLOCK_MONOTONIC`: the clock of systemd's own timestamps, and the same one
//! in every host.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

fn read(clock: ClockId) -> u64 {
    // Fails only for a clock that does not exist.
    let now = clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Now.
pub(crate) fn now() -> u64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// A moment of the wall clock that is not long ago, on this clock.
pub(crate) fn from_wall(moment: jiff::Timestamp) -> u64 {
    let ago = i128::from(read(ClockId::CLOCK_REALTIME)) - moment.as_nanosecond();
    u64::try_from(i128::from(now()) - ago).unwrap_or(0)
}

/// How much later one moment is than another, in milliseconds; negative when it is earlier.
pub(crate) fn ms(from: u64, to: u64) -> f64 {
    (to as f64 - from as f64) / 1e6
}
