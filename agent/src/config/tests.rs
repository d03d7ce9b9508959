use super::*;

fn errors(text: &str) -> String {
    Config::parse(text, Path::new("ftd.toml")).expect_err("it must be refused").to_string()
}

#[test]
fn an_empty_file_is_a_whole_configuration() {
    let config = Config::parse("", Path::new("ftd.toml")).unwrap();
    assert_eq!((config.heal.restarts, config.probe.ring), (5, ByteSize::mib(4)));
    assert!(!config.inject.enabled && config.units().is_empty());
}

#[test]
fn a_workload_gives_its_units_all_they_need() {
    let text = r#"
        [heal]
        restarts = 7
        [[workload]]
        name = "web"
        units = ["nginx", "php.service"]
        on_stop = "restart"
        health = "http://127.0.0.1:8080/up?x=1"
        health_unit = "nginx"
    "#;
    let units = Config::parse(text, Path::new("ftd.toml")).unwrap().units();
    assert_eq!(units.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(), ["nginx.service", "php.service"]);
    assert_eq!((units[0].on_stop, units[0].heal.restarts), (OnStop::Restart, 7));
    let check = &units[0].health.as_ref().unwrap().check;
    assert_eq!(check.to_string(), "http://127.0.0.1:8080/up?x=1");
    assert!(units[1].health.is_none());
}

#[test]
fn a_workloads_own_figures_go_before_the_general_ones_key_by_key() {
    let text = "[heal]\nrestarts = 7\nsettle = \"3s\"\n\
                [[workload]]\nname = \"w\"\nunits = [\"a\"]\n[workload.heal]\nrestarts = 2\n";
    let unit = &Config::parse(text, Path::new("ftd.toml")).unwrap().units()[0];
    assert_eq!((unit.heal.restarts, unit.heal.settle), (2, Duration::from_secs(3)));
    let text = text.replace("restarts = 2", "backoff = \"1h\"");
    assert!(errors(&text).contains("heal of workload \"w\": backoff <= backoff_max does not hold"));
}

#[test]
fn an_unknown_key_names_line_and_the_nearest_known_one() {
    insta::assert_snapshot!(errors("[probe]\nrealtme = 3\n"), @r#"
    ftd.toml:2:1: unknown key "realtme"
      mend: did you mean "realtime"? Known here: ebpf, ring, realtime, elsewhere, elsewhere_per_minute, drops_every
    "#);
}

#[test]
fn a_wrong_value_names_the_known_ones() {
    let text = "[[workload]]\nname = \"w\"\nunits = [\"a\"]\non_stop = \"respct\"\n";
    insta::assert_snapshot!(errors(text), @r#"
    ftd.toml:4:11: unknown value "respct"
      mend: did you mean "respect"? Known here: restart, respect
    "#);
}

#[test]
fn a_wrong_type_names_line_and_column() {
    let text = errors("[heal]\nrestarts = \"many\"\n");
    assert!(text.starts_with("ftd.toml:2:12: invalid type: string \"many\", expected u32"), "{text}");
    assert!(errors("[heal]\nwithin = \"5 parsecs\"\n").contains("durations are text with a unit"));
    assert!(errors("[journal]\nmax_size = \"big\"\n").starts_with("ftd.toml:2:12:"));
}

#[test]
fn a_unit_listed_twice_names_both_places() {
    let text = "[[workload]]\nname = \"a\"\nunits = [\"nginx\"]\n[[workload]]\nname = \"b\"\nunits = [\"nginx.service\"]\n";
    insta::assert_snapshot!(errors(text), @r#"
    ftd.toml:6:10: unit nginx.service is listed twice (first in workload "a", line 3)
      mend: a unit belongs to one workload: remove one of the two
    "#);
}

#[test]
fn figures_that_contradict_each_other_print_the_inequality() {
    let text = errors("[heal]\nbackoff = \"20s\"\n");
    assert!(text.contains("backoff <= backoff_max does not hold: 20s > 10s"), "{text}");
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let text = errors(
        "[journal]\nmax_size = \"1KiB\"\n[probe]\nrealtime = 120\nring = \"5MiB\"\n\
                       drops_every = \"0s\"\n",
    );
    assert_eq!(text.matches("mend:").count(), 4, "{text}");
    assert!(text.contains("ftd.toml:2:1:") && text.contains("ftd.toml:4:1:"), "{text}");
}

#[test]
fn the_times_and_sizes_of_faults_are_checked() {
    let text = errors("[inject]\nlongest = \"10s\"\noom_room = \"4GiB\"\n");
    assert!(text.contains("ftd.toml:2:1: 100ms <= inject.default_for <= inject.longest"), "{text}");
    assert!(text.contains("30s, 10s") && text.contains("ftd.toml:3:1: inject.oom_room is 4.0 GiB"), "{text}");
}

#[test]
fn start_and_stop_fit_into_what_systemd_allows() {
    let text = errors("[node]\nready_within = \"1min\"\nstop_within = \"4s\"\n");
    assert!(text.contains("ftd.toml:2:1: node.ready_within < TimeoutStartSec of ftd.service"), "{text}");
    assert!(text.contains("1m >= 30s") && text.contains("12s, and 10s"), "{text}");
    let service = include_str!("../../../systemd/ftd.service");
    for (key, limit) in [("TimeoutStartSec", START_LIMIT), ("TimeoutStopSec", STOP_LIMIT)] {
        assert!(service.contains(&format!("\n{key}={}\n", limit.as_secs())), "{key}");
    }
}

#[test]
fn limits_of_the_status_on_tcp_are_checked() {
    let text = errors("[status]\nmax_connections = 0\nidle = \"0s\"\n");
    assert!(text.contains("ftd.toml:2:1: status.max_connections is 0"), "{text}");
    assert!(text.contains("ftd.toml:3:1: status.idle is 0s"), "{text}");
}

#[test]
fn limits_that_would_stop_the_journal_are_refused() {
    let text = errors("[journal]\nretry = \"0s\"\nbacklog = 5\n");
    assert!(text.contains("ftd.toml:2:1: journal.retry is zero"), "{text}");
    assert!(text.contains("ftd.toml:3:1: journal.backlog is 5"), "{text}");
}

#[test]
fn checks_are_read_and_refused_with_a_reason() {
    assert_eq!(Check::parse("http://[::1]/x").unwrap().to_string(), "http://[::1]:80/x");
    assert_eq!(Check::parse("tcp://db:5432").unwrap(), Check::Tcp("db:5432".into()));
    for (text, cause) in [
        ("tcp://db", "port is missing"),
        ("http://:80/", "host is missing"),
        ("exec:true", "absolute path"),
        ("https://x/", "https is not checked"),
        ("ftp://x", "begins with none of"),
        ("http://x:99999/", "is no port"),
        ("http://h/a b", "\"/a b\" is no path of a URL"),
        ("http://::1/", "needs brackets, like [::1]"),
        ("tcp://::1:80", "needs brackets, like [::1]"),
        ("http://[nonsense]/", "is no IPv6 address"),
        ("http://a b/", "\"a b\" is no host"),
        ("http://me@h/", "user or password"),
    ] {
        let error = Check::parse(text).unwrap_err();
        assert!(error.contains(cause), "{text}: {error}");
    }
}

#[test]
fn an_unreadable_file_is_said_with_cause_and_mend() {
    let error = Config::load(Path::new("/nonexistent/ftd.toml")).unwrap_err().to_string();
    assert!(
        error.contains("/nonexistent/ftd.toml: cannot be read") && error.contains("mend: write one"),
        "{error}"
    );
}

#[test]
fn a_unit_listed_twice_under_names_of_two_distributions_names_both_places() {
    let text = "[[workload]]\nname = \"a\"\nunits = [\"httpd\"]\n[[workload]]\nname = \"b\"\nunits = [\"apache2\"]\n";
    insta::assert_snapshot!(errors(text), @r#"
    ftd.toml:6:10: unit apache2.service is listed twice (first in workload "a", line 3, there as httpd.service)
      mend: a unit belongs to one workload: remove one of the two
    "#);
}

#[test]
fn units_that_are_not_brought_back_are_refused() {
    let text = errors("[[workload]]\nname = \"a\"\nunits = [\"backup.timer\"]\n");
    assert!(text.contains("ftd.toml:3:10: \"backup.timer\" cannot be cared for"), "{text}");
    assert!(text.contains("name the service behind it, like \"backup.service\""), "{text}");
}

#[test]
fn paths_that_depend_on_the_directory_ftd_starts_in_are_refused() {
    let text = errors("[node]\nstate_dir = \"state\"\n[api]\nsocket = \"ftd.sock\"\n");
    assert!(text.contains("ftd.toml:2:1: node.state_dir = \"state\" is no absolute path"), "{text}");
    assert!(text.contains("ftd.toml:4:1: api.socket = \"ftd.sock\" is no absolute path"), "{text}");
}

#[test]
fn what_is_wrong_is_said_at_its_own_line() {
    let text = errors("[heal]\nsettle = \"1s\"\nrestarts = 0\n");
    assert!(text.starts_with("ftd.toml:3:1: heal.restarts is 0"), "{text}");
    let workload = "[[workload]]\nname = \"w\"\nunits = [\"a\"]\n";
    let text =
        errors(&format!("{workload}[[workload]]\nname = \"x\"\nunits = [\"b\"]\nhealth_every = \"0s\"\n"));
    assert!(text.starts_with("ftd.toml:7:1: health_every of workload \"x\" is zero"), "{text}");
    let text =
        errors(&format!("{workload}[workload.heal]\nrestarts = 2\nbackoff = \"1h\"\nwithin = \"1d\"\n"));
    assert!(text.starts_with("ftd.toml:6:1: heal of workload \"w\": backoff <= backoff_max"), "{text}");
    // Inline, and where the section alone is there.
    let text = errors(&format!("{workload}heal = {{ backoff = \"1h\", settle = \"2s\" }}\n"));
    assert!(text.starts_with("ftd.toml:4:10: heal of workload \"w\": backoff <= backoff_max"), "{text}");
}

#[test]
fn a_limit_of_restarts_that_back_off_keeps_from_being_reached_is_refused() {
    let text = errors("[heal]\nwithin = \"10s\"\nrestarts = 20\n");
    assert!(
        text.starts_with(
            "ftd.toml:3:1: heal: waits before 20 attempts < within does not hold: 2m 12s 700ms >= 10s"
        ),
        "{text}"
    );
    // Reached just so: 100 + 200 + 400 + 800 ms are less than 2 s.
    for good in ["within = \"2s\"", "restarts = 1", "restarts = 100000\nbackoff = \"1ms\"\nsettle = \"1ms\""]
    {
        Config::parse(&format!("[heal]\n{good}\n"), Path::new("ftd.toml")).unwrap();
    }
    errors("[heal]\nwithin = \"1500ms\"\n");
}

#[test]
fn a_schedule_of_snapshots_must_have_something_to_take() {
    let config = |line: &str, units: &str| format!("[[workload]]\nname = \"w\"\nunits = [{units}]\n{line}\n");
    let text = config("snapshot = { every = \"5s\", process = true, keep = 10 }", "\"a\"");
    let schedule =
        Config::parse(&text, Path::new("ftd.toml")).unwrap().workloads[0].snapshot.clone().unwrap();
    assert_eq!(schedule, Schedule { every: Some(Duration::from_secs(5)), process: true, keep: Some(10) });
    // By hand.
    Config::parse(&config("snapshot = { process = true }", "\"a\""), Path::new("ftd.toml")).unwrap();
    for (line, units, word) in [
        ("snapshot = { every = \"5s\" }", "\"a\"", "would hold nothing"),
        ("snapshot = { every = \"5s\", process = true }", "\"a.socket\"", "no processes to be saved"),
        ("snapshot = { every = \"1ms\", process = true }", "\"a\"", "ten times a second"),
        ("snapshot = { process = true, keep = 0 }", "\"a\"", "nothing would be kept"),
        ("snapshot = { evry = \"5s\" }", "\"a\"", "did you mean \"every\"?"),
    ] {
        let error = errors(&config(line, units));
        assert!(error.contains(word) && error.contains("ftd.toml:4:"), "{error}");
    }
    let error = errors("[snapshot]\nretry = \"10min\"\nprocess_deadline = \"1h\"\n");
    assert!(error.contains("snapshot.retry <= snapshot.retry_at_most does not hold: 10m > 5m"), "{error}");
    assert!(error.contains("snapshot.process_deadline < RuntimeMaxSec of ftd-criu@.service"), "{error}");
}
