//! The rules of the watch over files, one by one, and what holds under any sequence of inputs.

use proptest::prelude::*;

use super::*;

const S: u64 = 1_000_000_000;

fn policy() -> Policy {
    let seconds = Duration::from_secs;
    Policy { good_after: seconds(30), put_backs: 3, within: seconds(60), retry: seconds(5) }
}

struct Rig {
    guard: Guard,
    now: u64,
}

fn change(damage: bool) -> Change {
    Change { told: FileChange { path: "/etc/a".into(), what: "other content".into() }, damage }
}

fn found(changes: Vec<Change>) -> Input {
    Input::Changed(Found { changes, ..Found::default() })
}

fn edit() -> Input {
    found(vec![change(false)])
}

fn edit_at(seconds: u64) -> Input {
    Input::Changed(Found { changes: vec![change(false)], newest: Some(BootNs(seconds * S)), good: None })
}

fn damage() -> Input {
    found(vec![change(false), change(true)])
}

fn as_good() -> Input {
    found(Vec::new())
}

fn called_good(generation: u64) -> Input {
    Input::Changed(Found { good: Some(generation), ..Found::default() })
}

impl Rig {
    fn new() -> Self {
        Self { guard: Guard::new(policy(), Some(7)), now: S }
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        self.guard.step(BootNs(self.now), input)
    }

    fn goes_down(&mut self) -> Vec<Output> {
        self.now += 1;
        self.step(Input::Service(Service::Down(BootNs(self.now))))
    }

    fn tick_at_wake(&mut self) -> Vec<Output> {
        self.now = self.guard.wake().expect("something is waited for").0;
        self.step(Input::Tick)
    }

    /// An edit that the checker and the service accept.
    fn edited(&mut self, generation: u64) {
        assert!(self.step(edit()).contains(&Output::Check));
        assert_eq!(self.step(Input::Checked(Ok(()))), [Output::Store]);
        assert_eq!(self.step(Input::Stored(Ok(generation))), [Output::Apply]);
        assert_eq!(self.step(Input::Applied(Ok(()))), []);
        assert_eq!(self.guard.phase(), Phase::Proving);
    }
}

fn puts_back(outputs: &[Output]) -> Option<u64> {
    outputs.iter().find_map(|output| if let Output::PutBack(number) = output { Some(*number) } else { None })
}

#[test]
fn a_valid_edit_is_applied_and_good_once_it_has_served_for_a_while() {
    let mut rig = Rig::new();
    rig.edited(8);
    assert_eq!(rig.guard.good(), Some(7), "not yet");
    assert!(rig.tick_at_wake().contains(&Output::MarkGood(8)));
    assert_eq!((rig.guard.good(), rig.guard.phase()), (Some(8), Phase::Good));
}

#[test]
fn what_the_checker_refuses_is_put_back_in_the_checkers_words() {
    let mut rig = Rig::new();
    rig.step(edit());
    let outputs = rig.step(Input::Checked(Err("nginx: unknown directive in line 3".into())));
    assert!(matches!(&outputs[0], Output::Note(Kind::FilesBad { why, .. }) if why.contains("line 3")));
    assert_eq!(puts_back(&outputs), Some(7));
    // The service never saw them: there is nothing to take over again.
    let outputs = rig.step(Input::PutBack(Ok(1)));
    assert!(
        matches!(outputs[..], [Output::Note(Kind::FilesPutBack { generation: 7, files: 1 }), Output::Look]),
        "{outputs:?}"
    );
    assert_eq!(rig.guard.phase(), Phase::Good);
}

#[test]
fn damage_is_put_back_without_asking_the_checker() {
    let mut rig = Rig::new();
    let outputs = rig.step(damage());
    assert!(!outputs.contains(&Output::Check));
    assert_eq!(puts_back(&outputs), Some(7));
}

#[test]
fn files_with_which_the_service_goes_down_are_put_back_and_never_good() {
    let mut rig = Rig::new();
    rig.edited(8);
    assert_eq!(puts_back(&rig.goes_down()), Some(7));
    assert!(rig.step(Input::PutBack(Ok(1))).contains(&Output::Apply));
    rig.step(Input::Applied(Ok(())));
    rig.step(Input::Service(Service::Serves));
    assert_eq!((rig.guard.good(), rig.guard.phase(), rig.guard.wake()), (Some(7), Phase::Good, None));
}

#[test]
fn files_with_which_the_service_goes_down_while_it_takes_them_over_are_put_back() {
    let mut rig = Rig::new();
    rig.step(edit());
    rig.step(Input::Checked(Ok(())));
    rig.step(Input::Stored(Ok(8)));
    assert_eq!(rig.goes_down(), [], "systemd's job is not over");
    assert_eq!(puts_back(&rig.step(Input::Applied(Ok(())))), Some(7));
}

#[test]
fn files_with_which_somebody_restarted_the_service_into_its_end_are_put_back() {
    let mut rig = Rig::new();
    rig.now = 20 * S;
    assert_eq!(rig.goes_down(), [], "nothing is known of a change yet");
    rig.step(edit_at(19));
    rig.step(Input::Checked(Ok(())));
    rig.step(Input::Stored(Ok(8)));
    assert_eq!(puts_back(&rig.step(Input::Applied(Ok(())))), Some(7));
}

#[test]
fn files_that_the_checker_refuses_when_the_service_is_down_already_are_put_back_and_taken_over() {
    let mut rig = Rig::new();
    rig.now = 20 * S;
    rig.goes_down();
    rig.step(edit_at(19));
    assert_eq!(puts_back(&rig.step(Input::Checked(Err("nonsense".into())))), Some(7));
    assert!(rig.step(Input::PutBack(Ok(1))).contains(&Output::Apply));
}

#[test]
fn who_mends_the_files_of_a_service_that_is_down_is_left_in_peace() {
    let mut rig = Rig::new();
    rig.now = 10 * S;
    rig.goes_down();
    rig.now = 20 * S;
    rig.step(edit_at(19));
    rig.step(Input::Checked(Ok(())));
    rig.step(Input::Stored(Ok(8)));
    assert_eq!(rig.step(Input::Applied(Ok(()))), []);
    assert_eq!(rig.tick_at_wake(), [], "it does not serve yet");
    rig.step(Input::Service(Service::Serves));
    assert!(rig.tick_at_wake().contains(&Output::MarkGood(8)));
}

#[test]
fn a_service_that_is_stopped_or_killed_from_outside_says_nothing_of_its_files() {
    let mut rig = Rig::new();
    rig.edited(8);
    assert_eq!(rig.step(Input::Service(Service::Away)), []);
    assert_eq!(rig.tick_at_wake(), [], "it has not served for long enough");
    rig.step(Input::Service(Service::Serves));
    assert!(rig.tick_at_wake().contains(&Output::MarkGood(8)));
}

#[test]
fn what_a_person_calls_good_is_good() {
    let mut rig = Rig::new();
    assert!(matches!(rig.step(called_good(9))[..], [Output::Note(Kind::FilesGood { generation: 9 })]));
    assert_eq!(puts_back(&rig.step(damage())), Some(9));
    let mut rig = Rig { guard: Guard::new(policy(), None), now: S };
    rig.step(called_good(1));
    assert_eq!((rig.guard.good(), rig.guard.phase()), (Some(1), Phase::Good));
}

#[test]
fn what_the_service_refuses_to_take_over_is_put_back() {
    let mut rig = Rig::new();
    rig.step(edit());
    rig.step(Input::Checked(Ok(())));
    rig.step(Input::Stored(Ok(8)));
    assert_eq!(puts_back(&rig.step(Input::Applied(Err("reload failed".into())))), Some(7));
}

#[test]
fn a_change_while_one_is_proven_begins_anew() {
    let mut rig = Rig::new();
    rig.edited(8);
    rig.now += 29 * S;
    rig.edited(9);
    rig.now += 2 * S;
    assert_eq!(rig.step(Input::Tick), []);
    assert!(rig.tick_at_wake().contains(&Output::MarkGood(9)), "and 8 is not");
}

#[test]
fn an_edit_that_is_taken_back_by_hand_is_applied_and_nothing_is_put_back() {
    let mut rig = Rig::new();
    rig.edited(8);
    assert_eq!(rig.step(as_good()), [Output::Apply]);
    rig.step(Input::Applied(Ok(())));
    assert_eq!((rig.guard.good(), rig.guard.phase()), (Some(7), Phase::Good));
}

#[test]
fn while_held_nothing_is_done_and_afterwards_it_is_looked_at() {
    let mut rig = Rig::new();
    rig.step(Input::Held(true));
    assert_eq!(rig.step(damage()), []);
    assert_eq!(rig.step(Input::Held(false)), [Output::Look], "what was found before is out of date");
    assert_eq!(puts_back(&rig.step(damage())), Some(7));
}

#[test]
fn a_service_that_went_down_while_held_has_its_files_put_back_afterwards() {
    let mut rig = Rig::new();
    rig.edited(8);
    rig.step(Input::Held(true));
    assert_eq!(rig.goes_down(), []);
    assert_eq!(puts_back(&rig.step(Input::Held(false))), Some(7));
}

#[test]
fn what_cannot_be_put_back_is_tried_again() {
    let mut rig = Rig::new();
    rig.step(damage());
    let outputs = rig.step(Input::PutBack(Err("read-only file system".into())));
    assert!(matches!(&outputs[..], [Output::Note(Kind::FilesTrouble { .. })]), "{outputs:?}");
    assert_eq!(puts_back(&rig.tick_at_wake()), Some(7));
}

#[test]
fn somebody_who_insists_is_left_to_a_person() {
    let mut rig = Rig::new();
    for _ in 0..3 {
        assert_eq!(puts_back(&rig.step(damage())), Some(7));
        rig.step(Input::PutBack(Ok(1)));
    }
    let outputs = rig.step(damage());
    assert_eq!((puts_back(&outputs), rig.guard.phase()), (None, Phase::GivenUp));
    rig.step(Input::Held(true));
    rig.step(Input::Held(false));
    assert_eq!(puts_back(&rig.step(damage())), Some(7), "a person has looked at it");
}

#[test]
fn without_a_good_generation_the_first_valid_files_become_one_and_bad_ones_do_not() {
    let mut rig = Rig { guard: Guard::new(policy(), None), now: S };
    assert_eq!(rig.step(as_good()), [Output::Check]);
    let outputs = rig.step(Input::Checked(Err("nonsense".into())));
    assert!(matches!(outputs[..], [Output::Note(Kind::FilesBad { generation: None, .. })]), "{outputs:?}");
    assert_eq!(rig.guard.phase(), Phase::Unguarded);
    rig.step(edit());
    assert_eq!(rig.step(Input::Checked(Ok(()))), [Output::Store]);
    assert_eq!(rig.step(Input::Stored(Ok(1))), [], "the service runs with them already");
    assert!(rig.tick_at_wake().contains(&Output::MarkGood(1)));
}

fn inputs() -> impl Strategy<Value = Vec<(u8, u64)>> {
    proptest::collection::vec((0..16_u8, 0..40_u64), 1..120)
}

proptest! {
    /// Whatever is told, in whatever order: one thing at a time is asked for; only good generations are put
    /// back, and never while held; a generation becomes good only after it was stored, the service took it over,
    /// and no change came since; and whatever is asked for again and again comes to an end.
    #[test]
    fn invariants(life in inputs()) {
        let mut rig = Rig::new();
        let (mut asked, mut stored, mut held) = (None::<Output>, 7_u64, false);
        let (mut good, mut candidate) = (vec![7_u64], None::<u64>);
        for (kind, seconds) in life {
            rig.now += seconds * S;
            // An answer is given only to what was asked.
            let input = match (kind, &asked) {
                (0..=1, _) => edit(),
                (2, _) => damage(),
                (3, _) => as_good(),
                (4, _) => Input::Service(Service::Down(BootNs(rig.now))),
                (5, _) => Input::Service(Service::Serves),
                (14, _) => Input::Service(Service::Away),
                (15, _) => {
                    stored += 1;
                    good.push(stored);
                    candidate = None;
                    called_good(stored)
                }
                (6, _) => Input::Held(true),
                (7, _) => Input::Held(false),
                (8, _) | (_, None) => Input::Tick,
                (n, Some(Output::Check)) => Input::Checked(if n % 2 == 0 { Ok(()) } else { Err("no".into()) }),
                (n, Some(Output::Store)) => {
                    stored += 1;
                    Input::Stored(if n < 13 { Ok(stored) } else { Err("full".into()) })
                }
                (n, Some(Output::Apply)) => Input::Applied(if n < 12 { Ok(()) } else { Err("no".into()) }),
                (n, Some(_)) => Input::PutBack(if n < 12 { Ok(1) } else { Err("no".into()) }),
            };
            match &input {
                Input::Held(now) => held = *now,
                Input::Stored(Ok(number)) => candidate = Some(*number),
                Input::Changed(_) if !held && asked.is_none() => candidate = None,
                _ => {}
            }
            if matches!(input, Input::Checked(_) | Input::Stored(_) | Input::Applied(_) | Input::PutBack(_)) {
                asked = None;
            }
            for output in rig.step(input.clone()) {
                match &output {
                    Output::Note(_) | Output::Look => {}
                    Output::MarkGood(number) => {
                        prop_assert_eq!(Some(*number), candidate, "after {:?}", input);
                        good.push(*number);
                    }
                    other => {
                        prop_assert!(asked.is_none(), "{other:?} while {asked:?}");
                        if let Output::PutBack(number) = other {
                            prop_assert_eq!(good.last(), Some(number));
                            prop_assert!(!held, "put back while held");
                        }
                        asked = Some(output);
                    }
                }
            }
            prop_assert_eq!(rig.guard.good(), good.last().copied());
        }
    }
}
