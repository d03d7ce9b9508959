//! When a workload's next snapshot is due.
//!
//! Times lie on a grid that begins with the first snapshot: one that takes a little longer, or is asked for a little
//! late, moves none of those after it. One is taken at a time. What would be due while one is being taken is
//! *skipped*, and counted. What is due while the workload does not serve *waits* until it does, for a snapshot of a
//! service that is down, held or failing is of no use, and then the grid goes on. After a failure there is a pause that
//! grows.
//!
//! [`Scheduler`] is pure: times in, decisions out. [`driver`] carries them out.

use std::time::{Duration, Instant};

mod board;
pub mod driver;

pub use board::{Board, GenerationStatus, SnapshotStatus};

/// The schedule of one workload.
#[derive(Debug)]
pub struct Scheduler {
    every: Duration,
    /// The pause after a failure, and the longest.
    pause: (Duration, Duration),
    /// The next time on the grid.
    next: Instant,
    state: State,
    /// Failures in a row.
    failures: u32,
    /// In a run of snapshots that took longer than `every`: how many were skipped and not told.
    run: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Resting,
    /// It is due, and the workload does not serve.
    Waiting,
    Taking,
}

/// What a snapshot that is done, well or not, has meant for others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// So many were skipped for it.
    pub skipped: u64,
    /// So many are to be told of.
    pub tell: Option<u64>,
    /// It is tried again after this long.
    pub again: Option<Duration>,
}

impl Scheduler {
    /// A schedule whose first snapshot is due now.
    pub fn new(every: Duration, pause: (Duration, Duration), now: Instant) -> Self {
        let every = every.max(Duration::from_millis(1));
        Self { every, pause, next: now, state: State::Resting, failures: 0, run: None }
    }

    /// When to call [`Self::tick`] next. `None`: when the workload serves again, or the snapshot is done.
    pub fn wake(&self) -> Option<Instant> {
        (self.state == State::Resting).then_some(self.next)
    }

    /// Whether it is due, and waits for the workload to serve.
    pub fn waits(&self) -> bool {
        self.state == State::Waiting
    }

    /// Whether to take one now.
    pub fn tick(&mut self, now: Instant, serves: bool) -> bool {
        if self.state == State::Taking || now < self.next {
            return false;
        }
        if !serves {
            self.state = State::Waiting;
            return false;
        }
        self.pass(now);
        self.state = State::Taking;
        true
    }

    /// It was taken, or could not be.
    pub fn done(&mut self, now: Instant, well: bool) -> Done {
        self.state = State::Resting;
        let skipped = self.pass(now);
        if !well {
            let (first, longest) = self.pause;
            let pause = first.saturating_mul(1 << self.failures.min(16)).min(longest);
            self.failures += 1;
            self.pass(now + pause);
            return Done { skipped, tell: None, again: Some(self.next - now) };
        }
        self.failures = 0;
        let tell = match (skipped, &mut self.run) {
            (0, run) => run.take().filter(|untold| *untold > 0),
            (skipped, run @ None) => {
                *run = Some(0);
                Some(skipped)
            }
            (skipped, Some(untold)) => {
                *untold += skipped;
                None
            }
        };
        Done { skipped, tell, again: None }
    }

    /// The workload did not serve any more, and so there is none; that is no failure.
    pub fn called_off(&mut self, now: Instant) {
        self.state = State::Resting;
        self.pass(now);
    }

    /// Leaves the times behind that are not later than `now`; how many.
    fn pass(&mut self, now: Instant) -> u64 {
        let Some(late) = now.checked_duration_since(self.next) else { return 0 };
        let passed = u32::try_from(late.as_nanos() / self.every.as_nanos()).unwrap_or(u32::MAX - 1) + 1;
        self.next += self.every * passed;
        passed.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);
    const PAUSE: (Duration, Duration) = (S, Duration::from_mins(1));

    #[test]
    fn times_lie_on_a_grid_whatever_a_snapshot_takes() {
        let start = Instant::now();
        let mut scheduler = Scheduler::new(5 * S, PAUSE, start);
        for n in 0..4 {
            let due = start + n * 5 * S;
            assert_eq!(scheduler.wake(), Some(due));
            assert!(!scheduler.tick(due.checked_sub(S / 1000).unwrap(), true));
            // A little late, and slow.
            assert!(scheduler.tick(due + S, true));
            assert_eq!(scheduler.wake(), None);
            assert_eq!(scheduler.done(due + 4 * S, true), Done::default());
        }
    }

    #[test]
    fn a_run_of_skips_is_told_at_its_beginning_and_at_its_end() {
        let start = Instant::now();
        let mut scheduler = Scheduler::new(S, PAUSE, start);
        let mut take = |ms: u64| {
            let begun = scheduler.wake().unwrap();
            assert!(scheduler.tick(begun, true));
            scheduler.done(begun + Duration::from_millis(ms), true)
        };
        assert_eq!(take(500), Done::default());
        assert_eq!(take(2500), Done { skipped: 2, tell: Some(2), again: None });
        assert_eq!(take(1500), Done { skipped: 1, tell: None, again: None });
        assert_eq!(take(3500), Done { skipped: 3, tell: None, again: None });
        assert_eq!(take(500), Done { skipped: 0, tell: Some(4), again: None });
        assert_eq!(take(500), Done::default());
        assert_eq!(take(1000), Done { skipped: 1, tell: Some(1), again: None });
        assert_eq!(take(10), Done::default());
    }

    #[test]
    fn what_is_due_while_it_does_not_serve_is_taken_when_it_does() {
        let start = Instant::now();
        let mut scheduler = Scheduler::new(3600 * S, PAUSE, start);
        assert!(!scheduler.tick(start, false));
        assert!(scheduler.waits() && scheduler.wake().is_none());
        assert!(scheduler.tick(start + 100 * S, true));
        assert_eq!(scheduler.done(start + 101 * S, true), Done::default());
        assert_eq!(scheduler.wake(), Some(start + 3600 * S));
        // Called off: not again at once.
        assert!(scheduler.tick(start + 3600 * S, true));
        scheduler.called_off(start + 3601 * S);
        assert_eq!(scheduler.wake(), Some(start + 7200 * S));
    }

    #[test]
    fn pauses_after_failures_grow_and_end_with_success() {
        let start = Instant::now();
        let mut scheduler = Scheduler::new(S, (2 * S, 10 * S), start);
        let mut waits = Vec::new();
        for _ in 0..5 {
            let now = scheduler.wake().unwrap();
            assert!(scheduler.tick(now, true));
            waits.push(scheduler.done(now, false).again.unwrap().as_secs());
        }
        assert_eq!(waits, [3, 5, 9, 11, 11]);
        let now = scheduler.wake().unwrap();
        assert!(scheduler.tick(now, true));
        assert_eq!(scheduler.done(now, true), Done::default());
        assert_eq!(scheduler.wake(), Some(now + S));
    }

    proptest! {
        /// Whatever happens when: every time on the grid is one of a snapshot, a skip, or a pause, never two at once,
        /// and what was skipped is told to the last one.
        #[test]
        fn all_skips_are_told_in_the_end(takes in prop::collection::vec(0_u64..4000, 1..40)) {
            let start = Instant::now();
            let mut scheduler = Scheduler::new(S, PAUSE, start);
            let (mut skipped, mut told) = (0, 0);
            for ms in takes.into_iter().chain([0]) {
                let now = scheduler.wake().unwrap();
                prop_assert_eq!((now - start).subsec_nanos(), 0);
                prop_assert!(scheduler.tick(now, true));
                prop_assert!(!scheduler.tick(now + S, true));
                let done = scheduler.done(now + Duration::from_millis(ms), true);
                skipped += done.skipped;
                told += done.tell.unwrap_or(0);
            }
            prop_assert_eq!(skipped, told);
        }
    }
}
