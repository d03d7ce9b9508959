//! `kill -9`, for real: a process that takes, marks and sweeps without end is ended at any moment, hundreds of times.
//!
//! What [`super::torture`] does at each single deed, with a disk that plays dead, is done here with nothing that plays: the
//! test program starts itself as the writer. `FTD_KILLS=N` makes it longer, `FTD_SEED=N` kills at the same delays again
//! (where in its work that meets the writer, is the kernel's affair).

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::*;

/// Tells the writer where the store is.
const DIR: &str = "FTD_TEST_STORE";
/// The writer is killed at most so long after it has begun.
const LONGEST_US: u64 = 40_000;
const KEPT: usize = 3;

/// What is in every generation besides its own.
fn common() -> Vec<u8> {
    content(u64::MAX, 30_000)
}

fn own(seed: u64) -> Vec<u8> {
    content(seed, 20_000 + usize::try_from(seed % 7).unwrap() * 9_000)
}

#[test]
#[ignore = "it takes snapshots for ever: the other test here starts it, and kills it"]
fn writer() {
    let dir = std::env::var_os(DIR).expect("started by the other test");
    let store = Store::open(Path::new(&dir), settings()).unwrap();
    // On a line of its own, whatever the test program prints before.
    let say = |what: &str, number: u64| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{what} {number}").and_then(|()| out.flush()).unwrap();
    };
    say("begun", 0);
    for n in u64::from(std::process::id()) << 20.. {
        let seed = n.to_string();
        let entries = [("seed", seed.as_bytes()), ("common", &common()), ("own", &own(n))];
        let number = take(&store, "w", &entries).unwrap();
        say("taken", number);
        if n % 2 == 0 {
            store.mark_good("w", number).unwrap();
            say("good", number);
        }
        if n % 3 == 0 {
            let retention = Retention { count: Some(KEPT), ..Retention::default() };
            store.sweep(&retention, jiff::Timestamp::now()).unwrap();
        }
    }
}

/// Starts the writer, kills it after a while; answers the last numbers that it said were taken, and good.
fn killed_after(delay: Duration, dir: &Path) -> (u64, u64) {
    let mut writer = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "snapshot::store::tests::kill::writer", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
    lines.find(|line| line.as_ref().unwrap().starts_with("begun")).expect("the writer ended").unwrap();
    std::thread::sleep(delay);
    writer.kill().unwrap();
    let status = writer.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL), "{status}");
    let (mut taken, mut good) = (0, 0);
    for line in lines.map_while(std::io::Result::ok) {
        // The last one may be cut off; then it has not been said.
        let said = |what: &str| line.strip_prefix(what).and_then(|number| number.trim().parse().ok());
        taken = said("taken ").unwrap_or(taken);
        good = said("good ").unwrap_or(good);
    }
    (taken, good)
}

#[test]
fn a_writer_that_is_killed_leaves_all_that_it_said_was_there() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros();
    let seed = number("FTD_SEED").unwrap_or_else(|| u64::try_from(now).unwrap());
    let kills = number("FTD_KILLS").unwrap_or(200);
    println!("FTD_SEED={seed}");
    let dir = tempdir();
    let (mut good, mut cut_short) = (0, 0);
    for kill in 0..kills {
        let mut random = [0; 8];
        noise(seed.wrapping_add(kill), &mut random);
        let delay = Duration::from_micros(u64::from_le_bytes(random) % LONGEST_US);
        let (taken, marked) = killed_after(delay, dir.path());
        good = good.max(marked);

        let what = format!("kill {kill} after {delay:?}");
        // As the next ftd finds it.
        let store = Store::open(dir.path(), settings()).unwrap();
        cut_short += usize::from(!index::list(&store.new_dir()).unwrap().is_empty());
        let numbers: Vec<_> = store.generations("w").unwrap().iter().map(|one| one.number).collect();
        assert!(taken == 0 || numbers.contains(&taken), "{what}: {taken} was taken, there are {numbers:?}");
        let last_good = store.last_good("w").unwrap().map_or(0, |one| one.number);
        assert!(last_good >= good, "{what}: {good} was good, and now {last_good}");
        for number in &numbers {
            let entry =
                |name: &str| read(&store, "w", *number, name).unwrap_or_else(|e| panic!("{what}: {e}"));
            let seed = String::from_utf8(entry("seed")).unwrap().parse().unwrap();
            assert!(entry("common") == common() && entry("own") == own(seed), "{what}: {number}");
        }
        assert_eq!(store.verify(|_, _| ()).unwrap().damage, [], "{what}");
    }
    assert!(good > 0, "the writer was never given the time to write: raise LONGEST_US");
    // Else the moments were not those that matter.
    assert!(cut_short > 0, "no kill met a snapshot half done");
    println!("{kills} kills, {cut_short} of them in the middle of a snapshot; the last good one is {good}");
}
