//! The `memory3` program: everything is in [`memory3::cli`].

fn main() -> std::process::ExitCode {
    memory3::cli::run()
}
