//! A lab: a bridge in a network namespace of its own, the hosts on it, and the certainty that nothing of it
//! is left once it is over.
//!
//! Everything of a lab carries its id: its directory `/run/ftd-lab/ID`, its groups `ftd-lab/ID`, its network
//! namespace `ftd-ID`, the arguments `--lab ID` of its helper processes. So [`teardown`] needs nothing but
//! the id, finds all of it in any state of disorder, and can be called again and again; [`leftovers`]
//! looks for the same things and reports them.
//!
//! Who calls it: a **keeper**, a helper process that reads from a pipe whose other end only the lab's owner
//! holds. However the owner ends (the [`Lab`] is dropped, a test panics, `exit`, Ctrl-C, SIGKILL), the
//! kernel closes that end, and the keeper tears the lab down. Dropping a [`Lab`] does just this and waits
//! for the keeper. Should even the keeper have been killed, the next lab that is made sweeps away those
//! whose owner is gone. A lab made by hand (`cargo xtask hosts up`) has no owner and no keeper; it stays
//! until `hosts down`. So does one that its owner [leaves](Lab::leave) to the person who started it.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sched::CloneFlags;

use crate::base::Base;
use crate::cgroup::Hierarchies;
use crate::command::{self, Output};
use crate::container::Spec;
use crate::host::{BootOptions, Host};
use crate::process::{self, Process};
use crate::{enter, mounts, scaled};

/// Where labs keep their state.
const STATE: &str = "/run/ftd-lab";
/// The owner of labs made by hand.
const NOBODY: &str = "nobody";
/// The owner of labs that were left for a person to look around.
const LEFT: &str = "nobody, left after a show";
/// The id of labs made by hand, unless another is given.
pub const BY_HAND: &str = "lab";
/// The client's address, on the bridge itself.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);
const PREFIX: u8 = 24;
/// PIDs of host number N start at N times this: the third host's still lie below the usual limit of 32768;
/// for more hosts some kernels must be told to have more, which the host's boot then says.
const PIDS_PER_HOST: u32 = 9000;
const TEARDOWN_LIMIT: Duration = Duration::from_secs(30);

/// A lab. Dropping it ends it, with all its hosts, unless it was made by hand.
#[derive(Debug)]
pub struct Lab {
    id: String,
    base: Base,
    hierarchies: Hierarchies,
    keeper: Option<Keeper>,
}

/// The keeper process and the pipe that it watches.
#[derive(Debug)]
struct Keeper {
    process: Child,
    pipe: ChildStdin,
}

fn dir_of(id: &str) -> PathBuf {
    Path::new(STATE).join(id)
}

fn netns_of(id: &str) -> String {
    format!("ftd-{id}")
}

/// Runs `ip` in the lab's network namespace.
pub(crate) fn ip(id: &str, words: &[&str]) -> Result<()> {
    command::ok(Command::new("ip").args(["-n", &netns_of(id)]).args(words)).map(drop)
}

/// The helper program `hosts`: this program if it is that; else what `FTD_HOSTS_BIN` names, or what Cargo
/// built for this test, or what lies in this program's directory or the one above.
pub fn helper() -> Result<PathBuf> {
    let own = std::env::current_exe().context("this program has no path")?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join("hosts"));
    let named =
        ["FTD_HOSTS_BIN", "CARGO_BIN_EXE_hosts"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    if own.file_name().is_some_and(|name| name == "hosts") {
        return Ok(own);
    }
    named.chain(beside).find(|path| path.is_file()).with_context(|| {
        format!(
            "the helper program `hosts` is not beside {}; build it with `cargo build -p ftd-tests --bin hosts`, or name it in FTD_HOSTS_BIN",
            own.display()
        )
    })
}

/// Held while labs are made or swept away.
fn lock() -> Result<Flock<File>> {
    fs::create_dir_all(STATE).with_context(|| format!("{STATE} cannot be made; test hosts need root"))?;
    let file = File::create(Path::new(STATE).join(".lock"))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context("the labs cannot be locked")
}

impl Lab {
    /// A lab with an id of its own, on [`Base::find`].
    pub fn new() -> Result<Self> {
        Self::on(Base::find()?)
    }

    /// A lab with an id of its own, on a given base.
    pub fn on(base: Base) -> Result<Self> {
        sweep()?;
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random id can be had")?;
        Self::create(&uuid[..8], base, &Process::own()?.to_string())
    }

    /// A lab that stays when this process ends, until [`teardown`]. If there is one with this id, that one.
    pub fn by_hand(id: &str, base: Base) -> Result<Self> {
        let simple = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        ensure!(
            !id.is_empty() && id.len() <= 20 && id.chars().all(simple),
            "'{id}' cannot be a lab's name: use up to 20 of a-z, 0-9 and -"
        );
        sweep()?;
        if !dir_of(id).is_dir() {
            return Self::create(id, base, NOBODY);
        }
        let _lock = lock()?;
        let lab = Self::open(id)?;
        // Whoever made it may have been ended in the middle.
        if !lab.has_network() {
            eprintln!("lab {id}: it has no network; making it");
            lab.network()?;
        }
        Ok(lab)
    }

    /// A lab with this id that ends with this process, unless it is [left](Self::leave). One that was left
    /// earlier makes room for it; any other lab with this id stays, and is an error.
    pub fn for_a_show(id: &str, base: Base) -> Result<Self> {
        sweep()?;
        let keeper = process::with_arguments(&["keep", "--lab", id]);
        match owner_of(id) {
            Owner::None => {}
            Owner::Left => {
                eprintln!("lab {id}: it was left after an earlier show; tearing it down");
                teardown(id)?;
            }
            // Its owner has just been ended, and its keeper is at work.
            Owner::Gone => {
                for keeper in keeper.into_iter().filter_map(|pid| Process::of(pid).ok()) {
                    keeper.wait_end(scaled(TEARDOWN_LIMIT))?;
                }
            }
            Owner::Nobody => bail!(
                "the lab '{id}' is there, made by hand. Mend: end it with `cargo xtask hosts down` and try again"
            ),
            Owner::Alive(process) => {
                bail!("the lab '{id}' belongs to process {}, which runs. Mend: let it end first", process.pid)
            }
        }
        Self::create(id, base, &Process::own()?.to_string())
    }

    /// Leaves the lab to the person who started this process: it stays, like one made by hand.
    pub fn leave(mut self) -> Result<()> {
        let Some(mut keeper) = self.keeper.take() else { return Ok(()) };
        let owner = self.dir().join("owner");
        let mut leave = || -> Result<()> {
            let new = owner.with_extension("new");
            fs::write(&new, LEFT)?;
            fs::rename(&new, &owner)?;
            // Only now: a keeper that is not told so ends the lab.
            keeper.pipe.write_all(STAY)?;
            Ok(())
        };
        let left = leave().context("the lab cannot be left");
        keeper.end().and(left)
    }

    /// The lab that has this id, made by hand or left after a show; this is no owner of it.
    pub fn open(id: &str) -> Result<Self> {
        let lowers = lowers_of(id);
        ensure!(!lowers.is_empty(), "there is no lab '{id}'; `cargo xtask hosts up` makes one");
        Ok(Self {
            id: id.to_owned(),
            base: Base::of(lowers),
            hierarchies: Hierarchies::find()?,
            keeper: None,
        })
    }

    fn create(id: &str, base: Base, owner: &str) -> Result<Self> {
        // Until its network is there too, so that nobody takes it for one that somebody failed to make.
        let _lock = lock()?;
        // Built under another name: a directory with its right name always has an owner.
        let new = Path::new(STATE).join(format!(".new-{id}"));
        mounts::remove_tree(&new)?;
        fs::create_dir_all(new.join("hosts"))?;
        fs::write(new.join("owner"), owner)?;
        fs::write(new.join("base.json"), serde_json::to_vec(base.lowers())?)?;
        fs::rename(&new, dir_of(id)).with_context(|| format!("the lab '{id}' is there already"))?;
        let keeper = if owner == NOBODY { None } else { Some(keeper(id)?) };
        // From here on an error drops the lab, and that ends it.
        let lab = Self { id: id.to_owned(), base, hierarchies: Hierarchies::find()?, keeper };
        match lab.network() {
            Ok(()) => Ok(lab),
            Err(error) => {
                if lab.keeper.is_none() {
                    teardown(id)?;
                }
                Err(error)
            }
        }
    }

    /// Whether its network is there, which a bridge that is up is the last part of.
    fn has_network(&self) -> bool {
        let mut show = Command::new("ip");
        show.args(["-n", &netns_of(&self.id), "link", "show", "dev", "br0", "up"]);
        command::ok(&mut show).is_ok_and(|text| !text.trim().is_empty())
    }

    /// Makes its network, instead of one that is not whole.
    fn network(&self) -> Result<()> {
        let netns = netns_of(&self.id);
        if self.netns().exists() {
            command::ok(Command::new("ip").args(["netns", "del", &netns]))?;
        }
        command::ok(Command::new("ip").args(["netns", "add", &netns]))?;
        let address = format!("{CLIENT}/{PREFIX}");
        for words in [
            "link set lo up",
            "link add br0 type bridge",
            &format!("addr add {address} dev br0"),
            "link set br0 up",
        ] {
            ip(&self.id, &words.split(' ').collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its directory, with a directory for each host in `hosts`.
    pub fn dir(&self) -> PathBuf {
        dir_of(&self.id)
    }

    /// Makes a host and boots it; returns when systemd has been started. `vmN` gets the address 10.77.0.(10+N).
    pub fn boot(&self, name: &str, options: BootOptions) -> Result<Host> {
        let number = number(name)?;
        let dir = self.dir().join("hosts").join(name);
        ensure!(!dir.exists(), "{name} is in this lab already");
        let groups: Vec<_> =
            self.hierarchies.of_lab(&self.id).into_iter().map(|group| group.child(name)).collect();
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no machine id can be had")?;
        let address = address(number);
        let neighbours: String = (1..=9)
            .map(|n| format!("{} vm{n}\n", self::address(n)))
            .chain([format!("{CLIENT} client\n")])
            .collect();
        let mut seed = vec![
            ("/etc/machine-id", uuid.replace('-', "")),
            ("/etc/hostname", format!("{name}\n")),
            ("/etc/hosts", format!("127.0.0.1 localhost\n{neighbours}")),
        ]
        .into_iter()
        .map(|(path, text)| crate::container::Seed { path: path.into(), text })
        .collect::<Vec<_>>();
        let (memory_limit, disk) = (options.memory, options.disk);
        seed.extend(options.seeds());
        let spec = Spec {
            lab: self.id.clone(),
            name: name.to_owned(),
            address,
            prefix: PREFIX,
            mac: format!("02:00:0a:4d:00:{:02x}", address.octets()[3]),
            lowers: self.base.lowers().to_vec(),
            dir: dir.clone(),
            first_pid: u32::from(number) * PIDS_PER_HOST,
            unified: groups[0].path().to_owned(),
            memory_limit,
            memory: groups.get(1).map(|group| group.path().to_owned()),
            seed,
        };
        fs::create_dir_all(spec.disk())?;
        spec.write()?;
        mounts::tmpfs(&spec.disk(), disk)?;
        let host = Host::new(spec);
        host.start()?;
        Ok(host)
    }

    /// A host of this lab by its name, up or not.
    pub fn host(&self, name: &str) -> Result<Host> {
        let dir = self.dir().join("hosts").join(name);
        ensure!(
            dir.is_dir(),
            "there is no host {name} in the lab '{}'; there are: {}",
            self.id,
            self.names().join(" ")
        );
        Spec::read(&dir).map(Host::new)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir().join("hosts")).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// All its hosts, by name.
    pub fn hosts(&self) -> Result<Vec<Host>> {
        self.names().iter().map(|name| self.host(name)).collect()
    }

    /// The file of the bridge's network namespace, where clients live.
    pub fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(netns_of(&self.id))
    }

    /// The command that runs a program of *this machine* on the lab's network, as the client
    /// [10.77.0.254](CLIENT), to be given streams and started by the caller.
    pub fn client_command<S: AsRef<std::ffi::OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<Command> {
        let mut command = Command::new(helper()?);
        command.args(["enter", "--lab", &self.id, "--netns"]).arg(self.netns());
        command.arg("--").args(words);
        Ok(command)
    }

    /// Runs a program of this machine on the lab's network and returns all of its outcome.
    pub fn client<S: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Output> {
        command::output(&mut self.client_command(words)?)
    }

    /// Runs a closure in a thread of its own that is on the lab's network: sockets that it opens are the
    /// client's, and stay so when they are handed out. Threads that it starts are on the network too (start a
    /// tokio runtime inside of it).
    pub fn on_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.netns();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Of all namespaces, the network's is one that a single thread may change.
                enter::join(&path, CloneFlags::CLONE_NEWNET).map(|()| work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// What there is of this lab outside of its processes' memory: not empty until it is over.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        leftovers(&self.id)
    }

    /// Ends it. Like dropping it, but with an error if something is in the way.
    pub fn down(mut self) -> Result<()> {
        match self.keeper.take() {
            Some(keeper) => keeper.end(),
            None => teardown(&self.id),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.keeper.take().map(Keeper::end) {
            eprintln!("lab {}: {error:#}", self.id);
        }
    }
}

// === The keeper ===

/// What the owner says to the keeper when the lab is to stay.
const STAY: &[u8] = b"stay";

fn keeper(id: &str) -> Result<Keeper> {
    let mut process = Command::new(helper()?)
        .args(["keep", "--lab", id])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("the lab's keeper cannot be started")?;
    let pipe = process.stdin.take().context("the lab's keeper has no pipe")?;
    Ok(Keeper { process, pipe })
}

impl Keeper {
    fn end(self) -> Result<()> {
        let Self { mut process, pipe } = self;
        drop(pipe);
        let status = process.wait()?;
        ensure!(status.success(), "its keeper could not do its work; see above");
        Ok(())
    }
}

/// The keeper's whole life.
pub fn keep(id: &str) -> Result<ExitCode> {
    nix::unistd::setsid().context("a session of its own cannot be had")?;
    let mut last_words = Vec::new();
    std::io::stdin().read_to_end(&mut last_words)?;
    if last_words != STAY {
        teardown(id)?;
    }
    Ok(ExitCode::SUCCESS)
}

// === The end ===

/// Processes of a lab outside of its groups. The keeper is not one of them: it is the one who asks.
fn helpers_of(id: &str) -> Vec<i32> {
    ["supervise", "init", "enter"]
        .iter()
        .flat_map(|role| process::with_arguments(&[role, "--lab", id]))
        .collect()
}

/// Ends a lab, in whatever state it is. Goes on where it can and reports the first thing that it could not
/// do. Nothing to do is no error.
pub fn teardown(id: &str) -> Result<()> {
    let limit = scaled(TEARDOWN_LIMIT);
    let mut first: Result<()> = Ok(());
    let mut attempt = |result: Result<()>| {
        if first.is_ok() {
            first = result;
        }
    };
    let hierarchies = Hierarchies::find()?;
    let groups = hierarchies.of_lab(id);
    attempt(end_helpers(id, limit));
    // Only the unified hierarchy can kill; what is in the other is also in this one.
    attempt(groups[0].kill(limit));
    for group in &groups {
        attempt(group.remove(limit));
    }
    hierarchies.tidy();
    if Path::new("/run/netns").join(netns_of(id)).exists() {
        attempt(command::ok(Command::new("ip").args(["netns", "del", &netns_of(id)])).map(drop));
    }
    attempt(mounts::remove_tree(&dir_of(id)));
    first
}

/// Ends a lab's helper processes. They are nobody's children here, so this looks for them every 5 ms.
fn end_helpers(id: &str, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let left = helpers_of(id);
        if left.is_empty() {
            return Ok(());
        }
        for process in left.iter().filter_map(|pid| Process::of(*pid).ok()) {
            process.kill();
        }
        if Instant::now() > end {
            bail!("helper processes of the lab '{id}' do not end: {left:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Everything that is left of a lab: mounts, groups, its network namespace, processes, its directory. Empty
/// after its end.
pub fn leftovers(id: &str) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let (dir, netns) = (dir_of(id), Path::new("/run/netns").join(netns_of(id)));
    for point in mounts::under(&dir)?.into_iter().chain(mounts::under(&netns)?) {
        left.push(format!("mount {}", point.display()));
    }
    for group in Hierarchies::find()?.of_lab(id) {
        if group.exists() {
            left.push(format!("cgroup {} with processes {:?}", group.path().display(), group.processes()));
        }
    }
    left.extend(helpers_of(id).iter().map(|pid| format!("process {pid}")));
    left.extend(process::with_arguments(&["keep", "--lab", id]).iter().map(|pid| format!("keeper {pid}")));
    left.extend([&dir, &netns].iter().filter(|path| path.exists()).map(|path| path.display().to_string()));
    Ok(left)
}

/// The ids of all labs.
pub fn all() -> Vec<String> {
    let entries = fs::read_dir(STATE).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect()
}

/// Tears down all labs whose owner is gone, and what is left of labs that were never finished. Their keepers
/// do so too; a moment later, or never if they were killed as well.
pub fn sweep() -> Result<()> {
    // Who makes a lab holds this: what looks unfinished now has been given up.
    let _lock = lock()?;
    for entry in fs::read_dir(STATE)?.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b".new-") {
            mounts::remove_tree(&entry.path())?;
        }
    }
    for id in all() {
        if owner_of(&id) == Owner::Gone && process::with_arguments(&["keep", "--lab", &id]).is_empty() {
            eprintln!("lab {id}: its owner is gone; tearing it down");
            teardown(&id)?;
        }
    }
    Ok(())
}

/// Whom a lab belongs to.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    /// There is no such lab.
    None,
    /// A process that runs.
    Alive(Process),
    /// A process that has ended.
    Gone,
    /// Made by hand.
    Nobody,
    /// Its owner has left it to a person.
    Left,
}

fn owner_of(id: &str) -> Owner {
    if !dir_of(id).is_dir() {
        return Owner::None;
    }
    match fs::read_to_string(dir_of(id).join("owner")).unwrap_or_default().as_str() {
        NOBODY => Owner::Nobody,
        LEFT => Owner::Left,
        text => text.parse().ok().filter(Process::alive).map_or(Owner::Gone, Owner::Alive),
    }
}

/// All directories that any lab stands on.
pub(crate) fn lowers_in_use() -> Vec<PathBuf> {
    all().iter().flat_map(|id| lowers_of(id)).collect()
}

/// The ids of the labs that stand on something in this directory.
pub fn standing_on(dir: &Path) -> Vec<String> {
    let stands = |id: &String| lowers_of(id).iter().any(|lower| lower.starts_with(dir));
    all().into_iter().filter(stands).collect()
}

fn lowers_of(id: &str) -> Vec<PathBuf> {
    let list = fs::read(dir_of(id).join("base.json")).ok();
    list.and_then(|list| serde_json::from_slice(&list).ok()).unwrap_or_default()
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + number)
}

/// 3 for `vm3`.
fn number(name: &str) -> Result<u8> {
    let number = name.strip_prefix("vm").and_then(|text| text.parse::<u8>().ok());
    number
        .filter(|number| (1..=99).contains(number) && name == format!("vm{number}"))
        .with_context(|| format!("'{name}' cannot be a host's name: hosts are vm1 to vm99"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_numbers() {
        assert_eq!(number("vm3").unwrap(), 3);
        for wrong in ["vm", "vm0", "vm03", "vm100", "web", "vm+1", "3"] {
            assert!(number(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn there_is_nothing_left_of_a_lab_that_never_was() {
        assert_eq!(leftovers("never-was").unwrap(), Vec::<String>::new());
    }
}
