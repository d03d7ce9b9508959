//! A service of the tests' own on a host, `own.service`, that ends as it is told to.
//!
//! It exits with code N on the N-th real-time signal (see [`exit_signal`]). With a port it also answers there,
//! until SIGUSR1 makes it deaf: then it lives on and nobody can connect. systemd takes it for started when
//! all its signal handlers are in place, so a signal that is sent once it is up is never too early.

use anyhow::Result;

use crate::Host;

/// Its unit.
pub const UNIT: &str = "own.service";
const SCRIPT: &str = "/usr/local/lib/own.py";

const PROGRAM: &str = r#"
import os, signal, socket, sys

for n in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
    signal.signal(n, lambda n, frame: os._exit(n - signal.SIGRTMIN))
if len(sys.argv) > 1:
    door = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    signal.signal(signal.SIGUSR1, lambda n, frame: door.close())
place = os.environ["NOTIFY_SOCKET"]
if place.startswith("@"):
    place = "\0" + place[1:]
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", place)
try:
    while len(sys.argv) > 1:
        door.accept()[0].close()
except OSError:
    pass
while True:
    signal.pause()
"#;

/// The number of the signal on which it exits with this code, 0 to 30.
pub fn exit_signal(code: u8) -> i32 {
    // SIGRTMIN, as the C library counts (the kernel's first two are its own).
    34 + i32::from(code)
}

/// Puts it on a host and starts it.
pub fn start(host: &Host, port: Option<u16>) -> Result<()> {
    let port = port.map_or_else(String::new, |port| port.to_string());
    let unit = format!("[Service]\nType=notify\nExecStart=/usr/bin/python3 {SCRIPT} {port}\n");
    host.write(SCRIPT, PROGRAM)?;
    host.write(format!("/etc/systemd/system/{UNIT}"), unit)?;
    host.sh("systemctl daemon-reload && systemctl start own").map(drop)
}
