//! Stopped, refused or robbed of power at every single deed on the disk: what was committed is still there.

use super::{
    faults::{Faults, How},
    *,
};

/// What writing does, from a store with three generations, of which the second is good.
#[derive(Debug, Clone, Copy)]
enum Work {
    Take,
    /// Of a workload that had none.
    TakeFirst,
    MarkAndSweep,
    Import,
}

struct Ready {
    lab: Lab,
    stream: Vec<u8>,
    contents: Vec<Vec<u8>>,
}

fn ready() -> Ready {
    let lab = Lab::new();
    let mut contents: Vec<_> = (1..=3).map(|seed| content(seed, 40_000)).collect();
    // Most of the first one's pack dies with it, and the rest is copied.
    let part = contents[0][..9_000].to_vec();
    contents[2].splice(0..0, part);
    for bytes in &contents {
        take(&lab.store, "w", &[("a", bytes)]).unwrap();
    }
    lab.store.mark_good("w", 2).unwrap();
    let other = Lab::new();
    for seed in [2, 4] {
        take_of(&other.store, from_elsewhere("w"), &[("a", &content(seed, 40_000))]).unwrap();
    }
    let mut stream = Vec::new();
    other.store.export("w", 2, &mut stream).unwrap();
    Ready { lab, stream, contents }
}

/// Answers whether all of it was done.
fn work(ready: &Ready, work: Work) -> bool {
    let store = &ready.lab.store;
    let result = match work {
        Work::Take => take(store, "w", &[("a", &content(4, 90_000)), ("b", &ready.contents[0])]).map(drop),
        Work::TakeFirst => take(store, "v", &[("a", &content(4, 20_000))]).map(drop),
        Work::Import => store.import(ready.stream.as_slice(), |_, _| ()).map(drop),
        Work::MarkAndSweep => store.mark_good("w", 3).and_then(|()| {
            let one = Retention { count: Some(1), ..Retention::default() };
            store.sweep(&one, jiff::Timestamp::now()).map(drop)
        }),
    };
    result.is_ok()
}

/// Whatever has happened: each generation that there is can be read and is the right one, the last good one is there,
/// nothing is damaged, and after gc nothing is there that nobody needs.
fn examine(ready: &mut Ready, work: Work, done: bool, what: &str) {
    ready.lab.reopen();
    let store = &ready.lab.store;
    let examine = |when: &str| {
        let what = format!("{work:?} {what}, {when}");
        let numbers: Vec<_> = store.generations("w").unwrap().iter().map(|g| g.number).collect();
        for number in &numbers {
            let expected = ready.contents.get(usize::try_from(*number).unwrap() - 1);
            let read = read(store, "w", *number, "a").unwrap_or_else(|error| panic!("{what}: {error}"));
            let fourth = matches!(work, Work::Take).then(|| content(4, 90_000));
            assert!(
                read == expected.cloned().or(fourth).unwrap_or_else(|| content(4, 40_000)),
                "{what}: {number}"
            );
        }
        let good = store.last_good("w").unwrap().unwrap().number;
        match work {
            Work::MarkAndSweep if done => assert_eq!((good, numbers), (3, vec![3]), "{what}"),
            Work::MarkAndSweep => assert!(good == 2 || good == 3, "{what}: {good}"),
            Work::Take | Work::Import => {
                assert_eq!(numbers[..3], [1, 2, 3], "{what}");
                assert!(good == 2, "{what}: {good}");
                assert!(numbers.len() == 4 || !done, "{what}");
            }
            Work::TakeFirst => {
                assert_eq!((&numbers[..], good), (&[1, 2, 3][..], 2), "{what}");
                let there = store.generations("v").unwrap().len();
                assert!(there == 1 || !done, "{what}");
                assert!(there == 0 || read(store, "v", 1, "a").unwrap() == content(4, 20_000), "{what}");
            }
        }
        assert_eq!(store.verify(|_, _| ()).unwrap().damage, [], "{what}");
    };
    examine("at first");
    store.gc().unwrap();
    examine("after gc");
    let manifests = ["w", "v"].map(|workload| store.manifests(workload).unwrap());
    let manifests = manifests.iter().flatten().map(|(_, manifest)| manifest.as_ref().unwrap());
    let needed: HashSet<_> = manifests.flat_map(Manifest::data).map(|(id, _)| id).collect();
    let index = store.refresh().unwrap();
    for pack in &index.packs {
        assert!(pack.slots.iter().any(|slot| needed.contains(&slot.record.id)), "{work:?} {what}: rubbish");
    }
    assert!(index::list(&store.new_dir()).unwrap().is_empty());
    // And it goes on.
    take(store, "w", &[("a", &content(9, 9_000))]).unwrap();
}

/// Runs the work once for each of its deeds, and has something happen there.
fn at_every_deed(kind: Work, plan: impl Fn(&Faults, usize), then: impl Fn(&Faults, usize)) -> Vec<String> {
    for deed in 0.. {
        let mut ready = ready();
        plan(ready.lab.faults(), deed);
        let done = work(&ready, kind);
        let happened = ready.lab.faults().happened();
        let deeds = ready.lab.faults().deeds();
        then(ready.lab.faults(), deed);
        let at = deeds.get(deed).cloned().unwrap_or_default();
        examine(&mut ready, kind, done, &format!("at {deed} ({at})"));
        if !happened {
            assert!(done);
            return deeds;
        }
    }
    Vec::new()
}

const ALL: [Work; 4] = [Work::Take, Work::TakeFirst, Work::MarkAndSweep, Work::Import];

#[test]
fn killed_at_any_deed() {
    for work in ALL {
        let deeds = at_every_deed(work, |faults, deed| faults.plan(deed, How::Kill), |_, _| ());
        assert!(deeds.len() > 10, "{deeds:#?}");
        if matches!(work, Work::Take) {
            // The order on which all depends.
            let at =
                |name: &str| deeds.iter().position(|deed| deed == name).unwrap_or_else(|| panic!("{name}"));
            let order = ["append new pack", "sync new pack", "rename packs pack", "sync dir packs -"];
            let order = order.into_iter().chain(["sync new -", "rename generations manifest"]).map(at);
            assert!(order.is_sorted(), "{deeds:#?}");
        }
    }
}

#[test]
fn a_full_disk_at_any_deed() {
    for work in ALL {
        at_every_deed(work, |faults, deed| faults.plan(deed, How::Full), |_, _| ());
    }
}

#[test]
fn power_cut_at_any_deed() {
    for work in ALL {
        // Nothing that was not synced is there, and any part of it is.
        at_every_deed(work, Faults::plan_power_cut, |faults, _| faults.cut_power(|| true));
        for round in 0..3 {
            let seed = std::cell::Cell::new(0);
            at_every_deed(work, Faults::plan_power_cut, |faults, deed| {
                faults.cut_power(|| {
                    seed.set(seed.get() + 1);
                    let mut byte = [0];
                    noise(round << 40 | (deed as u64) << 20 | seed.get(), &mut byte);
                    byte[0] & 1 == 1
                });
            });
        }
    }
}

#[test]
fn a_full_disk_leaves_nothing_of_a_draft() {
    for deed in 0.. {
        let ready = ready();
        let before = ready.lab.files();
        ready.lab.faults().plan(deed, How::Full);
        let done = work(&ready, Work::Take);
        if done {
            break;
        }
        let after = ready.lab.files();
        let at = ready.lab.faults().deeds()[deed].clone();
        // From the rename on it is a generation; that its directory could not be synced is said all the same.
        assert!(after == before || at.starts_with("sync dir generations"), "{deed} {at}: {after:?}");
    }
}
