//! What has changed inside a text file, for people: in an event, on a terminal.
//!
//! Bounded in what it reads, in time and in what it says: the files are whatever somebody has put there. Control
//! characters are shown, not sent to the terminal.

use std::{fmt::Write as _, path::Path, time::Duration};

use similar::TextDiff;

/// Files longer than this are not compared line by line.
const MAX_BYTES: usize = 1 << 20;
/// After this the diff is coarser, not later.
const MAX_TIME: Duration = Duration::from_millis(500);
/// Characters of one line that are shown.
const MAX_WIDTH: usize = 500;
/// A NUL among so many first bytes makes a file binary; git's rule.
const SNIFF: usize = 8000;

/// A unified diff of at most `max_lines` lines, each with its end; empty if there is no difference. Files that are
/// binary or long are said to be that, in one line.
pub fn diff(path: &Path, old: &[u8], new: &[u8], max_lines: usize) -> String {
    if old == new {
        return String::new();
    }
    let path = path.display();
    let sizes = format!("{} -> {} bytes", old.len(), new.len());
    if is_binary(old) || is_binary(new) {
        return format!("{path}: binary, {sizes}\n");
    }
    if old.len().max(new.len()) > MAX_BYTES {
        return format!("{path}: too long to show what differs, {sizes}\n");
    }
    let (old, new) = (String::from_utf8_lossy(old), String::from_utf8_lossy(new));
    // Only a newline ends a line here: elsewhere in it a carriage return is something to be seen.
    let lines = [&old, &new].map(|text| text.split_inclusive('\n').collect::<Vec<_>>());
    let diff =
        TextDiff::configure().timeout(MAX_TIME).newline_terminated(true).diff_slices(&lines[0], &lines[1]);
    let header = (format!("{path} (good)"), format!("{path} (now)"));
    let text = diff.unified_diff().context_radius(3).header(&header.0, &header.1).to_string();
    if text.is_empty() {
        return format!("{path}: differs only in bytes that are no text, {sizes}\n");
    }
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let shown = if lines.len() > max_lines { max_lines.saturating_sub(1) } else { lines.len() };
    let mut out: String = lines[..shown].iter().map(|line| printable(line)).collect();
    if shown < lines.len() {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "… {} more lines", lines.len() - shown);
    }
    out
}

fn is_binary(content: &[u8]) -> bool {
    content.iter().take(SNIFF).any(|byte| *byte == 0)
}

fn printable(line: &str) -> String {
    let line = line.strip_suffix('\n').unwrap_or(line);
    let mut out = String::with_capacity(line.len() + 1);
    for (n, c) in line.chars().enumerate() {
        if n == MAX_WIDTH {
            out.push('…');
            break;
        }
        if c.is_control() && c != '\t' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(old: &str, new: &str, max: usize) -> String {
        diff(Path::new("/etc/a.conf"), old.as_bytes(), new.as_bytes(), max)
    }

    #[test]
    fn a_changed_line_with_what_is_around_it() {
        insta::assert_snapshot!(of("a\nb\nworkers 4;\nc\n", "a\nb\nworkers -1;\nc", 100), @r"
        --- /etc/a.conf (good)
        +++ /etc/a.conf (now)
        @@ -1,4 +1,4 @@
         a
         b
        -workers 4;
        -c
        +workers -1;
        +c
        \ No newline at end of file
        ");
    }

    #[test]
    fn binary_is_said_and_not_shown() {
        assert_eq!(of("text\n", "te\0xt\n", 100), "/etc/a.conf: binary, 5 -> 6 bytes\n");
        let long = "x\n".repeat(MAX_BYTES);
        assert_eq!(
            of("text\n", &long, 100),
            "/etc/a.conf: too long to show what differs, 5 -> 2097152 bytes\n"
        );
    }

    #[test]
    fn a_terminal_is_not_written_to_by_a_file() {
        let text = of("a\n", "\u{1b}[2J\rb\u{9b}\n", 100);
        assert!(text.contains("+\\u{1b}[2J\\rb\\u{9b}\n"), "{text}");
    }

    proptest! {
        #[test]
        fn it_stays_within_its_bound(old in "([ab]\n){0,40}", new in "([abc]\n){0,40}", max in 1_usize..20) {
            let text = of(&old, &new, max);
            prop_assert_eq!(text.is_empty(), old == new);
            prop_assert!(text.lines().count() <= max);
            prop_assert!(text.is_empty() || text.ends_with('\n'));
        }
    }
}
