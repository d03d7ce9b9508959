//! `/etc/ftd/ftd.toml`: what an operator says.
//!
//! Every time limit and threshold of ftd is here, with its default in the `Default` of its section,
//! so that an empty file is a whole configuration. Errors name the file, the line, the cause and
//! the mend; an unknown key names the nearest known one. Values that depend on each other are checked
//! together, and the error prints the inequality.

use std::{
    collections::HashMap,
    fmt,
    net::{Ipv6Addr, SocketAddr},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use bytesize::ByteSize;
use hyper::http::uri::{Authority, PathAndQuery};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::unit::alias;

pub mod address;
pub mod cluster;
mod explain;
pub mod migrate;
pub use explain::{ConfigError, Problem};

/// Where the packaged configuration lives.
pub const DEFAULT_PATH: &str = "/etc/ftd/ftd.toml";

/// `TimeoutStartSec=` and `TimeoutStopSec=` of ftd.service.
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// `RuntimeMaxSec=` of ftd-criu@.service.
const CRIU_LIMIT: Duration = Duration::from_mins(30);

/// The whole configuration, validated.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// This host.
    pub node: Node,
    /// The API on a unix socket.
    pub api: Api,
    /// The read-only status on TCP.
    pub status: Status,
    /// The event journal.
    pub journal: Journal,
    /// The kernel probes.
    pub probe: Probe,
    /// How services are brought back.
    pub heal: Heal,
    /// Faults on purpose.
    pub inject: Inject,
    /// Snapshots.
    pub snapshot: Snapshot,
    /// The other nodes.
    pub cluster: cluster::Cluster,
    /// Services that move to other nodes.
    pub migrate: migrate::Migrate,
    /// What is under care.
    #[serde(rename = "workload")]
    pub workloads: Vec<Workload>,
}

/// `[node]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    /// Name of this host in events; the kernel's host name when empty.
    pub name: String,
    /// Where this node listens for its peers (QUIC, so a UDP port); it has none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// Journal, holds and undo records live here.
    pub state_dir: PathBuf,
    /// How long the start may wait for systemd's word on every unit before ftd counts as started.
    #[serde(with = "humantime_serde")]
    pub ready_within: Duration,
    /// How long each of the last deeds may take when ftd is told to stop: undoing faults, writing the
    /// journal, ending threads.
    #[serde(with = "humantime_serde")]
    pub stop_within: Duration,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: String::new(),
            listen: None,
            state_dir: "/var/lib/ftd".into(),
            ready_within: Duration::from_secs(5),
            stop_within: Duration::from_secs(2),
        }
    }
}

/// `[api]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// The socket that ftctl talks to.
    pub socket: PathBuf,
    /// The group that may use it, besides root.
    pub group: String,
}

impl Default for Api {
    fn default() -> Self {
        Self { socket: "/run/ftd/ftd.sock".into(), group: "ftd".into() }
    }
}

/// `[status]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Status {
    /// Address for `/healthz` and the status as JSON, for reading only; off when absent.
    pub listen: Option<SocketAddr>,
    /// At most so many connections at a time; more wait until one ends.
    pub max_connections: usize,
    /// A connection on which no request comes, or whose client takes nothing of the answer, ends after
    /// this long.
    #[serde(with = "humantime_serde")]
    pub idle: Duration,
}

impl Default for Status {
    fn default() -> Self {
        Self { listen: None, max_connections: 64, idle: Duration::from_secs(10) }
    }
}

/// `[journal]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// All segments together never exceed this. At least 1 MiB.
    pub max_size: ByteSize,
    /// How many events wait in memory while the disk refuses them; then the oldest are lost, and counted.
    pub backlog: usize,
    /// How long a refused write waits before it is tried again.
    #[serde(with = "humantime_serde")]
    pub retry: Duration,
}

impl Default for Journal {
    fn default() -> Self {
        Self { max_size: ByteSize::mib(64), backlog: 100_000, retry: Duration::from_secs(1) }
    }
}

/// `[probe]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Probe {
    /// Use eBPF. Without it ftd watches through pidfds and D-Bus.
    pub ebpf: bool,
    /// Buffer between kernel and ftd; a power of two, at least one page.
    pub ring: ByteSize,
    /// SCHED_FIFO priority of the thread that reads it, 1 to 99; 0 for none.
    pub realtime: u8,
    /// Tell of abnormal deaths outside the units under care too.
    pub elsewhere: bool,
    /// How many of these per minute become events; the rest is counted.
    pub elsewhere_per_minute: u32,
    /// How often events that were lost on the way from the kernel are looked for (it counts them, and does not
    /// announce them), and what could not be watched is tried again.
    #[serde(with = "humantime_serde")]
    pub drops_every: Duration,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            ebpf: true,
            ring: ByteSize::mib(4),
            realtime: 10,
            elsewhere: true,
            elsewhere_per_minute: 60,
            drops_every: Duration::from_secs(5),
        }
    }
}

/// `[heal]`: how a service that is down is brought back.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Heal {
    /// At most this many start attempts `within`; one more and the unit is `failed`, until a person acts.
    pub restarts: u32,
    /// The window of `restarts`.
    #[serde(with = "humantime_serde")]
    pub within: Duration,
    /// Wait before the second attempt in a row; the first is immediate. Doubled for each further one.
    #[serde(with = "humantime_serde")]
    pub backoff: Duration,
    /// The longest wait.
    #[serde(with = "humantime_serde")]
    pub backoff_max: Duration,
    /// A service that has been up this long has settled: back-off begins anew.
    #[serde(with = "humantime_serde")]
    pub settle: Duration,
    /// How long systemd may take for a start before the attempt counts as failed.
    #[serde(with = "humantime_serde")]
    pub start_deadline: Duration,
    /// A hung service is told to stop; if it has not after this long, it is killed.
    #[serde(with = "humantime_serde")]
    pub kill_after: Duration,
    /// How much longer than its own RestartSec= systemd may take to restart a unit by itself, before
    /// ftd steps in.
    #[serde(with = "humantime_serde")]
    pub systemd_grace: Duration,
}

impl Default for Heal {
    fn default() -> Self {
        Self {
            restarts: 5,
            within: Duration::from_mins(1),
            backoff: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            settle: Duration::from_secs(10),
            start_deadline: Duration::from_secs(90),
            kill_after: Duration::from_secs(2),
            systemd_grace: Duration::from_secs(2),
        }
    }
}

/// `[workload.heal]`: see [`Heal`], key by key.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each key is documented in Heal")]
pub struct HealOverride {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u32>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub within: Option<Duration>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Duration>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub backoff_max: Option<Duration>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub settle: Option<Duration>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub start_deadline: Option<Duration>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub kill_after: Option<Duration>,
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub systemd_grace: Option<Duration>,
}

impl HealOverride {
    /// `base`, with what is said here instead.
    pub fn over(&self, base: &Heal) -> Heal {
        Heal {
            restarts: self.restarts.unwrap_or(base.restarts),
            within: self.within.unwrap_or(base.within),
            backoff: self.backoff.unwrap_or(base.backoff),
            backoff_max: self.backoff_max.unwrap_or(base.backoff_max),
            settle: self.settle.unwrap_or(base.settle),
            start_deadline: self.start_deadline.unwrap_or(base.start_deadline),
            kill_after: self.kill_after.unwrap_or(base.kill_after),
            systemd_grace: self.systemd_grace.unwrap_or(base.systemd_grace),
        }
    }
}

/// `[inject]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Inject {
    /// Whether `ftctl inject` may break things on this host. Off in the packaged configuration.
    pub enabled: bool,
    /// How long a fault lasts when no time is given for it.
    #[serde(with = "humantime_serde")]
    pub default_for: Duration,
    /// The longest time that can be given for one.
    #[serde(with = "humantime_serde")]
    pub longest: Duration,
    /// Memory that an OOM fault leaves to the unit above what it uses.
    pub oom_room: ByteSize,
    /// How long systemd may take to stop a unit, and to start it again when the fault is over.
    #[serde(with = "humantime_serde")]
    pub job_deadline: Duration,
}

impl Default for Inject {
    fn default() -> Self {
        Self {
            enabled: false,
            default_for: Duration::from_secs(30),
            longest: Duration::from_hours(1),
            oom_room: ByteSize::mib(32),
            job_deadline: Duration::from_secs(90),
        }
    }
}

/// `[snapshot]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snapshot {
    /// What all snapshots together may take on disk.
    pub quota: ByteSize,
    /// How many generations of each workload are kept; besides these, the last good one.
    pub keep: usize,
    /// Changed files are looked at when nothing has changed for this long,
    #[serde(with = "humantime_serde")]
    pub settle: Duration,
    /// but at the latest so long after the first change.
    #[serde(with = "humantime_serde")]
    pub settle_at_most: Duration,
    /// Files are good once the service has served with them for this long.
    #[serde(with = "humantime_serde")]
    pub good_after: Duration,
    /// At most so often are files put back `within`; then somebody insists, and a person is asked.
    pub put_backs: u32,
    /// See `put_backs`.
    #[serde(with = "humantime_serde")]
    pub within: Duration,
    /// Time between attempts at what did not work.
    #[serde(with = "humantime_serde")]
    pub retry: Duration,
    /// How long a checker may take.
    #[serde(with = "humantime_serde")]
    pub check_deadline: Duration,
    /// How long a service may take to take its files over.
    #[serde(with = "humantime_serde")]
    pub apply_deadline: Duration,
    /// Where the images of processes are on their way between CRIU and the store.
    pub scratch: Scratch,
    /// The longest pause after failures in a row of a scheduled snapshot; the first is `retry`, and each is twice the
    /// one before.
    #[serde(with = "humantime_serde")]
    pub retry_at_most: Duration,
    /// How long CRIU may take for one unit; what is not done by then is put back.
    #[serde(with = "humantime_serde")]
    pub process_deadline: Duration,
}

/// `snapshot.scratch`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scratch {
    /// In memory if they fit there, else on disk.
    #[default]
    Auto,
    /// In memory, below /run: the service stands still for the shortest time.
    Memory,
    /// On disk, below `node.state_dir`.
    Disk,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            quota: ByteSize::gib(4),
            keep: 10,
            settle: Duration::from_millis(500),
            settle_at_most: Duration::from_secs(5),
            good_after: Duration::from_secs(30),
            put_backs: 3,
            within: Duration::from_mins(10),
            retry: Duration::from_secs(5),
            check_deadline: Duration::from_secs(30),
            apply_deadline: Duration::from_secs(90),
            scratch: Scratch::Auto,
            retry_at_most: Duration::from_mins(5),
            process_deadline: Duration::from_mins(2),
        }
    }
}

/// `[[workload]]`: units that belong together.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Its name.
    pub name: Spanned<String>,
    /// Its systemd units, in the order in which they start. `.service` may be left out.
    pub units: Vec<Spanned<String>>,
    /// What to do when somebody stops a unit.
    #[serde(default)]
    pub on_stop: OnStop,
    /// What to do when a unit ends without an error and without being told to.
    #[serde(default = "restart")]
    pub on_exit: OnStop,
    /// How to find out whether it serves: `http://host:port/path`, `tcp://host:port`, or
    /// `exec:/path/to/command args`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Spanned<String>>,
    /// The unit that is restarted when the check fails; needed where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_unit: Option<Spanned<String>>,
    /// Time between checks.
    #[serde(default = "health_every", with = "humantime_serde")]
    pub health_every: Duration,
    /// How long one check may take.
    #[serde(default = "health_deadline", with = "humantime_serde")]
    pub health_deadline: Duration,
    /// Failures in a row that mean `hung`.
    #[serde(default = "health_failures")]
    pub health_failures: u32,
    /// Failures do not count for this long after a start.
    #[serde(default = "health_grace", with = "humantime_serde")]
    pub health_grace: Duration,
    /// Files that belong to it: absolute paths of files and directories, and patterns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Spanned<String>>,
    /// Whether the files belong to it that define its units: fragments and drop-ins, wherever they lie but below
    /// `/run`.
    #[serde(default)]
    pub unit_files: bool,
    /// What happens when they change.
    #[serde(default)]
    pub on_change: OnChange,
    /// The command that says whether they are valid, before the service takes them over; that of the first unit
    /// when absent, for services that ftd knows (nginx, apache2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<Spanned<String>>,
    /// Snapshots of it, and when they are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Schedule>,
    /// The nodes that may serve it, in order of preference: each gets its snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<Spanned<String>>,
    /// The service address, with the length of its network: on the interface of the node that serves, and on no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Spanned<String>>,
    /// `[workload.heal]`: this workload's own figures; what is left out is as in `[heal]`.
    #[serde(default)]
    pub heal: HealOverride,
}

impl Workload {
    /// Whether any files belong to it.
    pub fn has_files(&self) -> bool {
        self.unit_files || !self.files.is_empty()
    }

    /// Its service address, if it has one.
    pub fn service_address(&self) -> Option<address::Address> {
        address::Address::parse(self.address.as_ref()?.as_ref()).ok()
    }
}

fn restart() -> OnStop {
    OnStop::Restart
}
fn health_every() -> Duration {
    Duration::from_secs(2)
}
fn health_deadline() -> Duration {
    Duration::from_secs(2)
}
fn health_failures() -> u32 {
    3
}
fn health_grace() -> Duration {
    Duration::from_secs(5)
}

/// `snapshot` of a workload.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Time between snapshots; when absent, they are taken by hand.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub every: Option<Duration>,
    /// With the processes of its units, through CRIU; else its files alone.
    pub process: bool,
    /// So many of them are kept, and the last good one; `snapshot.keep` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
}

/// `on_change`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnChange {
    /// Valid changes are taken over and become good; all else is put back.
    #[default]
    Heal,
    /// Nothing: files are only kept by `ftctl snapshot`.
    Ignore,
}

/// `on_stop`, `on_exit`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// Start it again.
    Restart,
    /// It was wanted: leave it.
    #[default]
    Respect,
}

/// How to find out whether a service serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// GET this; 2xx and 3xx are good.
    Http {
        /// `host:port`
        authority: String,
        /// Path and query.
        path: String,
    },
    /// Connect to `host:port`.
    Tcp(String),
    /// Run this; exit code 0 is good.
    Exec(Vec<String>),
}

impl Check {
    /// Reads `http://host[:port]/path`, `tcp://host:port`, `exec:/path args`.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("http://") {
            let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
            let authority = with_port(authority, Some(80))?;
            PathAndQuery::try_from(path)
                .map_err(|error| format!("\"{path}\" is no path of a URL: {error} (a blank is %20)"))?;
            Ok(Self::Http { authority, path: path.to_owned() })
        } else if let Some(rest) = text.strip_prefix("tcp://") {
            Ok(Self::Tcp(with_port(rest, None)?))
        } else if let Some(rest) = text.strip_prefix("exec:") {
            let words: Vec<_> = rest.split_whitespace().map(str::to_owned).collect();
            match words.first() {
                Some(program) if program.starts_with('/') => Ok(Self::Exec(words)),
                _ => Err("the command must begin with an absolute path".into()),
            }
        } else if text.starts_with("https://") {
            Err("https is not checked by ftd; use \"tcp://host:port\", or \"exec:\" with a command".into())
        } else {
            Err("it begins with none of \"http://\", \"tcp://\", \"exec:\"".into())
        }
    }
}

/// `host:port` of `authority`, with the `default` port where it has none.
fn with_port(authority: &str, default: Option<u16>) -> Result<String, String> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            (host, Some(port.parse::<u16>().map_err(|_| format!("\"{port}\" is no port"))?))
        }
        _ => (authority, default),
    };
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match (bracketed, port) {
        _ if host.is_empty() => Err("the host is missing".to_owned()),
        (_, None | Some(0)) => Err("the port is missing".to_owned()),
        (None, _) if host.contains(':') => Err("an IPv6 address needs brackets, like [::1]".to_owned()),
        (None, _) if host.contains('@') => Err("a user or password cannot be given".to_owned()),
        (Some(inner), _) if inner.parse::<Ipv6Addr>().is_err() => {
            Err(format!("\"{inner}\" is no IPv6 address"))
        }
        (_, Some(port)) => match Authority::try_from(format!("{host}:{port}")) {
            Ok(authority) => Ok(authority.to_string()),
            Err(error) => Err(format!("\"{host}\" is no host: {error}")),
        },
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http { authority, path } => write!(f, "http://{authority}{path}"),
            Self::Tcp(authority) => write!(f, "tcp://{authority}"),
            Self::Exec(words) => write!(f, "exec:{}", words.join(" ")),
        }
    }
}

/// One unit under care, with all that its workload says of it.
#[derive(Debug, Clone)]
pub struct UnitConfig {
    /// Name with suffix, as it was configured (an alias is resolved later, by systemd).
    pub name: String,
    /// Its workload's name.
    pub workload: String,
    /// See [`Workload::on_stop`].
    pub on_stop: OnStop,
    /// See [`Workload::on_exit`].
    pub on_exit: OnStop,
    /// Its health check, if it has one.
    pub health: Option<HealthConfig>,
    /// Its healing figures.
    pub heal: Heal,
}

/// A health check with its figures; see [`Workload`].
#[derive(Debug, Clone)]
pub struct HealthConfig {
    /// What is asked.
    pub check: Check,
    /// Time between checks.
    pub every: Duration,
    /// How long one may take.
    pub deadline: Duration,
    /// Failures in a row that mean `hung`.
    pub failures: u32,
    /// Failures do not count for this long after a start.
    pub grace: Duration,
}

/// The kinds of unit that ftd cares for.
const SUFFIXES: [&str; 3] = [".service", ".socket", ".mount"];
/// systemd's other kinds: nothing that dies and is brought back.
const OTHER_SUFFIXES: [&str; 8] =
    [".timer", ".path", ".target", ".slice", ".scope", ".device", ".swap", ".automount"];

/// The unit's name with its suffix: `nginx` means `nginx.service`.
pub fn unit_name(name: &str) -> String {
    if SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) { name.into() } else { format!("{name}.service") }
}

impl Config {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Checks a configuration text; `path` is for the errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::of_toml(&error, text, path))?;
        let problems = config.problems(text);
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid { path: path.into(), problems })
        }
    }

    /// This host's name in events.
    pub fn node_name(&self) -> String {
        if !self.node.name.is_empty() {
            return self.node.name.clone();
        }
        nix::unistd::gethostname()
            .ok()
            .and_then(|name| name.into_string().ok())
            .unwrap_or_else(|| "localhost".into())
    }

    /// Every unit under care, in the order of the file.
    pub fn units(&self) -> Vec<UnitConfig> {
        let mut units = Vec::new();
        for workload in &self.workloads {
            let checked = workload.health_unit.as_ref().or(workload.units.first());
            let checked = checked.map(|name| unit_name(name.as_ref()));
            let health = workload.health.as_ref().and_then(|text| Check::parse(text.as_ref()).ok());
            for unit in &workload.units {
                let name = unit_name(unit.as_ref());
                let health = health.as_ref().filter(|_| checked.as_ref() == Some(&name));
                units.push(UnitConfig {
                    workload: workload.name.as_ref().clone(),
                    on_stop: workload.on_stop,
                    on_exit: workload.on_exit,
                    health: health.map(|check| HealthConfig {
                        check: check.clone(),
                        every: workload.health_every,
                        deadline: workload.health_deadline,
                        failures: workload.health_failures,
                        grace: workload.health_grace,
                    }),
                    heal: workload.heal.over(&self.heal),
                    name,
                });
            }
        }
        units
    }

    fn problems(&self, text: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        let key = |path: &[&str]| explain::find(text, path);
        let mut say = |at: Option<usize>, what: String, mend: String| {
            problems.push(Problem::at(text, at, what, mend));
        };
        for (path, value) in
            [(["node", "state_dir"], &self.node.state_dir), (["api", "socket"], &self.api.socket)]
        {
            if !value.is_absolute() {
                say(
                    key(&path),
                    format!("{} = \"{}\" is no absolute path", path.join("."), value.display()),
                    "begin it with \"/\"".into(),
                );
            }
        }
        if self.journal.max_size < ByteSize::mib(1) {
            say(
                key(&["journal", "max_size"]),
                format!("journal.max_size is {}: too small to keep a useful history", self.journal.max_size),
                "use at least \"1MiB\"".into(),
            );
        }
        if self.snapshot.quota < ByteSize::mib(16) {
            say(
                key(&["snapshot", "quota"]),
                format!("snapshot.quota is {}: too little to keep anything", self.snapshot.quota),
                "use at least \"16MiB\"; its default is 4GiB".into(),
            );
        }
        if self.snapshot.keep == 0 {
            say(
                key(&["snapshot", "keep"]),
                "snapshot.keep is 0: nothing would be kept".into(),
                "use at least 1; its default is 10".into(),
            );
        }
        let snapshot = &self.snapshot;
        if snapshot.settle.is_zero() || snapshot.settle > snapshot.settle_at_most {
            let time = humantime::format_duration;
            say(
                key(&["snapshot", "settle"]),
                format!(
                    "0 < snapshot.settle <= snapshot.settle_at_most does not hold: {}, {}",
                    time(snapshot.settle),
                    time(snapshot.settle_at_most)
                ),
                "their defaults are 500ms and 5s".into(),
            );
        }
        for (name, value) in [
            ("retry", snapshot.retry),
            ("check_deadline", snapshot.check_deadline),
            ("apply_deadline", snapshot.apply_deadline),
            ("process_deadline", snapshot.process_deadline),
        ] {
            if value.is_zero() {
                say(
                    key(&["snapshot", name]),
                    format!("snapshot.{name} is 0"),
                    "give it a time above 0, or leave it out for its default".into(),
                );
            }
        }
        if snapshot.retry_at_most < snapshot.retry {
            let time = humantime::format_duration;
            say(
                key(&["snapshot", "retry_at_most"]),
                format!(
                    "snapshot.retry <= snapshot.retry_at_most does not hold: {} > {}",
                    time(snapshot.retry),
                    time(snapshot.retry_at_most)
                ),
                "their defaults are 5s and 5min".into(),
            );
        }
        if snapshot.process_deadline >= CRIU_LIMIT {
            let time = humantime::format_duration;
            say(
                key(&["snapshot", "process_deadline"]),
                format!(
                    "snapshot.process_deadline < RuntimeMaxSec of ftd-criu@.service does not hold: {} >= {}",
                    time(snapshot.process_deadline),
                    time(CRIU_LIMIT)
                ),
                "lower it; its default is 2min".into(),
            );
        }
        migrate::check(&self.migrate, |name, error, mend| say(key(&["migrate", name]), error, mend));
        let inject = &self.inject;
        if inject.default_for < Duration::from_millis(100) || inject.default_for > inject.longest {
            let time = humantime::format_duration;
            let lowered = inject.longest < Inject::default().longest;
            say(
                key(&["inject", if lowered { "longest" } else { "default_for" }]),
                format!(
                    "100ms <= inject.default_for <= inject.longest does not hold: {}, {}",
                    time(inject.default_for),
                    time(inject.longest)
                ),
                "their defaults are 30s and 1h".into(),
            );
        }
        // The helper fills 4 GiB at most, with what the unit uses already.
        if !(ByteSize::mib(8)..=ByteSize::gib(2)).contains(&inject.oom_room) {
            say(
                key(&["inject", "oom_room"]),
                format!("inject.oom_room is {}: it must be from 8MiB to 2GiB", inject.oom_room),
                "leave it out for its default, 32MiB".into(),
            );
        }
        let (ready, stop) = (self.node.ready_within, self.node.stop_within);
        let time = humantime::format_duration;
        if ready >= START_LIMIT {
            say(
                key(&["node", "ready_within"]),
                format!(
                    "node.ready_within < TimeoutStartSec of ftd.service does not hold: {} >= {}",
                    time(ready),
                    time(START_LIMIT)
                ),
                "lower it; its default is 5s".into(),
            );
        }
        if stop.is_zero() || stop.saturating_mul(3) >= STOP_LIMIT {
            say(
                key(&["node", "stop_within"]),
                format!(
                    "0 < 3 x node.stop_within < TimeoutStopSec of ftd.service does not hold: {}, and {}",
                    time(stop.saturating_mul(3)),
                    time(STOP_LIMIT)
                ),
                "give it another value; its default is 2s".into(),
            );
        }
        // ftd.service allows 8192 open files, and all else that ftd does needs some.
        if !(1..=4096).contains(&self.status.max_connections) {
            say(
                key(&["status", "max_connections"]),
                format!(
                    "status.max_connections is {}: it must be from 1 to 4096",
                    self.status.max_connections
                ),
                "leave it out for its default, 64; to have no status on TCP, leave out status.listen".into(),
            );
        }
        if !(Duration::from_millis(100)..=Duration::from_hours(1)).contains(&self.status.idle) {
            let idle = humantime::format_duration(self.status.idle);
            say(
                key(&["status", "idle"]),
                format!("status.idle is {idle}: it must be from 100ms to 1h"),
                "leave it out for its default, 10s".into(),
            );
        }
        if !(1000..=10_000_000).contains(&self.journal.backlog) {
            say(
                key(&["journal", "backlog"]),
                format!("journal.backlog is {}: it must be from 1000 to 10000000", self.journal.backlog),
                "leave it out for its default, 100000".into(),
            );
        }
        if self.journal.retry.is_zero() {
            say(
                key(&["journal", "retry"]),
                "journal.retry is zero: a full disk would be tried without pause".into(),
                "leave it out for its default, 1s".into(),
            );
        }
        let ring = self.probe.ring.as_u64();
        if !ring.is_power_of_two() || !(4096..=1 << 30).contains(&ring) {
            say(
                key(&["probe", "ring"]),
                format!("probe.ring is {}: the kernel takes powers of two from 4KiB", self.probe.ring),
                "use for example \"4MiB\"".into(),
            );
        }
        if self.probe.drops_every.is_zero() {
            say(
                key(&["probe", "drops_every"]),
                "probe.drops_every is zero: lost events would be looked for without pause".into(),
                "leave it out for its default, 5s".into(),
            );
        }
        if self.probe.realtime > 99 {
            say(
                key(&["probe", "realtime"]),
                format!("probe.realtime is {}: SCHED_FIFO priorities are 1 to 99", self.probe.realtime),
                "use 10, or 0 for none".into(),
            );
        }
        check_heal(&self.heal, "heal", text, &["heal"], &mut say);
        cluster::check(self, text, &mut say);
        let (mut names, mut units) = (HashMap::new(), HashMap::<String, (usize, &str)>::new());
        for (index, workload) in self.workloads.iter().enumerate() {
            let index = index.to_string();
            let (name, at) = (workload.name.as_ref().as_str(), workload.name.span().start);
            if name.is_empty() {
                say(Some(at), "a workload has an empty name".into(), "give it one, like \"web\"".into());
            }
            if let Some(line) = names.insert(name, explain::line_of(text, at)) {
                say(
                    Some(at),
                    format!("workload \"{name}\" is defined twice (first in line {line})"),
                    "rename one, or put their units together".into(),
                );
            }
            if let Some(check) = &workload.check
                && check.as_ref().split_whitespace().next().is_none()
            {
                say(
                    Some(check.span().start),
                    format!("workload \"{name}\" has an empty check"),
                    "give a command like \"nginx -t\", or leave it out".into(),
                );
            }
            for file in &workload.files {
                let path = Path::new(file.as_ref());
                if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
                    say(
                        Some(file.span().start),
                        format!("\"{}\" names no files: paths are absolute and without \"..\"", file.as_ref()),
                        "write it like \"/etc/nginx/nginx.conf\", \"/etc/nginx\" or \"/etc/nginx/conf.d/*.conf\""
                            .into(),
                    );
                }
            }
            if workload.units.is_empty() {
                say(
                    Some(at),
                    format!("workload \"{name}\" has no units"),
                    "name at least one, like units = [\"nginx\"]".into(),
                );
            }
            for unit in &workload.units {
                let (full, at) = (unit_name(unit.as_ref()), unit.span().start);
                if unit.as_ref().is_empty() || unit.as_ref().contains(['/', ' ', '\n', '\0']) {
                    say(
                        Some(at),
                        format!("\"{}\" is no name of a systemd unit", unit.as_ref()),
                        "names are like \"nginx\" or \"nginx.service\"; see: systemctl list-units".into(),
                    );
                }
                if let Some(suffix) = OTHER_SUFFIXES.iter().find(|suffix| unit.as_ref().ends_with(**suffix)) {
                    let stem = unit.as_ref().trim_end_matches(suffix);
                    say(
                        Some(at),
                        format!(
                            "\"{}\" cannot be cared for: ftd brings back services, sockets and mounts",
                            unit.as_ref()
                        ),
                        format!("name the service behind it, like \"{stem}.service\""),
                    );
                }
                let seen = units.get_key_value(&full);
                let seen = seen.or_else(|| alias::others(&full).find_map(|name| units.get_key_value(name)));
                if let Some((first, (line, other))) = seen {
                    let also = if *first == full { String::new() } else { format!(", there as {first}") };
                    say(
                        Some(at),
                        format!(
                            "unit {full} is listed twice (first in workload \"{other}\", line {line}{also})"
                        ),
                        "a unit belongs to one workload: remove one of the two".into(),
                    );
                } else {
                    units.insert(full, (explain::line_of(text, at), name));
                }
            }
            if let Some(health) = &workload.health {
                let at = Some(health.span().start);
                if let Err(cause) = Check::parse(health.as_ref()) {
                    say(
                        at,
                        format!("health = \"{}\" cannot be used: {cause}", health.as_ref()),
                        "write \"http://127.0.0.1/\", \"tcp://127.0.0.1:80\" or \"exec:/path/to/command\""
                            .into(),
                    );
                }
                if workload.units.len() > 1 && workload.health_unit.is_none() {
                    say(
                        at,
                        format!("workload \"{name}\" has several units: which one does the check belong to?"),
                        format!("add health_unit = \"{}\"", workload.units[0].as_ref()),
                    );
                }
            }
            if let Some(unit) = &workload.health_unit
                && !workload.units.iter().any(|u| unit_name(u.as_ref()) == unit_name(unit.as_ref()))
            {
                say(
                    Some(unit.span().start),
                    format!("health_unit = \"{}\" is not among the workload's units", unit.as_ref()),
                    "name one of them".into(),
                );
            }
            if let Some(schedule) = &workload.snapshot {
                check_schedule(workload, schedule, key(&["workload", &index, "snapshot"]), &mut say);
            }
            for (what, zero) in [
                ("health_every", workload.health_every.is_zero()),
                ("health_deadline", workload.health_deadline.is_zero()),
                ("health_failures", workload.health_failures == 0),
            ] {
                if zero {
                    let mend = format!("leave {what} out for its default, or give it a value above zero");
                    say(
                        key(&["workload", &index, what]),
                        format!("{what} of workload \"{name}\" is zero"),
                        mend,
                    );
                }
            }
            if workload.heal != HealOverride::default() {
                let heal = workload.heal.over(&self.heal);
                let section = ["workload", index.as_str(), "heal"];
                check_heal(&heal, &format!("heal of workload \"{name}\""), text, &section, &mut say);
            }
        }
        problems
    }
}

/// Checks when and of what snapshots of a workload are to be taken.
fn check_schedule(
    workload: &Workload,
    schedule: &Schedule,
    at: Option<usize>,
    say: &mut impl FnMut(Option<usize>, String, String),
) {
    let name = workload.name.as_ref();
    if schedule.every.is_some_and(|every| every < Duration::from_millis(100)) {
        let what = format!("snapshots of workload \"{name}\" would be taken more than ten times a second");
        say(at, what, "use at least every = \"100ms\"".into());
    }
    if schedule.keep == Some(0) {
        let what = format!("snapshots of workload \"{name}\": keep is 0: nothing would be kept");
        say(at, what, "use at least 1, or leave it out".into());
    }
    let other = workload.units.iter().find(|unit| !unit_name(unit.as_ref()).ends_with(".service"));
    if let Some(unit) = other.filter(|_| schedule.process) {
        let what = format!("\"{}\" of workload \"{name}\" has no processes to be saved", unit.as_ref());
        say(at, what, "set process = false, or keep to services in this workload".into());
    }
    if !workload.has_files() && !schedule.process {
        let what = format!("snapshots of workload \"{name}\" would hold nothing");
        say(at, what, "set process = true, or name files = [...]".into());
    }
}

/// Checks the figures of a heal section that stands at `path`.
fn check_heal(
    heal: &Heal,
    section: &str,
    text: &str,
    path: &[&str],
    say: &mut impl FnMut(Option<usize>, String, String),
) {
    let time = |d: Duration| humantime::format_duration(d).to_string();
    // Where the first of these keys stands that is not left out here.
    let at = |keys: &[&str]| {
        let inside = keys.iter().find_map(|key| explain::find_exact(text, &[path, &[*key]].concat()));
        inside.or_else(|| explain::find(text, path))
    };
    let zero = [
        ("within", heal.within),
        ("backoff", heal.backoff),
        ("start_deadline", heal.start_deadline),
        ("kill_after", heal.kill_after),
    ];
    for (key, _) in zero.iter().filter(|(_, value)| value.is_zero()) {
        say(at(&[key]), format!("{section}.{key} is zero"), "leave it out for its default".into());
    }
    if heal.restarts == 0 {
        let mend = "use 1 or more; to keep ftd from starting a unit, take it out of the configuration";
        say(at(&["restarts"]), format!("{section}.restarts is 0: nothing would ever be healed"), mend.into());
    }
    if heal.backoff > heal.backoff_max {
        say(
            at(&["backoff", "backoff_max"]),
            format!(
                "{section}: backoff <= backoff_max does not hold: {} > {}",
                time(heal.backoff),
                time(heal.backoff_max)
            ),
            "raise backoff_max or lower backoff".into(),
        );
    }
    let waits = least_waits(heal);
    if waits >= heal.within && !heal.within.is_zero() {
        say(
            at(&["restarts", "within", "backoff_max", "backoff", "settle"]),
            format!(
                "{section}: waits before {} attempts < within does not hold: {} >= {}: so many never fall \
                 into that time, and a unit that cannot start would be tried for ever",
                heal.restarts,
                time(waits),
                time(heal.within)
            ),
            "lower restarts, backoff or backoff_max, or raise within".into(),
        );
    }
    if heal.kill_after >= heal.start_deadline {
        say(
            at(&["kill_after", "start_deadline"]),
            format!(
                "{section}: kill_after < start_deadline does not hold: {} >= {}: a hung unit's restart \
                 would count as failed before the unit is killed",
                time(heal.kill_after),
                time(heal.start_deadline)
            ),
            "raise start_deadline or lower kill_after".into(),
        );
    }
}

/// The least time that the waits before `restarts` attempts take together: before the second `backoff`, then
/// doubled up to `backoff_max`; or `settle`, after which there is none. Where `settle` is not longer than
/// `backoff`, back-off is switched off.
fn least_waits(heal: &Heal) -> Duration {
    if heal.settle <= heal.backoff {
        return Duration::ZERO;
    }
    let longest = heal.backoff_max.min(heal.settle);
    let (mut wait, mut sum, mut left) = (heal.backoff, Duration::ZERO, heal.restarts.saturating_sub(1));
    while left > 0 && !wait.is_zero() && wait < longest {
        (sum, wait, left) = (sum.saturating_add(wait), wait.saturating_mul(2), left - 1);
    }
    sum.saturating_add(longest.saturating_mul(left))
}

#[cfg(test)]
mod tests;
