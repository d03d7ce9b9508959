//! Carries out what the supervisor wants done, and feeds back how it went.

use std::{fs, sync::Arc};

use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    machine::{Input, JobOutcome},
    supervisor::{Action, Job, Supervisor, boot_now},
};
use crate::unit::{
    cgroup,
    manager::{JobError, Systemd},
};

/// Does what is wanted, for ever. Jobs of different units run side by side; a unit has one at a time,
/// its machine sees to that.
pub async fn run(supervisor: Arc<Supervisor>, systemd: Systemd, mut wanted: UnboundedReceiver<Action>) {
    while let Some(action) = wanted.recv().await {
        match action {
            Action::Start(job) => {
                tokio::spawn(work(Arc::clone(&supervisor), systemd.clone(), job, false));
            }
            Action::Restart(job) => {
                tokio::spawn(work(Arc::clone(&supervisor), systemd.clone(), job, true));
            }
        }
    }
}

async fn work(supervisor: Arc<Supervisor>, systemd: Systemd, job: Job, restart: bool) {
    let op = job.op.map(|op| op.0);
    tracing::info!(unit = job.id, op, restart, "asking systemd");
    let result = if restart {
        thaw(&supervisor, &job);
        systemd.restart(&job.id, job.kill_after, job.limit).await
    } else {
        systemd.start(&job.id, job.limit).await
    };
    tracing::info!(unit = job.id, op, ?result, "systemd's job is over");
    let outcome = match result {
        Ok(result) => JobOutcome::Ended(result),
        Err(JobError::Contradicts(_)) => JobOutcome::StopPending,
        Err(JobError::TooLate(_)) => JobOutcome::TooLate,
        Err(JobError::Unreachable(_)) => JobOutcome::Unreachable,
        Err(error) => JobOutcome::Refused(error.to_string()),
    };
    supervisor.feed(job.slot, boot_now(), Input::JobDone(job.number, outcome));
}

/// Lets a frozen unit's processes go on before systemd is asked to stop them. systemd starts control
/// processes inside the unit's cgroup and waits for them to execute; in one that somebody else has frozen
/// that wait, and with it PID 1, would not end.
fn thaw(supervisor: &Supervisor, job: &Job) {
    let Some((view, ..)) = supervisor.view(job.slot) else { return };
    let Some(dir) = cgroup::directory(&view.control_group) else { return };
    let events = fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
    if events.lines().any(|line| line == "frozen 1") {
        tracing::warn!(unit = job.id, "its cgroup is frozen: thawing it before the restart");
        if let Err(error) = fs::write(dir.join("cgroup.freeze"), "0") {
            tracing::error!(unit = job.id, %error, "its cgroup cannot be thawed");
        }
    }
}

/// Lets the machines go on when their time has come, for ever.
pub async fn keep_time(supervisor: Arc<Supervisor>) {
    let mut wake = supervisor.wake();
    loop {
        let next = *wake.borrow_and_update();
        let due = async {
            match next {
                Some(at) => {
                    let left = at.0.saturating_sub(boot_now().0);
                    tokio::time::sleep(std::time::Duration::from_nanos(left)).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => supervisor.tick(),
            changed = wake.changed() => if changed.is_err() { return },
        }
    }
}
