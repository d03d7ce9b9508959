//! `cargo xtask demo`: two hosts with the built package, and what ftd does when their services are broken.
//!
//! Shows what ftd says as it says it, then a table of what was done, what ftd saw, and how long each took.
//! When the show is over the hosts stay, to look around, until the next show or `cargo xtask hosts down`;
//! `--down` ends them at once. A show that fails, or is cut short by Ctrl-C, leaves nothing behind.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ExitCode},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Parser;
use harness::{Base, BootOptions, Events, Host, Lab, events::Said, lab::BY_HAND};

/// Show ftd healing two hosts with nginx and apache2.
#[derive(Parser)]
#[command(name = "demo", bin_name = "cargo xtask demo")]
struct Arguments {
    /// End the hosts when it is over, instead of leaving them for you to look around.
    #[arg(long)]
    down: bool,
}

const CONFIG: &str = r#"
[inject]
enabled = true

[heal]
settle = "500ms"

[[workload]]
name = "web"
units = ["nginx"]
on_stop = "restart"
health = "http://127.0.0.1/"
health_every = "500ms"
health_deadline = "500ms"
health_grace = "1s"

[[workload]]
name = "site"
units = ["httpd"]
health = "http://127.0.0.1:8080/"
"#;

/// What is done, in the words of a shell, and what is shown of it.
struct Act {
    host: usize,
    what: &'static str,
    unit: &'static str,
    script: &'static str,
    /// The event that ends it.
    until: &'static str,
}

const NGINX: &str = "nginx.service";
const APACHE: &str = "apache2.service";
const ACTS: [Act; 7] = [
    Act {
        host: 0,
        what: "kill -9 of nginx's main process",
        unit: NGINX,
        script: "kill -9 $(systemctl show -P MainPID nginx)",
        until: "healed",
    },
    Act {
        host: 1,
        what: "kill -9 of all of nginx",
        unit: NGINX,
        script: "ftctl inject kill nginx --whole",
        until: "healed",
    },
    Act { host: 0, what: "nginx hangs", unit: NGINX, script: "ftctl inject hang nginx", until: "healed" },
    Act {
        host: 1,
        what: "the OOM killer takes nginx",
        unit: NGINX,
        script: "ftctl inject oom nginx",
        until: "healed",
    },
    Act {
        host: 0,
        what: "systemctl stop nginx (on_stop = \"restart\")",
        unit: NGINX,
        script: "systemctl stop nginx",
        until: "healed",
    },
    Act {
        host: 1,
        what: "apache2 crashes (its unit has Restart=on-abort)",
        unit: APACHE,
        script: "ftctl inject kill httpd --signal SEGV",
        until: "healed",
    },
    Act {
        host: 0,
        what: "systemctl stop apache2 (on_stop = \"respect\")",
        unit: APACHE,
        script: "systemctl stop apache2",
        until: "left",
    },
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let base = Base::find()?;
    let lab = if arguments.down { Lab::on(base)? } else { Lab::for_a_show(BY_HAND, base)? };
    let names = ["vm1", "vm2"];
    println!("booting {} with ftd, nginx and apache2 ...", names.join(" and "));
    let mut hosts = Vec::new();
    for name in names {
        hosts.push(lab.boot(name, BootOptions::with_config(CONFIG))?);
    }
    let mut watched = Vec::new();
    for host in &hosts {
        host.wait_running()?;
        watched.push((Events::follow(host)?, shown(host)?));
    }
    for (host, (events, _)) in hosts.iter().zip(&mut watched) {
        events.until_proven(host, 2)?;
    }
    let mut rows = Vec::new();
    for act in &ACTS {
        let host = &hosts[act.host];
        println!("\n=== {}: {}", host.name(), act.what);
        let events = &mut watched[act.host].0;
        host.sh(act.script)?;
        let end = events.wait_for(act.until, act.unit)?;
        let said = events.about(&end);
        rows.push(row(host, act, &said));
        events.until_settled(host, Duration::from_secs(1))?;
    }
    println!(
        "\n{:<5} {:<48} {:<11} {:>12} {:>10}  by",
        "host", "what was done", "ftd saw", "decided in", "healed in"
    );
    for row in rows {
        println!("{row}");
    }
    for (_, mut follower) in watched {
        follower.kill()?;
        follower.wait()?;
    }
    if arguments.down {
        return lab.down();
    }
    lab.leave()?;
    println!(
        "\nThe hosts are up. Look around:\n  \
         cargo xtask hosts sh vm1                               a shell on vm1 (then: ftctl status)\n  \
         cargo xtask hosts sh vm1 -- ftctl events --last 100    all that ftd said\n  \
         cargo xtask hosts sh vm2 -- ftctl inject kill nginx    break it again\n  \
         cargo xtask hosts down                                 end them"
    );
    Ok(())
}

fn row(host: &Host, act: &Act, said: &Said) -> String {
    let micros = |us: u64| if us < 10_000 { format!("{us} us") } else { format!("{} ms", us / 1000) };
    let decided = said.decided_us.map_or_else(|| "-".into(), micros);
    let healed = said.healed_ms.map_or_else(|| "-".into(), |ms| format!("{ms} ms"));
    let (cause, by) = (said.cause.as_deref().unwrap_or("a stop"), said.by.as_deref().unwrap_or("left down"));
    format!("{:<5} {:<48} {cause:<11} {decided:>12} {healed:>10}  {by}", host.name(), act.what)
}

/// Prints what ftd on a host says, as people see it, while it says it.
fn shown(host: &Host) -> Result<Child> {
    let mut child = host.spawn(["ftctl", "events", "--follow"])?;
    let stdout = child.stdout.take().context("the follower has no output")?;
    let name = host.name().to_owned();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("{name}  {line}");
        }
    });
    Ok(child)
}
