//! What `ftctl` on a host says. A test that asked for something else has failed, and ends here with all that was said.

use serde_json::Value;

use crate::Host;
use crate::command::Output;

fn run(host: &Host, words: &[&str]) -> Output {
    host.run(words).unwrap_or_else(|error| panic!("{words:?} cannot be run: {error:#}"))
}

/// What a command prints as JSON, however it ends.
///
/// # Panics
/// When it prints none.
pub fn json(host: &Host, words: &[&str]) -> Value {
    let out = run(host, &[&["ftctl", "--json"], words].concat());
    serde_json::from_str(&out.stdout).unwrap_or_else(|error| panic!("{words:?}: {error}: {out:?}"))
}

/// The error, with its mend, of a command that is refused.
///
/// # Panics
/// When it is not, or says no mend.
pub fn refused(host: &Host, words: &[&str]) -> String {
    let out = run(host, &[&["ftctl"], words].concat());
    assert_eq!(out.status.code(), Some(1), "{words:?}: {out:?}");
    assert!(out.stderr.contains("mend: "), "{words:?}: {}", out.stderr);
    out.stderr
}
