//! What the watch makes of what it is told; and the watch as a whole, with real files, a real store and real inotify.

use tokio::time::timeout;

use super::{machine::Input as UnitInput, *};
use crate::{config::Config, probe::Slot, snapshot::store::Settings};

#[test]
fn what_systemd_says_of_a_line_counts_where_a_person_wrote_it_now() {
    let said = "/etc/systemd/system/a.service.d/x.conf:2: Unknown key 'Restrat' in section [Service], ignoring.\n\
                /usr/lib/systemd/system/a.service:9: Unknown key 'New' in section [Service], ignoring.\n\
                /etc/systemd/system/other.service:1: Unknown section 'Foo'. Ignoring.";
    let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
    let changed = paths(&["/etc/systemd/system/a.service.d/x.conf", "/usr/lib/systemd/system/a.service"]);
    assert_eq!(complaints(said, &changed), [said.lines().next().unwrap()]);
    assert!(complaints(said, &paths(&["/etc/systemd/system/a.service.d"])).is_empty());
}

#[test]
fn a_checker_without_a_directory_is_found_or_said_to_be_missing() {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    assert!(with_program(&words("sh -c true")).unwrap()[0].ends_with("/sh"));
    assert_eq!(with_program(&words("/opt/check -x")).unwrap(), words("/opt/check -x"));
    assert!(with_program(&words("no-such-program")).unwrap_err().contains("no-such-program"));
}

const PATIENCE: Duration = Duration::from_secs(20);

/// A watch over one file that holds `good`, and is good like that.
struct Rig {
    dir: tempfile::TempDir,
    bus: Arc<Bus>,
    supervisor: Arc<Supervisor>,
    follower: broadcast::Receiver<Arc<Event>>,
}

impl Rig {
    fn new() -> Self {
        let text = "[snapshot]\nsettle = \"50ms\"\n[[workload]]\nname = \"w\"\nunits = [\"a\"]\n";
        let config = Config::parse(text, Path::new("ftd.toml")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "good").unwrap();
        let store = Store::open(&dir.path().join("store"), Settings::default()).unwrap();
        // Nobody reads the journal's end of the queue; it is long enough.
        let (bus, _) = Bus::new("n".into(), 0);
        let (supervisor, _) = Supervisor::new(Arc::clone(&bus), config.units(), BTreeMap::new(), 0);
        let watch = Watch {
            workload: "w".into(),
            units: vec!["a.service".into()],
            selection: Selection::parse([file.to_str().unwrap()]).unwrap(),
            definitions: Vec::new(),
            check: None,
            settings: config.snapshot,
            node: "n".into(),
        };
        let (number, _) = store_files(&watch, &store).unwrap();
        store.mark_good("w", number).unwrap();
        let hands = Hands {
            bus: Arc::clone(&bus),
            supervisor: Arc::clone(&supervisor),
            systemd: Systemd::default(),
            store,
        };
        let follower = bus.follow();
        tokio::spawn(run(watch, hands));
        Self { dir, bus, supervisor, follower }
    }

    fn content(&self) -> String {
        fs::read_to_string(self.dir.path().join("file")).unwrap()
    }

    fn ruin(&self) {
        fs::write(self.dir.path().join("file"), "").unwrap();
    }

    fn feed(&self, input: UnitInput) {
        self.supervisor.feed(Slot(0), boot_now(), input);
    }

    async fn until(&mut self, wanted: impl Fn(&Kind) -> bool) {
        let come = async {
            loop {
                match self.follower.recv().await {
                    Ok(event) if wanted(&event.kind) => return,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        };
        timeout(PATIENCE, come).await.expect("it was not told");
    }
}

#[tokio::test]
async fn a_hold_whose_event_was_missed_is_respected() {
    let mut rig = Rig::new();
    rig.ruin();
    rig.until(|kind| matches!(kind, Kind::FilesPutBack { .. })).await;
    assert_eq!(rig.content(), "good");
    rig.feed(UnitInput::Hold { until: None, reason: None });
    // The watch has no turn in between: the first of these are gone when it has.
    for _ in 0..5000 {
        rig.bus.emit(None, None, Kind::StateSaved {});
    }
    rig.ruin();
    // Nothing tells that nothing will happen: ten times the settling time.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(rig.content(), "");
    rig.feed(UnitInput::Release);
    rig.until(|kind| matches!(kind, Kind::FilesPutBack { .. })).await;
    assert_eq!(rig.content(), "good");
}

#[tokio::test]
async fn a_trouble_is_told_once_for_each_cause_and_waited_for_ever_longer() {
    let (bus, _queue) = Bus::new("n".into(), 0);
    let mut trouble = Trouble::new("doing it", Some("a.service"), &bus, Duration::from_millis(5));
    let begun = std::time::Instant::now();
    for error in ["one", "one", "one", "two", "two", "two", "two"] {
        trouble.wait(error).await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(5) * (1 + 2 + 4 + 8 + 16 + 16 + 16));
    let told: Vec<_> = bus.recent_and_follow().0.into_iter().map(|event| event.kind.clone()).collect();
    let of = |error: &str| Kind::FilesTrouble { what: "doing it".into(), error: error.into() };
    assert_eq!(told, [of("one"), of("two")]);
}
