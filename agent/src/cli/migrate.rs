//! `ftctl migrate`: a running service moves to another node.

use std::io::IsTerminal as _;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    client::{Client, Failure},
    show,
};
use crate::{
    control::{
        Refusal,
        migrate::{Decide, Possible},
    },
    migrate::{Mode, Outcome, Progress, Request, Side},
};

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// A workload, or one of its units: the workload moves as one.
    what: String,
    /// The node that it is to run on.
    #[arg(long, value_name = "NODE", required_unless_present = "decide")]
    to: Option<String>,
    /// How. auto: what suits it; stop-copy: frozen, copied, restored.
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// Say what would be in the way, and touch nothing.
    #[arg(long)]
    dry_run: bool,
    /// Where it is to run, when its target was told to start it and is gone since, so that nobody knows. If it runs on
    /// the target, `here` makes it run twice.
    #[arg(long, value_enum, conflicts_with_all = ["to", "dry_run"])]
    decide: Option<Decision>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Decision {
    /// On this node: it goes on.
    Here,
    /// On the target: what stands still here is ended.
    There,
}

pub(super) async fn run(client: &Client, args: MigrateArgs, json: bool) -> Result<(), Failure> {
    if let Some(decision) = args.decide {
        let side = match decision {
            Decision::Here => Side::Source,
            Decision::There => Side::Target,
        };
        let decide = Decide { what: args.what.clone(), side };
        client.post("/v1/migrate/decide", &decide).await?;
        if json {
            return show::json(&decide);
        }
        let place = if side == Side::Source { "goes on here" } else { "is ended here" };
        show::line(&format!("{} {place}", show::plain(&args.what)));
        return Ok(());
    }
    let to = args.to.unwrap_or_default();
    let request = Request { what: args.what, to, mode: args.mode, dry_run: args.dry_run };
    if request.dry_run {
        let possible: Possible = serde_json::from_value(client.post("/v1/migrate", &request).await?)
            .map_err(|error| Failure::Local(format!("ftd's answer makes no sense: {error}")))?;
        if json {
            return show::json(&possible);
        }
        let units = possible.units.join(", ");
        show::line(&format!(
            "nothing is in the way: {} ({units}) can go to {}",
            possible.workload, request.to
        ));
        return Ok(());
    }
    let bar = bar(json);
    let mut last = None;
    let lines = client.post_lines("/v1/migrate", &request, |line| {
        let Ok(progress) = serde_json::from_str::<Progress>(line) else { return };
        advance(&bar, &progress);
        last = Some(progress);
    });
    let done = lines.await;
    bar.finish_and_clear();
    done?;
    let last = last.ok_or_else(|| Failure::Local("ftd has said nothing; see: ftctl events".into()))?;
    let last: Progress = show::all_plain(&last)?;
    if json {
        show::json(&last)?;
    } else {
        result(&last);
    }
    match last.outcome {
        Some(Outcome::Moved) => Ok(()),
        Some(Outcome::Back { error, mend }) => {
            let error = format!("{} runs where it was: {error}", last.workload);
            Err(Failure::Refused(Refusal { error, mend }))
        }
        None => {
            let error = format!("ftd has ended before {} had arrived", last.workload);
            Err(Failure::Refused(Refusal {
                error,
                mend: "it goes on with it when it is started again: ftctl events".into(),
            }))
        }
    }
}

/// On standard error, and only for a person.
fn bar(json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {bytes_per_sec} {bar:20}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn advance(bar: &ProgressBar, progress: &Progress) {
    bar.set_length(progress.expected.max(progress.bytes));
    bar.set_position(progress.bytes);
    let words = match &progress.waits {
        Some((error, mend)) => show::plain(&format!("{}: {error}; {mend}", progress.phase)),
        None => format!("{} to {}: {}", progress.workload, progress.to, progress.phase),
    };
    bar.set_message(words);
}

fn result(progress: &Progress) {
    if progress.outcome == Some(Outcome::Moved) {
        let units = progress.units.join(", ");
        show::line(&format!("{} ({units}) runs on {}", show::good(&progress.workload), progress.to));
    }
    let mut rows = show::table(&["PHASE", "TOOK"]);
    let ms = |ms: u64| format!("{ms} ms");
    for (phase, took) in &progress.phases {
        rows.add_row([phase.clone(), ms(*took)]);
    }
    rows.add_row(["all".to_owned(), ms(progress.took_ms)]);
    if let Some(blackout) = progress.blackout_ms {
        rows.add_row(["stood still".to_owned(), ms(blackout)]);
    }
    if let Some(restore) = progress.restore_ms {
        rows.add_row(["restored in".to_owned(), ms(restore)]);
    }
    show::line(&rows.trim_fmt());
    if progress.wire_bytes > 0 {
        let ratio = progress.bytes as f64 / progress.wire_bytes as f64;
        let (bytes, wire) = (ByteSize(progress.bytes), ByteSize(progress.wire_bytes));
        show::line(&format!("images: {bytes}, {wire} on the wire ({ratio:.1} to 1)"));
    }
}
