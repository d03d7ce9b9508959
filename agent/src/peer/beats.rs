//! What heartbeats tell of a connection: how long a message takes there and back, and how many are lost.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// So many round trips are remembered.
const KEPT: usize = 128;

/// The heartbeats of one connection.
#[derive(Debug, Default)]
pub(super) struct Beats {
    next: u64,
    /// Sent, not answered.
    open: VecDeque<(u64, Instant)>,
    /// The last round trips; `None` for one that was lost.
    kept: VecDeque<Option<Duration>>,
}

impl Beats {
    /// The number of a heartbeat that is sent now. Those that are older than `limit` and not answered are lost.
    pub(super) fn send(&mut self, now: Instant, limit: Duration) -> u64 {
        while let Some((_, sent)) = self.open.front()
            && now - *sent > limit
        {
            self.open.pop_front();
            self.keep(None);
        }
        let number = self.next;
        self.next += 1;
        self.open.push_back((number, now));
        number
    }

    /// The heartbeat of this number was answered.
    pub(super) fn answered(&mut self, number: u64, now: Instant) {
        // One that counts as lost already, or that was never sent, is nothing.
        if let Some(at) = self.open.iter().position(|(open, _)| *open == number)
            && let Some((_, sent)) = self.open.remove(at)
        {
            self.keep(Some(now - sent));
        }
    }

    fn keep(&mut self, trip: Option<Duration>) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(trip);
    }

    /// The share of the round trips that is lost, from 0 to 1.
    pub(super) fn loss(&self) -> f64 {
        let lost = self.kept.iter().filter(|trip| trip.is_none()).count();
        if self.kept.is_empty() { 0.0 } else { lost as f64 / self.kept.len() as f64 }
    }

    /// Median and 99 % of the round trips.
    pub(super) fn round_trip(&self) -> Option<(Duration, Duration)> {
        let mut trips: Vec<_> = self.kept.iter().flatten().copied().collect();
        trips.sort_unstable();
        let last = trips.len().checked_sub(1)?;
        Some((trips[last / 2], trips[last * 99 / 100]))
    }
}

/// How many bytes went over a connection in the last seconds.
#[derive(Debug, Default)]
pub(super) struct Rate {
    samples: VecDeque<(Instant, u64, u64)>,
}

/// Over this time.
const WINDOW: Duration = Duration::from_secs(2);

impl Rate {
    /// So many bytes were sent and received until now.
    pub(super) fn sample(&mut self, now: Instant, sent: u64, received: u64) {
        while self.samples.len() > 1 && now - self.samples[1].0 > WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back((now, sent, received));
    }

    /// Bytes sent and received per second.
    pub(super) fn per_second(&self) -> (u64, u64) {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return (0, 0) };
        let seconds = (last.0 - first.0).as_secs_f64();
        if seconds <= 0.0 {
            return (0, 0);
        }
        let per = |from: u64, to: u64| (to.saturating_sub(from) as f64 / seconds) as u64;
        (per(first.1, last.1), per(first.2, last.2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn round_trips_are_measured_and_what_is_not_answered_is_lost() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut beats = Beats::default();
        for n in 0..10_u32 {
            let now = start + ms(100) * n;
            let number = beats.send(now, ms(500));
            if n % 5 != 0 {
                beats.answered(number, now + ms(u64::from(n)));
                // A second answer changes nothing.
                beats.answered(number, now + ms(90));
            }
        }
        beats.answered(77, start);
        let after = beats.send(start + ms(5000), ms(500));
        assert_eq!(after, 10);
        assert!((beats.loss() - 0.2).abs() < 1e-9, "{}", beats.loss());
        assert_eq!(beats.round_trip(), Some((ms(4), ms(8))));
    }

    #[tokio::test]
    async fn rates_are_those_of_the_last_seconds() {
        let start = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(), (0, 0));
        for n in 0..100_u32 {
            rate.sample(start + Duration::from_millis(100) * n, u64::from(n.saturating_sub(50)) * 100, 0);
        }
        assert_eq!(rate.per_second(), (1000, 0));
    }
}
