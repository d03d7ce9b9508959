//! ftctl: see `ftd::cli`.

fn main() -> std::process::ExitCode {
    ftd::cli::main()
}
