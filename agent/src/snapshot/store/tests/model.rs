//! Random sequences of all that can be done, beside a model that does the same in memory.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Op {
    /// Workload, and seeds of the contents of its entries.
    Take(u8, Vec<u8>),
    /// Begin, add and drop.
    Abandon(u8, u8),
    /// Of this workload, the generation at this place.
    Mark(u8, u8),
    Sweep(Option<usize>, Option<u64>),
    Gc,
    Reopen,
    /// Export it, and import it into a store elsewhere.
    Move(u8, u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u8..2, prop::collection::vec(0u8..6, 0..4)).prop_map(|(w, seeds)| Op::Take(w, seeds)),
        1 => (0u8..2, 0u8..9).prop_map(|(w, seed)| Op::Abandon(w, seed)),
        3 => (0u8..2, any::<u8>()).prop_map(|(w, which)| Op::Mark(w, which)),
        2 => (prop::option::of(0usize..4), prop::option::of(0u64..60_000)).prop_map(|(c, b)| Op::Sweep(c, b)),
        1 => Just(Op::Gc),
        1 => Just(Op::Reopen),
        1 => (0u8..2, any::<u8>()).prop_map(|(w, which)| Op::Move(w, which)),
    ]
}

#[derive(Default)]
struct Model {
    /// By workload and number: seeds, and whether it is good.
    generations: BTreeMap<(String, u64), (Vec<u8>, bool)>,
}

impl Model {
    fn of(&self, workload: &str) -> Vec<u64> {
        self.generations.keys().filter(|(of, _)| of == workload).map(|(_, number)| *number).collect()
    }

    fn last_good(&self, workload: &str) -> Option<u64> {
        self.of(workload).into_iter().rfind(|number| self.generations[&(workload.to_owned(), *number)].1)
    }

    fn pick(&self, workload: &str, which: u8) -> Option<u64> {
        let all = self.of(workload);
        all.get(usize::from(which) % all.len().max(1)).copied()
    }
}

/// Entries with the same seed share content, and those of neighbouring seeds a part of it.
fn entry(seed: u8) -> Vec<u8> {
    [content(u64::from(seed), 7_000), content(u64::from(seed / 2) + 100, 6_000)].concat()
}

fn same(store: &Store, workload: &str, number: u64, seeds: &[u8]) {
    let snapshot = store.snapshot(workload, number).unwrap();
    assert_eq!(snapshot.manifest().entries.len(), seeds.len());
    for (i, seed) in seeds.iter().enumerate() {
        assert!(read(store, workload, number, &i.to_string()).unwrap() == entry(*seed));
    }
}

fn check(store: &Store, model: &Model) {
    for workload in ["w0", "w1"] {
        let listed = store.generations(workload).unwrap();
        assert_eq!(listed.iter().map(|g| g.number).collect::<Vec<_>>(), model.of(workload));
        let good = store.last_good(workload).unwrap().map(|g| g.number);
        assert_eq!(good, model.last_good(workload));
        for generation in &listed {
            let (seeds, good) = &model.generations[&(workload.to_owned(), generation.number)];
            assert_eq!(generation.good, *good);
            same(store, workload, generation.number, seeds);
        }
    }
}

fn run(ops: &[Op]) {
    let (mut lab, away) = (Lab::new(), Lab::new());
    let mut model = Model::default();
    for op in ops {
        let store = &lab.store;
        match op {
            Op::Take(workload, seeds) => {
                let workload = format!("w{workload}");
                let contents: Vec<_> = seeds.iter().map(|seed| entry(*seed)).collect();
                let names: Vec<_> = (0..contents.len()).map(|i| i.to_string()).collect();
                let entries: Vec<_> = names
                    .iter()
                    .zip(&contents)
                    .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
                    .collect();
                let number = take(store, &workload, &entries).unwrap();
                assert!(model.of(&workload).last().is_none_or(|last| *last < number));
                model.generations.insert((workload, number), (seeds.clone(), false));
            }
            Op::Abandon(workload, seed) => {
                let mut draft = store.begin(about(&format!("w{workload}"))).unwrap();
                draft.add("0", metadata(), entry(*seed).as_slice()).unwrap();
            }
            Op::Mark(workload, which) => {
                let workload = format!("w{workload}");
                let Some(number) = model.pick(&workload, *which) else { continue };
                store.mark_good(&workload, number).unwrap();
                model.generations.get_mut(&(workload, number)).unwrap().1 = true;
            }
            Op::Sweep(count, bytes) => {
                let kept = ["w0", "w1"].map(|w| (w, model.last_good(w), model.of(w).pop()));
                let retention = Retention { count: *count, bytes: *bytes, age: None, kind: None };
                for gone in store.sweep(&retention, jiff::Timestamp::UNIX_EPOCH).unwrap().generations {
                    assert!(model.generations.remove(&gone).is_some());
                }
                for (workload, good, newest) in kept {
                    assert_eq!((model.last_good(workload), model.of(workload).pop()), (good, newest));
                    let bound = count.map_or(usize::MAX, |count| count.max(2));
                    assert!(model.of(workload).len() <= bound);
                }
            }
            Op::Gc => drop(store.gc().unwrap()),
            Op::Reopen => lab.reopen(),
            Op::Move(workload, which) => {
                let workload = format!("w{workload}");
                let Some(number) = model.pick(&workload, *which) else { continue };
                let mut stream = Vec::new();
                let len = store.export(&workload, number, &mut stream).unwrap();
                assert_eq!(len, stream.len() as u64);
                let here = away.store.import(stream.as_slice(), |_, _| ()).unwrap();
                let (seeds, good) = &model.generations[&(workload.clone(), number)];
                assert_eq!(here.good, *good);
                same(&away.store, &workload, here.number, seeds);
            }
        }
        if !matches!(op, Op::Take(..)) {
            check(&lab.store, &model);
        }
    }
    check(&lab.store, &model);
    assert_eq!(lab.store.verify(|_, _| ()).unwrap().damage, []);
    lab.store.gc().unwrap();
    lab.reopen();
    check(&lab.store, &model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn the_store_is_as_the_model(ops in prop::collection::vec(op(), 1..25)) {
        run(&ops);
    }
}
