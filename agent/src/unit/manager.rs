//! The conversation with systemd's manager object.
//!
//! One task holds the connection and reads every message in the order in which systemd sent it:
//! property changes become [`UnitView`]s, ends of jobs wake those who wait for them. That order matters:
//! systemd sends a unit's new state before the end of the job that brought it about, and so does this
//! task. A look at a unit is newer than the changes that still wait to be read: these are told by the serial
//! numbers of the messages, which systemd gives out in order, and left out. When the connection breaks (bus restart, `daemon-reexec`) it says so, connects again, and
//! starts from a fresh look at every unit, so nothing that happened meanwhile is missed.

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_util::StreamExt as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use zbus::{
    Connection, Message, MessageStream, OwnedObjectPath, OwnedVariant, Variant,
    message::{Flags, Type},
};

use super::{UnitView, alias, direct};

const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// The socket on which PID 1 itself listens for root.
const PRIVATE_SOCKET: &str = "/run/systemd/private";
/// First and longest wait between attempts to connect again.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How long systemd may take to answer one call.
const CALL_LIMIT: Duration = Duration::from_secs(25);
/// Ends of jobs remembered for those who ask after the fact.
const ENDED_JOBS: usize = 256;

/// What the conversation tells.
#[derive(Debug)]
pub enum Report {
    /// A unit's current state.
    View {
        /// Index in the list of units.
        unit: usize,
        /// The name that systemd itself uses.
        id: String,
        /// The state.
        view: UnitView,
    },
    /// The connection is gone.
    Lost(String),
    /// It is back, after this long.
    Back(Duration),
}

/// Why a unit could not be told to do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// A job that contradicts it is queued, such as a stop.
    #[error("another job is queued for it: {0}")]
    Contradicts(String),
    /// systemd refuses.
    #[error("systemd refuses: {0}")]
    Refused(String),
    /// No connection to systemd.
    #[error("systemd cannot be reached: {0}")]
    Unreachable(String),
    /// The job was not over in time; it may still be.
    #[error("not over after {}", humantime::format_duration(*.0))]
    TooLate(Duration),
}

/// A handle to the conversation; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Systemd {
    connection: Arc<Mutex<Option<Connection>>>,
    looked: Arc<watch::Sender<bool>>,
    jobs: Arc<Mutex<Jobs>>,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: HashMap<OwnedObjectPath, oneshot::Sender<String>>,
    ended: VecDeque<(OwnedObjectPath, String)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Systemd {
    /// Whether there is a connection.
    pub fn connected(&self) -> bool {
        lock(&self.connection).is_some()
    }

    /// Waits until every unit has been looked at for the first time.
    pub async fn looked(&self) {
        // The sender lives as long as this handle.
        let _ = self.looked.subscribe().wait_for(|looked| *looked).await;
    }

    fn connection(&self) -> Result<Connection, JobError> {
        lock(&self.connection).clone().ok_or_else(|| JobError::Unreachable("not connected".into()))
    }

    /// Holds the conversation about `units` for ever, telling `sink` what is learned.
    pub async fn converse(&self, units: Vec<String>, sink: impl Fn(Report)) {
        let (mut wait, mut lost_at) = (RECONNECT.0, None::<Instant>);
        loop {
            let cause = match self.session(&units, &sink, &mut lost_at, &mut wait).await {
                Ok(()) => "systemd closed the connection".to_owned(),
                Err(error) => error.to_string(),
            };
            *lock(&self.connection) = None;
            lock(&self.jobs).waiting.clear();
            if lost_at.is_none() {
                lost_at = Some(Instant::now());
                sink(Report::Lost(cause));
            }
            // Nothing announces that PID 1 listens again, so this one wait is timed.
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RECONNECT.1);
        }
    }

    /// Does something with a conversation about no units in particular: for commands, which have no other.
    pub async fn alone<T>(work: impl AsyncFnOnce(&Self) -> T) -> Result<T, JobError> {
        let systemd = Self::default();
        let cause = Mutex::new("no answer".to_owned());
        let conversation = systemd.converse(Vec::new(), |report| {
            if let Report::Lost(text) = report {
                *lock(&cause) = text;
            }
        });
        let unreachable = || JobError::Unreachable(lock(&cause).clone());
        tokio::select! {
            () = conversation => Err(unreachable()),
            done = async {
                timeout(CALL_LIMIT, systemd.looked()).await.map_err(|_| unreachable())?;
                Ok(work(&systemd).await)
            } => done,
        }
    }

    async fn session(
        &self,
        units: &[String],
        sink: &impl Fn(Report),
        lost_at: &mut Option<Instant>,
        wait: &mut Duration,
    ) -> zbus::Result<()> {
        let connection = connect().await?;
        let (_reading, mut messages) = read_ahead(MessageStream::from(&connection));
        call(&connection, PATH, MANAGER, "Subscribe", &()).await?;
        let mut book = Book::default();
        for (index, name) in units.iter().enumerate() {
            book.look_up(&connection, index, name).await?;
        }
        *lock(&self.connection) = Some(connection.clone());
        if let Some(since) = lost_at.take() {
            sink(Report::Back(since.elapsed()));
        }
        *wait = RECONNECT.0;
        for index in 0..units.len() {
            book.report(index, sink);
        }
        self.looked.send_replace(true);
        while let Some(message) = messages.recv().await {
            let message = message?;
            if message.message_type() != Type::Signal {
                continue;
            }
            let header = message.header();
            let (Some(member), Some(path)) = (header.member(), header.path()) else { continue };
            match member.as_str() {
                "PropertiesChanged" => {
                    if let Some(index) = book.index_of(path.as_str())
                        && book.pages[index].apply(&message)?
                    {
                        book.report(index, sink);
                    }
                }
                "JobRemoved" => {
                    let body = message.body();
                    let (_, job, _, result): (u32, OwnedObjectPath, String, String) = body.deserialize()?;
                    lock(&self.jobs).end(job, result);
                }
                "UnitNew" => {
                    let body = message.body();
                    let (id, new): (String, OwnedObjectPath) = body.deserialize()?;
                    let ours = book.index_of(new.as_str()).or_else(|| book.index_of_name(units, &id));
                    if let Some(index) = ours
                        && is_loaded(&connection, &id).await?
                    {
                        book.look_up(&connection, index, &units[index]).await?;
                        book.report(index, sink);
                    }
                }
                // The end of a daemon-reload: unit files may say something else now.
                "Reloading" if !message.body().deserialize::<bool>()? => {
                    for (index, name) in units.iter().enumerate() {
                        book.look_up(&connection, index, name).await?;
                        book.report(index, sink);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Clears a unit's failure and start-limit counters and starts it, unless a contradicting job is
    /// queued; answers the job's result.
    pub async fn start(&self, unit: &str, limit: Duration) -> Result<String, JobError> {
        let connection = self.connection()?;
        let reset = Message::method_call(PATH, "ResetFailedUnit")
            .destination(NAME)
            .interface(MANAGER)
            .with_flags(Flags::NO_REPLY_EXPECTED)
            .build(&(unit,));
        if let Ok(reset) = reset {
            // Sent first on the same connection, so done first. It fails only for a unit that is not
            // loaded, and such a unit has no counters.
            let _ = connection.send(&reset).await;
        }
        self.job(&connection, "StartUnit", unit, "fail", limit).await
    }

    /// Clears a unit's failure and start-limit counters; nothing happens to one that is not loaded.
    pub async fn reset_failed(&self, unit: &str) {
        if let Ok(connection) = self.connection()
            && let Err(error) = call(&connection, PATH, MANAGER, "ResetFailedUnit", &(unit,)).await
        {
            tracing::debug!(unit, %error, "its failure is not cleared");
        }
    }

    /// Stops a unit, replacing what is queued for it; answers the job's result.
    pub async fn stop(&self, unit: &str, limit: Duration) -> Result<String, JobError> {
        self.job(&self.connection()?, "StopUnit", unit, "replace", limit).await
    }

    /// Restarts a unit unless a contradicting job is queued; what has not stopped after `kill_after` is
    /// killed. Answers the job's result.
    pub async fn restart(
        &self,
        unit: &str,
        kill_after: Duration,
        limit: Duration,
    ) -> Result<String, JobError> {
        let connection = self.connection()?;
        let job = self.job(&connection, "RestartUnit", unit, "fail", limit);
        tokio::pin!(job);
        if let Ok(result) = timeout(kill_after, &mut job).await {
            return result;
        }
        let old_run = self.state(unit).await;
        if old_run.is_ok_and(|state| state == "deactivating") {
            let kill = (unit, "all", libc::SIGKILL);
            if let Err(error) = call(&connection, PATH, MANAGER, "KillUnit", &kill).await {
                tracing::warn!(unit, %error, "what does not stop cannot be killed");
            }
        }
        job.await
    }

    /// Has a running unit take its configuration over: reloads it, or restarts it where it cannot be reloaded; one that
    /// does not run is left alone. Answers the job's result.
    pub async fn reload_or_restart(&self, unit: &str, limit: Duration) -> Result<String, JobError> {
        self.job(&self.connection()?, "ReloadOrTryRestartUnit", unit, "fail", limit).await
    }

    /// Restarts a unit that runs; one that does not is left alone. Answers the job's result.
    pub async fn try_restart(&self, unit: &str, limit: Duration) -> Result<String, JobError> {
        self.job(&self.connection()?, "TryRestartUnit", unit, "fail", limit).await
    }

    /// Runs a command once as a unit of its own, outside of ftd's sandbox; answers whether it ended without an error.
    pub async fn run_once(&self, unit: &str, command: Command<'_>) -> Result<bool, JobError> {
        let Command { words, environment, says, limit } = command;
        let program = words.first().ok_or_else(|| JobError::Refused("there is no command".into()))?;
        let exec = vec![(program.clone(), words.to_vec(), false)];
        let microseconds = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX);
        let says = says.to_string_lossy().into_owned();
        let properties = vec![
            ("Description", Variant::from("A check of files, for ftd")),
            ("Type", Variant::from("oneshot")),
            ("CollectMode", Variant::from("inactive-or-failed")),
            ("TimeoutStartUSec", Variant::from(microseconds)),
            ("StandardOutputFile", Variant::from(says.clone())),
            ("StandardErrorFile", Variant::from(says)),
            ("Environment", Variant::from(environment.to_vec())),
            ("ExecStart", Variant::from(exec)),
        ];
        let auxiliary = Vec::<(String, Vec<(String, Variant<'_>)>)>::new();
        let connection = self.connection()?;
        let arguments = (unit, "fail", properties, auxiliary);
        let reply = call(&connection, PATH, MANAGER, "StartTransientUnit", &arguments).await;
        // systemd ends it at the limit, and says so a little later.
        let result = self.ended(body(&reply.map_err(refusal)?)?, limit + CALL_LIMIT).await?;
        Ok(result == "done")
    }

    /// `ActiveState` of a unit, asked for now.
    pub async fn state(&self, unit: &str) -> Result<String, JobError> {
        let connection = self.connection()?;
        let path: OwnedObjectPath =
            body(&call(&connection, PATH, MANAGER, "LoadUnit", &(unit,)).await.map_err(refusal)?)?;
        let reply = call(&connection, path.as_str(), PROPERTIES, "Get", &(UNIT, "ActiveState")).await;
        let value: OwnedVariant = body(&reply.map_err(refusal)?)?;
        String::try_from(value).map_err(|error| JobError::Refused(error.to_string()))
    }

    /// What a snapshot must know of a service, asked for now. An error if systemd does not know it.
    pub async fn service(&self, unit: &str) -> Result<Service, JobError> {
        let connection = self.connection()?;
        let path: OwnedObjectPath =
            body(&call(&connection, PATH, MANAGER, "LoadUnit", &(unit,)).await.map_err(refusal)?)?;
        let mut service = Service { id: unit.to_owned(), ..Service::default() };
        for interface in [UNIT, SERVICE] {
            let reply = call(&connection, path.as_str(), PROPERTIES, "GetAll", &(interface,)).await;
            service.take(body(&reply.map_err(refusal)?)?);
        }
        if service.load_state == "loaded" {
            Ok(service)
        } else {
            Err(JobError::Refused(format!("{unit} is {}", service.load_state)))
        }
    }

    /// How a unit's present run relates to its files, asked for now.
    pub async fn run_of(&self, unit: &str) -> Result<Run, JobError> {
        let connection = self.connection()?;
        let path: OwnedObjectPath =
            body(&call(&connection, PATH, MANAGER, "LoadUnit", &(unit,)).await.map_err(refusal)?)?;
        let get = async |name: &str| -> Result<OwnedVariant, JobError> {
            let reply = call(&connection, path.as_str(), PROPERTIES, "Get", &(UNIT, name)).await;
            body(&reply.map_err(refusal)?)
        };
        let odd = |error: zbus::Error| JobError::Refused(format!("odd answer: {error}"));
        let changed = bool::try_from(get("NeedDaemonReload").await?).map_err(odd)?;
        // What systemd could not load it does not compare with what is there now.
        let state = String::try_from(get("LoadState").await?).map_err(odd)?;
        let needs_reload = changed || matches!(state.as_str(), "not-found" | "bad-setting" | "error");
        let microseconds = u64::try_from(get("InactiveExitTimestamp").await?).map_err(odd)?;
        Ok(Run { needs_reload, began: UNIX_EPOCH + Duration::from_micros(microseconds) })
    }

    /// Has systemd read all unit files anew (daemon-reload). It answers when it is done.
    pub async fn reload_files(&self) -> Result<(), JobError> {
        call(&self.connection()?, PATH, MANAGER, "Reload", &()).await.map(drop).map_err(refusal)
    }

    /// systemd's version.
    pub async fn version(&self) -> Result<String, JobError> {
        let reply = call(&self.connection()?, PATH, PROPERTIES, "Get", &(MANAGER, "Version")).await;
        let value: OwnedVariant = body(&reply.map_err(refusal)?)?;
        String::try_from(value).map_err(|error| JobError::Refused(error.to_string()))
    }

    async fn job(
        &self,
        connection: &Connection,
        method: &str,
        unit: &str,
        mode: &str,
        limit: Duration,
    ) -> Result<String, JobError> {
        let reply = call(connection, PATH, MANAGER, method, &(unit, mode)).await.map_err(refusal)?;
        self.ended(body(&reply)?, limit).await
    }

    /// Waits for the end of a job; answers its result.
    async fn ended(&self, job: OwnedObjectPath, limit: Duration) -> Result<String, JobError> {
        let (sender, end) = oneshot::channel();
        if let Some(result) = lock(&self.jobs).wait_for(&job, sender) {
            return Ok(result);
        }
        match timeout(limit, end).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => Err(JobError::Unreachable("the connection broke while the job ran".into())),
            Err(_) => {
                lock(&self.jobs).waiting.remove(&job);
                Err(JobError::TooLate(limit))
            }
        }
    }
}

/// A command that runs once.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    /// The program, with its directory, and its arguments.
    pub words: &'a [String],
    /// `NAME=value`, besides what systemd sets.
    pub environment: &'a [&'a str],
    /// The file into which all goes that it says; it need not be there.
    pub says: &'a Path,
    /// How long it may take.
    pub limit: Duration,
}

/// A unit's present, or last, run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// systemd has read other unit files than there are now.
    pub needs_reload: bool,
    /// When it was started; 1970 if never.
    pub began: SystemTime,
}

/// A service, as far as dumping and restoring it are concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// systemd's own name for it.
    pub id: String,
    /// `loaded`, `not-found`, …
    pub load_state: String,
    /// `active`, `inactive`, …
    pub active_state: String,
    /// Main process id, 0 when it has none.
    pub main_pid: u32,
    /// Its cgroup below the cgroup2 mount.
    pub control_group: String,
    /// Units that start it: timers, paths, sockets.
    pub triggered_by: Vec<String>,
    /// `PIDFile=`.
    pub pid_file: Option<String>,
    /// `SyslogIdentifier=`.
    pub syslog_identifier: Option<String>,
    /// The program of `ExecStart=`.
    pub program: Option<String>,
    /// Whether it has a /tmp of its own.
    pub private_tmp: bool,
    /// `RuntimeDirectory=`, below /run.
    pub runtime_directories: Vec<String>,
    /// `RootDirectory=` or `RootImage=`.
    pub root: Option<String>,
    /// `DynamicUser=`.
    pub dynamic_user: bool,
    /// `ProcSubset=`.
    pub proc_subset: String,
    /// `ProtectKernelTunables=`.
    pub protect_tunables: bool,
    /// `ProtectControlGroups=`.
    pub protect_control_groups: bool,
    /// `ProtectKernelLogs=`.
    pub protect_logs: bool,
    /// `PrivateDevices=`.
    pub private_devices: bool,
    /// `WatchdogSec=`, as it is in force.
    pub watchdog: Option<Duration>,
}

impl Service {
    fn take(&mut self, properties: HashMap<String, OwnedVariant>) {
        /// `ExecStart=`: program, arguments, whether to ignore failure, and seven things on its last run.
        type Command = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);
        let text = |value: OwnedVariant| String::try_from(value).ok().filter(|text| !text.is_empty());
        let yes = |value: OwnedVariant| bool::try_from(value).unwrap_or(false);
        for (name, value) in properties {
            match name.as_str() {
                "Id" => set(&mut self.id, value),
                "LoadState" => set(&mut self.load_state, value),
                "ActiveState" => set(&mut self.active_state, value),
                "MainPID" => set(&mut self.main_pid, value),
                "ControlGroup" => set(&mut self.control_group, value),
                "TriggeredBy" => self.triggered_by = <Vec<String>>::try_from(value).unwrap_or_default(),
                "PIDFile" => self.pid_file = text(value),
                "SyslogIdentifier" => self.syslog_identifier = text(value),
                "ExecStart" => {
                    let commands = <Vec<Command>>::try_from(value).unwrap_or_default();
                    self.program = commands.into_iter().next().map(|command| command.0);
                }
                "PrivateTmp" => self.private_tmp = yes(value),
                "RuntimeDirectory" => {
                    self.runtime_directories = <Vec<String>>::try_from(value).unwrap_or_default();
                }
                "RootDirectory" | "RootImage" => {
                    // Each unit has both properties; an unset one says nothing, or `/`.
                    if let Some(root) = text(value).filter(|root| root != "/") {
                        self.root = Some(root);
                    }
                }
                "DynamicUser" => self.dynamic_user = yes(value),
                "ProcSubset" => set(&mut self.proc_subset, value),
                "ProtectKernelTunables" => self.protect_tunables = yes(value),
                "ProtectControlGroups" => self.protect_control_groups = yes(value),
                "ProtectKernelLogs" => self.protect_logs = yes(value),
                "PrivateDevices" => self.private_devices = yes(value),
                "WatchdogUSec" => {
                    let limit = u64::try_from(value).ok().filter(|limit| !matches!(*limit, 0 | u64::MAX));
                    self.watchdog = limit.map(Duration::from_micros);
                }
                _ => {}
            }
        }
    }
}

impl Jobs {
    fn end(&mut self, job: OwnedObjectPath, result: String) {
        if let Some(waiting) = self.waiting.remove(&job) {
            // He who no longer waits has given up.
            let _ = waiting.send(result);
            return;
        }
        // The end may be read before the answer that names the job has reached the caller.
        if self.ended.len() == ENDED_JOBS {
            self.ended.pop_front();
        }
        self.ended.push_back((job, result));
    }

    fn wait_for(&mut self, job: &OwnedObjectPath, waiting: oneshot::Sender<String>) -> Option<String> {
        if let Some(at) = self.ended.iter().position(|(ended, _)| ended == job) {
            return self.ended.remove(at).map(|(_, result)| result);
        }
        self.waiting.insert(job.clone(), waiting);
        None
    }
}

/// Whether systemd holds a unit in memory; asking does not change that. To look a unit up that does not exist
/// makes systemd announce it, and forget it again; were it looked up for that announcement, it would never end.
async fn is_loaded(connection: &Connection, id: &str) -> zbus::Result<bool> {
    match call(connection, PATH, MANAGER, "GetUnit", &(id,)).await {
        Ok(_) => Ok(true),
        Err(zbus::Error::MethodError(..)) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn connect() -> zbus::Result<Connection> {
    if Path::new(PRIVATE_SOCKET).exists() {
        match direct::connect(Path::new(PRIVATE_SOCKET)).await {
            Ok(connection) => return Ok(connection),
            Err(error) => tracing::debug!(%error, "{PRIVATE_SOCKET} refuses; trying the system bus"),
        }
    }
    let connection = Connection::system().await?;
    let rule = zbus::MatchRule::builder().msg_type(Type::Signal).sender(NAME).build()?;
    zbus::fdo::DBusProxy::new(&connection).await?.add_match_rule(rule).await?;
    Ok(connection)
}

/// Takes messages off the connection whatever happens, in a task that ends with the returned set. A
/// connection whose signals nobody takes delivers no answers either, and after a daemon-reload systemd sends
/// hundreds of signals while this session is asking about its units.
fn read_ahead(mut messages: MessageStream) -> (JoinSet<()>, mpsc::UnboundedReceiver<zbus::Result<Message>>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut reading = JoinSet::new();
    reading.spawn(async move {
        while let Some(message) = messages.next().await {
            if sender.send(message).is_err() {
                return;
            }
        }
    });
    (reading, receiver)
}

async fn call<B>(
    connection: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    body: &B,
) -> zbus::Result<Message>
where
    B: serde::Serialize + zbus::DynamicType,
{
    let answer = connection.call_method(Some(NAME), path, Some(interface), method, body);
    timeout(CALL_LIMIT, answer)
        .await
        .map_err(|_| zbus::Error::Failure(format!("no answer to {method} within {CALL_LIMIT:?}")))?
}

fn body<T>(message: &Message) -> Result<T, JobError>
where
    T: for<'a> zbus::zvariant::DynamicDeserialize<'a>,
{
    message.body().deserialize().map_err(|error| JobError::Refused(format!("odd answer: {error}")))
}

fn refusal(error: zbus::Error) -> JobError {
    match error {
        zbus::Error::MethodError(name, text, _) => {
            let text = text.unwrap_or_else(|| name.to_string());
            match name.as_str().rsplit('.').next() {
                Some("TransactionIsDestructive" | "TransactionJobsConflicting") => {
                    JobError::Contradicts(text)
                }
                _ => JobError::Refused(text),
            }
        }
        // The connection is broken, and the conversation is about to find that out too.
        zbus::Error::InputOutput(error) => JobError::Unreachable(error.to_string()),
        other => JobError::Refused(other.to_string()),
    }
}

/// What is known of each unit during one session.
#[derive(Debug, Default)]
struct Book {
    pages: Vec<Page>,
}

#[derive(Debug, Clone, Default)]
struct Page {
    path: String,
    id: String,
    slice: String,
    view: UnitView,
    /// The serial numbers of the messages in which the unit's, and the service's, properties were read.
    read: (u32, u32),
}

impl Book {
    fn index_of(&self, path: &str) -> Option<usize> {
        self.pages.iter().position(|page| page.path == path)
    }

    /// A unit that appears under a name that was asked for, or under another name of the same service.
    fn index_of_name(&self, units: &[String], id: &str) -> Option<usize> {
        let asked = |name: &String| name == id || alias::others(name).any(|other| other == id);
        let index = units.iter().position(asked)?;
        (!self.pages[index].view.is_loaded()).then_some(index)
    }

    /// Reads all of a unit's properties anew.
    async fn look_up(&mut self, connection: &Connection, index: usize, name: &str) -> zbus::Result<()> {
        let mut page = Page::read(connection, name).await?;
        if page.view.load_state == "not-found" {
            for other in alias::others(name) {
                let candidate = Page::read(connection, other).await?;
                if candidate.view.load_state != "not-found" {
                    page = candidate;
                    break;
                }
            }
        }
        if self.pages.len() <= index {
            self.pages.resize_with(index + 1, Page::default);
        }
        self.pages[index] = page;
        Ok(())
    }

    fn report(&self, index: usize, sink: &impl Fn(Report)) {
        let Page { id, view, .. } = &self.pages[index];
        sink(Report::View { unit: index, id: id.clone(), view: view.clone() });
    }
}

impl Page {
    async fn read(connection: &Connection, name: &str) -> zbus::Result<Self> {
        let reply = call(connection, PATH, MANAGER, "LoadUnit", &(name,)).await?;
        let path: OwnedObjectPath = reply.body().deserialize()?;
        let mut page = Self { path: path.to_string(), id: name.to_owned(), ..Self::default() };
        let of = |interface: &'static str| {
            let path = page.path.clone();
            async move { call(connection, &path, PROPERTIES, "GetAll", &(interface,)).await }
        };
        let (unit, service) = (of(UNIT).await?, of(SERVICE).await);
        page.read.0 = serial(&unit);
        page.take(unit.body().deserialize()?);
        // Only services have these; of other kinds there is no main process to watch.
        if let Ok(service) = service {
            page.read.1 = serial(&service);
            page.take(service.body().deserialize()?);
        }
        Ok(page)
    }

    /// Takes over changed properties, unless they are older than what was read; answers whether there were any of
    /// interest.
    fn apply(&mut self, message: &Message) -> zbus::Result<bool> {
        let body = message.body();
        let (interface, changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            body.deserialize()?;
        let read = if interface == SERVICE { self.read.1 } else { self.read.0 };
        if serial(message) < read {
            return Ok(false);
        }
        let before = self.view.clone();
        self.take(changed);
        Ok(self.view != before)
    }

    fn take(&mut self, properties: HashMap<String, OwnedVariant>) {
        let view = &mut self.view;
        for (name, value) in properties {
            match name.as_str() {
                "Id" => set(&mut self.id, value),
                "Slice" => set(&mut self.slice, value),
                "LoadState" => set(&mut view.load_state, value),
                "LoadError" => {
                    if let Ok((_, text)) = <(String, String)>::try_from(value) {
                        view.load_error = text;
                    }
                }
                "ActiveState" => set(&mut view.active_state, value),
                "SubState" => set(&mut view.sub_state, value),
                "Result" => set(&mut view.result, value),
                "MainPID" => set(&mut view.main_pid, value),
                "ControlGroup" => set(&mut view.control_group, value),
                "Job" => {
                    if let Ok((id, _)) = <(u32, OwnedObjectPath)>::try_from(value) {
                        view.job = id;
                    }
                }
                "ActiveEnterTimestampMonotonic" => set(&mut view.active_enter, value),
                "InactiveExitTimestampMonotonic" => set(&mut view.inactive_exit, value),
                "NRestarts" => set(&mut view.n_restarts, value),
                "Restart" => set(&mut view.restart, value),
                "RestartUSec" => set(&mut view.restart_usec, value),
                "ExecMainCode" => set(&mut view.exec_main_code, value),
                "ExecMainPID" => set(&mut view.exec_main_pid, value),
                "ExecMainStatus" => set(&mut view.exec_main_status, value),
                "MemoryMax" => set(&mut view.memory_max, value),
                _ => {}
            }
        }
        // systemd does not announce a change of the cgroup, but where it will be is known beforehand.
        if view.control_group.is_empty() && view.load_state == "loaded" {
            view.control_group = format!("{}/{}", slice_path(&self.slice), self.id);
        }
    }
}

/// The number that the sender gave to a message: it counts them, see the D-Bus specification, "Header Fields".
fn serial(message: &Message) -> u32 {
    message.primary_header().serial_num().get()
}

fn set<T: TryFrom<OwnedVariant>>(field: &mut T, value: OwnedVariant) {
    if let Ok(value) = T::try_from(value) {
        *field = value;
    }
}

/// The cgroup of a slice: `a-b.slice` lies in `a.slice`, see systemd.slice(5).
fn slice_path(slice: &str) -> String {
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    if matches!(stem, "" | "-") {
        return String::new();
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    ends.fold(String::new(), |path, end| format!("{path}/{}.slice", &stem[..end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_is_older_than_the_last_look_is_left_out() {
        let change = |state: &str| {
            let changed = HashMap::from([("ActiveState", Variant::from(state))]);
            let signal = Message::signal(PATH, PROPERTIES, "PropertiesChanged");
            signal.build(&(UNIT, changed, Vec::<String>::new())).unwrap()
        };
        let (old, look, new) = (change("failed"), change(""), change("inactive"));
        let mut page = Page { read: (serial(&look), serial(&look)), ..Page::default() };
        page.view.active_state = "active".into();
        assert!(!page.apply(&old).unwrap());
        assert_eq!(page.view.active_state, "active");
        assert!(page.apply(&new).unwrap());
        assert_eq!(page.view.active_state, "inactive");
    }

    #[test]
    fn a_slice_lies_in_the_slices_that_its_name_spells() {
        assert_eq!(slice_path("system.slice"), "/system.slice");
        assert_eq!(slice_path("a-b-c.slice"), "/a.slice/a-b.slice/a-b-c.slice");
        assert_eq!(slice_path("-.slice"), "");
    }

    #[test]
    fn the_end_of_a_job_is_found_whichever_comes_first() {
        let path = |n: u32| OwnedObjectPath::try_from(format!("{PATH}/job/{n}")).unwrap();
        let mut jobs = Jobs::default();
        jobs.end(path(1), "done".into());
        assert_eq!(jobs.wait_for(&path(1), oneshot::channel().0), Some("done".into()));
        let (sender, mut end) = oneshot::channel();
        assert_eq!(jobs.wait_for(&path(2), sender), None);
        jobs.end(path(2), "failed".into());
        assert_eq!(end.try_recv().unwrap(), "failed");
    }
}
